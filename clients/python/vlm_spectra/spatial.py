"""From places in a picture to tokens and back: boxes and masks in original pixels, patches, sequence positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from . import scalars
from .errors import InvalidInputError, shown

if TYPE_CHECKING:
    from .inputs import ImageLayout

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the original image."""

Region = Any
"""A box, or a boolean mask [height, width] in pixels of the original image."""

LEAST = 24
"""Pixels along a patch's shorter side in an overview picture, so that a number fits."""


@dataclass(frozen=True)
class Overlap:
    """A token that looks at a part of a region.

    Attributes:
        position: Its position in the sequence.
        tile: The number of its tile.
        row: Its row in the tile's grid.
        column: Its column in the tile's grid.
        fraction: How much of what it looks at lies in the region, above 0, at most 1.
    """

    position: int
    tile: int
    row: int
    column: int
    fraction: float


def tokens_in(layout: ImageLayout, region: Region) -> list[Overlap]:
    """The tokens that look at a region, of every tile, an overview's among them.

    Args:
        layout: The image's.
        region: Left, top, right, bottom in original pixels, or a boolean mask [height, width] of them.

    Returns:
        Tile by tile, in raster order.

    Raises:
        InvalidInputError: The box has no area or reaches outside the image, or the mask has another shape.
    """
    covered = _area(region, layout.original_size)
    overlaps = []
    for token in layout.tokens():
        left, top, right, bottom = token.box
        area = (right - left) * (bottom - top)
        share = covered(token.box) / area if area > 0 else 0.0
        if share > 1e-9:
            overlaps.append(Overlap(token.position, token.tile, token.row, token.column, min(share, 1.0)))
    return overlaps


def positions_in(layout: ImageLayout, region: Region, at_least: float = 0.0) -> list[int]:
    """The positions of the tokens of which a region covers more than nothing and at least a share.

    Args:
        layout: The image's.
        region: As for `tokens_in`.
        at_least: The share, 0 to 1.

    Raises:
        InvalidInputError: As for `tokens_in`, or the share is no number.
    """
    least = scalars.real(at_least)
    if least is None:
        raise InvalidInputError(f"at_least is {shown(at_least)}; it is a share, 0 to 1.", field="at_least")
    return [overlap.position for overlap in tokens_in(layout, region) if overlap.fraction >= least]


def boxes_of(layout: ImageLayout, positions: Sequence[int]) -> list[Box]:
    """Where tokens look, in original pixels.

    Args:
        layout: The image's.
        positions: Sequence positions of its tokens.

    Raises:
        InvalidInputError: A position is none of this image's, or that of a line break, which looks at nothing.
    """
    boxes = {token.position: token.box for token in layout.tokens()}
    found = []
    for position in scalars.each(positions):
        number = scalars.whole(position)
        if number is None or number not in boxes:
            raise InvalidInputError(
                f"position {shown(position)} does not look at this image; those from {min(boxes)} to {max(boxes)} do.",
                field="positions",
            )
        found.append(boxes[number])
    return found


def mask_of(layout: ImageLayout, positions: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The pixels that tokens look at: those whose middle lies in a token's box.

    Args:
        layout: The image's.
        positions: Sequence positions of its tokens.

    Returns:
        [height, width] of the original image.

    Raises:
        InvalidInputError: A position is none of this image's.
    """
    width, height = layout.original_size
    mask = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in boxes_of(layout, positions):
        mask[_middles(top, bottom), _middles(left, right)] = True
    return mask


def _middles(start: float, stop: float) -> slice:
    """The pixels of a line whose middles lie from `start` up to `stop`."""
    return slice(int(np.ceil(start - 0.5)), int(np.ceil(stop - 0.5)))


def _area(region: Region, size: tuple[int, int]) -> Any:
    """A function from a box to how many pixels of the region lie in it, fractions of pixels included."""
    width, height = size
    if np.ndim(region) == 2:
        mask = np.asarray(region)
        if mask.shape != (height, width) or mask.dtype != np.bool_:
            raise InvalidInputError(
                f"a mask is boolean and as large as the image, [{height}, {width}]; this one is {mask.dtype.name} "
                f"{list(mask.shape)}.",
                field="region",
            )
        return _mask_area(mask)
    left, top, right, bottom = _checked_box(region, size)

    def covered(box: Box) -> float:
        across = min(right, box[2]) - max(left, box[0])
        down = min(bottom, box[3]) - max(top, box[1])
        return max(across, 0.0) * max(down, 0.0)

    return covered


def _checked_box(region: Region, size: tuple[int, int]) -> Box:
    width, height = size
    if np.ndim(region) != 1 or len(region) != 4:
        raise InvalidInputError(
            "a region is a box (left, top, right, bottom) or a boolean mask [height, width], in original pixels.",
            field="region",
        )
    edges = [scalars.real(edge) for edge in region]
    if None in edges:
        raise InvalidInputError(f"a box has four numbers, not {shown(region)}.", field="region")
    left, top, right, bottom = (float(edge) for edge in region)
    box = f"({left:g}, {top:g}, {right:g}, {bottom:g})"
    if not (left < right and top < bottom):
        raise InvalidInputError(
            f"the box {box} has no area: left is less than right and top less than bottom.", field="region"
        )
    if left < 0 or top < 0 or right > width or bottom > height:
        raise InvalidInputError(
            f"the box {box} reaches outside the image, which is {width} x {height} pixels.", field="region"
        )
    return left, top, right, bottom


def _mask_area(mask: npt.NDArray[np.bool_]) -> Any:
    """Sums over the mask by its integral image, which between whole pixels is interpolated."""
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)

    def at(x: float, y: float) -> float:
        column, row = min(int(x), mask.shape[1] - 1), min(int(y), mask.shape[0] - 1)
        across, down = x - column, y - row
        upper = integral[row, column] * (1 - across) + integral[row, column + 1] * across
        lower = integral[row + 1, column] * (1 - across) + integral[row + 1, column + 1] * across
        return float(upper * (1 - down) + lower * down)

    return lambda box: at(box[2], box[3]) - at(box[0], box[3]) - at(box[2], box[1]) + at(box[0], box[1])


def patch_overview(
    image: Image.Image,
    layout: ImageLayout,
    *,
    tile: int | None = None,
    numbers: Literal["patch", "position"] = "patch",
) -> Image.Image:
    """A picture of an image with its token grid over it, every patch numbered.

    Args:
        image: The image, of any size with the original's proportions.
        layout: The image's.
        tile: The number of one tile, for its grid alone; all tiles but an overview where None.
        numbers: "patch" for numbers in raster order, "position" for positions in the sequence.

    Returns:
        The image enlarged by a whole number where its patches are too small for numbers.
    """
    if tile is None:
        cells = [(patch, position, layout.box(patch)) for patch, position in enumerate(layout.raster)]
    else:
        chosen = (token for token in layout.tokens() if token.tile == tile)
        cells = [(patch, token.position, token.box) for patch, token in enumerate(chosen)]
    if not cells:
        raise InvalidInputError(f"there is no tile {tile}: the image has {len(layout.tiles)}.", field="tile")
    across, down = image.size[0] / layout.original_size[0], image.size[1] / layout.original_size[1]
    sides = (min((box[2] - box[0]) * across, (box[3] - box[1]) * down) for _, _, box in cells)
    smallest = min((side for side in sides if side > 0), default=LEAST)
    scale = min(max(1, int(np.ceil(LEAST / smallest))), max(1, 4096 // max(image.size)))
    picture = image.convert("RGB").resize((image.size[0] * scale, image.size[1] * scale), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for patch, position, (left, top, right, bottom) in cells:
        corners = (left * across * scale, top * down * scale, right * across * scale - 1, bottom * down * scale - 1)
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            continue
        draw.rectangle(corners, outline=(213, 94, 0))
        text = str(patch if numbers == "patch" else position)
        draw.text((corners[0] + 3, corners[1] + 2), text, fill="white", stroke_width=1, stroke_fill="black")
    return picture
