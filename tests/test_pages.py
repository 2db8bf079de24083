"""Pages and pictures: whole, self-contained, and nothing that a prompt or a model says becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import vlm_spectra as vs
from PIL import Image
from vlm_spectra import pages

NASTY = '<script>alert(1)</script> & "it\'s"'


@pytest.fixture(scope="module")
def lens(hooked: vs.HookedVLM, screenshot: Image.Image) -> vs.LogitLens:
    wide = screenshot.resize((300, 180))
    inputs = hooked.prepare_messages_batch([NASTY, "Describe the screen."], [[screenshot, wide], None])
    lens = hooked.logit_lens(inputs, top_k=3)
    lens.tokens[0][0][-1][0] = NASTY
    labels = [[NASTY, *row[1:]] for row in inputs.token_labels]
    return replace(lens, inputs=replace(inputs, token_labels=labels))


def test_lens_page_escapes_everything(lens: vs.LogitLens) -> None:
    for page in (pages.lens_page(lens), pages.lens_section(lens)):
        assert "<script>alert" not in page
        assert "alert(1)</script>" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page


def test_lens_page_is_complete_and_loads_nothing(lens: vs.LogitLens) -> None:
    page = pages.lens_page(lens)
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<rect data-p=") == sum(len(image.positions) for image in lens.inputs.images)
    assert page.count("<tr><th>L") == 2 * len(lens.layers)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    padding = int((lens.inputs.attention_mask == 0).sum())
    assert padding > 0
    kept = sum(map(len, lens.positions)) - padding
    assert len(re.findall(r"<td class=s\d>", page)) == kept * len(lens.layers)


def test_writing_is_whole_or_refused(lens: vs.LogitLens, tmp_path: Path) -> None:
    lens.to_html(tmp_path / "lens.html")
    assert [file.name for file in tmp_path.iterdir()] == ["lens.html"]
    with pytest.raises(vs.SpectraError, match="no directory"):
        lens.to_html(tmp_path / "missing" / "lens.html")
    with pytest.raises(vs.SpectraError, match="is a directory"):
        pages.write_page(tmp_path, "")


def test_overlay_has_the_images_size(hooked: vs.HookedVLM, screenshot: Image.Image) -> None:
    wide = screenshot.resize((301, 180))
    inputs = hooked.prepare_messages("Click on the red circle", [screenshot, wide])
    why = hooked.attribute(inputs)
    assert pages.attribution_overlay(why, 0).size == screenshot.size
    assert pages.attribution_overlay(why, 1).size == (301, 180)
    assert pages.attribution_overlay(why, 1).tobytes() != wide.convert("RGB").tobytes()
    with pytest.raises(vs.SpectraError, match="no image 2"):
        pages.attribution_overlay(why, 2)


def test_report_tells_the_run(hooked: vs.HookedVLM, screenshot: Image.Image) -> None:
    inputs = hooked.prepare_messages(NASTY, screenshot)
    answer = hooked.generate(inputs, max_new_tokens=4)
    with hooked.run_with_cache("lm.blocks.*.hook_resid_post") as cache:
        hooked.forward(inputs)
    lens, why = hooked.logit_lens(inputs, positions="last"), hooked.attribute(inputs)
    page = pages.report_page(answer, cache=cache, seconds=0.5, lens=lens, attribution=why, title=NASTY)
    assert "<script" not in page
    assert f"{cache.nbytes:,} bytes in 0.50 s" in page
    assert "layer 4 MLP" in page
