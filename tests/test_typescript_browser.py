"""The TypeScript client in Chromium, over the web app's port: Python's bits by both protocols, and the page example."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlm_spectra as vs
from browser import launched
from conftest import stop_server
from nodejs import CLIENT, compiled, needs_node, run
from PIL import Image
from same_calls import compare
from vlm_spectra.arrays import to_numpy
from webapp import start_web

PREFILL = "Thought: The Login button.\nAction: click(start_box='("
PATTERN = "lm.blocks.*.attn.hook_pattern"
LONG = 240_000
"""Milliseconds that a busy machine may take."""

pytestmark = needs_node


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    """Where the page example is served, by a server that knows nothing of models, the tests' own bundle beside it."""
    build = compiled()
    run("npm", "run", "page", "--silent")
    esbuild = CLIENT / "node_modules" / ".bin" / "esbuild"
    run(esbuild, build / "test" / "browser.js", "--bundle", "--format=iife", f"--outfile={build / 'page' / 'test.js'}")
    handler = functools.partial(Quiet, directory=str(build / "page"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def web(browser: Any, server: str, origin: str) -> Iterator[str]:
    process, address = start_web("--server", server, "--cors-origin", origin)
    yield address
    stop_server(process)


@pytest.fixture
def page(browser: Any, origin: str) -> Iterator[Any]:
    """A page of the foreign origin with the library in it; what the browser complains of ends the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.set_default_timeout(LONG)
    page, troubles = context.new_page(), []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(f"{origin}/index.html")
    page.add_script_tag(url=f"{origin}/test.js")
    yield page
    context.close()
    assert troubles == []


def encoded(files: tuple[Path, Path]) -> list[str]:
    return [base64.b64encode(file.read_bytes()).decode() for file in files]


COLLECT = """async ([url, protocol, files]) => {
  const [first, second] = files.map((file) => Uint8Array.from(atob(file), (c) => c.charCodeAt(0)));
  const model = await vs.connect(url, { protocol });
  try {
    return await collect(model, first, new Blob([second]));
  } finally {
    model.close();
  }
}"""


@pytest.mark.parametrize("protocol", ["connect", "grpc-web"])
def test_every_call_is_pythons_bit_for_bit(page: Any, web: str, same_calls: Any, protocol: str) -> None:
    compare(page.evaluate(COLLECT, [web, protocol, encoded(same_calls.files)]), same_calls)


REFUSED = """async ([url, protocol]) => {
  const model = await vs.connect(url, { protocol });
  const inputs = await model.prepare("Say hello");
  const stop = new AbortController();
  const endless = { maxNewTokens: 4000, doSample: true, temperature: 5, seed: 1 };
  const found = [
    await refusal(() => model.runWithCache(inputs, "lm.blocks.99.hook_resid_post")),
    await refusal(() => model.prepare("word ".repeat(100000))),
    await refusal(() => vs.connect(url, { protocol, model: "another" })),
    await refusal(() => model.generate(inputs, { ...endless, timeout: 0.05 })),
    await refusal(() => model.generate(inputs, { ...endless, signal: stop.signal, onToken: () => stop.abort() })),
  ];
  found.push([(await model.generate(inputs, { maxNewTokens: 1 })).sequences.shape.length]);  // the worker is free
  return found;
}"""


@pytest.mark.parametrize("protocol", ["connect", "grpc-web"])
def test_what_is_refused_has_its_reason(page: Any, web: str, protocol: str) -> None:
    found = page.evaluate(REFUSED, [web, protocol])
    assert [error[:3] for error in found] == [
        ["UnknownHookError", "UNKNOWN_HOOK", "hooks"],
        ["PromptTooLongError", "PROMPT_TOO_LONG", "task"],
        ["UnknownModelError", "UNKNOWN_MODEL", "model"],
        ["DeadlineError", "DEADLINE_EXCEEDED", ""],
        ["CancelledError", "CANCELLED", ""],
        [2],
    ]


def test_another_origin_has_to_be_let_in(browser: Any, web: str, origin: str) -> None:
    """The same page under another name of the same machine: not the origin that the server was told of."""
    page = browser.new_page()
    page.goto(f"{origin.replace('127.0.0.1', 'localhost')}/index.html")
    page.add_script_tag(url="test.js")
    name, reason, _, sentence = page.evaluate("(url) => refusal(() => vs.connect(url))", web)
    page.close()
    assert (name, reason) == ("UnavailableError", "UNAVAILABLE")
    assert "--cors-origin" in sentence


SHOW_BITS = """
const bits = await crypto.subtle.digest("SHA-256", (await cache.stack("lm.blocks.*.attn.hook_pattern")).bytes);
show([...new Uint8Array(bits)].map((byte) => byte.toString(16).padStart(2, "0")).join(""));
"""


PIXEL = """([x, y]) => {
  const canvas = document.querySelectorAll(".cell")[2].querySelector("canvas");
  return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
}"""
TITLES = """() => [...document.querySelectorAll("tbody tr")].map(
  (row) => [...row.querySelectorAll("td")].map((td) => td.title))"""


def test_the_page_runs_to_its_end_with_pythons_numbers(
    page: Any, web: str, origin: str, remote_numpy: vs.RemoteVLM
) -> None:
    page.goto(f"{origin}/index.html?server={web}")
    page.locator("body[data-state=done], body[data-state=failed]").wait_for()
    cells = page.locator(".cell")
    shown = [cells.nth(i).locator(".output").inner_text() for i in range(cells.count())]
    assert page.get_attribute("body", "data-state") == "done", shown
    model = remote_numpy
    picture = Image.open(CLIENT.parent.parent / "examples" / "screenshot.png")
    inputs = model.prepare_messages("Click on the Login button", picture)
    answer = model.generate(inputs, max_new_tokens=48)
    click = answer.clicks[0]
    assert click is not None
    assert model.info.name in shown[0]
    assert f"{inputs.input_ids.shape[1]} tokens" in shown[1]
    assert answer.text[0] in shown[2]
    assert f"click at {click.x:.1f}, {click.y:.1f}" in shown[2]
    red = page.evaluate(PIXEL, [click.x, click.y])
    assert red[0] > 180, "the cross is not where the click is"
    assert max(red[1:3]) < 80

    point = model.prepare_messages("Click on the Login button", picture, assistant_prefill=PREFILL)
    with model.run_with_cache(PATTERN, positions="last", reduce="mean_heads") as cache:
        model.forward(point, None)
    assert cells.nth(3).locator("canvas").count() == model.info.layers
    lens = model.logit_lens(point, top_k=1, positions=slice(-7, None))
    table = cells.nth(4).locator("tbody tr")
    assert table.count() == model.info.layers
    found = [[float(cell) for cell in row] for row in page.evaluate(TITLES)]
    assert np.allclose(found, to_numpy(lens.probs)[:, 0, :, 0], rtol=1e-5)
    top = model.forward(point, 1).top_tokens(4)[0][0]
    assert f"as it is: {top[0].text} {100 * top[0].prob:.1f}%" in shown[5]

    cells.nth(5).locator("textarea").fill(SHOW_BITS)
    cells.nth(5).locator("textarea").press("Shift+Enter")
    bits = hashlib.sha256(np.ascontiguousarray(to_numpy(cache.stack(PATTERN))).tobytes()).hexdigest()
    cells.nth(5).locator(f"pre:has-text('{bits}')").wait_for()
    cells.nth(5).locator("textarea").fill("await model.runWithCache(inputs, 'lm.blocks.9.nothing', { signal });")
    cells.nth(5).locator("button").click()
    cells.nth(5).locator("pre.wrong:has-text('UNKNOWN_HOOK')").wait_for()
