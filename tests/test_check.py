"""`vlm-spectra check`: a sound model passes; a broken one fails with its row named, and a server does not take it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import vlm_spectra as vs
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from vlm_spectra.errors import NotSupportedError
from vlm_spectra_server import check, cli
from vlm_spectra_server.families.qwen import Qwen25VL

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
    assert check.refuse_if_broken(hooked) < 60
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
