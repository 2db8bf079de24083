"""The README's Python blocks run, from top to bottom, against a real server."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run_blocks(first: str, replacement: str) -> dict[str, Any]:
    """Run all blocks in one namespace, after one replacement that must apply."""
    assert any(first in block for block in BLOCKS)
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block.replace(first, replacement), f"README.md, block {number + 1}", "exec"), namespace)
    return namespace


@pytest.fixture
def at_screenshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the screenshot in it, to work in."""
    shutil.copy(ROOT / "examples" / "screenshot.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(namespace: dict[str, Any], directory: Path, printed: str) -> None:
    click = namespace["answer"].clicks[0]
    assert 52 <= click.x < 122, "the README's first answer hits the Login button"
    assert 149 <= click.y < 179, "the README's first answer hits the Login button"
    assert "UNKNOWN_HOOK - layer 99" in printed
    assert (directory / "lens.html").read_text("utf-8").startswith("<!doctype html>")
    assert (directory / "run.safetensors").exists()


def test_remotely(server: str, at_screenshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = run_blocks("gpu-box:50051", server)
    assert type(namespace["model"]).__name__ == "RemoteVLM"
    check(namespace, at_screenshot, capsys.readouterr().out)


def test_in_process_with_one_line_changed(at_screenshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote, local = 'vs.connect("gpu-box:50051")', 'vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu")'
    namespace = run_blocks(remote, local)
    assert type(namespace["model"]).__name__ == "HookedVLM"
    check(namespace, at_screenshot, capsys.readouterr().out)
