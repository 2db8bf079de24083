"""Every reason of an error crosses the network as docs/errors.md says, and every reason is reached here.

`SPECTRA_WRITE_DOCS=1` writes the table of the document.
"""

from __future__ import annotations

import ast
import asyncio
import errno
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import vlm_spectra as vs
from calls import WAIT, Raw, Refusal, prompts, run
from conftest import Busy, another_door, busy_server
from documents import table
from PIL import Image
from starlette.testclient import TestClient
from vlm_spectra import errors
from vlm_spectra.v1 import inputs_pb2, intervention_pb2, model_service_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.serving.auth import Tokens
from vlm_spectra_server.serving.limits import Limits
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.web.app import create_app
from vlm_spectra_server.web.uploads import UploadLimits
from vlm_spectra_server.web.upstream import Upstream
from webapp import free_port

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
REASONS = {reason: cls for reason, cls in errors.BY_REASON.items() if cls is not errors.SpectraError}
LOCAL = {"MISSING_EXTRA", "UNSUPPORTED_INTERVENTION"}
"""Raised where the library is called, before anything is sent."""
TOKEN = "a-token-that-may-infer-only"
OCCLUSION = spb.ATTRIBUTION_METHOD_OCCLUSION
POST = "lm.blocks.0.hook_resid_post"


def forward(task: str, **fields: object) -> spb.ForwardRequest:
    options = spb.ForwardOptions(logits_to_keep=spb.LogitsToKeep(last=1))
    return spb.ForwardRequest(prompts=prompts(task), options=options, **fields)


def ask(call: str, request: object) -> Callable[[Busy], Refusal]:
    """A case of one call."""

    def case(busy: Busy) -> Refusal:
        return busy.client("one").ask(call, request)

    return case


def image_request(data: bytes) -> spb.PrepareRequest:
    import hashlib

    name = hashlib.sha256(data).hexdigest()
    return spb.PrepareRequest(prompts=prompts("Hi", images=(name,)), images=[inputs_pb2.Image(sha256=name, data=data)])


def patched(size: int) -> intervention_pb2.Intervention:
    value = tensor_pb2.TensorValue(inline=tensor_pb2.Tensor(dtype=9, shape=[size], data=bytes(4 * size)))
    return intervention_pb2.Intervention(hook=POST, patch_activation=intervention_pb2.PatchActivation(value=value))


def not_supported(busy: Busy) -> Refusal:
    """Occlusion runs copies of the image, between which an intervention on the tower cannot tell."""
    buffer, client = io.BytesIO(), busy.client("one")
    Image.new("RGB", (64, 48)).save(buffer, "PNG")
    request = image_request(buffer.getvalue())
    assert isinstance(client.ask("Prepare", request), list)
    halved = intervention_pb2.ScaleActivation(factor=0.5)
    change = intervention_pb2.Intervention(hook="vision.blocks.0.hook_resid_post", scale_activation=halved)
    wanted = spb.AttributeRequest(prompts=request.prompts, method=OCCLUSION, window=1, interventions=[change])
    return client.ask("Attribute", wanted)


def client_busy(busy: Busy) -> Refusal:
    """Two calls of one client are at work: of two more, and of any number, none is taken."""
    client = busy.client("busy")
    first = client.begin("Forward", forward("wait"))
    busy.at_work(1)
    second = client.begin("Forward", forward("wait"))
    busy.queued(1)
    found = client.ask("Forward", forward("wait"))
    first.cancel()
    second.cancel()
    return found


def queue_full(busy: Busy) -> Refusal:
    first = busy.client("a").begin("Forward", forward("wait"))
    busy.at_work(1)
    second = busy.client("b").begin("Forward", forward("wait"))
    busy.queued(1)
    found = busy.client("c").ask("Forward", forward("wait"))
    first.cancel()
    second.cancel()
    return found


def deadline(_: Busy) -> Refusal:
    """What waits before it takes three seconds at the least: it is refused at once, not after its two and a half.

    The server is its own, and has seen no run that was faster.
    """
    with tempfile.TemporaryDirectory() as directory, busy_server(Path(directory)) as busy:
        client = busy.client("slow")
        assert isinstance(client.ask("RunWithCache", run("slow")), list)
        first = client.begin("RunWithCache", run("wait"))
        next(first)
        second = busy.client("other").begin("RunWithCache", run("slow"))
        busy.queued(1)
        while not (found := client.ask("RunWithCache", run("slow"), timeout=2.5)).reason:
            pass  # its time was over before it came as far as the server
        first.cancel()
        second.cancel()
        assert float(found.metadata["wait_seconds"]) >= 3 > float(found.metadata["given_seconds"])
        return found


def cancelled(busy: Busy) -> Refusal:
    """Its capture is released while it runs."""
    client = busy.client("one")
    call = client.begin("RunWithCache", run("wait"))
    header = spb.RunWithCacheResponse.FromString(next(call)).header
    assert isinstance(client.ask("ReleaseCapture", spb.ReleaseCaptureRequest(capture_id=header.capture_id)), list)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return Refusal.of(caught.value)


def unavailable(busy: Busy) -> Refusal:
    """The worker has just died, and another one is not there yet."""
    client = busy.client("one")
    client.ask("Forward", forward("die"))
    return client.ask("Forward", forward("Hi"))


def over_many_tokens() -> spb.GenerateRequest:
    return spb.GenerateRequest(prompts=prompts("Hi"), options=spb.GenerateOptions(max_new_tokens=2**20))


CASES: dict[str, Callable[[Busy], Refusal]] = {
    "INVALID_INPUT": ask("Forward", spb.ForwardRequest()),
    "UNKNOWN_HOOK": ask("RunWithCache", run("Hi", "lm.blocks.1.hook_resid_pots")),
    "INVALID_IMAGE": ask("Prepare", image_request(b"no image")),
    "PROMPT_TOO_LONG": ask("Prepare", spb.PrepareRequest(prompts=prompts("word " * 3000))),
    "SHAPE_MISMATCH": ask("Forward", forward("Hi", interventions=[patched(7)])),
    "OVER_LIMIT": ask("Generate", over_many_tokens()),
    "UNKNOWN_MODEL": ask("Forward", spb.ForwardRequest(model="no/such", prompts=prompts("Hi"))),
    "CAPTURE_NOT_FOUND": ask(
        "RunWithCache", spb.RunWithCacheRequest(resume=spb.CaptureResume(capture_id="0" * 32))
    ),
    "IMAGE_NOT_FOUND": ask("Forward", spb.ForwardRequest(prompts=prompts("Hi", images=("0" * 64,)))),
    "CAPTURE_TOO_LARGE": ask("RunWithCache", run("Hi", "lm.blocks.*.*", "lm.blocks.*.attn.*", "lm.blocks.*.mlp.*")),
    "QUEUE_FULL": queue_full,
    "CLIENT_BUSY": client_busy,
    "OUT_OF_DEVICE_MEMORY": ask("Forward", forward("out_of_memory")),
    "DEADLINE_EXCEEDED": deadline,
    "CANCELLED": cancelled,
    "UNAVAILABLE": unavailable,
    "WORKER_DIED": ask("Forward", forward("die")),
    "NOT_SUPPORTED": not_supported,
    "INTERNAL": ask("Forward", forward("assertion")),
    "MODEL_NOT_ALLOWED": ask("LoadModel", model_service_pb2.LoadModelRequest(name="no/such")),
}  # fmt: skip
"""How each reason is reached. Those that need a token are reached below."""
WITH_TOKENS = {"UNAUTHENTICATED", "MISSING_SCOPE"}
AGAIN = {"QUEUE_FULL", "CLIENT_BUSY", "UNAVAILABLE", "WORKER_DIED", "DEADLINE_EXCEEDED"}
"""Reasons after which trying again makes sense, and when."""
FIELDS = {
    "INVALID_INPUT": "prompts",
    "UNKNOWN_HOOK": "hooks",
    "INVALID_IMAGE": "image",
    "PROMPT_TOO_LONG": "task",
    "SHAPE_MISMATCH": "value",
    "OVER_LIMIT": "max_new_tokens",
    "UNKNOWN_MODEL": "model",
    "CAPTURE_NOT_FOUND": "capture_id",
    "CAPTURE_TOO_LARGE": "hooks",
    "NOT_SUPPORTED": "interventions",
    "MODEL_NOT_ALLOWED": "name",
}
"""The fields that are to blame, where one is."""


def test_every_reason_is_reached_and_documented() -> None:
    assert set(CASES) | WITH_TOKENS | LOCAL == set(REASONS)
    rows = []
    for reason, cls in REASONS.items():
        also = [base.__name__ for base in cls.__bases__ if not issubclass(base, errors.SpectraError)]
        name = f"`{cls.__name__}`" + "".join(f" (also {_article(each)} `{each}`)" for each in also)
        rows.append([name, f"`{reason}`", f"`{cls.code}`", " ".join((cls.__doc__ or "").split())])
    begin, end = "<!-- reasons -->\n", "<!-- end of reasons -->"
    before, rest = DOCUMENT.read_text().split(begin)
    written, after = rest.split(end)
    text = table(["class", "reason", "gRPC status", "when"], rows) + "\n"
    if os.environ.get("SPECTRA_WRITE_DOCS"):
        DOCUMENT.write_text(before + begin + text + end + after)
    else:
        assert written == text, "docs/errors.md is out of date: SPECTRA_WRITE_DOCS=1 writes it"


def _article(name: str) -> str:
    return "an" if name[0] in "AEIOU" else "a"


def holds(refusal: Refusal | list[bytes], reason: str) -> None:
    """A refusal is whole, and the Python client would raise its class."""
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason, refusal
    assert refusal.code == REASONS[reason].code
    assert refusal.domain == "vlm-spectra"
    assert refusal.message
    assert "\n" not in refusal.message
    assert len(refusal.message) < 500


@pytest.mark.parametrize("reason", CASES)
def test_a_reason_crosses_the_network(busy: Busy, reason: str) -> None:
    busy.idle()
    refusal = CASES[reason](busy)
    holds(refusal, reason)
    assert refusal.metadata["request_id"]
    assert refusal.fields == ((FIELDS[reason],) if reason in FIELDS else ())
    assert (refusal.retry_after is not None) == (reason in AGAIN)
    busy.idle()
    answer = busy.client("after").ask("Forward", forward("Hi"))
    assert isinstance(answer, list), "a refusal is its own request's alone"


def test_reasons_of_tokens_cross_the_network(front: Server) -> None:
    with another_door(front, tokens=Tokens(text=f"alice infer {TOKEN}")) as server:
        holds(Raw(server.address).ask("Forward", forward("Hi")), "UNAUTHENTICATED")
        holds(Raw(server.address, token="another-token-of-no-use").ask("Forward", forward("Hi")), "UNAUTHENTICATED")
        refusal = Raw(server.address, token=TOKEN).ask("RunWithCache", run("Hi"))
        holds(refusal, "MISSING_SCOPE")
        assert isinstance(refusal, Refusal)
        assert refusal.metadata["scope"] == "inspect"


def test_reasons_that_never_cross(remote: vs.RemoteVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.UnsupportedInterventionError) as caught, remote.run_with_hooks([(POST, lambda x: x)]):
        pass
    assert caught.value.reason == "UNSUPPORTED_INTERVENTION"
    import importlib.util

    from vlm_spectra import arrays

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingExtraError) as missing:
        arrays.to_torch([1.0])
    assert missing.value.reason == "MISSING_EXTRA"


def test_the_python_client_raises_the_class_of_each_reason() -> None:
    from vlm_spectra.network.status import from_status, to_status

    for reason, cls in REASONS.items():
        sent = cls("A sentence.", field="there", metadata={"limit": "max_batch"}, retry_after=1.5, request_id="r-1")
        error = from_status(to_status(sent))
        assert type(error) is cls
        assert (error.reason, str(error), error.field, error.retry_after) == (reason, "A sentence.", "there", 1.5)
        assert (error.metadata, error.request_id) == ({"limit": "max_batch"}, "r-1")


def test_a_long_sentence_fits_the_trailers(busy: Busy) -> None:
    """What callers write may stand in a refusal, and a refusal travels in headers of 8 KB."""
    for name in ("x" * 100_000, "é漢字🙂\n" * 20_000, "lm.blocks." + "9" * 100_000 + ".hook_z"):
        refusal = busy.client("one").ask("RunWithCache", run("Hi", name))
        assert isinstance(refusal, Refusal)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "UNKNOWN_HOOK")
        assert "\n" not in refusal.message


@pytest.mark.parametrize("call", ["Forward", "Prepare", "RunWithCache", "GetModel"])
def test_bytes_that_are_no_message(busy: Busy, call: str) -> None:
    for data in (b"\xff", b"\x0a\xff", b"\x0a\x02\xff\xfe", bytes(100)):
        refusal = busy.client("one").ask(call, data)
        holds(refusal, "INVALID_INPUT")
        assert isinstance(refusal, Refusal)
        assert refusal.fields == ("request",)


def test_bytes_that_are_no_message_of_grpcs_own_services(busy: Busy) -> None:
    client = busy.client("one")
    for path in ("grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"):
        with pytest.raises(grpc.RpcError) as caught:
            list(client.channel.unary_stream(f"/{path}")(b"\xff", timeout=WAIT))
        holds(Refusal.of(caught.value), "INVALID_INPUT")
    reflection = client.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as caught:
        list(reflection(iter([b"\xff"]), timeout=WAIT))
    holds(Refusal.of(caught.value), "INVALID_INPUT")


# The web app's own.


class App:
    """The web app over a server that is not there."""

    def __init__(self, hosts: tuple[str, ...] = (), **limits: int) -> None:
        app = create_app(f"127.0.0.1:{free_port()}", hosts=hosts, limits=UploadLimits(**limits))
        self.client = TestClient(app, raise_server_exceptions=False)

    def upload(self, data: bytes, **headers: str) -> httpx.Response:
        return self.client.post("/api/upload", files={"file": ("a.png", data)}, headers=headers)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def no_room() -> httpx.Response:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        return App().upload(png())


def too_slow() -> httpx.Response:
    """A body that never comes."""
    sent: list[dict[str, Any]] = []

    async def never() -> Any:
        await asyncio.sleep(WAIT)

    async def take(message: Any) -> None:
        sent.append(dict(message))

    app = create_app(f"127.0.0.1:{free_port()}", taken=Limits(stall_seconds=0.1))
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/session", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, never, take))  # type: ignore[arg-type]
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=sent[1]["body"])


def open_server() -> httpx.Response:
    """An app for other machines over a server that asks nobody for a token (test_web_sign_in.py has a real one)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Upstream, "wants_tokens", lambda self: False)
        upstream = Upstream(f"127.0.0.1:{free_port()}", exposed=True)
        return TestClient(create_app(upstream)).post("/api/predict", json={"task": "Hi"})


WEB: dict[str, tuple[int, Callable[[], httpx.Response]]] = {
    "TOO_LARGE": (413, lambda: App(file_bytes=50).upload(png())),
    "TOO_SLOW": (408, too_slow),
    "NOT_AN_IMAGE": (415, lambda: App().upload(b"no image")),
    "NO_SUCH_IMAGE": (404, lambda: App().client.get(f"/api/images/{'0' * 32}.png")),
    "NO_SUCH_PAGE": (404, lambda: App().client.get(f"/api/pages/{'0' * 32}/lens.html")),
    "NO_ROOM": (507, no_room),
    "WRONG_HOST": (403, lambda: App(hosts=("127.0.0.1",)).client.get("/api/gallery")),
    "WRONG_ORIGIN": (403, lambda: App().upload(png(), origin="http://elsewhere.example")),
    "OPEN_SERVER": (503, open_server),
    "INVALID_REQUEST": (422, lambda: App().client.post("/api/predict", json={"task": ["no", "text"]})),
    "HTTP": (404, lambda: App().client.get("/nothing/here")),
    "UNAVAILABLE": (503, lambda: App().client.post("/api/predict", json={"task": "Hi"})),
}
"""How each reason of the web app's own is reached."""


def test_every_reason_of_the_web_app_is_reached_and_documented() -> None:
    """Reasons are found in the source: the third argument of `WebError` and of what makes problem details."""
    named = set()
    for file in (DOCUMENT.parents[1] / "server" / "vlm_spectra_server" / "web").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            if isinstance(node, ast.Call) and name in ("WebError", "_details") and len(node.args) > 2:
                named |= {node.args[2].value} if isinstance(node.args[2], ast.Constant) else set()
    assert named == set(WEB)
    text = DOCUMENT.read_text()
    for reason, (status, _) in WEB.items():
        assert re.search(rf"\| `{reason}` \| [\d, ]*{status}", text) or reason in REASONS


@pytest.mark.parametrize("reason", WEB)
def test_a_reason_of_the_web_app(reason: str) -> None:
    status, reach = WEB[reason]
    answer = reach()
    details = answer.json()
    assert (answer.status_code, details["status"], details["reason"]) == (status, status, reason)
    assert answer.headers["content-type"] == "application/problem+json"
    assert details["detail"]
    assert "\n" not in details["detail"]
