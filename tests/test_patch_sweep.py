"""Sweeps of activation patching: every cell is the single call, and nothing but the metric crosses the wire."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vlm_spectra as vs
import zoo
from PIL import Image, ImageDraw
from vlm_spectra import errors
from vlm_spectra.analyses import SweepOptions
from vlm_spectra.arrays import to_numpy

PRE, Z = "lm.blocks.*.hook_resid_pre", "lm.blocks.*.attn.hook_z"


def screen(colour: str) -> Image.Image:
    image = Image.new("RGB", (112, 112), (40, 70, 120))
    ImageDraw.Draw(image).ellipse((30, 30, 80, 80), fill=colour)
    return image


@pytest.fixture(scope="module")
def clean(hooked):
    return hooked.prepare_messages("Click on the red circle", screen("red"))


@pytest.fixture(scope="module")
def corrupted(hooked):
    return hooked.prepare_messages("Click on the red circle", screen("blue"))


def single(model, inputs, source, hook, token, **where):
    """The metric of one forward pass with one activation of another prompt put in."""
    with model.run_with_cache(hook, **where) as cache:
        model.forward(source, None)
    with model.run_with_hooks([(hook, vs.PatchActivation(cache[hook], **where))]):
        return float(model.forward(inputs, 1).logits[0, 0, token])


@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_each_cell_is_the_single_call(hooked, clean, corrupted, mode):
    found = hooked.patch_sweep(clean, corrupted, [PRE, "lm.blocks.*.hook_mlp_out"], mode=mode, metric=" red")
    length = clean.input_ids.shape[1]
    assert found.values.shape == (2 * hooked.info.layers, length)
    assert found.columns == list(range(length))
    token = hooked.processor.tokenizer.encode(" red")[0]
    for prompt, value in ((clean, found.clean_value), (corrupted, found.corrupted_value)):
        assert abs(float(hooked.forward(prompt, 1).logits[0, 0, token]) - value) < 1e-4
    runs, gives = (corrupted, clean) if mode == "denoising" else (clean, corrupted)
    strongest = np.argsort(-np.abs(to_numpy(found.effect)).ravel())[:3]
    assert abs(float(found.effect.flatten()[strongest[0]])) > 1e-3
    cells = [divmod(int(cell), length) for cell in strongest]
    for row, column in [*cells, (0, length - 1), (2 * hooked.info.layers - 1, length - 1)]:
        expected = single(hooked, runs, gives, found.hooks[row], token, positions=column)
        assert abs(float(found.values[row, column]) - expected) < 1e-5 * max(1.0, abs(expected))


def test_each_head_is_the_single_call(hooked, clean, corrupted):
    found = hooked.patch_sweep(clean, corrupted, Z, heads="all")
    assert found.values.shape == (hooked.info.layers, hooked.info.heads)
    assert found.axis == "heads"
    token = int(hooked.forward(clean, 1).logits[0, 0].argmax())
    assert found.target_tokens == hooked._texts([token])
    for layer, head in ((0, 0), (2, 5)):
        expected = single(hooked, corrupted, clean, found.hooks[layer], token, heads=[head])
        assert abs(float(found.values[layer, head]) - expected) < 1e-5 * max(1.0, abs(expected))
    last = hooked.patch_sweep(clean, corrupted, Z, "last", heads=[5, 0])
    expected = single(hooked, corrupted, clean, found.hooks[2], token, heads=[5], positions="last")
    assert abs(float(last.values[2, 0]) - expected) < 1e-5 * max(1.0, abs(expected))
    assert last.columns == [5, 0]


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "gemma3", "idefics3", "internvl"])
def test_each_cell_is_the_single_call_in_every_family(family):
    model = zoo.load(family)
    clean = model.prepare_messages("What is on this screen?", zoo.wide())
    corrupted = model.prepare_messages("What is on this screen?", zoo.wide().transpose(Image.Transpose.ROTATE_180))
    image = clean.images[0].raster[0]
    found = model.patch_sweep(clean, corrupted, ["lm.hook_embed", PRE, Z], [image, -1])
    token = int(model.forward(clean, 1).logits[0, 0].argmax())
    assert found.effect.abs().max() > 1e-4
    for row, hook in enumerate(found.hooks):
        if row % 2 == 0:
            expected = single(model, corrupted, clean, hook, token, positions=image)
            assert abs(float(found.values[row, 0]) - expected) < 1e-5 * max(1.0, abs(expected)), hook


def test_a_prompt_patched_with_itself_stays_as_it_is(hooked, clean):
    found = hooked.patch_sweep(clean, clean, ["lm.blocks.1.hook_resid_post", "lm.blocks.3.attn.hook_out"])
    assert found.effect.abs().max() < 1e-4
    assert not found.normalized.any()


def test_the_whole_difference_patched_restores_the_clean_answer(hooked):
    clean, corrupted = (hooked.prepare_messages(f"Click on the {word} circle") for word in ("red", "blue"))
    differ = np.flatnonzero(to_numpy(clean.input_ids != corrupted.input_ids)[0]).tolist()
    assert len(differ) == 1
    hooks = ["lm.hook_embed", "lm.blocks.0.hook_resid_pre", f"lm.blocks.{hooked.info.layers - 1}.hook_resid_post"]
    found = hooked.patch_sweep(clean, corrupted, hooks)
    assert abs(found.clean_value - found.corrupted_value) > 1e-2
    assert found.normalized[:2, differ[0]] == pytest.approx(1.0, abs=1e-4)
    assert found.normalized[2, -1] == pytest.approx(1.0, abs=1e-4)
    untouched = [i for i in range(len(found.columns)) if i != differ[0]]
    assert found.effect[:2, untouched].abs().max() < 1e-4
    assert found.effect[2, :-1].abs().max() < 1e-4


def test_interventions_hold_in_every_cell(hooked, clean, corrupted):
    hook = "lm.blocks.2.hook_resid_pre"
    steer = [
        (hook, vs.ScaleActivation(1.5)),
        ("lm.blocks.1.hook_mlp_out", vs.MeanAblation()),
        ("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys=[0])),
    ]
    token = int(hooked.forward(clean, 1).logits[0, 0].argmax())
    with hooked.run_with_hooks(steer):
        found = hooked.patch_sweep(clean, corrupted, hook, [-1, 5], metric=token)
        expected = single(hooked, corrupted, clean, hook, token, positions=5)
        assert abs(float(found.values[0, 1]) - expected) < 1e-4
    plain = hooked.patch_sweep(clean, corrupted, hook, [-1, 5], metric=token)
    assert abs(float(plain.corrupted_value - found.corrupted_value)) > 1e-3


def test_a_whole_answer_is_the_metric(hooked, clean, corrupted):
    answer = "Thought: red"
    found = hooked.patch_sweep(clean, corrupted, "lm.blocks.0.hook_resid_pre", "last", vs.Target(answer=answer))
    scored = hooked.attribute(clean, "gradient_x_input", vs.Target(answer=answer))
    assert found.clean_value == pytest.approx(float(scored.target_value[0]), abs=1e-3)
    assert "".join(found.target_tokens) == answer


@pytest.mark.parametrize("kind", ["remote", "remote_numpy"])
def test_remote_is_in_process_bit_for_bit(kind, request, hooked, clean, corrupted, monkeypatch):
    far = request.getfixturevalue(kind)
    received = []
    call = far._call

    def counted(*arguments):
        answers = call(*arguments)
        counts = (received.append(len(message)) or message for message in answers)

        class Counted:
            __iter__ = staticmethod(lambda: counts)
            cancel = answers.cancel

        return Counted()

    prompts = [far.prepare_messages("Click on the red circle", screen(colour)) for colour in ("red", "blue")]
    monkeypatch.setattr(far, "_call", counted)
    for hooks, options in ((PRE, {"positions": "text"}), (Z, {"heads": [1, 2], "mode": "noising"})):
        ours = hooked.patch_sweep(clean, corrupted, hooks, **options)
        theirs = far.patch_sweep(*prompts, hooks, **options)
        assert to_numpy(ours.values).tobytes() == to_numpy(theirs.values).tobytes()
        for field in ("clean_value", "corrupted_value", "columns", "hooks", "target_tokens", "labels"):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert 0 < sum(received) < 20_000  # 5 layers of 16 positions and of 2 heads: some hundred bytes a hook


def test_a_sweep_as_a_table(hooked, clean, corrupted):
    found = hooked.patch_sweep(clean, corrupted, PRE, "image")
    frame = found.to_dataframe()
    assert list(frame.columns) == ["hook", "position", "label", "value", "effect", "normalized"]
    assert len(frame) == 5 * 16
    row = frame.iloc[16 + 3]
    assert row["hook"] == "lm.blocks.1.hook_resid_pre"
    assert row["position"] == clean.images[0].positions[3]
    assert row["label"] == clean.token_labels[0][clean.images[0].positions[3]]
    assert row["value"] == pytest.approx(float(found.values[1, 3]))
    assert found.picture().panels[0].values.shape == (5, 16)
    grid = found.image_grid(1)
    assert torch.equal(grid.flatten(), found.normalized[1])
    hook, column, effect = found.top(1)[0]
    assert effect == pytest.approx(float(found.normalized.max()))
    assert found.normalized[found.hooks.index(hook), found.columns.index(column)] == found.normalized.max()


def test_what_is_not_possible(hooked, clean, corrupted):
    def refused(part, *arguments, **options):
        with pytest.raises(errors.SpectraError, match=part):
            hooked.patch_sweep(*arguments, **options)

    longer = hooked.prepare_messages("Click on the big red circle over there", screen("red"))
    refused("tokens", clean, longer, PRE)
    refused("batches", hooked.prepare_messages_batch(["a", "b"]), hooked.prepare_messages_batch(["a", "b"]), PRE)
    refused("language model", clean, corrupted, "vision.blocks.0.hook_resid_post")
    refused("heads", clean, corrupted, PRE, heads="all")
    refused("out of range", clean, corrupted, Z, heads=[6])
    refused("out of range", clean, corrupted, PRE, 500)
    refused("denoising", clean, corrupted, PRE, mode="sideways")
    refused("no hook", clean, corrupted, "lm.blocks.*.hook_nothing")


def test_a_sweep_ends_between_two_batches_when_its_caller_leaves(hooked, clean, corrupted):
    from vlm_spectra_server.hooked.delivery import Delivery

    class Leaving(Delivery):
        def progress(self, phase, done, total):
            self.done, self.total = done, total

        def check(self):
            if getattr(self, "done", 0):
                raise errors.CancelledError("gone")

    delivery = Leaving()
    options = SweepOptions.checked(hooked.catalogue, hooked.info, PRE, None, None, vs.Target(), "denoising")
    with pytest.raises(errors.CancelledError):
        hooked.sweep_into(delivery, clean, corrupted, options)
    assert 0 < delivery.done < delivery.total
