"""Each family with real pictures of different shape: the relations between its hooks, batches and interventions."""

from __future__ import annotations

import inspect
import re
from functools import cache

import documents
import pytest
import torch
import vlm_spectra as vs
import zoo
from PIL import Image
from relations import TOLERANCES, measure
from tiny import text, tiny_config, tiny_model
from transformers import AutoModelForImageTextToText
from vlm_spectra_server import families
from vlm_spectra_server.relations import absolute as worst
from vlm_spectra_server.relations import batch, reached

FAMILIES = [name for name in zoo.FAMILIES if name not in zoo.MISSING]
BATCH = 2e-4
"""How far a row of a padded batch may be from the row alone: what float32 adds up in another order differs by the kind
of processor, up to 1.06e-4 on one of them."""


def loaded(name: str) -> vs.HookedVLM:
    """The family's model with hook points."""
    zoo.require(name)
    return zoo.load(name, implementation(name))


def implementation(name: str) -> str:
    """The attention that a family is tried with: Gemma 2, inside PaliGemma 2, caps its scores and has eager only."""
    return "eager" if name == "paligemma" else "sdpa"


@cache
def plain(name: str) -> torch.nn.Module:
    """The family's model as transformers loads it."""
    model = AutoModelForImageTextToText.from_pretrained(zoo.build(name), attn_implementation=implementation(name))
    return model.eval().requires_grad_(False)


def prompts(name: str) -> list[list[Image.Image]]:
    """The pictures of each prompt that a family is tried with."""
    singles = [[zoo.wide()], [zoo.tall()]]
    return [*singles, [zoo.wide(), zoo.tall()]] if zoo.FAMILIES[name].two_images else singles


@cache
def figures(name: str) -> dict[str, float]:
    """The worst error of each relation over all prompts."""
    found: dict[str, float] = {}
    for images in prompts(name):
        inputs = loaded(name).prepare_messages("What is shown?", images)
        for row, value in measure(plain(name), inputs).items():
            found[row] = max(found.get(row, 0.0), value)
    return found


@cache
def batch_error(name: str) -> float:
    """How far logits, streams and patterns of a padded batch are from those of its rows."""
    model, tasks, images = loaded(name), ["Click", "What is in the list, row by row?"], [zoo.wide(), zoo.tall()]
    alone = [model.prepare_messages(task, image) for task, image in zip(tasks, images, strict=True)]
    assert alone[0].input_ids.shape != alone[1].input_ids.shape
    return batch(model, model.prepare_messages_batch(tasks, images), alone, None, worst)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_relations_hold(name):
    found = figures(name)
    assert {row: value for row, value in found.items() if not value <= TOLERANCES[row]} == {}


@pytest.mark.parametrize("name", [name for name in FAMILIES if zoo.FAMILIES[name].batches])
def test_a_padded_batch_equals_its_rows(name):
    assert batch_error(name) <= BATCH


@pytest.fixture(params=FAMILIES)
def at_work(request):
    """A family, a prompt, its hooks as they are, and a layer in the middle that attends."""
    model = loaded(request.param)
    inputs = model.prepare_messages("What is shown?", zoo.wide())
    with model.run_with_cache(reached(model, inputs)) as cache:
        output = model.forward(inputs)
    layer = [block.index for block in model.reading.blocks if block.attends][-1]
    return model, inputs, cache, output.logits, layer


def changed(at_work, hook, intervention):
    """The hooks and logits under an intervention at the layer."""
    model, inputs, _, _, layer = at_work
    with (
        model.run_with_hooks([(f"lm.blocks.{layer}.{hook}", intervention)]),
        model.run_with_cache(reached(model, inputs)) as cache,
    ):
        return cache, model.forward(inputs).logits


def untouched(at_work, cache, hook):
    """Every hook before the intervened one has not moved by a bit."""
    before = at_work[2]
    for name in before.names:
        if name == f"lm.blocks.{at_work[4]}.{hook}":
            return
        assert torch.equal(cache[name], before[name]), name


def test_blocking_attention_between_two_positions(at_work):
    _, inputs, before, logits, layer = at_work
    length = inputs.input_ids.shape[1]
    query, key = length - 3, length - 6
    cache, blocked = changed(at_work, "attn.hook_mask", vs.BlockAttention(positions=[query], keys=[key]))
    untouched(at_work, cache, "attn.hook_scores")
    pattern, old = cache[f"lm.blocks.{layer}.attn.hook_pattern"], before[f"lm.blocks.{layer}.attn.hook_pattern"]
    assert old[0, :, query, key].min() > 0
    assert not pattern[0, :, query, key].any()
    rest = [i for i in range(length) if i != query]
    assert torch.equal(pattern[:, :, rest], old[:, :, rest])
    z, old = (each[f"lm.blocks.{layer}.attn.hook_z"] for each in (cache, before))
    assert torch.equal(z[:, rest], old[:, rest])
    assert not torch.equal(z[:, query], old[:, query])
    assert torch.equal(blocked[:, :query], logits[:, :query])
    assert not torch.equal(blocked[:, query], logits[:, query])


def test_editing_a_pattern(at_work):
    model, inputs, before, logits, layer = at_work
    to_the_first = torch.zeros(1, model.info.heads, 1, inputs.input_ids.shape[1])
    to_the_first[..., 0] = 1
    cache, moved = changed(at_work, "attn.hook_pattern", vs.PatchActivation(to_the_first, positions="last"))
    untouched(at_work, cache, "attn.hook_pattern")
    block = model.reading.blocks[layer]
    name = f"lm.blocks.{layer}.attn.hook_z"
    assert torch.equal(cache[name][:, :-1], before[name][:, :-1])
    assert torch.equal(moved[:, :-1], logits[:, :-1])
    assert not torch.equal(moved[:, -1], logits[:, -1])
    values = cache[f"lm.blocks.{layer}.attn.hook_v"][0, 0].repeat_interleave(block.heads // block.kv_heads, 0)
    mixed = before[f"lm.blocks.{layer}.attn.hook_pattern"][0, :, -1] @ torch.eye(inputs.input_ids.shape[1])
    old = torch.einsum("hk,khd->hd", mixed, _every_head(before, layer, block))
    gate = torch.where(old.abs() > 1e-3, before[name][0, -1] / old, torch.nan)  # 1, or what gates attention's output
    error = (cache[name][0, -1] - gate * values).abs()
    assert not error.isnan().all()
    assert error[~error.isnan()].max() <= 1e-3


def _every_head(cache, layer, block):
    values = cache[f"lm.blocks.{layer}.attn.hook_v"][0]
    return values.repeat_interleave(block.heads // block.kv_heads, 1)


def test_zeroing_a_head(at_work):
    _, _, before, logits, layer = at_work
    cache, silenced = changed(at_work, "attn.hook_z", vs.ZeroAblation(heads=[1]))
    untouched(at_work, cache, "attn.hook_z")
    name = f"lm.blocks.{layer}.attn.hook_head_out"
    shares, old = cache[name], before[name]
    rest = [head for head in range(old.shape[2]) if head != 1]
    assert not shares[:, :, 1].any()
    assert torch.equal(shares[:, :, rest], old[:, :, rest])
    name = f"lm.blocks.{layer}.attn.hook_out"
    assert worst(before[name] - cache[name], old[:, :, 1]) <= 1e-5
    assert not torch.equal(silenced, logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_what_one_pass_over_it_says(name):
    """Token by token with its cache of keys (cut to a window, in some families), and all at once; the mask changed."""
    assert answer_error(loaded(name)) <= 1e-3


def answer_error(model: vs.HookedVLM) -> float:
    """How far the probabilities of an answer's tokens are from those that one pass over the whole answer gives."""
    for task in ("What is shown?", "Describe it.", "Click", "Hello", "Why?"):
        inputs = model.prepare_messages(task, zoo.tall())
        blocked = ("lm.blocks.*.attn.hook_mask", vs.BlockAttention(keys=[inputs.input_ids.shape[1] - 4]))
        with model.run_with_hooks([blocked]):
            answer = model.generate(inputs, max_new_tokens=5)
        if not (answer.sequences[0, inputs.input_ids.shape[1] :] == model.info.image_token_id).any():
            break  # random weights may answer with the image's token
    with model.run_with_hooks([blocked]), model.run_with_cache("lm.ln_final.hook_out") as cache:
        answer = model.generate(inputs, max_new_tokens=5)
    new = answer.sequences.shape[1] - inputs.input_ids.shape[1]
    with torch.no_grad():
        logprobs = model.reading.logits(cache["lm.ln_final.hook_out"])[:, -1 - new : -1].log_softmax(-1)
    expected = logprobs.gather(-1, answer.sequences[:, -new:, None])[..., 0]
    return worst(answer.logprobs, expected)


@pytest.mark.parametrize("called", ["cache", "past_key_values"])
def test_the_cache_of_keys_is_known_by_both_of_its_names(called):
    """transformers 5.24 renamed what a decoder is called with; code that comes with a checkpoint may not have."""
    name = "gemma3"
    model = AutoModelForImageTextToText.from_pretrained(zoo.build(name), attn_implementation=implementation(name))
    decoder = model.eval().get_decoder()
    names = {"cache", "past_key_values"}
    own = next(iter(names & inspect.signature(decoder.forward).parameters.keys()))

    def rename(forward, to):
        return lambda **kwargs: forward(**{to if key in names else key: value for key, value in kwargs.items()})

    decoder.forward = rename(decoder.forward, own)
    hooked = vs.HookedVLM(model, loaded(name).processor)
    decoder.forward = rename(decoder.forward, called)
    assert answer_error(hooked) <= 1e-3


def test_a_head_is_as_wide_as_its_weights_say():
    model = loaded("qwen3_vl")
    heads, width = model.info.heads, model.info.head_dim
    assert width != model.info.hidden // heads
    inputs = model.prepare_messages("What is shown?", zoo.tall())
    with model.run_with_cache("lm.blocks.0.attn.*") as cache:
        model.forward(inputs)
    seq = inputs.input_ids.shape[1]
    for hook, count in (
        ("q", heads),
        ("rot_q", heads),
        ("z", heads),
        ("k", model.info.kv_heads),
        ("v", model.info.kv_heads),
    ):
        assert cache[f"lm.blocks.0.attn.hook_{hook}"].shape == (1, seq, count, width)


def test_a_linear_attention_layer_has_no_pattern_and_says_so():
    model = loaded("qwen3_5")
    linear = [block.index for block in model.reading.blocks if not block.attends]
    others = [block.index for block in model.reading.blocks if block.attends]
    assert linear
    assert others
    names = {name for spec in model.hooks() for name in spec.names()}
    for layer in linear:
        assert not any(name.startswith(f"lm.blocks.{layer}.attn.hook_pattern") for name in names)
        assert f"lm.blocks.{layer}.hook_attn_out" in names
    with pytest.raises(vs.SpectraError) as raised, model.run_with_cache(f"lm.blocks.{linear[0]}.attn.hook_pattern"):
        pass
    assert f"layer {linear[0]} has no hook" in str(raised.value)
    assert "linear attention layers have none" in str(raised.value)
    with model.run_with_cache("lm.blocks.*.attn.hook_pattern") as cache:
        model.forward(model.prepare_messages("Hello", zoo.wide()))
    assert len(cache) == len(others)


def test_a_mixture_of_experts_has_router_logits_and_no_gate():
    model = loaded("qwen3_vl_moe")
    block = next(block for block in model.reading.blocks if block.experts)
    with model.run_with_cache(f"lm.blocks.{block.index}.mlp.*") as cache:
        model.forward(model.prepare_messages("Hello", zoo.wide()))
    names = [name.rsplit(".", 1)[1] for name in cache.names]
    assert names == ["hook_in", "hook_router_logits", "hook_out"]
    entering, logits = (cache[f"lm.blocks.{block.index}.mlp.{name}"] for name in names[:2])
    assert worst(logits, entering @ block.router.weight.T) <= 1e-5
    silence = (f"lm.blocks.{block.index}.mlp.hook_router_logits", vs.ZeroAblation())
    with pytest.raises(vs.SpectraError, match="captured but not changed"), model.run_with_hooks([silence]):
        model.forward(model.prepare_messages("Hello", zoo.wide()))


def test_deepstack_adds_at_image_tokens_and_nothing_without_one():
    model = loaded("qwen3_vl")
    for images, expected in (([zoo.wide(), zoo.tall()], True), (None, False)):
        inputs = model.prepare_messages("Hello", images)
        with model.run_with_cache("lm.blocks.*.hook_deepstack") as cache:
            plain_logits = model.forward(inputs).logits
        assert len(cache) == len(model.reading.deepstack) > 0
        at_images = inputs.input_ids == model.info.image_token_id
        for added in cache.values():
            assert torch.equal(added.any(-1), at_images)
        with model.run_with_hooks([("lm.blocks.*.hook_deepstack", vs.ZeroAblation())]):
            assert torch.equal(model.forward(inputs).logits, plain_logits) is not expected


def test_a_cross_attention_layer_does_not_run_without_an_image():
    model = loaded("mllama")
    cross = next(block.index for block in model.reading.blocks if block.kind == "cross-attention")
    inputs = model.prepare_messages("Hello", None)
    with model.run_with_cache(
        [f"lm.blocks.{cross}.hook_{name}" for name in ("resid_pre", "resid_post", "mlp_out")]
    ) as cache:
        model.forward(inputs)
    assert torch.equal(cache[f"lm.blocks.{cross}.hook_resid_pre"], cache[f"lm.blocks.{cross}.hook_resid_post"])
    assert not cache[f"lm.blocks.{cross}.hook_mlp_out"].any()
    with (
        pytest.raises(vs.SpectraError, match="does not run without one"),
        model.run_with_cache(f"lm.blocks.{cross}.mlp.hook_pre"),
    ):
        model.forward(inputs)


def test_a_stream_that_each_layer_multiplies_is_taken_apart_all_the_same():
    model = loaded("gemma4")
    scales = model.info.stream_scales
    assert len(scales) == model.info.layers
    assert all(scale != 1.0 for scale in scales)
    inputs = model.prepare_messages("What is shown?", zoo.wide())
    found = model.attribute(inputs, "direct_logit")
    assert float((found.total - found.target_value).abs() / found.target_value.abs()) <= 1e-4
    hooks = ["hook_attn_out", "hook_mlp_out", "hook_extra_out", "hook_resid_*", "attn.hook_head_out", "attn.hook_out"]
    with model.run_with_cache(["lm.hook_embed", *(f"lm.blocks.*.{name}" for name in hooks)]) as cache:
        model.forward(inputs)
    last = f"lm.blocks.{model.info.layers - 1}.hook_resid_post"
    for layer, stream in ((None, cache[last]), (1, cache["lm.blocks.1.hook_resid_pre"])):
        assert worst(cache.decompose_resid(layer).sum(0), stream) <= 1e-4
        parts, labels = cache.get_full_resid_decomposition(layer, expand_neurons=False, return_labels=True)
        assert worst(parts.sum(0), stream) <= 1e-4
        assert float(parts[labels.index("bias")].abs().max()) <= 1e-4  # no part is left over


class OddBlock(torch.nn.Module):
    """A Llama block with other names, which adds half of what attention gives."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.first, self.mixer = block.input_layernorm, block.self_attn
        self.second, self.network = block.post_attention_layernorm, block.mlp

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        hidden_states = hidden_states + 0.5 * self.mixer(hidden_states=self.first(hidden_states), **kwargs)[0]
        return hidden_states + self.network(self.second(hidden_states))


def test_the_documentation_s_family_reads(monkeypatch):
    example = re.findall(r"```python\n(.*?)```", documents.FAMILIES.read_text(), re.DOTALL)[0]
    assert "register" in example
    assert len(example.splitlines()) < 40
    config = tiny_config("llava")
    model = tiny_model(config)
    layers = model.get_decoder().layers
    for index, block in enumerate(layers):
        layers[index] = OddBlock(block)
    model.config.model_type = "odd"
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    with pytest.raises(
        vs.SpectraError, match="not the shape this library reads: block 0, a OddBlock, has first, mixer"
    ):
        measure(model, text(config))
    exec(example, {})
    found = measure(model, text(config))
    assert {row: value for row, value in found.items() if not value <= TOLERANCES[row]} == {}


def test_the_table_of_families_in_the_documentation_is_current():
    rows, written = [], documents.rows("families")
    for name in FAMILIES:
        if zoo.fault(name):
            rows.append(written[f"`{name}`"])
            continue
        found = figures(name)
        batch = documents.figure(batch_error(name)) if zoo.FAMILIES[name].batches else ""
        cells = [documents.figure(found[row]) if row in found else "" for row in TOLERANCES]
        rows.append([f"`{name}`", str(len(prompts(name))), *cells, batch])
    limits = ["tolerance", "", *(documents.figure(value) for value in TOLERANCES.values()), documents.figure(BATCH)]
    documents.check("families", documents.table(["family", "prompts", *TOLERANCES, "batch"], [*rows, limits]))
