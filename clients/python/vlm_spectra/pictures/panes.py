"""Where an image's tokens lie over its pixels, ready to be drawn."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..inputs import ImageLayout, Inputs, layout_number
from ..spatial import Box


@dataclass(frozen=True)
class Patch:
    """A token over its image.

    Attributes:
        position: Its sequence position.
        row: Its row, in the image's grid or the overview's.
        column: Its column.
        box: The pixels of the original image behind it: left, top, right, bottom.
    """

    position: int
    row: int
    column: int
    box: Box


@dataclass(frozen=True)
class Pane:
    """An image with tokens that lie side by side: all tiles together, or an overview of the whole.

    Attributes:
        name: "overview", or nothing.
        patches: Its tokens; those that saw nothing but padding are left out.
    """

    name: str
    patches: tuple[Patch, ...]


def panes(layout: ImageLayout) -> list[Pane]:
    """An image's panes: its own grid, then its overviews."""
    found: dict[str, list[Patch]] = {}
    for token in layout.tokens():
        tile = layout.tiles[token.tile]
        left, top, right, bottom = token.box
        if right > left and bottom > top:
            row, column = tile.origin[0] + token.row, tile.origin[1] + token.column
            found.setdefault("overview" if tile.overview else "", []).append(
                Patch(token.position, row, column, token.box)
            )
    return [Pane(name, tuple(found[name])) for name in sorted(found)]


def pixels(inputs: Inputs, image: int) -> Image.Image:
    """The pixels of an image by its number over all rows.

    Raises:
        InvalidInputError: There is no such image.
    """
    row = layout_number(inputs.images, image).row
    number = sum(1 for layout in inputs.images[:image] if layout.row == row)
    return inputs.prompts[row].images[number].pixels


def numbered(inputs: Inputs, row: int) -> list[tuple[int, ImageLayout]]:
    """A row's images with their numbers over all rows."""
    return [(number, layout) for number, layout in enumerate(inputs.images) if layout.row == row]


def extent(layout: ImageLayout, pane: Pane) -> str:
    """An image's sizes in words."""
    width, height = layout.original_size
    return f"{width} × {height} pixels, {len(pane.patches)} tokens"
