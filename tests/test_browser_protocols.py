"""The calls of the contract from a browser: the Connect protocol and gRPC-Web at the web app's port."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import calls
import grpc
import httpx
import numpy as np
import pytest
import uvicorn
import vlm_spectra as vs
from conftest import Busy, stop_server
from grpc_health.v1 import health_pb2 as hpb
from grpc_status import rpc_status
from http_calls import KINDS, PREFIX, STREAM, UNARY, Channel, Ended, envelope, failed, info, unpadded
from PIL import ImageOps
from vlm_spectra.arrays import to_numpy
from vlm_spectra.errors import BusyError, ClientBusyError, InvalidInputError, UnauthenticatedError
from vlm_spectra.network.status import to_status
from vlm_spectra.v1 import model_service_pb2 as mpb
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.serving.auth import WANTED, Tokens
from vlm_spectra_server.serving.host import Loading
from vlm_spectra_server.serving.limits import Limits
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.web import rpc
from vlm_spectra_server.web.patience import PIECE, Patience, connections
from vlm_spectra_server.web.runs import Runs
from vlm_spectra_server.web.upstream import Upstream
from webapp import start_web

FORWARD, GENERATE = f"{PREFIX}SpectraService/Forward", f"{PREFIX}SpectraService/Generate"
PREPARE, CACHE = f"{PREFIX}SpectraService/Prepare", f"{PREFIX}SpectraService/RunWithCache"
LIST, GET = f"{PREFIX}ModelService/ListModels", f"{PREFIX}ModelService/GetModel"
POST = "lm.blocks.*.hook_resid_post"
HELLO = [{"task": "Say hello"}]
LAB, EVIL = "https://lab.example", "https://evil.example"
ALICE, LOOKER = "alice-" + "a" * 30, "looker-" + "b" * 30


@pytest.fixture(params=KINDS)
def channel(request: Any, web: str) -> Iterator[Channel]:
    made = Channel(web, request.param)
    yield made
    made.close()


@pytest.fixture
def client(channel: Channel, monkeypatch: pytest.MonkeyPatch, web: str) -> Iterator[vs.RemoteVLM]:
    """The Python client, every call of which goes through HTTP."""
    monkeypatch.setattr("vlm_spectra.remote.channel", lambda *_, **__: channel)
    with vs.connect(web.removeprefix("http://"), arrays="numpy", shared_memory=False) as model:
        yield model


def some_calls(model: vs.RemoteVLM, first: Any, hooks: Any) -> tuple[dict[str, np.ndarray], list[Any]]:
    """The results of one call of each shape: arrays, and what compares by equality."""
    inputs = model.prepare_messages("Click on the red circle", first)
    with model.run_with_cache(hooks) as cache:
        output = model.forward(inputs)
    found = {name: cache[name] for name in cache.names} | {"logits": output.logits, "ids": inputs.input_ids}
    told = [token.text for token in model.stream(inputs, max_new_tokens=4)]
    plain = [model.info, [repr(hook) for hook in model.hooks()], inputs.token_labels, told]
    return {name: to_numpy(value) for name, value in found.items()}, plain


def other_calls(model: vs.RemoteVLM, first: Any, second: Any) -> tuple[dict[str, np.ndarray], list[Any]]:
    """The results of the others."""
    inputs = model.prepare_messages("Click on the red circle", first)
    batch = model.prepare_messages_batch(["Say hello", "What is this?"], [None, second])
    answer = model.generate_batch(batch, max_new_tokens=4)
    lens = model.logit_lens(inputs, top_k=3)
    why = model.attribute(inputs, "direct_logit", target="click")
    mirrored = model.prepare_messages("Click on the red circle", ImageOps.mirror(first))
    sweep = model.patch_sweep(inputs, mirrored, POST, positions="last")
    with model.run_with_hooks([("lm.blocks.1.hook_resid_post", vs.ZeroAblation(positions="last"))]):
        found = {"ablated": model.forward(inputs, 1).logits}
    found |= {"sequences": answer.sequences, "logprobs": answer.logprobs, "lens": lens.probs, "why": why.scores}
    found |= {"sweep": sweep.values, "unembed": model.unembed(["click", 5])}
    plain = [answer.text, lens.tokens, model.estimate(inputs, POST).nbytes]
    return {name: to_numpy(value) for name, value in found.items()}, plain


def same(found: tuple[dict[str, np.ndarray], list[Any]], expected: tuple[dict[str, np.ndarray], list[Any]]) -> None:
    """Bit for bit."""
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        assert found[0][name].dtype == array.dtype, name
        assert found[0][name].shape == array.shape, name
        assert found[0][name].tobytes() == array.tobytes(), name


def test_calls_give_what_grpc_gives(
    client: vs.RemoteVLM, channel: Channel, remote_numpy: vs.RemoteVLM, screenshot: Any, photo: Any
) -> None:
    """Every hook and every call; in the kinds that spell bytes as text, which is slow, a layer and the first ones."""
    whole = channel.kind in ("connect", "grpc-web")
    hooks = (lambda name: True) if whole else "lm.blocks.1.*"
    same(some_calls(client, screenshot, hooks), some_calls(remote_numpy, screenshot, hooks))
    if whole:
        same(other_calls(client, screenshot, photo), other_calls(remote_numpy, screenshot, photo))


def test_models_and_health(channel: Channel) -> None:
    (model,) = channel.message(LIST, mpb.ListModelsRequest(), mpb.ListModelsResponse).models
    assert (model.name, model.state) == ("spectra-tiny", mpb.MODEL_STATE_READY)
    again = channel.message(
        f"{PREFIX}ModelService/LoadModel", mpb.LoadModelRequest(name=model.name), mpb.LoadModelResponse
    )
    assert again.model.state == mpb.MODEL_STATE_READY
    with pytest.raises(Ended) as caught:
        channel.message(
            f"{PREFIX}ModelService/UnloadModel", mpb.UnloadModelRequest(name="none"), mpb.UnloadModelResponse
        )
    assert (caught.value.code(), info(caught.value).reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
    check = channel.message("/grpc.health.v1.Health/Check", hpb.HealthCheckRequest(), hpb.HealthCheckResponse)
    assert check.status == hpb.HealthCheckResponse.SERVING
    watch = channel.messages("/grpc.health.v1.Health/Watch", hpb.HealthCheckRequest(), hpb.HealthCheckResponse)
    assert next(watch).status == hpb.HealthCheckResponse.SERVING
    watch.cancel()


def test_errors_are_the_servers(channel: Channel) -> None:
    """Reason, sentence, field and request id; for calls with one answer also the HTTP status."""
    run = spb.RunWithCacheRequest(
        run={"prompts": HELLO, "selection": {"hooks": ["lm.blocks.99.hook_resid_post"]}, "forward": {}}
    )
    with pytest.raises(Ended) as caught:
        list(channel.messages(CACHE, run, spb.RunWithCacheResponse))
    assert (caught.value.code(), info(caught.value).reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_HOOK")
    assert "99" in caught.value.details()
    assert info(caught.value).metadata["request_id"]
    expected = {
        "UNKNOWN_MODEL": (404, PREPARE, spb.PrepareRequest(model="größer 100 %\n", prompts=HELLO)),
        "INVALID_IMAGE": (
            400,
            PREPARE,
            spb.PrepareRequest(
                prompts=[{"task": "x", "images": [hashlib.sha256(b"no").hexdigest()]}],
                images=[{"sha256": hashlib.sha256(b"no").hexdigest(), "data": b"no"}],
            ),
        ),
        "INVALID_INPUT": (400, f"{PREFIX}ModelService/LoadModel", mpb.LoadModelRequest()),
        "IMAGE_NOT_FOUND": (
            400,
            f"{PREFIX}SpectraService/Estimate",
            spb.EstimateRequest(run={"prompts": [{"task": "x", "images": ["0" * 64]}], "forward": {}}),
        ),
    }
    for reason, (http, path, request) in expected.items():
        with pytest.raises(Ended) as caught:
            channel.message(path, request, spb.PrepareResponse)
        assert info(caught.value).reason == reason
        if channel.kind.startswith("connect"):
            assert caught.value.http == http


def post(web: str, path: str, body: bytes, media: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(web + path, content=body, headers={"content-type": media, **named}, timeout=60)


def refusal(answer: httpx.Response) -> tuple[str, str, str]:
    """A refused request's code, reason and sentence, in whichever protocol it came."""
    media, content = answer.headers["content-type"], answer.content
    if "json" in media and "connect" not in media and "grpc" not in media:
        error = failed(json.loads(content))
    else:
        if "text" in media:
            content = base64.b64decode(content)
        assert answer.status_code == 200
        flags, data = content[0], content[5:]
        if flags == 2:
            error = failed(json.loads(data)["error"])
        else:
            trailers = dict(line.split(": ", 1) for line in data.decode("ascii").splitlines())
            status = unpadded(trailers["grpc-status-details-bin"])
            code = next(code for code in grpc.StatusCode if code.value[0] == int(trailers["grpc-status"]))
            error = Ended(code, httpx.QueryParams(f"m={trailers['grpc-message']}")["m"], status)
    return error.code().name, info(error).reason, error.details()


OK = envelope(spb.ForwardRequest(prompts=HELLO).SerializeToString())


@pytest.mark.parametrize(
    ("path", "body", "media", "headers", "reason", "words"),
    [
        (FORWARD, b"", STREAM["connect"], {}, "INVALID_INPUT", "0 bytes"),
        (FORWARD, OK[:4], STREAM["connect"], {}, "INVALID_INPUT", "4 bytes"),
        (FORWARD, OK[:-1], STREAM["connect"], {}, "INVALID_INPUT", "announces"),
        (FORWARD, OK + b"x", STREAM["grpc-web"], {}, "INVALID_INPUT", "1 bytes came after"),
        (FORWARD, OK + OK, STREAM["grpc-web"], {}, "INVALID_INPUT", "one message"),
        (FORWARD, b"\xff" * 4 + OK, STREAM["connect"], {}, "NOT_SUPPORTED", "compressed"),
        (FORWARD, b"\1" + OK[1:], STREAM["connect"], {}, "NOT_SUPPORTED", "compressed"),
        (FORWARD, b"\1" + OK[1:], STREAM["grpc-web"], {}, "NOT_SUPPORTED", "compressed"),
        (FORWARD, b"\2" + OK[1:], STREAM["connect"], {}, "INVALID_INPUT", "flags"),
        (FORWARD, b"\x80" + OK[1:], STREAM["grpc-web"], {}, "INVALID_INPUT", "flags"),
        (FORWARD, envelope(b"\xff\xff"), STREAM["connect"], {}, "INVALID_INPUT", ""),
        (FORWARD, envelope(b"\xff\xff"), STREAM["grpc-web"], {}, "INVALID_INPUT", ""),
        (FORWARD, b"=", STREAM["grpc-web text"], {}, "INVALID_INPUT", ""),
        (FORWARD, b"AAA", STREAM["grpc-web text"], {}, "INVALID_INPUT", "base64"),
        (FORWARD, b"A\xc3\xa4AA", STREAM["grpc-web text"], {}, "INVALID_INPUT", "base64"),
        (FORWARD, envelope(b"{"), STREAM["connect json"], {}, "INVALID_INPUT", "JSON is not a ForwardRequest"),
        (PREPARE, b"", UNARY["connect json"], {}, "INVALID_INPUT", "JSON"),
        (PREPARE, b"[" * 100_000, UNARY["connect json"], {}, "INVALID_INPUT", "JSON"),
        (PREPARE, b'{"propmts": []}', UNARY["connect json"], {}, "INVALID_INPUT", "propmts"),
        (PREPARE, b"\xff", UNARY["connect json"], {}, "INVALID_INPUT", "JSON"),
        (PREPARE, b"\xff", UNARY["connect"], {}, "INVALID_INPUT", ""),
        (FORWARD, OK, STREAM["connect"], {"connect_content_encoding": "gzip"}, "NOT_SUPPORTED", "identity"),
        (FORWARD, OK, STREAM["grpc-web"], {"grpc_encoding": "gzip"}, "NOT_SUPPORTED", "identity"),
        (PREPARE, b"", UNARY["connect"], {"content_encoding": "br"}, "NOT_SUPPORTED", "identity"),
        (PREPARE, b"", UNARY["connect"], {"connect_protocol_version": "2"}, "INVALID_INPUT", "version 1"),
        (PREPARE, b"", UNARY["connect"], {"connect_timeout_ms": "soon"}, "INVALID_INPUT", "milliseconds"),
        (PREPARE, b"", UNARY["connect"], {"connect_timeout_ms": "12345678901"}, "INVALID_INPUT", "10 digits"),
        (FORWARD, OK, STREAM["grpc-web"], {"grpc_timeout": "5"}, "INVALID_INPUT", "unit"),
        (FORWARD, OK, STREAM["grpc-web"], {"grpc_timeout": "-5S"}, "INVALID_INPUT", "unit"),
        (PREPARE, b"", UNARY["connect"], {"connect_timeout_ms": "0"}, "DEADLINE_EXCEEDED", "over"),
        (FORWARD, OK, STREAM["grpc-web text"], {"authorization": "Bearer a b"}, "INVALID_INPUT", "token"),
        (f"{PREFIX}SpectraService/Nothing", b"", UNARY["connect"], {}, "NOT_SUPPORTED", "Nothing"),
        (f"{PREFIX}SpectraService/Nothing", OK, STREAM["grpc-web"], {}, "NOT_SUPPORTED", "Nothing"),
        (f"{PREFIX}SpectraService/", b"", UNARY["connect"], {}, "NOT_SUPPORTED", "no call"),
    ],
)
def test_a_request_that_is_none_is_one_sentence(
    web: str, path: str, body: bytes, media: str, headers: dict[str, str], reason: str, words: str
) -> None:
    code, found, sentence = refusal(post(web, path, body, media, **headers))
    assert (found, words) == (reason, words if words in sentence else sentence)
    assert code == {"INVALID_INPUT": "INVALID_ARGUMENT", "NOT_SUPPORTED": "UNIMPLEMENTED"}.get(reason, reason)
    assert sentence.endswith((".", ")"))


def test_wrong_methods_and_content_types(web: str) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        answer = httpx.request(method, web + PREPARE)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert refusal(answer)[0] == "UNIMPLEMENTED"
    for path, media in (
        (PREPARE, "text/plain"),
        (PREPARE, ""),
        (PREPARE, "application/grpc"),
        (PREPARE, STREAM["connect"]),
        (FORWARD, UNARY["connect"]),
        (FORWARD, "application/json; charset=utf-8"),
    ):
        answer = post(web, path, b"", media)
        assert answer.status_code == 415
        fits = answer.headers["accept-post"].split(", ")
        assert (UNARY["connect"] in fits) is (path == PREPARE)
        assert refusal(answer)[1] == "NOT_SUPPORTED"
    answer = post(web, LIST, b"{}", "Application/JSON;charset=utf-8")
    assert answer.json()["models"][0]["state"] == "MODEL_STATE_READY"
    assert httpx.post(web + "/vlm_spectra.v1.OtherService/Forward").status_code in (404, 405)


@pytest.fixture(scope="module")
def busy_web(busy: Busy) -> Iterator[str]:
    process, address = start_web("--server", busy.address)
    yield address
    stop_server(process)


@pytest.mark.parametrize("kind", KINDS)
def test_who_leaves_or_has_no_more_time_frees_the_worker(busy: Busy, busy_web: str, kind: str) -> None:
    """The model is at work on these prompts until somebody ends them."""
    channel = Channel(busy_web, kind)
    waiting = spb.ForwardRequest(prompts=[{"task": "wait"}])
    leaving = channel.messages(FORWARD, waiting, spb.ForwardResponse)
    busy.at_work(1)
    leaving.cancel()
    busy.idle()
    with pytest.raises(Ended) as caught:
        list(channel.messages(FORWARD, waiting, spb.ForwardResponse, timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert info(caught.value).reason == "DEADLINE_EXCEEDED"
    busy.idle()
    hello = spb.ForwardRequest(prompts=HELLO)
    assert list(channel.messages(FORWARD, hello, spb.ForwardResponse, timeout=1e4))[-1].HasField("summary")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web app that has a token of its own, over a server that wants tokens; no model is needed to be refused."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokens").write_text(f"alice * {ALICE}\nlooker inspect {LOOKER}\n")
    (folder / "tokens").chmod(0o600)
    (folder / "own").write_text(ALICE)
    server = Server(tokens=Tokens(str(folder / "tokens")))
    server.start(Loading(str(folder / "nothing")))
    process, url = start_web("--server", server.address, "--server-token-file", str(folder / "own"))
    yield url
    stop_server(process)
    server.stop(0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_scopes_are_the_callers_own(guarded: str, kind: str) -> None:
    """The app's own token opens its page to its owner; a call without a token is nobody's all the same."""
    assert httpx.get(f"{guarded}/api/model/options").status_code == 200
    session = httpx.post(f"{guarded}/api/session", json={"token": ALICE})
    cookie = "; ".join(f"{name}={value}" for name, value in session.cookies.items())
    assert cookie
    ask = spb.GenerateRequest(prompts=HELLO, options={"max_new_tokens": 1})
    large = spb.PrepareRequest(images=[{"data": bytes(2 << 20)}])  # not kept for somebody unknown
    for headers in ({}, {"cookie": cookie}, {"authorization": f"Bearer {ALICE}x"}, {"authorization": f"Basic {ALICE}"}):
        nobody = Channel(guarded, kind, **headers)
        for call in (
            lambda nobody=nobody: nobody.message(LIST, mpb.ListModelsRequest(), mpb.ListModelsResponse),
            lambda nobody=nobody: list(nobody.messages(GENERATE, ask, spb.GenerateResponse)),
            lambda nobody=nobody: nobody.message(PREPARE, large, spb.PrepareResponse),
        ):
            with pytest.raises(Ended) as caught:
                call()
            assert info(caught.value).reason == "UNAUTHENTICATED"
            assert caught.value.http in (401, 200)
            assert ALICE not in caught.value.details()
        assert nobody.message("/grpc.health.v1.Health/Check", hpb.HealthCheckRequest(), hpb.HealthCheckResponse).status
    looker = Channel(guarded, kind, authorization=f"Bearer {LOOKER}")
    with pytest.raises(Ended) as caught:
        list(looker.messages(GENERATE, ask, spb.GenerateResponse))
    assert (info(caught.value).reason, info(caught.value).metadata["scope"]) == ("MISSING_SCOPE", "infer")
    alice = Channel(guarded, kind, authorization=f"bearer {ALICE}")
    with pytest.raises(Ended) as caught:
        alice.message(PREPARE, spb.PrepareRequest(model="none", prompts=HELLO), spb.PrepareResponse)
    assert info(caught.value).reason == "UNKNOWN_MODEL"


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}


@pytest.fixture(scope="module")
def opened(server: str) -> Iterator[str]:
    """A web app that pages of one other origin may call."""
    process, address = start_web("--server", server, "--cors-origin", LAB)
    yield address
    stop_server(process)


def test_other_origins_are_refused(web: str, opened: str) -> None:
    """All of them, unless named; and what is not a call stays closed even to those that are."""
    for address, origin in (
        (web, LAB),
        (web, EVIL),
        (web, "null"),
        (opened, EVIL),
        (opened, "null"),
        (opened, f"{LAB}:8080"),
    ):
        for answer in (
            httpx.options(address + LIST, headers={"origin": origin, **PREFLIGHT}),
            post(address, LIST, b"{}", "application/json", origin=origin),
            httpx.post(address + LIST, headers={"origin": origin}),
        ):
            assert answer.status_code == 403
            assert answer.json()["reason"] == "WRONG_ORIGIN"
            assert "access-control-allow-origin" not in answer.headers
    elsewhere = httpx.post(opened + LIST, headers={"host": "evil.example", "origin": LAB})
    assert elsewhere.json()["reason"] == "WRONG_HOST"
    for method, path in (("POST", "/api/session"), ("POST", "/api/forward"), ("OPTIONS", "/api/forward")):
        answer = httpx.request(method, opened + path, headers={"origin": LAB, **PREFLIGHT})
        assert answer.json()["reason"] == "WRONG_ORIGIN"


def test_a_named_origin_is_let_in(opened: str) -> None:
    answer = httpx.options(opened + LIST, headers={"origin": LAB, **PREFLIGHT})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, LAB)
    assert answer.headers["access-control-allow-methods"] == "POST"
    allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
    needed = {
        "authorization",
        "content-type",
        "connect-protocol-version",
        "connect-timeout-ms",
        "grpc-timeout",
        "x-grpc-web",
    }
    assert needed <= set(allowed)
    assert "access-control-allow-credentials" not in answer.headers
    wrong = PREFLIGHT | {"access-control-request-method": "DELETE"}
    assert httpx.options(opened + LIST, headers={"origin": LAB, **wrong}).status_code == 400
    for body, status in ((b"{}", 200), (b"{", 400)):
        answer = post(opened, LIST, body, "application/json", origin=LAB)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, LAB)
        assert "Origin" in answer.headers["vary"]
        exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
        assert {"grpc-status", "grpc-message", "grpc-status-details-bin"} <= set(exposed)
    assert post(opened, LIST, b"{}", "application/json", origin=opened).status_code == 200


def test_origins_are_named_one_by_one() -> None:
    assert rpc.named(["https://Lab.example:443/", "http://localhost:8000", "http://[::1]:80"]) == (
        "https://lab.example",
        "http://localhost:8000",
        "http://[::1]",
    )
    for origin in ("*", "null", "lab.example", "https://*.example", "https://lab.example/page", "file://", ""):
        with pytest.raises(InvalidInputError, match="an origin is"):
            rpc.named([origin])
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "web", "--server", "localhost:1", "--port", "0"]
    found = subprocess.run([*command, "--cors-origin", "*"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "an origin is" in found.stderr


class Fake:
    """A gRPC server with the names of two calls, behind a gateway in this process: it can be seen from behind."""

    MESSAGES = 2000

    def __init__(self, token: str = "", **limits: Any) -> None:
        self.token = token
        self.metadata: dict[str, Any] = {}
        self.sent, self.prepared = 0, 0
        self.ended = threading.Event()
        self._grpc = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 1 << 28)])
        methods = {
            "Forward": grpc.unary_stream_rpc_method_handler(self.forward),
            "Prepare": grpc.unary_unary_rpc_method_handler(self.prepare),
        }
        handler = grpc.method_handlers_generic_handler("vlm_spectra.v1.SpectraService", methods)
        models = {"ListModels": grpc.unary_unary_rpc_method_handler(self.models)}
        others = grpc.method_handlers_generic_handler("vlm_spectra.v1.ModelService", models)
        health = {"Check": grpc.unary_unary_rpc_method_handler(self.health)}
        probes = grpc.method_handlers_generic_handler("grpc.health.v1.Health", health)
        self._grpc.add_generic_rpc_handlers((handler, others, probes))
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self.calls = rpc.Calls(Upstream(f"127.0.0.1:{port}"), Limits(**{"message_bytes": 3_000_000, **limits}))
        beside = rpc.Beside(self.other, rpc.door(self.calls, ("127.0.0.1",)))
        app = Patience(beside, self.calls.limits.stall_seconds)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._web = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        self._thread = threading.Thread(target=self._web.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: Any) -> None:
        self._grpc.stop(0).wait()
        self._web.should_exit = True
        self._thread.join(20)

    async def other(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the page"})

    @property
    def connections(self) -> int:
        """Those to the gateway that are open."""
        return len(self._web.server_state.connections)

    @property
    def held(self) -> tuple[int, int]:
        """Calls at work in the gateway, and bytes of their requests."""
        return self.calls._room.calls.total(), self.calls._room.held.total()

    def begin(self, path: str, body: bytes, announced: int, media: str = "", token: str = "") -> HTTPConnection:
        """Send a request, or the beginning of one."""
        connection = HTTPConnection(self.address.removeprefix("http://"), timeout=60)
        connection.putrequest("POST", path)
        connection.putheader("content-type", media or UNARY["connect"])
        connection.putheader("content-length", str(announced))
        if token:
            connection.putheader("authorization", f"Bearer {token}")
        connection.endheaders(body)
        return connection

    def models(self, request: bytes, context: Any) -> bytes:
        if self.token and ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
            context.abort_with_status(rpc_status.to_status(to_status(UnauthenticatedError("a token is wanted."))))
        return b""

    def health(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((WANTED,) if self.token else ())
        return b""

    def forward(self, request: bytes, context: Any) -> Iterator[bytes]:
        context.add_callback(self.ended.set)
        for number in range(self.MESSAGES):
            self.sent = number
            yield bytes(1 << 20)

    def prepare(self, request: bytes, context: Any) -> bytes:
        self.metadata = dict(context.invocation_metadata())
        self.prepared += 1
        return request


def test_a_slow_reader_holds_little_and_nobody_else() -> None:
    """Of two gigabytes that nobody reads, few messages leave the server; calls beside it go on; leaving ends it."""
    with Fake() as fake:
        headers = {"content-type": STREAM["connect"]}
        with httpx.stream("POST", fake.address + FORWARD, content=envelope(b""), headers=headers) as answer:
            assert answer.status_code == 200
            seen, still = -1, 0
            while still < 10:  # until nothing moves for half a second
                time.sleep(0.05)
                still = still + 1 if fake.sent == seen else 0
                seen = fake.sent
            assert seen < 100
            for _ in range(3):
                assert post(fake.address, PREPARE, b"beside", UNARY["connect"]).content == b"beside"
            assert not fake.ended.is_set()
        assert fake.ended.wait(30)


def test_what_goes_along_with_a_call() -> None:
    """The caller's token and trace; never cookies, and no name that the caller made up."""
    with Fake() as fake:
        post(
            fake.address,
            PREPARE,
            b"",
            UNARY["connect"],
            authorization="bearer abc",
            traceparent="00-1\t2",
            cookie="vlm_spectra=secret",
            x_vlm_spectra_client="somebody else",
            x_forwarded_host="elsewhere",
            grpc_status="0",
        )
        mine = {name: value for name, value in fake.metadata.items() if name != "user-agent"}
        assert mine == {"authorization": "Bearer abc", "traceparent": "00-1?2", rpc.CLIENT_HEADER: "web:127.0.0.1"}
        post(fake.address, PREPARE, b"", UNARY["connect"], authorization="Basic abc")
        assert "authorization" not in fake.metadata
        assert httpx.get(fake.address + "/").text == "the page"


def test_bodies_are_bounded() -> None:
    """By what the server takes, whether the length was announced or not."""
    with Fake(message_bytes=3_000_000) as fake:
        body = bytes(2_900_000)
        assert post(fake.address, PREPARE, body, UNARY["connect"]).content == body

        announced = b"content-length: 3000001\r\n\r\n"
        piece = b"186a0\r\n" + bytes(100_000) + b"\r\n"
        unannounced = b"transfer-encoding: chunked\r\n\r\n" + 30 * piece + b"1\r\nx\r\n"
        for rest in (announced, unannounced):
            host, port = fake.address.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                head = f"POST {PREPARE} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/proto\r\n"
                connection.sendall(head.encode("ascii") + rest)
                with HTTPResponse(connection) as answer:
                    answer.begin()
                    error = failed(json.loads(answer.read()), answer.status)
            assert (error.http, info(error).reason) == (400, "OVER_LIMIT")
            assert "max_message_mb" in error.details()
        assert fake.prepared == 1


def refused(connection: HTTPConnection) -> Ended:
    """The refusal that answers a call with one answer."""
    answer = connection.getresponse()
    error = failed(json.loads(answer.read()), answer.status)
    connection.close()
    return error


def test_bodies_that_stand_still() -> None:
    """Are given up after a while, and what came of them with them; who was refused before hears that."""
    with Fake(stall_seconds=0.5, token="somebody") as fake:
        assert info(refused(fake.begin(PREPARE, b"begun", 6))).reason == "UNAUTHENTICATED"
    with Fake(stall_seconds=0.5) as fake:
        standing = [fake.begin(PREPARE, bytes(1_000_000), announced) for announced in (1_000_001, 2_000_000)]
        for each in standing:
            error = refused(each)
            assert (error.http, info(error).reason) == (499, "CANCELLED")
            assert info(error).metadata["limit"] == "max_stall_seconds"
        assert fake.held == (0, 0)
        assert post(fake.address, PREPARE, b"next", UNARY["connect"]).content == b"next"


def test_one_caller_has_so_many_calls_at_once() -> None:
    """From their beginnings on; a capture can be released all the same. So have all together."""
    wanted = "somebody"
    with Fake(client_requests=2, token=wanted) as fake:
        standing = [fake.begin(PREPARE, b"begun", 6, token=wanted) for _ in range(2)]
        calls.until(lambda: fake.held == (2, 10))
        error = refused(fake.begin(PREPARE, b"more", 4, token=wanted))
        assert (error.http, info(error).reason) == (429, "CLIENT_BUSY")
        assert [info(error).metadata[name] for name in ("limit", "value", "asked")] == ["max_client_requests", "2", "3"]
        assert info(refused(fake.begin(PREPARE, b"", 0))).reason == "UNAUTHENTICATED"
        release = refused(fake.begin(f"{PREFIX}SpectraService/ReleaseCapture", b"", 0, token=wanted))
        assert release.code() is grpc.StatusCode.UNIMPLEMENTED  # the server said so
        standing.pop().close()
        calls.until(lambda: fake.held == (1, 5))
        assert post(fake.address, PREPARE, b"next", UNARY["connect"], authorization=f"Bearer {wanted}").content
        standing.pop().close()
    with Fake(connections=1) as fake:
        first = fake.begin(PREPARE, b"begun", 6)
        calls.until(lambda: fake.held == (1, 5))
        error = refused(fake.begin(PREPARE, b"more", 4))
        assert (error.http, info(error).reason) == (429, "QUEUE_FULL")
        assert info(error).metadata["limit"] == "max_calls"
        first.close()


def test_bodies_are_bounded_together() -> None:
    """One caller's, and those of all; what the server has does not count."""
    with Fake() as fake:
        standing = [fake.begin(PREPARE, bytes(2_500_000), 2_900_000) for _ in range(2)]
        calls.until(lambda: fake.held == (2, 5_000_000))
        error = refused(fake.begin(PREPARE, bytes(1_500_000), 1_500_000))
        assert (error.http, info(error).reason) == (429, "CLIENT_BUSY")
        assert info(error).metadata["limit"] == "max_message_mb"
        assert "6 MB" in error.details()
        for each in standing:
            each.send(bytes(400_000))
            assert len(each.getresponse().read()) == 2_900_000
            each.close()
        calls.until(lambda: fake.held == (0, 0))
        with httpx.stream("POST", fake.address + FORWARD, content=OK, headers={"content-type": STREAM["connect"]}):
            assert fake.held == (1, 0)
    room = rpc._Room(Limits(message_bytes=1000))
    for caller in ("a", "b"):
        room.place(caller, counted=True).take(2000)
    with pytest.raises(BusyError, match="4 times max_message_mb"):
        room.place("c", counted=True).take(1)


@pytest.mark.parametrize("path", [FORWARD, PREPARE])
def test_who_reads_nothing_is_cut_off(path: str) -> None:
    """Both in a stream and of one large answer; the connection goes with the call."""
    with Fake(message_bytes=40_000_000, stall_seconds=0.5) as fake:
        body, media = (OK, STREAM["connect"]) if path == FORWARD else (bytes(30_000_000), UNARY["connect"])
        idle = socket.socket()
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = fake.address.removeprefix("http://").split(":")
        idle.connect((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
        idle.sendall(head.encode("ascii") + body)
        assert idle.recv(8, socket.MSG_PEEK) == b"HTTP/1.1"
        calls.until(lambda: fake.connections == 0)
        calls.until(lambda: fake.held == (0, 0))
        assert path == PREPARE or fake.ended.wait(30)
        idle.close()


def test_what_is_left_unread_of_an_answer_is_dropped() -> None:
    """The end of one that waits where closing the connection would wait too."""

    class Cycle:
        """As uvicorn's, as far as it is used."""

        def __init__(self) -> None:
            self.transport, self.unread = self, 1000

        def get_write_buffer_size(self) -> int:
            return self.unread

        def abort(self) -> None:
            self.unread = 0

        async def receive(self) -> Any:
            raise AssertionError

    async def app(*_: Any) -> None:
        pass

    left = Cycle()
    asyncio.run(Patience(app, 0.1)({}, left.receive, app))
    assert left.unread == 0


def test_a_large_answer_is_handed_on_in_pieces() -> None:
    """Each has its own time to be read, however large the whole is."""
    sent: list[Any] = []

    class Cycle:
        """As uvicorn's, as far as it is used."""

        def __init__(self) -> None:
            self.transport = self

        def get_write_buffer_size(self) -> int:
            return 0

        def abort(self) -> None:
            raise AssertionError

        async def receive(self) -> Any:
            raise AssertionError

    bodies = [b"", b"a", bytes(PIECE), bytes(PIECE) + b"b", bytes(2 * PIECE) + b"c"]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start"})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": body is not bodies[-1]})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Patience(app, 60)({}, Cycle().receive, send))
    head, *rest = sent
    assert head == {"type": "http.response.start"}
    assert max(len(each["body"]) for each in rest) == PIECE
    assert b"".join(each["body"] for each in rest) == b"".join(bodies)
    assert [each["more_body"] for each in rest] == [True] * (len(rest) - 1) + [False]
    assert len(rest) == 8


def test_the_next_answer_on_a_connection_has_time_of_its_own() -> None:
    """What lies there unread grows only once the answer before has been read."""
    unread = iter([3000, 2000, 1000, 5000])

    class Cycle:
        """As uvicorn's, as far as it is used."""

        def __init__(self) -> None:
            self.transport = self

        def get_write_buffer_size(self) -> int:
            return next(unread)

        async def receive(self) -> Any:
            raise AssertionError

    async def app(*_: Any) -> None:
        pass

    asyncio.run(Patience(app, 0.1)({}, Cycle().receive, app))
    assert list(unread) == []


def test_a_connection_with_an_answer_to_be_read_is_not_idle() -> None:
    """However long it takes: what is left unread is looked at elsewhere."""
    body = bytes(20_000_000)  # more than the system takes by itself

    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    listening = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, http=connections(0.1), lifespan="off", log_level="error"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        with socket.create_connection(listening.getsockname(), timeout=60) as reader:
            reader.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            assert reader.recv(8, socket.MSG_PEEK) == b"HTTP/1.1"
            time.sleep(1)  # ten looks
            with HTTPResponse(reader) as answer:
                answer.begin()
                assert len(answer.read()) == len(body)
    finally:
        web.should_exit = True
        thread.join(20)


def test_json_is_parsed_for_callers_whom_the_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much of it, and the larger ones one after the other."""
    parsing, most, lock = 0, [], threading.Lock()

    def parse(method: Any, body: bytes) -> bytes:
        nonlocal parsing
        with lock:
            parsing += 1
            most.append(parsing)
        time.sleep(0.1)
        with lock:
            parsing -= 1
        return b""

    monkeypatch.setattr(rpc, "_from_json", parse)
    with Fake(message_bytes=40_000_000, token="somebody") as fake:
        for body in (b"{}", bytes(1_000_000)):
            error = refused(fake.begin(PREPARE, body, len(body), UNARY["connect json"]))
            assert (error.http, info(error).reason) == (401, "UNAUTHENTICATED")
        error = refused(fake.begin(PREPARE, b"", 16_000_001, UNARY["connect json"], "somebody"))
        assert (info(error).reason, info(error).metadata["limit"]) == ("OVER_LIMIT", "json_mb")
        assert (info(error).metadata["asked"], info(error).metadata["value"]) == ("16.000001", "16")
        assert "application/proto" in error.details()
        assert not most
        media = UNARY["connect json"]
        several = [fake.begin(PREPARE, bytes(1_000_000), 1_000_000, media, "somebody") for _ in range(4)]
        for each in several:
            assert each.getresponse().status == 200
            each.close()
        assert most == [1, 1, 1, 1]


def test_one_caller_has_half_of_the_analyses() -> None:
    """Who shows a token; the others are everybody else."""
    runs = Runs(None, most=4)
    runs._enter("alice")
    runs._enter("alice")
    with pytest.raises(ClientBusyError, match="2 analyses of yours"):
        runs._enter("alice")
    runs._enter("")
    runs._leave("alice")
    runs._enter("")
    runs._enter("")
    with pytest.raises(BusyError, match="4 analyses run"):
        runs._enter("bob")
    runs._leave("")
    runs._enter("bob")


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The origin of an empty page that another server serves."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, *_: Any) -> None:
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://localhost:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


CAPTURE = """async ([url, request]) => {
  const text = new TextEncoder().encode(JSON.stringify(request));
  const body = new Uint8Array(5 + text.length);
  new DataView(body.buffer).setUint32(1, text.length);
  body.set(text, 5);
  const headers = {"content-type": "application/connect+json", "connect-protocol-version": "1"};
  const answer = await fetch(url, {method: "POST", headers, body});
  const bytes = new Uint8Array(await answer.arrayBuffer()), names = [], tensors = [];
  const view = new DataView(bytes.buffer);
  for (let at = 0; at < bytes.length; ) {
    const flags = bytes[at], size = view.getUint32(at + 1);
    const event = JSON.parse(new TextDecoder().decode(bytes.subarray(at + 5, at + 5 + size)));
    at += 5 + size;
    if (flags === 2) {
      if (event.error) throw new Error(event.error.message);
      const hashed = {};
      for (const [index, name] of names.entries()) {
        const digest = await crypto.subtle.digest("SHA-256", tensors[index]);
        hashed[name] = [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      }
      return hashed;
    }
    for (const tensor of event.header?.tensors ?? []) {
      names[tensor.index ?? 0] = tensor.name;
      tensors[tensor.index ?? 0] = new Uint8Array(Number(tensor.byteCount));
    }
    if (event.chunk) {
      const data = Uint8Array.from(atob(event.chunk.data ?? ""), (letter) => letter.charCodeAt(0));
      tensors[event.chunk.index ?? 0].set(data, Number(event.chunk.offset ?? 0));
    }
  }
  throw new Error("the stream has no end");
}"""


def test_a_page_elsewhere_in_a_real_browser(
    browser: Any, elsewhere: str, server: str, web: str, remote_numpy: vs.RemoteVLM
) -> None:
    """Refused, as long as its origin was not named; then it gets Python's bytes. So does the app's own page."""
    request = {"run": {"prompts": HELLO, "selection": {"hooks": [POST]}, "forward": {}}}
    with remote_numpy.run_with_cache(POST) as cache:
        remote_numpy.forward(remote_numpy.prepare_messages("Say hello"))
    expected = {name: hashlib.sha256(to_numpy(cache[name]).tobytes()).hexdigest() for name in cache.names}
    process, named = start_web("--server", server, "--cors-origin", elsewhere)
    try:
        page = browser.new_page()
        page.goto(elsewhere)
        with pytest.raises(Exception, match="Failed to fetch"):
            page.evaluate(CAPTURE, [web + CACHE, request])
        found = page.evaluate(CAPTURE, [named + CACHE, request])
        assert {name: found[name] for name in expected} == expected
        page.goto(f"{web}/docs")
        assert page.evaluate(CAPTURE, [web + CACHE, request]) == found
        page.close()
    finally:
        stop_server(process)
