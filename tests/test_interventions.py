"""Interventions: each does exactly what it says, at its hook and nowhere before it, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch
import vlm_spectra as vs
from calls import WAIT
from PIL import ImageFilter

LAYER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 5, 6, 2, 32, 192
BLOCK = f"lm.blocks.{LAYER}"
POST, MID, MASK = f"{BLOCK}.hook_resid_post", f"{BLOCK}.hook_resid_mid", f"{BLOCK}.attn.hook_mask"
PATTERN, SCORES, Z, VALUES = (f"{BLOCK}.attn.hook_{name}" for name in ("pattern", "scores", "z", "v"))
ATTENTION = ("in", "q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "head_out", "out")


def everything(name: str) -> bool:
    return True


def run(model, inputs, *hooks, capture=everything):
    """Logits and cache of a forward pass under interventions."""
    with model.run_with_hooks(hooks), model.run_with_cache(capture) as cache:
        logits = model.forward(inputs).logits
    return logits, cache


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clean(hooked, inputs):
    return run(hooked, inputs)


@pytest.fixture(scope="module")
def batch(hooked, screenshot):
    """Two rows of different lengths, so one is padded and image tokens stand elsewhere."""
    tasks = ["Click on the red circle", "Where is the green button of this window?"]
    return hooked.prepare_messages_batch(tasks, [screenshot, screenshot])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, hooked):
    if request.param == "sdpa":
        return hooked
    return vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", attn_implementation="eager")


def without(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return x - (x @ d)[..., None] / d.dot(d) * d


VECTOR = random(HIDDEN)
ACTIONS = {
    "patch": (vs.PatchActivation(VECTOR), lambda x: VECTOR.expand_as(x)),
    "patch a number": (vs.PatchActivation(0.5), lambda x: torch.full_like(x, 0.5)),
    "zero": (vs.ZeroAblation(), torch.zeros_like),
    "mean": (vs.MeanAblation(), lambda x: x.mean(1, keepdim=True).expand_as(x)),
    "a given mean": (vs.MeanAblation(random(3, 9, HIDDEN)), lambda x: random(3, 9, HIDDEN).mean((0, 1)).expand_as(x)),
    "add": (vs.AddActivation(VECTOR, scale=-2.5), lambda x: x - 2.5 * VECTOR),
    "scale": (vs.ScaleActivation(0.25), lambda x: x * 0.25),
    "project out": (vs.ProjectOut(VECTOR), lambda x: without(x, VECTOR)),
    "numpy": (vs.AddActivation(VECTOR.numpy()), lambda x: x + VECTOR),
    "callable": (lambda x: x * 2 + 1, lambda x: x * 2 + 1),
}


def earlier(model, hook: str) -> list[str]:
    names = [name for name, spec in model.catalogue.by_name.items() if not spec.intervene_only]
    return names[: names.index(hook)]


@pytest.mark.parametrize("name", ACTIONS)
def test_an_intervention_does_what_it_says_and_changes_nothing_before(hooked, inputs, clean, name):
    action, expected = ACTIONS[name]
    logits, cache = run(hooked, inputs, (POST, action))
    torch.testing.assert_close(cache[POST], expected(clean[1][POST]), rtol=1e-6, atol=1e-5)
    assert all(torch.equal(cache[each], clean[1][each]) for each in earlier(hooked, POST))
    assert not torch.equal(logits, clean[0])


@pytest.mark.parametrize("positions", ["last", "image", [3, -2], slice(1, 6)], ids=str)
@pytest.mark.parametrize("name", [name for name in ACTIONS if name != "callable"])
def test_an_intervention_at_positions_changes_those_alone(hooked, inputs, clean, name, positions):
    template, expected = ACTIONS[name]
    action = type(template)(**{**vars(template), "positions": positions})
    _, cache = run(hooked, inputs, (POST, action), capture=POST)
    seq = inputs.input_ids.shape[1]
    named = {"last": [seq - 1], "image": list(inputs.images[0].positions)}
    columns = named[positions] if isinstance(positions, str) else torch.arange(seq)[positions].tolist()
    others = [i for i in range(seq) if i not in columns and i not in [c % seq for c in columns]]
    before = clean[1][POST]
    torch.testing.assert_close(cache[POST][:, columns], expected(before[:, columns]), rtol=1e-6, atol=1e-5)
    assert torch.equal(cache[POST][:, others], before[:, others])


def test_positions_mean_each_row_s_own_tokens(hooked, batch):
    _, before = run(hooked, batch, capture=POST)
    value = random(2, len(batch.images[0].positions), HIDDEN)
    _, cache = run(hooked, batch, (POST, vs.PatchActivation(value, positions="image")), capture=POST)
    assert batch.images[0].positions != batch.images[1].positions
    for row, image in enumerate(batch.images):
        expected = before[POST][row].clone()
        expected[list(image.positions)] = value[row]
        assert torch.equal(cache[POST][row], expected)


def test_a_mean_leaves_padding_out(hooked, batch):
    _, before = run(hooked, batch, capture=POST)
    _, cache = run(hooked, batch, (POST, vs.MeanAblation()), capture=POST)
    for row in range(2):
        mean = before[POST][row][batch.attention_mask[row].bool()].mean(0)
        torch.testing.assert_close(cache[POST][row], mean.expand_as(cache[POST][row]), rtol=1e-5, atol=1e-5)


def test_a_patched_head_is_that_head_alone(hooked, inputs, clean):
    value = random(HEAD_DIM)
    _, cache = run(hooked, inputs, (Z, vs.PatchHead(value, heads=[4], positions="last")))
    expected = clean[1][Z].clone()
    expected[:, -1, 4] = value
    assert torch.equal(cache[Z], expected)
    share = cache[f"{BLOCK}.attn.hook_head_out"] - clean[1][f"{BLOCK}.attn.hook_head_out"]
    difference = cache[f"{BLOCK}.attn.hook_out"] - clean[1][f"{BLOCK}.attn.hook_out"]
    torch.testing.assert_close(share[:, :, 4], difference, rtol=1e-4, atol=1e-5)
    assert not share[:, :, [0, 1, 2, 3, 5]].any()


@pytest.mark.parametrize("hook", ["hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z", "hook_head_out"])
def test_heads_select_heads(hooked, inputs, clean, hook):
    name = f"{BLOCK}.attn.{hook}"
    logits, cache = run(hooked, inputs, (name, vs.ScaleActivation(3.0, heads=[1])))
    expected = clean[1][name].clone()
    expected[:, :, 1] *= 3
    assert torch.equal(cache[name], expected)
    assert not torch.equal(logits, clean[0])


def test_interventions_at_one_hook_apply_in_order_outer_blocks_first(hooked, inputs, clean):
    with hooked.run_with_hooks([(POST, vs.ScaleActivation(0.0)), (POST, vs.AddActivation(1.0))]):
        _, cache = run(hooked, inputs, (POST, vs.ScaleActivation(3.0)), capture=POST)
    assert (cache[POST] == 3.0).all()


def test_a_wildcard_means_every_layer(hooked, inputs):
    _, cache = run(hooked, inputs, ("lm.blocks.*.mlp.hook_post", vs.ZeroAblation()))
    assert not cache.stack("lm.blocks.*.hook_mlp_out").any()


@pytest.mark.parametrize(
    "hook",
    ["lm.hook_embed", "lm.ln_final.hook_scale", "lm.ln_final.hook_normalized", "lm.ln_final.hook_out"]
    + [
        f"{BLOCK}.{name}"
        for name in (
            *("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"),
            *(
                f"attn.hook_{part}"
                for part in ["in", "q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "head_out", "out"]
            ),
            *("ln1.hook_scale", "ln2.hook_scale"),
            *(f"mlp.hook_{part}" for part in ("in", "pre", "pre_linear", "post", "out")),
        )
    ],
)
def test_at_every_hook_its_own_values_change_nothing_and_others_do(hooked, inputs, clean, hook):
    own, _ = run(hooked, inputs, (hook, vs.PatchActivation(clean[1][hook])), capture=POST)
    if hook == "lm.ln_final.hook_normalized":  # the norm multiplies by a reciprocal where we divide
        torch.testing.assert_close(own, clean[0], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(own, clean[0])
    other, cache = run(hooked, inputs, (hook, vs.ScaleActivation(1.5)), capture=hook)
    assert torch.equal(cache[hook], clean[1][hook] * 1.5)
    assert (other - clean[0]).abs().max() > 1e-3


def test_patching_the_stream_of_another_run_makes_its_answer(hooked, inputs, screenshot, clean):
    other = hooked.prepare_messages("Click on the red button", screenshot)
    assert other.input_ids.shape == inputs.input_ids.shape
    expected, source = run(hooked, other)
    assert not torch.equal(expected, clean[0])
    for hook in (POST, "lm.hook_embed"):
        logits, _ = run(hooked, inputs, (hook, vs.PatchActivation(source[hook])), capture=POST)
        assert torch.equal(logits, expected)


def test_patching_the_stream_between_attention_and_mlp_is_exact(hooked, inputs, screenshot, clean):
    other = hooked.prepare_messages("Click on the red button", screenshot)
    expected, source = run(hooked, other)
    logits, cache = run(hooked, inputs, (MID, vs.PatchActivation(source[MID])))
    assert torch.equal(cache[MID], source[MID])
    assert torch.equal(cache[POST], source[POST])
    assert torch.equal(logits, expected)
    assert torch.equal(cache[f"{BLOCK}.hook_attn_out"], clean[1][f"{BLOCK}.hook_attn_out"])


def test_an_edited_pattern_is_what_mixes_the_values(hooked, inputs, clean):
    pattern = clean[1][PATTERN].roll(1, dims=1)
    logits, cache = run(hooked, inputs, (PATTERN, vs.PatchActivation(pattern)))
    values = cache[VALUES].repeat_interleave(HEADS // KV_HEADS, 2)
    torch.testing.assert_close(cache[Z], torch.einsum("bhqk,bkhd->bqhd", pattern, values), rtol=1e-5, atol=1e-5)
    assert (logits - clean[0]).abs().max() > 1e-2


def test_one_row_of_a_pattern_changes_no_other_row(hooked, inputs, clean):
    _, cache = run(hooked, inputs, (PATTERN, vs.ZeroAblation(positions=[40], heads=[2])))
    changed = (cache[Z] != clean[1][Z]).any(-1)
    assert not cache[Z][0, 40, 2].any()
    assert changed.nonzero().tolist() == [[0, 40, 2]]


def test_edited_scores_go_through_the_softmax(hooked, inputs, clean):
    _, cache = run(hooked, inputs, (SCORES, vs.ScaleActivation(0.5, heads=[0])))
    expected = clean[1][SCORES].clone()
    expected[:, 0] *= 0.5
    torch.testing.assert_close(cache[PATTERN], expected.softmax(-1), rtol=1e-5, atol=1e-6)


def test_blocked_attention_reads_nothing_and_other_queries_stay(model, batch):
    clean = run(model, batch)
    keys, heads = "image", [1, 5]
    block = vs.BlockAttention(positions="last", keys=keys, heads=heads)
    logits, cache = run(model, batch, (MASK, block))
    others = [h for h in range(HEADS) if h not in heads]
    assert torch.equal(cache[PATTERN][:, :, :-1], clean[1][PATTERN][:, :, :-1])
    assert torch.equal(cache[PATTERN][:, others], clean[1][PATTERN][:, others])
    assert torch.equal(cache[Z][:, :-1], clean[1][Z][:, :-1])
    assert torch.equal(cache[Z][:, :, others], clean[1][Z][:, :, others])
    for row, image in enumerate(batch.images):
        columns = list(image.positions)
        assert (clean[1][PATTERN][row, heads, -1][:, columns] > 0).any()
        blocked = cache[PATTERN][row, heads, -1]
        assert not blocked[:, columns].any()
        torch.testing.assert_close(blocked.sum(-1), torch.ones(2))
        kept = clean[1][PATTERN][row, heads, -1].clone()
        kept[:, columns] = 0
        torch.testing.assert_close(blocked, kept / kept.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    values = cache[VALUES].repeat_interleave(HEADS // KV_HEADS, 2)
    mixed = torch.einsum("bhk,bkhd->bhd", cache[PATTERN][:, :, -1], values)
    torch.testing.assert_close(cache[Z][:, -1], mixed, rtol=1e-4, atol=1e-5)
    assert (logits[:, -1] - clean[0][:, -1]).abs().max() > 1e-4


def test_attention_blocked_on_an_unpadded_prompt(model, inputs):
    clean, _ = run(model, inputs, capture=POST)
    block = vs.BlockAttention(positions="text", keys="image")
    logits, cache = run(model, inputs, ("lm.blocks.*.attn.hook_mask", block))
    patterns = cache.stack("lm.blocks.*.attn.hook_pattern")
    image = list(inputs.images[0].positions)
    text = [i for i in range(inputs.input_ids.shape[1]) if i not in image]
    assert not patterns[:, :, :, text][..., image].any()
    assert patterns[:, :, :, image][..., image].any()
    assert (logits - clean).abs().max() > 1e-2


def test_a_query_with_nothing_left_to_read_has_a_pattern_of_zeros(model, inputs):
    _, cache = run(model, inputs, (MASK, vs.BlockAttention(positions=9)))
    assert not cache[PATTERN][:, :, 9].any()
    assert not cache[Z][:, 9].any()
    assert not any(tensor.isnan().any() for tensor in cache.values())


def test_a_set_mask_replaces_the_causal_one(model, inputs):
    clean = run(model, inputs)
    seq = inputs.input_ids.shape[1]
    allowed = torch.ones(seq, seq, dtype=torch.bool)
    _, cache = run(model, inputs, (MASK, vs.SetAttentionMask(allowed)))
    q, k = cache[f"{BLOCK}.attn.hook_rot_q"], cache[f"{BLOCK}.attn.hook_rot_k"].repeat_interleave(3, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
    torch.testing.assert_close(cache[SCORES], scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[PATTERN], scores.softmax(-1), rtol=1e-4, atol=1e-6)
    bias = random(HEADS, 1, seq)
    _, cache = run(model, inputs, (MASK, vs.SetAttentionMask(bias[[3]], positions="last", heads=[3])))
    torch.testing.assert_close(cache[SCORES][0, 3, -1], scores[0, 3, -1] + bias[3, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(cache[PATTERN][:, :3], clean[1][PATTERN][:, :3])
    assert torch.equal(cache[PATTERN][:, 3, :-1], clean[1][PATTERN][:, 3, :-1])


def test_the_model_s_own_mask_set_again_changes_nothing(model, inputs):
    seq = inputs.input_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    logits, _ = run(model, inputs, (MASK, vs.SetAttentionMask(causal)), capture=POST)
    assert torch.equal(logits, model.forward(inputs).logits)


# Isolation.


def test_threads_never_see_each_other_s_hooks(hooked, inputs):
    plans = [
        (POST, vs.AddActivation(VECTOR), [POST, PATTERN]),
        ("lm.blocks.0.hook_resid_pre", vs.ScaleActivation(0.5), ["lm.blocks.*.hook_mlp_out"]),
    ]
    expected = [run(hooked, inputs, (hook, action), capture=capture) for hook, action, capture in plans]
    start, wrong = threading.Barrier(2), []

    def work(number: int) -> None:
        hook, action, capture = plans[number]
        for _ in range(20):
            start.wait(WAIT)
            logits, cache = run(hooked, inputs, (hook, action), capture=capture)
            same = cache.names == expected[number][1].names and torch.equal(logits, expected[number][0])
            if not same or not all(torch.equal(cache[name], expected[number][1][name]) for name in cache.names):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_an_exception_inside_leaves_nothing_behind(hooked, inputs, clean):
    def fail(x):
        raise RuntimeError("in the middle of a pass")

    with pytest.raises(RuntimeError, match="in the middle"):
        run(hooked, inputs, (POST, vs.ZeroAblation()), (POST, fail))
    with pytest.raises(KeyboardInterrupt), hooked.run_with_hooks([(POST, vs.ZeroAblation())]):
        raise KeyboardInterrupt
    assert torch.equal(hooked.forward(inputs).logits, clean[0])


def test_another_model_s_block_is_not_this_one_s(hooked, inputs, clean):
    other = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu")
    with other.run_with_hooks([(POST, vs.ZeroAblation())]), other.run_with_cache(POST) as cache:
        assert torch.equal(hooked.forward(inputs).logits, clean[0])
        assert cache.names == []


# Generation, the lens and attribution under interventions.

GENERATED = {
    "add": (POST, vs.AddActivation(VECTOR, scale=2.0)),
    "add at the last": (POST, vs.AddActivation(VECTOR, scale=4.0, positions="last")),
    "scale at image tokens": (POST, vs.ScaleActivation(0.2, positions="image")),
    "mean": (f"{BLOCK}.mlp.hook_out", vs.MeanAblation()),
    "block": ("lm.blocks.*.attn.hook_mask", vs.BlockAttention(keys="image")),
    "block at the last": ("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys="image")),
    "a head": ("lm.blocks.*.attn.hook_z", vs.ZeroAblation(heads=[0, 3])),
    "keys": (f"{BLOCK}.attn.hook_rot_k", vs.ScaleActivation(0.5, positions="image")),
    "pattern": (PATTERN, vs.ScaleActivation(0.5, heads=[2])),
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generation_under_interventions_is_that_of_the_whole_sequence_under_them(hooked, inputs, name):
    hook, action = GENERATED[name]
    plain = hooked.generate(inputs, max_new_tokens=8)
    with hooked.run_with_hooks([(hook, action)]), hooked.run_with_cache("lm.ln_final.hook_normalized") as cache:
        answer = hooked.generate(inputs, max_new_tokens=8)
    new = answer.sequences.shape[1] - inputs.input_ids.shape[1]
    directions = hooked.unembed(list(range(hooked.info.vocab)))
    logits = cache["lm.ln_final.hook_normalized"][0, -new - 1 : -1] @ directions.T
    assert logits.argmax(-1).tolist() == answer.sequences[0, -new:].tolist()
    logprobs = logits.log_softmax(-1).gather(-1, answer.sequences[0, -new:, None])[:, 0]
    torch.testing.assert_close(answer.logprobs[0], logprobs, rtol=1e-3, atol=1e-3)
    assert not torch.equal(answer.logprobs, plain.logprobs)


def test_without_positions_every_new_token_is_steered(hooked, inputs):
    direction = hooked.unembed(" red")[0]
    steer = vs.AddActivation(direction / direction.norm(), scale=1e4)
    with hooked.run_with_hooks([("lm.blocks.4.hook_resid_post", steer)]):
        tokens = [token.text for token in hooked.stream(inputs, max_new_tokens=5)]
    assert tokens == [" red"] * 5


def test_with_positions_only_the_prompt_is_steered(hooked, inputs):
    direction = hooked.unembed(" red")[0]
    steer = vs.AddActivation(direction / direction.norm(), scale=1e4, positions="last")
    with hooked.run_with_hooks([("lm.blocks.4.hook_resid_post", steer)]):
        tokens = [token.text for token in hooked.stream(inputs, max_new_tokens=5)]
    assert tokens[0] == " red"
    assert tokens[1:] != [" red"] * 4


def test_the_lens_and_attribution_see_interventions(hooked, inputs):
    actions = vs.ScaleActivation(0.5), vs.AddActivation(VECTOR), vs.ScaleActivation(0.9)
    hooks = list(zip((MID, POST, "lm.hook_embed"), actions, strict=True))
    with hooked.run_with_hooks(hooks):
        value = hooked.forward(inputs, 1).logits[0, 0].max()
        lens = hooked.logit_lens(inputs, positions="last", top_k=1)
        found = [hooked.attribute(inputs, method) for method in ("gradient_x_input", "integrated_gradients")]
    torch.testing.assert_close(lens.logits[-1, 0, 0, 0], value, rtol=1e-5, atol=1e-5)
    for each in found:
        torch.testing.assert_close(each.target_value[0], value, rtol=1e-5, atol=1e-4)
    assert found[1].residual.abs() <= 0.005 * (found[1].target_value - found[1].baseline_value).abs()


def test_a_mean_is_taken_anew_at_every_point_of_an_integration(hooked, screenshot):
    task, prefill = "Click on the red circle", "Thought: The"
    image = screenshot.resize((112, 112))
    inputs = hooked.prepare_messages(task, image, prefill)
    blurred = hooked.prepare_messages(task, image.filter(ImageFilter.GaussianBlur(11.2)), prefill)
    with hooked.run_with_hooks([(f"{BLOCK}.hook_mlp_out", vs.MeanAblation())]):
        found = hooked.attribute(inputs, "integrated_gradients", " red", baseline="blurred", steps=64)
        expected = hooked.forward(blurred, 1).logits[0, 0, found.target_ids[0]]
    torch.testing.assert_close(found.baseline_value[0], expected, rtol=1e-5, atol=1e-4)
    assert found.residual.abs() <= 0.005 * (found.target_value - found.baseline_value).abs()
