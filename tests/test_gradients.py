"""Gradients: `_grad` hooks against autograd on the plain model, against finite differences, and what they leave."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import vlm_spectra as vs
from transformers import AutoModelForImageTextToText
from vlm_spectra.errors import InvalidInputError
from vlm_spectra_server.spectra_tiny import DIRECTORY

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 5, 6, 2, 32, 1054
TARGET = (" red", " green")
PATTERN, HEAD_OUT = (f"lm.blocks.2.attn.hook_{name}" for name in ("pattern", "head_out"))


def everything(name: str) -> bool:
    return name.endswith("_grad")


@pytest.fixture(scope="module")
def plain():
    """The model as transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(DIRECTORY, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def run(hooked, inputs):
    """The output and every gradient of a difference of two logits."""
    with hooked.run_with_cache(everything, backward_from=TARGET) as cache:
        output = hooked.forward(inputs)
    return output, cache


def difference(model, output) -> torch.Tensor:
    red, green = (model.processor.tokenizer.encode(text)[0] for text in TARGET)
    return output.logits[:, -1, red] - output.logits[:, -1, green]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    return float((found - expected).abs().max() / expected.abs().max())


def test_gradients_are_those_of_autograd_on_the_plain_model(hooked, plain, inputs, run):
    """In the plain model, hooks put there by hand keep each activation; autograd's own gradients are compared."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name, heads=None):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            kept[name] = output
            output.retain_grad()

        return hook

    def leaf(module, args, kwargs):
        kept["lm.hook_embed"] = kwargs["inputs_embeds"].detach().requires_grad_(True)
        return args, kwargs | {"inputs_embeds": kept["lm.hook_embed"]}

    def entering(name):
        def hook(module, args):
            kept[name] = args[0]
            args[0].retain_grad()

        return hook

    text = plain.model.language_model
    handles = [text.register_forward_pre_hook(leaf, with_kwargs=True)]
    for layer, block in enumerate(text.layers):
        prefix = f"lm.blocks.{layer}"
        for name, module in (
            ("hook_resid_post", block),
            ("attn.hook_q", block.self_attn.q_proj),
            ("attn.hook_k", block.self_attn.k_proj),
            ("attn.hook_v", block.self_attn.v_proj),
            ("attn.hook_out", block.self_attn.o_proj),
            ("mlp.hook_pre", block.mlp.gate_proj),
            ("mlp.hook_out", block.mlp.down_proj),
            ("mlp.hook_in", block.post_attention_layernorm),
        ):
            handles.append(module.register_forward_hook(keep(f"{prefix}.{name}")))
        handles.append(block.mlp.down_proj.register_forward_pre_hook(entering(f"{prefix}.mlp.hook_post")))
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(entering(f"{prefix}.attn.hook_z")))
        handles.append(block.post_attention_layernorm.register_forward_pre_hook(entering(f"{prefix}.hook_resid_mid")))
    try:
        difference(hooked, plain(**inputs.tensors, use_cache=False)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        plain.zero_grad()
    # The straight way and the one through our own softmax round differently: 5e-6; without it: 1e-6.
    with hooked.run_with_cache([f"{name}_grad" for name in kept], backward_from=TARGET) as alone:
        hooked.forward(inputs)
    assert len(kept) == 1 + 11 * LAYERS
    for name, tensor in kept.items():
        expected = tensor.grad
        shape = alone[f"{name}_grad"].shape
        assert shape.numel() == expected.numel()
        assert relative(alone[f"{name}_grad"], expected.view(shape)) <= 1e-6, name
        assert relative(run[1][f"{name}_grad"], expected.view(shape)) <= 1e-5, name


def test_every_hook_has_a_gradient_in_the_shape_of_its_activation(hooked, inputs, run):
    with hooked.run_with_cache(lambda name: True) as cache:
        hooked.forward(inputs)
    assert run[1].names == [f"{name}_grad" for name in cache.names]
    for name in cache.names:
        gradient = run[1][f"{name}_grad"]
        assert gradient.shape == cache[name].shape, name
        assert gradient.dtype == cache[name].dtype, name
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name
        assert not gradient.requires_grad


def test_a_backward_pass_does_not_change_the_run(hooked, inputs):
    """Captures and logits beside a gradient of the patterns are those of a run without any."""
    names = ["lm.blocks.*.hook_resid_post", "lm.blocks.*.attn.hook_pattern"]
    with hooked.run_with_cache(names) as before:
        expected = hooked.forward(inputs)
    with hooked.run_with_cache([*names, *(f"{name}_grad" for name in names)], backward_from=TARGET) as cache:
        output = hooked.forward(inputs)
    assert torch.allclose(output.logits, expected.logits, rtol=0, atol=1e-5)
    for name in before.names:
        assert torch.allclose(cache[name], before[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("hook", [PATTERN, HEAD_OUT, "lm.blocks.2.attn.hook_z", "lm.blocks.3.ln2.hook_scale"])
def test_gradients_are_finite_differences(hooked, inputs, hook):
    """A small step along a random direction changes the target by step * <gradient, direction>."""
    model = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", dtype="float64")
    prepared = model.prepared(inputs)
    with model.run_with_cache([hook, f"{hook}_grad"], backward_from=TARGET) as cache:
        model.forward(prepared)
    direction = torch.randn(cache[hook].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def slope(step: float) -> torch.Tensor:
        values = []
        for scale in (step, -step):
            with model.run_with_hooks([(hook, vs.AddActivation(direction, scale))]):
                values.append(difference(model, model.forward(prepared, logits_to_keep=1)))
        return (values[0] - values[1]) / (2 * step)

    # The norms compute in float32, so steps cannot be tiny; Richardson's rule takes their square term away.
    step = 5e-2 * cache[hook].abs().mean().item()
    expected = (4 * slope(step / 2) - slope(step)) / 3
    found = (cache[f"{hook}_grad"].double() * direction).sum()
    assert expected.abs() > 1e-6
    assert abs(float(found / expected) - 1) <= 1e-3


def test_gradient_times_activation_is_the_attribution(hooked, inputs):
    names = ["lm.hook_embed", "lm.hook_embed_grad"]
    with hooked.run_with_cache(names, backward_from=" red", position=-2) as cache:
        hooked.forward(inputs, logits_to_keep=None)
    found = hooked.attribute(inputs, method="gradient_x_input", target=" red", position=-2)
    scores = (cache["lm.hook_embed"] * cache["lm.hook_embed_grad"]).sum(-1)
    assert relative(scores, found.scores) <= 1e-5


def test_the_target_by_default_is_each_row_s_own_next_token(hooked, screenshot, photo):
    tasks = ["Click on the red circle", "How many widgets are there on this screen?"]
    batch = hooked.prepare_messages_batch(tasks, [screenshot, photo])
    hooks = ["lm.blocks.3.hook_resid_pre_grad", "lm.blocks.3.attn.hook_pattern_grad", "lm.blocks.0.hook_resid_mid_grad"]
    with hooked.run_with_cache(hooks, backward_from=vs.Target()) as together:
        output = hooked.forward(batch, logits_to_keep=1)
    for row, (task, image) in enumerate(zip(tasks, [screenshot, photo], strict=True)):
        single = hooked.prepare_messages(task, image)
        with hooked.run_with_cache(hooks, backward_from=int(output.logits[row, -1].argmax())) as alone:
            hooked.forward(single)
        pad = batch.input_ids.shape[1] - single.input_ids.shape[1]
        assert relative(together[hooks[0]][row, pad:], alone[hooks[0]][0]) <= 1e-4
        assert relative(together[hooks[2]][row, pad:], alone[hooks[2]][0]) <= 1e-4
        assert relative(together[hooks[1]][row, :, pad:, pad:], alone[hooks[1]][0]) <= 1e-4
        assert not together[hooks[0]][row, :pad].any()


@pytest.mark.parametrize("positions", ["last", "image", [3, -1]])
def test_positions_heads_and_dtype_select_from_gradients(hooked, inputs, run, positions):
    names = ["attn.hook_pattern_grad", "attn.hook_q_grad", "attn.hook_head_out_grad", "hook_resid_post_grad"]
    names = [f"lm.blocks.{layer}.{name}" for layer in (1, 2, 3) for name in names]
    with hooked.run_with_cache(
        names, positions=positions, heads=[5, 2], dtype="float64", backward_from=TARGET
    ) as cache:
        hooked.forward(inputs)
    columns = torch.tensor(cache.context.positions[0])
    for name in cache.names:
        spec = hooked.catalogue.spec(name)
        expected = run[1][name].index_select(spec.position_axis, columns).double()
        if spec.head_axis is not None:
            expected = expected.index_select(spec.head_axis, torch.tensor([5, 2]))
        assert cache[name].dtype == torch.float64
        assert torch.allclose(cache[name], expected, rtol=1e-3, atol=1e-7), name


def test_interventions_are_part_of_what_is_differentiated(hooked, inputs):
    post, pre = "lm.blocks.2.hook_resid_post", "lm.blocks.2.hook_resid_pre_grad"
    with hooked.run_with_cache([f"{post}_grad", pre], backward_from=TARGET) as before:
        hooked.forward(inputs)
    with hooked.run_with_hooks([(post, vs.ZeroAblation(positions=[4, 5]))]):
        with hooked.run_with_cache([f"{post}_grad", pre, post], backward_from=TARGET) as cache:
            hooked.forward(inputs)
    assert not cache[post][:, 4:6].any()
    assert cache[f"{post}_grad"][:, 4:6].any()  # with respect to what the model goes on with
    assert before[pre][:, 5].any()
    assert not torch.allclose(cache[pre][:, 5], before[pre][:, 5])
    mask = ("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys=[6]))
    with hooked.run_with_hooks([mask]):
        with hooked.run_with_cache("lm.blocks.*.attn.hook_pattern_grad", backward_from=TARGET) as blocked:
            hooked.forward(inputs)
    with hooked.run_with_hooks([mask]):
        with hooked.run_with_cache("lm.blocks.*.attn.hook_scores_grad", backward_from=TARGET) as scores:
            hooked.forward(inputs)
    assert torch.isfinite(blocked.stack("lm.blocks.*.attn.hook_pattern_grad")).all()
    assert not scores.stack("lm.blocks.*.attn.hook_scores_grad")[:, 0, :, -1, 6].any()


def test_a_target_that_does_not_depend_on_an_activation_gives_zeros(hooked, inputs):
    with hooked.run_with_cache("lm.blocks.1.hook_resid_post_grad", backward_from=" red", position=5) as cache:
        hooked.forward(inputs)
    gradient = cache["lm.blocks.1.hook_resid_post_grad"]
    assert gradient[:, :6].any()
    assert not gradient[:, 6:].any()
    fixed = ("lm.blocks.3.hook_resid_post", vs.ZeroAblation())
    with hooked.run_with_hooks([fixed]):
        with hooked.run_with_cache("lm.blocks.*.hook_resid_mid_grad", backward_from=" red") as cut:
            hooked.forward(inputs)
    assert not cut["lm.blocks.1.hook_resid_mid_grad"].any()
    assert cut["lm.blocks.4.hook_resid_mid_grad"].any()


@pytest.mark.parametrize("kind", ["remote", "remote_numpy"])
def test_remote_is_in_process_bit_for_bit(hooked, request, kind, screenshot):
    model = request.getfixturevalue(kind)
    found = []
    for each in (hooked, model):
        prompt = each.prepare_messages("Click on the red circle", screenshot)
        with each.run_with_cache(
            ["lm.hook_embed", "lm.blocks.*.attn.*_grad", "lm.blocks.*.hook_resid_*_grad"],
            backward_from=TARGET,
            position=-2,
            dtype="float16",
        ) as cache:
            each.forward(prompt, logits_to_keep=1)
        found.append({name: np.asarray(cache[name]) for name in cache.names})
    assert list(found[0]) == list(found[1])
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in found[0])


def test_nothing_sticks(hooked, inputs, run):
    def clean() -> bool:
        parameters = list(hooked.model.parameters())
        hooks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in hooked.model.modules())
        return not hooks and not any(p.requires_grad or p.grad is not None for p in parameters)

    assert clean()
    output = hooked.forward(inputs)
    assert not output.logits.requires_grad
    with pytest.raises(ZeroDivisionError):
        with hooked.run_with_hooks([("lm.blocks.4.hook_resid_pre", lambda x: 1 / 0)]):
            with hooked.run_with_cache("lm.hook_embed_grad", backward_from=" red"):
                hooked.forward(inputs)
    assert clean()
    assert not torch.is_grad_enabled() or not hooked.forward(inputs).logits.requires_grad

    def graphs() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor and each.grad_fn is not None for each in gc.get_objects())

    before = graphs()
    with hooked.run_with_cache(everything, backward_from=" red"):
        kept = hooked.forward(inputs)
    assert not kept.logits.requires_grad
    assert graphs() <= before


def test_a_model_that_is_being_trained_stays_so(screenshot):
    model = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu")
    model.model.lm_head.requires_grad_(True)
    trained = [p for p in model.model.parameters() if p.requires_grad]
    assert trained
    prompt = model.prepare_messages("Click on the red circle", screenshot)
    with model.run_with_cache("lm.hook_embed_grad", backward_from=" red") as cache:
        model.forward(prompt)
    assert cache["lm.hook_embed_grad"].any()
    assert [p for p in model.model.parameters() if p.requires_grad] == trained
    assert all(p.grad is None for p in trained)


def test_the_graph_begins_at_the_first_activation_asked_for(hooked, inputs):
    """What is not needed is not kept: autograd saves far less for a late layer than for the embedding."""
    saved = []

    def bytes_of(hook: str) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            with hooked.run_with_cache(hook, backward_from=" red"):
                hooked.forward(inputs, logits_to_keep=None)
        return sum(saved)

    assert bytes_of(f"lm.blocks.{LAYERS - 1}.hook_resid_mid_grad") * 4 < bytes_of("lm.hook_embed_grad")
    hooked.forward(inputs)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        hooked.forward(inputs)
    assert not saved


@pytest.mark.parametrize("kind", ["hooked", "remote"])
def test_what_is_asked_wrongly_is_refused_in_one_sentence(request, kind, screenshot):
    model = request.getfixturevalue(kind)
    prompt = model.prepare_messages("Click on the red circle", screenshot)
    gradient = "lm.blocks.1.hook_resid_post_grad"
    for hooks, options, words in (
        (gradient, {}, "needs backward_from"),
        ("lm.hook_embed", {"backward_from": " red"}, "lm.hook_embed_grad would be one"),
        ("lm.hook_embed", {"position": 3}, "backward_from"),
        ("lm.blocks.77.hook_resid_post_grad", {"backward_from": " red"}, "layer 77"),
        ("lm.blocks.1.attn.hook_mask_grad", {"backward_from": " red"}, "hook_scores"),
        (gradient, {"backward_from": 1.5}, "a target is a token"),
        (gradient, {"backward_from": vs.Target(answer="Click")}, "assistant_prefill"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            with model.run_with_cache(hooks, **options):
                pass
    for target, words in (("no token at all", "tokens"), (VOCAB, "out of range")):
        with pytest.raises(InvalidInputError, match=words):
            with model.run_with_cache(gradient, backward_from=target):
                model.forward(prompt)
    with pytest.raises(InvalidInputError, match="goes with forward"):
        with model.run_with_cache(gradient, backward_from=" red"):
            model.generate(prompt, 3)
    with pytest.raises(InvalidInputError, match="out of range"):
        with model.run_with_cache(gradient, backward_from=" red", position=9999):
            model.forward(prompt)
    with pytest.raises(InvalidInputError, match="is a gradient and cannot be changed"):
        with model.run_with_hooks([(gradient, vs.ZeroAblation())]):
            pass


def test_eager_and_half_precision(inputs, run):
    eager = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", attn_implementation="eager")
    names = [PATTERN + "_grad", "lm.hook_embed_grad", HEAD_OUT + "_grad"]
    with eager.run_with_cache(names, backward_from=TARGET) as cache:
        eager.forward(eager.prepared(inputs))
    assert all(relative(cache[name], run[1][name]) <= 1e-3 for name in names)
    half = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", dtype="bfloat16")
    with half.run_with_cache(names, backward_from=TARGET) as rough:
        half.forward(half.prepared(inputs))
    assert all(rough[name].dtype == torch.bfloat16 for name in names)
    assert all(relative(rough[name].float(), run[1][name]) <= 0.3 for name in names)
