"""Where image tokens stand: proven by content for every family; and the way from a place to its tokens and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
import vlm_spectra as vs
import zoo
from PIL import Image, ImageOps
from torch import nn
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.inputs import ImageLayout, Tile, layout_from_json, layout_to_json, on_grid
from vlm_spectra.network import wire
from vlm_spectra.spatial import Box, patch_overview

PLACED = sorted(set(zoo.FAMILIES) - {"mllama", "idefics2"})
"""The families whose tokens have places: Mllama's picture is read by cross-attention, Idefics2's by a resampler."""

TILED = sorted(name for name, entry in zoo.FAMILIES.items() if entry.tiled)


def _without_attention(family: str) -> vs.HookedVLM:
    """A family's model whose vision tower mixes no patches: what a token holds comes from its own pixels alone."""
    zoo.require(family)
    model = vs.HookedVLM.from_pretrained(str(zoo.build(family)), device="cpu")
    decoder = {id(module) for module in model.model.get_decoder().modules()}
    for name, module in model.model.named_modules():
        if id(module) in decoder or "Attention" not in type(module).__name__ or "adapter" in name or "pool" in name:
            continue
        for leaf in ("o_proj", "out_proj", "proj", "projection_layer"):
            projection = getattr(module, leaf, None)
            linear = getattr(projection, "linear", projection)
            if isinstance(linear, nn.Linear):
                for weight in linear.parameters():
                    nn.init.zeros_(weight)
    return model


def _inverted(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The image with one part in its negative."""
    image = image.copy()
    image.paste(ImageOps.invert(image.crop(box)), box[:2])
    return image


@pytest.mark.parametrize("family", PLACED)
def test_a_token_sees_its_box(family: str) -> None:
    """Invert the pixels in a token's box: of its tile, that token changes most, of any other, one that overlaps it.

    A token changes only if it looks there, but for what a resampling filter carries over. Inverting only a strip
    along an edge of the box changes the same token most, so the edges are right to a third of a token.
    """
    _check_boxes(_without_attention(family))


def _square(model: vs.HookedVLM) -> None:
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    model.processor.image_processor = transformers.LlavaImageProcessor(do_pad=True, **size)


def _shrunk(model: vs.HookedVLM) -> None:
    model.processor.vision_aspect_ratio = model.model.config.vision_aspect_ratio = "anyres_max_2"


def _unsplit(model: vs.HookedVLM) -> None:
    model.processor.image_processor.do_image_splitting = False


def _uncropped(model: vs.HookedVLM) -> None:
    model.processor.images_kwargs = {"crop_to_patches": False}


def _large_canvas(model: vs.HookedVLM) -> None:
    model.processor.image_processor.max_patches = 3
    model.processor.image_processor.resize_to_max_canvas = True


def _no_overview(model: vs.HookedVLM) -> None:
    model.processor.image_processor.use_thumbnail = False


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llava", _square),
        ("llava_onevision", _shrunk),
        ("idefics3", _unsplit),
        ("smolvlm", _unsplit),
        ("lfm2_vl", _unsplit),
        ("internvl", _uncropped),
        ("llama4", _large_canvas),
        ("lfm2_vl", _no_overview),
    ],
)
def test_a_token_sees_its_box_under_other_settings(family: str, change: Callable[[vs.HookedVLM], None]) -> None:
    """The layout follows the processor's settings, not the family's usual ones."""
    model = _without_attention(family)
    before = [model.prepare_messages("Look", image).images for image in (zoo.wide(), zoo.tall())]
    change(model)
    assert [model.prepare_messages("Look", image).images for image in (zoo.wide(), zoo.tall())] != before
    _check_boxes(model, edges=change is not _shrunk)  # its tokens are interpolated between patches


def _check_boxes(model: vs.HookedVLM, edges: bool = True) -> None:
    for image in (zoo.wide(), zoo.tall()):
        layout = model.prepare_messages("Look", image).images[0]
        assert not any(tile.resampled for tile in layout.tiles)
        fine = [token for token in layout.tokens() if not layout.tiles[token.tile].overview]
        whole = [token for token in fine if min(token.box[2] - token.box[0], token.box[3] - token.box[1]) > 4]
        overviews = [token for token in layout.tokens() if layout.tiles[token.tile].overview]
        chosen = [whole[0], whole[len(whole) // 3], whole[len(whole) // 2 + 1], whole[-1], *overviews[1:3]]
        boxes = [_inner(token.box) for token in chosen]
        strips = [(token, strip) for token in (chosen[0], chosen[2]) for strip in _strips(token.box)]
        pictures = [image, *(_inverted(image, box) for box in [*boxes, *(strip for _, strip in strips)])]
        inputs = model.prepare_messages_batch(["Look"] * len(pictures), pictures)
        with model.run_with_cache(["lm.hook_embed"]) as cache:
            model.forward(inputs)
        embed = cache["lm.hook_embed"]
        change = (embed[1:] - embed[:1]).norm(dim=-1)
        for token, box, row in zip(chosen, boxes, change[: len(boxes)], strict=True):
            fractions = {overlap.position: overlap.fraction for overlap in layout.tokens_in(box)}
            own = layout.tiles[token.tile].positions
            assert fractions[token.position] == max(fractions.get(position, 0.0) for position in own)
            assert row[[p for p in range(len(row)) if p not in layout.positions]].max() == 0
            for number, tile in enumerate(layout.tiles):
                seen = row[list(tile.positions)]
                most = tile.positions[int(seen.argmax())]
                assert most == token.position or number != token.tile
                assert most in fractions or fractions.keys().isdisjoint(tile.positions)
                near = [_near(tile, index, box) for index in range(len(tile.positions))]
                assert all(n or c == 0 for n, c in zip(near, seen.tolist(), strict=True))
        for (token, _), row in zip(strips if edges else [], change[len(boxes) :], strict=edges):
            tile = layout.tiles[token.tile]
            assert tile.positions[int(row[list(tile.positions)].argmax())] == token.position


def _inner(box: Box) -> tuple[int, int, int, int]:
    """The whole pixels within a box."""
    return math.ceil(box[0]), math.ceil(box[1]), math.floor(box[2]), math.floor(box[3])


def _strips(box: Box) -> list[tuple[int, int, int, int]]:
    """The outer thirds of a box: left, right, upper and lower."""
    left, top, right, bottom = _inner(box)
    across, down = max((right - left) // 3, 2), max((bottom - top) // 3, 2)
    return [
        (left, top, left + across, bottom),
        (right - across, top, right, bottom),
        (left, top, right, top + down),
        (left, bottom - down, right, bottom),
    ]


def _near(tile: Tile, index: int, box: tuple[int, int, int, int]) -> bool:
    """Whether a box reaches into a token's, widened by its own size for filters that see beyond it."""
    left, top, right, bottom = tile.box_of(*divmod(index, tile.grid[1]))
    across, down = right - left, bottom - top
    return box[0] < right + across and box[2] > left - across and box[1] < bottom + down and box[3] > top - down


@pytest.mark.parametrize("family", TILED)
def test_tiles_make_the_whole(family: str) -> None:
    """Tiles without the overview fill the image's grid once, and their boxes cover the picture."""
    model = zoo.load(family)
    for image in (zoo.wide(), zoo.tall()):
        layout = model.prepare_messages("Look", image).images[0]
        assert len(layout.tiles) > 1
        assert sum(tile.overview for tile in layout.tiles) <= 1
        assert -1 not in layout.raster
        area = sum(
            (box[2] - box[0]) * (box[3] - box[1]) for box in map(layout.box, range(layout.grid[0] * layout.grid[1]))
        )
        assert area == pytest.approx(image.width * image.height, rel=0.04)  # LLaVA-NeXT cuts off part of a token
        vector = torch.arange(layout.positions[-1] + 1)
        assert on_grid(vector, layout).flatten().tolist() == list(layout.raster)
        for number, tile in enumerate(layout.tiles):
            assert on_grid(vector, layout, number).flatten().tolist() == list(tile.positions)
    with pytest.raises(InvalidInputError, match="no tile 99"):
        on_grid(vector, layout, 99)


def test_line_breaks_stand_for_nothing() -> None:
    layout = zoo.load("llava_next").prepare_messages("Look", zoo.wide()).images[0]
    tokens = [layout.token(i) for i in range(len(layout.positions))]
    rows, columns = layout.grid
    overview = math.prod(layout.tiles[0].grid)
    assert [i for i, token in enumerate(tokens) if token is None] == [
        overview + row * (columns + 1) + columns for row in range(rows)
    ]


def test_a_split_picture_of_a_resampler_has_its_quarters() -> None:
    """Idefics2: what changes in a quarter changes that quarter's tokens and the overview's, and no others."""
    model = vs.HookedVLM.from_pretrained(str(zoo.build("idefics2")), device="cpu")
    model.processor.image_processor.do_image_splitting = True
    width, height = zoo.wide().size
    corner = (0, height * 3 // 4, width // 4, height)
    inputs = model.prepare_messages_batch(["Look"] * 2, [zoo.wide(), _inverted(zoo.wide(), corner)])
    layout = inputs.images[0]
    assert [tile.overview for tile in layout.tiles] == [False] * 4 + [True]
    with model.run_with_cache(["lm.hook_embed"]) as cache:
        model.forward(inputs)
    first, second = cache["lm.hook_embed"]
    changed = torch.nonzero((first - second).norm(dim=-1) > 1e-6).flatten().tolist()
    assert changed == [overlap.position for overlap in layout.tokens_in(corner)]
    assert changed == [*layout.tiles[2].positions, *layout.tiles[4].positions]


def test_a_resampler_and_cross_attention_have_no_places() -> None:
    for family in ("idefics2", "mllama"):
        layout = zoo.load(family).prepare_messages("Look", zoo.wide()).images[0]
        assert all(token.box == (0, 0, *zoo.wide().size) for token in layout.tokens())
        found = layout.tokens_in((0, 0, zoo.wide().width // 2, zoo.wide().height))
        assert [o.fraction for o in found] == pytest.approx([0.5] * len(layout.positions))


def test_pan_and_scan_is_not_guessed_at() -> None:
    """Tokens whose places are not known stand for the whole picture."""
    model = vs.HookedVLM.from_pretrained(str(zoo.build("gemma3")), device="cpu")
    options = {"pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 2}
    activate = {"do_pan_and_scan": True, "pan_and_scan_min_ratio_to_activate": 1.2}
    model.processor.images_kwargs = {**model.processor.images_kwargs, **options, **activate}
    layout = model.prepare_messages("Look", zoo.wide()).images[0]
    assert len(layout.positions) == 48
    assert layout.tiles[0].resampled


LAYOUT = ImageLayout(0, (100, 60), (64, 64), (3, 5), tuple(range(7, 22)))


def test_box_to_tokens() -> None:
    found = LAYOUT.tokens_in((20, 20, 50, 30))
    assert [(o.row, o.column, o.position) for o in found] == [(1, 1, 13), (1, 2, 14)]
    assert [o.fraction for o in found] == pytest.approx([0.5, 0.25])
    assert LAYOUT.positions_in((20, 20, 50, 30), at_least=0.3) == [13]
    assert len(LAYOUT.tokens_in((0, 0, 100, 60))) == 15


def test_mask_to_tokens_is_the_same_as_its_box() -> None:
    box = (13, 5, 77, 41)
    mask = np.zeros((60, 100), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    by_box, by_mask = LAYOUT.tokens_in(box), LAYOUT.tokens_in(mask)
    assert [o.position for o in by_box] == [o.position for o in by_mask]
    assert [o.fraction for o in by_box] == pytest.approx([o.fraction for o in by_mask])
    odd = ImageLayout(0, (100, 60), (64, 64), (7, 9), tuple(range(63)))
    assert [o.fraction for o in odd.tokens_in(box)] == pytest.approx([o.fraction for o in odd.tokens_in(mask)])


def test_tokens_to_boxes_and_mask_and_back() -> None:
    assert LAYOUT.boxes_of([13, 7]) == [(20, 20, 40, 40), (0, 0, 20, 20)]
    mask = LAYOUT.mask_of([13, 14])
    assert mask.shape == (60, 100)
    assert mask.sum() == 800
    assert [(o.position, o.fraction) for o in LAYOUT.tokens_in(mask)] == [(13, 1.0), (14, 1.0)]
    with pytest.raises(InvalidInputError, match="position 3 does not look at this image"):
        LAYOUT.boxes_of([3])


@pytest.mark.parametrize(
    ("region", "sentence"),
    [
        ((0, 0, 101, 10), "outside the image, which is 100 x 60"),
        ((-1, 0, 10, 10), "outside the image"),
        ((10, 10, 10, 20), "no area"),
        ((1, 2, 3), "a box .left, top, right, bottom. or a boolean mask"),
        (np.zeros((100, 60), dtype=bool), r"as large as the image, \[60, 100\]"),
        (np.zeros((60, 100)), "boolean"),
    ],
)
def test_regions_that_are_none(region: object, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        LAYOUT.tokens_in(region)


def test_regions_of_a_batch(hooked: vs.HookedVLM, screenshot: Image.Image, photo: Image.Image) -> None:
    batch = hooked.prepare_messages_batch(["Look", "Look at the second"], [screenshot, photo])
    circle = batch.tokens_in((130, 130, 230, 230))
    assert {o.position for o in circle} <= set(batch.images[0].positions)
    covered = sum(o.fraction * 640 * 400 / math.prod(batch.images[0].grid) for o in circle)
    assert covered == pytest.approx(100 * 100)
    assert batch.positions_in((0, 0, 300, 420), image=1) == list(batch.images[1].positions)
    with pytest.raises(InvalidInputError, match="no image 2"):
        batch.tokens_in((0, 0, 10, 10), image=2)


def test_layouts_cross_wire_and_file_unchanged() -> None:
    for family in ("qwen2_vl", "llava_next", "idefics3", "deepseek_vl"):
        for layout in zoo.load(family).prepare_messages("Look", [zoo.wide(), zoo.tall()]).images:
            assert wire.layout_from_wire(wire.layout_to_wire(layout)) == layout
            assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout


def test_patch_overview_numbers_patches() -> None:
    layout = zoo.load("idefics3").prepare_messages("Look", zoo.wide()).images[0]
    picture = patch_overview(zoo.wide(), layout)
    scale = picture.width // zoo.wide().width
    assert picture.size == (zoo.wide().width * scale, zoo.wide().height * scale)
    assert scale > 1
    left, top, right, bottom = (edge * scale for edge in layout.box(8))
    assert picture.getpixel((math.ceil(left), round((top + bottom) / 2))) == (213, 94, 0)
    plain = zoo.wide().resize(picture.size, Image.Resampling.LANCZOS)
    inner = tuple(round(edge) for edge in (left + 2, top + 2, right - 2, bottom - 2))
    assert picture.crop(inner).tobytes() != plain.crop(inner).tobytes()  # the number
    overview = patch_overview(zoo.wide(), layout, tile=len(layout.tiles) - 1, numbers="position")
    assert overview.tobytes() != picture.tobytes()
    with pytest.raises(InvalidInputError, match="no tile 40"):
        patch_overview(zoo.wide(), layout, tile=40)
