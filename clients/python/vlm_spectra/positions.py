"""Positions in a sequence: how a caller names them, and which columns of each row they are.

Numbers and slices count columns of the prepared batch (`inputs.input_ids`), so in a row that is padded on the left
column 0 is padding. The names "last", "image" and "text" mean each row's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import scalars
from .errors import InvalidInputError, shown

NAMES = ("last", "image", "text")
PositionItem = int | slice | str
"""A column (negative from the end), a slice of columns, or one of `NAMES`."""
Positions = PositionItem | Sequence[PositionItem] | None
"""One item or several; None for all."""


def listed(positions: Positions) -> tuple[PositionItem, ...] | None:
    """Positions as a tuple of items, or None for all.

    Raises:
        InvalidInputError: An item is none of int, slice and the known names, or there are none.
    """
    if positions is None:
        return None
    checked = tuple(_item(item) for item in scalars.each(positions))
    if not checked:
        raise InvalidInputError("no positions were given; None means all.", field="positions")
    return checked


def _item(item: object) -> PositionItem:
    if isinstance(item, str):
        if item not in NAMES:
            raise InvalidInputError(
                f"there are no positions named {shown(item)}; possible are {', '.join(NAMES)}.", field="positions"
            )
        return item
    ends = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
    numbers = [scalars.whole(end) for end in ends]
    if any(number is None and (end is not None or len(ends) == 1) for end, number in zip(ends, numbers, strict=True)):
        raise InvalidInputError(
            f"a position is an int, a slice of ints or one of {', '.join(NAMES)}, not {shown(item)}.", field="positions"
        )
    if any(number is not None and abs(number) > scalars.LARGEST for number in numbers):
        raise InvalidInputError(f"position {shown(item)} is out of range: no prompt is that long.", field="positions")
    if not isinstance(item, slice):
        return numbers[0]  # type: ignore[return-value]
    if numbers[2] == 0:
        raise InvalidInputError("a slice of positions cannot have step 0.", field="positions")
    return slice(*numbers)


@dataclass(frozen=True)
class Layout:
    """What stands where in a prepared batch.

    Attributes:
        tokens: [batch, seq] bool, false for padding.
        image: [batch, seq] bool, true for tokens of images.
    """

    tokens: NDArray[np.bool_]
    image: NDArray[np.bool_]

    @property
    def length(self) -> int:
        """Columns."""
        return int(self.tokens.shape[1])

    def columns(self, items: Sequence[PositionItem] | None, row: int) -> list[int]:
        """The columns that items mean in one row, in the order of the items, each once.

        Raises:
            InvalidInputError: A number is out of range, or the items mean no column of the row.
        """
        if items is None:
            return list(range(self.length))
        found, new = [], np.ones(self.length, dtype=bool)
        for item in items:  # thousands of slices may each mean the whole prompt: none is held twice
            columns = self._columns(item, row)
            columns = columns[new[columns]]
            new[columns] = False
            found.append(columns)
        if new.all():
            raise InvalidInputError(
                f"the positions {_show(items)} mean no token of row {row}, which has {self.length} columns and "
                f"{int(self.image[row].sum())} image tokens.",
                field="positions",
            )
        return [int(column) for column in np.concatenate(found)]

    def _columns(self, item: PositionItem, row: int) -> NDArray[np.int64]:
        if isinstance(item, slice):
            return np.arange(self.length)[item]
        if isinstance(item, int):
            if not -self.length <= item < self.length:
                raise InvalidInputError(
                    f"position {item} is out of range: the prompt has {self.length} positions, "
                    f"0 to {self.length - 1} (or -{self.length} to -1).",
                    field="positions",
                )
            return np.array([item % self.length])
        if item == "last":
            return np.flatnonzero(self.tokens[row])[-1:]
        return np.flatnonzero(self.image[row] if item == "image" else self.tokens[row] & ~self.image[row])

    def rectangle(self, items: Sequence[PositionItem] | None) -> NDArray[np.int64]:
        """The columns of all rows, [batch, n] int64.

        Raises:
            InvalidInputError: As `columns`, or the rows have different numbers of them.
        """
        if items is None or not any(isinstance(item, str) for item in items):  # the same in every row
            return np.asarray([self.columns(items, 0)] * len(self.tokens), dtype=np.int64)
        rows = [self.columns(items, row) for row in range(len(self.tokens))]
        if len({len(row) for row in rows}) > 1:
            counts = ", ".join(str(len(row)) for row in rows)
            raise InvalidInputError(
                f"the positions {_show(items)} are {counts} tokens in the rows of this batch; one array needs as "
                "many in each: give columns, or run the rows one by one.",
                field="positions",
            )
        return np.asarray(rows, dtype=np.int64)

    def extended(self, tokens: NDArray[np.bool_]) -> Layout:
        """The layout with generated columns behind, [batch, new] bool (false where a row had already ended)."""
        return replace(
            self,
            tokens=np.concatenate([self.tokens, tokens], axis=1),
            image=np.concatenate([self.image, np.zeros_like(tokens)], axis=1),
        )


def _show(items: Sequence[PositionItem]) -> str:
    return ", ".join(f"{item.start}:{item.stop}" if isinstance(item, slice) else repr(item) for item in items)
