"""Interventions at work: each becomes an `Edit`, a function on one hook's activation in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vlm_spectra import arrays
from vlm_spectra.errors import InvalidInputError, ShapeMismatchError
from vlm_spectra.hooks import HookSpec
from vlm_spectra.interventions import (
    AddActivation,
    BlockAttention,
    Intervention,
    MeanAblation,
    PatchActivation,
    ProjectOut,
    ScaleActivation,
    SetAttentionMask,
    ZeroAblation,
)
from vlm_spectra.positions import Layout, listed

from .selection import Columns, head_index, selected_shape


class Edit:
    """One intervention at one hook, for one run.

    Args:
        action: The intervention.
        name: The hook's full name, for messages.
        spec: The hook.
        layout: The prompt, which positions refer to.
        sizes: The extent of each named axis.

    Raises:
        ShapeMismatchError: A tensor does not fit the selected part.
        InvalidInputError: A position or head is out of range.
    """

    def __init__(self, action: Intervention, name: str, spec: HookSpec, layout: Layout, sizes: dict[str, int]) -> None:
        self.action, self.name, self.spec = action, name, spec
        items = listed(action.positions)
        self.columns = None if items is None else Columns(layout.rectangle(items))
        self.heads = head_index(spec, tuple(action.heads) if action.heads is not None else None, sizes)
        self.tokens = torch.from_numpy(layout.tokens)
        self.mean: torch.Tensor | None = None
        self.value = self._load(layout, sizes)

    def _load(self, layout: Layout, sizes: dict[str, int]) -> torch.Tensor | None:
        """The intervention's tensor, its shape checked against the selected part."""
        action = self.action
        given = getattr(action, "value", getattr(action, "direction", None))
        if given is None:
            return None
        value = as_tensor(given)
        shape = selected_shape(self.spec, self.columns, self.heads, sizes)
        if isinstance(action, ProjectOut):
            if value.dim() != 1 or value.shape[0] != shape[-1]:
                raise ShapeMismatchError(
                    f"the direction for {self.name} has shape {list(value.shape)}; it needs [{shape[-1]}].",
                    field="direction",
                )
            return value
        if isinstance(action, MeanAblation):
            value = average(value, self.spec)
        if not broadcasts(value.shape, shape):
            raise ShapeMismatchError(
                f"the tensor for {self.name} has shape {list(value.shape)}; the selected part has shape "
                f"{list(shape)} ({', '.join(self.spec.shape)}), to which it must broadcast.",
                field="value",
            )
        axis = self.spec.position_axis
        if axis is not None and self.columns is None and value.dim() >= len(shape) - axis:
            extent = value.shape[axis - len(shape)]
            if extent > 1:  # one value a position: tied to the prompt, not to what is generated
                self.columns = Columns(layout.rectangle(None))
        return value

    def __call__(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        """The changed activation.

        Args:
            tensor: The hook's activation in this pass.
            start: The sequence position of its first row on the position axis.
        """
        axis = self.spec.position_axis
        if axis is None or self.columns is None:
            return self._on_heads(tensor, None, start)
        columns, kept = self.columns.within(start, start + tensor.shape[axis])
        if columns is None:
            return tensor
        part = self._on_heads(columns.take(tensor, axis), kept, start)
        return columns.put(tensor, axis, part)

    def _on_heads(self, part: torch.Tensor, kept: list[int] | None, start: int) -> torch.Tensor:
        if self.heads is None or self.spec.head_axis is None:
            return self._change(part, kept, start)
        index = torch.tensor(self.heads, device=part.device)
        changed = self._change(part.index_select(self.spec.head_axis, index), kept, start)
        return part.index_copy(self.spec.head_axis, index, changed)

    def _change(self, part: torch.Tensor, kept: list[int] | None, start: int) -> torch.Tensor:
        action = self.action
        if isinstance(action, PatchActivation):
            return self._valued(part, kept).expand(part.shape).to(part.dtype)
        if isinstance(action, ZeroAblation):
            return torch.zeros_like(part)
        if isinstance(action, MeanAblation):
            mean = self._own_mean(part, start) if self.value is None else self._valued(part, kept)
            return mean.expand(part.shape).to(part.dtype)
        if isinstance(action, AddActivation):
            return part + action.scale * self._valued(part, kept)
        if isinstance(action, ScaleActivation):
            return part * action.factor
        assert isinstance(action, ProjectOut)
        direction = self._valued(part, None).float()
        x = part.float()
        along = (x @ direction) / direction.dot(direction).clamp_min(torch.finfo(torch.float32).tiny)
        return (x - along[..., None] * direction).to(part.dtype)

    def _valued(self, part: torch.Tensor, kept: list[int] | None) -> torch.Tensor:
        """The tensor on the part's device and in its type, cut to the positions of this pass."""
        assert self.value is not None
        value = self.value.to(device=part.device, dtype=part.dtype)
        axis = self.spec.position_axis
        if kept is None or axis is None or value.dim() < part.dim() - axis:
            return value
        axis -= part.dim()
        return value if value.shape[axis] == 1 else value.index_select(axis, torch.tensor(kept, device=part.device))

    def _own_mean(self, part: torch.Tensor, start: int) -> torch.Tensor:
        """The mean over the selected positions of the prompt, padding left out; kept for generated tokens."""
        axis = self.spec.position_axis
        assert axis is not None
        if self.mean is None:
            if self.columns is None:
                tokens = self.tokens[:, start : start + part.shape[axis]]
                part = part.narrow(axis, 0, tokens.shape[1])  # an answer may stand behind the prompt
            else:
                tokens = self.columns.take(self.tokens, 1)
            view = [1] * part.dim()
            view[0], view[axis] = tokens.shape
            weight = tokens.to(part.device).view(view)
            total = torch.where(weight, part, torch.zeros_like(part)).float().sum(axis, keepdim=True)
            self.mean = total / weight.sum(axis, keepdim=True).clamp_min(1)
        return self.mean


class MaskEdit:
    """A `BlockAttention` or `SetAttentionMask` at one layer, for one run: works on additive masks.

    Args:
        action: The intervention.
        name: The hook's full name, for messages.
        layout: The prompt, which positions refer to.
        sizes: The extent of each named axis.
    """

    def __init__(self, action: Intervention, name: str, spec: HookSpec, layout: Layout, sizes: dict[str, int]) -> None:
        self.action = action
        items = listed(action.positions)
        self.queries = None if items is None else _row_mask(layout, items)
        self.keys: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        every_head = HookSpec(spec.name, ("batch", "heads", "query", "key"), spec.dtype, spec.description)
        self.heads = head_index(every_head, tuple(action.heads) if action.heads is not None else None, sizes)
        self.count, self.length = sizes["heads"], layout.length
        if isinstance(action, BlockAttention):
            keys = listed(action.keys)
            self.keys = None if keys is None else _row_mask(layout, keys)
        elif isinstance(action, SetAttentionMask):
            self.columns = None if items is None else Columns(layout.rectangle(items))
            mask = as_tensor(action.mask)
            self.mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
            shape = selected_shape(every_head, self.columns, self.heads, sizes)
            if not broadcasts(mask.shape, shape):
                raise ShapeMismatchError(
                    f"the mask for {name} has shape {list(mask.shape)}; the selected part has shape {list(shape)} "
                    "(batch, heads, query, key), to which it must broadcast.",
                    field="mask",
                )

    def __call__(self, mask: torch.Tensor, start: int) -> torch.Tensor:
        """The changed mask.

        Args:
            mask: [batch or 1, heads or 1, query, key] float32, 0 or -inf or a bias.
            start: The sequence position of the first query.
        """
        batch = len(self.queries) if self.queries is not None else mask.shape[0]
        batch = max(batch, mask.shape[0], len(self.keys) if self.keys is not None else 1)
        mask = mask.expand(batch, self.count if self.heads is not None else mask.shape[1], -1, -1)
        if isinstance(self.action, BlockAttention):
            blocked = self._blocked(mask, start)
            if self.heads is not None:
                only = torch.zeros(self.count, dtype=torch.bool, device=mask.device)
                only[self.heads] = True
                blocked = blocked & only.view(1, -1, 1, 1)
            return mask.masked_fill(blocked, -torch.inf)
        return self._replaced(mask, start)

    def _blocked(self, mask: torch.Tensor, start: int) -> torch.Tensor:
        queries, keys = mask.shape[-2:]
        rows = torch.ones(mask.shape[0], queries, dtype=torch.bool, device=mask.device)
        if self.queries is not None:
            rows = _window(self.queries, start, queries, mask.device)
        columns = torch.ones(mask.shape[0], keys, dtype=torch.bool, device=mask.device)
        if self.keys is not None:
            # A sliding window's cache has let go of the first keys.
            columns = _window(self.keys, max(0, start + queries - keys), keys, mask.device)
        return rows[:, None, :, None] & columns[:, None, None, :]

    def _replaced(self, mask: torch.Tensor, start: int) -> torch.Tensor:
        """The given mask in the prompt's corner, [prompt, prompt]; a generated token keeps its own."""
        assert self.mask is not None
        if start >= self.length:
            return mask
        mask = mask.expand(-1, self.count, -1, -1).clone()
        corner = mask[:, :, : self.length, : self.length]
        heads = torch.tensor(self.heads if self.heads is not None else range(self.count), device=mask.device)
        part = corner.index_select(1, heads)
        rows = part if self.columns is None else self.columns.take(part, 2)
        given = self.mask.to(mask.device).expand(rows.shape).contiguous()
        part = given if self.columns is None else self.columns.put(part, 2, given)
        corner.index_copy_(1, heads, part)
        return mask


class FunctionEdit:
    """A caller's own function on the whole activation of each pass; in process only.

    Args:
        function: activation -> activation of the same shape.
        name: The hook's full name, for messages.
    """

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        """The changed activation; a function that returns None has changed nothing."""
        changed = self.function(tensor)
        if changed is None:
            return tensor
        if not isinstance(changed, torch.Tensor) or changed.shape != tensor.shape:
            found = list(changed.shape) if isinstance(changed, torch.Tensor) else type(changed).__name__
            raise ShapeMismatchError(
                f"the function at {self.name} returned {found}; it must return a tensor {list(tensor.shape)}."
            )
        return changed.to(device=tensor.device, dtype=tensor.dtype)


AnyEdit = Callable[[torch.Tensor, int], torch.Tensor]


def make_edit(action: Any, name: str, spec: HookSpec, layout: Layout, sizes: dict[str, int]) -> AnyEdit:
    """The edit that carries an intervention out at a hook."""
    if isinstance(action, BlockAttention | SetAttentionMask):
        return MaskEdit(action, name, spec, layout, sizes)
    if isinstance(action, Intervention):
        return Edit(action, name, spec, layout, sizes)
    return FunctionEdit(action, name)


def as_tensor(value: Any) -> torch.Tensor:
    """A value of an intervention as a tensor.

    Raises:
        InvalidInputError: It is not an array or a number.
    """
    if isinstance(value, torch.Tensor):
        return value.detach() if not value.requires_grad else value
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    try:
        tensor = arrays.to_torch(value)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"an intervention's value is an array or a number, not {type(value).__name__}.", field="value"
        ) from error
    return tensor  # type: ignore[no-any-return]


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a shape broadcasts to another without enlarging it."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def average(value: torch.Tensor, spec: HookSpec) -> torch.Tensor:
    """The mean over all axes before those of one position: [hidden], or [heads, head_dim]."""
    kept = len(spec.shape) - (spec.position_axis or 0) - 1
    while value.dim() > kept:
        value = value.float().mean(0)
    return value


def _row_mask(layout: Layout, items: Sequence[Any]) -> torch.Tensor:
    mask = torch.zeros(layout.tokens.shape, dtype=torch.bool)
    for row in range(len(mask)):
        mask[row, layout.columns(items, row)] = True
    return mask


def _window(mask: torch.Tensor, start: int, length: int, device: torch.device) -> torch.Tensor:
    """The columns [start, start + length) of a mask over the prompt; false for generated columns."""
    part = mask[:, start : start + length]
    return torch.nn.functional.pad(part, (0, length - part.shape[1])).to(device)
