"""Where a call's results go: into a dictionary in process, into shared memory behind a server.

A call announces its tensors as soon as it knows their shapes, before it runs, and delivers each as it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vlm_spectra import dtypes
from vlm_spectra.results import Token


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to come.

    Attributes:
        name: A hook's full name or the name of an output.
        dtype: The element type by name.
        shape: The extents.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return dtypes.size_of(self.shape, self.dtype)


class Delivery:
    """Takes what a call gives and is asked whether to go on. This one keeps the tensors.

    Attributes:
        tensors: What was delivered, by name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._device: torch.device | None = None

    def announce(self, specs: Sequence[TensorSpec]) -> None:
        """These tensors will come. May refuse them."""

    def bound(self, specs: Sequence[TensorSpec]) -> None:
        """At least these tensors will come. May refuse them, while nothing has been computed."""

    def deliver(self, name: str, tensor: torch.Tensor) -> None:
        """Here is one. It must not be changed afterwards, so what is a view of something else is copied."""
        if tensor.device.type != "cpu":  # of a model over several GPUs, all come to one
            self._device = self._device or tensor.device
            tensor = tensor.to(self._device)
        self.tensors[name] = tensor.clone() if tensor._base is not None else tensor

    def token(self, token: Token) -> None:
        """A token was chosen."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """So far the call has come: "forward", "generating" or "analysing", units done and in all."""

    def check(self) -> None:
        """Asked between layers: raises to end the call."""
