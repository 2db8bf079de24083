"""Prompts, and what they are once prepared for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from . import arrays, scalars, spatial
from .errors import InvalidInputError, shown
from .images import Picture
from .spatial import Box, Overlap, Region

Array = Any
"""A numpy array or a PyTorch tensor."""


@dataclass(frozen=True)
class Prompt:
    """One conversation turn to be answered.

    Attributes:
        task: What the user asks; not empty.
        images: The images before the task, in order.
        assistant_prefill: Text that the answer begins with.
        system: A system message; the chat template's own default where empty.
    """

    task: str
    images: tuple[Picture, ...] = ()
    assistant_prefill: str = ""
    system: str = ""

    def __post_init__(self) -> None:
        for name in ("task", "assistant_prefill", "system"):
            scalars.text(getattr(self, name), name)
        if not self.task.strip():
            raise InvalidInputError("the task is empty: write what the model is to do.", field="task")


@dataclass(frozen=True)
class Tile:
    """A part of an image that became a grid of tokens.

    Attributes:
        grid: Rows and columns of tokens.
        box: Left, top, right, bottom in original pixels; beyond the image where the processor padded it.
        positions: The sequence positions of its tokens, in raster order; rows * columns of them.
        origin: The row and column of its first token in the image's grid.
        overview: A second, coarser look at the whole image, which is not a part of the image's grid.
        resampled: Every token stands for the whole box, as a resampler's does; the grid is then one row.
    """

    grid: tuple[int, int]
    box: Box
    positions: tuple[int, ...] = field(repr=False)
    origin: tuple[int, int] = (0, 0)
    overview: bool = False
    resampled: bool = False

    def box_of(self, row: int, column: int) -> Box:
        """Where one token looks, in original pixels; beyond the image where the processor padded it."""
        if self.resampled:
            return self.box
        left, top, right, bottom = self.box
        across, down = (right - left) / self.grid[1], (bottom - top) / self.grid[0]
        return left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down


@dataclass(frozen=True)
class ImageToken:
    """Where an image token stands, and what it looks at.

    Attributes:
        position: Its position in the sequence.
        tile: The number of its tile.
        row: Its row in the tile's grid.
        column: Its column in the tile's grid.
        box: Left, top, right, bottom in original pixels, within the image; without area where all of it is padding.
    """

    position: int
    tile: int
    row: int
    column: int
    box: Box


@dataclass(frozen=True)
class ImageLayout:
    """How an image became tokens: as one grid, or in tiles that together make one grid, often with an overview.

    Attributes:
        row: The batch row it belongs to.
        original_size: Width and height in pixels, as given.
        processed_size: Width and height in pixels, after the processor's resizing.
        grid: Rows and columns of image tokens; of all tiles put together, without an overview.
        positions: The sequence positions of its tokens, in order. With one tile, in raster order; some families also
            have tokens for line breaks among them, which stand for no part of the image.
        tiles: The parts it was cut into, in the order of the sequence; the whole image where none are given.
        patch_grids: Rows and columns of patches of each view that the vision tower has of it; none where unknown.
    """

    row: int
    original_size: tuple[int, int]
    processed_size: tuple[int, int]
    grid: tuple[int, int]
    positions: tuple[int, ...]
    tiles: tuple[Tile, ...] = ()
    patch_grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.tiles:
            width, height = self.original_size
            whole = Tile(self.grid, (0.0, 0.0, float(width), float(height)), self.positions)
            object.__setattr__(self, "tiles", (whole,))

    @property
    def raster(self) -> tuple[int, ...]:
        """The sequence positions of the image's grid, in raster order; rows * columns of them."""
        rows, columns = self.grid
        cells = [-1] * (rows * columns)
        for tile in self.tiles:
            if not tile.overview:
                for index, position in enumerate(tile.positions):
                    row, column = divmod(index, tile.grid[1])
                    cells[(tile.origin[0] + row) * columns + tile.origin[1] + column] = position
        return tuple(cells)

    def tokens(self) -> list[ImageToken]:
        """All tokens that look at a part of the image, tile by tile."""
        return [
            ImageToken(position, number, *divmod(index, tile.grid[1]), self._visible(tile, index))
            for number, tile in enumerate(self.tiles)
            for index, position in enumerate(tile.positions)
        ]

    def token(self, index: int) -> ImageToken | None:
        """The token at `positions[index]`; None for a line break, which looks at nothing."""
        position = self.positions[scalars.index(index, "image token", len(self.positions))]
        for number, tile in enumerate(self.tiles):
            if position in tile.positions:
                at = tile.positions.index(position)
                return ImageToken(position, number, *divmod(at, tile.grid[1]), self._visible(tile, at))
        return None

    def box(self, patch: int) -> Box:
        """The part of the image behind one cell of its grid, counted in raster order: left, top, right, bottom."""
        number = scalars.whole(patch)
        row, column = (-1, -1) if number is None else divmod(number, self.grid[1])
        for tile in self.tiles:
            down, across = row - tile.origin[0], column - tile.origin[1]
            if not tile.overview and 0 <= down < tile.grid[0] and 0 <= across < tile.grid[1]:
                return self._visible(tile, down * tile.grid[1] + across)
        raise InvalidInputError(f"there is no patch {shown(patch)}: the image has {self.grid[0]} x {self.grid[1]}.")

    def _visible(self, tile: Tile, index: int) -> Box:
        width, height = self.original_size
        left, top, right, bottom = tile.box_of(*divmod(index, tile.grid[1]))
        return (
            min(max(left, 0.0), width),
            min(max(top, 0.0), height),
            min(max(right, 0.0), width),
            min(max(bottom, 0.0), height),
        )

    def tokens_in(self, region: Region) -> list[Overlap]:
        """The tokens that look at a region, with the share of each that it covers; see `spatial.tokens_in`."""
        return spatial.tokens_in(self, region)

    def positions_in(self, region: Region, at_least: float = 0.0) -> list[int]:
        """The sequence positions of the tokens of which a region covers more than nothing and `at_least` this share."""
        return spatial.positions_in(self, region, at_least)

    def boxes_of(self, positions: Sequence[int]) -> list[Box]:
        """Where the tokens at sequence positions look, in original pixels; see `spatial.boxes_of`."""
        return spatial.boxes_of(self, positions)

    def mask_of(self, positions: Sequence[int]) -> npt.NDArray[np.bool_]:
        """The pixels that tokens look at, [height, width] of the original; see `spatial.mask_of`."""
        return spatial.mask_of(self, positions)


def layout_to_json(layout: ImageLayout) -> dict[str, Any]:
    """A layout as JSON takes it."""
    return asdict(layout)


def layout_from_json(data: dict[str, Any]) -> ImageLayout:
    """A layout from JSON."""
    tiles = tuple(Tile(**_tuples(tile)) for tile in data.get("tiles", ()))
    patch_grids = tuple(tuple(grid) for grid in data.get("patch_grids", ()))
    return ImageLayout(**{**_tuples(data), "tiles": tiles, "patch_grids": patch_grids})


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    def deep(value: Any) -> Any:
        return tuple(map(deep, value)) if isinstance(value, list | tuple) else value

    return {name: deep(value) for name, value in data.items()}


@dataclass(frozen=True, eq=False)
class Inputs:
    """A prepared batch. Rows have the same length; shorter prompts are padded on the left.

    Attributes:
        prompts: What was asked, one a row.
        input_ids: [batch, seq] int64.
        attention_mask: [batch, seq] int64, 1 for a token, 0 for padding.
        token_labels: [batch][seq] a readable label for each token.
        images: The images of all rows, in order.
        text: [batch] the formatted prompts, before images became tokens.
    """

    prompts: tuple[Prompt, ...] = field(repr=False)
    input_ids: Array
    attention_mask: Array = field(repr=False)
    token_labels: list[list[str]] = field(repr=False)
    images: tuple[ImageLayout, ...]
    text: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def images_of(self, row: int) -> list[ImageLayout]:
        """The images of one batch row."""
        return [image for image in self.images if image.row == row]

    def tokens_in(self, region: Region, image: int = 0) -> list[Overlap]:
        """The tokens that look at a region of an image, with the share of each that it covers.

        Args:
            region: Left, top, right, bottom in original pixels, or a boolean mask [height, width] of them.
            image: The number of the image, over all rows of the batch.
        """
        return layout_number(self.images, image).tokens_in(region)

    def positions_in(self, region: Region, image: int = 0, at_least: float = 0.0) -> list[int]:
        """The sequence positions of the tokens of which a region covers more than nothing and `at_least` this share."""
        return layout_number(self.images, image).positions_in(region, at_least)

    def __repr__(self) -> str:
        images = ", ".join(f"{i.grid[0]}x{i.grid[1]} tokens" for i in self.images) or "none"
        return f"{type(self).__name__}(input_ids={list(self.input_ids.shape)}, images: {images})"


def layout_number(images: Sequence[ImageLayout], image: int) -> ImageLayout:
    """An image by its number over all rows of a batch.

    Raises:
        InvalidInputError: There is none of that number.
    """
    number = scalars.whole(image)
    if number is None or not 0 <= number < len(images):
        raise InvalidInputError(f"there is no image {shown(image)}: the prompt has {len(images)}.", field="image")
    return images[number]


def on_grid(vector: Array, layout: ImageLayout, tile: int | None = None) -> Array:
    """A vector over sequence positions, [seq], laid out as an image's token grid, [grid_h, grid_w].

    Args:
        vector: A number a position.
        layout: The image's.
        tile: The number of one tile, for its grid alone; an overview is to be had in this way only.

    Raises:
        InvalidInputError: The image has no such tile, or this is no vector over the whole sequence.
    """
    number = scalars.whole(tile)
    if tile is not None and (number is None or not 0 <= number < len(layout.tiles)):
        raise InvalidInputError(f"there is no tile {shown(tile)}: the image has {len(layout.tiles)}.", field="tile")
    positions = layout.raster if tile is None else layout.tiles[tile].positions
    vector = vector if arrays.is_torch(vector) else np.asarray(vector)
    if vector.ndim != 1 or vector.shape[0] <= max(positions):
        raise InvalidInputError(
            f"a grid is made of one number for each position of the sequence, [seq], and the image ends at "
            f"{max(positions)}; this array is {list(vector.shape)}.",
            field="vector",
        )
    xp = array_api_compat.array_namespace(vector)
    index = xp.asarray(list(positions), device=array_api_compat.device(vector))
    return xp.reshape(xp.take(vector, index, axis=0), layout.grid if tile is None else layout.tiles[tile].grid)


def make_prompts(
    tasks: Sequence[str], images: Sequence[Any] | None, assistant_prefill: str | Sequence[str], system: str
) -> tuple[Prompt, ...]:
    """Prompts from the arguments of `prepare_messages_batch`.

    Args:
        tasks: [batch] what to ask.
        images: [batch] of one image, a list of images, or None; None for no images at all.
        assistant_prefill: The start of every answer, or [batch] of them.
        system: The system message of every row.

    Raises:
        InvalidInputError: Lengths differ, a task is empty, or an image is not one.
    """
    asked = scalars.several(tasks)
    if asked is None:
        raise InvalidInputError("tasks is a list of texts; for one text use prepare_messages.", field="tasks")
    if not asked:
        raise InvalidInputError("a batch needs at least one task.", field="tasks")
    rows = [None] * len(asked) if images is None else scalars.several(images)
    if rows is None:
        raise InvalidInputError(
            f"images is a list with an image, a list of images or None for each task, not {type(images).__name__}.",
            field="images",
        )
    single = isinstance(assistant_prefill, str)
    prefills = [assistant_prefill] * len(asked) if single else scalars.several(assistant_prefill)
    if prefills is None:
        raise InvalidInputError(
            f"assistant_prefill is a text, or a list of one for each task, not {type(assistant_prefill).__name__}.",
            field="assistant_prefill",
        )
    if not len(asked) == len(rows) == len(prefills):
        raise InvalidInputError(
            f"a batch has as many tasks as images and prefills, not {len(asked)}, {len(rows)} and {len(prefills)}; "
            "give None for a row without an image.",
            field="images",
        )
    prompts = [Prompt(task, (), prefill, system) for task, prefill in zip(asked, prefills, strict=True)]
    return tuple(
        replace(prompt, images=tuple(Picture.of(image) for image in _listed(row)))
        for prompt, row in zip(prompts, rows, strict=True)
    )


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
