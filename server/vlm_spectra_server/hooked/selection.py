"""Taking a part of an activation out and putting it back: by positions, which may differ from row to row, and heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.hooks import HookSpec


class Columns:
    """Columns of a sequence axis, row by row.

    Args:
        columns: [batch, n] int64, in the order in which they are wanted.
    """

    def __init__(self, columns: NDArray[np.int64]) -> None:
        self.array = columns
        self.same = bool((columns == columns[:1]).all())

    @property
    def count(self) -> int:
        """Columns a row."""
        return int(self.array.shape[1])

    def take(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor with only these columns on an axis."""
        if self.same:
            return tensor.index_select(axis, self._first(tensor.device))
        return tensor.gather(axis, self._index(tensor, axis, tensor.shape))

    def put(self, tensor: torch.Tensor, axis: int, part: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor with these columns replaced."""
        if self.same:
            return tensor.index_copy(axis, self._first(tensor.device), part)
        return tensor.scatter(axis, self._index(tensor, axis, part.shape), part)

    def within(self, start: int, stop: int) -> tuple[Columns | None, list[int]]:
        """The columns that lie in a window, counted from its start, and their indices here; None where none do.

        Raises:
            InvalidInputError: A window that would cut the rows differently.
        """
        inside = (self.array >= start) & (self.array < stop)
        if not inside.any():
            return None, []
        if not (inside == inside[:1]).all():
            raise InvalidInputError("a selection of positions was cut by the key-value cache; give fewer positions.")
        kept = np.flatnonzero(inside[0]).tolist()
        return Columns(self.array[:, kept] - start), kept

    def _first(self, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.array[0])).to(device)

    def _index(self, tensor: torch.Tensor, axis: int, shape: Sequence[int]) -> torch.Tensor:
        index = torch.from_numpy(np.ascontiguousarray(self.array)).to(tensor.device)
        view = [1] * tensor.dim()
        view[0], view[axis] = index.shape
        extents = list(shape)
        extents[axis] = self.count
        return index.view(view).expand(extents)


def head_index(spec: HookSpec, heads: Sequence[int] | None, sizes: dict[str, int]) -> list[int] | None:
    """The heads to select on a hook's head axis; None for all, or where the hook has none.

    Raises:
        InvalidInputError: A head is out of range.
    """
    if heads is None or spec.head_axis is None:
        return None
    axis = spec.shape[spec.head_axis]
    beyond = [head for head in heads if head >= sizes[axis]]
    if beyond:
        raise InvalidInputError(
            f"head {beyond[0]} is out of range: {spec.name} has {sizes[axis]} {axis.replace('_', '-')}, "
            f"0 to {sizes[axis] - 1}.",
            field="heads",
        )
    return list(heads)


def selected_shape(
    spec: HookSpec, columns: Columns | None, heads: Sequence[int] | None, sizes: dict[str, int]
) -> tuple[int, ...]:
    """The shape of a selection of a hook: known before anything runs."""
    shape = [sizes[axis] for axis in spec.shape]
    if columns is not None and spec.position_axis is not None:
        shape[spec.position_axis] = columns.count
    if heads is not None and spec.head_axis is not None:
        shape[spec.head_axis] = len(heads)
    return tuple(shape)
