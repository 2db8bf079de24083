"""How a picture becomes grids of tokens: what part of the picture stands behind each, by the processor's own rules.

A processor resizes a picture and puts it on a canvas, where it may be cropped or padded; a tower sees the canvas whole
or tile by tile. `LAYOUTS` has the families that differ from the common case, `common`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

Size = tuple[int, int]
"""Width and height in pixels."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the original image."""


@dataclass(frozen=True)
class TokenGrid:
    """A run of an image's tokens that is a grid over a part of the picture.

    Attributes:
        shape: Rows and columns of tokens.
        box: What it shows, in original pixels; beyond the image where the processor padded it.
        origin: The row and column of its first token in the image's grid.
        overview: A coarser look at the whole image.
        resampled: Every token stands for the whole box.
        breaks: A further token with the image token's id ends each row.
    """

    shape: tuple[int, int]
    box: Box
    origin: tuple[int, int] = (0, 0)
    overview: bool = False
    resampled: bool = False
    breaks: bool = False

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.shape[0] * (self.shape[1] + self.breaks)


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image, in the order of the sequence.

    Attributes:
        grids: One after the other.
        processed_size: Width and height in pixels after the processor's resizing, without its padding.
        rest: Further tokens behind the last grid, which show nothing.
    """

    grids: tuple[TokenGrid, ...]
    processed_size: Size
    rest: int = 0

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(grid.count for grid in self.grids) + self.rest

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the image's grid, all but overviews put together."""
        fine = [grid for grid in self.grids if not grid.overview]
        return (
            max(grid.origin[0] + grid.shape[0] for grid in fine),
            max(grid.origin[1] + grid.shape[1] for grid in fine),
        )


@dataclass(frozen=True)
class Seen:
    """An image in a batch, as its layout is found.

    Attributes:
        processor: The model's processor.
        features: What it returned.
        number: The image's number in the batch.
        total: The images of the batch.
        size: Its width and height as given.
        share: The image tokens of its prompt, divided by the prompt's images.
        alone: It is the only image of its prompt.
    """

    processor: Any
    features: Mapping[str, Any]
    number: int
    total: int
    size: Size
    share: int
    alone: bool

    @property
    def images(self) -> Any:
        """The processor's part for images."""
        return self.processor.image_processor

    @property
    def whole(self) -> Box:
        """The whole picture."""
        return 0.0, 0.0, float(self.size[0]), float(self.size[1])

    @property
    def side(self) -> int:
        """Pixels along the last axis of what the tower sees."""
        return int(self.features["pixel_values"].shape[-1])


def on_canvas(size: Size, resized: Size, offset: tuple[float, float], canvas: tuple[float, float]) -> Box:
    """A canvas in pixels of the original picture.

    Args:
        size: The picture's width and height.
        resized: What they became.
        offset: Where its upper left corner lies on the canvas; negative where it was cropped.
        canvas: The canvas's width and height.
    """
    across, down = size[0] / resized[0], size[1] / resized[1]
    x, y = offset
    return -x * across, -y * down, (canvas[0] - x) * across, (canvas[1] - y) * down


def tiled(rows: int, columns: int, shape: tuple[int, int], box: Box) -> tuple[TokenGrid, ...]:
    """Tiles in raster order that divide a box evenly, each with a grid of one shape."""
    left, top, right, bottom = box
    across, down = (right - left) / columns, (bottom - top) / rows
    return tuple(
        TokenGrid(
            shape,
            (left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down),
            (row * shape[0], column * shape[1]),
        )
        for row in range(rows)
        for column in range(columns)
    )


def with_overview(
    seen: Seen, rows: int, columns: int, shape: tuple[int, int], side: int, first: bool = False, box: Box | None = None
) -> ImageTokens:
    """Tiles and, where there is more than one, an overview of the whole picture.

    Args:
        seen: The image.
        rows: Rows of tiles.
        columns: Columns of tiles.
        shape: Rows and columns of each tile's tokens.
        side: A tile's edge in pixels.
        first: The overview comes first; otherwise last.
        box: What the tiles show; the whole picture where None.
    """
    grids = tiled(rows, columns, shape, box or seen.whole)
    if len(grids) > 1:
        overview = TokenGrid(shape, seen.whole, overview=True)
        grids = (overview, *grids) if first else (*grids, overview)
    return ImageTokens(grids, (columns * side, rows * side))


def unplaced(seen: Seen, count: int | None = None) -> ImageTokens:
    """Tokens of which each stands for the whole picture: a resampler's, or those whose places are not known."""
    return ImageTokens((TokenGrid((1, seen.share if count is None else count), seen.whole, resampled=True),), seen.size)


def common(seen: Seen) -> ImageTokens:
    """One grid: the processor says how many patches it has, or else it is a square."""
    if "image_grid_thw" in seen.features:
        return patches(seen)
    pixels = seen.features.get("pixel_values")
    side = math.isqrt(seen.share)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or len(pixels) != seen.total or side**2 != seen.share:
        return unplaced(seen)  # not one view an image, or no square of tokens
    return ImageTokens((TokenGrid((side, side), _frame(seen)),), (int(pixels.shape[-1]), int(pixels.shape[-2])))


def _frame(seen: Seen) -> Box:
    """What a square tower sees of a picture that was stretched, padded to a square, or cropped in the middle."""
    images, (width, height) = seen.images, seen.size
    if getattr(images, "do_pad", None) and hasattr(images, "pad_to_square"):
        side = max(width, height)
        if not hasattr(images, "min_size"):  # first padded, then resized
            return on_canvas(seen.size, seen.size, ((side - width) // 2, (side - height) // 2), (side, side))
        edge = int(images.size["height"])
        resized = (max(round(width * edge / side), images.min_size), max(round(height * edge / side), images.min_size))
        longer = max(resized)
        offset = ((longer - resized[0]) // 2, (longer - resized[1]) // 2)
        return on_canvas(seen.size, resized, offset, (longer, longer))
    edge = getattr(getattr(images, "size", None), "shortest_edge", None)
    if not getattr(images, "do_center_crop", False) or edge is None:
        return seen.whole
    shorter, longer = sorted(seen.size)
    long_edge = int(edge * longer / shorter)
    resized = (edge, long_edge) if width <= height else (long_edge, edge)
    crop = (int(images.crop_size["width"]), int(images.crop_size["height"]))
    offset = tuple(-int((resized[axis] - crop[axis]) / 2.0) for axis in (0, 1))
    return on_canvas(seen.size, resized, (offset[0], offset[1]), crop)


def patches(seen: Seen) -> ImageTokens:
    """`image_grid_thw` has an image's patches, 1, rows, columns; a token is a block of `merge_size` squared."""
    merge, patch = seen.images.merge_size, seen.images.patch_size
    _, rows, columns = (int(extent) for extent in seen.features["image_grid_thw"][seen.number])
    canvas = (columns * patch, rows * patch)
    return ImageTokens((TokenGrid((rows // merge, columns // merge), seen.whole),), canvas)


def _kimi(seen: Seen) -> ImageTokens:
    """As `patches`, but the picture is padded to whole tokens on the right and at the bottom."""
    plain, images = patches(seen), seen.images
    (height, width), _ = _module(images).navit_resize(
        height=seen.size[1],
        width=seen.size[0],
        patch_size=images.patch_size,
        merge_kernel_size=images.merge_size,
        max_patches=images.max_patches,
        max_size_per_side=images.size["max_height"],
    )
    box = on_canvas(seen.size, (width, height), (0, 0), plain.processed_size)
    return ImageTokens((TokenGrid(plain.grids[0].shape, box),), (width, height))


def _anyres(seen: Seen) -> ImageTokens:
    """LLaVA-NeXT: an overview, then the picture on the best of several canvases, without the padding's tokens.

    Rows of the second end with a line break. A prompt of several images has overviews alone in LLaVA-OneVision.
    """
    count = getattr(seen.processor, "num_image_tokens", None)
    edge = seen.side
    side = math.isqrt(count) if count else edge // seen.processor.patch_size
    overview = TokenGrid((side, side), seen.whole, overview=True)
    if count and not seen.alone:
        return ImageTokens((TokenGrid((side, side), seen.whole),), (edge, edge), rest=1)
    width, height = seen.size
    from transformers.image_processing_utils import select_best_resolution

    best_height, best_width = select_best_resolution((height, width), seen.images.image_grid_pinpoints)
    scale = min(best_width / width, best_height / height)
    if best_width / width < best_height / height:
        resized = (best_width, min(math.ceil(height * scale), best_height))
    else:
        resized = (min(math.ceil(width * scale), best_width), best_height)
    offset = ((best_width - resized[0]) // 2, (best_height - resized[1]) // 2)
    rows, columns = best_height // edge * side, best_width // edge * side
    above = left = 0
    if width / height > columns / rows:
        above = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    patch = edge / side
    shape = (rows - 2 * above, columns - 2 * left)
    box = on_canvas(
        seen.size,
        resized,
        (offset[0] - left * patch, offset[1] - above * patch),
        (shape[1] * patch, shape[0] * patch),
    )
    if count:
        most = int(seen.processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(shape[0] * shape[1] / (most * side**2))
        if ratio > 1.1:
            shape = (int(shape[0] // ratio), int(shape[1] // ratio))
    return ImageTokens((overview, TokenGrid(shape, box, breaks=True)), resized)


def _idefics2(seen: Seen) -> ImageTokens:
    """A resampler's tokens for the whole picture, after those of its quarters where it is split."""
    count = seen.processor.image_seq_len
    whole = unplaced(seen, count).grids
    if not seen.images.do_image_splitting:
        return ImageTokens(whole, seen.size)
    quarters = (
        TokenGrid((1, count), grid.box, (0, index * count), resampled=True)
        for index, grid in enumerate(tiled(2, 2, (1, 1), seen.whole))
    )
    return ImageTokens((*quarters, TokenGrid((1, count), seen.whole, overview=True, resampled=True)), seen.size)


def _idefics3(seen: Seen) -> ImageTokens:
    """Idefics3 and SmolVLM: stretched to whole tiles, an overview last."""
    images = seen.images
    edge = int(images.max_image_size["longest_edge"])
    rows = columns = 1
    if images.do_image_splitting:
        blank = torch.zeros(1, 1, seen.size[1], seen.size[0], dtype=torch.uint8)
        if images.do_resize:
            blank = images.resize(blank, images.size, resample=images.resample)
        blank = images.resize_for_vision_encoder(blank, edge, resample=images.resample)
        rows, columns = blank.shape[-2] // edge, blank.shape[-1] // edge
    side = math.isqrt(seen.processor.image_seq_len)
    return with_overview(seen, rows, columns, (side, side), edge)


def _even_tiles(seen: Seen, count: int, first: bool = False) -> ImageTokens:
    """InternVL, Aya Vision and Ovis2: stretched to the grid of tiles that suits the picture's shape best."""
    images, module = seen.images, _module(seen.images)
    edge = (int(images.size["height"]), int(images.size["width"]))
    options = getattr(seen.processor, "images_kwargs", {})
    rows = columns = 1
    if options.get("crop_to_patches", images.crop_to_patches):
        shape = (seen.size[1], seen.size[0])
        if getattr(images, "use_covering_area_grid", False):
            columns, rows = module.get_min_tile_covering_grid(
                shape, target_patch_size=edge[0], max_image_tiles=images.max_patches, covering_threshold=0.9
            )
        else:
            columns, rows = module.get_optimal_tiled_canvas(shape, edge, images.min_patches, images.max_patches)
    side = math.isqrt(count)
    return with_overview(seen, rows, columns, (side, side), edge[0], first)


def _internvl(seen: Seen) -> ImageTokens:
    return _even_tiles(seen, seen.processor.image_seq_length)


def _aya_vision(seen: Seen) -> ImageTokens:
    return _even_tiles(seen, (seen.processor.img_size // seen.processor.patch_size) ** 2)


def _ovis2(seen: Seen) -> ImageTokens:
    return _even_tiles(seen, seen.processor.image_seq_length, first=True)


def _lfm2_vl(seen: Seen) -> ImageTokens:
    """Stretched to whole tiles, with an overview that keeps the proportions; a small picture is that alone."""
    images = seen.images
    names = "downsample_factor max_tiles use_thumbnail min_image_tokens max_image_tokens encoder_patch_size tile_size"
    options = {name: getattr(images, name) for name in [*names.split(), "min_tiles", "max_pixels_tolerance"]}
    if not images.do_image_splitting:
        options |= {"min_tiles": 1, "max_tiles": 1}
    blank = torch.zeros(1, 3, seen.size[1], seen.size[0], dtype=torch.uint8)
    _, rows, columns, sizes = images.resize_and_split(blank, **options, resample=images.resample)
    per = images.encoder_patch_size

    def shape(height: int, width: int) -> tuple[int, int]:
        factor = images.downsample_factor
        return math.ceil(height // per / factor), math.ceil(width // per / factor)

    (height, width) = sizes[0]
    if rows[0] * columns[0] == 1:
        return ImageTokens((TokenGrid(shape(height, width), seen.whole),), (width, height))
    edge = images.tile_size
    grids = tiled(rows[0], columns[0], shape(edge, edge), seen.whole)
    if images.use_thumbnail:
        grids = (*grids, TokenGrid(shape(height, width), seen.whole, overview=True))
    return ImageTokens(grids, (columns[0] * edge, rows[0] * edge))


def _llama4(seen: Seen) -> ImageTokens:
    """Set without distortion on the best of several canvases, padded on the right and at the bottom."""
    images, module = seen.images, _module(seen.images)
    edge = int(images.size["height"])
    options = torch.tensor(module.find_supported_resolutions(max_num_chunks=images.max_patches, patch_size=images.size))
    shape = (seen.size[1], seen.size[0])
    best = tuple(int(x) for x in module.get_best_fit(shape, options, resize_to_max_canvas=images.resize_to_max_canvas))
    target = best
    if not images.resize_to_max_canvas:
        target = (min(max(shape[0], edge), best[0]), min(max(shape[1], edge), best[1]))
    height, width = (max(extent, 1) for extent in module.get_max_res_without_distortion(shape, target))
    side = math.isqrt((edge // seen.processor.patch_size) ** 2 // seen.processor.downsample_ratio)
    box = on_canvas(seen.size, (width, height), (0, 0), (best[1], best[0]))
    tokens = with_overview(seen, best[0] // edge, best[1] // edge, (side, side), edge, box=box)
    return replace(tokens, processed_size=(width, height))


def _mistral3(seen: Seen) -> ImageTokens:
    """Resized to whole tokens; the tokens that end a row have another id."""
    height, width = (int(extent) for extent in seen.features["image_sizes"][seen.number])
    token = seen.processor.patch_size * seen.processor.spatial_merge_size
    return ImageTokens((TokenGrid((height // token, width // token), seen.whole),), (width, height))


def _gemma4(seen: Seen) -> ImageTokens:
    """Resized to whole tokens; `image_position_ids` has a column and row for each patch, negative for padding."""
    columns, rows = (int(extent) + 1 for extent in seen.features["image_position_ids"][seen.number].amax(0))
    patch, pool = seen.images.patch_size, seen.images.pooling_kernel_size
    return ImageTokens((TokenGrid((rows // pool, columns // pool), seen.whole),), (columns * patch, rows * patch))


def _molmo2(seen: Seen) -> ImageTokens:
    """An overview, then one grid over crops that overlap; both pooled, where patches do not suffice, with padding."""
    images = seen.images
    low_rows, low_columns, rows, columns = (int(n) for n in seen.features["image_grids"][seen.number])
    edge, patch = int(images.size["height"]), images.patch_size
    _, _, height, width = _module(images).compute_crop_geometry(
        seen.size[1],
        seen.size[0],
        max_crops=images.max_crops,
        overlap_margins=images.overlap_margins,
        crop_size=edge,
        patch_size=patch,
    )
    down, across = images.pooling_size

    def box(canvas: Size, shape: tuple[int, int]) -> Box:
        pooled = (shape[1] * across * patch, shape[0] * down * patch)
        offset = tuple((pooled[axis] - canvas[axis]) // patch // 2 * patch for axis in (0, 1))
        return on_canvas(seen.size, canvas, (offset[0], offset[1]), pooled)

    low, high = (low_rows, low_columns), (rows, columns)
    overview = TokenGrid(low, box((edge, edge), low), overview=True)
    return ImageTokens((overview, TokenGrid(high, box((width, height), high))), (width, height))


def _module(images: Any) -> Any:
    """The module of an image processor's class, which has the functions that it goes by."""
    return sys.modules[type(images).__module__]


LAYOUTS: Mapping[str, Callable[[Seen], ImageTokens]] = {
    "aya_vision": _aya_vision,
    "gemma4": _gemma4,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "kimi_k25": _kimi,
    "lfm2_vl": _lfm2_vl,
    "llama4": _llama4,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "mistral3": _mistral3,
    "molmo2": _molmo2,
    "ovis2": _ovis2,
    "smolvlm": _idefics3,
}
"""By `model_type`; any other family has the common layout."""
