"""Where the numbers of `pixel_values` lie: in which image, at which place of it, behind which token.

Two forms are known: pictures [views, 3, height, width] (or [batch, views, 3, height, width]), and the sequence of
flattened patches of Qwen's processors, where the patches of one token stand together.
"""

from __future__ import annotations

from typing import Any

import torch
from vlm_spectra.errors import NotSupportedError
from vlm_spectra.inputs import ImageLayout
from vlm_spectra.spatial import Box

from ..hooked.inputs import HookedInputs

PIXELS = "pixel_values"


class PixelMap:
    """The places of a batch's pixels.

    Args:
        processor: The model's processor.
        inputs: The batch.

    Attributes:
        image: The number of the image; -1 for what belongs to none.
        x: Pixels from the left edge of the image as given.
        y: Pixels from its top.
        place: row * seq + column of the token; -1 for none. All four broadcast to `pixel_values`.

    Raises:
        NotSupportedError: The family's `pixel_values` have another form.
    """

    def __init__(self, processor: Any, inputs: HookedInputs) -> None:
        self.rows, self.seq = inputs.tensors["input_ids"].shape
        pixels = inputs.tensors[PIXELS]
        views = [view for number, image in enumerate(inputs.images) for view in _views(number, image, self.seq)]
        if pixels.dim() == 2 and hasattr(processor.image_processor, "merge_size"):
            planes = [self._patches(processor.image_processor, view, pixels.shape[1]) for view in views]
        elif pixels.dim() in (4, 5):
            height, width = pixels.shape[-2:]
            planes = [tuple(part[None, None] for part in view.spread(height, width)) for view in views]
            planes = _with_padding(inputs, planes)
        else:
            planes = []
        found = [torch.cat(parts) for parts in zip(*planes, strict=True)] if planes else []
        if not found or len(found[0]) != (pixels.shape[0] if pixels.dim() != 5 else pixels.shape[0] * pixels.shape[1]):
            raise NotSupportedError(
                f"where the pixels of this family lie is not known (pixel_values has shape {list(pixels.shape)}); "
                "methods on embeddings, such as gradient_x_input, work.",
                field="method",
            )
        if pixels.dim() == 5:
            found = [part.view(*pixels.shape[:2], *part.shape[1:]) for part in found]
        self.image, self.x, self.y, self.place = found

    def _patches(self, processor: Any, view: _View, features: int) -> tuple[torch.Tensor, ...]:
        """A view's pixels in the order of flattened patches: [patches, features]."""
        merge, patch = processor.merge_size, processor.patch_size
        rows, columns = view.grid
        planes = view.spread(rows * merge * patch, columns * merge * patch)
        found = []
        for plane in planes:
            blocks = plane.reshape(rows, merge, patch, columns, merge, patch).permute(0, 3, 1, 4, 2, 5)
            flat = blocks.reshape(rows * columns * merge * merge, 1, patch * patch)
            found.append(flat.expand(-1, features // (patch * patch), -1).reshape(len(flat), features))
        return tuple(found)

    def within(self, image: int, box: Box) -> torch.Tensor:
        """Which pixels of an image lie in a box, as a mask that broadcasts to `pixel_values`."""
        left, top, right, bottom = box
        inside = (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)
        return inside & (self.image == image)

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """Values of pixels summed by the token behind which they lie, [batch, seq] float32."""
        place = self.place.to(values.device).expand(values.shape).reshape(-1)
        scores = torch.zeros(self.rows * self.seq + 1, device=values.device)
        # The last entry takes what belongs to no token.
        scores = scores.index_add(0, place % len(scores), values.float().reshape(-1))
        return scores[:-1].view(self.rows, self.seq)


class _View:
    """One picture that the tower sees: an image, or a part of it.

    Args:
        image: The image's number.
        grid: Rows and columns of its tokens.
        box: The part of the image as given.
        places: row * seq + column of each token, in raster order.
    """

    def __init__(self, image: int, grid: tuple[int, int], box: Box, places: list[int]) -> None:
        self.image, self.grid, self.box, self.places = image, grid, box, places

    def spread(self, height: int, width: int) -> tuple[torch.Tensor, ...]:
        """Image, x, y and place of every pixel, each [height, width]."""
        left, top, right, bottom = self.box
        x = (left + (torch.arange(width) + 0.5) / width * (right - left)).expand(height, width)
        y = (top + (torch.arange(height) + 0.5) / height * (bottom - top))[:, None].expand(height, width)
        rows = torch.arange(height) * self.grid[0] // height
        columns = torch.arange(width) * self.grid[1] // width
        places = torch.tensor(self.places)[rows[:, None] * self.grid[1] + columns]
        return torch.full((height, width), self.image), x, y, places


def _views(number: int, image: ImageLayout, seq: int) -> list[_View]:
    return [
        _View(number, tile.grid, tile.box, [image.row * seq + column for column in tile.positions])
        for tile in image.tiles
    ]


def _with_padding(inputs: HookedInputs, planes: list[Any]) -> list[Any]:
    """The views row by row, with views of no image where a row has fewer than the longest."""
    pixels = inputs.tensors[PIXELS]
    if pixels.dim() == 4:
        return planes
    counts = [sum(len(image.tiles) for image in inputs.images_of(row)) for row in range(pixels.shape[0])]
    found, at = [], 0
    for count in counts:
        found += planes[at : at + count]
        at += count
        for _ in range(pixels.shape[1] - count):
            found.append(tuple(torch.full((1, 1, *pixels.shape[-2:]), -1) for _ in range(4)))
    return found
