"""Numbers and texts as callers write them: Python's, numpy's and PyTorch's count alike, and a bool is no number."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from .errors import InvalidInputError, shown

LARGEST = 2**31 - 1
"""The largest count or position there is."""

DAY = 86_400
"""The longest time limit, in seconds: what all protocols can say."""


def whole(value: Any) -> int | None:
    """The int that a value is; None where it is none."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


def real(value: Any) -> float | None:
    """The float that a number is; None where it is none."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        return float(value) if np.ndim(value) == 0 else None
    except (TypeError, ValueError, OverflowError):
        return None


def single(value: Any) -> float | None:
    """The same as float32 holds it, which is how it crosses the network; None where it is none."""
    number = real(value)
    with np.errstate(over="ignore", under="ignore"):
        return None if number is None else float(np.float32(number))


def several(values: Any) -> list[Any] | None:
    """The members of a list, a range, an array, a generator; None where there are none, as in a text."""
    if isinstance(values, str | bytes):
        return None
    try:
        return list(values)
    except TypeError:
        return None


def each(values: Any) -> list[Any]:
    """The same, or a single value (a text is one) as a list of itself."""
    members = several(values)
    return [values] if members is None else members


def flag(value: Any, field: str) -> bool:
    """True or False.

    Raises:
        InvalidInputError: It is neither.
    """
    if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
        raise InvalidInputError(f"{field} is True or False, not {shown(value)}.", field=field)
    return bool(value)


def count(value: Any, field: str, most: int) -> int:
    """A number from 1 to `most`.

    Raises:
        InvalidInputError: It is none.
    """
    number = whole(value)
    if number is None or not 1 <= number <= most:
        raise InvalidInputError(f"{field} is {shown(value)}; possible are 1 to {most}.", field=field)
    return number


def index(value: Any, field: str, length: int) -> int:
    """A number from 0, or negative from the end, of something of which there are `length`.

    Raises:
        InvalidInputError: There is none of that number.
    """
    number = whole(value)
    if number is None or not -length <= number < length:
        raise InvalidInputError(f"there is no {field} {shown(value)}: there are {length}, from 0.", field=field)
    return number % length


def text(value: Any, field: str, name: str = "") -> str:
    """A text that can be sent.

    Args:
        value: What was given.
        field: The argument.
        name: What a message calls it; the argument's own name where empty.

    Raises:
        InvalidInputError: It is no text, or holds half of a character (a lone surrogate).
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"{name or field} is a text, not {type(value).__name__}.", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{name or field} is no valid text: character {error.start} is half of one ({value[error.start]!a}).",
            field=field,
        ) from None
    return value
