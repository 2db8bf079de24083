"""The web app's page in a real browser, over a real server: every analysis from upload to picture, and all mishaps."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlm_spectra as vs
import zoo
from browser import PREFILL, VIEWS, as_png, link, opened, save_picture
from calls import unload
from conftest import start_server, stop_server
from PIL import Image
from test_web_api import GALLERY, NASTY, TASK, bomb
from webapp import free_port, start_web

FAMILIES = ["qwen3_vl", "idefics3"]
"""One with DeepStack, and one that cuts an image into tiles and has an overview."""


def array(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["float32"]), "<f4").reshape(packed["shape"])


@pytest.mark.parametrize("view", VIEWS)
def test_from_upload_to_picture(browser: Any, web: str, view: str) -> None:
    with opened(browser, web) as page:
        page.upload((GALLERY / "screen-1.png").read_bytes())
        page.page.locator(".shot img[alt='uploaded 1']").wait_for()
        page.page.fill("#task", TASK)
        if view in ("attention", "attribution", "patching"):
            page.page.click("#more summary")
            page.page.fill("#prefill", PREFILL)
        page.tab(view)
        if view == "patching":
            page.set("second_image", "screen-1-moved.png")
        page.page.click("#run")
        page.settled()
        if view == "predict":
            assert "click(start_box='(87,164)')" in page.page.inner_text(".answer")
            assert page.page.inner_text("#click").startswith("A click at 87, 164")
            page.page.locator(".token").nth(3).hover()
            assert re.search(r"“\u2068·Login\u2069” .*: 100.0 %", page.page.inner_text("#result .tip"))
            x, y = (87 / 224, 164 / 224)
            heat = page.heat()
            across, down = int(x * heat.shape[1]), int(y * heat.shape[0])
            assert heat[down - 14 : down + 14, across - 14 : across + 14].any(), "the click is marked where it is"
            assert not heat[: down - 30].any()
        elif view == "forward":
            assert page.page.locator("tbody tr").count() == 19, "the text's positions"
            page.set("patches", "all")
            assert page.page.locator("tbody tr").count() > 64
            page.set("patches", "text")
        elif view == "lens":
            page.page.frame_locator("iframe").locator(".cell").first.wait_for()
        elif view == "attention":
            page.set("layer", 3)
            assert "layer 3, the mean of 6 heads" in page.page.inner_text("#said")
        elif view == "attribution":
            assert "is missing" in page.page.inner_text("#completeness")
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
        page.page.locator(f".shot img[src$='{answered.value.json()['filename']}']").wait_for()
        page.page.fill("#task", "Click on the red circle")
        page.run()
        assert "red circle" in page.page.inner_text(".answer")


def test_the_overlay_is_right(browser: Any, web: str, remote_numpy: vs.RemoteVLM) -> None:
    """The most opaque patch is the one that Python finds, for every layer, some heads, and signed scores."""
    inputs = remote_numpy.prepare_messages(TASK, GALLERY / "screen-1.png", assistant_prefill=PREFILL)
    grid = inputs.images[0].grid
    with remote_numpy.run_with_cache("lm.blocks.*.attn.hook_pattern") as cache:
        remote_numpy.forward(inputs, logits_to_keep=None)
    with opened(browser, web, link("attention", TASK)) as page:
        page.settled()
        for layer in range(remote_numpy.info.layers):
            pattern = cache[f"lm.blocks.{layer}.attn.hook_pattern"][0, :, -1]
            page.set("layer", layer)
            for heads, row in (("mean", pattern.mean(0)), ("max", pattern.max(0)), ("one", pattern[4])):
                if heads == "one":
                    page.set("head", 4)
                else:
                    page.set("heads", heads)
                expected = np.unravel_index(cache.image_grid(row).argmax(), grid)
                assert page.strongest(grid) == expected, (layer, heads)
    why = remote_numpy.attribute(inputs)
    expected = np.unravel_index(np.abs(why.image_grid(0)).argmax(), grid)
    with opened(browser, web, link("attribution", TASK)) as page:
        page.settled()
        assert page.strongest(grid) == expected


def test_several_images_in_one_prompt(browser: Any, web: str, remote_numpy: vs.RemoteVLM) -> None:
    """Each image has its own overlay; a link holds them all, in order."""
    names, task = ["screen-1.png", "screen-3.png"], "Click on the Menu button"
    inputs = remote_numpy.prepare_messages(task, [GALLERY / name for name in names])
    with remote_numpy.run_with_cache("lm.blocks.2.attn.hook_pattern", positions=[-1]) as cache:
        remote_numpy.forward(inputs, logits_to_keep=None)
    row = cache["lm.blocks.2.attn.hook_pattern"][0, :, 0].mean(0)
    grids = [cache.image_grid(row, image) for image in range(2)]
    with opened(browser, web) as page:
        page.upload(*((GALLERY / name).read_bytes() for name in names))
        page.until("document.querySelectorAll('.shot').length", 2)
        page.page.uncheck("#several")
        page.page.click("#gallery button[data-name='screen-1.png']")
        page.page.check("#several")
        page.page.click("#gallery button[data-name='screen-3.png']")
        assert page.page.locator(".shot").count() == 2
        page.page.fill("#task", task)
        found = page.result("attention")
        assert len(found["prompt"]["images"]) == 2
        for _ in range(2):
            page.set("layer", 2)
            peak = max(grid.max() for grid in grids)
            for shot, grid in enumerate(grids):
                opacity = page.over(grid.shape, shot) / 255
                np.testing.assert_allclose(opacity, 0.82 * grid / peak, atol=0.02)
            page.until("location.hash.includes('layer=2') && location.hash.includes('run=1')")
            page.page.reload()
            page.settled()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(browser: Any, web: str, server: str, family: str) -> None:
    """Loaded through the page; tiles and the overview have their own panes, drawn as Python has them."""
    directory = str(zoo.build(family))
    with opened(browser, web) as page:
        page.page.select_option("#model", "\n")
        page.page.fill("#other", directory)
        page.page.press("#other", "Enter")
        page.until("document.querySelector('#model').value", directory)
        page.page.locator("#state.ready").wait_for()
        page.upload(as_png(zoo.wide()))
        page.page.fill("#task", "Click on the red circle")
        page.tab("predict")
        page.set("max_new_tokens", 4)
        for view in VIEWS:
            page.run(view)
        found = page.result("attention")
        page.set("layer", 1)
        with vs.connect(server, model=directory, arrays="numpy") as model:
            inputs = model.prepare_messages("Click on the red circle", zoo.wide())
            with model.run_with_cache("lm.blocks.1.attn.hook_pattern", positions=[-1]) as cache:
                model.forward(inputs, logits_to_keep=None)
            row = cache["lm.blocks.1.attn.hook_pattern"][0, :, 0].mean(0)
            layout = inputs.images[0]
            assert page.page.locator(".shot").count() == 1 + any(tile.overview for tile in layout.tiles)
            assert page.strongest(layout.grid) == np.unravel_index(cache.image_grid(row).argmax(), layout.grid)
            for number, tile in enumerate(layout.tiles):
                if tile.overview:
                    grid = cache.image_grid(row, tile=number)
                    assert page.strongest(tile.grid, 1) == np.unravel_index(grid.argmax(), tile.grid)
        assert len(found["prompt"]["images"][0]["panes"]) == page.page.locator(".shot").count()
        if zoo.FAMILIES[family].tiled:
            name = f"document.querySelector('#model').selectedOptions[0].textContent = 'a tiny {family}'"
            page.page.evaluate(name)  # not where it lies
            save_picture(page.page, "tiles")
    unload(server, directory)


def test_a_clicked_patch_reads(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        page.run("attention")
        box = page.page.locator(".shot canvas").first.bounding_box()
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
        {"position": 3 + y * side + x, "row": y, "column": x, "box": [x * 28, y * 28, x * 28 + 28, y * 28 + 28]}
        for y in range(side)
        for x in range(side)
    ]
    panes = [{"name": "", "patches": patches}]
    image = {"size": [size, size], "processed_size": [size, size], "grid": [side, side], "panes": panes}
    places = [patch["position"] for patch in patches]
    prompt = {"tokens": [f"t{i}" for i in range(length)], "images": [image], "image_positions": places}
    packed = {"shape": list(patterns.shape), "float32": base64.b64encode(patterns.tobytes()).decode()}
    data = {"position": length - 1, "layers": list(range(layers)), "heads": heads, "prompt": prompt, "patterns": packed}
    body = json.dumps({"type": "result", "data": data}) + "\n"
    with opened(browser, web) as page:
        page.page.route("**/api/attention", lambda route: route.fulfill(body=body, content_type="application/x-ndjson"))
        page.run("attention")
        asked: list[str] = []
        page.page.on("request", lambda request: asked.append(request.url))
        script = (
            "() => { const f = document.querySelector('#control-layer'); const began = performance.now();"
            "for (let i = 0; i < 20; i++) { f.value = i; f.dispatchEvent(new Event('input')); }"
            "return (performance.now() - began) / 20 }"
        )
        print(f"a redraw of 28 heads takes {page.page.evaluate(script):.1f} ms")

        for control, value, row in (
            ("head", 17, patterns[19, 17]),
            ("heads", "max", patterns[19].max(0)),
            ("layer", 11, patterns[11].max(0)),
            ("heads", "mean", patterns[11].mean(0)),
            ("head", 27, patterns[11, 27]),
        ):
            page.set(control, value)
            grid = row[3 : 3 + side * side].reshape(side, side)
            np.testing.assert_allclose(page.over((side, side)) / 255, 0.82 * grid / grid.max(), atol=0.02)
        page.until("location.hash.includes('layer=11')")
        polled = ("/api/model/status", "/api/model/options")
        assert [url for url in asked if "/api/" in url and not any(path in url for path in polled)] == []


def test_every_method_with_its_options(browser: Any, web: str, remote_numpy: vs.RemoteVLM) -> None:
    """What the page asks for is what Python gives for the same words."""
    inputs = remote_numpy.prepare_messages(TASK, GALLERY / "screen-1.png", assistant_prefill=PREFILL)
    moved = remote_numpy.prepare_messages(TASK, GALLERY / "screen-1-moved.png", assistant_prefill=PREFILL)
    answer = "87,164)')"
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"method": "direct_logit", "explain": "pair", "target": "8", "against": "1"}, {"target": ("8", "1")}),
        ({"method": "gradient_x_input", "explain": "answer", "answer": answer}, {"target": vs.Target(answer=answer)}),
        ({"method": "integrated_gradients", "steps": 8, "baseline": "black"}, {"steps": 8, "baseline": "black"}),
        (
            {"method": "occlusion", "window": 4, "stride": 2, "baseline": "blurred"},
            {"window": 4, "stride": 2, "baseline": "blurred"},
        ),
        ({"method": "attribution_patching", "second_image": "screen-1-moved.png"}, {"against": moved}),
        ({"method": "attention_rollout"}, {}),
        ({"method": "relevancy", "explain": "token", "target": "8"}, {"target": "8"}),
        ({"method": "grad_cam"}, {}),
    ]
    with opened(browser, web, link("attribution", TASK, run=False)) as page:
        for chosen, options in cases:
            page.set("explain", "next")
            for control, value in chosen.items():
                page.set(control, value)
            found = page.result()
            why = remote_numpy.attribute(inputs, chosen["method"], **options)
            np.testing.assert_allclose(found["scores"], why.scores[0], atol=1e-5, err_msg=chosen["method"])
            said = page.page.inner_text("#completeness")
            assert said == "This method promises no sum." if found["residual"] is None else "is missing" in said
            bars = page.page.locator(".bars").first.locator("span").all_inner_texts()
            assert ("layer 4, attention" in bars) == (why.head_scores is not None)
            if chosen["method"] == "attribution_patching":
                np.testing.assert_allclose(array(found["layer_scores"]), why.layer_scores[0], atol=1e-5)
                page.page.locator("canvas[aria-label^='What the residual stream']").click(position={"x": 200, "y": 10})
                assert "after layer 0" in page.page.inner_text(".scale")


def test_rows_fill_in_and_progress_is_told(browser: Any, web: str) -> None:
    """What the page says on its way, kept by an observer: every cell of a sweep, every step of an integration."""
    watch = (
        "() => { window.told = []; window.drawn = 0;"
        " new MutationObserver(() => window.told.push(doing.textContent)).observe(doing, { childList: true });"
        " new MutationObserver(() => { window.drawn += Boolean(document.querySelector('#result .wide'))"
        " && !document.querySelector('#result dl') }).observe(result, { childList: true }); }"
    )

    def counted(page: Any, what: str) -> list[tuple[int, int]]:
        found = (re.fullmatch(rf"(\d+) of (\d+) {what}", said) for said in page.page.evaluate("window.told"))
        return [(int(match[1]), int(match[2])) for match in found if match]

    with opened(browser, web, link("patching", TASK, prefill="", run=False)) as page:
        page.page.evaluate(watch)
        page.set("second_image", "screen-1-moved.png")
        page.set("over", "text")
        page.run_only()
        cells = counted(page, "cells")
        assert cells == sorted(cells)
        assert cells[-1] == (95, 95), "five layers of 19 tokens"
        assert page.page.evaluate("window.drawn"), "rows are drawn while others are on their way"
        page.tab("attribution")
        page.set("method", "integrated_gradients")
        page.set("steps", 64)
        page.run_only()
        steps = counted(page, "steps")
        assert steps == sorted(steps)
        assert steps[-1] == (64, 64)


@pytest.mark.parametrize("view", ["attribution", "patching"])
def test_cancel_in_the_middle(browser: Any, web: str, view: str) -> None:
    """A run that would take very long ends when it is cancelled, and the next one is served."""
    with opened(browser, web, link(view, TASK, prefill="", run=False)) as page:
        if view == "attribution":
            page.set("method", "integrated_gradients")
            page.set("steps", 4096)
        else:
            page.set("second_image", "screen-1-moved.png")
        page.page.click("#run")
        page.page.locator("#doing:has-text(' of ')").wait_for()
        page.page.click("#cancel")
        assert page.page.inner_text("#doing") == "cancelled"
        assert page.page.is_disabled("#cancel")
        page.run("predict")
        assert "Action: click" in page.page.inner_text(".answer")
        page.tab(view)
        assert not page.page.is_visible("#exports"), "nothing of it came later"


def test_a_link_restores_the_view(browser: Any, web: str) -> None:
    with opened(browser, web) as page:
        page.page.locator("#gallery button").nth(1).click()
        page.run("attention")
        page.set("head", 2)
        page.set("layer", 4)
        page.until("location.hash.includes('layer=4')")
        heat, address = page.heat(), page.page.url
        page.page.reload()
        page.settled()
        assert page.page.input_value("#task") == "Click on the red circle"
        assert "layer 4, head 2" in page.page.inner_text("#said")
        assert np.array_equal(page.heat(), heat)
        page.page.evaluate("location.hash = 'view=predict&image=screen-1.png&task=Click+on+the+Login+button&run=1'")
        page.page.locator(".answer:has-text('Login')").wait_for()
    with opened(browser, web, address.split("/", 3)[3]) as page:
        page.settled()
        assert np.array_equal(page.heat(), heat)
    with opened(browser, web, "#view=predict&image=" + "0" * 32 + ".png&task=x&run=1") as page:
        page.settled(ok=False)
        assert re.search("(upload|choose) it again", page.wrong())
    with opened(browser, web, "#view=nothing&layer=-4&image=../../etc/passwd&top_k=NaN&task=%3Cscript%3E"):
        pass


def test_a_link_says_all(browser: Any, web: str) -> None:
    """What it leaves out is not kept from before, what it asks is bounded, and a run of before it is ended."""
    with opened(browser, web, link("predict", TASK, run=False)) as page:

        def asked(view: str, given: str) -> dict[str, Any]:
            with page.page.expect_request(f"**/api/{view}", timeout=10_000) as request:
                page.page.evaluate(
                    "(hash) => { location.hash = hash }", f"view={view}&image=screen-1.png&{given}&run=1"
                )
            page.settled()
            return request.value.post_data_json  # type: ignore[no-any-return]

        found = asked("predict", "task=Click")
        assert (found["task"], found["assistant_prefill"]) == ("Click", "")
        assert asked("predict", "max_new_tokens=4")["task"] == "Click on the Login button", "as on a page just opened"
        page.page.fill("#task", "")
        page.until("location.hash.includes('task=&')")
        page.page.reload()
        page.usable()
        assert page.page.input_value("#task") == ""

        held: list[Any] = []
        page.page.route("**/api/predict", lambda route: held.append(route))
        for after in ("predict", "forward"):
            page.tab("predict")
            page.page.fill("#task", TASK)
            with page.page.expect_request("**/api/predict"):
                page.page.click("#run")
            with page.page.expect_event("requestfailed", timeout=10_000):
                page.page.evaluate(f"location.hash = 'view={after}&image=screen-2.png&task=Another'")
            held.pop().abort()
            assert page.page.is_disabled("#cancel")
            assert page.page.inner_text("#result") == ""
            assert "run=1" not in page.page.url
            assert page.page.input_value("#task") == "Another"

        assert asked("forward", "task=Click&top_k=999")["top_k"] == 50
        page.tab("lens")
        assert page.page.input_value("#control-top_k") == "20", "what Forward takes is too much for the lens"
        asked("attention", "task=Click&layer=-3&head=-1&heads=one&pane=-7")
        assert "layer 0, head 0" in page.page.inner_text("#said")
        asked("attention", "task=Click&layer=99&head=1.6&heads=one")
        assert "layer 4, head 2" in page.page.inner_text("#said")


def test_the_model_that_is_shown_answers(browser: Any, web: str) -> None:
    """When another becomes the server's first, what the old one gave goes; a link still names only what was chosen."""

    def another(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), "name": "another"})

    with opened(browser, web) as page:
        page.run()
        assert 'connect("' in page.page.text_content("#python")
        page.page.route("**/api/model/status*", another)
        page.until("document.querySelector('#model').value", "another")
        assert page.page.inner_text("#result") == ""
        assert not page.page.is_visible("#exports")
        assert page.page.inner_text("#doing").endswith("now: another")
        page.run_only(ok=False)
        assert "another" in page.wrong(), "asked by the name that is shown, which has gone"
        page.page.unroute("**/api/model/status*")
        page.page.click("#run")
        page.until("document.querySelector('#model').value", "spectra-tiny")
        page.run_only()
        page.until("location.hash.includes('run=1')")
        assert "model=" not in page.page.url


def test_a_model_that_fails_to_load(browser: Any, web: str, server: str) -> None:
    name = "/nowhere/<b>at all</b>"
    with opened(browser, web) as page:
        page.page.select_option("#model", "\n")
        page.page.fill("#other", name)
        page.page.press("#other", "Enter")
        page.page.locator("#state:has-text('failed')").wait_for()
        assert name in page.page.inner_text("#lost")
        page.run("predict", ok=False)
        assert "could not be loaded" in page.wrong()
        page.page.select_option("#model", "spectra-tiny")
        page.page.locator("#state.ready").wait_for()
        assert not page.page.is_visible("#lost")
        page.run()
    unload(server, name)


def test_a_server_that_goes_away_and_comes_back(browser: Any) -> None:
    port = free_port()
    arguments = ("--model", "spectra-tiny", "--device", "cpu", "--port", str(port))
    serving, _ = start_server(*arguments)
    process, address = start_web("--server", f"127.0.0.1:{port}")
    try:
        with opened(browser, address) as page:
            page.run()
            stop_server(serving)
            page.page.locator("#state:has-text('no server')").wait_for()
            assert page.page.is_visible("#lost")
            assert "Action: click" in page.page.inner_text(".answer"), "what was there stays"
            page.page.click("#run")
            page.page.locator("#wrong:not([hidden])").wait_for()
            serving, _ = start_server(*arguments)
            page.page.locator("#state.ready").wait_for()
            assert not page.page.is_visible("#lost")
            page.run()
            assert "Action: click" in page.page.inner_text(".answer")
    finally:
        stop_server(serving)
        stop_server(process)


def test_signing_in(browser: Any, tmp_path: Path) -> None:
    """A server that wants a token: asked for once, and neither in the link nor where scripts can read. It loads no
    model that nobody allowed, and says so.
    """
    tokens, token = tmp_path / "tokens", "ada-" + "a" * 30
    tokens.write_text(f"ada * {token}\n")
    tokens.chmod(0o600)
    serving, server = start_server("--model", "spectra-tiny", "--device", "cpu", "--token-file", str(tokens))
    process, address = start_web("--server", server)
    try:
        with opened(browser, address, link("predict", TASK, prefill=""), ready=False) as page:
            page.page.locator("#sign-in[open]").wait_for()
            for _ in range(4):
                page.page.keyboard.press("Escape")
            page.page.locator("#sign-in[open]").wait_for(timeout=10_000)  # nothing can be done without
            page.page.fill("#token", "wrong")
            page.page.keyboard.press("Enter")
            page.page.locator("#refused:not([hidden])").wait_for()
            save_picture(page.page, "sign_in")
            page.page.fill("#token", token)
            page.page.keyboard.press("Enter")
            page.settled()
            assert "Login" in page.page.inner_text(".answer")
            assert not page.page.is_visible("#sign-in")
            assert token not in page.page.url + page.page.evaluate(
                "document.cookie + JSON.stringify({...localStorage})"
            )
            assert token not in page.page.content()
            page.page.reload()
            page.settled()
            page.run("lens")
            page.page.frame_locator("iframe").locator(".cell").first.wait_for()
            page.page.select_option("#model", "\n")
            page.page.fill("#other", "/etc")
            page.page.press("#other", "Enter")
            page.page.locator("#wrong:has-text('/etc')").wait_for()
            page.until("document.querySelector('#model').value", "spectra-tiny")
            page.page.click("#sign-out")
            page.page.locator("#sign-in[open]").wait_for()
    finally:
        stop_server(process)
        stop_server(serving)


def test_two_uploads_at_once(browser: Any, web: str) -> None:
    """The slower joins what came meanwhile."""
    held: list[Any] = []
    with opened(browser, web) as page:
        page.page.check("#several")
        page.page.route("**/api/upload", lambda route: route.continue_() if held else held.append(route))
        files = [
            [{"name": "x", "mimeType": "image/png", "buffer": (GALLERY / f"screen-{n}.png").read_bytes()}]
            for n in (2, 3)
        ]
        with page.page.expect_request("**/api/upload"):
            page.page.set_input_files("#file", files[0])
        page.page.set_input_files("#file", files[1])
        page.until("document.querySelectorAll('.shot').length", 2)
        held[0].continue_()
        page.page.locator("#gallery button[title='uploaded 2']").wait_for()
        page.until("document.querySelectorAll('.shot').length", 3)


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
            (bomb(20_000, 10_000), "the image has"),
        ):
            page.upload(data, name="../../etc/passwd.png")
            page.page.locator(f"#wrong:has-text('{said}')").wait_for()
        page.page.fill("#task", NASTY)
        page.page.click("#more summary")
        page.page.fill("#prefill", NASTY)
        for view in VIEWS:
            page.run(view)
            if view == "lens":
                page.page.frame_locator("iframe").locator(".cell").first.wait_for()
            assert page.page.locator("img[src=x]").count() == 0
            assert page.page.locator("body script").count() == 0
        page.tab("attribution")
        page.set("explain", "token")
        page.set("target", NASTY)
        page.run("attribution", ok=False)
        assert "<script>" in page.wrong(), "shown as text"
        page.set("explain", "next")
        page.page.fill("#prefill", "")
        page.page.fill("#task", TASK)
        page.run("predict")


def test_a_lens_that_has_gone(browser: Any, web: str) -> None:
    """Said in words, and nothing of it is offered; in another view nothing is said of it."""
    problem = json.dumps({"detail": "that page is not here", "status": 404})

    def refuse(route: Any) -> None:
        route.fulfill(status=404, content_type="application/problem+json", body=problem)

    with opened(browser, web, link("lens", TASK)) as page:

        def gone(said: str) -> None:
            page.page.locator(f"#wrong:has-text('{said}')").wait_for(timeout=10_000)
            assert page.page.locator("iframe").count() == 0
            assert not page.page.is_visible("#exports")

        page.settled()
        page.page.frame_locator("iframe").locator(".cell").first.wait_for()
        page.tab("predict")
        for number in range(24):  # as many as are kept
            page.page.request.post(f"{web}/api/logit-lens", data={"task": f"{number}", "page": True})
        page.tab("lens")
        gone("run the analysis again")
        page.run_only()
        page.page.frame_locator("iframe").locator(".cell").first.wait_for()
        page.page.route("**/lens.csv", refuse)
        page.page.click("#exports :text-is('CSV')")
        gone("not here")
        page.run_only()
        page.tab("predict")
        held: list[Any] = []
        page.page.route("**/api/pages/*", lambda route: held.append(route))
        with page.page.expect_request("**/api/pages/*"):
            page.tab("lens")
        page.tab("predict")
        with page.page.expect_response("**/api/pages/*"):
            refuse(held[0])
        assert page.wrong() == ""


def test_tokens_that_turn_a_sentence_around(browser: Any, web: str) -> None:
    """They are shown by their codes, and kept to themselves; what is taken home has them as they are."""
    nasty, shown = "\u202e12", "\u2068⟨U+202E⟩12\u2069"

    def turned(route: Any) -> None:
        *events, last = route.fetch().text().strip().split("\n")
        event = json.loads(last)
        event["data"]["prompt"]["tokens"][-1] = event["data"]["target"] = nasty
        if "text" in event["data"]:
            event["data"]["tokens"] = [{"text": nasty, "id": 7, "prob": 0.5}]
        route.fulfill(body="\n".join([*events, json.dumps(event), ""]), content_type="application/x-ndjson")

    with opened(browser, web, link("attention", f"Click {nasty}", run=False)) as page:
        for view in ("predict", "attention", "attribution"):
            page.page.route(f"**/api/{view}", turned)
        page.run("attention")
        assert f"What “{shown}” (position" in page.page.inner_text("#said")
        assert json.loads(page.download("JSON"))["prompt"]["tokens"][-1] == nasty
        page.run("attribution")
        assert f"of “{shown}”" in page.page.inner_text(".scale")
        assert "⟨U+202E⟩12" in page.page.inner_text("dl")
        page.run("predict")
        page.page.locator(".token").hover()
        assert page.page.inner_text("#result .tip") == f"“{shown}” (token 7): 50.0 %"
        assert nasty in page.download("CSV").decode()
        lines = page.page.text_content("#python")
        assert '"Click \\u202E12"' in lines
        assert "\u202e" not in lines


def same_numbers(view: str, found: dict[str, Any], names: dict[str, Any]) -> None:
    """The page's result and the Python lines' are the same numbers."""
    if view == "predict":
        assert names["answer"].text[0] == found["text"]
        probs = np.exp(np.asarray(names["answer"].logprobs[0]))
        np.testing.assert_allclose([token["prob"] for token in found["tokens"]], probs, rtol=1e-5)
    elif view == "forward":
        probs = [[choice["prob"] for choice in row["top"]] for row in found["positions"]]
        np.testing.assert_allclose(probs, np.asarray(names["lens"].probs)[0, 0], rtol=1e-5)
    elif view == "attention":
        row = array(found["patterns"])[0].mean(0)
        np.testing.assert_allclose(np.asarray(names["row"]), row, atol=1e-6)
        places = [patch["position"] for patch in found["prompt"]["images"][0]["patches"]]
        np.testing.assert_allclose(np.asarray(names["grid"]).ravel(), row[places], atol=1e-6)
    elif view == "attribution":
        np.testing.assert_allclose(np.asarray(names["why"].scores)[0], found["scores"], atol=1e-5)
        np.testing.assert_allclose(float(names["why"].total[0]), found["total"], rtol=1e-5)
    elif view == "patching":
        np.testing.assert_allclose(np.asarray(names["sweep"].normalized), found["values"], atol=1e-5)
    else:
        readings = [[[choice["prob"] for choice in cell] for cell in layer] for layer in found["readings"]]
        np.testing.assert_allclose(np.asarray(names["lens"].probs)[:, 0], readings, rtol=1e-5)


def test_the_python_lines_make_the_same_numbers(
    browser: Any, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "screenshot.png").write_bytes((GALLERY / "screen-1.png").read_bytes())
    (tmp_path / "second.png").write_bytes((GALLERY / "screen-1-moved.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    with opened(browser, web) as page:
        for view in VIEWS:
            page.tab(view)
            if view == "patching":
                page.set("second_image", "screen-1-moved.png")
            found = page.result(view)
            names: dict[str, Any] = {}
            exec(compile(page.page.text_content("#python"), view, "exec"), names)
            same_numbers(view, found, names)
            names["model"].close()


def test_downloads(browser: Any, web: str) -> None:
    """Every view gives a picture of what is seen, its table, and everything as JSON."""
    heads = {
        "predict": "index,token,id,probability",
        "forward": "position,token,entropy,rank,next,probability",
        "attention": "image,row,column,position,share",
        "attribution": "position,token,image,row,column,score",
        "lens": "layer,position,token,rank,next,probability,entropy",
        "patching": "layer,head,label,share",
    }
    keys = {"predict": "tokens", "forward": "positions", "attention": "patterns", "attribution": "scores"}
    with opened(browser, web) as page:
        for view in VIEWS:
            page.run(view)
            for _ in range(2):
                picture = Image.open(io.BytesIO(page.download("PNG")))
                assert min(picture.size) > 200, view
                assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, "something is drawn"
                table = page.download("CSV").decode().splitlines()
                assert table[0] == heads[view]
                assert len(table) > 10
                whole = json.loads(page.download("JSON"))
                assert keys.get(view, {"lens": "readings", "patching": "values"}.get(view)) in whole
        page.tab("lens")
        assert page.download("HTML").startswith(b"<!doctype html>")
        page.page.fill("#task", '=cmd|"x"')
        page.run("forward")
        assert "'=" in page.download("CSV").decode() or "=cmd" not in page.download("CSV").decode()


def test_a_picture_of_a_long_answer(browser: Any, web: str) -> None:
    """Browsers make no picture of any size: it has the first rows, and says so; where none is made, that is said."""
    data = {
        "text": "a" * 4096,
        "tokens": [{"text": "a", "id": 1, "prob": 0.9}] * 4096,
        "click": None,
        "prompt": {"tokens": ["x"], "images": [], "image_positions": []},
    }
    body = json.dumps({"type": "result", "data": data}) + "\n"
    wide = """import('/static/export.js').then(({ sheet }) => {
        const wide = document.createElement('canvas'); wide.width = 60_000;
        return sheet('', null, [['', wide]]).width })"""
    with opened(browser, web) as page:
        page.page.route("**/api/predict", lambda route: route.fulfill(body=body, content_type="application/x-ndjson"))
        page.run()
        assert 9_000 < Image.open(io.BytesIO(page.download("PNG"))).height < 16_384
        assert len(page.download("CSV").splitlines()) == 4097
        assert page.page.evaluate(wide) == 16_384
        page.page.evaluate("() => { HTMLCanvasElement.prototype.toBlob = (made) => made(null) }")
        page.page.click("#exports :text-is('PNG')")
        page.page.locator("#wrong:has-text('no picture')").wait_for(timeout=10_000)
