"""Every example runs as it stands, against a server and, with one line changed, in process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
PRODUCTS = {
    "quickstart": ["patches.png"],
    "logit_lens": ["lens.html", "lens.png"],
    "attention": ["attention_heads.png", "attention.png", "attention_layers.html"],
    "attribution": ["attribution.png", "heads.png", "occlusion.png"],
    "interventions": ["cuts.png"],
    "patching": ["moved.png", "patching.png", "patching_image.png"],
    "two_clients": [],
}
REMOTE, LOCAL = 'vs.connect("localhost:50051")', 'vs.HookedVLM.from_pretrained("spectra-tiny")'


@pytest.fixture
def at_screenshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the screenshot in it, to work in."""
    shutil.copy(EXAMPLES / "screenshot.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, source: str, directory: Path) -> None:
    """Run an example and look at what it made."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, f"{name}.py", "exec"), namespace)
    made = sorted(path.name for path in directory.iterdir() if path.name != "screenshot.png")
    assert made == sorted(PRODUCTS[name])
    for path in directory.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 2, f"{path.name} is blank"
    for path in directory.glob("*.html"):
        page = path.read_text("utf-8")
        assert page.startswith("<!doctype html>")
        assert "http://" not in page
        assert "https://" not in page
    if name == "two_clients":
        assert [(len(texts), len(set(texts))) for texts in namespace["found"].values()] == [(3, 1), (3, 1)]
    if name == "attribution":
        assert abs(namespace["why"].residual[0]) < 1e-3
    if name == "patching":
        assert namespace["sweep"].values.shape == (namespace["model"].info.layers, len(namespace["places"]) + 1)


def test_all_are_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PRODUCTS, "demo"}


@pytest.mark.parametrize("name", PRODUCTS)
def test_remotely(name: str, server: str, at_screenshot: Path) -> None:
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert source.count("localhost:50051") == 1
    run(name, source.replace("localhost:50051", server), at_screenshot)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "two_clients"])
def test_in_process_with_one_line_changed(name: str, hooked: object, at_screenshot: Path) -> None:
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert source.count(f"\nmodel = {REMOTE}\n# model = {LOCAL}") == 1
    namespace_line = f'model = {LOCAL[:-1]}, device="cpu")'
    run(name, source.replace(f"model = {REMOTE}", namespace_line), at_screenshot)
