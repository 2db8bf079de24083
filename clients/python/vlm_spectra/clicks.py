"""Points that a model writes, in the pixels of the image it was shown.

GUI models write a point in several ways: `click(start_box='(x,y)')` and `<|box_start|>(x,y)<|box_end|>` (UI-TARS),
`<point>x y</point>`, a box of four numbers, JSON (`{"x": 1, "y": 2}`, `{"point_2d": [1, 2]}`, `{"bbox_2d": [...]}`), or
a plain `(x, y)`. The surest form that an answer holds counts, an action before a bare pair; a box stands for its
centre.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .inputs import ImageLayout

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_GAP = r"(?:\s*,\s*|\s+)"
_NUMBERS = rf"{_NUMBER}{_GAP}{_NUMBER}(?:{_GAP}{_NUMBER}{_GAP}{_NUMBER})?"
"""Two numbers, or the four of a box."""
_BRACKETED = rf"[(\[]\s*{_NUMBERS}\s*[)\]]"
_KEY = r"[\"'](?:point_2d|point|bbox_2d|bbox|box|coordinates?|click)[\"']"

_FORMS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?:start_box|point)\s*=\s*['\"]?\s*(?:<\|box_start\|>|<point>)?\s*[(\[]?\s*{_NUMBERS}",
        rf"<\|box_start\|>\s*{_BRACKETED}",
        rf"<point>\s*{_NUMBERS}\s*</point>",
        rf"{_KEY}\s*:\s*{_BRACKETED}",
        rf"[\"']x[\"']\s*:\s*{_NUMBER}\s*,\s*[\"']y[\"']\s*:\s*{_NUMBER}",
        _BRACKETED,
    )
]
"""The forms, surest first: an action's argument is meant as a point, a bare pair of numbers may be anything."""


@dataclass(frozen=True)
class Point:
    """A point in an image.

    Attributes:
        x: Pixels from the left edge of the original image.
        y: Pixels from its top edge.
    """

    x: float
    y: float


def find_point(text: str) -> Point | None:
    """The first point in a text, in the coordinates the text uses, or None."""
    for form in _FORMS:
        match = form.search(text)
        if match:
            numbers = [float(number) for number in match.groups() if number is not None]
            if len(numbers) == 4:
                return Point((numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2)
            return Point(numbers[0], numbers[1])
    return None


def find_click(text: str, images: Sequence[ImageLayout], coordinates: str) -> Point | None:
    """The first point in a text, in the pixels of the original image.

    Args:
        text: A model's answer.
        images: The images of its prompt; a point belongs to the last, the current screen.
        coordinates: What the model's family writes: "processed_pixels" (pixels after the processor's resizing) or
            "thousandths" (of width and height).

    Returns:
        The point, or None where the text has none or the prompt has no image.
    """
    point = find_point(text)
    if point is None or not images:
        return None
    width, height = images[-1].original_size
    across, down = images[-1].processed_size if coordinates == "processed_pixels" else (1000, 1000)
    return Point(point.x * width / across, point.y * height / down)
