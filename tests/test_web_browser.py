"""The web app's page in a real browser, over a real server: every analysis from upload to picture, and all mishaps."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlm_spectra as vs
from conftest import start_server, stop_server
from PIL import Image
from test_web_api import GALLERY, NASTY, TASK, bomb
from webapp import free_port, start_web

CHROMIUM = Path("/usr/bin/chromium")
ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
AXE = [
    ROOT / "clients" / "typescript" / "node_modules" / "axe-core" / "axe.min.js",
    Path(os.environ.get("SPECTRA_AXE", "/nowhere")),
]
PREFILL = "Thought: The Login button.\nAction: click(start_box='("
VIEWS = ["predict", "forward", "attention", "attribution", "lens", "patching"]
UNNAMED = """() => [...document.querySelectorAll('input, select, textarea, button, canvas[tabindex], iframe')]
  .filter((e) => !(e.getAttribute('aria-label') || e.title || (e.labels && e.labels.length)
    || (e.tagName === 'BUTTON' && e.textContent.trim()) || e.querySelector('img[alt]'))).map((e) => e.outerHTML)"""
SETTLED = "#doing:has-text('done in'), #wrong:not([hidden])"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("no chromium on this machine")
    with sync.sync_playwright() as playwright:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def web(server: str) -> Iterator[str]:
    process, address = start_web("--server", server)
    yield address
    stop_server(process)


class Opened:
    """The page, opened; `page` is playwright's, `troubles` what the browser complained of."""

    def __init__(self, browser: Any, address: str, link: str = "", **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.troubles.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("console", self._console)
        self.page.goto(f"{address}/{link}")
        self.page.locator("#gallery button").first.wait_for()

    def _console(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.troubles.append(message.text)

    def tab(self, view: str) -> None:
        self.page.click(f"#tab-{view}")

    def run(self, view: str = "", ok: bool = True) -> None:
        if view:
            self.tab(view)
        if view == "patching":
            self.page.select_option("#control-over", "heads")  # few cells, for speed
        self.page.click("#run")
        self.settled(ok)

    def settled(self, ok: bool = True) -> None:
        self.page.locator(SETTLED).first.wait_for(timeout=60_000)
        if ok:
            assert self.wrong() == ""

    def wrong(self) -> str:
        return self.page.inner_text("#wrong") if self.page.is_visible("#wrong") else ""

    def upload(self, data: bytes, name: str = "screen.png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})

    def heat(self) -> np.ndarray:
        """How opaque the overlay is, [height, width], in the canvas's own pixels."""
        address = self.page.evaluate("document.querySelector('#stage canvas').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGBA"))[..., 3]

    def strongest(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The patch in whose middle the overlay is most opaque."""
        heat = self.heat()
        down, across = heat.shape[0] / grid[0], heat.shape[1] / grid[1]
        rows, columns = ((np.arange(n) + 0.5) * size for n, size in zip(grid, (down, across), strict=True))
        values = heat[np.ix_(rows.astype(int), columns.astype(int))]
        row, column = np.unravel_index(values.argmax(), grid)
        return int(row), int(column)

    def done(self) -> None:
        assert self.troubles == []
        self.context.close()


@contextmanager
def opened(browser: Any, address: str, link: str = "", **context: Any) -> Iterator[Opened]:
    page = Opened(browser, address, link, **context)
    yield page
    page.done()


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_picture(page: Any, name: str) -> None:
    """A view's picture for the documents, with SPECTRA_WRITE_DOCS=1."""
    if os.environ.get("SPECTRA_WRITE_DOCS"):
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        shot.resize((shot.width * 5 // 8, shot.height * 5 // 8), Image.Resampling.LANCZOS).save(
            PICTURES / f"web_{name}.png", optimize=True
        )


def test_the_first_view_is_small_and_soon_there(browser: Any, web: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    got: list[Any] = []
    page.on("response", lambda response: got.append(response))
    began = time.perf_counter()
    page.goto(web)
    page.locator("#gallery button").first.wait_for()
    page.locator("#state.ready").wait_for()
    took = time.perf_counter() - began
    assert all(response.url.startswith(web) for response in got), "everything comes from here"
    assert sum(len(response.body()) for response in got if response.ok) < 300_000
    print(f"usable after {took:.2f} s")
    assert took < 5, "seconds, on a busy machine"
    context.close()


@pytest.mark.parametrize("view", VIEWS)
def test_from_upload_to_picture(browser: Any, web: str, view: str) -> None:
    with opened(browser, web) as page:
        with page.page.expect_response("**/api/upload"):
            page.upload((GALLERY / "screen-1.png").read_bytes())
        page.page.locator("#stage img[src*='/api/images/']").wait_for()
        page.page.fill("#task", TASK)
        if view in ("attention", "attribution", "patching"):
            page.page.click("#more summary")
            page.page.fill("#prefill", PREFILL)
        page.tab(view)
        if view == "patching":
            page.page.select_option("#control-second_image", "screen-1-moved.png")
        page.run()
        if view == "predict":
            assert "click(start_box='(87,164)')" in page.page.inner_text(".answer")
            assert page.page.inner_text("#click").startswith("a click at 87, 164")
            page.page.locator(".token").nth(3).hover()
            assert re.search(r"“·Login” .*: 100.0 %", page.page.inner_text("#result .tip"))
            x, y = (87 / 224, 164 / 224)
            heat = page.heat()
            across, down = int(x * heat.shape[1]), int(y * heat.shape[0])
            assert heat[down - 14 : down + 14, across - 14 : across + 14].any(), "the click is marked where it is"
            assert not heat[: down - 30].any()
        elif view == "forward":
            assert page.page.locator("tbody tr").count() == 19, "the text's positions"
            page.page.select_option("#control-patches", "all")
            assert page.page.locator("tbody tr").count() > 64
        elif view == "lens":
            frame = page.page.frame_locator("iframe")
            frame.locator(".cell").first.wait_for()
            page.page.locator("iframe").scroll_into_view_if_needed()
            frame.locator("rect[data-p='20']").hover()
            assert "position 20" in frame.locator("#tip").inner_text()
        elif view == "attention":
            page.page.fill("#control-layer", "3")
            assert "layer 3, the mean of 6 heads" in page.page.inner_text("#said")
        elif view == "attribution":
            assert "missing" in page.page.inner_text("#completeness")
            assert page.page.locator(".bars").count() == 2
        else:
            assert "strongest" in page.page.inner_text("#result")
        if view not in ("predict", "lens"):
            assert page.heat().any()
        save_picture(page.page, view)


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(browser: Any, web: str, way: str) -> None:
    event = (
        "DragEvent('drop', { dataTransfer: held," if way == "drop" else "ClipboardEvent('paste', { clipboardData: held,"
    )
    script = (
        "(data) => { const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), held = new DataTransfer();"
        "held.items.add(new File([bytes], 'x.png', { type: 'image/png' }));"
        f"document.dispatchEvent(new {event} bubbles: true, cancelable: true }})) }}"
    )
    with opened(browser, web) as page:
        with page.page.expect_response("**/api/upload") as answered:
            page.page.evaluate(script, base64.b64encode((GALLERY / "screen-2.png").read_bytes()).decode())
        name = answered.value.json()["filename"]
        page.page.locator(f"#stage img[src$='{name}']").wait_for()
        page.page.fill("#task", "Click on the red circle")
        page.run()
        assert "red circle" in page.page.inner_text(".answer")


def test_the_overlay_is_right(browser: Any, web: str, remote_numpy: vs.RemoteVLM) -> None:
    """The most opaque patch is the one that Python finds, for every layer, some heads, and signed scores."""
    inputs = remote_numpy.prepare_messages(TASK, GALLERY / "screen-1.png", assistant_prefill=PREFILL)
    grid = inputs.images[0].grid
    with remote_numpy.run_with_cache("lm.blocks.*.attn.hook_pattern") as cache:
        remote_numpy.forward(inputs, logits_to_keep=None)
    link = f"#image=screen-1.png&task={TASK.replace(' ', '+')}&prefill={quoted(PREFILL)}&run=1"
    with opened(browser, web, f"{link}&view=attention") as page:
        page.settled()
        for layer in range(remote_numpy.info.layers):
            pattern = cache[f"lm.blocks.{layer}.attn.hook_pattern"][0, :, -1]
            page.page.fill("#control-layer", str(layer))
            for heads, row in (("mean", pattern.mean(0)), ("max", pattern.max(0)), ("one", pattern[4])):
                if heads == "one":
                    page.page.fill("#control-head", "4")
                else:
                    page.page.select_option("#control-heads", heads)
                expected = np.unravel_index(cache.image_grid(row).argmax(), grid)
                assert page.strongest(grid) == expected, (layer, heads)
    why = remote_numpy.attribute(inputs)
    expected = np.unravel_index(np.abs(why.image_grid(0)).argmax(), grid)
    with opened(browser, web, f"{link}&view=attribution") as page:
        page.settled()
        assert page.strongest(grid) == expected


def quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def test_a_clicked_patch_reads(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        page.run("attention")
        box = page.page.locator("#stage canvas").first.bounding_box()
        with page.page.expect_response("**/api/attention") as answered:
            page.page.mouse.click(box["x"] + box["width"] * (3.5 / 8), box["y"] + box["height"] * (5.5 / 8))
        assert json.loads(answered.value.request.post_data)["position"] == 5 + 5 * 8 + 3
        page.page.locator("#said:has-text('position 48')").wait_for()
        page.page.locator("button.token:has-text('Login')").first.click()
        page.page.locator("#said:has-text('·Login')").wait_for()


def test_sliders_ask_nothing(browser: Any, web: str) -> None:
    """28 layers of 28 heads over 28 x 28 patches: fetched once, then every slider redraws from what is there."""
    layers, heads, side = 28, 28, 28
    size, length = side * 28, side * side + 6
    rng = np.random.default_rng(0)
    patterns = rng.random((layers, heads, length), dtype=np.float32) ** 4
    patches = [
        {"position": 3 + i, "box": [i % side * 28, i // side * 28, (i % side + 1) * 28, (i // side + 1) * 28]}
        for i in range(side * side)
    ]
    image = {"size": [size, size], "processed_size": [size, size], "grid": [side, side], "patches": patches}
    places = [patch["position"] for patch in patches]
    prompt = {"tokens": [f"t{i}" for i in range(length)], "images": [image], "image_positions": places}
    packed = {"shape": list(patterns.shape), "float32": base64.b64encode(patterns.tobytes()).decode()}
    data = {"position": length - 1, "layers": list(range(layers)), "heads": heads, "prompt": prompt, "patterns": packed}
    body = json.dumps({"type": "result", "data": data}) + "\n"
    with opened(browser, web) as page:
        page.page.route("**/api/attention", lambda route: route.fulfill(body=body, content_type="application/x-ndjson"))
        page.run("attention")
        asked: list[str] = []
        page.page.on("request", lambda r: asked.append(r.url) if "/api/a" in r.url else None)
        script = (
            "() => { const f = document.querySelector('#control-layer'); const began = performance.now();"
            "for (let i = 0; i < 20; i++) { f.value = i; f.dispatchEvent(new Event('input')); }"
            "return (performance.now() - began) / 20 }"
        )
        took = page.page.evaluate(script)
        print(f"a redraw of 28 heads takes {took:.1f} ms")
        assert took < 400
        page.page.fill("#control-head", "17")
        page.page.select_option("#control-heads", "max")
        page.page.fill("#control-layer", "11")
        assert asked == []
        expected = patterns[11].max(0)[3 : 3 + side * side].reshape(side, side)
        page.page.select_option("#control-heads", "one")
        expected = patterns[11, 17][3 : 3 + side * side].reshape(side, side)
        assert page.strongest((side, side)) == np.unravel_index(expected.argmax(), expected.shape)


def test_cancel_in_the_middle(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        page.tab("patching")
        page.page.select_option("#control-second_image", "screen-1-moved.png")
        page.page.click("#run")
        page.page.locator("#doing:has-text('of 5 layers')").wait_for()
        page.page.click("#cancel")
        assert page.page.inner_text("#doing") == "cancelled"
        assert page.page.is_disabled("#cancel")
        page.page.wait_for_timeout(600)
        assert page.page.inner_text("#doing") == "cancelled", "nothing of it comes later"
        page.run("predict")
        assert "Action: click" in page.page.inner_text(".answer")


def test_a_link_restores_the_view(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        page.page.locator("#gallery button").nth(1).click()
        page.run("attention")
        page.page.fill("#control-head", "2")
        page.page.fill("#control-layer", "4")
        page.page.wait_for_timeout(400)
        heat, link = page.heat(), page.page.url
        page.page.reload()
        page.settled()
        assert page.page.input_value("#task") == "Click on the red circle"
        assert "layer 4, head 2" in page.page.inner_text("#said")
        assert np.array_equal(page.heat(), heat)
    with opened(browser, web, link.split("/", 3)[3]) as page:
        page.settled()
        assert np.array_equal(page.heat(), heat)
    with opened(browser, web, "#view=predict&image=" + "0" * 32 + ".png&task=x&run=1") as page:
        page.settled(ok=False)
        assert "upload it again" in page.wrong() or "choose it again" in page.wrong()
    with opened(browser, web, "#view=nothing&layer=-4&image=../../etc/passwd&top_k=NaN&task=%3Cscript%3E"):
        pass


def test_a_model_that_fails_to_load(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        page.page.select_option("#model", "\n")
        page.page.fill("#other", "/nowhere/<b>at all</b>")
        page.page.press("#other", "Enter")
        page.page.locator("#state:has-text('failed')").wait_for(timeout=60_000)
        assert "/nowhere/<b>at all</b>" in page.page.inner_text("#lost")
        page.run("predict", ok=False)
        assert "could not be loaded" in page.wrong()
        page.page.select_option("#model", "spectra-tiny")
        page.page.locator("#state.ready").wait_for()
        assert not page.page.is_visible("#lost")
        page.run()


def test_a_server_that_goes_away_and_comes_back(browser: Any) -> None:
    port = free_port()
    arguments = ("--model", "spectra-tiny", "--device", "cpu", "--port", str(port))
    serving, _ = start_server(*arguments)
    process, address = start_web("--server", f"127.0.0.1:{port}")
    try:
        with opened(browser, address) as page:
            page.run()
            stop_server(serving)
            page.page.locator("#state:has-text('no server')").wait_for(timeout=30_000)
            assert page.page.is_visible("#lost")
            assert "Action: click" in page.page.inner_text(".answer"), "what was there stays"
            page.page.click("#run")
            page.page.locator("#wrong:not([hidden])").wait_for(timeout=30_000)
            serving, _ = start_server(*arguments)
            page.page.locator("#state.ready").wait_for(timeout=30_000)
            assert not page.page.is_visible("#lost")
            page.run()
            assert "Action: click" in page.page.inner_text(".answer")
    finally:
        stop_server(serving)
        stop_server(process)


def test_two_tabs_at_once(browser: Any, web: str) -> None:
    with opened(browser, web) as one, opened(browser, web) as two:
        two.page.locator("#gallery button").nth(1).click()
        one.page.click("#run")
        two.page.click("#run")
        one.settled()
        two.settled()
        assert "Login" in one.page.inner_text(".answer")
        assert "red circle" in two.page.inner_text(".answer")


def test_hostile_input(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        for data, said in (
            (b"<html><script>alert(1)</script></html>", "not an image"),
            (bomb(20_000, 10_000), "too many pixels"),
        ):
            page.upload(data, "../../etc/passwd.png")
            page.page.locator(f"#wrong:has-text('{said}')").wait_for()
        page.page.fill("#task", NASTY)
        page.page.click("#more summary")
        page.page.fill("#prefill", NASTY)
        for view in VIEWS:
            page.tab(view)
            for field in ("target", "against", "second_task"):
                if page.page.locator(f"#control-{field}").count() and view != "patching":
                    page.page.fill(f"#control-{field}", "")
            page.run(view)
            if view == "lens":
                page.page.frame_locator("iframe").locator(".cell").first.wait_for()
            assert page.page.locator("img[src=x]").count() == 0
            assert page.page.locator("body script").count() == 0
        page.tab("attribution")
        page.page.fill("#control-target", NASTY)
        page.page.press("#control-target", "Tab")
        page.run("attribution", ok=False)
        assert "<script>" in page.wrong(), "shown as text"
        page.page.fill("#control-target", "")
        page.page.press("#control-target", "Tab")
        page.page.fill("#prefill", "")
        page.page.fill("#task", TASK)
        page.run("predict")


def test_the_python_lines_run(browser: Any, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "screenshot.png").write_bytes((GALLERY / "screen-1.png").read_bytes())
    (tmp_path / "second.png").write_bytes((GALLERY / "screen-1-moved.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    made = {"predict": "answer", "attention": "grid", "attribution": "why", "patching": "sweep"}
    with opened(browser, web) as page:
        for view in VIEWS:
            page.tab(view)
            if view == "patching":
                page.page.select_option("#control-second_image", "screen-1-moved.png")
                page.page.select_option("#control-over", "heads")
            page.run()
            names: dict[str, Any] = {}
            exec(compile(page.page.text_content("#python"), view, "exec"), names)
            assert made.get(view, "lens") in names
            names["model"].close()


def test_downloads(browser: Any, web: str) -> None:
    def taken(page: Opened, kind: str) -> bytes:
        with page.page.expect_download() as got:
            page.page.click(f"#exports button:text-is('{kind}')")
        return Path(got.value.path()).read_bytes()

    with opened(browser, web) as page:
        page.run("attention")
        picture = Image.open(io.BytesIO(taken(page, "PNG")))
        assert picture.size == (672, 672)
        table = taken(page, "CSV").decode().splitlines()
        assert table[0] == "row,column,position,share"
        assert len(table) == 65
        assert json.loads(taken(page, "JSON"))["patterns"]["shape"][1] == 6
        page.page.fill("#task", '=cmd|"x"')
        page.run("forward")
        assert "'=" in taken(page, "CSV").decode() or "=cmd" not in taken(page, "CSV").decode()


def test_by_keyboard_alone(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        page.page.focus("#task")
        page.page.keyboard.press("Enter")
        page.settled()
        page.page.focus("#tab-predict")
        page.page.keyboard.press("ArrowRight")
        page.page.keyboard.press("ArrowRight")
        assert page.page.evaluate("document.activeElement.id") == "tab-attention"
        page.page.focus("#run")
        page.page.keyboard.press("Enter")
        page.settled()
        page.page.focus("#control-layer")
        page.page.keyboard.press("ArrowRight")
        assert "layer 1" in page.page.inner_text("#said")
        page.page.focus("#stage canvas")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            page.page.keyboard.press(key)
        assert page.page.inner_text("#stage .tip").startswith("row 1, column 1, position 14")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_for_everything(browser: Any, web: str, scheme: str) -> None:
    """Every control has a name; axe, where it is installed, finds nothing serious."""
    axe = next((path for path in AXE if path.exists()), None)
    with opened(browser, web, color_scheme=scheme, bypass_csp=axe is not None) as page:
        for view in VIEWS:
            page.run(view)
            unnamed = page.page.evaluate(UNNAMED)
            assert unnamed == []
            if axe is not None:
                page.page.evaluate(axe.read_text("utf-8"))
                found = page.page.evaluate("axe.run({ iframes: false })")["violations"]
                assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone(browser: Any, web: str, scheme: str) -> None:
    with opened(browser, web, viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
        for view in VIEWS:
            page.run(view)
            assert page.page.evaluate("document.documentElement.scrollWidth") <= 390, view
            if view == "attention" and scheme == "dark":
                save_picture(page.page, "telephone")
        dark = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.page.click("#theme")
        assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_the_rest_page_needs_nobody_else(browser: Any, web: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(f"{web}/docs")
    page.locator("h2:has-text('/api/logit-lens')").wait_for()
    assert all(url.startswith(web) for url in urls)
    context.close()
