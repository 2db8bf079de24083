"""What a server shows to whom: the sockets it listens on, and what callers learn who may not call."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException

import grpc
import pytest
from conftest import stop_server
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from papers import key, openssl, pem
from prometheus_client import CollectorRegistry
from sockets import descendants, listened, owner
from vlm_spectra.v1 import model_service_pb2 as mpb
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.cli import main as cli
from vlm_spectra_server.serving import scrape
from vlm_spectra_server.serving.auth import _CALLS, SCOPES, Tokens
from vlm_spectra_server.serving.config import resolve
from vlm_spectra_server.serving.tls import Certificates
from webapp import free_port

TOKENS = {scope: f"{scope}-{'t' * 30}" for scope in SCOPES}
MODELS = ("spectra-tiny", "no-such-model", "")


# Sockets, as the kernel lists them: of the front, of the worker, of whatever they started.


def test_without_flags_one_socket_listens_on_loopback(server):
    """Of all processes of a server only the front listens, on one port of 127.0.0.1."""
    port = int(server.split(":")[1])
    front = owner(port)
    assert len(descendants(front)) >= 2, "the worker is among them"
    assert listened(front) == {("tcp", "127.0.0.1", port)}
    defaults = resolve(type("Options", (), {}), {})
    assert (defaults.host, defaults.metrics_port) == ("127.0.0.1", 0)


def test_the_page_alone_listens_on_loopback(server):
    port = free_port()
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "web", "--server", server, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert str(port) in process.stdout.readline()
        assert listened(process.pid) == {("tcp", "127.0.0.1", port)}
    finally:
        process.stdout.close()
        stop_server(process)


@pytest.mark.parametrize(
    ("words", "host"),
    [
        ("serve --host 0.0.0.0", "0.0.0.0"),
        ("serve --host ::", "::"),
        ("serve --metrics-port 9464 --metrics-host 0.0.0.0", "0.0.0.0"),
        ("serve --web --web-host 0.0.0.0", "0.0.0.0"),
        ("web --host 0.0.0.0", "0.0.0.0"),
        ("web --server 127.0.0.1:1 --host 0.0.0.0", "0.0.0.0"),
    ],
)
def test_beyond_the_machine_nothing_starts_without_tls_and_tokens(words, host, capsys, monkeypatch):
    """It says what to add, and has listened nowhere. (A page over a server elsewhere asks for that server's tokens.)"""
    monkeypatch.delenv("VLM_SPECTRA_TOKENS", raising=False)
    before = listened(os.getpid())
    assert cli(words.split()) == 1
    said = capsys.readouterr().err
    assert host in said
    tokens = [] if "--server" in words else ["--token-file"]
    for flag in ("--tls-certificate", "--tls-key", "--insecure", *tokens):
        assert flag in said
    assert listened(os.getpid()) == before


@pytest.mark.parametrize("flag", ["--model=x", "--metrics-port=9464", "--max-batch=3", "--device=cpu"])
def test_a_page_over_a_server_elsewhere_refuses_what_has_no_meaning_for_it(flag, capsys):
    assert cli(["web", "--server", "127.0.0.1:1", flag]) == 1
    assert f"{flag.split('=')[0]} goes with a model that is hosted here" in capsys.readouterr().err


# Who may not call, on every call that a server has.


@dataclass(frozen=True)
class Call:
    """A call of any service, made by hand.

    Attributes:
        path: `/service/Method`.
        streams: Whether the client sends a stream, and whether the server does.
        requests: Requests that differ in the model they name only.
    """

    path: str
    streams: tuple[bool, bool]
    requests: tuple[Message, ...]


def _naming(request_type: type[Message]) -> tuple[Message, ...]:
    """Requests of a type that name models which exist or do not."""
    found = []
    for model in MODELS:
        request = request_type()
        fields = request.DESCRIPTOR.fields_by_name
        for name in ("model", "name"):
            if name in fields:
                setattr(request, name, model)
        if "run" in fields:
            request.run.model = model
            request.run.selection.hooks.append("lm.hook_embed")
        found.append(request)
    return tuple(found)


def _calls() -> list[Call]:
    found = []
    for module, service in ((spb, "SpectraService"), (mpb, "ModelService")):
        for method in module.DESCRIPTOR.services_by_name[service].methods:
            requests = _naming(getattr(module, method.input_type.name))
            streams = (method.client_streaming, method.server_streaming)
            found.append(Call(f"/{method.containing_service.full_name}/{method.name}", streams, requests))
    names = ("vlm_spectra.model/spectra-tiny", "vlm_spectra.model/no-such-model", "vlm_spectra.v1.SpectraService")
    health = tuple(health_pb2.HealthCheckRequest(service=name) for name in names)
    found.append(Call("/grpc.health.v1.Health/Check", (False, False), health))
    found.append(Call("/grpc.health.v1.Health/Watch", (False, True), (*health, health_pb2.HealthCheckRequest())))
    asked = (reflection_pb2.ServerReflectionRequest(list_services=""),)
    asked += (reflection_pb2.ServerReflectionRequest(file_containing_symbol="vlm_spectra.v1.SpectraService"),)
    found.append(Call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", (True, True), asked))
    for method in channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].methods:
        request = getattr(channelz_pb2, method.input_type.name)()
        found.append(Call(f"/grpc.channelz.v1.Channelz/{method.name}", (False, False), (request,)))
    nothing = (spb.ForwardRequest(model=MODELS[0]), spb.ForwardRequest(model=MODELS[1]))
    found.append(Call("/vlm_spectra.v1.SpectraService/Nothing", (False, False), nothing))
    found.append(Call("/no.such.Service/Nothing", (False, False), nothing))
    return found


CALLS = _calls()


@dataclass(frozen=True)
class Guarded:
    """A server with TLS and a token for each scope.

    Attributes:
        address: Its address.
        metrics: Where its metrics are.
        ca: Whom its certificate is from.
        process: Its front.
        ports: What it was asked to listen on.
    """

    address: str
    metrics: str
    ca: bytes
    process: int
    ports: frozenset[int]

    def learnt(self, channel: grpc.Channel, call: Call, token: str | None, request: Message) -> tuple[object, ...]:
        """All that a caller learns of a call, but for the request's number and the time it took."""
        kind = {(False, False): "unary_unary", (False, True): "unary_stream", (True, True): "stream_stream"}
        made = getattr(channel, kind[call.streams])(call.path)
        metadata = () if token is None else (("authorization", token),)
        sent = request.SerializeToString()
        try:
            answer = made(iter([sent]) if call.streams[0] else sent, metadata=metadata, timeout=30)
            return "OK", list(answer) if call.streams[1] else answer
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            return error.code().name, error.details(), _details(status)


def _details(status) -> tuple[object, ...]:
    found = []
    for detail in () if status is None else status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            shown = {k: v for k, v in info.metadata.items() if k != "request_id" and not k.endswith("_seconds")}
            found.append((info.reason, info.domain, tuple(sorted(shown.items()))))
        else:
            found.append(detail.SerializeToString())
    return tuple(found)


@pytest.fixture(scope="module")
def guarded(papers, tmp_path_factory):
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("".join(f"{scope}-alone {scope} {token}\n" for scope, token in TOKENS.items()))
    tokens.chmod(0o600)
    ports = {name: free_port() for name in ("port", "metrics-port", "web-port")}
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--web", "--device", "cpu"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--tls-certificate", pem(papers["server"]), "--tls-key", key(papers["server"])]
    command += ["--token-file", str(tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any(" serving " in line for line in process.stdout)
    ca = papers["ca"].with_suffix(".pem").read_bytes()
    address, metrics = f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['metrics-port']}/metrics"
    yield Guarded(address, metrics, ca, process.pid, frozenset(ports.values()))
    process.stdout.close()
    stop_server(process)


@pytest.fixture(scope="module")
def channel(guarded):
    with grpc.secure_channel(guarded.address, grpc.ssl_channel_credentials(guarded.ca)) as found:
        yield found


@openssl
@pytest.mark.parametrize(
    "token", [None, "", "Bearer", "Bearer " + "w" * 40, f"Bearer {TOKENS['admin']}x", "Basic YTpi"]
)
def test_without_a_token_of_its_own_every_call_is_answered_alike(guarded, channel, token):
    """One answer for all calls, known or not, whatever they name; it says how to show a token, and nothing else."""
    answers = {guarded.learnt(channel, call, token, request) for call in CALLS for request in call.requests}
    assert len(answers) == 1, answers
    code, sentence, _ = answers.pop()
    assert code == "UNAUTHENTICATED"
    assert "spectra-tiny" not in sentence
    assert "token" in sentence


@openssl
def test_without_a_token_only_the_health_of_the_whole_is_open(guarded, channel):
    check = Call("/grpc.health.v1.Health/Check", (False, False), ())
    code, answer = guarded.learnt(channel, check, None, health_pb2.HealthCheckRequest())
    assert code == "OK"
    assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


@openssl
@pytest.mark.parametrize("scope", SCOPES)
def test_without_its_scope_a_call_is_answered_alike_whatever_it_names(guarded, channel, scope):
    """The answer names the scope; it is the same for a model that is there and for one that is not."""
    for call in CALLS:
        method = call.path.rsplit("/", 1)[1]
        wanted = _CALLS.get(method, ("admin",) if "channelz" in call.path else ())
        if call.path.startswith("/vlm_spectra") and method not in _CALLS:
            continue
        missing = [each for each in wanted if each != scope]
        if not missing:
            continue
        answers = {guarded.learnt(channel, call, f"Bearer {TOKENS[scope]}", request) for request in call.requests}
        assert len(answers) == 1, (call.path, answers)
        code, sentence, _ = answers.pop()
        assert (code, missing[0] in sentence) == ("PERMISSION_DENIED", True), call.path


@openssl
def test_over_plain_text_nothing_is_learnt(guarded):
    """Neither gRPC nor HTTP gets an answer on a port that speaks TLS, with a good token or without."""
    with grpc.insecure_channel(guarded.address) as plain:
        for call in CALLS[:3]:
            code, sentence, details = guarded.learnt(plain, call, f"Bearer {TOKENS['admin']}", call.requests[0])
            assert (code, details) == ("UNAVAILABLE", ())
            assert "spectra-tiny" not in sentence
    host, port = guarded.address.split(":")
    for sent in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64)):
        with socket.create_connection((host, int(port)), 30) as connection:
            connection.sendall(sent)
            heard = b""
            try:
                while part := connection.recv(1000):
                    heard += part
            except OSError:
                pass  # a reset says nothing either
        assert len(heard) <= 7, "at most a TLS alert"


def scraped(url, token="", context=None):
    """Status and page."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=30, context=context
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@openssl
def test_metrics_want_a_token_where_the_server_has_tokens(guarded, monkeypatch, capsys):
    refused = {
        scraped(guarded.metrics + path, token) for path in ("", "/spectra-tiny", "?x=1") for token in ("", "w" * 40)
    }
    assert {status for status, _ in refused} == {401}
    assert not any("spectra" in page or "vlm" in page for _, page in refused)
    status, page = scraped(guarded.metrics, TOKENS["weights"])
    assert status == 200
    assert 'vlm_spectra_model_ready{model="spectra-tiny"} 1.0' in page
    where = guarded.metrics.removeprefix("http://").removesuffix("/metrics")
    monkeypatch.delenv("VLM_SPECTRA_TOKEN", raising=False)
    assert cli(["top", where, "--once"]) == 1
    assert "VLM_SPECTRA_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("VLM_SPECTRA_TOKEN", TOKENS["infer"])
    assert cli(["top", where, "--once"]) == 0
    assert "spectra-tiny" in capsys.readouterr().out


def test_connections_that_stand_do_not_keep_metrics_from_others():
    """More of them than there may be: the oldest are cut off."""
    found = scrape.Scrape(CollectorRegistry(), "127.0.0.1", 0)
    port = int(found.url.rsplit(":", 1)[1].split("/")[0])
    idle = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(scrape._MOST + 3)]
    try:
        assert scraped(found.url)[0] == 200
        assert [connection.recv(1) for connection in idle[:3]] == [b""] * 3
    finally:
        for connection in idle:
            connection.close()
        found.close()


@openssl
def test_metrics_beyond_the_machine_are_over_tls(papers, monkeypatch):
    """On loopback here, as if it were beyond: the server's certificate, a token, and no plain text."""
    monkeypatch.setattr(scrape, "is_loopback", lambda host: False)
    files = Certificates(pem(papers["server"]), key(papers["server"]))
    tokens = Tokens(text=f"reader infer {TOKENS['infer']}")
    found = scrape.Scrape(CollectorRegistry(), "127.0.0.1", 0, tokens, files)
    try:
        assert found.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=pem(papers["ca"]))
        assert scraped(found.url, TOKENS["infer"], trusting)[0] == 200
        assert scraped(found.url, "", trusting)[0] == 401
        with pytest.raises(OSError, match="certificate"):
            scraped(found.url, TOKENS["infer"], ssl.create_default_context())
        with pytest.raises((OSError, HTTPException)):
            scraped(found.url.replace("https", "http"), TOKENS["infer"])
    finally:
        found.close()
