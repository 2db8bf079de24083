"""Views: the pictures that a vision tower sees, and where in its activations each patch of them stands.

A view is an image, or one crop or tile of it. Towers order patches as suits them: one view behind the other or each in
a batch row, in blocks of patches that become one token, in windows of attention, with class tokens before or behind.
Here is the one place that knows: every vision hook has a view's patches in raster order, then its class tokens, then
padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from vlm_spectra.errors import NotSupportedError
from vlm_spectra.inputs import ImageLayout
from vlm_spectra.positions import Layout

from .tower import Tower

Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclass(frozen=True)
class Places:
    """Where the rows of an array [n, m, ...] stand in an activation.

    Attributes:
        index: [n, m] int64, the row of the activation, all its leading axes flattened; -1 for padding.
        total: The rows that the activation has.
    """

    index: NDArray[np.int64]
    total: int
    _tensors: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[n, m], false for padding."""
        return self.index >= 0

    def flat(self, tensor: torch.Tensor, width: Sequence[int]) -> torch.Tensor:
        """The activation as [total, *width].

        Raises:
            NotSupportedError: It has another number of rows, so the order of its patches is not the known one.
        """
        flat = tensor.reshape(-1, *width)
        if len(flat) != self.total:
            raise NotSupportedError(
                f"the vision tower runs over {len(flat)} patches where {self.total} were expected from the inputs; "
                "vision hooks do not know its order."
            )
        return flat

    def take(self, tensor: torch.Tensor, width: Sequence[int]) -> torch.Tensor:
        """[n, m, *width] of an activation; zeros where there is padding."""
        flat, (index, padding, _) = self.flat(tensor, width), self._on(tensor.device)
        rows = flat.index_select(0, index).view(*self.index.shape, *width)
        return rows if padding is None else rows.masked_fill(padding.view(*self.index.shape, *[1] * len(width)), 0)

    def put(self, tensor: torch.Tensor, width: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
        """A copy of the activation with [n, m, *width] put back."""
        flat, (index, _, kept) = self.flat(tensor, width), self._on(tensor.device)
        rows = rows.reshape(-1, *width).to(flat.dtype)
        if kept is not None:
            index, rows = index.index_select(0, kept), rows.index_select(0, kept)
        return flat.index_copy(0, index, rows).view(tensor.shape)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """On a device: the flattened index, which of it is padding, and where the rest is; None where nothing is."""
        if device not in self._tensors:
            valid = self.valid.flatten()
            index = torch.from_numpy(self.index.clip(min=0).flatten()).to(device)
            if valid.all():
                self._tensors[device] = (index, None, None)
            else:
                kept = torch.from_numpy(np.flatnonzero(valid)).to(device)
                self._tensors[device] = (index, torch.from_numpy(~valid).to(device), kept)
        return self._tensors[device]

    def squares(self, parts: Sequence[torch.Tensor], outside: float) -> torch.Tensor:
        """Scores or patterns of attention, assembled by views.

        Args:
            parts: [heads, n, n] of consecutive stretches of the activation's rows, which attend among themselves.
            outside: What stands where no stretch has both patches, and where there is padding.

        Returns:
            [views, heads, patches, patches].
        """
        views, patches = self.index.shape
        whole = parts[0].new_full((views, parts[0].shape[0], patches, patches), outside)
        start = 0
        for part in parts:
            stop = start + part.shape[-1]
            inside = (self.index >= start) & (self.index < stop)
            for view in np.flatnonzero(inside.any(1)):
                here = torch.from_numpy(np.flatnonzero(inside[view])).to(part.device)
                there = torch.from_numpy(self.index[view][inside[view]] - start).to(part.device)
                whole[view][:, here[:, None], here] = part[:, there[:, None], there]
            start = stop
        if start != self.total:
            raise NotSupportedError(f"the vision tower's attention ran over {start} patches, not {self.total}.")
        return whole


@dataclass(frozen=True)
class SeenLayout(Layout):
    """A layout that also knows the images: where each patch and each image token stands.

    Attributes:
        tower: The vision tower, if it can be read.
        tensors: The model's inputs.
        pictures: The images of all rows.
    """

    tower: Tower | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    pictures: Sequence[ImageLayout] = ()

    @cached_property
    def patches(self) -> Places | None:
        """The patches of every view, [views, patches]; None where there is no image, or the order is not known."""
        if self.tower is None or not self.pictures:
            return None
        views = read_views(self.tower, self.tensors)
        return None if views is None else views.places()

    @cached_property
    def tokens_of_images(self) -> Places | None:
        """The image tokens of every image, [images, image_tokens], in a sequence of the prompt's length."""
        if not self.pictures:
            return None
        rows = [image_columns(self.image, self.pictures, number) for number in range(len(self.pictures))]
        length = int(self.tensors["input_ids"].shape[1])
        index = [
            [image.row * length + column for column in columns]
            for image, columns in zip(self.pictures, rows, strict=True)
        ]
        return Places(_padded(index), len(self.tokens) * length)


def image_columns(image: NDArray[np.bool_], pictures: Sequence[ImageLayout], number: int) -> list[int]:
    """All image-token columns of one image: from its first to the next image's first in the row.

    Args:
        image: [batch, seq] true for tokens of images.
        pictures: The images.
        number: Which of them.
    """
    row, first = pictures[number].row, min(pictures[number].positions)
    later = [min(each.positions) for each in pictures if each.row == row]
    stop = min((each for each in later if each > first), default=image.shape[1])
    return [column for column in np.flatnonzero(image[row]).tolist() if first <= column < stop]


@dataclass(frozen=True)
class Views:
    """The views of a batch as the tower has them.

    Attributes:
        grids: Rows and columns of each view's patches.
        orders: For each view, the activation's row of each patch in raster order, then of its class tokens.
        total: Rows of the activation.
    """

    grids: list[Grid]
    orders: list[list[int]]
    total: int

    def places(self) -> Places:
        """Where each patch stands."""
        return Places(_padded(self.orders), self.total)


def read_views(tower: Tower, tensors: Mapping[str, torch.Tensor]) -> Views | None:
    """The views of prepared inputs; None where there is no image, or in a form that is not known.

    Args:
        tower: The vision tower.
        tensors: The model's inputs: what the processor returned.
    """
    pixels = tensors.get("pixel_values")
    if pixels is None:
        return None
    if "image_grid_thw" in tensors:
        grids = [(rows, columns) for _, rows, columns in tensors["image_grid_thw"].tolist()]
        return _packed(grids, [block_order(grid, tower.block, _window(tower)) for grid in grids])
    if tower.kind == "pixtral":
        sizes = tensors["image_sizes"].tolist()
        grids = [(height // tower.patch_size, width // tower.patch_size) for height, width in sizes]
        return _packed(grids, [list(range(rows * columns)) for rows, columns in grids])
    if "image_position_ids" in tensors:
        return _by_position(tensors["image_position_ids"])
    if "spatial_shapes" in tensors:
        grids = [(rows, columns) for rows, columns in tensors["spatial_shapes"].tolist()]
        return _batched(grids, [list(range(rows * columns)) for rows, columns in grids], pixels.shape[1], (0, 0))
    if pixels.dim() == 3:
        side = math.isqrt(pixels.shape[1])
        grid = (side, side) if side * side == pixels.shape[1] else (1, pixels.shape[1])
        return _batched([grid] * len(pixels), [list(range(pixels.shape[1]))] * len(pixels), pixels.shape[1], (0, 0))
    if pixels.dim() < 4 or not tower.patch_size:
        return None
    return _pictures(tower, pixels, tensors.get("pixel_attention_mask"))


def _window(tower: Tower) -> int:
    """The side of an attention window in tokens; 0 where there are none."""
    return tower.window // tower.block // tower.patch_size if tower.window else 0


def block_order(grid: Grid, merge: int, window: int = 0) -> list[int]:
    """The patches, numbered in raster order, in the order of a tower that puts those of one token side by side.

    Args:
        grid: Rows and columns of patches.
        merge: Patches along one side of a token.
        window: Tokens along one side of an attention window, which stand together too; 0 for none.
    """
    rows, columns = np.indices((grid[0] // merge, grid[1] // merge)).reshape(2, -1)
    if window:
        order = np.lexsort((columns, rows, columns // window, rows // window))
        rows, columns = rows[order], columns[order]
    down, across = np.indices((merge, merge)).reshape(2, -1)
    raster = (rows[:, None] * merge + down) * grid[1] + columns[:, None] * merge + across
    numbers: list[int] = raster.flatten().tolist()
    return numbers


def _packed(grids: list[Grid], orders: list[list[int]]) -> Views:
    """Views one behind the other; `orders` has each view's patches, by raster number, in the tower's order."""
    start, rows = 0, []
    for order in orders:
        where = np.empty(len(order), dtype=np.int64)
        where[order] = np.arange(start, start + len(order))
        rows.append(where.tolist())
        start += len(order)
    return Views(grids, rows, start)


def _batched(grids: list[Grid], patches: list[list[int]], length: int, specials: tuple[int, int]) -> Views:
    """Views in rows of a batch; `patches` has where in its row each patch stands, in raster order."""
    before, behind = specials
    width = before + length + behind
    extra = [*range(before), *range(before + length, width)]
    rows = [
        [view * width + place for place in (*(before + patch for patch in own), *extra)]
        for view, own in enumerate(patches)
    ]
    return Views(grids, rows, len(grids) * width)


def _pictures(tower: Tower, pixels: torch.Tensor, mask: torch.Tensor | None) -> Views:
    """Pixels [views, channels, height, width], or with more axes and pictures of zeros, which the model drops.

    Args:
        tower: The vision tower.
        pixels: What it reads.
        mask: [..., height, width] true where there is a picture and not padding.
    """
    height, width = pixels.shape[-2:]
    grid = (height // tower.patch_size, width // tower.patch_size)
    if pixels.dim() > 4:
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        real = (pixels != 0).flatten(1).any(1)
        mask = None if mask is None else mask.reshape(-1, height, width)[real]
        pixels = pixels[real]
    grids, patches = [grid] * len(pixels), [list(range(grid[0] * grid[1]))] * len(pixels)
    if mask is not None:
        # A patch is real if one of its pixels is.
        counts = [
            (-(-int(each.any(1).sum()) // tower.patch_size), -(-int(each.any(0).sum()) // tower.patch_size))
            for each in mask.bool()
        ]
        grids = [(min(rows, grid[0]), min(columns, grid[1])) for rows, columns in counts]
        patches = [
            [row * grid[1] + column for row in range(rows) for column in range(columns)] for rows, columns in grids
        ]
    return _batched(grids, patches, grid[0] * grid[1], tower.specials)


def _by_position(positions: torch.Tensor) -> Views:
    """Patches that say themselves where they are: [views, patches, 2] column and row, -1 for padding."""
    grids, patches = [], []
    for view in positions.tolist():
        places = {(row, column): index for index, (column, row) in enumerate(view) if row >= 0}
        grids.append((1 + max(row for row, _ in places), 1 + max(column for _, column in places)))
        patches.append([places[place] for place in sorted(places)])
    return _batched(grids, patches, positions.shape[1], (0, 0))


def _views_of_images(total: int, pixels: torch.Tensor, images: Sequence[ImageLayout]) -> list[int] | None:
    """How many views there are of each image; None where that is not known."""
    possible = [[1] * len(images), [len(image.tiles) for image in images]]
    if pixels.dim() > 4 and len(pixels) == len(images):
        possible.append((pixels != 0).flatten(2).any(2).sum(1).tolist())
    return next((counts for counts in possible if sum(counts) == total), None)


def _padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    index = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        index[number, : len(row)] = row
    return index


def with_patch_grids(
    tower: Tower | None, tensors: Mapping[str, torch.Tensor], images: tuple[ImageLayout, ...]
) -> tuple[ImageLayout, ...]:
    """Images that know the patch grids of their views; as they are where that is not known."""
    views = read_views(tower, tensors) if tower is not None and images else None
    counts = None if views is None else _views_of_images(len(views.grids), tensors["pixel_values"], images)
    if views is None or counts is None:
        return images
    grids = iter(views.grids)
    return tuple(
        replace(image, patch_grids=tuple(next(grids) for _ in range(count)))
        for image, count in zip(images, counts, strict=True)
    )
