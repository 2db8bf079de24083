"""The pages: whole, self-contained, whatever a prompt or a model says stays text; and used in a real browser."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlm_spectra as vs
from PIL import Image
from vlm_spectra.images import Picture
from vlm_spectra.inputs import ImageLayout, Prompt, Tile
from vlm_spectra.pictures.lens_page import lens_page, lens_section
from vlm_spectra.pictures.markup import write_page
from vlm_spectra.pictures.report import report_page

NASTY = '<script>alert(1)</script> & "it\'s" </script><img src=x onerror=alert(2)>'
CHROMIUM = Path("/usr/bin/chromium")


def make_lens(
    labels: list[str], images: list[tuple[Image.Image, ImageLayout]], layers: int, k: int = 5, task: str = "Look."
) -> vs.LogitLens:
    """A lens of made-up readings: the word at layer l, position p, rank r is `w{(7 l + 3 p + r) % 997}`."""
    count = len(labels)
    ids = (
        7 * np.arange(layers)[:, None, None] + 3 * np.arange(count)[None, :, None] + np.arange(k)
    ) % 997  # [layers, seq, k]
    probs = 0.5 ** (1 + np.arange(k)) * np.linspace(0.2, 1, layers)[:, None, None] * np.ones((1, count, 1))
    tokens = [[[f" w{word}" for word in cell] for cell in layer] for layer in ids.tolist()]
    inputs = vs.Inputs(
        prompts=(Prompt(task, tuple(Picture.of(image) for image, _ in images)),),
        input_ids=np.zeros((1, count), dtype=np.int64),
        attention_mask=np.ones((1, count), dtype=np.int64),
        token_labels=[labels],
        images=tuple(layout for _, layout in images),
        text=[task],
    )
    steps = np.linspace(9, 1, layers)[:, None, None] * np.ones((1, 1, count))
    return vs.LogitLens(
        hook="hook_resid_post",
        inputs=inputs,
        layers=list(range(layers)),
        positions=[list(range(count))],
        token_ids=ids[:, None],
        tokens=[[layer] for layer in tokens],
        logits=np.log(probs)[:, None],
        probs=probs[:, None],
        entropy=steps,
        kl_to_final=steps - 1,
        target_ids=ids[-1:, :, :1],
        target_tokens=[[[cell[0]] for cell in tokens[-1]]],
        target_logits=np.log(probs[:, None, :, :1]),
        target_probs=probs[:, None, :, :1],
        ranks=np.arange(layers)[::-1, None, None, None] * np.ones((1, 1, count, 1), dtype=np.int64),
    )


@pytest.fixture(scope="module")
def lens(hooked: vs.HookedVLM, screenshot: Image.Image) -> vs.LogitLens:
    wide = screenshot.resize((300, 180))
    inputs = hooked.prepare_messages_batch([NASTY, "Describe the screen."], [[screenshot, wide], None])
    lens = hooked.logit_lens(inputs, top_k=3)
    lens.tokens[0][0][-1][0] = NASTY
    labels = [[NASTY, *row[1:]] for row in inputs.token_labels]
    return replace(lens, inputs=replace(inputs, token_labels=labels))


def page_data(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_lens_page_escapes_everything(lens: vs.LogitLens) -> None:
    for page in (lens_page(lens, NASTY), lens_section(lens)):
        assert "<script>alert" not in page
        assert "alert(1)</script>" not in page
        assert "<img src=x" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page
    data = page_data(lens_page(lens))
    assert NASTY in data["words"]
    assert data["rows"][0]["labels"][0] == NASTY


def test_lens_page_is_complete_and_loads_nothing(lens: vs.LogitLens) -> None:
    page = lens_page(lens)
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<rect data-p=") == sum(len(image.positions) for image in lens.inputs.images)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"base64,[\w+/=]+|\"words\":\"[\w+/=]+", "", page)
    data = page_data(page)
    padding = int((lens.inputs.attention_mask == 0).sum())
    assert padding > 0
    assert sum(len(row["positions"]) for row in data["rows"]) == sum(map(len, lens.positions)) - padding
    row = data["rows"][0]
    words = np.frombuffer(base64.b64decode(row["words"]), "<u2").reshape(len(lens.layers), -1, 3)
    probs = np.frombuffer(base64.b64decode(row["probs"]), "<u2").reshape(len(lens.layers), -1, 3) / 65535
    columns = [lens.positions[0].index(position) for position in row["positions"]]
    for i, layer in enumerate(reversed(range(len(lens.layers)))):
        assert data["layers"][i] == str(layer)
        assert [[data["words"][w] for w in cell] for cell in words[i]] == [lens.tokens[layer][0][j] for j in columns]
        assert np.abs(probs[i] - np.asarray(lens.probs)[layer, 0][columns]).max() < 1e-4


def test_two_thousand_tokens_make_a_small_page() -> None:
    picture = Image.effect_noise((420, 420), 40).convert("RGB")
    lens = make_lens([f"t{i}" for i in range(2000)], [(picture, square(picture, 40, 0))], layers=28)
    page = lens_page(lens)
    assert len(page) < 4_000_000


def square(picture: Image.Image, side: int, first: int) -> ImageLayout:
    return ImageLayout(0, picture.size, picture.size, (side, side), tuple(range(first, first + side * side)))


def test_writing_is_whole_or_refused(tmp_path: Path) -> None:
    lens = make_lens(["a", "b"], [], layers=2)
    lens.to_html(tmp_path / "lens.html")
    assert [file.name for file in tmp_path.iterdir()] == ["lens.html"]
    with pytest.raises(vs.SpectraError, match="no directory"):
        lens.to_html(tmp_path / "missing" / "lens.html")
    with pytest.raises(vs.SpectraError, match="is a directory"):
        write_page(tmp_path, "")


def test_report_tells_the_run(hooked: vs.HookedVLM, screenshot: Image.Image) -> None:
    inputs = hooked.prepare_messages(NASTY, screenshot)
    answer = hooked.generate(inputs, max_new_tokens=4)
    with hooked.run_with_cache("lm.blocks.*.hook_resid_post") as cache:
        hooked.forward(inputs)
    lens, why = hooked.logit_lens(inputs, positions="last"), hooked.attribute(inputs)
    page = report_page(answer, cache=cache, seconds=0.5, lens=lens, attributions=[why], title=NASTY)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert f"{cache.nbytes:,} bytes in 0.50 s" in page
    assert "layer 4 MLP" in page
    assert page.count("<rect") == len(inputs.images[0].positions), "the attribution lies over the image"


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as run:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = run.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with what went wrong in it."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        self.wrong: list[str] = []
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector(".line .cell")

    def asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.wrong.append(f"loads {url}")

    def tip(self) -> str:
        return self.page.inner_text("#tip") if self.page.is_visible("#tip") else ""

    def marked(self) -> tuple[list[str], bool]:
        """The positions of the marked patches, and whether a column is marked."""
        frames = "svg => { const f = svg.querySelector('.frame.on'); if (!f) return ''; const on = "
        frames += "svg.querySelector('rect.on[data-p]'); return on ? on.dataset.p : '?' }"
        patches = [self.page.locator("svg").nth(i).evaluate(frames) for i in range(self.page.locator("svg").count())]
        return [patch for patch in patches if patch], self.page.locator(".bar").first.is_visible()

    def done(self) -> None:
        assert self.wrong == []
        self.page.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, screenshot: Image.Image) -> Path:
    """Two images, of 4 x 4 and 2 x 3 patches, between nasty labels: 40 tokens and 6 layers."""
    second = screenshot.resize((300, 200))
    labels = [NASTY] + [f"t{i}" for i in range(1, 40)]
    layouts = [square(screenshot, 4, 5), ImageLayout(0, (300, 200), (84, 56), (2, 3), tuple(range(25, 31)))]
    lens = make_lens(labels, list(zip([screenshot, second], layouts, strict=True)), layers=6, task=NASTY)
    lens.tokens[5][0][0][0] = NASTY
    lens.tokens[5][0][1][0] = "\u202eevil\x00\n\ud800"
    path = tmp_path_factory.mktemp("pages") / "small.html"
    lens.to_html(path)
    return path


def test_hovering(browser: Any, small: Path) -> None:
    opened = Opened(browser, small)
    page = opened.page
    page.locator("#c0-1-2").hover()  # layer 4, position 2: no patch
    assert "layer 4, position 2" in opened.tip()
    assert opened.tip().count("%") == 5, "the five most probable tokens"
    assert opened.marked() == ([], True)
    page.locator("#c0-0-7").hover()  # position 7 is a patch of the first image
    assert opened.marked() == (["7"], True)
    page.locator("rect[data-p='28']").hover()  # a patch of the second one, whose column is not in view
    assert opened.marked() == (["28"], True)
    assert "position 28" in opened.tip()
    bar, head = page.locator(".bar").first.bounding_box(), page.locator("#c0--1-28").bounding_box()
    assert abs(bar["x"] - head["x"]) < 2, "the bar stands on the patch's column"
    page.mouse.move(1390, 890)
    assert opened.tip() == ""
    assert opened.marked() == ([], False)
    opened.done()


def test_pinning(browser: Any, small: Path) -> None:
    opened = Opened(browser, small)
    page = opened.page
    page.locator("rect[data-p='6']").click()
    page.locator("#c0-3-2").hover()
    assert "position 6" in opened.tip(), "pinned: pointing elsewhere changes nothing"
    assert opened.marked() == (["6"], True)
    page.locator("#c0-3-2").click()
    assert "layer 2, position 2" in opened.tip(), "a click elsewhere moves the pin"
    page.locator("#c0-3-2").click()
    page.locator("#c0-3-3").hover()
    assert "position 3" in opened.tip(), "a second click lets go"
    page.locator("#c0-3-3").click()
    page.keyboard.press("Escape")
    assert opened.tip() == ""
    opened.done()


def test_searching(browser: Any, small: Path) -> None:
    opened = Opened(browser, small)
    page = opened.page
    page.keyboard.press("/")
    page.keyboard.type("w103")  # 7 l + 3 p + r = 103 somewhere among six layers and forty positions
    page.wait_for_selector("#found:not(:empty)")
    expected = sum(7 * layer + 3 * p + r == 103 for layer in range(6) for p in range(40) for r in range(5))
    assert page.inner_text("#found") == f"0 labels, {expected} cells"
    assert "w103" in opened.tip()
    first = opened.tip()
    page.keyboard.press("Enter")
    assert "w103" in opened.tip()
    assert opened.tip() != first
    page.keyboard.press("Shift+Enter")
    assert opened.tip() == first
    page.fill("#search", "t38")
    page.wait_for_function("document.querySelector('#found').textContent.startsWith('1 label')")
    assert "position 38" in opened.tip()
    assert page.locator("#c0--1-38").is_visible()
    page.fill("#search", "")
    page.wait_for_selector("#found:empty", state="attached")
    assert page.locator(".cell.hit").count() == 0
    opened.done()


def test_by_keyboard(browser: Any, small: Path) -> None:
    opened = Opened(browser, small)
    page = opened.page
    page.focus(".box")
    page.keyboard.press("End")
    page.keyboard.press("Home")
    assert "layer 5, position 0" in opened.tip()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert "layer 4, position 2" in opened.tip()
    assert page.get_attribute(".box", "aria-activedescendant") == "c0-1-2"
    page.keyboard.press("Enter")
    page.mouse.move(700, 300)
    assert "pinned" in opened.tip()
    page.keyboard.press("Escape")
    page.focus("svg")
    page.keyboard.press("ArrowRight")  # the first patch
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert opened.marked() == (["10"], True), "one to the right and one down, in a grid of four that begins at 5"
    opened.done()


def test_nasty_text_shows_as_text(browser: Any, small: Path) -> None:
    opened = Opened(browser, small)
    page = opened.page
    assert page.inner_text("h2") == NASTY
    assert page.inner_text("#c0--1-0").startswith("<script>alert(1)</script>")
    page.locator("#c0-0-0").hover()
    assert "<img src=x onerror=alert(2)>" in opened.tip()
    page.locator("#c0-0-1").hover()
    assert "evil" in opened.tip()
    page.keyboard.press("/")
    page.keyboard.type("<script>alert(1)")
    page.wait_for_selector("#found:not(:empty)")
    assert page.inner_text("#found") == "1 label, 1 cell"
    assert page.locator("img[src=x]").count() == 0
    opened.done()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_choice_and_the_scheme(browser: Any, small: Path, scheme: str) -> None:
    opened = Opened(browser, small, scheme)
    page = opened.page
    look = "cell => { const s = getComputedStyle(cell); return [s.backgroundColor, s.color] }"
    found = {}
    for shade in ("probability", "entropy", "kl"):
        page.check(f"input[value={shade}]")
        found[shade] = page.locator("#c0-5-2").evaluate(look)
        ground, ink = ([int(c) for c in re.findall(r"\d+", text)[:3]] for text in found[shade])
        assert abs(sum(ground) - sum(ink)) > 250, "the text is legible"
    assert len({str(each) for each in found.values()}) == 3
    paper = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (int(paper[0]) > 128) == (scheme == "light")
    opened.done()


def test_two_thousand_tokens_stay_responsive(browser: Any, tmp_path: Path) -> None:
    picture = Image.effect_noise((1200, 1200), 40).convert("RGB")
    lens = make_lens([f"t{i}" for i in range(2000)], [(picture, square(picture, 40, 100))], layers=28)
    lens.to_html(tmp_path / "big.html")
    opened = Opened(browser, tmp_path / "big.html")
    page = opened.page
    assert page.locator(".cell").count() < 29 * 40, "only the visible columns are in the document"
    page.locator("rect[data-p='1600']").hover()
    assert "position 1600" in opened.tip()
    assert page.locator("#c0-27-1600").count() == 1
    redraw = (
        "() => { const box = document.querySelector('.box'); const counts = [];"
        "for (let i = 0; i < 20; i++) { box.scrollLeft = 5000 * i; box.dispatchEvent(new Event('scroll'));"
        "counts.push(document.querySelectorAll('.cell').length) }"
        "return Math.max(...counts) }"
    )
    assert page.evaluate(redraw) < 29 * 40, "nor do more gather while it is scrolled"
    page.fill("#search", "w5")
    page.wait_for_selector("#found:not(:empty)")
    opened.done()


def test_tiles_and_their_overview_are_two_pictures(browser: Any, tmp_path: Path, screenshot: Image.Image) -> None:
    width, height = screenshot.size
    fine = [
        Tile((2, 2), (x, 0.0, x + width / 2, float(height)), tuple(range(start, start + 4)), (0, column))
        for x, start, column in ((0.0, 4, 0), (width / 2, 8, 2))
    ]
    overview = Tile((2, 2), (0.0, 0.0, float(width), float(height)), (0, 1, 2, 3), overview=True)
    layout = ImageLayout(0, screenshot.size, (56, 56), (2, 4), tuple(range(12)), (overview, *fine))
    lens = make_lens([f"t{i}" for i in range(14)], [(screenshot, layout)], layers=3)
    lens.to_html(tmp_path / "tiles.html")
    opened = Opened(browser, tmp_path / "tiles.html")
    page = opened.page
    assert page.locator("figure").count() == 2
    assert page.locator("svg").first.locator("rect[data-p]").count() == 8
    page.locator("#c0-0-3").hover()
    assert opened.marked() == (["3"], True)
    page.locator("#c0-0-9").hover()
    assert opened.marked() == (["9"], True)
    opened.done()
