"""What the numbers must be, against plain Hugging Face transformers and against independent computations."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import vlm_spectra as vs
from PIL import Image
from transformers import AutoModelForImageTextToText
from vlm_spectra_server.spectra_tiny import DIRECTORY

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 5, 6, 2, 32, 192, 384, 1054
RESID_POST, PATTERN, SCORES = (
    f"lm.blocks.*.{name}" for name in ("hook_resid_post", "attn.hook_pattern", "attn.hook_scores")
)


def everything(name: str) -> bool:
    return True


def language(name: str) -> bool:
    return name.startswith("lm.")


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    assert a.shape == b.shape
    return bool((a.double() - b.double()).abs().max() <= tolerance)


@pytest.fixture(scope="module")
def plain():
    """The model as transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(DIRECTORY, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def eager(inputs):
    """Its output with every attention map, and what entered each of its softmaxes."""
    model = AutoModelForImageTextToText.from_pretrained(DIRECTORY, attn_implementation="eager").eval()
    softmax, scores = torch.nn.functional.softmax, []

    def spy(x, *args, **kwargs):
        scores.append(x)
        return softmax(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", spy)
        output = model(**inputs.tensors, output_attentions=True, output_hidden_states=True, use_cache=False)
    return output, [x for x in scores if x.shape == output.attentions[0].shape]


@pytest.fixture(scope="module")
def run(hooked, inputs):
    """One forward pass with everything captured, with autograd on around it."""
    with torch.enable_grad(), hooked.run_with_cache(everything) as cache:
        output = hooked.forward(inputs, output_hidden_states=True, output_attentions=True)
    return output, cache


@pytest.fixture(scope="module")
def tasks(screenshot):
    """Three prompts of different lengths: one image, none, two images."""
    other = screenshot.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((0, 0, 300, 400))
    return ["Click on the red circle", "What is a button?", "Compare the two screens"], [
        screenshot,
        None,
        [screenshot, other],
    ]


@pytest.mark.parametrize(
    "selection", [{}, {"positions": "last"}, {"heads": [4, 1]}, {"positions": [3, -2], "heads": [2]}]
)
def test_scores_and_patterns_of_one_call_are_those_of_two_whatever_else_it_captures(hooked, inputs, selection):
    with hooked.run_with_cache([SCORES, PATTERN], **selection) as both:
        output = hooked.forward(inputs, output_attentions=True)
    for hook in (SCORES, PATTERN):
        with hooked.run_with_cache(hook, **selection) as alone:
            hooked.forward(inputs)
        for name, expected in alone.items():
            torch.testing.assert_close(both[name], expected, rtol=0, atol=1e-6)
    with hooked.run_with_cache(PATTERN) as whole:
        hooked.forward(inputs)
    for layer, attentions in enumerate(output.attentions):
        torch.testing.assert_close(attentions, whole[PATTERN.replace("*", str(layer))], rtol=0, atol=1e-6)


def test_logits_with_every_capture_on_are_bit_identical_to_plain_transformers(plain, inputs, run):
    with torch.no_grad():
        expected = plain(**inputs.tensors)
    assert torch.equal(run[0].logits, expected.logits)


def test_a_batch_is_bit_identical_to_plain_transformers(plain, hooked, tasks):
    batch = hooked.prepare_messages_batch(*tasks)
    with hooked.run_with_cache(everything):
        output = hooked.forward(batch)
    with torch.no_grad():
        assert torch.equal(output.logits, plain(**batch.tensors).logits)


def test_greedy_generation_is_that_of_plain_transformers(plain, hooked, inputs):
    with hooked.run_with_cache(everything):
        ours = hooked.generate(inputs, max_new_tokens=24)
    assert torch.equal(ours.sequences, plain.generate(**inputs.tensors, max_new_tokens=24, do_sample=False))


# Under SDPA the queries of later layers differ from eager ones by SDPA's rounding; eager ones are the very same.
@pytest.mark.parametrize(("attention", "tolerance"), [("eager", 1e-6), ("sdpa", 5e-6)])
def test_patterns_and_scores_are_those_of_eager_attention(eager, inputs, attention, tolerance):
    model = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", attn_implementation=attention)
    with model.run_with_cache([PATTERN, SCORES]) as cache:
        output = model.forward(inputs, output_attentions=True)
    assert len(eager[1]) == LAYERS
    for layer, (pattern, entering) in enumerate(zip(eager[0].attentions, eager[1], strict=True)):
        assert close(cache.stack(PATTERN)[layer], pattern, tolerance)
        assert close(output.attentions[layer], pattern, tolerance)
        scores = cache.stack(SCORES)[layer]
        masked = entering <= torch.finfo(torch.float32).min / 2
        assert torch.equal(scores == -torch.inf, masked)
        error = (scores - entering)[~masked].abs() / entering[~masked].abs().clamp_min(1)
        assert error.max() <= 4 * tolerance


def test_patterns_are_the_softmax_of_the_queries_and_keys(run):
    for layer in range(LAYERS):
        attn = f"lm.blocks.{layer}.attn"
        q, k = (run[1][f"{attn}.hook_rot_{name}"].double() for name in "qk")
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(HEADS // KV_HEADS, 2)) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
        assert close(run[1][f"{attn}.hook_pattern"], scores.softmax(-1), 1e-6)


def test_every_row_of_a_pattern_sums_to_one(run):
    assert close(run[1].stack(PATTERN).sum(-1), torch.ones(LAYERS, 1, HEADS, run[0].logits.shape[1]), 1e-6)


def test_the_residual_stream_adds_up(run):
    cache = run[1]
    for layer in range(LAYERS):
        block = cache[f"lm.blocks.{layer}.*"], cache[f"lm.blocks.{layer}.*.*"]
        part = {name.split(".", 3)[3]: block[0][name] for name in block[0].names}
        assert close(part["hook_resid_pre"] + part["hook_attn_out"], part["hook_resid_mid"], 1e-5)
        assert close(part["hook_resid_mid"] + part["hook_mlp_out"], part["hook_resid_post"], 1e-5)
        after = f"lm.blocks.{layer + 1}.hook_resid_pre"
        assert layer == LAYERS - 1 or torch.equal(part["hook_resid_post"], cache[after])
    assert torch.equal(cache["lm.hook_embed"], cache["lm.blocks.0.hook_resid_pre"])


def test_heads_sum_to_the_attention_output(run):
    for layer in range(LAYERS):
        attn = f"lm.blocks.{layer}.attn"
        assert close(run[1][f"{attn}.hook_head_out"].sum(2), run[1][f"{attn}.hook_out"], 1e-5)


def test_the_pattern_mixes_the_values_into_z(run):
    for layer in range(LAYERS):
        attn = f"lm.blocks.{layer}.attn"
        values = run[1][f"{attn}.hook_v"].repeat_interleave(HEADS // KV_HEADS, 2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", run[1][f"{attn}.hook_pattern"], values)
        assert close(mixed, run[1][f"{attn}.hook_z"], 1e-5)


def test_q_k_and_v_are_the_projections(plain, run):
    for layer, block in enumerate(plain.model.language_model.layers):
        attn = f"lm.blocks.{layer}.attn"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            expected = getattr(block.self_attn, f"{name}_proj")(run[1][f"{attn}.hook_in"])
            assert torch.equal(run[1][f"{attn}.hook_{name}"], expected.unflatten(-1, (heads, HEAD_DIM)))


def test_scales_and_neurons_are_those_of_their_modules(plain, run):
    for layer, block in enumerate(plain.model.language_model.layers):
        at = {name: run[1][f"lm.blocks.{layer}.{name}"] for name in ("mlp.hook_in", "mlp.hook_post", "hook_resid_mid")}
        pre, linear = (run[1][f"lm.blocks.{layer}.mlp.hook_{name}"] for name in ("pre", "pre_linear"))
        assert torch.equal(pre, block.mlp.gate_proj(at["mlp.hook_in"]))
        assert torch.equal(linear, block.mlp.up_proj(at["mlp.hook_in"]))
        assert torch.equal(at["mlp.hook_post"], torch.nn.functional.silu(pre) * linear)
        normed = at["hook_resid_mid"] / run[1][f"lm.blocks.{layer}.ln2.hook_scale"]
        assert close(normed * block.post_attention_layernorm.weight, at["mlp.hook_in"], 1e-5)


def test_every_capture_has_the_catalogue_s_shape_and_dtype_and_no_gradient(hooked, inputs, run):
    seq = inputs.input_ids.shape[1]
    sizes = {"batch": 1, "seq": seq, "query": seq, "key": seq, "heads": HEADS, "kv_heads": KV_HEADS, "1": 1}
    sizes |= {"head_dim": HEAD_DIM, "hidden": HIDDEN, "mlp": MLP}
    expected = {name: spec for spec in hooked.hooks() if not spec.intervene_only for name in spec.names()}
    assert set(run[1].names) == set(expected)
    for name in filter(language, expected):
        tensor = run[1][name]
        assert tuple(tensor.shape) == tuple(sizes[axis] for axis in expected[name].shape), name
        assert str(tensor.dtype) == f"torch.{expected[name].dtype}", name
        assert not tensor.requires_grad, name


def test_hidden_states_are_those_of_transformers(plain, inputs, run):
    with torch.no_grad():
        expected = plain(**inputs.tensors, output_hidden_states=True).hidden_states
    assert len(run[0].hidden_states) == len(expected) == LAYERS + 1
    assert all(map(torch.equal, run[0].hidden_states, expected))


def test_kept_logits_are_slices_of_all(hooked, inputs, run):
    for keep, part in ((1, slice(-1, None)), (3, slice(-3, None)), ([5, 2, -1], [5, 2, -1])):
        assert close(hooked.forward(inputs, logits_to_keep=keep).logits, run[0].logits[:, part], 1e-4)


def test_a_forward_without_logits_ends_at_the_last_capture(hooked, inputs):
    reached = []
    with (
        hooked.run_with_hooks([("lm.blocks.*.hook_resid_pre", reached.append)]),
        hooked.run_with_cache("lm.blocks.1.mlp.hook_pre") as cache,
    ):
        hooked.forward(inputs, logits_to_keep=None)
    assert cache.names == ["lm.blocks.1.mlp.hook_pre"]
    assert len(reached) == 2


def test_a_padded_batch_equals_its_rows_alone(hooked, tasks):
    hooks = [RESID_POST, PATTERN, "lm.blocks.*.attn.hook_scores"]
    batch = hooked.prepare_messages_batch(*tasks)
    with hooked.run_with_cache(hooks) as together:
        output = hooked.forward(batch)
    lengths = batch.attention_mask.sum(1).tolist()
    assert len(set(lengths)) == 3
    for row, (task, images) in enumerate(zip(*tasks, strict=True)):
        with hooked.run_with_cache(hooks) as alone:
            single = hooked.forward(hooked.prepare_messages(task, images))
        pad = batch.input_ids.shape[1] - lengths[row]
        assert close(output.logits[row, pad:], single.logits[0], 1e-4)
        assert close(together.stack(RESID_POST)[:, row, pad:], alone.stack(RESID_POST)[:, 0], 1e-4)
        assert close(together.stack(PATTERN)[:, row, :, pad:, pad:], alone.stack(PATTERN)[:, 0], 1e-4)
        assert not together.stack(PATTERN)[:, row, :, pad:, :pad].any()
        padding = together.stack("lm.blocks.*.attn.hook_scores")[:, row, :, pad:, :pad]
        assert (padding == -torch.inf).all()


def test_a_padded_batch_generates_what_its_rows_generate(hooked, tasks):
    together = hooked.generate_batch(hooked.prepare_messages_batch(*tasks), 12)
    alone = [hooked.generate(hooked.prepare_messages(*row), 12).text[0] for row in zip(*tasks, strict=True)]
    assert together.text == alone


def test_image_tokens_are_counted_image_by_image(hooked, tasks):
    batch = hooked.prepare_messages_batch(*tasks)
    assert [image.row for image in batch.images] == [0, 2, 2]
    for image in batch.images:
        assert len(image.positions) == image.grid[0] * image.grid[1]
        assert (batch.input_ids[image.row, list(image.positions)] == hooked.info.image_token_id).all()
    first, second = batch.images[1:]
    assert first.positions[-1] + 1 < second.positions[0]
    columns = (batch.input_ids[2] == hooked.info.image_token_id).nonzero().flatten().tolist()
    assert list(first.positions + second.positions) == columns


POSITIONS = [
    "last",
    "image",
    "text",
    7,
    [3, -1, 0],
    slice(2, 9),
    slice(-5, None, 2),
    ["last", slice(0, 2)],
]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_selected_positions_are_slices_of_the_whole(hooked, inputs, run, positions):
    seq, image = inputs.input_ids.shape[1], list(inputs.images[0].positions)
    named = {"last": [seq - 1], "image": image, "text": [i for i in range(seq) if i not in image]}
    columns: list[int] = []
    for item in positions if isinstance(positions, list) else [positions]:
        found = named[item] if isinstance(item, str) else np.arange(seq)[item]
        columns += np.atleast_1d(found).tolist()
    with hooked.run_with_cache(language, positions=positions) as cache:
        hooked.forward(inputs)
    assert cache.context.positions == [columns]
    for name, tensor in cache.items():
        axis = hooked.catalogue.spec(name).position_axis
        expected = run[1][name].index_select(axis, torch.tensor(columns))
        same = torch.isclose(tensor, expected, rtol=1e-6, atol=1e-6)
        assert same.all(), name


def test_selected_heads_are_slices_of_the_whole(hooked, inputs, run):
    hooks = ["q", "rot_q", "scores", "pattern", "z", "head_out"]
    hooks = [f"lm.blocks.*.attn.hook_{name}" for name in hooks]
    with hooked.run_with_cache([*hooks, RESID_POST], heads=[4, 1], positions="last") as cache:
        hooked.forward(inputs)
    for name, tensor in cache.items():
        spec = hooked.catalogue.spec(name)
        expected = run[1][name].narrow(spec.position_axis, -1 % inputs.input_ids.shape[1], 1)
        if spec.head_axis is not None:
            expected = expected.index_select(spec.head_axis, torch.tensor([4, 1]))
        assert torch.isclose(tensor, expected, rtol=1e-6, atol=1e-6).all(), name


def test_selected_key_value_heads_are_slices_of_the_whole(hooked, inputs, run):
    with hooked.run_with_cache(["lm.blocks.*.attn.hook_[kv]", "lm.blocks.*.attn.hook_rot_k"], heads=[1]) as cache:
        hooked.forward(inputs)
    assert len(cache) == 3 * LAYERS
    assert all(torch.equal(tensor, run[1][name][:, :, 1:]) for name, tensor in cache.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_cast_is_the_cast_of_the_whole(hooked, inputs, run, dtype):
    with hooked.run_with_cache(everything, dtype=dtype) as cache:
        hooked.forward(inputs)
    assert all(torch.equal(tensor, run[1][name].to(getattr(torch, dtype))) for name, tensor in cache.items())


def test_unembedding_directions_give_the_logits(hooked, run):
    directions = hooked.unembed([" red", 7, 1000])
    assert directions.shape == (3, HIDDEN)
    ids = [hooked.processor.tokenizer.encode(" red")[0], 7, 1000]
    logits = run[1]["lm.ln_final.hook_normalized"] @ directions.T
    assert close(logits, run[0].logits[..., ids], 1e-4)


def test_the_top_tokens_are_those_of_the_softmax(hooked, inputs, run):
    probs = run[0].logits.double().softmax(-1)
    values, ids = probs.topk(3)
    top = run[0].top_tokens(3)
    assert [[token.id for token in row] for row in top[0]] == ids[0].tolist()
    assert np.allclose([[token.prob for token in row] for row in top[0]], values[0], atol=1e-6)


# The logit lens.


@pytest.fixture(scope="module")
def lens(hooked, inputs):
    return hooked.logit_lens(inputs, top_k=7, targets=[" red", 7])


@pytest.fixture(scope="module")
def lens_logits(plain, run):
    """[layers, 1, seq, vocab], read layer by layer through the plain model's norm and head."""
    with torch.no_grad():
        return torch.stack([plain.lm_head(plain.model.language_model.norm(x)) for x in run[1].stack(RESID_POST)])


def test_the_last_layer_of_the_lens_is_the_model(hooked, inputs, run):
    whole = hooked.logit_lens(inputs, top_k=VOCAB)
    logits = torch.empty(1, inputs.input_ids.shape[1], VOCAB).scatter(-1, whole.token_ids[-1], whole.logits[-1])
    assert close(logits, run[0].logits, 1e-5)
    assert close(whole.probs.sum(-1), torch.ones_like(whole.entropy), 1e-5)


def test_the_lens_reads_every_layer_s_top_tokens(lens, lens_logits):
    values, ids = lens_logits.topk(7)
    assert close(lens.logits, values, 1e-4)
    assert (lens.token_ids == ids).float().mean() > 0.999  # ties aside
    assert close(lens.probs, lens_logits.double().softmax(-1).gather(-1, lens.token_ids), 1e-5)


def test_the_ranks_of_the_lens_count_the_tokens_above(lens, lens_logits, inputs):
    targets = lens.target_ids.expand(LAYERS, -1, -1, -1)
    assert lens.target_tokens[0][0] == [" red", lens.target_tokens[0][0][1]]
    found = lens_logits.gather(-1, targets)
    assert close(lens.target_logits, found, 1e-4)
    brute = (lens_logits[..., None, :] > found[..., None]).sum(-1)
    assert (lens.ranks - brute).abs().max() <= 1
    assert (lens.ranks == brute).float().mean() > 0.99


def test_entropy_and_divergence_of_the_lens(lens, lens_logits):
    logs = lens_logits.double().log_softmax(-1)
    assert close(lens.entropy, -(logs.exp() * logs).sum(-1), 1e-4)
    assert close(lens.kl_to_final, (logs[-1].exp() * (logs[-1] - logs)).sum(-1), 1e-4)
    assert (lens.kl_to_final >= 0).all()
    assert lens.kl_to_final[-1].max() == 0
    assert lens.kl_to_final[0].max() > 0.1


def test_the_lens_follows_the_model_s_own_answer_by_default(hooked, inputs, run):
    lens = hooked.logit_lens(inputs, layers=[-1], positions=["last", 3])
    assert lens.layers == [LAYERS - 1]
    assert lens.target_ids[0, :, 0].tolist() == run[0].logits[0, [-1, 3]].argmax(-1).tolist()
    assert lens.ranks.max() == 0


# Attribution.


def test_direct_logit_attribution_adds_up(hooked, tasks, run):
    batch = hooked.prepare_messages_batch(*tasks)
    found = hooked.attribute(batch, "direct_logit")
    assert torch.allclose(found.target_value, hooked.forward(batch, 1).logits[:, 0].amax(-1), rtol=1e-4)
    parts = found.embed_score + found.head_scores.sum((1, 2)) + found.mlp_scores.sum(1) + found.bias
    assert torch.allclose(parts, found.target_value, rtol=1e-4)
    assert torch.allclose(found.total, found.target_value, rtol=1e-4)
    assert close(found.source_scores.sum(-1), found.head_scores, 1e-4)
    assert not found.scores[batch.attention_mask == 0].any()


def test_direct_logit_attribution_of_a_difference_at_a_position(hooked, inputs, run):
    output, cache = run
    found = hooked.attribute(inputs, "direct_logit", (" red", " green"), position=-3)
    direction = hooked.unembed(" red") - hooked.unembed(" green")
    scaled = (direction[0] / cache["lm.ln_final.hook_scale"][0, -3]).double()
    heads = cache.stack("lm.blocks.*.attn.hook_head_out")[:, 0, -3].double() @ scaled
    assert close(found.head_scores[0], heads, 1e-4)
    assert close(found.mlp_scores[0], cache.stack("lm.blocks.*.hook_mlp_out")[:, 0, -3].double() @ scaled, 1e-4)
    red, green = (hooked.processor.tokenizer.encode(text)[0] for text in (" red", " green"))
    assert close(found.target_value[0], output.logits[0, -3, red] - output.logits[0, -3, green], 1e-4)
    assert close(found.total, found.target_value, 1e-3)


def test_integrated_gradients_are_complete(hooked, inputs):
    found = hooked.attribute(inputs, "integrated_gradients")
    distance = found.target_value - found.baseline_value
    assert distance.abs() > 0.1
    assert found.residual.abs() <= 0.005 * distance.abs()
    assert close(found.scores.sum(1) + found.baseline_value, found.total, 1e-4)
    text = [i for i in range(inputs.input_ids.shape[1]) if i not in inputs.images[0].positions]
    assert not found.scores[0, text].any()


def test_the_black_baseline_is_the_black_image(hooked, inputs, screenshot):
    found = hooked.attribute(inputs, "integrated_gradients", baseline="black", steps=1)
    black = hooked.prepare_messages("Click on the red circle", Image.new("RGB", screenshot.size))
    logits = hooked.forward(black, 1).logits[0, 0]
    assert close(found.baseline_value[0], logits[found.target_ids[0]], 1e-4)


def test_gradient_times_input_is_that_of_plain_autograd(plain, hooked, inputs):
    found = hooked.attribute(inputs, "gradient_x_input", " red")
    leaves = []

    def enter(module, args, kwargs):
        leaves.append(args[0].detach().requires_grad_(True))
        return (leaves[0], *args[1:]), kwargs

    handle = plain.model.language_model.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        plain(**inputs.tensors).logits[0, -1, found.target_ids[0]].backward()
    finally:
        handle.remove()
        plain.zero_grad()
    expected = (leaves[0].grad * leaves[0].detach()).sum(-1)
    assert expected.abs().max() > 1e-2
    assert close(found.scores, expected, 1e-4)


def test_attribution_leaves_no_gradient_on_the_model(hooked, inputs):
    hooked.attribute(inputs, "gradient_x_input")
    assert not any(p.requires_grad or p.grad is not None for p in hooked.model.parameters())
    assert not hooked.forward(inputs).logits.requires_grad


# Generation.


def test_generating_under_a_cache_covers_prompt_and_answer(plain, hooked, inputs):
    with hooked.run_with_cache([RESID_POST, PATTERN, "lm.ln_final.hook_out"]) as cache:
        answer = hooked.generate(inputs, max_new_tokens=9, output_hidden_states=True)
    total = inputs.input_ids.shape[1] + 9
    assert answer.sequences.shape == (1, total)
    assert cache.stack(RESID_POST).shape == (LAYERS, 1, total, HIDDEN)
    assert cache.stack(PATTERN).shape == (LAYERS, 1, HEADS, total, total)
    new = answer.sequences[0, -9:]
    assert cache.context.token_labels[0][-9:] == [hooked.processor.tokenizer.decode(token) for token in new]
    logits = plain.lm_head(cache["lm.ln_final.hook_out"])
    assert logits[0, -10:-1].argmax(-1).tolist() == answer.sequences[0, -9:].tolist()
    logprobs = logits.log_softmax(-1)[:, -10:-1].gather(-1, answer.sequences[:, -9:, None])[..., 0]
    assert close(answer.logprobs, logprobs, 1e-4)
    assert len(answer.hidden_states) == LAYERS + 1
    assert torch.equal(answer.hidden_states[2], cache["lm.blocks.1.hook_resid_post"])


def test_a_stream_is_the_generation_piece_by_piece(hooked, inputs):
    whole = hooked.generate(inputs, max_new_tokens=30)
    tokens = list(hooked.stream(inputs, max_new_tokens=30))
    assert "".join(token.text for token in tokens) == whole.text[0]
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert [token.id for token in tokens] == whole.sequences[0, inputs.input_ids.shape[1] :].tolist()


def test_leaving_a_stream_early_frees_the_model(hooked, inputs):
    stream = hooked.stream(inputs, max_new_tokens=500)
    next(stream)
    stream.close()
    assert hooked.forward(inputs).logits.shape[-1] == VOCAB


def test_sampling_is_repeatable_and_touches_no_global_state(hooked, inputs):
    options = {"max_new_tokens": 16, "do_sample": True, "temperature": 3.0}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    texts = [hooked.generate(inputs, seed=seed, **options).text[0] for seed in (1, 1, 2, 3)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_sampling_from_almost_no_probability_is_greedy(hooked, inputs):
    greedy = hooked.generate(inputs, max_new_tokens=8)
    sampled = hooked.generate(inputs, max_new_tokens=8, do_sample=True, temperature=3.0, top_p=1e-6, seed=0)
    assert torch.equal(sampled.sequences, greedy.sequences)


def test_a_stop_text_ends_the_answer(hooked, inputs):
    whole = hooked.generate(inputs, max_new_tokens=40).text[0]
    stop = whole[len(whole) // 2 :][:2]
    text = hooked.generate(inputs, max_new_tokens=40, stop=stop).text[0]
    assert whole.startswith(text)
    assert stop in text
    assert len(text) < len(whole)


# Half precision.


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_half_precision(tasks, dtype, tolerance):
    half = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", dtype=dtype)
    plain = AutoModelForImageTextToText.from_pretrained(DIRECTORY, dtype=dtype, attn_implementation="sdpa").eval()
    batch = half.prepare_messages_batch(*tasks)
    with half.run_with_cache(everything) as cache:
        output = half.forward(batch)
    with torch.no_grad():
        assert torch.equal(output.logits, plain(**batch.tensors).logits)
    real = batch.attention_mask.bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    allowed = (causal & real[:, None, :])[:, None].expand(-1, HEADS, -1, -1)
    rows = real[:, None, :].expand(-1, HEADS, -1)
    for layer in range(LAYERS):
        block = f"lm.blocks.{layer}"
        scores, pattern = cache[f"{block}.attn.hook_scores"], cache[f"{block}.attn.hook_pattern"]
        assert scores.dtype == pattern.dtype == getattr(torch, dtype)
        assert torch.equal(scores[rows] == -torch.inf, ~allowed[rows])
        assert not pattern[rows][~allowed[rows]].any()
        assert close(pattern[rows].float().sum(-1), torch.ones(int(rows.sum())), 0.01)
        mid = cache[f"{block}.hook_resid_pre"] + cache[f"{block}.hook_attn_out"]
        assert torch.equal(mid, cache[f"{block}.hook_resid_mid"])
        heads = cache[f"{block}.attn.hook_head_out"].float().sum(2)
        error = (heads - cache[f"{block}.attn.hook_out"].float())[real].abs().max()
        assert error <= tolerance * cache[f"{block}.attn.hook_out"][real].abs().max()
