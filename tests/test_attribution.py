"""Attribution: every method's own invariant, the same numbers as `captum`, the same bits behind a server."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
import vlm_spectra as vs
import zoo
from PIL import Image, ImageDraw
from vlm_spectra import errors
from vlm_spectra.arrays import to_numpy
from vlm_spectra_server.analysis.gradients import gauss_legendre

FAMILIES = ("qwen3_vl", "llava", "gemma3", "idefics3", "internvl")
TASK = "Click on the red circle"


def screen(left: int, colour: str = "red") -> Image.Image:
    """A small screen, 16 image tokens of spectra-tiny: a disc on a dark page."""
    image = Image.new("RGB", (112, 112), (40, 70, 120))
    ImageDraw.Draw(image).ellipse((left, 40, left + 30, 70), fill=colour)
    return image


@pytest.fixture(scope="module")
def inputs(hooked):
    return hooked.prepare_messages(TASK, screen(20))


@pytest.fixture(scope="module")
def moved(hooked):
    return hooked.prepare_messages(TASK, screen(70))


def close(found, expected, tolerance):
    return float((found - expected).abs().max()) <= tolerance


def value_of(hooked, tensors, token):
    """The logit of a token at the last position, differentiable in the tensors."""
    return hooked.model(**tensors).logits[:, -1, token]


# The pixels.


def black_pixels(hooked, inputs):
    images = [Image.new("RGB", prompt.images[0].size) for prompt in inputs.prompts]
    return hooked.prepare_messages(TASK, images[0]).tensors["pixel_values"]


@pytest.mark.parametrize(("baseline", "steps"), [("black", 64), ("blurred", 32)])
def test_integrated_gradients_from_an_image_are_complete(hooked, baseline, steps):
    inputs = hooked.prepare_messages(TASK, screen(20), assistant_prefill="Thought: The")
    found = hooked.attribute(inputs, "integrated_gradients", " red", baseline=baseline, steps=steps)
    distance = found.target_value - found.baseline_value
    assert distance.abs() > 0.05
    assert found.residual.abs() <= 0.005 * distance.abs()
    assert close(found.scores.sum(1) + found.baseline_value, found.total, 1e-4)
    text = [i for i in range(inputs.input_ids.shape[1]) if i not in inputs.images[0].positions]
    assert not found.scores[0, text].any()


def test_a_row_without_an_image_is_integrated_from_its_mean_embedding(hooked, inputs):
    batch = hooked.prepare_messages_batch([TASK, "Say hello"], [screen(20), None])
    both = hooked.attribute(batch, "integrated_gradients", "click", baseline="black", steps=3)
    first = hooked.attribute(inputs, "integrated_gradients", "click", baseline="black", steps=3)
    second = hooked.attribute(hooked.prepare_messages("Say hello"), "integrated_gradients", "click", steps=3)
    assert first.scores.abs().max() > 1e-3
    assert second.scores.abs().max() > 1e-3
    assert close(both.scores[0, -first.scores.shape[1] :], first.scores[0], 1e-3)
    assert close(both.scores[1, -second.scores.shape[1] :], second.scores[0], 1e-3)


def test_integrated_gradients_are_captum_s(hooked, inputs):
    found = hooked.attribute(inputs, "integrated_gradients", baseline="black", steps=6)
    token, tensors = int(found.target_ids[0]), inputs.tensors

    def forward(pixels):
        return torch.cat([value_of(hooked, {**tensors, "pixel_values": each}, token) for each in pixels])

    theirs = captum.attr.IntegratedGradients(forward).attribute(
        tensors["pixel_values"][None],
        baselines=black_pixels(hooked, inputs)[None],
        n_steps=6,
        method="gausslegendre",
        internal_batch_size=1,
    )
    # Four patches are a token, in the tokens' order.
    expected = theirs[0].reshape(16, -1).sum(-1)
    assert expected.abs().max() > 1e-2
    assert close(found.scores[0, list(inputs.images[0].positions)], expected, 1e-4)


def test_occlusion_is_captum_s(hooked, inputs):
    found = hooked.attribute(inputs, "occlusion", baseline="black")
    token, tensors = int(found.target_ids[0]), inputs.tensors

    @torch.no_grad()
    def forward(pixels):
        return torch.cat([value_of(hooked, {**tensors, "pixel_values": each}, token) for each in pixels])

    pixels = tensors["pixel_values"][None]
    window = (4, pixels.shape[-1])
    theirs = captum.attr.Occlusion(forward).attribute(
        pixels, sliding_window_shapes=window, strides=window, baselines=black_pixels(hooked, inputs)[None]
    )
    expected = theirs[0].reshape(16, -1)[:, 0]
    assert expected.abs().max() > 1e-2
    assert close(found.scores[0, list(inputs.images[0].positions)], expected, 1e-4)
    assert np.isnan(float(found.residual[0]))


def test_windows_that_overlap_are_averaged(hooked, inputs):
    found = hooked.attribute(inputs, "occlusion", window=3, stride=1, baseline="black")
    # A grid of 4 x 4 tokens has four windows of 3 x 3; one of its corners lies in one of them, its middle in all.
    grid = found.image_grid(0)
    corners = grid[[0, 0, 3, 3], [0, 3, 0, 3]]
    assert corners.std() > 0
    assert close(grid[1:3, 1:3], corners.mean(), 1e-4)
    whole = hooked.attribute(inputs, "occlusion", window=4, baseline="black")
    black = hooked.prepare_messages(TASK, Image.new("RGB", (112, 112)))
    lost = whole.target_value[0] - hooked.forward(black, 1).logits[0, 0, whole.target_ids[0]]
    assert close(whole.image_grid(0), lost, 1e-4)


def test_rows_of_a_batch_are_occluded_each_on_its_own(hooked, inputs):
    batch = hooked.prepare_messages_batch([TASK, "Where is the disc on this screen?"], [screen(20), screen(70)])
    both = hooked.attribute(batch, "occlusion", "click", window=2)
    alone = hooked.attribute(inputs, "occlusion", "click", window=2)
    assert close(both.image_grid(0), alone.image_grid(0), 1e-4)
    other = hooked.attribute(
        hooked.prepare_messages("Where is the disc on this screen?", screen(70)), "occlusion", "click", window=2
    )
    assert close(both.image_grid(1), other.image_grid(0), 1e-4)


# Attention and its gradients.


@pytest.fixture(scope="module")
def traced(hooked, inputs):
    """All patterns with their gradients, and the towers' last maps."""
    names = ["*.blocks.*.attn.hook_pattern", "*.blocks.*.attn.hook_pattern_grad"]
    names += ["vision.blocks.*.hook_resid_post", "vision.blocks.*.hook_resid_post_grad"]
    with hooked.run_with_cache(names, backward_from=vs.Target()) as cache:
        hooked.forward(inputs, 1)
    return cache


def test_rollout_is_the_product_of_the_patterns(hooked, inputs, traced):
    found = hooked.attribute(inputs, "attention_rollout")
    rolled = torch.eye(inputs.input_ids.shape[1], dtype=torch.float64)
    for layer in range(hooked.info.layers):
        pattern = traced[f"lm.blocks.{layer}.attn.hook_pattern"][0].double().mean(0)
        rolled = (pattern + torch.eye(len(pattern))) / 2 @ rolled
    assert close(found.scores[0], rolled[-1], 1e-6)
    assert close(found.scores.sum(1), torch.ones(1), 1e-5)
    assert (found.scores >= 0).all()


def test_relevancy_is_chefer_s_rule(hooked, inputs, traced):
    found = hooked.attribute(inputs, "relevancy")

    def through(prefix, layers, size):
        r = torch.eye(size, dtype=torch.float64)
        for layer in range(layers):
            name = f"{prefix}.blocks.{layer}.attn.hook_pattern"
            relevance = (traced[name][0] * traced[f"{name}_grad"][0]).double().clamp_min(0).mean(0)
            r = r + relevance @ r
        return r

    own = through("lm", hooked.info.layers, inputs.input_ids.shape[1])[-1]
    image = list(inputs.images[0].positions)
    text = [i for i in range(len(own)) if i not in image]
    assert own[text].max() > 1e-3
    assert close(found.scores[0, text], own[text], 1e-5)
    # The tower only shares out what the language model gave an image, patch by patch: 2 x 2 patches are a token.
    assert close(found.scores[0, image].sum(), own[image].sum(), 1e-5)
    tower = through("vision", hooked.info.vision_layers, 64)
    tower = tower / tower.sum(1, keepdim=True)
    patches = own[image].view(4, 1, 4, 1).expand(4, 2, 4, 2).reshape(64) / 4 @ tower
    expected = patches.view(4, 2, 4, 2).sum((1, 3)).flatten()
    assert close(found.scores[0, image], expected, 1e-5)
    assert not close(found.scores[0, image], own[image], 1e-6)


def test_grad_cam_weights_the_tower_s_last_maps(hooked, inputs, traced):
    found = hooked.attribute(inputs, "grad_cam")
    last = f"vision.blocks.{hooked.info.vision_layers - 1}.hook_resid_post"
    weight = traced[f"{last}_grad"][0].double().mean(0)
    expected = (traced[last][0].double() @ weight).clamp_min(0).view(4, 2, 4, 2).sum((1, 3))
    assert expected.max() > 1e-4
    assert close(found.image_grid(0), expected, 1e-5)
    text = [i for i in range(inputs.input_ids.shape[1]) if i not in inputs.images[0].positions]
    assert not found.scores[0, text].any()


# Attribution patching.


@pytest.fixture(scope="module")
def frozen(hooked, inputs):
    """Interventions that make the model linear: patterns and scales held, no MLPs."""
    names = ["lm.blocks.*.attn.hook_pattern", "lm.blocks.*.ln1.hook_scale", "lm.ln_final.hook_scale"]
    with hooked.run_with_cache(names) as cache:
        hooked.forward(inputs, 1)
    held = [(name, vs.PatchActivation(cache[name])) for name in cache.names]
    return [*held, ("lm.blocks.*.hook_mlp_out", vs.ZeroAblation())]


def test_attribution_patching_is_exact_on_a_linear_model(hooked, inputs, moved, frozen):
    with hooked.run_with_hooks(frozen):
        found = hooked.attribute(inputs, "attribution_patching", against=moved)
        distance = found.target_value - found.baseline_value
        assert distance.abs() > 1e-2
        assert found.residual.abs() <= 1e-3 * distance.abs()
        assert close(found.layer_scores.sum(-1), distance[:, None], 1e-3)
        position, layer = int(found.layer_scores[0, 1].abs().argmax()), 1
        hook, head = f"lm.blocks.{layer}.hook_resid_post", 3
        z = f"lm.blocks.{layer}.attn.hook_z"
        with hooked.run_with_cache([hook, z]) as other:
            hooked.forward(moved, 1)
        for where, action, score in (
            (
                hook,
                vs.PatchActivation(other[hook][:, [position]], positions=position),
                found.layer_scores[0, layer, position],
            ),
            (z, vs.PatchHead(other[z][:, :, [head]], heads=[head]), found.heads(0)[layer, head]),
        ):
            with hooked.run_with_hooks([(where, action)]):
                patched = hooked.forward(inputs, 1).logits[0, 0, found.target_ids[0]]
            lost = found.target_value[0] - patched
            assert lost.abs() > 1e-4
            assert close(score, lost, 1e-3 * float(distance.abs()))


def test_attribution_patching_is_the_difference_times_the_gradient(hooked, inputs, moved):
    found = hooked.attribute(inputs, "attribution_patching", " red", against=moved)
    names = ["lm.hook_embed", "lm.blocks.*.hook_mlp_out", "lm.blocks.*.attn.hook_z"]
    with hooked.run_with_cache([*names, *(f"{name}_grad" for name in names)], backward_from=" red") as cache:
        output = hooked.forward(inputs, 1)
    with hooked.run_with_cache(names) as other:
        there = hooked.forward(moved, 1)

    def product(name):
        return (cache[name] - other[name]) * cache[f"{name}_grad"]

    assert close(found.scores, product("lm.hook_embed").sum(-1), 1e-5)
    assert close(found.mlp_scores[:, 2], product("lm.blocks.2.hook_mlp_out").sum((1, 2)), 1e-5)
    assert close(found.head_scores[:, 1], product("lm.blocks.1.attn.hook_z").sum((1, 3)), 1e-5)
    token = int(found.target_ids[0])
    assert close(found.target_value[0], output.logits[0, 0, token], 1e-4)
    assert close(found.baseline_value[0], there.logits[0, 0, token], 1e-4)
    # Text is the same in both prompts, and so has no share at the embedding.
    text = [i for i in range(inputs.input_ids.shape[1]) if i not in inputs.images[0].positions]
    assert not found.scores[0, text].any()
    assert found.scores.abs().max() > 1e-3


# Targets.


def test_the_log_probability_of_an_answer(hooked, inputs):
    answer = "Thought: The red circle."
    ids = hooked.processor.tokenizer.encode(answer)
    assert len(ids) > 3
    whole = hooked.prepare_messages(TASK, screen(20), assistant_prefill=answer)
    assert whole.input_ids[0, -len(ids) :].tolist() == ids
    logs = hooked.forward(whole, len(ids) + 1).logits[0, :-1].double().log_softmax(-1)
    expected = logs[range(len(ids)), ids].sum()
    for method, options in (("gradient_x_input", {}), ("occlusion", {"window": 4}), ("relevancy", {})):
        found = hooked.attribute(inputs, method, vs.Target(answer=answer), **options)
        assert close(found.target_value[0], expected, 1e-3), method
        assert found.target_tokens == [answer]
        assert found.target_ids.tolist() == [ids]
        assert found.scores.shape == inputs.input_ids.shape
        assert found.scores.abs().max() > 0
        assert len(found.tokens()) == inputs.input_ids.shape[1]


# The same everywhere.

CALLS = {
    "black": ("integrated_gradients", {"baseline": "black", "steps": 2}),
    "occlusion": ("occlusion", {"window": 2, "target": vs.Target(answer="Thought")}),
    "rollout": ("attention_rollout", {}),
    "relevancy": ("relevancy", {"target": (" red", " blue")}),
    "grad_cam": ("grad_cam", {}),
    "patching": ("attribution_patching", {}),
}


@pytest.mark.parametrize("kind", ["remote", "remote_numpy"])
def test_remote_is_in_process_bit_for_bit(kind, request, hooked):
    far = request.getfixturevalue(kind)
    for name, (method, options) in CALLS.items():
        found = []
        for model in (hooked, far):
            inputs = model.prepare_messages(TASK, screen(20))
            extra = {"against": model.prepare_messages(TASK, screen(70))} if name == "patching" else {}
            found.append(model.attribute(inputs, method, **options, **extra))
        ours, theirs = found
        for field in ("scores", "total", "target_value", "target_ids", "head_scores", "layer_scores", "baseline_value"):
            one, two = getattr(ours, field), getattr(theirs, field)
            assert (one is None) == (two is None), (name, field)
            if one is not None:
                assert to_numpy(one).tobytes() == to_numpy(two).tobytes(), (name, field)
        assert ours.target_tokens == theirs.target_tokens


# Other families.


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_logit_attribution_adds_up_in_every_family(family):
    model = zoo.load(family)
    inputs = model.prepare_messages("What is on this screen?", zoo.wide())
    found = model.attribute(inputs, "direct_logit")
    assert found.target_value.abs() > 1e-3
    assert torch.allclose(found.total, found.target_value, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.source_scores.sum(-1), found.head_scores, rtol=1e-4, atol=1e-4)
    assert found.head_scores.abs().max() > 0
    logit = model.forward(inputs, 1).logits[0, 0, found.target_ids[0]]
    if model.reading.softcap is None:
        assert torch.allclose(found.target_value[0], logit, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_methods_in_every_family(family):
    model = zoo.load(family)
    inputs = model.prepare_messages("What is on this screen?", zoo.wide())
    found = model.attribute(inputs, "integrated_gradients")
    assert found.residual.abs() <= 0.005 * (found.target_value - found.baseline_value).abs()
    for method, options in (
        ("relevancy", {}),
        ("grad_cam", {}),
        ("occlusion", {"window": 2}),
        ("integrated_gradients", {"baseline": "black", "steps": 1}),
    ):
        found = model.attribute(inputs, method, **options)
        assert torch.isfinite(found.scores).all(), method
        assert found.scores[0, list(inputs.images[0].positions)].abs().max() > 0, method
    rolled = model.attribute(inputs, "attention_rollout")
    assert close(rolled.scores.sum(1), torch.ones(1), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_patching_is_the_first_order_in_every_family(family):
    """Against a picture that is nearly the same: what it leaves out is of second order."""
    model, picture = zoo.load(family), np.asarray(zoo.wide().convert("RGB")).astype(np.int16)
    here, left_out = model.prepare_messages("What is on this screen?", zoo.wide()), []
    for step in (1, 2):
        near, half = picture.copy(), picture.shape[0] // 2
        near[:half] += np.where(near[:half] < 128, step, -step).astype(np.int16)
        there = model.prepare_messages("What is on this screen?", Image.fromarray(near.astype(np.uint8)))
        found = model.attribute(here, "attribution_patching", against=there)
        logit = model.forward(there, 1).logits[0, 0, found.target_ids[0]]
        assert torch.allclose(found.baseline_value[0], logit, rtol=1e-4, atol=1e-5)
        left_out.append((float(found.residual.abs()), float((found.target_value - found.baseline_value).abs())))
    (small, distance), (large, _) = left_out
    assert distance > 1e-3
    assert small <= 0.15 * distance
    assert small <= 0.45 * large
    assert not model.attribute(here, "attribution_patching", against=here).scores.any()


# What is not possible.


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"method": "direct_logit", "target": vs.Target(answer="Thought: yes")}, "not linear|is not: explain"),
        ({"method": "direct_logit", "window": 2}, "occlusion"),
        ({"method": "occlusion", "window": 0}, "1 to 256"),
        ({"method": "occlusion", "window": 2, "stride": 3}, "1 to 2"),
        ({"method": "relevancy", "steps": 3}, "integrated_gradients"),
        ({"method": "attribution_patching"}, "against"),
        ({"method": "relevancy", "against": True}, "against"),
    ],
    ids=str,
)
def test_what_is_not_possible(hooked, inputs, options, part):
    options = {**options, "against": inputs} if "against" in options else options
    with pytest.raises(errors.InvalidInputError, match=part):
        hooked.attribute(inputs, **options)


def test_methods_of_images_need_one(hooked):
    text = hooked.prepare_messages("Say hello")
    for method in ("occlusion", "grad_cam"):
        with pytest.raises(errors.InvalidInputError, match="none"):
            hooked.attribute(text, method)
    assert hooked.attribute(text, "relevancy").scores.abs().max() > 0
    with pytest.raises(errors.InvalidInputError, match="tokens"):
        hooked.attribute(text, "attribution_patching", against=hooked.prepare_messages("Say hello to everybody there"))
    with pytest.raises(errors.InvalidInputError, match="answer"):
        vs.Target(" red", answer="red")


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 100])
def test_the_nodes_of_an_integration(steps):
    for ours, known in zip(gauss_legendre(steps), np.polynomial.legendre.leggauss(steps), strict=True):
        np.testing.assert_allclose(ours, known, rtol=0, atol=1e-14)
