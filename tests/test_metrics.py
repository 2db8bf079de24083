"""What can be seen from outside: metrics, the log, the cost of a call, health of each model, a server that stops."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import vlm_spectra as vs
from calls import WAIT, states, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from soak.watch import arguments
from sockets import descendants, ended
from vlm_spectra import errors
from vlm_spectra.calls import CaptureOptions, ForwardOptions
from vlm_spectra.network import wire
from vlm_spectra.v1 import model_service_pb2 as mpb
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.cli import main as cli
from vlm_spectra_server.serving import top
from vlm_spectra_server.serving.budget import Budget
from vlm_spectra_server.serving.host import Loading
from vlm_spectra_server.serving.logs import JsonFormatter
from vlm_spectra_server.serving.metrics import Metrics, hook_of
from vlm_spectra_server.serving.server import Server
from webapp import free_port

HOOK = "lm.blocks.*.hook_resid_post"
STATUS = health_pb2.HealthCheckResponse


@pytest.fixture(scope="module")
def front(front):
    """With its metrics on a port."""
    front.url = front.metrics.listen("127.0.0.1", 0)
    return front


@pytest.fixture(scope="module")
def model(front):
    with vs.connect(front.address, arrays="numpy", retries=0) as found:
        yield found


def read(front):
    """All samples, by name and labels."""
    with urllib.request.urlopen(front.url, timeout=WAIT) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    return found


def test_calls_tokens_bytes_and_phases_are_counted(front, model):
    inputs = model.prepare_messages("Say hello")
    until(lambda: not front.guard.active)
    before = read(front)
    tokens = list(model.stream(inputs, max_new_tokens=3))
    with model.run_with_cache(HOOK) as cache:
        model.forward(inputs, logits_to_keep=None)
    with pytest.raises(errors.InvalidInputError):
        model._all("Forward", spb.ForwardRequest(), ())
    until(lambda: not front.guard.active)
    after = read(front)

    def grown(*key):
        return after.get(key, 0) - before.get(key, 0)

    assert grown("vlm_spectra_requests_total", "Generate", "OK") == 1
    assert grown("vlm_spectra_requests_total", "OK", "RunWithCache") == 1
    assert grown("vlm_spectra_requests_total", "Forward", "INVALID_ARGUMENT") == 1
    assert grown("vlm_spectra_tokens_total") == len(tokens)
    assert grown("vlm_spectra_sent_bytes_total", HOOK) == sum(cache[name].nbytes for name in cache.names)
    for phase in ("queue", "prepare", "compute", "copy", "wire", "all"):
        assert grown("vlm_spectra_seconds_count", "Generate", phase) == 1
    assert grown("vlm_spectra_seconds_sum", "RunWithCache", "copy") > 0
    assert after["vlm_spectra_model_ready", "spectra-tiny"] == 1
    assert after["vlm_spectra_queue", "spectra-tiny"] == 0
    assert after["vlm_spectra_calls_at_work", "Generate"] == 0
    assert after["vlm_spectra_capture_bytes",] > 0
    assert after["vlm_spectra_capture_bytes_bound",] > after["vlm_spectra_capture_bytes",]
    assert after["vlm_spectra_model_bytes", "cpu", "spectra-tiny"] > 10_000_000
    assert after["vlm_spectra_device_peak_bytes",] > 10_000_000
    assert 0 < after["vlm_spectra_device_free_bytes", "cpu"] < after["vlm_spectra_device_bytes", "cpu"]


def test_a_devices_free_memory_is_what_was_told_last():
    """And not what a model without requests saw once, when another filled the device."""
    metrics, model = Metrics(), mpb.Model(state=mpb.MODEL_STATE_READY)
    hosts = {
        name: SimpleNamespace(queue=(), model=model, memory={"cuda:0": (10, free, 100)}, told=told)
        for name, free, told in (("busy", 60, 2.0), ("idle", 20, 1.0))
    }
    metrics.watch(lambda: hosts, Budget(1))

    def free():
        return metrics.registry.get_sample_value("vlm_spectra_device_free_bytes", {"device": "cuda:0"})

    assert free() == 60
    hosts["idle"].told = 3.0
    assert free() == 20


def test_the_documentation_lists_every_metric(front):
    with urllib.request.urlopen(front.url, timeout=WAIT) as response:
        told = set(re.findall(r"^# TYPE (\w+) ", response.read().decode(), re.MULTILINE))
    page = (Path(__file__).parent.parent / "docs" / "server.md").read_text("utf-8")
    documented = set(re.findall(r"`(vlm_spectra_\w+)", page))
    with_tls = {"vlm_spectra_certificate_expires_timestamp_seconds"}
    assert {name for name in told if not name.endswith("_created")} | with_tls == documented


def test_top_shows_what_prometheus_gets(front, model, capsys):
    assert model.forward(model.prepare_messages("Hi"), 1).logits.shape[1] == 1
    until(lambda: not front.guard.active)
    assert cli(["top", front.url.removeprefix("http://").removesuffix("/metrics"), "--once"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    died = read(front).get(("vlm_spectra_worker_deaths_total", "spectra-tiny"), 0)
    name, state, size, unit, waiting, deaths = rows["spectra-tiny"]
    assert (name, state, unit, waiting, deaths) == ("spectra-tiny", "ready", "GB", "0", f"{died:.0f}")
    assert float(size) > 0
    assert "GB free" in shown
    assert rows["Forward"][1] == "0"
    assert int(rows["Forward"][3]) >= 1
    samples = top.read(front.url)
    later = samples | {("requests_total", "OK", "Forward"): samples["requests_total", "OK", "Forward"] + 6}
    assert "3.0" in next(line for line in top.view(later, samples, 2.0).splitlines() if line.startswith("Forward"))
    assert cli(["top", "127.0.0.1:1", "--once"]) == 1
    assert "--metrics-port" in capsys.readouterr().err


def test_top_counts_from_nothing_where_a_server_was_started_anew():
    before = {("requests_total", "OK", "Forward"): 70.0, ("tokens_total",): 500.0, ("sent_bytes_total", "logits"): 9e9}
    now = {("requests_total", "OK", "Forward"): 6.0, ("tokens_total",): 40.0, ("sent_bytes_total", "logits"): 8e6}
    shown = top.view(now | {("calls_at_work", "Forward"): 0.0}, before, 2.0)
    assert "20.0 tokens/s, 4.0 MB/s of tensors" in shown
    assert next(line for line in shown.splitlines() if line.startswith("Forward")).split()[2] == "3.0"


@pytest.mark.parametrize("url", ["192.0.2.2:9464", "http://192.0.2.2:9464/metrics", "http://gpu-box/metrics"])
def test_top_sends_no_token_over_a_network_in_plain_text(monkeypatch, capsys, url):
    monkeypatch.setenv("VLM_SPECTRA_TOKEN", "secret-token-of-alice")

    def sent(*_, **__):
        raise AssertionError("the token was sent")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", sent)
    assert cli(["top", url, "--once"]) == 1
    said = capsys.readouterr().err
    assert "in plain text" in said
    assert "https://" in said
    assert "alice" not in said


@contextlib.contextmanager
def answering(answer: bytes):
    """A port where everybody gets these bytes, and what was asked there."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        asked.append(connection.recv(65536))
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], asked
        listening.shutdown(socket.SHUT_RDWR)


def http(body: bytes, status: bytes = b"200 OK", header: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n%b\r\n%b" % (status, len(body), header, body)


def test_top_sends_its_token_nowhere_else(monkeypatch, capsys):
    """Not to a proxy, and not to where an answer sends on."""
    monkeypatch.setenv("VLM_SPECTRA_TOKEN", "secret-token-of-alice")
    with answering(http(b"vlm_spectra_queue 1\n")) as (elsewhere, asked):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{elsewhere}")
        with answering(http(b"", b"302 Found", b"location: http://localhost:%d/x\r\n" % elsewhere)) as (port, first):
            assert cli(["top", f"127.0.0.1:{port}", "--once"]) == 1
        assert b"secret-token-of-alice" in first[0]
        assert not asked
    said = capsys.readouterr().err
    assert f"sends on to http://localhost:{elsewhere}/x" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\0\0\6\4\0\0\0\0\0\0\5\0\0\x40\0", "BadStatusLine"),
        (http(b"<html><body>hello {x} </body></html>\n"), "ValueError"),
        (http(b"up 1\n"), "no server of VLM Spectra"),
        (http(b"\xff"), "UnicodeDecodeError"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc", "IncompleteRead"),
        (http(b"", b"500 \x1b]0;mine\x07"), r"500: \x1b]0;mine\x07"),
    ],
    ids=["HTTP/2", "HTML", "another's metrics", "no text", "cut", "an escape"],
)
def test_top_tells_odd_answers_in_one_sentence(answer, words, capsys):
    with answering(answer) as (port, _):
        assert cli(["top", f"127.0.0.1:{port}", "--once"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["file:///etc/passwd"], "http or https, not from file:///etc/passwd"),
        (["http://[::1"], "is no URL"),
        *((["127.0.0.1:1", f"--every={every}"], "more than 0") for every in ("-1", "0", "nan", "inf")),
    ],
)
def test_top_refuses_what_it_cannot_do(arguments, words, capsys):
    assert cli(["top", *arguments, "--once"]) == 1
    assert words in capsys.readouterr().err


def test_top_lets_no_name_write_to_the_terminal(capsys):
    page = b'vlm_spectra_model_ready{model="a\x1b]0;mine\x07"} 1\nvlm_spectra_model_ready 1\n'
    with answering(http(page + b'vlm_spectra_calls_at_work{method="x\\ny\xe2\x80\xae"} 0\n')) as (port, _):
        assert cli(["top", f"127.0.0.1:{port}", "--once"]) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert r"a\x1b]0;mine\x07  ready" in shown
    assert r"x\ny\u202e" in shown


def test_top_draws_on_the_terminal_and_leaves_it_as_it_was(front):
    """On its other screen, no line longer than the terminal; Ctrl-C ends it; a server that went away may come back."""
    parent, child = os.openpty()
    termios.tcsetwinsize(child, (8, 60))
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "top", front.url, "--every", "0.1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}
    process = subprocess.Popen(command, stdin=child, stdout=child, env=environment, start_new_session=True)
    os.close(child)
    drawn = b""
    try:
        while drawn.count(b"\x1b[J") < 3:
            part = os.read(parent, 65536)
            assert part, drawn
            drawn += part
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(parent, 65536):
                drawn += part
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    text = drawn.decode()
    assert text.startswith("\x1b[?1049h")
    assert text.endswith("\x1b[?25h\x1b[?1049l")
    for page in text.split("\x1b[H")[1:]:
        lines = [re.sub(r"\x1b\[[?0-9]*[A-Za-z]", "", line) for line in page.split("\r\n")]
        assert len(lines) <= 8
        assert all(len(line) <= 60 for line in lines)
        assert any(len(line) == 60 and line.endswith(">") for line in lines), "what is cut off says so"
    assert "spectra-tiny" in text


def test_every_result_says_what_it_took(model):
    """Where the time went, the bytes, the peak of memory; a failure says as much in its error."""
    inputs = model.prepare_messages("Say hello")
    with model.run_with_cache(HOOK) as cache:
        output = model.forward(inputs, 1)
    assert output.cost == cache.cost
    assert cache.cost.bytes == output.logits.nbytes + sum(cache[name].nbytes for name in cache.names)
    results = [
        output,
        model.generate(inputs, 2),
        model.logit_lens(inputs),
        model.attribute(inputs),
        model.patch_sweep(inputs, inputs, "lm.blocks.0.hook_resid_pre", positions=[-1]),
    ]
    for result in results:
        cost = result.cost
        assert cost.request_id
        assert min(cost.compute, cost.copy, cost.wire, cost.total) > 0
        assert min(cost.queue, cost.prepare) >= 0
        assert cost.total >= cost.compute
        assert cost.peak_memory > 10_000_000
        assert "compute" in str(cost)
    assert pickle.loads(pickle.dumps(results[1])).text == results[1].text
    with pytest.raises(errors.SpectraError) as caught:
        model.attribute(inputs, target="two words and more")
    found = {name: float(caught.value.metadata[name]) for name in caught.value.metadata}
    phases = ("queue", "prepare", "compute", "copy", "wire", "total")
    assert all(found[f"{phase}_seconds"] >= 0 for phase in phases)
    assert found["compute_seconds"] > 0
    assert found["peak_memory_bytes"] > 10_000_000


def test_a_slow_reader_is_seen_as_time_on_the_wire(front, model):
    """The connection takes no more than it has room for: sending waits, and says so."""
    inputs = model.prepare_messages("one two three four five six seven eight nine ten " * 60)
    request = model._capturing(
        CaptureOptions.checked(model.catalogue, ["lm.blocks.*.attn.hook_scores"], None, None, None),
        forward=wire.forward_to_wire(ForwardOptions(logits_to_keep=None)),
        **model._asked(inputs, ()),
    )
    request.run.shared_memory = False
    with grpc.insecure_channel(front.address) as channel:
        call = channel.unary_stream(
            "/vlm_spectra.v1.SpectraService/RunWithCache", spb.RunWithCacheRequest.SerializeToString
        )
        messages = call(request)
        first = spb.RunWithCacheResponse.FromString(next(messages))
        at_work = front.guard.active[first.header.request_id]
        until(lambda: at_work.job.feed.ended)
        handed = -1
        while handed != (handed := at_work.sending.ended):  # nothing is taken any more
            time.sleep(1.0)
        summary = [spb.RunWithCacheResponse.FromString(message) for message in messages][-1].summary
    assert summary.byte_count > 10_000_000, "more than a connection holds on its own"
    assert summary.timings.wire > 0.25


def test_labels_do_not_grow_with_layers():
    assert hook_of("lm.blocks.31.attn.hook_pattern") == "lm.blocks.*.attn.hook_pattern"
    assert hook_of("hidden_states.7") == "hidden_states.*"
    assert hook_of("logits") == "logits"


def test_a_client_that_leaves_is_a_cancellation(front):
    before = read(front).get(("vlm_spectra_cancellations_total", "Generate"), 0)
    with vs.connect(front.address, arrays="numpy") as leaving:
        inputs = leaving.prepare_messages("Tell me a long story")
        next(leaving.stream(inputs, max_new_tokens=1500, do_sample=True, seed=1, temperature=20.0))
    until(lambda: read(front).get(("vlm_spectra_cancellations_total", "Generate"), 0) == before + 1)


def test_metrics_on_a_port_that_is_taken(front):
    port = int(front.url.split(":")[2].split("/")[0])
    with pytest.raises(errors.InvalidInputError, match="metrics cannot be served on"):
        Server().metrics.listen("127.0.0.1", port)


def test_the_log_has_the_id_that_the_error_carries(model, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(errors.InvalidInputError) as caught:
        model._all("GetUnembedding", spb.GetUnembeddingRequest(), ())
    until(lambda: any(getattr(r, "request_id", "") == caught.value.request_id for r in caplog.records))
    record = next(r for r in caplog.records if getattr(r, "request_id", "") == caught.value.request_id)
    line = json.loads(JsonFormatter().format(record))
    assert line["method"] == "GetUnembedding"
    assert line["code"] == "INVALID_ARGUMENT"
    assert line["model"] == "spectra-tiny"
    cost = {f"{phase}_seconds" for phase in ("queue", "prepare", "compute", "copy", "wire", "total")}
    assert cost | {"peak_memory_bytes", "client", "time"} <= set(line)
    assert cost | {"peak_memory_bytes"} <= set(caught.value.metadata)


def test_the_log_has_who_loads_and_unloads(front, caplog):
    """Nothing failed and no model worked on it, and yet others find a change."""
    caplog.set_level(logging.INFO)
    with grpc.insecure_channel(front.address) as channel:
        for method, request in (
            ("LoadModel", mpb.LoadModelRequest(name="spectra-tiny")),
            ("ListModels", mpb.ListModelsRequest()),
            ("LoadModel", mpb.LoadModelRequest(name="no/such")),
            ("UnloadModel", mpb.UnloadModelRequest(name="no/such")),
        ):
            with contextlib.suppress(grpc.RpcError):
                channel.unary_unary(f"/vlm_spectra.v1.ModelService/{method}")(request.SerializeToString(), timeout=WAIT)
        front.models.load(Loading("a-model-that-does-not-exist", device="cpu"))
        request = mpb.UnloadModelRequest(name="a-model-that-does-not-exist").SerializeToString()
        channel.unary_unary("/vlm_spectra.v1.ModelService/UnloadModel")(request, timeout=WAIT)
    until(lambda: not front.guard.active)
    found = [(each.method, getattr(each, "model", "")) for each in caplog.records if hasattr(each, "method")]
    assert found == [
        ("LoadModel", "spectra-tiny"),
        ("LoadModel", ""),
        ("UnloadModel", ""),
        ("UnloadModel", "a-model-that-does-not-exist"),
    ]


def test_an_exception_is_one_json_line():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "failed\nbadly", (), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError" in json.loads(text)["exception"]


def test_what_nobody_can_catch_is_a_json_line_too():
    """Of a thread, of an object that goes, of the program itself."""
    code = (
        "import threading\n"
        "from vlm_spectra_server.serving import logs\n"
        "class Thing:\n"
        "    def __del__(self): raise ValueError('one\\ntwo')\n"
        "def fails(): raise KeyError('of a thread')\n"
        "logs.begin('json')\n"
        "Thing()\n"
        "thread = threading.Thread(target=fails); thread.start(); thread.join()\n"
        "raise OSError('at last')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=False)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in lines] == ["uncaught: ValueError", "uncaught: KeyError", "uncaught: OSError"]
    assert "__del__" in lines[0]["exception"]


def test_health_of_each_model_is_watched(front):
    """A worker that is killed: not serving, then serving again; the whole follows."""
    front.models.load(Loading("second-that-does-not-exist", device="cpu"))
    died = read(front).get(("vlm_spectra_worker_deaths_total", "spectra-tiny"), 0)
    with grpc.insecure_channel(front.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        seen = states(channel, "vlm_spectra.model/spectra-tiny")
        until(lambda: seen[-1:] == [STATUS.SERVING])
        os.kill(front.first.process.pid, signal.SIGKILL)
        until(lambda: STATUS.NOT_SERVING in seen)
        until(lambda: seen[-1] == STATUS.SERVING)
        until(lambda: front.models.get("second-that-does-not-exist").settled.is_set())

        def check(service):
            return stub.Check(health_pb2.HealthCheckRequest(service=service)).status

        assert check("vlm_spectra.model/second-that-does-not-exist") == STATUS.NOT_SERVING
        assert check("") == check("vlm_spectra.v1.SpectraService") == STATUS.SERVING
        front.models.unload("second-that-does-not-exist")
        assert check("vlm_spectra.model/second-that-does-not-exist") == STATUS.SERVICE_UNKNOWN
    assert read(front)["vlm_spectra_worker_deaths_total", "spectra-tiny"] == died + 1
    assert mpb.ModelState.Name(front.first.model.state) == "MODEL_STATE_READY"


def test_sigterm_drains_and_says_what_it_waits_for():
    """A stream that has begun gets its end, a new call is refused, and the worker goes with its front.

    The log is JSON, metrics are on loopback.
    """
    port = free_port()
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port=0", "--device=cpu", "--grace=240"]
    command += ["--log-format", "json", "--metrics-port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with ended(process):
        address = process.stdout.readline().strip().rsplit(" ", 1)[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT) as response:
            assert b"vlm_spectra_model_ready" in response.read()
        with vs.connect(address, retries=0) as running, vs.connect(address, retries=0) as late:
            inputs = running.prepare_messages("Tell me a long story")
            tokens = running.stream(inputs, max_new_tokens=300, do_sample=True, seed=1, temperature=20.0)
            next(tokens)
            workers = descendants(process.pid) - {process.pid}
            for worker in workers:
                os.kill(worker, signal.SIGSTOP)  # the answer is at work as long as we want
            process.terminate()
            line = process.stdout.readline()
            assert "waiting up to 240 s for" in line
            assert "Generate of" in line
            with pytest.raises(errors.UnavailableError, match="stopping"):
                late.generate(inputs, 1)
            for worker in workers:
                os.kill(worker, signal.SIGCONT)
            assert len(list(tokens)) > 10
        assert process.wait(WAIT) == 0
        assert workers
        assert not any(arguments(worker) for worker in workers)
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert any(line.get("method") == "Generate" and line["code"] == "OK" for line in lines)
