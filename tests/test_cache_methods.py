"""The cache's methods in TransformerLens's names: its numbers, sums that must come out, and what is said when not."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import vlm_spectra as vs
import zoo
from vlm_spectra import dtypes
from vlm_spectra.arrays import to_numpy
from vlm_spectra.network.local import LocalMemory

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
import transformer_lens_numbers as recorded

STREAMS = ["lm.hook_embed", "lm.blocks.*.hook_*"]
SCALES = ["lm.blocks.*.ln1.hook_scale", "lm.blocks.*.ln2.hook_scale", "lm.ln_final.hook_scale"]
HEADS = ["lm.blocks.*.attn.hook_head_out", "lm.blocks.*.attn.hook_z"]
NEURONS = ["lm.blocks.*.mlp.hook_post"]
ALL = [*STREAMS, *SCALES, *HEADS, *NEURONS]


def captured(model, inputs, hooks=ALL, **selection):
    with model.run_with_cache(hooks, **selection) as cache:
        output = model.forward(inputs)
    return cache, output


def close(one, other, tolerance=1e-5):
    one, other = to_numpy(one), to_numpy(other)
    assert one.shape == other.shape
    return float(np.abs(one - other).max()) <= tolerance * max(1.0, float(np.abs(other).max()))


# TransformerLens's numbers.


@pytest.fixture(scope="module")
def lensed(tmp_path_factory):
    """The recorded numbers, and our cache of the same run."""
    numbers = np.load(recorded.FILE)
    model = vs.HookedVLM.from_pretrained(str(recorded.build(tmp_path_factory.mktemp("tiny"))), device="cpu")
    inputs = model.prepare_messages(recorded.TASK, recorded.picture())
    assert to_numpy(inputs.input_ids).tolist() == numbers["input_ids"].tolist()
    return numbers, captured(model, inputs)[0], model


@pytest.fixture(scope="module", params=["torch", "numpy"])
def theirs(request, lensed):
    numbers, cache, model = lensed
    return numbers, cache if request.param == "torch" else cache.to_numpy(), model


LABELLED = {
    "decompose_resid": lambda c: c.decompose_resid(return_labels=True),
    "accumulated_resid/mid": lambda c: c.accumulated_resid(incl_mid=True, return_labels=True),
    "stack_head_results": lambda c: c.stack_head_results(return_labels=True),
    "get_full_resid_decomposition": lambda c: c.get_full_resid_decomposition(
        expand_neurons=False, pos_slice=-1, return_labels=True
    ),
    "stack_neuron_results/2": lambda c: c.stack_neuron_results(2, pos_slice=-1, return_labels=True),
}
PLAIN = {
    "decompose_resid/2/mlp_input/ln": lambda c: c.decompose_resid(2, mlp_input=True, apply_ln=True),
    "decompose_resid/attn": lambda c: c.decompose_resid(mode="attn", incl_embeds=False, pos_slice=-1),
    "accumulated_resid/ln": lambda c: c.accumulated_resid(apply_ln=True),
    "accumulated_resid/1/mlp_input": lambda c: c.accumulated_resid(1, mlp_input=True, pos_slice=(2, 9)),
    "stack_head_results/2/remainder": lambda c: c.stack_head_results(2, incl_remainder=True, pos_slice=-1),
    "stack_activation/z": lambda c: c.stack_activation("z"),
    "apply_ln_to_stack/1": lambda c: c.apply_ln_to_stack(c.stack_head_results(), 1),
    "logit_attrs": lambda c: c.logit_attrs(c.decompose_resid(), recorded.TOKENS),
    "logit_attrs/difference": lambda c: c.logit_attrs(c.stack_head_results(), recorded.TOKENS, recorded.INCORRECT),
    "logit_attrs/last": lambda c: c.logit_attrs(
        c.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1), recorded.TOKENS, pos_slice=-1
    ),
}
WHOLE = ("decompose_resid", "decompose_resid/2/mlp_input/ln", "logit_attrs")
"""Those whose first component is the embedding at every position."""


@pytest.mark.parametrize("name", [*LABELLED, *PLAIN])
def test_transformer_lens_s_numbers(theirs, name):
    numbers, cache, _ = theirs
    if name in LABELLED:
        ours, labels = LABELLED[name](cache)
        assert labels == numbers[f"{name}/labels"].tolist()
    else:
        ours = PLAIN[name](cache)
    assert type(ours) is type(cache["lm.hook_embed"])
    ours, expected = to_numpy(ours), numbers[name].copy()
    if name in WHOLE:
        # At image tokens TransformerLens has the placeholder's embedding there, not what enters the first layer.
        image = cache.image_positions()
        assert not close(ours[0, :, image], expected[0, :, image], 0.01)
        expected[0, :, image] = ours[0, :, image]
    assert close(ours, expected)


# What must come out, on families that differ in how they add to the stream.

FAMILIES = {
    "qwen2_5_vl": "plain",
    "qwen3_vl": "image features added between layers",
    "gemma3": "norms behind attention and MLP",
    "aya_vision": "attention and MLP in parallel, LayerNorm, scaled logits",
    "llava": "plain, another tower",
    "qwen3_5": "layers without attention heads",
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    model = zoo.load(request.param)
    there = {spec.name.split("}.")[-1] for spec in model.hooks()}
    inputs = model.prepare_messages("What is on the screen?", zoo.wide())
    hooks = [*STREAMS, "lm.blocks.*.ln1.hook_scale", "lm.ln_final.hook_scale", HEADS[0]]
    hooks += NEURONS if "mlp.hook_post" in there else []
    hooks += ["lm.blocks.*.attn.hook_out", "lm.blocks.*.mlp.hook_out"]
    cache, output = captured(model, inputs, hooks, positions=[3, "last"])
    return model, cache, output


def test_the_parts_add_up_to_the_stream(family):
    model, cache, _ = family
    count = model.info.layers
    stream = cache.accumulated_resid()
    assert stream.shape[0] == count + 1
    for layer in range(count + 1):
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        assert len(labels) == len(parts)
        assert labels[0] == "embed"
        assert close(parts.sum(0), stream[layer])
    assert ("0_deepstack" in labels) == (model.info.family == "qwen3_vl")


def test_heads_and_neurons_add_up_to_what_was_added(family):
    model, cache, _ = family
    full, labels = cache.get_full_resid_decomposition(return_labels=True)
    heads = sum(label.startswith("L") and "H" in label for label in labels)
    assert (
        heads + sum("attn_out" in label for label in labels) * model.info.heads == model.info.layers * model.info.heads
    )
    assert sum("N" in label for label in labels) == model.info.layers * model.info.mlp
    assert labels[-1] == "bias"
    assert len(labels) == len(full)
    # These families' output projections have no bias: nothing may be left.
    assert close(full[-1], torch.zeros_like(full[-1]), 2e-5)
    assert close(full.sum(0), cache["resid_post", -1])


def test_the_parts_logits_add_up_to_the_logit(family):
    model, cache, output = family
    where = cache.context.positions[0]
    logits = output.logits[0, where]
    if model.reading.softcap is not None:
        logits = torch.atanh(logits / model.reading.softcap) * model.reading.softcap
    answer = int(logits[-1].argmax())
    parts = cache.logit_attrs(cache.decompose_resid(), answer)
    assert close(parts.sum(0)[0], logits[:, answer], 1e-4)
    difference = cache.logit_attrs(cache.decompose_resid(), answer, 5)
    assert close(difference.sum(0)[0], logits[:, answer] - logits[:, 5], 1e-4)


def test_the_stream_as_the_final_norm_has_it(family):
    model, cache, output = family
    normed = cache.accumulated_resid(apply_ln=True)
    logits = (normed[-1, 0] @ model.unembed([7, 8]).T).numpy()
    expected = output.logits[0, cache.context.positions[0]][:, [7, 8]]
    if model.reading.softcap is None:
        assert close(logits, expected, 1e-4)
    assert close(normed[-1], cache.apply_ln_to_stack(cache["resid_post", -1][None])[0])


def test_neurons_by_direction_are_the_neurons(family):
    model, cache, _ = family
    direction = model.unembed(9)[0]
    whole = cache.stack_neuron_results(2, incl_remainder=True)
    assert close(
        whole @ direction, cache.stack_neuron_results(2, incl_remainder=True, project_output_onto=direction), 1e-4
    )
    some, labels = cache.stack_neuron_results(2, neuron_slice=[4, 1], return_labels=True)
    assert labels == ["L0N4", "L0N1", "L1N4", "L1N1"]
    assert close(some[2], whole[model.info.mlp + 4])
    one, labels = cache.stack_neuron_results(1, neuron_slice=-1, return_labels=True)
    assert labels == [f"L0N{model.info.mlp - 1}"]
    assert close(one[0], whole[model.info.mlp - 1])


# The same everywhere.


def measure(cache, inputs):
    heads, parts = cache.stack_head_results(), cache.decompose_resid()
    ids = to_numpy(inputs.input_ids)[:, -2:]
    return {
        "accumulated": cache.accumulated_resid(incl_mid=True, apply_ln=True),
        "parts": parts,
        "heads": heads,
        "full": cache.get_full_resid_decomposition(3, mlp_input=True, expand_neurons=False, apply_ln=True),
        "word": cache.logit_attrs(heads, "click"),
        "rows": cache.logit_attrs(parts, ["click", " red"], [5, 6]),
        "places": cache.logit_attrs(parts, ids),
        "one row": cache.logit_attrs(parts, 5, batch_slice=1, pos_slice=-1)
        if parts.ndim == 3
        else cache.logit_attrs(cache.decompose_resid(pos_slice=-1), 5, batch_slice=1, pos_slice=-1),
        "z": cache.stack_activation("z"),
    }


def test_the_same_in_process_and_remotely(hooked, remote, remote_numpy, screenshot):
    found = []
    for model in (hooked, remote, remote_numpy):
        inputs = model.prepare_messages_batch(["Click on the red circle", "Say hello to the world"], [screenshot, None])
        cache, _ = captured(model, inputs, positions=[-2, -1])
        found.append(measure(cache, inputs))
        assert cache.context.info.layers == 5
        assert cache.context.resolve(None) is model
    for name, ours in found[0].items():
        assert torch.equal(found[1][name], ours), name
        assert isinstance(found[2][name], np.ndarray)
        assert close(found[2][name], ours), name
    assert to_numpy(found[0]["rows"]).shape == (11, 2, 2)
    per_row = to_numpy(found[0]["places"])[:, 1, 0]
    alone = hooked.prepare_messages("Say hello to the world")
    single, _ = captured(hooked, alone, positions=[-2])
    expected = single.logit_attrs(single.decompose_resid(), int(alone.input_ids[0, -2]))[:, 0, 0]
    assert close(per_row, expected, 1e-4)


def test_neurons_need_weights(remote, inputs, hooked):
    cache, _ = captured(remote, remote.prepare_messages("Say hello"), [*STREAMS, *NEURONS], positions="last")
    with pytest.raises(vs.SpectraError, match="in process"):
        cache.stack_neuron_results(1)
    given = cache.stack_neuron_results(1, model=hooked)
    assert close(given.sum(0), cache["mlp_out", 0])


# Rows, types, names.


@pytest.fixture(scope="module")
def batch(hooked, screenshot, photo):
    inputs = hooked.prepare_messages_batch(
        ["Click on the red circle", "What has changed?", "Say hello"], [screenshot, [photo, screenshot], None]
    )
    return captured(hooked, inputs, [*STREAMS, "lm.blocks.*.attn.hook_pattern", "vision.hook_out"])[0]


def test_rows_of_a_batch(batch):
    row = batch.apply_slice_to_batch_dim(1)
    assert torch.equal(row["lm.blocks.2.hook_resid_post"], batch["lm.blocks.2.hook_resid_post"][1])
    assert row["lm.blocks.0.attn.hook_pattern"].ndim == 3
    assert not row.context.has_batch_dim
    assert torch.equal(row["vision.hook_out"], batch["vision.hook_out"][1:])
    assert [image.row for image in row.context.images] == [0, 0]
    assert row.image_positions(0) == batch.image_positions(1)
    assert row.decompose_resid().ndim == 3
    some = batch.apply_slice_to_batch_dim([2, 0])
    assert torch.equal(some["resid_post", -1], batch["resid_post", -1][[2, 0]])
    assert [image.row for image in some.context.images] == [1]
    assert some.context.token_labels[0] == batch.context.token_labels[2]
    assert len(batch.apply_slice_to_batch_dim((1, 3)).context.token_labels) == 2
    with pytest.raises(vs.SpectraError, match="3 rows"):
        batch.apply_slice_to_batch_dim(3)
    with pytest.raises(vs.SpectraError, match="3 rows"):
        batch.remove_batch_dim()
    with pytest.raises(vs.SpectraError, match="no batch axis"):
        row.apply_slice_to_batch_dim(0)


def test_without_its_batch_axis_a_cache_says_the_same(hooked, inputs):
    cache, _ = captured(hooked, inputs)
    before = measure_one(cache)
    assert cache.remove_batch_dim() is cache
    assert cache["resid_post", 0].ndim == 2
    assert cache.remove_batch_dim() is cache
    after = measure_one(cache)
    for name in before:
        assert torch.equal(before[name][:, 0], after[name]), name


def measure_one(cache):
    heads = cache.stack_head_results(apply_ln=True, incl_remainder=True)
    return {
        "heads": heads,
        "full": cache.get_full_resid_decomposition(2),
        "resid": cache.accumulated_resid(apply_ln=True),
        "logits": cache.logit_attrs(cache.decompose_resid(), "click"),
        "places": cache.logit_attrs(cache.decompose_resid(pos_slice=[1, 2, 3]), [4, 5, 6], pos_slice=[1, 2, 3]),
    }


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_types_and_devices(hooked, inputs, kind):
    cache, _ = captured(hooked, inputs, ["lm.blocks.*.hook_mlp_out", "lm.hook_embed", "lm.blocks.*.hook_attn_out"])
    cache = cache.to_numpy() if kind == "numpy" else cache
    exact = cache.decompose_resid().sum(0)
    assert cache.to("cpu", dtype="bfloat16") is cache
    assert all(str(array.dtype).endswith("bfloat16") for array in cache.values())
    assert close(cache.to(torch.float32).decompose_resid().sum(0), exact, 0.05)
    assert not close(cache.decompose_resid().sum(0), exact, 1e-5)
    with pytest.raises(vs.SpectraError, match="cannot be cast to int64"):
        cache.to("int64")
    if kind == "numpy":
        with pytest.raises(vs.SpectraError, match="to_torch"):
            cache.to("cuda")


def test_short_names(hooked, inputs):
    cache, _ = captured(hooked, inputs, [*ALL, "lm.blocks.*.attn.hook_scores"])
    assert cache["resid_post", -1] is cache["lm.blocks.4.hook_resid_post"]
    assert cache["attn_scores", 1] is cache["lm.blocks.1.attn.hook_scores"]
    assert cache["scale", 2, "ln2"] is cache["lm.blocks.2.ln2.hook_scale"]
    assert cache[("embed",)] is cache["lm.hook_embed"]
    assert torch.equal(cache.stack_activation("result", 2), cache.stack("lm.blocks.[01].attn.hook_head_out"))
    for wrong in (("nonsense", 1), ("resid_post", 9), (1, 2)):
        with pytest.raises(vs.SpectraError):
            cache[wrong]


# What is missing, and what is not possible.


@pytest.mark.parametrize(
    ("hooks", "call", "part"),
    [
        (
            "lm.hook_embed",
            lambda c: c.decompose_resid(),
            r"run_with_cache\(\['lm.hook_embed', 'lm.blocks.\*.hook_attn_out'",
        ),
        ("lm.hook_embed", lambda c: c.accumulated_resid(), r"lm.blocks.\*.hook_resid_pre"),
        ("lm.hook_embed", lambda c: c.stack_head_results(), "attn.hook_head_out"),
        ("lm.hook_embed", lambda c: c.stack_neuron_results(1), "mlp.hook_post"),
        ("lm.hook_embed", lambda c: c.apply_ln_to_stack(c["lm.hook_embed"][None]), "lm.ln_final.hook_scale"),
        ("lm.hook_embed", lambda c: c.apply_ln_to_stack(c["lm.hook_embed"][None], 1), r"lm.blocks.\*.ln1.hook_scale"),
        ("lm.hook_embed", lambda c: c.stack_activation("z"), r"lm.blocks.\*.attn.hook_z"),
        (STREAMS, lambda c: c.decompose_resid(6), "possible are 0 to 5"),
        (STREAMS, lambda c: c.decompose_resid(5, mlp_input=True), "layer from 0 to 4"),
        (STREAMS, lambda c: c.decompose_resid(mode="heads"), "all, mlp, attn"),
        (STREAMS, lambda c: c.decompose_resid(pos_slice=999), "out of range"),
        (STREAMS, lambda c: c.decompose_resid(pos_slice="last"), "pos_slice is an int"),
        (ALL, lambda c: c.logit_attrs(c.decompose_resid(), 1.5), "texts or ids"),
        (ALL, lambda c: c.logit_attrs(c.decompose_resid(), "two words"), "tokens"),
        (ALL, lambda c: c.logit_attrs(c.decompose_resid(), [1, 2], 3), "as many"),
        (ALL, lambda c: c.logit_attrs(c.decompose_resid(pos_slice=(0, 3)), 1), "same pos_slice"),
    ],
)
def test_what_is_not_possible_is_said(hooked, inputs, hooks, call, part):
    cache, _ = captured(hooked, inputs, hooks)
    with pytest.raises(vs.errors.InvalidInputError, match=part):
        call(cache)


def test_a_hook_that_the_family_has_not_is_not_asked_for():
    model = zoo.load("aya_vision")
    cache, _ = captured(model, model.prepare_messages("Say hello"), ["lm.hook_embed", "lm.blocks.*.hook_resid_pre"])
    with pytest.raises(vs.SpectraError, match="the aya_vision model has no hook_resid_mid"):
        cache.accumulated_resid(incl_mid=True)


def test_a_saved_cache_has_all_but_the_model(hooked, inputs, tmp_path):
    cache, _ = captured(hooked, inputs, positions="last")
    cache.save(tmp_path / "run.safetensors")
    again = vs.ActivationCache.load(tmp_path / "run.safetensors")
    assert again.context.info == hooked.info
    assert again.context.hooks == cache.context.hooks
    parts = cache.decompose_resid()
    assert torch.equal(again.decompose_resid(), parts)
    with pytest.raises(vs.SpectraError, match="model="):
        again.logit_attrs(parts, "click")
    assert torch.equal(again.logit_attrs(parts, "click", model=hooked), cache.logit_attrs(parts, "click"))
    with pytest.raises(vs.SpectraError, match="wide"):
        again.logit_attrs(parts, "click", model=zoo.load("llava"))
    for other in (pickle.loads(pickle.dumps(again)), copy.deepcopy(cache)):
        assert torch.equal(other.decompose_resid(), parts)


@pytest.mark.parametrize("where", ["hooked", "remote_numpy"])
def test_results_are_pickled_and_copied_but_no_model(where, request, screenshot):
    model = request.getfixturevalue(where)
    inputs = model.prepare_messages("Click on the red circle", screenshot)
    with model.run_with_cache(["lm.blocks.*.hook_resid_post"]) as cache:
        output = model.forward(inputs, logits_to_keep=1)
    expected = np.asarray(cache.stack("lm.blocks.*.hook_resid_post"))
    for copied in (lambda result: pickle.loads(pickle.dumps(result)), copy.deepcopy):
        assert np.array_equal(copied(cache).stack("lm.blocks.*.hook_resid_post"), expected)
        assert copied(cache).cost == cache.cost
        assert copied(output).top_tokens(3) == output.top_tokens(3)
        assert copied(inputs).token_labels == inputs.token_labels
        with pytest.raises(vs.SpectraError, match="open its own"):
            copied(model)


def test_another_process_connects_anew(remote, inputs, monkeypatch):
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: 0)
        with pytest.raises(vs.SpectraError, match="connect in each process"):
            remote.generate(inputs, 1)
    assert remote.generate(inputs, 1).text


def test_a_server_started_anew_shares_its_memory_again(server, screenshot):
    with vs.connect(server) as model:
        inputs = model.prepare_messages("Click on the red circle", screenshot)
        model._memory = LocalMemory("of-the-server-before")
        with model.run_with_cache("lm.hook_embed") as cache:
            model.forward(inputs, logits_to_keep=None)
        assert cache["lm.hook_embed"].shape[-1] == model.info.hidden


@pytest.mark.parametrize("dtype", dtypes.CASTS)
@pytest.mark.parametrize("kind", ["torch", "numpy", None])
def test_a_saved_cache_is_read_with_pytorch_and_without(hooked, inputs, tmp_path, monkeypatch, dtype, kind):
    with hooked.run_with_cache(["lm.hook_embed", "lm.ln_final.hook_scale"], dtype=dtype) as cache:
        hooked.forward(inputs, logits_to_keep=None)
    cache.save(tmp_path / "run.safetensors")
    expected = {name: to_numpy(array) for name, array in cache.items()}
    with monkeypatch.context() as without:
        if kind is None:
            without.setitem(sys.modules, "torch", None)
        again = vs.ActivationCache.load(tmp_path / "run.safetensors", kind)
        assert all(isinstance(array, torch.Tensor if kind == "torch" else np.ndarray) for array in again.values())
    assert again.names == cache.names
    for name, array in again.items():
        assert dtypes.name_of(array.dtype) == dtype
        assert np.array_equal(to_numpy(array), expected[name])


def test_a_saved_file_is_whole_readable_and_where_its_link_leads(hooked, inputs, tmp_path, monkeypatch):
    cache, _ = captured(hooked, inputs, ["lm.hook_embed"])
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "run.safetensors", tmp_path / "run.safetensors"
    link.symlink_to(target)
    cache.save(link)
    before = target.read_bytes()
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    for path, part in ((link, "No space left"), (tmp_path / "no" / "run", "no directory"), (tmp_path, "a directory")):
        with pytest.raises(vs.SpectraError, match=part):
            cache.save(path)
    assert target.read_bytes() == before
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    "change", [{"vlm_spectra": "[]"}, {"order": "3"}, {"order": '["no such"]'}, {"vlm_spectra": None}]
)
def test_a_file_of_something_else_is_refused(hooked, inputs, tmp_path, change):
    cache, _ = captured(hooked, inputs, ["lm.hook_embed"])
    whole = {"vlm_spectra": json.dumps(cache.context.to_json()), "order": json.dumps(cache.names)}
    tensors = {name: np.asarray(array) for name, array in cache.items()}
    kept = {name: text for name, text in (whole | change).items() if text is not None}
    safetensors.numpy.save_file(tensors, tmp_path / "file", metadata=kept)
    with pytest.raises(vs.SpectraError, match="not a cache that this version"):
        vs.ActivationCache.load(tmp_path / "file")


def test_selected_heads_keep_their_numbers(hooked, inputs):
    whole, _ = captured(hooked, inputs, HEADS[0], positions="last")
    some, _ = captured(hooked, inputs, HEADS[0], positions="last", heads=[4, 1])
    stack, labels = some.stack_head_results(2, return_labels=True)
    assert labels == ["L0H4", "L0H1", "L1H4", "L1H1"]
    assert torch.equal(stack, whole.stack_head_results(2)[[4, 1, 10, 7]])
