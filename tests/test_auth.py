"""Who may call: tokens and scopes, TLS and certificates, addresses; whoever may not learns nothing."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
import vlm_spectra as vs
from calls import WAIT, Raw, Refusal, metric, run, until
from conftest import another_door
from grpc_health.v1 import health_pb2, health_pb2_grpc
from papers import certificate, key, openssl, pem
from sockets import listened
from vlm_spectra import errors
from vlm_spectra.network import secure
from vlm_spectra.network.local import LocalMemory
from vlm_spectra.network.status import from_rpc_error
from vlm_spectra.v1 import model_service_pb2 as mpb
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.cli import main as cli
from vlm_spectra_server.serving import tls as tls_module
from vlm_spectra_server.serving.auth import _CALLS, SCOPES, Tokens, needed
from vlm_spectra_server.serving.config import Config, resolve
from vlm_spectra_server.serving.loadable import Loadable
from vlm_spectra_server.serving.metrics import Metrics
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.serving.tls import Certificates, Following
from vlm_spectra_server.web.command import _listen

ALICE, LOOKER, DOER = "alice-" + "a" * 30, "looker-" + "b" * 30, "doer-" + "c" * 30
POST = "lm.blocks.*.hook_resid_post"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"# people\nalice * {ALICE}\nlooker inspect {LOOKER}\n\ndoer infer {DOER}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(front, tokens):
    """A server with tokens on loopback."""
    with another_door(front, tokens=Tokens(str(tokens))) as server:
        yield server


def ask(address, method, request, *metadata, stream=False):
    """A call by hand; its answer is not looked at."""
    with grpc.insecure_channel(address) as channel:
        make = channel.unary_stream if stream else channel.unary_unary
        call = make(f"/{method}", request_serializer=lambda message: message.SerializeToString())
        try:
            answer = call(request, timeout=WAIT, metadata=metadata)
            return list(answer) if stream else answer
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from None


@pytest.mark.parametrize("token", [None, "", "wrong-" + "x" * 30, ALICE + "x", ALICE[:-1], ALICE.upper()])
def test_without_its_token_nothing_is_learnt(guarded, token, monkeypatch):
    monkeypatch.delenv("VLM_SPECTRA_TOKEN", raising=False)
    with pytest.raises(errors.UnauthenticatedError) as caught:
        vs.connect(guarded.address, token=token)
    assert "spectra-tiny" not in str(caught.value)
    assert not token or token not in str(caught.value)
    assert caught.value.retry_after is None


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, f"Bearer {ALICE} {ALICE}", "Bearer " + "y" * 5000]
)
def test_odd_headers(guarded, header):
    with pytest.raises(errors.UnauthenticatedError):
        ask(
            guarded.address,
            "vlm_spectra.v1.ModelService/ListModels",
            mpb.ListModelsRequest(),
            ("authorization", header),
        )


def test_two_tokens_at_once_are_none(guarded):
    """Which of them counts would be a guess."""
    shown = [("authorization", f"Bearer {ALICE}")]
    request = ("vlm_spectra.v1.ModelService/ListModels", mpb.ListModelsRequest())
    ask(guarded.address, *request, *shown)
    with pytest.raises(errors.UnauthenticatedError):
        ask(guarded.address, *request, *shown * 2)


def test_callers_without_a_token_are_counted(guarded):
    def counted():
        return guarded.metrics.registry.get_sample_value("vlm_spectra_refused_callers_total")

    before = counted()
    with pytest.raises(errors.UnauthenticatedError):
        ask(guarded.address, "vlm_spectra.v1.ModelService/ListModels", mpb.ListModelsRequest())
    assert counted() == before + 1


def test_every_service_is_closed(guarded):
    """Unknown calls and reflection look like known ones; of health only the whole is open."""
    for method in ("vlm_spectra.v1.SpectraService/Nothing", "grpc.reflection.v1alpha.ServerReflection/Nothing"):
        with pytest.raises(errors.UnauthenticatedError):
            ask(guarded.address, method, mpb.ListModelsRequest())
    with grpc.insecure_channel(guarded.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        for call in (
            lambda: stub.Check(health_pb2.HealthCheckRequest(service="vlm_spectra.model/spectra-tiny")),
            lambda: list(stub.Watch(health_pb2.HealthCheckRequest())),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_token_of_the_environment(guarded, monkeypatch):
    monkeypatch.setenv("VLM_SPECTRA_TOKEN", ALICE)
    with vs.connect(guarded.address) as model:
        assert model.forward(model.prepare_messages("Hi"), 1).logits.shape[1] == 1
        assert ALICE not in repr(model)


def test_scopes(guarded):
    hook = "lm.blocks.1.hook_resid_post"
    with vs.connect(guarded.address, token=LOOKER) as looker, vs.connect(guarded.address, token=DOER) as doer:
        inputs = looker.prepare_messages("Say hello")
        with looker.run_with_cache(hook) as cache:
            looker.forward(inputs, logits_to_keep=None)
        assert hook in cache
        looker.logit_lens(inputs)
        doer.forward(inputs, 1)
        assert doer.generate(inputs, 2).text
        silence = [(hook, vs.ZeroAblation())]
        for scope, call in (
            ("infer", lambda: looker.generate(inputs, 2)),
            ("infer", lambda: captured(looker, hook, lambda: looker.generate(inputs, 2))),
            ("inspect", lambda: doer.logit_lens(inputs)),
            ("weights", lambda: looker.unembed(["Hi"])),
        ):
            with pytest.raises(errors.PermissionDeniedError, match=scope) as caught:
                call()
            assert caught.value.metadata["scope"] == scope
            assert caught.value.request_id
        for model, call in ((doer, lambda: doer.forward(inputs)), (looker, lambda: looker.logit_lens(inputs))):
            with model.run_with_hooks(silence), pytest.raises(errors.PermissionDeniedError, match="interventions"):
                call()
        with pytest.raises(errors.PermissionDeniedError, match="inspect"):
            doer.forward(inputs, output_hidden_states=True)
    with pytest.raises(errors.PermissionDeniedError, match="admin"):
        ask(
            guarded.address,
            "vlm_spectra.v1.ModelService/UnloadModel",
            mpb.UnloadModelRequest(name="spectra-tiny"),
            ("authorization", f"Bearer {LOOKER}"),
        )


def captured(model, hook, call):
    """A call with a capture."""
    with model.run_with_cache(hook):
        call()


def test_every_call_of_the_contract_has_its_scopes():
    services = (spb.DESCRIPTOR.services_by_name["SpectraService"], mpb.DESCRIPTOR.services_by_name["ModelService"])
    assert {method.name for service in services for method in service.methods} == set(_CALLS)
    assert {scope for scopes in _CALLS.values() for scope in scopes} == set(SCOPES)
    run = spb.RunWithCacheRequest()
    run.run.interventions.add()
    assert needed("RunWithCache", run) == ("inspect", "interventions")
    estimate = spb.EstimateRequest()
    assert needed("Estimate", estimate) == ()
    estimate.run.interventions.add()
    assert needed("Estimate", estimate) == ("interventions",)
    for asked in (spb.RunWithCacheRequest(), estimate):
        asked.run.generate.max_new_tokens = 1
        assert needed(type(asked).__name__.removesuffix("Request"), asked)[-1] == "infer"
    for options in (spb.ForwardOptions(output_attentions=True), spb.ForwardOptions(output_hidden_states=True)):
        assert needed("Forward", spb.ForwardRequest(options=options)) == ("infer", "inspect")


def test_a_capture_belongs_to_its_token(guarded):
    """Neither its stream, nor a reference to it, nor its memory, nor its end is another's."""
    hook = "lm.blocks.1.hook_resid_post"
    with vs.connect(guarded.address, token=ALICE) as alice:
        inputs = alice.prepare_messages("Say hello")
        with alice.run_with_cache(hook) as cache:
            alice.forward(inputs, logits_to_keep=None)
        reference = cache.reference(hook)
        resume = spb.RunWithCacheRequest(resume=spb.CaptureResume(capture_id=reference.capture_id))
        looker = ("authorization", f"Bearer {LOOKER}")
        with pytest.raises(errors.CaptureNotFoundError):
            ask(guarded.address, "vlm_spectra.v1.SpectraService/RunWithCache", resume, looker, stream=True)
        release = spb.ReleaseCaptureRequest(capture_id=reference.capture_id)
        ask(guarded.address, "vlm_spectra.v1.SpectraService/ReleaseCapture", release, looker)
        patch = vs.PatchActivation(vs.CaptureRef(reference.capture_id, hook))
        with alice.run_with_hooks([(hook, patch)]):
            alice.forward(inputs, 1)
        memory = LocalMemory.at(guarded._spectra.door.name)
        assert len(memory.segment(reference.capture_id, 0)) > 0
        guarded.guard.tokens._callers, before = {}, guarded.guard.tokens._callers
        try:
            with pytest.raises(errors.UnavailableError):
                memory.segment(reference.capture_id, 0)
        finally:
            guarded.guard.tokens._callers = before


def test_the_file_is_read_again(tokens):
    path = tokens.parent / "changing"
    path.write_text(f"one infer {ALICE}\n")
    found = Tokens(str(path))
    assert found.caller(f"Bearer {ALICE}").name == "one"
    path.write_text(f"two infer {LOOKER}\n")
    found._looked = 0.0
    assert found.caller(f"bearer {LOOKER}").name == "two"
    with pytest.raises(errors.UnauthenticatedError):
        found.caller(f"Bearer {ALICE}")
    path.write_text(f"two infer {LOOKER[:-1]}z\n")  # as long as the last, and no younger
    os.utime(path, (1, 1))
    found._looked = 0.0
    with pytest.raises(errors.UnauthenticatedError):
        found.caller(f"Bearer {LOOKER}")
    path.write_text(f"two infer {LOOKER}\n")
    found._looked = 0.0
    for broken in ("nonsense\n", None):
        assert found.caller(f"Bearer {LOOKER}").name == "two"
        path.write_text(broken) if broken else path.unlink()
        found._looked = 0.0
        assert found.caller(f"Bearer {LOOKER}").name == "two"


def test_a_token_that_is_taken_away_ends_its_streams(wide_front, tmp_path):
    """One that is replaced by another of the same name does not. What is not read here waits on the server."""
    path = tmp_path / "tokens"
    path.write_text(f"bob inspect {DOER}\n")
    with another_door(wide_front, tokens=Tokens(str(path))) as server:
        bob = Raw(server.address, token=DOER)
        answer = bob.begin("RunWithCache", run("so " * 600, "lm.blocks.*.hook_resid_post"))
        next(answer)
        path.write_text(f"bob inspect {ALICE}\n")
        server.guard.tokens._looked = 0.0  # a second has passed
        assert (refused(server, ALICE), refused(server, DOER)) == (False, True)
        for _ in range(4):
            next(answer)
        path.write_text("# nobody\n")
        server.guard.tokens._looked = 0.0
        with pytest.raises(grpc.RpcError) as caught:
            for _ in answer:
                pass
        bob.close()
    found = Refusal.of(caught.value)
    assert (found.code, found.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    assert "taken away" in found.message


def test_who_watches_the_health_hears_no_more_without_a_token(front, tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"bob infer {DOER}\n")
    with another_door(front, tokens=Tokens(str(path))) as server, grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service="vlm_spectra.v1.SpectraService")
        shown = [("authorization", f"Bearer {DOER}")]
        watched = health_pb2_grpc.HealthStub(channel).Watch(request, metadata=shown, timeout=WAIT)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        server.health.set(request.service, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        path.write_text("# nobody\n")
        server.guard.tokens._looked = 0.0
        server.health.set(request.service, health_pb2.HealthCheckResponse.SERVING)
        with pytest.raises(grpc.RpcError) as caught:
            next(watched)
        assert caught.value.code() == grpc.StatusCode.CANCELLED


def refused(server, token):
    """Whether a server knows nobody by a token."""
    try:
        server.guard.tokens.caller(f"Bearer {token}")
    except errors.UnauthenticatedError:
        return True
    return False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice infer", "line 1 of .* is not `name scopes token`"),
        (f"alice infer,fly {ALICE}", "unknown scope 'fly'"),
        ("alice infer short", "5 characters"),
        ("alice infer sha256:abc", "64 hexadecimal digits"),
        (f"alice {ALICE} infer", "unknown scope; there are"),
        (f"alice infer {ALICE}\nbob * {ALICE}", "line 2 of .* the token of a line before it"),
        (f"alice infer {ALICE}é", "printable ASCII"),
    ],
)
def test_a_line_that_is_none(line, words):
    with pytest.raises(errors.InvalidInputError, match=words) as caught:
        Tokens(text=line)
    assert ALICE not in str(caught.value)


def test_made_tokens_work(tmp_path):
    path = tmp_path / "tokens"
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "token", "alice", "--file", str(path)]
    token = subprocess.run(command, capture_output=True, text=True, check=True).stderr.split()[-1]
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    caller = Tokens(str(path)).caller(f"Bearer {token}")
    assert caller.name == "alice"
    assert "admin" not in caller.scopes


def test_a_file_of_another_system(tmp_path):
    """With a mark at its beginning, carriage returns, and a last line that does not end."""
    path = tmp_path / "tokens"
    path.write_bytes(f"\ufeff# people\r\none infer {ALICE}\r\n\r\ntwo infer {DOER}".encode())
    assert cli(["token", "three", "--file", str(path)]) == 0
    found = Tokens(str(path))
    assert (found.caller(f"Bearer {ALICE}").name, found.caller(f"Bearer {DOER}").name) == ("one", "two")
    assert found.knows("three")


def test_a_token_file_that_cannot_be_written(tmp_path, capsys):
    assert cli(["token", "alice", "--file", str(tmp_path / "none" / "tokens")]) == 1
    said = capsys.readouterr().err
    assert "cannot be written: No such file" in said
    assert "to keep" not in said, "a token that stands nowhere is of no use"


@pytest.mark.parametrize(
    "name",
    ["#alice", "#\nalice", "alice\nbob", "two words", "", "a\x1b[2J", "a\udcff", "\ufeffalice", "a\u2028b"],
    ids=ascii,
)
def test_a_name_that_no_line_can_have(tmp_path, capsys, name):
    path = tmp_path / "tokens"
    assert cli(["token", name, "--file", str(path)]) == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "to keep" not in said
    assert not path.exists()


def test_nothing_is_added_to_what_is_no_token_file(tmp_path, capsys):
    path = tmp_path / "tokens"
    for content, words in ((f"one infer {ALICE}\ntwo inf".encode(), "line 2 of"), (b"\xff\n", "not UTF-8")):
        path.write_bytes(content)
        assert cli(["token", "alice", "--file", str(path)]) == 1
        assert words in capsys.readouterr().err
        assert path.read_bytes() == content
    assert cli(["token", "alice", "--file", os.devnull]) == 1
    assert "a device or a pipe" in capsys.readouterr().err


ON_A_FULL_DISK = """
import resource, sys
from vlm_spectra_server.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def made(*arguments, **options):
    command = [sys.executable, "-B", "-m", "vlm_spectra_server.cli", "token", "bob", *arguments]
    return subprocess.run(command, text=True, **options)


def test_a_token_is_added_whole_or_not_at_all(tmp_path):
    """Where a disk is full, or the token cannot be told."""
    path, content = tmp_path / "tokens", f"# people\none infer {ALICE}"
    path.write_text(content)

    command = [sys.executable, "-B", "-c", ON_A_FULL_DISK, str(len(content) + 30), "token", "bob", "--file", str(path)]
    found = subprocess.run(command, text=True, capture_output=True)
    assert (found.returncode, path.read_text()) == (1, content)
    assert found.stderr == f"vlm-spectra: {path} cannot be written: File too large.\n"
    with open("/dev/full", "w") as nowhere:
        assert made("--file", str(path), stderr=nowhere).returncode == 1
        assert path.read_text() == content
        found = made(stdout=nowhere, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr.splitlines()) == (
        1,
        ["vlm-spectra: the output cannot be written: No space left on device."],
    )


def test_a_token_file_without_an_end():
    with pytest.raises(errors.InvalidInputError, match="/dev/zero cannot be read: it has more than 16,777,216 bytes"):
        Tokens("/dev/zero")


def test_no_secret_in_logs(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    with vs.connect(guarded.address, token=ALICE) as model:
        assert model.forward(model.prepare_messages("Hi"), 1).logits.shape[1] == 1
    with pytest.raises(errors.UnauthenticatedError):
        vs.connect(guarded.address, token="wrong-" + "x" * 30)
    until(lambda: "Forward of alice: OK" in caplog.text)
    for secret in (ALICE, LOOKER, "x" * 30):
        assert secret not in caplog.text
        assert secret not in repr(vars(guarded.guard.tokens))


# Models that clients may load.


def load(address, name, token=ALICE):
    ask(
        address,
        "vlm_spectra.v1.ModelService/LoadModel",
        mpb.LoadModelRequest(name=name),
        ("authorization", f"Bearer {token}"),
    )


@pytest.mark.parametrize(
    "name",
    ["/etc", "../models/a", "no/such-model", "./spectra-tiny", "SPECTRA-TINY", "Qwen/../Qwen/Qwen2.5-VL-3B-Instruct"],
)
def test_only_models_of_the_list_are_loaded(guarded, name):
    """A client with every scope has no directory of the server's read, and no model of the hub fetched."""
    with pytest.raises(errors.ModelNotAllowedError, match="--allow-model") as caught:
        load(guarded.address, name)
    assert caught.value.field == "name"
    assert set(guarded.models.hosts) == {"spectra-tiny"}


@pytest.mark.parametrize("attention", ["somebody/kernel", "somebody/kernel@main:forward", "paged|somebody/kernel"])
def test_no_client_has_code_of_the_hub_run(guarded, attention):
    """Which transformers fetches for an attention of such a name, where the package `kernels` is installed."""
    request = mpb.LoadModelRequest(name="spectra-tiny", attention=attention)
    with pytest.raises(errors.InvalidInputError, match="code of the hub") as caught:
        ask(guarded.address, "vlm_spectra.v1.ModelService/LoadModel", request, ("authorization", f"Bearer {ALICE}"))
    assert caught.value.field == "attention"


def test_a_model_that_is_there_may_be_asked_for(guarded):
    load(guarded.address, "spectra-tiny")
    with pytest.raises(errors.PermissionDeniedError, match="admin") as caught:
        load(guarded.address, "/etc", LOOKER)
    assert type(caught.value) is errors.PermissionDeniedError, "who may not load learns nothing of the list"


def test_what_patterns_allow():
    known = Loadable()
    known.check("spectra-tiny")
    known.check("Qwen/Qwen2.5-VL-3B-Instruct")
    named = Loadable(["/models/*", "us/our-[ab]"])
    named.add("/elsewhere/first")
    for name in ("/models/a", "/models/a/b", "us/our-a", "/elsewhere/first", "spectra-tiny"):
        named.check(name)
    for name in ("/models", "/models/../etc", "us/our-c", "/elsewhere/second", "Qwen/Qwen2.5-VL-3B-Instruct", ""):
        with pytest.raises(errors.ModelNotAllowedError):
            named.check(name)
    Loadable(["*"]).check("/any/../where")
    for name in ("a/b\n", "a\x1b]0;mine\x07/b", "/models/\u202ea"):
        with pytest.raises(errors.InvalidInputError, match="cannot be printed") as caught:
            Loadable(["*"]).check(name)
        assert str(caught.value).isprintable()


def test_clients_are_told_what_may_be_loaded(guarded):
    with grpc.insecure_channel(guarded.address) as channel:
        call = channel.unary_unary("/vlm_spectra.v1.ModelService/ListModels")
        answer = call(b"", timeout=WAIT, metadata=(("authorization", f"Bearer {LOOKER}"),))
    found = list(mpb.ListModelsResponse.FromString(answer).loadable)
    assert found == Loadable().names
    assert {"spectra-tiny", "Qwen/Qwen2.5-VL-3B-Instruct"} <= set(found)


# Addresses.


def config(**values: object) -> Config:
    return resolve(type("Options", (), values), {})


def test_listening_beyond_this_machine_needs_tls_and_tokens():
    tls = {"tls_certificate": "a.pem", "tls_key": "a.key"}
    for values, tokens, words in (
        ({}, False, "--tls-certificate.*--token-file"),
        ({}, True, "--tls-certificate"),
        (tls, False, "--token-file"),
    ):
        for host in ("0.0.0.0", "::", "192.168.1.7", "gpu-box"):
            with pytest.raises(errors.InvalidInputError, match=words):
                config(host=host, **values).check_exposure(tokens)
            config(host=host, insecure=True, **values).check_exposure(tokens)
        for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
            config(host=host, **values).check_exposure(tokens)
    config(host="0.0.0.0", **tls).check_exposure(True)
    for page in ({"web": True}, {"server": "gpu-box:50051"}):
        with pytest.raises(errors.InvalidInputError, match=r"0\.0\.0\.0 can be reached.*--tls-certificate"):
            config(web_host="0.0.0.0", **page).check_exposure(True)
        config(web_host="0.0.0.0", **page, **tls).check_exposure(True)
        config(web_host="127.0.0.1", **page).check_exposure(False)
    config(host="0.0.0.0", server="gpu-box:50051").check_exposure(True)
    config(host="0.0.0.0", tls_client_ca="ca.pem", **tls).check_exposure(False)
    with pytest.raises(errors.InvalidInputError, match="both"):
        config(tls_certificate="a.pem").check_exposure(True)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_address_of_ipv6(front, host):
    """With brackets or without: for calls, for metrics, for the page; what is told has them, as clients need it."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with another_door(front, host=host) as server:
        assert re.fullmatch(r"\[::1\]:\d+", server.address)
        assert ("tcp", "::1", int(server.address.rsplit(":", 1)[1])) in listened(os.getpid())
        with vs.connect(server.address, token="") as model:
            assert model.prepare_messages("Hi").input_ids.shape[0] == 1
    metrics = Metrics()
    try:
        assert metrics.listen(host, 0).startswith("http://[::1]:")
    finally:
        metrics.close()
    with _listen(host, 0) as page:
        assert page.getsockname()[0] == "::1"


def test_serve_refuses_before_it_listens():
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "--tls-certificate with --tls-key and --token-file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_client_keeps_its_token_from_the_network():
    with pytest.raises(errors.InvalidInputError, match="plain text"):
        vs.connect("gpu-box:50051", token=ALICE)
    for odd in ("a b", "a\nb", "é" * 20):
        with pytest.raises(errors.InvalidInputError, match="printable"):
            vs.connect("127.0.0.1:1", token=odd)
    with pytest.raises(errors.InvalidInputError, match="cannot be read"):
        vs.connect("127.0.0.1:1", tls="/no/such.pem")
    with pytest.raises(errors.InvalidInputError, match="'/dev/zero' cannot be read: it has more than 16,777,216 "):
        vs.connect("127.0.0.1:1", tls="/dev/zero")
    pasted = f"-----BEGIN PRIVATE KEY-----\n{ALICE}\n-----END PRIVATE KEY-----\n"
    for content in (pasted, pasted.encode()):
        with pytest.raises(errors.InvalidInputError, match="by their paths") as caught:
            vs.connect("127.0.0.1:1", tls=vs.TLS(certificate=os.devnull, key=content))
        assert ALICE not in str(caught.value)
    with pytest.raises(errors.InvalidInputError, match="needs its key"):
        vs.connect("127.0.0.1:1", tls=vs.TLS(certificate="a.pem"))
    assert secure.is_loopback("[::1]")
    assert not secure.is_loopback("127.0.0.1.example.org")


def test_what_stays_on_this_machine_goes_through_no_proxy(guarded, monkeypatch):
    """gRPC heeds `http_proxy` even for loopback, and a token would reach the proxy in plain text."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for address in (guarded.address, guarded.address.replace("127.0.0.1", "localhost")):
            vs.connect(address, token=ALICE).close()
        with pytest.raises(BlockingIOError):
            proxy.accept()


# TLS.


def shown(address, ca):
    """The certificate that a server shows, as its serial number."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), WAIT) as plain:
        with ssl.create_default_context(cafile=pem(ca)).wrap_socket(plain, server_hostname="localhost") as wrapped:
            return wrapped.getpeercert()["serialNumber"]


@openssl
def test_tls_and_a_certificate_that_changes_while_it_serves(papers, tmp_path, guarded):
    for suffix in (".pem", ".key"):
        shutil.copy(papers["server"].with_suffix(suffix), tmp_path / f"used{suffix}")
    used = tmp_path / "used"
    certificates = Certificates(pem(used), key(used))
    with another_door(guarded, tokens=guarded.guard.tokens, certificates=certificates) as server:
        with vs.connect(server.address, tls=pem(papers["ca"]), token=ALICE) as model:
            assert model.forward(model.prepare_messages("Hi"), 1).logits.shape[1] == 1
            first = shown(server.address, papers["ca"])
            (tmp_path / "used.key").write_text("damaged")
            assert shown(server.address, papers["ca"]) == first
            for suffix in (".pem", ".key"):
                shutil.copy(papers["second"].with_suffix(suffix), tmp_path / f"used{suffix}")
            assert shown(server.address, papers["ca"]) != first
            assert model.forward(model.prepare_messages("Hi"), 1).logits.shape[1] == 1
        with pytest.raises(errors.UnauthenticatedError):
            vs.connect(server.address, tls=pem(papers["ca"]), token="wrong-" + "x" * 20)
        for tls in (pem(papers["other"]), True, None):
            with pytest.raises(errors.UnavailableError, match="tls= what"):
                vs.connect(server.address, tls=tls, token=ALICE)


@openssl
def test_mutual_tls(papers, front):
    files = Certificates(pem(papers["server"]), key(papers["server"]), pem(papers["ca"]))
    with another_door(front, certificates=files) as server:
        bob = vs.TLS(ca=pem(papers["ca"]), certificate=pem(papers["bob"]), key=key(papers["bob"]))
        clients: list[str] = []
        admit = server.guard._admit
        server.guard._admit = lambda client: (clients.append(client), admit(client))
        with vs.connect(server.address, tls=bob) as model:
            model.prepare_messages("Hi")
        assert set(clients) == {"bob"}
        stranger = vs.TLS(ca=pem(papers["ca"]), certificate=pem(papers["other"]), key=key(papers["other"]))
        for tls in (pem(papers["ca"]), stranger):
            with pytest.raises(errors.UnavailableError):
                vs.connect(server.address, tls=tls)
        assert set(clients) == {"bob"}


@openssl
def test_a_certificate_gives_no_scopes_where_there_are_tokens(papers, front):
    files = Certificates(pem(papers["server"]), key(papers["server"]), pem(papers["ca"]))
    with another_door(front, certificates=files, tokens=Tokens(text=f"looker inspect {LOOKER}")) as server:
        bob = vs.TLS(ca=pem(papers["ca"]), certificate=pem(papers["bob"]), key=key(papers["bob"]))
        with vs.connect(server.address, tls=bob, token=LOOKER) as model:
            inputs = model.prepare_messages("Hi")
            with pytest.raises(errors.PermissionDeniedError, match="infer"):
                model.generate(inputs, 1)
        with pytest.raises(errors.UnauthenticatedError):
            vs.connect(server.address, tls=bob)


@openssl
def test_authorities_that_change_are_followed(papers, tmp_path):
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(Path(pem(papers["ca"])).read_bytes())
    files = Certificates(pem(papers["server"]), key(papers["server"]), str(authorities))
    following = Following(files, files.context)
    assert following.current()[1] is False
    authorities.write_bytes(Path(pem(papers["other"])).read_bytes())
    assert following.current()[1] is True


@openssl
def test_a_client_may_expect_another_name(papers, front):
    """That of the certificate, where the address is another."""
    files = Certificates(pem(papers["server"]), key(papers["server"]))
    with another_door(front, certificates=files) as server:
        vs.connect(server.address, tls=vs.TLS(ca=pem(papers["ca"]), server_name="localhost")).close()
        with pytest.raises(errors.UnavailableError):
            vs.connect(server.address, tls=vs.TLS(ca=pem(papers["ca"]), server_name="elsewhere.example"))


@openssl
def test_a_certificate_that_expires_is_told_in_time(papers, tmp_path, caplog, monkeypatch):
    """In the log, once a day from two weeks before, and in the metrics."""
    made = certificate(tmp_path, "short", papers["ca"], days=20)
    files, begun = Certificates(pem(made), key(made)), datetime.now(UTC)
    expires = files.expires()
    assert abs(expires - begun - timedelta(days=20)) < timedelta(hours=1)

    class Clock(datetime):
        days = 0

        @classmethod
        def now(cls, tz=None):
            return begun + timedelta(days=cls.days, hours=12)

    monkeypatch.setattr(tls_module, "datetime", Clock)
    following, told = Following(files, files.context), {}
    for Clock.days in range(0, 23):
        for _ in range(3):
            following.current()
        told[Clock.days] = [record.levelname for record in caplog.records]
        caplog.clear()
    assert {day: words for day, words in told.items() if words} == {
        **{day: ["WARNING"] for day in range(6, 20)},
        **{day: ["ERROR"] for day in range(20, 23)},
    }
    metrics = Metrics()
    port = urlsplit(metrics.listen("127.0.0.1", 0, certificates=files)).port
    try:
        assert metric(port, "vlm_spectra_certificate_expires_timestamp_seconds") == expires.timestamp()
    finally:
        metrics.close()


@openssl
def test_files_that_make_no_tls(papers):
    for certificate_file, key_file, ca in (
        (pem(papers["server"]), key(papers["second"]), ""),
        ("/no/such.pem", key(papers["server"]), ""),
        (pem(papers["server"]), key(papers["server"]), key(papers["ca"])),
    ):
        with pytest.raises(errors.InvalidInputError, match="no TLS with"):
            Server(certificates=Certificates(certificate_file, key_file, ca))
