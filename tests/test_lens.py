"""The logit lens: the model's own reading of any vector, whatever the family, the block sizes and where it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vlm_spectra as vs
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from vlm_spectra.analyses import LensOptions
from vlm_spectra.arrays import to_numpy
from vlm_spectra_server.analysis import lens as server_lens

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "aya_vision", "llava")
TOP = 7


def close(one, other, tolerance=1e-4):
    one, other = torch.as_tensor(to_numpy(one)).double(), torch.as_tensor(to_numpy(other)).double()
    return bool(((one - other).abs() <= tolerance * max(1.0, float(other.abs().max()))).all())


def logits_of(model, inputs, hook, layers):
    """[layers, b, s, vocab] float64: the model's own logits when a vector stands in the place of its last stream."""
    with model.run_with_cache([f"lm.blocks.{layer}.{hook}" for layer in layers]) as cache:
        model.forward(inputs, logits_to_keep=None)
    last = f"lm.blocks.{model.info.layers - 1}.hook_resid_post"
    found = []
    for layer in layers:
        with model.run_with_hooks([(last, vs.PatchActivation(cache[f"lm.blocks.{layer}.{hook}"]))]):
            found.append(torch.as_tensor(to_numpy(model.forward(inputs).logits)).double())
    return torch.stack(found)


def check(lens, logits):
    """Everything that a lens says, against whole distributions: [layers, b, s, vocab], the last the model's."""
    assert close(lens.logits, logits.topk(lens.logits.shape[-1]).values)
    assert close(logits.gather(-1, lens.token_ids), lens.logits)
    logs = logits.log_softmax(-1)
    assert lens.probs.dtype == torch.float32
    assert close(lens.probs, logs.exp().gather(-1, lens.token_ids), 1e-5)
    assert close(lens.entropy, -(logs.exp() * logs).sum(-1))
    assert close(lens.kl_to_final, (logs[-1].exp() * (logs[-1] - logs)).sum(-1))
    assert bool((lens.kl_to_final >= 0).all())
    targets = lens.target_ids.expand(len(logits), -1, -1, -1)
    values = logits.gather(-1, targets)
    assert close(lens.target_logits, values)
    assert close(lens.target_probs, logs.exp().gather(-1, targets), 1e-5)
    # Exact, but for tokens that rounding cannot tell from the target.
    slack = 2e-5 * float(logits.abs().max())
    for t in range(targets.shape[-1]):
        surely = (logits > values[..., t : t + 1] + slack).sum(-1)
        perhaps = (logits > values[..., t : t + 1] - slack).sum(-1) - 1
        assert bool(((surely <= lens.ranks[..., t]) & (lens.ranks[..., t] <= perhaps)).all())
        assert float((perhaps - surely).double().mean()) < 0.2


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = zoo.load(request.param)
    inputs = model.prepare_messages("What is on the screen?", zoo.wide())
    return model, inputs, logits_of(model, inputs, "hook_resid_post", range(model.info.layers))


def test_a_lens_reads_what_the_model_would(family):
    model, inputs, logits = family
    check(model.logit_lens(inputs, top_k=TOP, targets=[3, 40]), logits)


def test_the_last_layer_is_the_model(family):
    model, inputs, logits = family
    lens = model.logit_lens(inputs, top_k=model.info.vocab, layers=[-1])
    whole = torch.empty(logits.shape[1:]).scatter(-1, lens.token_ids[0], lens.logits[0])
    assert close(whole, model.forward(inputs).logits, 1e-5)
    assert close(lens.probs.sum(-1), torch.ones_like(lens.entropy), 1e-5)
    assert lens.kl_to_final.max() == 0
    assert lens.target_ids[0, :, 0].tolist() == lens.token_ids[0, 0, :, 0].tolist()
    assert lens.ranks.max() == 0


@pytest.mark.parametrize("positions", [1, 3])
def test_blocks_and_slices_leave_no_trace(family, monkeypatch, positions):
    model, inputs, logits = family
    whole = model.logit_lens(inputs, top_k=TOP)
    monkeypatch.setattr(server_lens, "BLOCK_BYTES", positions * 4 * model.info.vocab * model.info.layers)
    monkeypatch.setattr(server_lens, "SLICE", 7 * positions)
    cut = model.logit_lens(inputs, top_k=TOP)
    check(cut, logits)
    for name in ("logits", "probs", "entropy", "kl_to_final", "target_logits", "target_probs"):
        assert close(getattr(cut, name), getattr(whole, name), 1e-5), name
    assert (cut.token_ids == whole.token_ids).double().mean() > 0.99
    assert (cut.ranks - whole.ranks).abs().max() <= 1


class Largest(TorchDispatchMode):
    """The largest tensor that is made, views of a weight aside."""

    def __init__(self, weight):
        super().__init__()
        self.numel, self.weight = 0, weight.data_ptr()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for each in output if isinstance(output, tuple | list) else [output]:
            if isinstance(each, torch.Tensor) and each.data_ptr() != self.weight:
                self.numel = max(self.numel, each.numel())
        return output


def test_memory_holds_one_block(hooked, inputs, monkeypatch):
    vocab, layers = hooked.info.vocab, hooked.info.layers
    monkeypatch.setattr(server_lens, "BLOCK_BYTES", 4 * 4 * vocab * layers)
    with hooked.run_with_cache("lm.blocks.*.hook_resid_post") as cache:
        hooked.forward(inputs, logits_to_keep=None)
    streams = list(cache.values())
    with Largest(hooked.reading.unembedding.weight) as mode, torch.no_grad():
        options = LensOptions.checked(hooked.catalogue, hooked.info, TOP, "hook_resid_post", None, None, None)
        server_lens.read(hooked.reading, hooked.processor.tokenizer, options, streams, streams[-1])
    assert mode.numel == 4 * vocab * layers
    assert inputs.input_ids.shape[1] > 20


# What can be read.


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_in"])
def test_any_vector_of_a_layer_can_be_read(hooked, inputs, hook):
    layers = [1, 3]
    last = hooked.forward(inputs).logits.double()[None]
    logits = torch.cat([logits_of(hooked, inputs, hook, layers), last])
    lens = hooked.logit_lens(inputs, hook=hook, layers=layers, top_k=TOP, targets=["click"])
    assert lens.layers == layers
    assert lens.hook == hook
    assert close(lens.logits, logits[:-1].topk(TOP).values)
    logs = logits.log_softmax(-1)
    assert close(lens.kl_to_final, (logs[-1].exp() * (logs[-1] - logs[:-1])).sum(-1))
    assert lens.kl_to_final.max() > 0.1


def test_the_hook_may_be_a_wildcard(hooked, inputs):
    one = hooked.logit_lens(inputs, hook="lm.blocks.*.attn.hook_out", positions="last")
    other = hooked.logit_lens(inputs, hook="attn.hook_out", positions="last")
    assert torch.equal(one.logits, other.logits)


def test_a_hook_that_some_layers_have():
    model = zoo.load("qwen3_vl")
    inputs = model.prepare_messages("What is on the screen?", zoo.wide())
    lens = model.logit_lens(inputs, hook="hook_deepstack", positions="image")
    assert 0 < len(lens.layers) < model.info.layers
    with pytest.raises(vs.SpectraError, match="only in layers"):
        model.logit_lens(inputs, hook="hook_deepstack", layers=[-1])


@pytest.mark.parametrize("hook", ["attn.hook_pattern", "attn.hook_z", "lm.hook_embed", "hook_resid", 3])
def test_a_hook_that_is_no_stream(hooked, inputs, hook):
    with pytest.raises(vs.SpectraError, match=r"possible are .*hook_resid_post"):
        hooked.logit_lens(inputs, hook=hook)


def test_in_half_precision_the_answer_is_first(screenshot):
    model = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", dtype="bfloat16")
    inputs = model.prepare_messages("Click on the red circle", screenshot)
    lens = model.logit_lens(inputs, layers=[-1], top_k=model.info.vocab)
    assert lens.probs.dtype == torch.float32
    assert close(lens.probs.sum(-1), torch.ones_like(lens.entropy), 1e-5)
    assert lens.ranks.max() == 0
    logits = model.forward(inputs).logits
    assert torch.equal(lens.target_ids[..., 0], logits.argmax(-1))


def test_interventions_reach_the_lens(hooked, inputs):
    with hooked.run_with_hooks([("lm.blocks.1.hook_mlp_out", vs.ZeroAblation())]):
        lens = hooked.logit_lens(inputs, hook="hook_mlp_out", positions="last")
    assert lens.entropy[1, 0, 0] == pytest.approx(np.log(hooked.info.vocab), abs=1e-4)


# As a table, and the same everywhere.


def test_the_lens_as_a_frame(hooked, screenshot):
    inputs = hooked.prepare_messages_batch(["Click on the red circle", "Say hello"], [screenshot, None])
    lens = hooked.logit_lens(inputs, top_k=3, positions=[-2, -1], targets=["click", 5])
    frame = lens.to_dataframe()
    assert len(frame) == 5 * 2 * 2 * 3
    row = frame[(frame.layer == 3) & (frame.row == 1) & (frame.position == lens.positions[1][0]) & (frame["rank"] == 2)]
    assert row.token.item() == lens.tokens[3][1][0][2]
    assert row.token_id.item() == lens.token_ids[3, 1, 0, 2]
    assert row.prob.item() == lens.probs[3, 1, 0, 2]
    assert row.label.item() == inputs.token_labels[1][-2]
    assert row.kl_to_final.item() == lens.kl_to_final[3, 1, 0]
    followed = lens.to_dataframe(of="targets")
    assert len(followed) == 5 * 2 * 2 * 2
    row = followed[(followed.layer == 2) & (followed.row == 0) & (followed.position == lens.positions[0][1])]
    assert row.token.tolist() == lens.target_tokens[0][1]
    assert row["rank"].tolist() == lens.ranks[2, 0, 1].tolist()
    assert row.prob.tolist() == lens.target_probs[2, 0, 1].tolist()
    with pytest.raises(vs.SpectraError, match="tokens, targets"):
        lens.to_dataframe(of="layers")


def test_the_lens_in_a_notebook(hooked, inputs):
    lens = hooked.logit_lens(inputs, positions="last", top_k=2)
    text = lens._repr_html_()
    assert text.count("<tr") >= hooked.info.layers
    assert "<script" not in text


def test_the_same_behind_a_server(hooked, remote, remote_numpy, inputs, screenshot):
    options = {"hook": "attn.hook_out", "layers": [0, -1], "positions": ["image", -1], "targets": ["click"]}
    ours = hooked.logit_lens(inputs, **options)
    for model in (remote, remote_numpy):
        theirs = model.logit_lens(model.prepare_messages("Click on the red circle", screenshot), **options)
        assert theirs.tokens == ours.tokens
        for name in ("token_ids", "logits", "probs", "entropy", "kl_to_final", "ranks", "target_logits"):
            assert np.array_equal(to_numpy(getattr(theirs, name)), to_numpy(getattr(ours, name))), name
