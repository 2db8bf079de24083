"""The web app's page in a real browser: opening it, running an analysis, and reading its overlay in pixels."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

CHROMIUM = Path("/usr/bin/chromium")
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
VIEWS = ["predict", "forward", "attention", "attribution", "lens", "patching"]
PREFILL = "Thought: The Login button.\nAction: click(start_box='("
SETTLED = "#doing:has-text('done in'), #wrong:not([hidden])"
LONG = 120_000
"""Milliseconds that a busy machine may take for anything."""
BETWEEN_DOWNLOADS = 120
"""Milliseconds: Chromium drops, without a word, the eleventh download that a page starts within a second."""


@contextmanager
def launched() -> Iterator[Any]:
    """Chromium, without a window; skips where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("no chromium on this machine")
    with sync.sync_playwright() as playwright:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield browser
        browser.close()


class Opened:
    """The page, opened; `page` is playwright's, `troubles` what the browser complained of."""

    def __init__(self, browser: Any, address: str, link: str = "", ready: bool = True, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.context.set_default_timeout(LONG)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.troubles.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("console", self._console)
        self.responses: list[Any] = []
        self.page.on("response", lambda response: self.responses.append(response))
        self.page.goto(f"{address}/{link}")
        if ready:
            self.usable()

    def _console(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.troubles.append(message.text)

    def usable(self) -> None:
        """Wait until the page has all that its first view needs."""
        self.until("performance.getEntriesByName('usable').length > 0")

    def until(self, expression: str, wanted: Any = True) -> None:
        """Wait until an expression has a value; by asking, for the page's own policy forbids it to evaluate texts."""
        ends = time.monotonic() + LONG / 1000
        while (found := self.page.evaluate(expression)) != wanted:
            assert time.monotonic() < ends, f"{expression} is still {found!r}, not {wanted!r}"
            self.page.wait_for_timeout(50)

    def tab(self, view: str) -> None:
        self.page.click(f"#tab-{view}")

    def run(self, view: str = "", ok: bool = True) -> None:
        if view:
            self.tab(view)
        if view == "patching":
            self.page.select_option("#control-over", "heads")  # few cells, for speed
        self.run_only(ok)

    def run_only(self, ok: bool = True) -> None:
        """Run the view as it is."""
        self.page.click("#run")
        self.settled(ok)

    def settled(self, ok: bool = True) -> None:
        self.page.locator(SETTLED).first.wait_for()
        if ok:
            assert self.wrong() == "", self.wrong()

    def result(self, view: str = "") -> dict[str, Any]:
        """The whole result of an analysis, which is run."""
        self.run(view)
        return json.loads(self.download("JSON"))  # type: ignore[no-any-return]

    def wrong(self) -> str:
        return self.page.inner_text("#wrong") if self.page.is_visible("#wrong") else ""

    def upload(self, *files: bytes, name: str = "screen.png") -> None:
        payloads = [{"name": name, "mimeType": "image/png", "buffer": data} for data in files]
        with self.page.expect_response("**/api/upload"):
            self.page.set_input_files("#file", payloads)

    def set(self, control: str, value: str | int) -> None:
        """Give a control of the view a value."""
        field = f"#control-{control}"
        if self.page.evaluate(f"document.querySelector('{field}').tagName") == "SELECT":
            self.page.select_option(field, str(value))
        else:
            self.page.fill(field, str(value))
            self.page.dispatch_event(field, "change")

    def heat(self, shot: int = 0) -> np.ndarray:
        """How opaque the overlay of an image is, [height, width], in the canvas's own pixels."""
        address = self.page.evaluate(f"document.querySelectorAll('.shot canvas')[{shot}].toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGBA"))[..., 3]

    def over(self, grid: tuple[int, int], shot: int = 0) -> np.ndarray:
        """How opaque the overlay is in the middle of each cell, [rows, columns]."""
        heat = self.heat(shot)
        down, across = heat.shape[0] / grid[0], heat.shape[1] / grid[1]
        rows, columns = ((np.arange(n) + 0.5) * size for n, size in zip(grid, (down, across), strict=True))
        return heat[np.ix_(rows.astype(int), columns.astype(int))]

    def strongest(self, grid: tuple[int, int], shot: int = 0) -> tuple[int, int]:
        """The patch in whose middle the overlay is most opaque."""
        row, column = np.unravel_index(self.over(grid, shot).argmax(), grid)
        return int(row), int(column)

    def download(self, kind: str) -> bytes:
        self.page.wait_for_timeout(BETWEEN_DOWNLOADS)
        with self.page.expect_download() as got:
            self.page.click(f"#exports :text-is('{kind}')")
        return Path(got.value.path()).read_bytes()

    def done(self) -> None:
        assert self.troubles == []
        self.context.close()


@contextmanager
def opened(browser: Any, address: str, link: str = "", **context: Any) -> Iterator[Opened]:
    page = Opened(browser, address, link, **context)
    yield page
    page.done()


def link(view: str, task: str, image: str = "screen-1.png", prefill: str = PREFILL, run: bool = True) -> str:
    """A link to a view."""
    fields = {"view": view, "image": image, "task": task, "prefill": prefill, "run": "1" if run else ""}
    return "#" + "&".join(f"{name}={quote(value, safe='')}" for name, value in fields.items())


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_picture(page: Any, name: str) -> None:
    """A view's picture for the documents, with SPECTRA_WRITE_DOCS=1."""
    if os.environ.get("SPECTRA_WRITE_DOCS"):
        page.mouse.move(0, 0)
        size = page.viewport_size
        page.set_viewport_size({**size, "height": page.evaluate("document.documentElement.scrollHeight")})
        page.wait_for_timeout(500)  # frames are drawn anew
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        page.set_viewport_size(size)
        shot.resize((shot.width * 5 // 8, shot.height * 5 // 8), Image.Resampling.LANCZOS).save(
            PICTURES / f"web_{name}.png", optimize=True
        )
