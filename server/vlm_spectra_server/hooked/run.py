"""One run of a model: what it captures, what it changes, and when it stops.

State belongs to the run and travels with the call in a context variable, so threads never see each other's hooks and
an exception leaves nothing behind on the model. A model without a run does exactly what transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .edits import AnyEdit
from .selection import Columns

Sink = Callable[[str, torch.Tensor], None]
"""Takes a captured activation: its output name, and the tensor on the model's device, already cut and cast."""


class StopForward(Exception):  # noqa: N818
    """Raised inside a forward pass when nothing later was asked for."""


@dataclass(frozen=True)
class Capture:
    """What to keep of one hook.

    Attributes:
        output: The name under which the sink gets it.
        columns: The positions to keep; None for all.
        heads: The heads to keep; None for all.
        dtype: The type to cast to; None for the activation's own.
    """

    output: str = ""
    columns: Columns | None = None
    heads: Sequence[int] | None = None
    dtype: torch.dtype | None = None


@dataclass
class Run:
    """One run.

    Attributes:
        captures: What to keep, by full hook name.
        edits: What to change, by full hook name, in order.
        sink: Takes what was captured.
        needs_output: Whether the forward pass must go to its end.
        check: Called before every layer; raises to end the run.
        on_layer: Called after every layer with the number of layers done.
        start: The sequence position of the current pass's first token.
        layers_run: Layers done in the current pass.
        last_logits: [batch, vocab], the logits of the newest position.
        decoder_inputs: What the decoder was called with in the current pass.
    """

    captures: Mapping[str, Sequence[Capture]] = field(default_factory=dict)
    edits: Mapping[str, Sequence[AnyEdit]] = field(default_factory=dict)
    sink: Sink = lambda name, tensor: None
    needs_output: bool = True
    check: Callable[[], None] = lambda: None
    on_layer: Callable[[int], None] = lambda done: None
    start: int = 0
    layers_run: int = 0
    last_logits: torch.Tensor | None = None
    decoder_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._awaited = {capture.output for captures in self.captures.values() for capture in captures}

    @contextmanager
    def active(self) -> Iterator[Run]:
        """Make this the run of the calls inside the block."""
        token = _CURRENT.set(self)
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    def wants(self, *names: str) -> bool:
        """Whether any of these hooks is captured or changed."""
        return any(name in self.captures or name in self.edits for name in names)

    def edited(self, name: str, tensor: torch.Tensor, start: int | None = None) -> torch.Tensor:
        """The activation after this hook's interventions."""
        for edit in self.edits.get(name, ()):
            tensor = edit(tensor, self.start if start is None else start)
        return tensor

    def keep(self, name: str, make: Callable[[Capture], torch.Tensor]) -> None:
        """Hand a hook's selected part to the sink, if it is captured.

        Args:
            name: The hook's full name.
            make: Gives the part that a capture asks for; called only if it is captured.
        """
        captures = self.captures.get(name)
        if captures is None:
            return
        for capture in captures:
            part = make(capture)
            self.sink(capture.output, part if capture.dtype is None else part.to(capture.dtype))
            self._awaited.discard(capture.output)
        if not self._awaited and not self.needs_output:
            raise StopForward

    def reach(
        self, name: str, tensor: torch.Tensor, head_axis: int | None = None, start: int | None = None
    ) -> torch.Tensor:
        """An activation arrives at a hook: change it, keep it, go on with it.

        Args:
            name: The hook's full name.
            tensor: The activation, positions on axis 1.
            head_axis: The axis of heads, where there is one.
            start: The sequence position of its first row; that of the pass where None.
        """
        if not self.wants(name):
            return tensor
        tensor = self.edited(name, tensor, start)
        self.keep(name, lambda capture: select(tensor, capture, 1, head_axis))
        return tensor


def select(tensor: torch.Tensor, capture: Capture, position_axis: int | None, head_axis: int | None) -> torch.Tensor:
    """The part of an activation that a capture asks for."""
    if capture.columns is not None and position_axis is not None:
        tensor = capture.columns.take(tensor, position_axis)
    if capture.heads is not None and head_axis is not None:
        tensor = tensor.index_select(head_axis, torch.tensor(capture.heads, device=tensor.device))
    return tensor


_CURRENT: ContextVar[Run | None] = ContextVar("vlm_spectra_run", default=None)


def current_run() -> Run | None:
    """The run of the calling thread or task, or None."""
    return _CURRENT.get()
