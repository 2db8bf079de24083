"""Traces through client, server and worker, and gRPC's own statistics: what they tell, and to whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import vlm_spectra as vs
from calls import until
from conftest import stop_server
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from vlm_spectra import errors, tracing

HOOK = "lm.blocks.*.hook_resid_post"
SECRET, ADMIN = "a-token-that-nobody-knows", "another-one-for-the-admin"
PROMPT = "Tell me about xylophones"
ERROR = trace_pb2.Status.STATUS_CODE_ERROR


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans by OTLP, with the names of the services that send them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, trace_pb2.Span]] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._lock = threading.Lock()
        self._server.start()

    def Export(self, request, context):  # noqa: N802
        with self._lock:
            for resource in request.resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def find(self, name, service="", **attributes):
        """The span of a name with these attributes, waiting for it."""

        def found():
            with self._lock:
                for sender, span in self.spans:
                    if span.name == name and service in sender and attributes.items() <= attributes_of(span).items():
                        return span
            return None

        return until(found)

    def stop(self) -> None:
        self._server.stop(0).wait()


def attributes_of(span):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.fixture(scope="module")
def collector():
    found = Collector()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def traced(collector, tmp_path_factory):
    """A server with traces, tokens and a JSON log, as users start one; its address, and where its log goes."""
    directory = tmp_path_factory.mktemp("traced")
    tokens, lines = directory / "tokens", directory / "log"
    tokens.write_text(f"alice infer,inspect,interventions,weights {SECRET}\nroot * {ADMIN}\n")
    tokens.chmod(0o600)
    environment = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.address}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port", "0", "--device", "cpu"]
    command += ["--token-file", str(tokens), "--log-format", "json"]
    with lines.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    line = process.stdout.readline()
    assert " on " in line, lines.read_text()
    yield line.strip().rsplit(" ", 1)[1], lines
    stop_server(process)


@pytest.fixture
def tracing_here(collector, monkeypatch):
    """Traces of this process's clients go to the collector."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.address}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield
    tracing.close(30)


def test_one_trace_from_the_client_to_the_worker(collector, traced, tracing_here):
    """Parents are right, also under a span of the program's own; nothing of what was asked stands anywhere."""
    address, lines = traced
    mine = trace.SpanContext(0x1234567890ABCDEF1234567890ABCDEF, 0x1234567890ABCDEF, False, trace.TraceFlags(1))
    with vs.connect(address, arrays="numpy", token=SECRET) as model:
        inputs = model.prepare_messages(PROMPT)
        with trace.use_span(trace.NonRecordingSpan(mine)), model.run_with_cache(HOOK) as cache:
            model.forward(inputs, 1)
        request_id = cache.cost.request_id
        assert len(list(model.stream(inputs, max_new_tokens=2))) == 2

    name = "vlm_spectra.v1.SpectraService/RunWithCache"
    client, server = collector.find(name, "client"), collector.find(name, "server")
    work = collector.find("run RunWithCache", "worker")
    of_it = {span.name: span for _, span in collector.spans if span.trace_id == client.trace_id}
    assert client.trace_id == mine.trace_id.to_bytes(16, "big")
    assert client.parent_span_id == mine.span_id.to_bytes(8, "big")
    assert server.trace_id == client.trace_id
    assert server.parent_span_id == client.span_id
    assert work.parent_span_id == server.span_id
    for part in ("queue", "send"):  # exported before the server's span, which ends after them
        assert of_it[part].parent_span_id == server.span_id
        assert of_it[part].end_time_unix_nano >= of_it[part].start_time_unix_nano
    assert of_it["prepare"].parent_span_id == work.span_id
    assert attributes_of(server)["vlm_spectra.request_id"] == request_id
    assert attributes_of(server)["rpc.grpc.status_code"] == 0
    assert attributes_of(server)["vlm_spectra.bytes"] > 0
    assert attributes_of(work)["vlm_spectra.compute_seconds"] > 0
    generate = "vlm_spectra.v1.SpectraService/Generate"
    assert collector.find(generate, "server").parent_span_id == collector.find(generate, "client").span_id

    everything = "".join(str(span) for _, span in collector.spans)
    for kept in (SECRET, ADMIN, "xylophones", "Bearer"):
        assert kept not in everything
    until(lambda: any(entry.get("request_id") == request_id for entry in entries(lines)))
    entry = next(entry for entry in entries(lines) if entry.get("request_id") == request_id)
    assert entry["trace_id"] == client.trace_id.hex()
    assert SECRET not in lines.read_text()


def entries(lines):
    """The log; each line of it is an object, the last one perhaps not written to its end."""
    return [json.loads(line) for line in lines.read_text().splitlines(True) if line.endswith("\n")]


def test_errors_are_recorded_by_their_reason(collector, traced, tracing_here):
    with vs.connect(traced[0], arrays="numpy", token=SECRET) as model:
        with pytest.raises(errors.InvalidInputError) as caught:
            model.attribute(model.prepare_messages(PROMPT), target="xylophones and zithers")
    name = "vlm_spectra.v1.SpectraService/Attribute"
    for service in ("client", "server"):
        span = collector.find(name, service, **{"vlm_spectra.request_id": caught.value.request_id})
        assert span.status.code == ERROR
        assert attributes_of(span)["error.type"] == caught.value.reason
        assert "zithers" not in str(span)
    work = collector.find("run Attribute", "worker")
    assert work.status.code == ERROR
    assert attributes_of(work)["error.type"] == caught.value.reason


def test_nothing_is_imported_where_nobody_asks(traced):
    code = (
        "import sys, vlm_spectra as vs\n"
        "with vs.connect(sys.argv[1], arrays='numpy', token=sys.argv[2]) as model:\n"
        "    model.forward(model.prepare_messages('Hi'), 1).logits\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code, traced[0], SECRET], check=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
    ],
)
def test_the_environment_says_whether(monkeypatch, variables, on):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing.asked() == on


def test_without_the_extra_it_says_what_to_install(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    tracing.begin("here")
    assert "vlm-spectra[otel]" in caplog.text
    assert tracing.start("a", "client") is tracing.NONE


def test_an_exporter_that_is_not_there(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon,console")
    tracing.begin("here")
    assert "carrier-pigeon" in caplog.text
    tracing.close()


def test_channelz_is_for_admins(traced):
    """It tells who is connected from where: to a token with the scope `admin`, and to nobody else."""
    vs.connect(traced[0], arrays="numpy", token=SECRET).close()  # a call that succeeds
    with grpc.insecure_channel(traced[0]) as channel:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        request = channelz_pb2.GetServersRequest()
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", f"Bearer {SECRET}"),), grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetServers(request, metadata=metadata)
            assert caught.value.code() == code
        admin = (("authorization", f"Bearer {ADMIN}"),)
        servers = stub.GetServers(request, metadata=admin).server
        assert sum(server.data.calls_succeeded for server in servers) > 0
        sockets = stub.GetServerSockets(
            channelz_pb2.GetServerSocketsRequest(server_id=servers[0].ref.server_id), metadata=admin
        )
        assert sockets.socket_ref
