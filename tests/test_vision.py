"""The hooks of the vision tower: one order for every family, the arithmetic of a residual stream, and what edits do."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_spectra as vs
import zoo
from PIL import Image, ImageDraw
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index
from vlm_spectra.errors import InvalidInputError, ShapeMismatchError, UnknownHookError
from vlm_spectra_server.hooked.inputs import layout_of
from vlm_spectra_server.hooked.views import block_order

WITHOUT = {"mllama": "its tiles attend to each other, and images enter by cross-attention"}
FAMILIES = [name for name in zoo.FAMILIES if name not in WITHOUT]
PACKED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "kimi_k25", "gemma4"}
"""Families whose processor makes patches out of the picture, so that the order is to be proven from the picture on."""


def load(name: str, attention: str = "") -> vs.HookedVLM:
    """A model of the zoo, by the attention implementation that it supports."""
    try:
        return zoo.load(name, attention or "sdpa")
    except InvalidInputError:
        return zoo.load(name, "eager")


def pictures(name: str) -> list[Image.Image]:
    """Two pictures of different shape, or one where a family takes only one."""
    return [zoo.wide(), zoo.tall()] if zoo.FAMILIES[name].two_images else [zoo.tall()]


def places(model: vs.HookedVLM, inputs: vs.Inputs) -> Any:
    """Where each patch of each view stands in the tower."""
    found = layout_of(model.reading, model.prepared(inputs)).patches
    assert found is not None
    return found


def of_vision(name: str) -> bool:
    return name.startswith("vision.")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_captures_change_nothing_and_add_up(family: str) -> None:
    zoo.require(family)
    model = load(family)
    inputs = model.prepare_messages("What is there?", pictures(family))
    plain = model.forward(inputs).logits
    with model.run_with_cache(of_vision) as cache:
        assert torch.equal(model.forward(inputs).logits, plain)

    valid = torch.from_numpy(places(model, inputs).valid)
    assert cache["vision.hook_embed"].shape == (*valid.shape, model.info.vision_hidden)
    assert torch.equal(cache["vision.hook_embed"], cache["vision.blocks.0.hook_resid_pre"])
    for layer in range(model.info.vision_layers):
        block = {name.split(f".{layer}.")[1]: cache[name] for name in cache[f"vision.blocks.{layer}.*"]}
        block |= {name.split(f".{layer}.")[1]: cache[name] for name in cache[f"vision.blocks.{layer}.*.*"]}
        mid, post = block["hook_resid_mid"], block["hook_resid_post"]
        torch.testing.assert_close(block["hook_resid_pre"] + block["hook_attn_out"], mid, rtol=0, atol=1e-5)
        torch.testing.assert_close(mid + block["hook_mlp_out"], post, rtol=0, atol=1e-5)
        if layer:
            assert torch.equal(cache[f"vision.blocks.{layer - 1}.hook_resid_post"], block["hook_resid_pre"])
        pattern = block["attn.hook_pattern"]
        assert pattern.shape == (len(valid), model.info.vision_heads, valid.shape[1], valid.shape[1])
        torch.testing.assert_close(pattern.sum(-1), valid[:, None].expand(pattern.shape[:3]).float(), rtol=0, atol=1e-5)
        assert (pattern.sum(-2)[~valid[:, None].expand(pattern.shape[:3])] == 0).all()
        again = block["attn.hook_scores"].softmax(-1).nan_to_num(0)
        torch.testing.assert_close(again, pattern, rtol=0, atol=1e-6)
        groups = model.info.vision_heads // block["attn.hook_v"].shape[2]
        mixed = torch.einsum("vhqk,vkhd->vqhd", pattern, block["attn.hook_v"].repeat_interleave(groups, 2))
        if family != "gemma4":  # it normalizes its values
            torch.testing.assert_close(mixed[valid], block["attn.hook_z"][valid], rtol=0, atol=1e-5)
        assert all((each[~valid] == 0).all() for name, each in block.items() if each.shape[:2] == valid.shape)


def test_patterns_are_those_of_hugging_faces_eager_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(family, "eager")
    inputs = model.prepare_messages("What is there?", pictures(family))
    tower = model.reading.vision
    assert tower is not None
    module = sys.modules[type(tower.blocks[1].attn).__module__]
    name = next(each for each in ("vision_eager_attention_forward", "eager_attention_forward") if hasattr(module, each))
    original, seen = getattr(module, name), []

    def recorded(attention: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(attention, *args, **kwargs)
        if attention is tower.blocks[1].attn:
            seen.extend(weights)
        return out, weights

    monkeypatch.setattr(module, name, recorded)
    with model.run_with_cache("vision.blocks.1.attn.hook_pattern") as cache:
        model.forward(inputs, logits_to_keep=None)
    whole = torch.block_diag(*[part[0] for part in seen])  # the first head, in the tower's order
    for view, row in enumerate(places(model, inputs).index):
        order = torch.from_numpy(row[row >= 0])
        ours = cache["vision.blocks.1.attn.hook_pattern"][view, 0, : len(order), : len(order)]
        torch.testing.assert_close(ours, whole[order][:, order], rtol=0, atol=1e-6)


def test_a_changed_patch_is_found_in_its_own_row(family: str) -> None:
    """Raster order from the model's input on: pixels of a patch for most, the picture itself for the others."""
    model = load(family)
    size = model.info.patch_size
    if family in PACKED:
        shapes = [_unresized(model, 8 * size, 8 * size), _unresized(model, 10 * size, 6 * size)]
        inputs = model.prepare_messages("What?", shapes)
        for number, (row, column) in [(0, (0, 0)), (0, (2, 1)), (0, (1, 5)), (1, (3, 0)), (1, (1, 9))]:
            picture = shapes[number].copy()
            left, top = column * size, row * size
            ImageDraw.Draw(picture).rectangle((left, top, left + size - 1, top + size - 1), fill=(255, 0, 90))
            changed = model.prepare_messages("What?", [picture if n == number else shapes[n] for n in range(2)])
            rows, columns = inputs.images[number].patch_grids[0]
            assert _changed_rows(model, inputs, changed) == [(number, row * columns + column)]
        return
    inputs = model.prepared(model.prepare_messages("What?", pictures(family)))
    pixels = inputs.tensors["pixel_values"]
    if pixels.dim() == 3:  # patches by the processor, in raster order
        changed = pixels.clone()
        changed[1, 7] += 1
        assert _changed_rows(model, inputs, _with_pixels(inputs, changed)) == [(1, 7)]
        return
    real = places(model, inputs).valid
    views = pixels.reshape(-1, *pixels.shape[-3:])
    real_views = [n for n in range(len(views)) if (views[n] != 0).any()]
    assert len(real_views) == len(real)
    grids = [grid for image in inputs.images for grid in image.patch_grids]
    for view in {0, len(real_views) - 1}:
        rows, columns = grids[view]
        for row, column in [(0, 1), (rows - 2, columns - 1), (rows // 2, 0)]:
            changed = pixels.clone()
            part = changed.reshape(-1, *pixels.shape[-3:])[real_views[view]]
            part[:, row * size : (row + 1) * size, column * size : (column + 1) * size] += 0.5
            assert _changed_rows(model, inputs, _with_pixels(inputs, changed)) == [(view, row * columns + column)]


def _unresized(model: vs.HookedVLM, width: int, height: int) -> Image.Image:
    """A picture that the processor takes as it is."""
    for _ in range(4):
        picture = Image.effect_noise((width, height), 90).convert("RGB")
        rows, columns = model.prepare_messages("What?", picture).images[0].patch_grids[0]
        before, (width, height) = (width, height), (columns * model.info.patch_size, rows * model.info.patch_size)
        if before == (width, height):
            return picture
    raise AssertionError(f"{width} x {height} is still resized")


def _with_pixels(inputs: Any, pixels: torch.Tensor) -> Any:
    return replace(inputs, tensors={**inputs.tensors, "pixel_values": pixels})


def _changed_rows(model: vs.HookedVLM, before: vs.Inputs, after: vs.Inputs) -> list[tuple[int, int]]:
    found = []
    for inputs in (before, after):
        with model.run_with_cache("vision.hook_embed") as cache:
            model.forward(inputs, logits_to_keep=None)
        found.append(cache["vision.hook_embed"])
    return [tuple(each) for each in (found[0] != found[1]).any(-1).nonzero().tolist()]  # type: ignore[misc]


def test_window_order_is_transformers_own() -> None:
    for rows, columns, window in [(12, 8, 2), (10, 18, 2), (6, 22, 4), (16, 16, 0)]:
        grid = torch.tensor([[1, rows, columns]])
        down, across = get_vision_position_ids(grid, 2).unbind(1)
        raster = (down * columns + across).view(-1, 4)
        if window:
            raster = raster[get_vision_window_index(grid, 2, window * 2 * 14, 14)[0]]
        assert block_order((rows, columns), 2, window) == raster.flatten().tolist()


def test_patterns_stay_within_windows() -> None:
    model = zoo.load("qwen2_5_vl")
    tower = model.model.model.visual
    inputs = model.prepare_messages("What is there?", [zoo.wide(), zoo.tall()])
    with model.run_with_cache("vision.blocks.*.attn.hook_pattern") as cache:
        model.forward(inputs, logits_to_keep=None)
    side = tower.window_size // tower.patch_size
    assert any(layer not in tower.fullatt_block_indexes for layer in range(model.info.vision_layers))
    for image, layout in enumerate(inputs.images):
        rows, columns = layout.patch_grids[0]
        assert min(rows, columns) >= side
        down, across = torch.meshgrid(torch.arange(rows) // side, torch.arange(columns) // side, indexing="ij")
        window = (down * columns + across).flatten()
        inside = window[:, None] == window[None]
        for layer in range(model.info.vision_layers):
            pattern = cache[f"vision.blocks.{layer}.attn.hook_pattern"][image, :, : len(window), : len(window)]
            full = layer in tower.fullatt_block_indexes
            assert ((pattern > 0) == (torch.ones_like(inside) if full else inside)).all()


def test_what_enters_the_language_model(family: str) -> None:
    model = load(family)
    inputs = model.prepared(model.prepare_messages("What is there?", pictures(family)))
    with model.run_with_cache(["vision.hook_out", "lm.hook_embed"]) as cache:
        model.forward(inputs, logits_to_keep=None)
    out = cache["vision.hook_out"]
    features = _image_features(model, inputs.tensors)
    start = 0
    for number, layout in enumerate(inputs.images):
        columns = list(layout.positions)
        mine = out[number, : len(columns)]
        assert (out[number, len(columns) :] == 0).all()
        theirs = features[start : start + len(columns)]
        start += len(columns)
        if family == "molmo2":  # it adds them to the embedding of the image token
            theirs = theirs + model.model.get_input_embeddings()(inputs.input_ids[layout.row, columns])
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        assert torch.equal(cache["lm.hook_embed"][layout.row, columns], mine)
    assert start == len(features)


@torch.no_grad()
def _image_features(model: vs.HookedVLM, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What transformers' own `get_image_features` gives, image after image."""
    inner = getattr(model.model, "model", model.model)
    owner = inner if hasattr(inner, "get_image_features") else model.model
    names = inspect.signature(owner.get_image_features).parameters
    arguments = {name: value for name, value in tensors.items() if name in names}
    features = owner.get_image_features(**arguments)
    found = getattr(features, "pooler_output", features)
    found = features.last_hidden_state if found is None else found
    if model.info.family == "llama4":  # it projects them afterwards
        found = model.model.multi_modal_projector(found)
    parts = list(found) if not isinstance(found, torch.Tensor) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def test_black_features_are_black_features(family: str) -> None:
    """Zeroing `vision.hook_out` is zeroing the embedding at the image's positions."""
    zoo.require(family)
    model = load(family)
    inputs = model.prepare_messages("What is there?", pictures(family))
    plain = model.forward(inputs, logits_to_keep=1).logits
    with model.run_with_hooks([("vision.hook_out", vs.ZeroAblation())]):
        here = model.forward(inputs, logits_to_keep=1).logits
    with model.run_with_hooks([("lm.hook_embed", vs.ZeroAblation(positions="image"))]):
        there = model.forward(inputs, logits_to_keep=1).logits
    if family != "gemma4":  # which makes another input of each layer from the image features
        assert torch.equal(here, there)
    assert (here - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "hook", ["vision.hook_embed", "vision.blocks.0.hook_resid_post", "vision.blocks.1.hook_resid_mid"]
)
def test_a_patched_stream_gives_the_other_pictures_answer(family: str, hook: str) -> None:
    """Captured from one picture and put into a run on another: from there on the run is the other picture's."""
    if "resid_mid" in hook and family in {"qwen3_vl", "qwen3_vl_moe", "vipllava"}:
        pytest.skip("the language model reads earlier layers of the tower as well")
    zoo.require(family)
    model = load(family)
    one, two = [zoo.wide()], [zoo.wide().transpose(Image.Transpose.ROTATE_180)]
    inputs, other = (model.prepare_messages("What is there?", each) for each in (one, two))
    with model.run_with_cache(hook) as cache:
        theirs = model.forward(other, logits_to_keep=1).logits
    plain = model.forward(inputs, logits_to_keep=1).logits
    with model.run_with_hooks([(hook, vs.PatchActivation(cache[hook]))]):
        ours = model.forward(inputs, logits_to_keep=1).logits
    assert (theirs - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_interventions_work_in_raster_order() -> None:
    model = zoo.load("qwen2_5_vl")
    inputs = model.prepare_messages("What is there?", [zoo.wide(), zoo.tall()])
    hook = "vision.blocks.1.hook_resid_post"
    direction = torch.linspace(-1, 1, model.info.vision_hidden)

    def after(action: Any) -> torch.Tensor:
        with model.run_with_hooks([(hook, action)]), model.run_with_cache("vision.blocks.2.hook_resid_pre") as cache:
            model.forward(inputs, logits_to_keep=None)
        return cache["vision.blocks.2.hook_resid_pre"]

    with model.run_with_cache(hook) as cache:
        model.forward(inputs, logits_to_keep=None)
    before, valid = cache[hook], torch.from_numpy(places(model, inputs).valid)[..., None]
    value = before.clone()
    value[0, 17] += 1
    assert torch.equal(after(vs.PatchActivation(value)), value)
    assert (after(vs.ZeroAblation()) == 0).all()
    assert torch.equal(after(vs.ScaleActivation(2.0)), before * 2)
    assert torch.equal(after(vs.AddActivation(direction)), torch.where(valid, before + direction, 0))
    assert torch.equal(after(lambda x: x.flip(0).flip(0) * 3), before * 3)
    mean = (before * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    torch.testing.assert_close(after(vs.MeanAblation()), (mean * valid), rtol=0, atol=1e-5)
    along = after(vs.ProjectOut(direction)) @ direction
    assert along.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "mistral3", "idefics2", "internvl"])
def test_patterns_can_be_changed(name: str) -> None:
    model = load(name)
    inputs = model.prepare_messages("What is there?", pictures(name))
    attention = "vision.blocks.1.attn"
    with model.run_with_cache(f"{attention}.hook_pattern") as cache:
        plain = model.forward(inputs).logits
    own = (f"{attention}.hook_pattern", vs.PatchActivation(cache[f"{attention}.hook_pattern"]))
    with model.run_with_hooks([own]):
        assert torch.equal(model.forward(inputs).logits, plain)
    silent = (f"{attention}.hook_pattern", vs.ZeroAblation(heads=[2]))
    with model.run_with_hooks([silent]):
        one = model.forward(inputs).logits
    with model.run_with_hooks([(f"{attention}.hook_z", vs.ZeroAblation(heads=[2]))]):
        two = model.forward(inputs).logits
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert (one - plain).abs().max() > 1e-4
    with model.run_with_hooks([silent]), model.run_with_cache(f"{attention}.*", heads=[1, 2]) as cache:
        model.forward(inputs)
    assert (cache[f"{attention}.hook_pattern"][:, 1] == 0).all()
    assert (cache[f"{attention}.hook_z"][:, :, 1] == 0).all()
    assert (cache[f"{attention}.hook_z"][:, :, 0] != 0).any()
    doubled = (f"{attention}.hook_scores", vs.ScaleActivation(2.0))
    with model.run_with_hooks([doubled]), model.run_with_cache(f"{attention}.hook_pattern") as sharper:
        model.forward(inputs)
    assert sharper[f"{attention}.hook_pattern"].amax(-1).mean() > 1.05 * own[1].value.amax(-1).mean()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "idefics3"])
def test_generation_sees_the_picture_once(name: str) -> None:
    model = load(name)
    inputs = model.prepare_messages("What is there?", pictures(name))
    hooks = ["vision.hook_embed", "vision.blocks.1.hook_resid_post", "vision.hook_out"]
    with model.run_with_cache(hooks) as one:
        model.forward(inputs)
    with model.run_with_cache(hooks) as two:
        answer = model.generate(inputs, max_new_tokens=3)
    assert answer.sequences.shape[1] > inputs.input_ids.shape[1]
    assert all(torch.equal(one[hook], two[hook]) for hook in hooks)
    black = ("vision.hook_out", vs.ZeroAblation())
    with model.run_with_hooks([black]), model.run_with_cache(["vision.hook_out", "lm.hook_embed"]) as cache:
        model.generate(inputs, max_new_tokens=2)
    columns = list(inputs.images[0].positions)
    assert (cache["vision.hook_out"] == 0).all()
    assert (cache["lm.hook_embed"][0, columns] == 0).all()
    assert (cache["lm.hook_embed"][0, -1] != 0).any()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "qwen3_vl"])
def test_a_batch_is_its_rows(name: str) -> None:
    model = load(name)
    rows: list[list[Image.Image]] = [[zoo.wide()], [], [zoo.tall(), zoo.wide()]]
    hooks = ["vision.blocks.1.hook_resid_post", "vision.hook_out"]
    batch = model.prepare_messages_batch(["What?"] * 3, rows)
    with model.run_with_cache(hooks) as cache:
        model.forward_batch(batch)
    done = 0
    for row in rows:
        if not row:
            continue
        alone = model.prepare_messages("What?", row)
        with model.run_with_cache(hooks) as single:
            model.forward(alone)
        for hook in hooks:
            mine = single[hook]
            ours = cache[hook][done : done + len(row), : mine.shape[1]]
            torch.testing.assert_close(ours, mine, rtol=0, atol=1e-5)
        done += len(row)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "internvl"])
def test_gradients(name: str) -> None:
    model = load(name)
    inputs = model.prepare_messages("What is there?", pictures(name))
    stream, pattern = "vision.blocks.1.hook_resid_pre", "vision.blocks.1.attn.hook_pattern"
    hooks = [stream, f"{stream}_grad", f"{pattern}_grad", "vision.hook_out_grad", "lm.hook_embed_grad"]
    plain = model.forward(inputs).logits
    with model.run_with_cache(hooks, backward_from=5) as cache:
        assert torch.equal(model.forward(inputs).logits, plain)
    columns = list(inputs.images[0].positions)
    out = cache["vision.hook_out_grad"][0, : len(columns)]
    torch.testing.assert_close(out, cache["lm.hook_embed_grad"][0, columns])
    gradient = cache[f"{stream}_grad"]
    step = 1e-2 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    values = []
    for sign in (1, -1):
        with model.run_with_hooks([(stream, vs.AddActivation(step, scale=sign))]):
            values.append(float(model.forward(inputs, logits_to_keep=1).logits[0, -1, 5]))
    expected = float((gradient * step).sum())
    assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=0.05, abs=1e-4)
    assert cache[f"{pattern}_grad"].abs().max() > 0


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
def test_a_capture_of_the_tower_alone_ends_there(name: str) -> None:
    model = load(name)
    inputs = model.prepare_messages("What?", zoo.wide())
    reached = []
    handle = model.model.get_decoder().register_forward_pre_hook(lambda *_: reached.append(1))
    try:
        for keep, count in ((None, 0), (1, 1)):
            with model.run_with_cache("vision.blocks.2.hook_resid_post"):
                model.forward(inputs, logits_to_keep=keep)
            assert len(reached) == count
    finally:
        handle.remove()


def test_a_lens_sees_what_interventions_leave() -> None:
    model = zoo.load("qwen2_5_vl")
    inputs = model.prepare_messages("What?", zoo.wide())
    seen = []
    for edit in ([], [("vision.hook_out", vs.ZeroAblation())], [("lm.hook_embed", vs.ZeroAblation(positions="image"))]):
        with model.run_with_hooks(edit):
            seen.append(model.logit_lens(inputs, top_k=3).probs)
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_one_image_as_it_lies() -> None:
    model = zoo.load("qwen2_5_vl")
    inputs = model.prepare_messages("What is there?", [zoo.wide(), zoo.tall()])
    hooks = ["vision.blocks.1.hook_resid_post", "vision.blocks.1.attn.hook_pattern", "vision.hook_out", "lm.hook_embed"]
    with model.run_with_cache(hooks) as cache:
        model.forward(inputs)
    for number, layout in enumerate(inputs.images):
        rows, columns = layout.patch_grids[0]
        stream = cache.image(hooks[0], number)
        assert stream.shape == (rows, columns, model.info.vision_hidden)
        assert torch.equal(stream[2, 3], cache[hooks[0]][number, 2 * columns + 3])
        pattern = cache.image(hooks[1], number)
        assert pattern.shape == (model.info.vision_heads, rows, columns, rows, columns)
        assert torch.equal(pattern[1, 2, 3, 4, 5], cache[hooks[1]][number, 1, 2 * columns + 3, 4 * columns + 5])
        out = cache.image("vision.hook_out", number)
        assert torch.equal(out[1, 2], cache["lm.hook_embed"][0, layout.raster[layout.grid[1] + 2]])
    assert torch.equal(cache.to_numpy().to_torch().image(hooks[0], 1), cache.image(hooks[0], 1))
    for reduce, kept in (("mean_heads", hooks[1:2]), ("norm", hooks[:3])):
        with model.run_with_cache(kept, reduce=reduce) as reduced:
            model.forward(inputs)
        for hook in kept:
            part, axis = cache.image(hook, 1), 0 if reduce == "mean_heads" else -1
            if reduce == "norm" and hook == hooks[1]:
                part = part.flatten(-2)
            wanted = part.mean(axis) if reduce == "mean_heads" else part.norm(dim=axis)
            assert torch.allclose(reduced.image(hook, 1), wanted, atol=1e-6)
    with pytest.raises(InvalidInputError, match="no hook of the vision tower"):
        cache.image("lm.hook_embed")
    with pytest.raises(InvalidInputError, match="there is no image 2"):
        cache.image(hooks[0], 2)
    for view in ("x", 1, -1):
        with pytest.raises(InvalidInputError, match="views of known shape; there is no"):
            cache.image(hooks[0], 0, view)


def test_tiles_as_they_lie() -> None:
    model = load("llava_next")
    inputs = model.prepare_messages("What is there?", [zoo.wide(), zoo.tall()])
    with model.run_with_cache("vision.hook_embed") as cache:
        model.forward(inputs, logits_to_keep=None)
    views = [len(image.patch_grids) for image in inputs.images]
    assert min(views) > 1
    second = cache.image("vision.hook_embed", 1)
    rows, columns = inputs.images[1].patch_grids[0]
    assert second.shape == (views[1], rows, columns, model.info.vision_hidden)
    assert torch.equal(second[1, 2, 3], cache["vision.hook_embed"][views[0] + 1, 2 * columns + 3])
    assert torch.equal(cache.image("vision.hook_embed", 1, view=1), second[1])
    with pytest.raises(InvalidInputError, match=f"has {views[1]} views"):
        cache.image("vision.hook_embed", 1, view=views[1])


def test_requests_that_cannot_be() -> None:
    model = zoo.load("qwen2_5_vl")
    text, inputs = model.prepare_messages("Hello"), model.prepare_messages("What?", zoo.wide())
    with pytest.raises(InvalidInputError, match=r"vision\.hook_embed needs an image"):
        with model.run_with_cache(["vision.hook_embed", "lm.hook_embed"]):
            model.forward(text)
    with pytest.raises(InvalidInputError, match=r"vision\.hook_out needs an image"):
        with model.run_with_hooks([("vision.hook_out", vs.ZeroAblation())]):
            model.forward(text)
    with pytest.raises(InvalidInputError, match="positions"):
        with model.run_with_hooks([("vision.hook_out", vs.ZeroAblation(positions="image"))]):
            model.forward(inputs)
    with pytest.raises(InvalidInputError, match=r"none of the hooks has any: vision.hook_embed has \[views, patches"):
        with model.run_with_cache("vision.hook_embed", positions="last"):
            model.forward(inputs)
    with pytest.raises(InvalidInputError, match="head 4 is out of range"):
        with model.run_with_cache("vision.blocks.0.attn.hook_pattern", heads=[4]):
            model.forward(inputs)
    with pytest.raises(ShapeMismatchError, match="views, patches, vision_hidden"):
        with model.run_with_hooks([("vision.hook_embed", vs.PatchActivation(torch.zeros(3, 5)))]):
            model.forward(inputs)
    with model.run_with_cache(["vision.hook_embed", "lm.hook_embed"], positions="last") as cache:
        model.forward(inputs)
    assert cache["lm.hook_embed"].shape[1] == 1
    assert cache["vision.hook_embed"].shape[1] == 180


@pytest.mark.parametrize("name", WITHOUT)
def test_families_without_vision_hooks_say_so(name: str) -> None:
    model = load(name)
    assert not any(of_vision(spec.name) for spec in model.hooks())
    with pytest.raises(UnknownHookError, match=name):
        with model.run_with_cache("vision.hook_embed"):
            pass


def test_info(family: str) -> None:
    model = load(family)
    info, config = model.info, model.model.config.vision_config
    assert info.vision_layers == 3
    assert info.vision_heads == 4
    assert info.vision_hidden == 32
    size = config.patch_size
    assert info.patch_size == (size if isinstance(size, int) else size[0])
    specs = {spec.name: spec for spec in model.hooks()}
    assert specs["vision.blocks.{layer}.hook_resid_post"].shape == ("views", "patches", "vision_hidden")
    assert specs["vision.blocks.{layer}.hook_resid_post"].layers == (0, 1, 2)
    described = "class token" in specs["vision.hook_embed"].description
    assert described == (family in {"llava", "llava_next", "vipllava", "internvl", "llama4"})


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "gemma3", "mistral3", "glm4v"])
def test_merge_size_is_that_of_the_tokens(name: str) -> None:
    model = load(name)
    inputs = model.prepare_messages("What?", zoo.tall())
    layout = inputs.images[0]
    patches = sum(rows * columns for rows, columns in layout.patch_grids)
    tokens = sum(tile.grid[0] * tile.grid[1] for tile in layout.tiles)
    assert patches == tokens * model.info.merge_size**2


def test_remote_is_in_process(
    hooked: vs.HookedVLM, remote: vs.RemoteVLM, screenshot: Image.Image, photo: Image.Image
) -> None:
    hooks = ["vision.*", "vision.blocks.*.*", "vision.blocks.*.attn.*", "vision.blocks.*.mlp.*"]
    shapes = [screenshot.resize((168, 112)), photo.resize((112, 140))]
    black = ("vision.blocks.1.hook_resid_post", vs.ScaleActivation(0.5))
    caches = []
    for model in (hooked, remote):
        inputs = model.prepare_messages("Click on the red circle", shapes)
        with model.run_with_hooks([black]), model.run_with_cache(hooks) as cache:
            logits = model.forward(inputs).logits
        caches.append((cache, logits))
    (ours, one), (theirs, two) = caches
    assert torch.equal(one, two)
    assert ours.names == theirs.names
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.names)
    assert ours.context.images == theirs.context.images
    assert torch.equal(ours.image("vision.hook_embed", 1), theirs.image("vision.hook_embed", 1))
    with pytest.raises(InvalidInputError, match="needs an image"):
        with remote.run_with_cache("vision.hook_embed") as cache:
            remote.forward(remote.prepare_messages("Hello"))
        cache["vision.hook_embed"]


def test_saved_with_its_shapes(hooked: vs.HookedVLM, screenshot: Image.Image, tmp_path: Any) -> None:
    inputs = hooked.prepare_messages("What?", screenshot.resize((168, 112)))
    with hooked.run_with_cache("vision.hook_embed") as cache:
        hooked.forward(inputs, logits_to_keep=None)
    cache.save(tmp_path / "run.safetensors")
    again = vs.ActivationCache.load(tmp_path / "run.safetensors")
    assert torch.equal(again.image("vision.hook_embed"), cache.image("vision.hook_embed"))


def test_the_docs_list_every_vision_hook() -> None:
    table = (Path(__file__).parents[1] / "docs" / "hooks.md").read_text()
    for spec in zoo.load("qwen2_5_vl").hooks():
        if of_vision(spec.name):
            assert f"| `{spec.name}` | [{', '.join(spec.shape)}] | {spec.description} |" in table
