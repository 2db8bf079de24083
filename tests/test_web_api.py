"""The web app's REST interface, over a real server: what it answers, what it refuses, and that nothing is lost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import vlm_spectra as vs
from calls import WAIT, unload, until
from conftest import stop_server
from http_calls import PREFIX, Channel
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.web.app import create_app
from vlm_spectra_server.web.pages import Pages
from vlm_spectra_server.web.runs import Runs
from vlm_spectra_server.web.uploads import UploadLimits, Uploads
from webapp import free_port, start_web

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "server" / "vlm_spectra_server" / "web" / "static" / "gallery"
TASK = "Click on the Login button"
ASKED = {"filename": "screen-1.png", "task": TASK}
NASTY = '<script>alert(1)</script> & "it\'s" </script><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module")
def web(web: str) -> Iterator[Any]:
    with httpx.Client(base_url=web, timeout=200) as client:
        yield client


@pytest.fixture(scope="module")
def asked(remote_numpy: vs.RemoteVLM) -> vs.Inputs:
    return remote_numpy.prepare_messages(TASK, GALLERY / "screen-1.png")


def post(web: Any, name: str, **question: Any) -> Any:
    answer = web.post(f"/api/{name}", json={**ASKED, **question})
    assert answer.status_code == 200, answer.text
    return answer.json()


def lines(web: Any, name: str, **question: Any) -> list[dict[str, Any]]:
    with web.stream("POST", f"/api/{name}", json={**ASKED, "stream": True, **question}) as answer:
        return [json.loads(line) for line in answer.iter_lines()]


def problem(answer: Any, status: int, reason: str = "") -> dict[str, Any]:
    """Problem details, checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    found = answer.json()
    assert found["status"] == status
    assert found["detail"].endswith((".", ")"))
    assert found["title"]
    assert found["type"].startswith("urn:vlm-spectra:problem:")
    assert reason in ("", found["reason"])
    return found


def png(size: tuple[int, int] = (64, 48), **saving: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "PNG", **saving)
    return buffer.getvalue()


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """The head of a PNG of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_predict_is_the_models_answer(web: Any, remote_numpy: vs.RemoteVLM, asked: vs.Inputs) -> None:
    answer = remote_numpy.generate(asked, max_new_tokens=64)
    found = post(web, "predict")
    assert found["text"] == answer.text[0]
    assert found["click"] == {"x": answer.clicks[0].x, "y": answer.clicks[0].y}
    probs = [token["prob"] for token in found["tokens"]]
    np.testing.assert_allclose(probs, np.exp(answer.logprobs[0]), rtol=1e-5)
    events = lines(web, "predict")
    assert [e["text"] for e in events if e["type"] == "token"] == [token["text"] for token in found["tokens"]]
    assert events[-1] == {"type": "result", "data": found}


def test_a_prefill_is_part_of_the_answer(web: Any) -> None:
    found = post(web, "predict", assistant_prefill="Thought: The Login button.\nAction: click(start_box='(12,")
    assert found["click"]["x"] == 12
    assert not found["text"].startswith("Thought")


def test_forward_is_the_models_own_next_tokens(web: Any, remote_numpy: vs.RemoteVLM, asked: vs.Inputs) -> None:
    top = remote_numpy.forward(asked).top_tokens(3)[0]
    found = post(web, "forward", top_k=3)["positions"]
    assert [[choice["text"] for choice in row["top"]] for row in found] == [[t.text for t in row] for row in top]
    np.testing.assert_allclose(
        [[choice["prob"] for choice in row["top"]] for row in found], [[t.prob for t in row] for row in top], rtol=1e-4
    )


def test_attention_is_the_pattern(web: Any, remote_numpy: vs.RemoteVLM, asked: vs.Inputs) -> None:
    with remote_numpy.run_with_cache("lm.blocks.*.attn.hook_pattern") as cache:
        remote_numpy.forward(asked, logits_to_keep=None)
    patterns = cache.stack("lm.blocks.*.attn.hook_pattern")[:, 0]  # [layers, heads, query, key]
    found = post(web, "attention")
    packed = np.frombuffer(base64.b64decode(found["patterns"]["float32"]), "<f4").reshape(found["patterns"]["shape"])
    np.testing.assert_allclose(packed, patterns[:, :, -1], atol=1e-5)
    one = post(web, "attention", layer=3, head=1, position=-2)
    np.testing.assert_allclose(one["attention"], cache.image_grid(patterns[3, 1, -2]), atol=1e-5)
    assert one["position"] == patterns.shape[2] - 2
    assert one["image_share"] == pytest.approx(float(np.sum(one["attention"])), rel=1e-5)
    for head, reduce in (("mean", np.mean), ("max", np.max)):
        found = post(web, "attention", layer=2, head=head)["scores"]
        np.testing.assert_allclose(found, reduce(patterns[2, :, -1], axis=0), atol=1e-5)


def test_attribution_and_its_completeness(web: Any, remote_numpy: vs.RemoteVLM, asked: vs.Inputs) -> None:
    why = remote_numpy.attribute(asked)
    found = post(web, "attribution")
    np.testing.assert_allclose(found["scores"], why.scores[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["heads"], why.heads(0), rtol=1e-4, atol=1e-5)
    assert found["total"] == pytest.approx(found["target_value"], rel=1e-4)
    pair = post(web, "attribution", target=" Login", against=" Menu")
    assert pair["target_value"] == pytest.approx(
        float(remote_numpy.attribute(asked, target=(" Login", " Menu")).target_value[0])
    )
    assert post(web, "attribution", method="occlusion")["residual"] is None, "it promises no sum"
    answer = web.post("/api/attribution", json={**ASKED, "against": " Menu"})
    assert problem(answer, 400, "INVALID_INPUT")["field"] == "target"


def test_attribution_by_every_option(web: Any, remote_numpy: vs.RemoteVLM, asked: vs.Inputs) -> None:
    steps = remote_numpy.attribute(asked, "integrated_gradients", steps=4, baseline="black")
    found = post(web, "attribution", method="integrated_gradients", steps=4, baseline="black")
    np.testing.assert_allclose(found["scores"], steps.scores[0], rtol=1e-3, atol=1e-4)
    assert found["steps"] == 4
    assert found["baseline_value"] == pytest.approx(float(steps.baseline_value[0]), rel=1e-4)
    cover = remote_numpy.attribute(asked, "occlusion", window=3, stride=2, baseline="blurred")
    found = post(web, "attribution", method="occlusion", window=3, stride=2, baseline="blurred")
    np.testing.assert_allclose(found["scores"], cover.scores[0], rtol=1e-3, atol=1e-4)
    second = remote_numpy.prepare_messages(TASK, GALLERY / "screen-1-moved.png")
    patched = remote_numpy.attribute(asked, "attribution_patching", against=second)
    moved = {"filename": "screen-1-moved.png", "task": TASK}
    found = post(web, "attribution", method="attribution_patching", corrupted=moved)
    layers = np.frombuffer(base64.b64decode(found["layer_scores"]["float32"]), "<f4")
    np.testing.assert_allclose(layers.reshape(found["layer_scores"]["shape"]), patched.layer_scores[0], atol=1e-4)
    answer = remote_numpy.attribute(asked, "gradient_x_input", vs.Target(answer="Thought:"))
    found = post(web, "attribution", method="gradient_x_input", answer="Thought:")
    assert found["target_value"] == pytest.approx(float(answer.target_value[0]), rel=1e-4)
    assert found["target"] == "Thought:"
    number = int(remote_numpy.attribute(asked, target=" Login").target_ids[0])
    assert post(web, "attribution", target=number, position=-2)["target"] == " Login"
    for wrong, field in (
        ({"steps": 4}, "steps"),
        ({"method": "attribution_patching"}, "against"),
        ({"answer": "x", "target": " Login"}, "answer"),
        ({"method": "occlusion", "window": 2, "stride": 3}, "stride"),
    ):
        refusal = problem(web.post("/api/attribution", json={**ASKED, **wrong}), 400, "INVALID_INPUT")
        assert refusal["field"] == field


def test_several_images(web: Any, remote_numpy: vs.RemoteVLM) -> None:
    names = ["screen-1.png", "screen-2.png"]
    two = remote_numpy.prepare_messages(TASK, [GALLERY / name for name in names])
    found = post(web, "attention", filename=names, layer=2, head=0)
    assert found["prompt"]["tokens"] == two.token_labels[0]
    assert len(found["prompt"]["images"]) == 2
    with remote_numpy.run_with_cache("lm.blocks.2.attn.hook_pattern", heads=[0], positions="last") as cache:
        remote_numpy.forward(two, None)
    row = cache["lm.blocks.2.attn.hook_pattern"][0, 0, 0]
    for number, grid in enumerate(found["attentions"]):
        np.testing.assert_allclose(grid, cache.image_grid(row, number), atol=1e-5)
    assert found["attention"] == found["attentions"][0]
    assert post(web, "model/patch-info", filename=[])["images"] == []
    problem(web.post("/api/predict", json={**ASKED, "filename": ["screen-1.png"] * 9}), 422, "INVALID_REQUEST")
    problem(web.post("/api/predict", json={**ASKED, "filename": ["screen-1.png", "none.png"]}), 404, "NO_SUCH_IMAGE")


def test_logit_lens_and_its_page(web: Any) -> None:
    found = post(web, "logit-lens", top_k=2, task=NASTY)
    assert len(found["readings"]) == len(found["layers"])
    assert len(found["readings"][0]) == len(found["prompt"]["tokens"])
    page = web.get(found["page"])
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts;")
    assert "<script>alert" not in page.text
    problem(web.get("/api/pages/none"), 404, "NO_SUCH_PAGE")


def test_patching_comes_layer_by_layer(web: Any, remote_numpy: vs.RemoteVLM, asked: vs.Inputs) -> None:
    moved = {"filename": "screen-1-moved.png", "task": TASK}
    corrupted = remote_numpy.prepare_messages(TASK, GALLERY / "screen-1-moved.png")
    sweep = remote_numpy.patch_sweep(asked, corrupted, "lm.blocks.*.hook_resid_post", positions="text")
    *rows, last = lines(web, "patching", corrupted=moved, over="text")
    rows = [row for row in rows if row["type"] == "row"]
    assert [row["layer"] for row in rows] == last["data"]["layers"] == list(range(remote_numpy.info.layers))
    np.testing.assert_allclose([row["values"] for row in rows], sweep.normalized, atol=1e-4)
    assert last["data"]["values"] == [row["values"] for row in rows]
    for row in rows:
        assert row["clean_value"] == pytest.approx(sweep.clean_value, rel=1e-4)
        assert (row["columns"], row["labels"], row["target"]) == (sweep.columns, sweep.labels, sweep.target_tokens)
    longer = {"filename": "screen-1.png", "task": f"{TASK} and then on the other"}
    assert "tokens" in problem(web.post("/api/patching", json={**ASKED, "corrupted": longer}), 400)["detail"]


def test_patch_info(web: Any, asked: vs.Inputs) -> None:
    found = post(web, "model/patch-info")
    assert found["tokens"] == asked.token_labels[0]
    assert [p["position"] for p in found["images"][0]["patches"]] == list(asked.images[0].raster)
    assert found["images"][0]["patches"][9]["box"] == [28.0, 28.0, 56.0, 56.0]
    assert post(web, "model/patch-info", filename="")["images"] == []


def test_models(web: Any) -> None:
    status = web.get("/api/model/status").json()
    assert (status["state"], status["name"], status["info"]["layers"]) == ("ready", "spectra-tiny", 5)
    assert "hook_resid_post" in status["hooks"]
    options = web.get("/api/model/options").json()["models"]
    assert {"name": "spectra-tiny", "state": "ready"} in options
    assert web.post("/api/model/select", json={"name": "spectra-tiny"}).json()["state"] == "ready"
    problem(web.post("/api/predict", json={**ASKED, "model": "another"}), 404, "UNKNOWN_MODEL")
    assert web.get("/api/model/status", params={"model": "another"}).json()["state"] == "unknown"


def test_a_model_that_fails_to_load(web: Any, server: str) -> None:
    name = "/nowhere/at/all"
    web.post("/api/model/select", json={"name": name})
    status = lambda: web.get("/api/model/status", params={"model": name}).json()  # noqa: E731
    until(lambda: status()["state"] != "loading")
    assert status()["state"] == "failed"
    assert "nowhere" in status()["error"]
    assert "could not be loaded" in problem(web.post("/api/predict", json={**ASKED, "model": name}), 503)["detail"]
    post(web, "model/patch-info")
    unload(server, name)


def test_an_upload_is_made_anew(web: Any) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "<script>alert(1)</script>")
    answer = web.post("/api/upload", files={"file": ("../../etc/passwd", png(pnginfo=info) + b"<script>", "text/html")})
    found = answer.json()
    assert (found["width"], found["height"]) == (64, 48)
    assert len(found["filename"]) == 36
    image = web.get(f"/api/images/{found['filename']}")
    assert image.headers["content-type"] == "image/png"
    assert image.headers["x-content-type-options"] == "nosniff"
    assert b"script" not in image.content
    assert Image.open(io.BytesIO(image.content)).tobytes() == Image.open(io.BytesIO(png())).tobytes()
    jpeg = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(jpeg, "JPEG")
    named = web.post("/api/upload", files={"file": ("x.png", jpeg.getvalue())}).json()["filename"]
    assert post(web, "model/patch-info", filename=named)["images"][0]["size"] == [30, 20]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"<html><script>alert(1)</script></html>", 415),
        (b"", 415),
        (b"%PDF-1.7 ...", 415),
        (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', 415),
        (bomb(20_000, 10_000), 413),
        (bomb(60_000, 60_000), 413),
        (noise()[:20_000], 400),
    ],
    ids=["html", "empty", "pdf", "svg", "200 megapixels", "3600 megapixels", "truncated"],
)
def test_refused_uploads(web: Any, data: bytes, status: int) -> None:
    found = problem(web.post("/api/upload", files={"file": ("screen.png", data, "image/png")}), status)
    assert "<script>" not in found["detail"]


def test_a_gigabyte_is_refused_before_it_is_read(web: Any) -> None:
    def endless() -> Iterator[bytes]:
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n'
        yield head
        for _ in range(256):
            yield bytes(1 << 20)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(httpx.TransportError):  # it may answer and close while we are still sending
        problem(web.post("/api/upload", headers=kind, content=endless()), 413, "TOO_LARGE")
    with socket.create_connection((web.base_url.host, web.base_url.port), timeout=60) as wire:
        head = f"POST /api/upload HTTP/1.1\r\nHost: {web.base_url.host}\r\nConnection: close\r\n"
        wire.sendall(f"{head}Content-Length: 1000000000\r\n\r\n".encode())
        answer = wire.makefile("rb").read(4000)
        assert answer.startswith(b"HTTP/1.1 413"), "refused by what it announces"
        assert b"1000" in answer
        assert b"max_image_mb" in answer
    post(web, "model/patch-info")


def test_bodies_are_as_large_as_what_they_bring(web: Any) -> None:
    """Signing in is open to everybody, and a question is a few texts."""
    for path, most in (("session", 1 << 14), ("predict", 1 << 20)):
        asked = {"task": "x"} if path == "predict" else {"token": "x"}
        for size, ok in ((most, True), (most + 1, False)):
            body = json.dumps(asked).ljust(size)
            answer = web.post(f"/api/{path}", content=body, headers={"content-type": "application/json"})
            if ok:
                assert answer.status_code != 413
            else:
                problem(answer, 413, "TOO_LARGE")
                assert (answer.json()["value"], answer.json()["asked"]) == (str(most), str(size))
    longest = {"filename": "screen-1.png", "task": "\U0001f600" * 20_000, "assistant_prefill": "\U0001f600" * 20_000}
    asked = json.dumps({**longest, "corrupted": {**longest}}).encode()
    answer = web.post("/api/patching", content=asked, headers={"content-type": "application/json"})
    assert answer.status_code != 413, "the longest question that there is"


def test_who_lets_the_app_wait_is_cut_off(server: str) -> None:
    """A connection without a request, half a request, a body that does not come, an answer that is not read."""
    process, address = start_web("--server", server, "--max-stall-seconds", "1")
    host, port = address.rsplit("/", 1)[1].split(":")
    try:
        with contextlib.ExitStack() as stack:
            begun = time.monotonic()
            silent, half, slow = (
                stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(3)
            )
            half.sendall(b"GET /api/gallery HTTP/1.1\r\nHo")
            head = f"POST /api/session HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 20\r\n\r\n{{".encode())
            answer = slow.recv(4000)
            assert answer.startswith(b"HTTP/1.1 408")
            assert time.monotonic() - begun < 10
            for each in (silent, half):
                with contextlib.suppress(ConnectionResetError):
                    assert each.recv(100) == b""
            assert time.monotonic() - begun < 50
    finally:
        stop_server(process)


def test_a_hang_up_leaves_no_image(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the terminal is closed in which the page was started."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process, address = start_web("--server", server)
    signal.signal(signal.SIGHUP, before)
    answer = httpx.post(f"{address}/api/upload", files={"file": ("a.png", png())}, timeout=200)
    assert answer.status_code == 200
    assert list(tmp_path.glob("*/*.png"))
    process.send_signal(signal.SIGHUP)
    process.wait(WAIT)
    assert not list(tmp_path.iterdir())


def test_images_that_nobody_reads_take_no_memory() -> None:
    """Each is read from its file as its reader wants it."""
    process, address = start_web("--server", f"127.0.0.1:{free_port()}")
    host, port = address.rsplit("/", 1)[1].split(":")

    def resident() -> int:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    file = io.BytesIO()
    Image.frombytes("RGB", (2600, 2600), os.urandom(2600 * 2600 * 3)).save(file, "PNG", compress_level=0)
    try:
        answer = httpx.post(f"{address}/api/upload", files={"file": ("a.png", file.getvalue())}, timeout=WAIT)
        before, name = resident(), answer.json()["filename"]
        with contextlib.ExitStack() as stack:
            for _ in range(40):  # 20 MB each
                reader = stack.enter_context(socket.create_connection((host, int(port)), timeout=WAIT))
                reader.sendall(f"GET /api/images/{name} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert reader.recv(8, socket.MSG_PEEK) == b"HTTP/1.1"
            assert resident() - before < 300_000_000
        found = httpx.get(f"{address}/api/images/{name}", timeout=WAIT)
        assert int(found.headers["content-length"]) == len(found.content)
        with Image.open(file) as sent, Image.open(io.BytesIO(found.content)) as kept:
            assert kept.tobytes() == sent.tobytes()
    finally:
        stop_server(process)


def test_a_folder_that_was_tidied_away_is_made_again() -> None:
    """Systems clear what is some days old from where it lies; an image that somebody removed is there once uploaded."""
    uploads = Uploads({}, UploadLimits())
    first, _ = uploads.add(png())
    (uploads.folder / first).unlink()
    with pytest.raises(vs.SpectraError, match="upload it again"):
        uploads.read(first)
    assert uploads.add(png())[0] == first
    assert uploads.read(first)
    shutil.rmtree(uploads.folder)
    second, _ = uploads.add(png((40, 40)))
    assert uploads.read(second)
    assert uploads.folder.stat().st_mode & 0o077 == 0
    with pytest.raises(vs.SpectraError, match="upload it again"):
        uploads.read(first)
    uploads.close()
    assert not uploads.folder.exists()


def test_what_else_is_installed_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers stay bounded where uvicorn could have a parser that keeps all; nothing speaks WebSocket here."""
    for name in ("httptools", "websockets", "wsproto"):
        (tmp_path / f"{name}.py").write_text("")
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *([before] if before else [])]))
    process, address = start_web("--server", f"127.0.0.1:{free_port()}")
    host, port = address.rsplit("/", 1)[1].split(":")
    try:
        with socket.create_connection((host, int(port)), timeout=WAIT) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n".encode())
            with contextlib.suppress(OSError):  # the other side has closed
                for _ in range(20_000):
                    connection.sendall(b"x: " + bytes(b"a" * 1000) + b"\r\n")
                raise AssertionError("20 MB of headers were taken")
        upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        answer = httpx.get(f"{address}/", headers={**upgrade, "sec-websocket-key": "a" * 22 + "=="})
        assert answer.status_code == 200
    finally:
        stop_server(process)


def test_images_that_wait_to_be_decoded_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def slow(*_: Any) -> Any:
        go.wait(WAIT)
        return "0" * 32 + ".png", (1, 1)

    monkeypatch.setattr(Uploads, "add", slow)
    with TestClient(create_app(f"127.0.0.1:{free_port()}")) as client, ThreadPoolExecutor(60) as pool:
        uploads = [pool.submit(client.post, "/api/upload", files={"file": ("a.png", png())}) for _ in range(45)]
        try:
            assert pool.submit(client.get, "/").result(WAIT).status_code == 200
        finally:
            go.set()
        assert all(upload.result(WAIT).status_code == 200 for upload in uploads)


def test_an_analysis_that_has_no_thread_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(SimpleNamespace(), most=1)  # type: ignore[arg-type]

    async def events() -> list[Any]:
        return [event async for event in runs.events("", "", lambda *_: None)]

    def none_left(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("vlm_spectra_server.web.runs.threading.Thread.start", none_left)
        for _ in range(3):
            (event,) = asyncio.run(events())
            assert "can't start new thread" in event["problem"]["detail"]


def test_lenses_of_one_caller_do_not_push_out_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("lens_page", "_without_images"):
        monkeypatch.setattr(f"vlm_spectra_server.web.pages.{part}", lambda lens: lens)
    pages = Pages(own=2, letters=10, seconds=600)
    hers = pages.keep("aaa", "alice")  # type: ignore[arg-type]
    his = [pages.keep("bb", "bob") for _ in range(3)]  # type: ignore[arg-type]
    name = hers.rsplit("/", 1)[1]
    assert pages.get(name) == "aaa"
    with pytest.raises(vs.SpectraError, match="run the analysis again"):
        pages.get(his[0].rsplit("/", 1)[1])
    pages.keep("c" * 9, "carol")  # type: ignore[arg-type]
    with pytest.raises(vs.SpectraError, match="run the analysis again"):
        pages.get(name)  # the oldest, for all together have so many letters


def test_lenses_that_are_kept_hold_no_decoded_images(remote_numpy: vs.RemoteVLM, web: Any) -> None:
    """A photograph takes far more than its lens; the files that can be taken home need none."""
    inputs = remote_numpy.prepare_messages(TASK, Image.open(GALLERY / "screen-1.png"))
    lens, pages = remote_numpy.logit_lens(inputs, top_k=2), Pages()
    picture = weakref.ref(inputs.prompts[0].images[0])
    name = pages.keep(lens).rsplit("/", 1)[1]
    del lens, inputs
    gc.collect()
    assert picture() is None
    assert "data:image/" in pages.get(name)
    address = post(web, "logit-lens", top_k=2)["page"]
    for kind in ("csv", "json", "png"):
        assert pages.file(name, kind) == web.get(f"{address}/lens.{kind}").content


def test_a_page_that_has_gone_is_read_in_a_frame(web: Any) -> None:
    answer = web.get("/api/pages/none")
    problem(answer, 404, "NO_SUCH_PAGE")
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]


def test_what_is_no_json_is_said_so(web: Any) -> None:
    answer = web.post("/api/predict", content=b'{"task": ', headers={"content-type": "application/json"})
    problem(answer, 422, "INVALID_REQUEST")
    assert answer.json()["detail"].startswith("the request is no JSON: ")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "gallery.json", "/etc/passwd", "a" * 300, "x\x00.png"]
)
def test_no_path_is_opened(web: Any, name: str) -> None:
    problem(web.post("/api/predict", json={**ASKED, "filename": name}), 404, "NO_SUCH_IMAGE")
    found = web.get(f"/api/images/{name.replace(chr(0), '%00')}")
    assert found.status_code == 404
    assert "root:" not in found.text


def test_the_folder_is_bounded_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    one, now, looks = len(png()), time.monotonic(), itertools.count()
    clock = SimpleNamespace(monotonic=lambda: now + next(looks) / 1000)
    monkeypatch.setattr("vlm_spectra_server.web.uploads.time", clock)
    uploads = Uploads({}, UploadLimits(files=3, seconds=0.5, folder_bytes=40 * one))
    names = [uploads.add(png((64, 40 + i)))[0] for i in range(3)]
    uploads.read(names[0])
    names.append(uploads.add(png((64, 50)))[0])
    assert len(list(uploads.folder.iterdir())) == 3
    with pytest.raises(vs.SpectraError, match="upload it again"):
        uploads.read(names[1])  # the least recently used
    assert uploads.read(names[0])
    now += 0.6
    with pytest.raises(vs.SpectraError, match="upload it again"):
        uploads.read(names[3])
    assert list(uploads.folder.iterdir()) == []
    uploads.add(png())
    now += 0.6
    uploads.forget()
    assert list(uploads.folder.iterdir()) == []
    uploads.limits = UploadLimits(folder_bytes=one - 1)
    with pytest.raises(vs.SpectraError, match="kept_images_mb"):
        uploads.add(png())
    uploads.close()
    assert not uploads.folder.exists()


@pytest.mark.parametrize(
    ("question", "field"),
    [
        ({"task": ""}, "task"),
        ({"task": "x" * 20_001}, "task"),
        ({"layer": -1}, "layer"),
        ({"layer": "3"}, "layer"),
        ({"head": "most"}, "head"),
        ({"position": 10**30}, "position"),
    ],
)
def test_what_is_not_understood(web: Any, question: dict[str, Any], field: str) -> None:
    found = problem(web.post("/api/attention", json={**ASKED, **question}), 422, "INVALID_REQUEST")
    assert found["field"].startswith(field)


def test_what_is_not_possible(web: Any) -> None:
    assert "0 to 4" in problem(web.post("/api/attention", json={**ASKED, "layer": 99}), 400, "UNKNOWN_HOOK")["detail"]
    assert "head is 9" in problem(web.post("/api/attention", json={**ASKED, "layer": 0, "head": 9}), 400)["detail"]
    problem(web.post("/api/attention", json={**ASKED, "position": 5000}), 400, "INVALID_INPUT")
    problem(web.post("/api/attribution", json={**ASKED, "target": "no one token"}), 400)
    problem(web.post("/api/logit-lens", json={**ASKED, "hook": "hook_none"}), 400)
    problem(web.post("/api/predict", content=b"{", headers={"content-type": "application/json"}), 422)
    problem(web.post("/api/predict", content=b'{"task":"\\ud800"}', headers={"content-type": "application/json"}), 422)
    problem(web.get("/api/nothing"), 404)
    problem(web.get("/api/predict"), 405)
    events = lines(web, "attention", layer=99)
    assert events[-1]["type"] == "error"
    assert events[-1]["problem"]["reason"] == "UNKNOWN_HOOK"


def test_pages_elsewhere_cannot_use_it(web: Any) -> None:
    origin = {"origin": "http://evil.example"}
    problem(web.post("/api/predict", json=ASKED, headers=origin), 403, "WRONG_ORIGIN")
    for host in ("evil.example", "[::1]x", "[::1"):
        problem(web.get("/", headers={"host": host}), 403, "WRONG_HOST")
    own = {"origin": str(web.base_url).rstrip("/")}
    assert web.post("/api/model/patch-info", json=ASKED, headers=own).status_code == 200
    assert "script-src 'self'" in web.get("/").headers["content-security-policy"]


def test_leaving_leaves_nothing_behind(web: Any) -> None:
    """Runs that are left at their first event take no place from the next; `test_progress` looks at the worker."""
    question = {**ASKED, "stream": True, "corrupted": {"filename": "screen-1-moved.png", "task": TASK}}
    for _ in range(10):
        with web.stream("POST", "/api/patching", json=question) as answer:
            assert next(answer.iter_lines())
    for _ in range(40):
        assert post(web, "model/patch-info")


def test_many_at_once(web: Any) -> None:
    found: list[Any] = []
    asking = [threading.Thread(target=lambda: found.append(post(web, "predict")["text"])) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_no_server_and_no_torch() -> None:
    """The app stands without a server, says so, and imports no PyTorch."""
    code = (
        "import sys, json, vlm_spectra_server.web.command\n"
        "from starlette.testclient import TestClient\n"
        "from vlm_spectra_server.web.app import create_app\n"
        f"with TestClient(create_app('127.0.0.1:{free_port()}')) as web:\n"
        "    status = web.get('/api/model/status').json()\n"
        "    answer = web.post('/api/predict', json={'task': 'x'})\n"
        "print(json.dumps([status, answer.status_code, answer.json(), 'torch' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    status, code_, answer, torch = json.loads(done.stdout)
    assert status["state"] == "unavailable"
    assert code_ == 503
    assert answer["reason"] == "UNAVAILABLE"
    assert not torch


def test_a_model_and_its_page_in_one_process() -> None:
    process, address = start_web("--model", "spectra-tiny", "--device", "cpu")
    with httpx.Client(base_url=address, timeout=200) as client:
        until(lambda: client.get("/api/model/status").json()["state"] not in ("loading", "unavailable"))
        assert "click" in post(client, "predict")["text"]
        hello = spb.GenerateRequest(prompts=[{"task": "Say hello"}], options={"max_new_tokens": 2})
        for kind in ("connect", "grpc-web"):
            said = list(
                Channel(address, kind).messages(f"{PREFIX}SpectraService/Generate", hello, spb.GenerateResponse)
            )
            assert sum(message.HasField("token") for message in said) in (1, 2), kind
    stop_server(process)
    assert process.returncode == 0


def test_bad_addresses_are_one_sentence() -> None:
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "web", "--server", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "vlm-spectra: an address is host:port, not 'nowhere'."


def test_the_description_holds(web: Any) -> None:
    """Whatever its description allows, the interface answers without a fault of its own."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{web.base_url}/openapi.json".replace("//openapi", "/openapi"))
    every = [operation.ok() for operation in schema.get_all_operations()]
    assert len(every) >= 13
    for operation in every:
        if "select" in operation.path:
            continue  # loads models

        @given(case=operation.as_strategy())
        @settings(
            max_examples=6, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        def holds(case: Any) -> None:
            answer = case.call(base_url=str(web.base_url).rstrip("/"))
            assert answer.status_code < 500, (case, answer.text)

        holds()


def test_app_can_be_made_with_other_limits() -> None:
    from starlette.testclient import TestClient

    with TestClient(create_app("127.0.0.1:1", limits=UploadLimits(file_bytes=500, pixels=100))) as client:
        problem(client.post("/api/upload", files={"file": ("x.png", png((300, 300)))}), 413, "TOO_LARGE")
        problem(client.post("/api/upload", files={"file": ("x.png", png((11, 10)))}), 413, "TOO_LARGE")
        assert client.post("/api/upload", files={"file": ("x.png", png((10, 10)))}).status_code == 200
