"""Who may use the web app: each caller with a token of their own, over TLS, on no address without both."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from vlm_spectra_server import cli
from vlm_spectra_server.serving.auth import Tokens
from vlm_spectra_server.serving.host import Loading
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.web import sessions
from vlm_spectra_server.web.app import STATIC, create_app
from vlm_spectra_server.web.upstream import Upstream
from webapp import start_web, stop_web

ALICE, DOER, LOOKER = "alice-" + "a" * 30, "doer-" + "b" * 30, "looker-" + "c" * 30
WRONG = "wrong-" + "x" * 30
ASKED = {"filename": "screen-1.png", "task": "Click on the Login button"}
PNG = (STATIC / "gallery" / "screen-2.png").read_bytes()
UPLOADED = "0" * 32 + ".png"
CLOSED = (
    ("GET", "/api/model/status"),
    ("GET", "/api/model/options"),
    ("POST", "/api/model/select"),
    ("POST", "/api/model/patch-info"),
    ("POST", "/api/predict"),
    ("POST", "/api/forward"),
    ("POST", "/api/attention"),
    ("POST", "/api/attribution"),
    ("POST", "/api/logit-lens"),
    ("POST", "/api/patching"),
    ("POST", "/api/upload"),
    ("GET", f"/api/images/{UPLOADED}"),
    ("GET", "/api/pages/any"),
    ("GET", "/api/pages/any/lens.json"),
)
OPEN = {"/api/gallery", "/api/session"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"alice * {ALICE}\ndoer infer {DOER}\nlooker inspect {LOOKER}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def front(tokens: Path) -> Iterator[Server]:
    """A server with tokens, its front in this process."""
    server = Server(tokens=Tokens(str(tokens)), allow_models=["/models/*"])
    server.start(Loading("spectra-tiny", device="cpu"))
    assert server.first.settled.wait(240)
    yield server
    server.stop(0)


@pytest.fixture
def web(front: Server) -> Iterator[TestClient]:
    with TestClient(create_app(Upstream(front.address))) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def call(web: Any, method: str, path: str, **more: Any) -> Any:
    """A request that would be good with a token."""
    if path == "/api/upload":
        return web.post(path, files={"file": ("x.png", PNG)}, **more)
    question = {**ASKED, **({"corrupted": ASKED} if "patching" in path else {})}
    body = {"name": "spectra-tiny"} if path.endswith("select") else question
    return web.request(method, path, **({"json": body} if method == "POST" else {}), **more)


def reason(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["reason"])


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_nothing_answers_without_a_token(web: TestClient, method: str, path: str) -> None:
    for headers in ({}, bearer(WRONG), {"authorization": f"Basic {ALICE}"}, {"authorization": "Bearer"}):
        answer = call(web, method, path, headers=headers)
        assert reason(answer, 401) == "UNAUTHENTICATED", headers
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "spectra-tiny" not in answer.text
        assert WRONG not in answer.text


def test_nobody_without_a_token_is_listened_to(web: TestClient) -> None:
    """Who may not upload is refused before anything of the body is taken."""
    headers = [
        (b"host", b"testserver"),
        (b"content-type", b"multipart/form-data; boundary=b"),
        (b"content-length", b"99"),
    ]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/api/upload"}
    scope |= {"raw_path": b"/api/upload", "query_string": b"", "headers": headers, "scheme": "http", "root_path": ""}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(web.app(scope | {"server": ("testserver", 80)}, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 401
    assert b"UNAUTHENTICATED" in sent[1]["body"]


def test_every_address_is_accounted_for(web: TestClient) -> None:
    paths = web.get("/openapi.json").json()["paths"]
    described = {(method.upper(), path) for path, each in paths.items() for method in each}
    named = {(m, p.replace("any/lens.json", "{name}/lens.{kind}").replace("/any", "/{name}")) for m, p in CLOSED}
    named = {(m, p.replace(UPLOADED, "{filename}")) for m, p in named}
    assert {each for each in described if each[1] not in OPEN} == named
    for path in ("/", "/docs", "/static/app.js", "/scales.json", "/api/gallery", "/api/images/screen-1.png"):
        assert web.get(path).status_code == 200, path


def test_signing_in_and_out(web: TestClient) -> None:
    assert web.get("/api/session").json() == {"required": True, "signed_in": False, "name": ""}
    assert reason(web.post("/api/session", json={"token": WRONG}), 401) == "UNAUTHENTICATED"
    assert not web.cookies
    answer = web.post("/api/session", json={"token": ALICE})
    assert answer.json() == {"required": True, "signed_in": True, "name": ""}
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert "Secure" not in cookie
    assert ALICE not in cookie
    assert web.get("/api/session").json()["signed_in"]
    assert web.get("/api/model/status").json()["state"] == "ready"
    assert web.get("/api/model/status").json()["token"] is True
    name = call(web, "POST", "/api/upload").json()["filename"]
    assert web.get(f"/api/images/{name}").status_code == 200
    assert "click" in call(web, "POST", "/api/predict").json()["text"]
    page = call(web, "POST", "/api/logit-lens").json()["page"]
    assert web.get(page).status_code == 200
    kept = dict(web.cookies)
    assert not web.delete("/api/session").json()["signed_in"]
    assert reason(web.get("/api/model/status"), 401) == "UNAUTHENTICATED"
    web.cookies.update(kept)
    assert reason(web.get("/api/model/status"), 401) == "UNAUTHENTICATED", "the cookie is worth nothing any more"


def test_a_cookie_of_another_site_or_made_up(web: TestClient) -> None:
    web.post("/api/session", json={"token": ALICE})
    evil = {"origin": "http://evil.example"}
    assert reason(web.post("/api/predict", json=ASKED, headers=evil), 403) == "WRONG_ORIGIN"
    assert reason(web.post("/api/session", json={"token": ALICE}, headers=evil), 403) == "WRONG_ORIGIN"
    name = next(iter(web.cookies))
    web.cookies.clear()
    for value in ("", "x" * 43, ALICE):
        web.cookies.set(name, value)
        assert reason(web.get("/api/model/status"), 401) == "UNAUTHENTICATED"


def test_a_session_ends_by_itself(front: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(create_app(Upstream(front.address))) as web, TestClient(web.app) as other:
        web.post("/api/session", json={"token": ALICE})
        monkeypatch.setattr(sessions, "MOST", 1)
        other.post("/api/session", json={"token": ALICE})
        assert reason(web.get("/api/model/status"), 401) == "UNAUTHENTICATED", "the oldest went"
        assert other.get("/api/model/status").status_code == 200
        monkeypatch.setattr(sessions, "IDLE", -1.0)
        assert reason(other.get("/api/model/status"), 401) == "UNAUTHENTICATED"


def test_each_caller_has_their_own_scopes(web: TestClient) -> None:
    """Three people at once on one app: each may what their own token allows, whoever asked before."""
    for _ in range(2):
        assert "click" in call(web, "POST", "/api/predict", headers=bearer(DOER)).json()["text"]
        assert call(web, "POST", "/api/attention", headers=bearer(LOOKER)).json()["heads"]
        assert reason(call(web, "POST", "/api/predict", headers=bearer(LOOKER)), 403) == "MISSING_SCOPE"
        for path in ("attention", "attribution", "logit-lens", "patching"):
            answer = call(web, "POST", f"/api/{path}", headers=bearer(DOER))
            assert reason(answer, 403) == "MISSING_SCOPE"
            assert "inspect" in answer.json()["detail"]
        assert reason(call(web, "POST", "/api/patching", headers=bearer(LOOKER)), 403) == "MISSING_SCOPE"
        for token in (DOER, LOOKER):
            assert reason(call(web, "POST", "/api/model/select", headers=bearer(token)), 403) == "MISSING_SCOPE"
        assert call(web, "POST", "/api/attribution", headers=bearer(ALICE)).json()["scores"]
    web.post("/api/session", json={"token": DOER})
    assert reason(call(web, "POST", "/api/attention"), 403) == "MISSING_SCOPE"
    assert call(web, "POST", "/api/attention", headers=bearer(LOOKER)).status_code == 200, "what is shown counts"


def test_a_token_that_is_taken_away(front: Server, tokens: Path, web: TestClient) -> None:
    web.post("/api/session", json={"token": LOOKER})
    assert call(web, "POST", "/api/attention").status_code == 200
    before = tokens.read_text()
    for text, status in ((before.replace("looker", "# looker"), 401), (before, 200)):
        tokens.write_text(text)
        deadline = time.monotonic() + 200
        while (answer := call(web, "POST", "/api/attention")).status_code != status:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.2)


def test_the_apps_own_token_serves_its_owner(front: Server) -> None:
    """A caller of this machine without a token uses the app's, one with a token that; the browsers' calls neither."""
    with TestClient(create_app(Upstream(front.address, own_token=LOOKER))) as web:
        assert web.get("/api/session").json() == {"required": False, "signed_in": False, "name": ""}
        assert call(web, "POST", "/api/attention").status_code == 200
        assert reason(call(web, "POST", "/api/predict"), 403) == "MISSING_SCOPE"
        assert call(web, "POST", "/api/predict", headers=bearer(DOER)).status_code == 200
        assert reason(call(web, "POST", "/api/predict", headers=bearer(WRONG)), 401) == "UNAUTHENTICATED"
        unary = {"content-type": "application/json"}
        answer = web.post("/vlm_spectra.v1.ModelService/ListModels", content="{}", headers=unary)
        assert answer.status_code == 401


def test_an_open_server_is_not_opened_to_the_world(server: str) -> None:
    """A page for other machines over a server without tokens serves nobody, and says what to do."""
    with TestClient(create_app(Upstream(server, exposed=True))) as web:
        for headers in ({}, bearer(ALICE)):
            for method, path in CLOSED:
                answer = call(web, method, path, headers=headers)
                assert reason(answer, 503) == "OPEN_SERVER"
                assert "--token-file" in answer.json()["detail"]
        assert reason(web.post("/api/session", json={"token": ALICE}), 503) == "OPEN_SERVER"
    with TestClient(create_app(Upstream(server))) as web:
        assert web.get("/api/session").json() == {"required": False, "signed_in": False, "name": ""}
        assert call(web, "POST", "/api/predict").status_code == 200


def test_a_token_is_not_sent_in_plain_text() -> None:
    with TestClient(create_app(Upstream("gpu-box.example:50051"))) as web:
        answer = call(web, "POST", "/api/predict", headers=bearer(ALICE))
        assert answer.status_code == 400
        assert "plain text" in answer.json()["detail"]
        assert reason(web.post("/api/session", json={"token": "é" * 20}), 400) == "INVALID_INPUT"


def test_models_that_may_be_loaded(web: TestClient) -> None:
    options = web.get("/api/model/options", headers=bearer(ALICE)).json()["models"]
    assert options == [{"name": "spectra-tiny", "state": "ready"}], "patterns are no names"
    for name in ("/etc", "Qwen/Qwen2.5-VL-3B-Instruct", "/models/../etc"):
        answer = web.post("/api/model/select", json={"name": name}, headers=bearer(ALICE))
        assert reason(answer, 403) == "MODEL_NOT_ALLOWED"
        assert "/models/*" in answer.json()["detail"]


# Addresses and TLS.


def test_no_page_for_other_machines_without_tls_and_tokens(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        """The one sentence with which the command ends."""
        assert cli.main(arguments) == 1
        said = capsys.readouterr()
        assert not said.out
        assert len(said.err.strip().splitlines()) == 1, said.err
        return said.err

    both = "add --tls-certificate with --tls-key and --token-file"
    assert both in refused("web", "--host", "0.0.0.0", "--port", "0")
    assert both in refused("serve", "--web", "--web-host", "::", "--port", "0")
    alone = "add --tls-certificate with --tls-key, or --insecure"
    assert alone in refused("web", "--host", "0.0.0.0", "--token-file", str(tokens))
    assert alone in refused("web", "--server", "127.0.0.1:1", "--host", "0.0.0.0")
    own = refused("web", "--server", "127.0.0.1:1", "--token-file", str(tokens))
    assert "the tokens of the server" in own
    missing = refused("web", "--server", "127.0.0.1:1", "--server-token-file", "/no/such/file")
    assert "cannot be read" in missing


openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates, and is missing")


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate for localhost, signed by itself, and its key."""
    out, key = directory / f"{name}.pem", directory / f"{name}.key"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    make = [
        "openssl",
        "req",
        "-x509",
        *curve,
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
        *names,
        "-keyout",
        key,
        "-out",
        out,
    ]
    subprocess.run(make, check=True, capture_output=True)
    return out, key


def shown(address: str) -> bytes:
    """The certificate that a page shows."""
    url = httpx.URL(address)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((url.host, url.port), 60) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as wrapped:
            found = wrapped.getpeercert(binary_form=True)
    assert found
    return found


@openssl
def test_a_server_and_its_page_over_tls(tokens: Path, tmp_path: Path) -> None:
    """One process, one certificate, the same tokens; the certificate changes while it serves."""
    used, key = certificate(tmp_path, "used")
    second, second_key = certificate(tmp_path, "second")
    files = ("--tls-certificate", str(used), "--tls-key", str(key), "--token-file", str(tokens))
    process, address = start_web("--model", "spectra-tiny", "--device", "cpu", *files)
    try:
        assert address.startswith("https://")
        context = ssl.create_default_context(cafile=str(used))
        with httpx.Client(base_url=address, timeout=200, verify=context) as web:
            deadline = time.monotonic() + 200
            while (answer := web.get("/api/model/status", headers=bearer(ALICE))).json()["state"] != "ready":
                assert time.monotonic() < deadline, answer.text
                time.sleep(0.2)
            assert answer.json()["tls"] is True
            assert reason(web.get("/api/model/status"), 401) == "UNAUTHENTICATED"
            assert "Secure" in web.post("/api/session", json={"token": DOER}).headers["set-cookie"]
            assert "click" in call(web, "POST", "/api/predict").json()["text"]
            assert reason(call(web, "POST", "/api/attention"), 403) == "MISSING_SCOPE"
        first = shown(address)
        (tmp_path / "used.key").write_text("damaged")
        assert shown(address) == first, "files that cannot be used change nothing"
        shutil.copy(second_key, key)
        shutil.copy(second, used)
        assert shown(address) != first
        plain = address.replace("https", "http")
        with pytest.raises(httpx.TransportError):
            httpx.get(plain, timeout=20)
    finally:
        stop_web(process)
    assert process.returncode == 0


@openssl
def test_a_page_over_a_server_with_tls(front: Server, tokens: Path, tmp_path: Path) -> None:
    from vlm_spectra_server.serving.tls import Certificates

    used, key = certificate(tmp_path, "used")
    server = Server(tokens=Tokens(str(tokens)), certificates=Certificates(str(used), str(key)))
    server.models.hosts.update(front.models.hosts)  # the same model behind two doors
    server._grpc.start()
    kept = tmp_path / "own"
    kept.write_text(f"{LOOKER}\n")
    arguments = ("--server", server.address, "--server-ca", str(used), "--server-token-file", str(kept))
    process, address = start_web(*arguments)
    try:
        with httpx.Client(base_url=address, timeout=200) as web:
            assert web.get("/api/session").json()["required"] is False
            assert web.get("/api/model/status").json()["state"] == "ready"
            assert call(web, "POST", "/api/attention").status_code == 200
            assert reason(call(web, "POST", "/api/predict"), 403) == "MISSING_SCOPE"
            assert call(web, "POST", "/api/predict", headers=bearer(DOER)).status_code == 200
    finally:
        stop_web(process)
        server._grpc.stop(0).wait()
