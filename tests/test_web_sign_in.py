"""Who may use the web app: each caller with a token of their own, over TLS, on no address without both."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from calls import until
from conftest import another_door, stop_server
from papers import certificate, key, openssl, pem
from starlette.testclient import TestClient
from vlm_spectra.network.secure import TLS
from vlm_spectra_server import cli
from vlm_spectra_server.serving import config
from vlm_spectra_server.serving.auth import Tokens
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.serving.tls import Certificates
from vlm_spectra_server.web import command, sessions
from vlm_spectra_server.web.app import STATIC, create_app
from vlm_spectra_server.web.upstream import Upstream
from webapp import start_web

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
def guarded(front: Server, tokens: Path) -> Iterator[Server]:
    """A server with tokens."""
    with another_door(front, tokens=Tokens(str(tokens)), allow_models=["/models/*"]) as server:
        yield server


@pytest.fixture
def web(guarded: Server) -> Iterator[TestClient]:
    with TestClient(create_app(Upstream(guarded.address))) as client:
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


def test_a_session_ends_by_itself(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(create_app(Upstream(guarded.address))) as web, TestClient(web.app) as other:
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


def test_a_token_that_is_taken_away(tokens: Path, web: TestClient) -> None:
    web.post("/api/session", json={"token": LOOKER})
    assert call(web, "POST", "/api/attention").status_code == 200
    before = tokens.read_text()
    for text, status in ((before.replace("looker", "# looker"), 401), (before, 200)):
        tokens.write_text(text)
        until(lambda status=status: call(web, "POST", "/api/attention").status_code == status)


def test_the_apps_own_token_serves_its_owner(guarded: Server) -> None:
    """A caller of this machine without a token uses the app's, one with a token that; the browsers' calls neither."""
    with TestClient(create_app(Upstream(guarded.address, own_token=LOOKER))) as web:
        assert web.get("/api/session").json() == {"required": False, "signed_in": False, "name": ""}
        assert call(web, "POST", "/api/attention").status_code == 200
        assert reason(call(web, "POST", "/api/predict"), 403) == "MISSING_SCOPE"
        assert call(web, "POST", "/api/predict", headers=bearer(DOER)).status_code == 200
        assert reason(call(web, "POST", "/api/predict", headers=bearer(WRONG)), 401) == "UNAUTHENTICATED"
        unary = {"content-type": "application/json"}
        answer = web.post("/vlm_spectra.v1.ModelService/ListModels", content="{}", headers=unary)
        assert answer.status_code == 401


def test_a_server_on_this_machine_is_reached_without_a_proxy(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with TestClient(create_app(Upstream(guarded.address))) as web:
            assert web.get("/api/model/status", headers=bearer(ALICE)).json()["state"] == "ready"
            asked = {**bearer(ALICE), "content-type": "application/json", "connect-timeout-ms": "20000"}
            assert web.post("/vlm_spectra.v1.ModelService/ListModels", content="{}", headers=asked).status_code == 200
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_page_is_no_caller_without_a_token(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    """What it asks for itself, while those with tokens use it, counts among nobody who was refused."""

    def refused() -> float | None:
        return guarded.metrics.registry.get_sample_value("vlm_spectra_refused_callers_total")

    before = refused()
    with TestClient(create_app(Upstream(guarded.address, exposed=True))) as web:
        assert web.get("/api/session").json()["required"]
        assert web.get("/api/model/status", headers=bearer(LOOKER)).status_code == 200
        unary = {"content-type": "application/json", **bearer(LOOKER)}
        assert web.post("/vlm_spectra.v1.ModelService/ListModels", content="{}", headers=unary).status_code == 200
    assert refused() == before
    assert "no token" not in caplog.text


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


def test_nobody_signs_others_out(web: TestClient) -> None:
    """However often somebody signs in; of their own cookies the oldest go."""
    with TestClient(web.app) as alice, TestClient(web.app) as first:
        assert alice.post("/api/session", json={"token": ALICE}).status_code == 200
        assert first.post("/api/session", json={"token": LOOKER}).status_code == 200
        for _ in range(sessions.OWN):
            assert web.post("/api/session", json={"token": LOOKER}).status_code == 200
        assert alice.get("/api/session").json()["signed_in"]
        assert not first.get("/api/session").json()["signed_in"]


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
    for file, why in (("/no/such/file", "No such file or directory"), ("/dev/zero", "more than 16,777,216 bytes")):
        unread = refused("web", "--server", "127.0.0.1:1", "--server-token-file", file)
        assert f"{file} cannot be read: " in unread
        assert why in unread


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


PUBLIC = "https://vlm.lab.example"
PREPARE = {"prompts": [{"task": "Say hello"}]}
CALL = "/vlm_spectra.v1.SpectraService/Prepare"


@pytest.mark.parametrize("insecure", [False, True])
def test_the_apps_own_token_is_lent_to_nobody_behind_a_proxy(monkeypatch: pytest.MonkeyPatch, insecure: bool) -> None:
    monkeypatch.setenv("VLM_SPECTRA_TOKEN", LOOKER)
    options = {"command": "web", "server": "127.0.0.1:1", "insecure": insecure or None}
    here, behind = (
        config.resolve(type("Options", (), {**options, "public_url": url})) for url in ("", "https://vlm.lab.example")
    )
    assert (command._lent(here), command._lent(behind)) == (LOOKER, "")


@pytest.mark.parametrize("host", ["vlm.lab.example", "127.0.0.1:55556"])
def test_behind_a_reverse_proxy(guarded: Server, host: str) -> None:
    """Whether or not the proxy passes on the name by which it was called."""
    app = create_app(Upstream(guarded.address, exposed=True), hosts=["127.0.0.1"], public=PUBLIC)
    with TestClient(app, base_url=f"http://{host}") as web:
        own = {"origin": PUBLIC}
        assert web.get("/").status_code == 200
        signed = web.post("/api/session", json={"token": ALICE}, headers=own)
        assert signed.status_code == 200
        assert "Secure" in signed.headers["set-cookie"], "the browser speaks TLS with the proxy"
        shown = {**own, **bearer(ALICE)}
        assert call(web, "POST", "/api/predict", headers=shown).status_code == 200
        lines = web.post("/api/predict", json={**ASKED, "stream": True}, headers=shown)
        assert lines.headers["x-accel-buffering"] == "no"
        assert web.post(CALL, json=PREPARE, headers=shown).status_code == 200
        assert web.post(CALL, json=PREPARE, headers=own).status_code == 401
        for origin in ("https://evil.example", "https://vlm.lab.example:8443"):
            assert reason(call(web, "POST", "/api/predict", headers={"origin": origin}), 403) == "WRONG_ORIGIN"
        for name in ("evil.example", "vlm.lab.example.evil.example", "lab.example"):
            assert reason(web.get("/", headers={"host": name}), 403) == "WRONG_HOST"


def test_a_public_page_is_an_exposed_one(server: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What comes through a proxy is not this machine's: it wants tokens, and is lent none."""
    for url, sentence in (("http://lab.example", "in plain text"), ("lab.example", "an origin is a scheme")):
        assert cli.main(("web", "--server", server, "--port", "0", "--public-url", url)) == 1
        assert sentence in capsys.readouterr().err
    (tmp_path / "own").write_text(ALICE)
    mine = ("--server-token-file", str(tmp_path / "own"))
    process, address = start_web("--server", server, "--public-url", PUBLIC, *mine)
    try:
        for host in (httpx.URL(address).host, "vlm.lab.example"):
            answer = httpx.get(f"{address}/api/model/status", headers={"host": host}, timeout=60)
            assert reason(answer, 503) == "OPEN_SERVER"
        assert reason(httpx.get(address, headers={"host": "evil.example"}, timeout=60), 403) == "WRONG_HOST"
    finally:
        stop_server(process)


@openssl
@pytest.mark.parametrize("wanted", [True, False])
def test_calls_to_a_server_that_wants_certificates(
    front: Server, tokens: Path, papers: dict[str, Path], wanted: bool
) -> None:
    """The app's certificate opens the line for a caller with a token; it never stands for a caller."""
    certificates = Certificates(pem(papers["server"]), key(papers["server"]), pem(papers["ca"]))
    tls = TLS(ca=pem(papers["ca"]), certificate=pem(papers["bob"]), key=key(papers["bob"]))
    options: dict[str, Any] = {"tokens": Tokens(str(tokens))} if wanted else {}
    with another_door(front, certificates=certificates, **options) as server:
        with TestClient(create_app(Upstream(server.address, tls))) as web:
            answers = [web.post(CALL, json=PREPARE, headers=headers) for headers in ({}, bearer(ALICE))]
            if wanted:
                assert [answer.status_code for answer in answers] == [401, 200]
                return
            for answer in answers:
                assert answer.status_code == 501
                assert "by certificate alone" in answer.json()["message"]


@openssl
def test_a_server_and_its_page_over_tls(tokens: Path, tmp_path: Path) -> None:
    """One process, one certificate, the same tokens; the certificate changes while it serves."""
    used, second = certificate(tmp_path, "used"), certificate(tmp_path, "second")
    files = ("--tls-certificate", pem(used), "--tls-key", key(used), "--token-file", str(tokens))
    process, address = start_web("--model", "spectra-tiny", "--device", "cpu", *files)
    try:
        assert address.startswith("https://")
        context = ssl.create_default_context(cafile=pem(used))
        with httpx.Client(base_url=address, timeout=200, verify=context) as web:
            status = lambda: web.get("/api/model/status", headers=bearer(ALICE)).json()  # noqa: E731
            until(lambda: status()["state"] == "ready")
            assert status()["tls"] is True
            assert reason(web.get("/api/model/status"), 401) == "UNAUTHENTICATED"
            assert "Secure" in web.post("/api/session", json={"token": DOER}).headers["set-cookie"]
            assert "click" in call(web, "POST", "/api/predict").json()["text"]
            assert reason(call(web, "POST", "/api/attention"), 403) == "MISSING_SCOPE"
        first = shown(address)
        Path(key(used)).write_text("damaged")
        assert shown(address) == first, "files that cannot be used change nothing"
        shutil.copy(key(second), key(used))
        shutil.copy(pem(second), pem(used))
        assert shown(address) != first
        plain = address.replace("https", "http")
        with pytest.raises(httpx.TransportError):
            httpx.get(plain, timeout=20)
    finally:
        stop_server(process)
    assert process.returncode == 0


@openssl
def test_no_connection_stands_for_a_later_one(papers: dict[str, Path]) -> None:
    """Where certificates tell who calls, each connection shows one: else a removed authority would go on to count."""
    files = Certificates(pem(papers["server"]), key(papers["server"]), pem(papers["ca"]))
    client = ssl.create_default_context(cafile=pem(papers["ca"]))
    client.check_hostname = False
    client.load_cert_chain(pem(papers["bob"]), key(papers["bob"]))
    served, session = files.context(), None
    for _ in range(2):
        ours, theirs = socket.socketpair()
        answers = threading.Thread(target=answer_one, args=(served, theirs))
        answers.start()
        with client.wrap_socket(ours, session=session) as wrapped:
            assert wrapped.recv(2) == b"hi"
            assert not wrapped.session_reused
            session = wrapped.session
        answers.join()


def answer_one(context: ssl.SSLContext, connection: socket.socket) -> None:
    with context.wrap_socket(connection, server_side=True) as wrapped:
        wrapped.sendall(b"hi")


@openssl
def test_a_page_over_a_server_with_tls(front: Server, tokens: Path, papers: dict[str, Path], tmp_path: Path) -> None:
    kept = tmp_path / "own"
    kept.write_text(f"{LOOKER}\n")
    certificates = Certificates(pem(papers["server"]), key(papers["server"]))
    with another_door(front, tokens=Tokens(str(tokens)), certificates=certificates) as server:
        arguments = ("--server", server.address, "--server-ca", pem(papers["ca"]), "--server-token-file", str(kept))
        process, address = start_web(*arguments)
        try:
            with httpx.Client(base_url=address, timeout=200) as web:
                assert web.get("/api/session").json()["required"] is False
                assert web.get("/api/model/status").json()["state"] == "ready"
                assert call(web, "POST", "/api/attention").status_code == 200
                assert reason(call(web, "POST", "/api/predict"), 403) == "MISSING_SCOPE"
                assert call(web, "POST", "/api/predict", headers=bearer(DOER)).status_code == 200
        finally:
            stop_server(process)
