"""One run of a model: what it captures, what it changes, and when it stops.

State belongs to the run and travels with the call in a context variable, so threads never see each other's hooks and
an exception leaves nothing behind on the model. A model without a run does exactly what transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vlm_spectra.errors import NotSupportedError

from .edits import AnyEdit
from .selection import Columns
from .views import Places

Sink = Callable[[str, torch.Tensor], None]
"""Takes a captured activation: its output name, and the tensor on the model's device, already cut and cast."""


Part = Callable[[torch.Tensor, "Capture"], torch.Tensor]
"""The part of a gradient that a capture asks for."""


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
        places: Of a vision hook, where its rows stand in the tower's activation.
        reduce: "mean_heads" or "norm"; None to keep the part itself.
        head_axis: The axis of heads, for the former.
    """

    output: str = ""
    columns: Columns | None = None
    heads: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    places: Places | None = None
    reduce: str | None = None
    head_axis: int | None = None

    def finished(self, part: torch.Tensor) -> torch.Tensor:
        """A selected part as it is kept: reduced in float32, then cast."""
        dtype = self.dtype or part.dtype
        if self.reduce == "mean_heads" and self.head_axis is not None:
            part = part.float().mean(self.head_axis)
        elif self.reduce == "norm":
            part = part.float().norm(dim=-1)
        return part.to(dtype)


@dataclass
class Run:
    """One run.

    Attributes:
        captures: What to keep, by full hook name.
        edits: What to change, by full hook name, in order.
        gradients: Of which activations to keep the gradient, by full hook name; needs autograd.
        sink: Takes what was captured.
        needs_output: Whether the forward pass must go to its end.
        check: Called before every layer; raises to end the run.
        on_layer: Called after every layer with the number of layers done.
        resume: The block to begin with and the stream [batch, seq, hidden] that enters it; earlier ones are left out.
        start: The sequence position of the current pass's first token.
        layers_run: Layers done in the current pass.
        last_logits: [batch, vocab], the logits of the newest position.
        decoder_inputs: What the decoder was called with in the current pass.
        stream: The residual stream, as it entered or left the newest block.
        leaves: The activations with which the graph of a backward pass begins.
        traced: The hooks of `gradients` that the pass has come to, and how to make a gradient of zeros for each.
    """

    captures: Mapping[str, Sequence[Capture]] = field(default_factory=dict)
    edits: Mapping[str, Sequence[AnyEdit]] = field(default_factory=dict)
    gradients: Mapping[str, Sequence[Capture]] = field(default_factory=dict)
    sink: Sink = lambda name, tensor: None
    needs_output: bool = True
    check: Callable[[], None] = lambda: None
    on_layer: Callable[[int], None] = lambda done: None
    resume: tuple[int, torch.Tensor] | None = None
    start: int = 0
    layers_run: int = 0
    last_logits: torch.Tensor | None = None
    decoder_inputs: Mapping[str, Any] = field(default_factory=dict)
    stream: torch.Tensor | None = None
    leaves: list[torch.Tensor] = field(default_factory=list)
    traced: dict[str, Callable[[], None]] = field(default_factory=dict)

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

    @property
    def awaited(self) -> set[str]:
        """The captures that have not come yet, by output name."""
        return self._awaited

    def wants(self, *names: str) -> bool:
        """Whether any of these hooks is captured or changed, or its gradient asked for."""
        return any(name in each for name in names for each in (self.captures, self.edits, self.gradients))

    def traces(self, *names: str) -> bool:
        """Whether the gradient of any of these hooks is asked for."""
        return any(name in self.gradients for name in names)

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
            self.sink(capture.output, capture.finished(make(capture).detach()))
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
        return self.trace(name, tensor, lambda gradient, capture: select(gradient, capture, 1, head_axis))

    def trace(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        """An activation whose gradient will be kept, if it is asked for; the model must go on with what this returns.

        Args:
            name: The hook's full name.
            tensor: The activation, or what has the same gradient.
            part: Cuts a capture's part out of the gradient.
        """
        if name not in self.gradients:
            return tensor
        tensor = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()
        self.watch(name, tensor, part)
        return tensor

    def watch(self, name: str, tensor: torch.Tensor, part: Part) -> None:
        """As `trace`, for a tensor that the model goes on with by itself."""
        if name not in self.gradients:
            return
        if not tensor.requires_grad:  # nothing before it was asked for: the graph begins here
            self.leaves.append(tensor.requires_grad_(True))
        extents, kind = tensor.shape, {"dtype": tensor.dtype, "device": tensor.device}
        self.traced[name] = lambda: self._take_gradient(name, part, torch.zeros(extents, **kind))
        tensor.register_hook(partial(self._take_gradient, name, part))

    def check_traced(self) -> None:
        """Refuse a gradient that the pass cannot give.

        Raises:
            NotSupportedError: The model's own path did not lead through the hook.
        """
        for name in self.gradients:
            if name not in self.traced:
                raise NotSupportedError(
                    f"{name}_grad cannot be had: the run does not lead through {name}, which is computed beside it or "
                    "belongs to a part that was not used.",
                    field="hooks",
                )

    def fill_gradients(self) -> None:
        """Zeros for the activations that the target does not depend on."""
        for name in self.gradients:
            if name in self.traced:
                self.traced[name]()

    def release(self) -> None:
        """Let go of the pass's tensors, and with them of its graph."""
        self.leaves, self.traced, self.decoder_inputs = [], {}, {}
        self.last_logits = self.stream = None

    def _take_gradient(self, name: str, part: Part, gradient: torch.Tensor) -> None:
        self.check()
        self.traced.pop(name, None)
        for capture in self.gradients[name]:
            # A copy: autograd goes on with this very memory.
            self.sink(capture.output, capture.finished(part(gradient, capture).clone()))


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
