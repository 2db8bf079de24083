"""`vlm-spectra check`: a sound model passes; a broken one fails with its row named, and a server does not take it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
import vlm_spectra as vs
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from vlm_spectra.errors import InvalidInputError, NotSupportedError
from vlm_spectra_server import check, cli
from vlm_spectra_server.analysis import direct, gradients
from vlm_spectra_server.families.qwen import Qwen25VL
from vlm_spectra_server.hooked import attention
from vlm_spectra_server.hooked.reading import Reading
from vlm_spectra_server.hooked.run import Capture, Run
from vlm_spectra_server.spectra_tiny import DIRECTORY

ALTERED = """
def altered(plain):
    def forward(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        return (output[0] * 1.001, *output[1:]) if isinstance(output, tuple) else output * 1.001
    return forward
"""
"""A block that changes the stream where no hook sees it."""


def altered(plain):
    scope: dict = {}
    exec(ALTERED, scope)
    return scope["altered"](plain)


@pytest.fixture
def short(monkeypatch):
    """The command, with the rows that a loading server measures."""
    monkeypatch.setattr(check, "run_check", partial(check.run_check, names=check.SHORT))


def broken() -> vs.HookedVLM:
    return vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu")


def test_the_embedded_model_holds_every_row(capsys):
    assert cli.main(["check", "spectra-tiny", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["dtype"] == "float32"
    assert [row["name"] for row in found["rows"]] == list(check.RELATIONS) == list(check.TOLERANCES["float32"])
    for row in found["rows"]:
        assert row["figure"] is not None, row["name"]
        assert row["figure"] <= row["allowed"], row["name"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_holds_the_short_form(dtype):
    model = vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu", dtype=dtype)
    rows = {row.name: row for row in check.run_check(model, names=check.SHORT)}
    assert all(row.ok for row in rows.values())
    assert rows["heads"].figure > 1e-5  # as in float32 it would not do


def test_the_short_form_is_short(hooked):
    assert check.refuse_if_broken(hooked) > 0
    assert set(check.SHORT) <= set(check.RELATIONS)
    assert "direct" not in check.SHORT
    assert "integration" not in check.SHORT


def test_an_image_and_an_altered_block(monkeypatch, short, capsys, tmp_path, screenshot):
    picture = tmp_path / "screen.png"
    screenshot.resize((320, 200)).save(picture)
    arguments = ["check", "spectra-tiny", "--device", "cpu", "--image", str(picture)]
    assert cli.main(arguments) == 0
    assert "all rows hold" in capsys.readouterr().out
    monkeypatch.setattr(Qwen2_5_VLDecoderLayer, "forward", altered(Qwen2_5_VLDecoderLayer.forward))
    assert cli.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "FAILS" in line] == ["stream"]
    assert lines[-1].startswith("stream: not as it must be")
    assert cli.main([*arguments[:-1], str(tmp_path / "none.png")]) == 1
    assert "none.png" in capsys.readouterr().err


def test_a_role_that_points_at_the_wrong_module_is_found(monkeypatch):
    monkeypatch.setattr(Qwen25VL, "parts", {"ln2": "input_layernorm"})
    model = broken()
    failed = [row.name for row in check.run_check(model, names=check.SHORT) if not row.ok]
    assert "stream" in failed
    with pytest.raises(NotSupportedError, match=r"fails its check.*stream \(resid_pre \+ attn_out"):
        check.refuse_if_broken(model)


def scaled(plain):
    """The function, its tensor a thousandth larger."""
    return lambda *args, **kwargs: plain(*args, **kwargs) * 1.001


def unpadded(prepare):
    """A batch in which padding is read like anything else."""

    def changed(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        inputs.tensors["attention_mask"] = torch.ones_like(inputs.tensors["attention_mask"])
        return inputs

    return changed


SPOILT = {
    "logits": (attention, "_look", scaled),
    "finite": (Capture, "finished", lambda plain: lambda capture, part: plain(capture, part) / 0.0),
    "stream": (Qwen2_5_VLDecoderLayer, "forward", altered),
    "heads": (Reading, "head_weights", scaled),
    "rows": (attention, "softmax", scaled),
    "pattern": (attention, "softmax", lambda plain: lambda scores: plain(scores * 1.01)),
    "lens": (Reading, "finish", scaled),
    "direct": (Reading, "folded_unembedding", scaled),
    "sources": (direct, "_sources", scaled),
    "edits": (Run, "edited", lambda plain: lambda run, name, tensor, start=None: tensor),
    "integration": (gradients, "_integral", lambda plain: lambda *args: plain(*args) * 1.1),
    "batch": (vs.HookedVLM, "prepare_messages_batch", unpadded),
}
"""What spoils each relation: where, which function, and how it is changed."""


def test_every_relation_can_be_spoilt(monkeypatch, hooked):
    assert list(SPOILT) == list(check.RELATIONS)
    monkeypatch.setattr(gradients, "MOST_STEPS", 16)
    for name, (owner, function, change) in SPOILT.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, change(getattr(owner, function)))
            model = broken() if name == "stream" else hooked
            (row,) = check.run_check(model, names=[name])
        assert not row.ok, name
        assert row.figure > row.allowed
    assert all(row.ok for row in check.run_check(hooked, names=check.SHORT))


def test_a_relation_that_does_not_apply_says_why(monkeypatch, hooked):
    names = {name: spec for name, spec in hooked.catalogue.by_name.items() if "hook_pattern" not in name}
    monkeypatch.setattr(hooked.catalogue, "by_name", names)
    (row,) = check.run_check(hooked, names=["rows"])
    assert (row.figure, row.ok) == (None, True)
    assert "no layer has a pattern" in row.note
    assert "n/a" in check.table([row])


def test_a_server_refuses_a_broken_model(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif any('serving.worker' in each for each in sys.orig_argv):\n"
        "    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer as Layer\n"
        + textwrap.indent(ALTERED, "    ")
        + "    Layer.forward = altered(Layer.forward)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port", "0", "--device", "cpu"]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    assert found.returncode == 1
    said = found.stderr.strip().splitlines()[-1]
    assert "fails its check" in said
    assert "stream" in said
    assert not found.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spectra-tinny", "is it spectra-tiny"),
        ("/nowhere/at/all", "no such directory"),
        ("nonexistent", "no such directory, and on the hub a name is owner/name"),
        ("a/b/c", "no such directory"),
        ("no/such-model", "does not answer: ConnectionError"),
        ("x\0y/z", "no such directory"),
        ("y" * 5000, "no such directory"),
    ],
)
def test_a_name_that_is_none_is_told_at_once(monkeypatch, capfd, name, words):
    """One sentence, nothing else: no attempt where no answer could help, and one where the hub does not answer."""
    from huggingface_hub import HfApi, constants

    asked = []

    def unreachable(api, repository, **options):
        asked.append(repository)
        raise ConnectionError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    assert cli.main(["check", name, "--device", "cpu"]) == 1
    said = capfd.readouterr()
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not said.out
    assert asked == ([name] if name == "no/such-model" else [])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", "SafetensorError"),
        ("tokenizer.json", None, "makes no tokens of a text"),
        ("tokenizer.json", b"{}", "KeyError"),
        ("chat_template.jinja", b"{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, capsys, file, content, words):
    damaged = tmp_path / "damaged"
    shutil.copytree(DIRECTORY, damaged, copy_function=os.symlink)
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_bytes(content)
    assert cli.main(["check", str(damaged), "--device", "cpu"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"vlm-spectra: the model '{damaged}' cannot be loaded: ")
    assert words in said
    with pytest.raises(InvalidInputError, match=words):
        vs.HookedVLM.from_pretrained(str(damaged), device="cpu")


def test_a_device_without_values_is_refused(capsys):
    assert cli.main(["check", "spectra-tiny", "--device", "meta"]) == 1
    assert "device 'meta' is not possible here" in capsys.readouterr().err
