"""Traces by OpenTelemetry, through client, server and worker. Off, nothing of it is imported.

It is on where the program has a tracer provider of its own, or where the environment names somewhere to export to
(`OTEL_TRACES_EXPORTER`, `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) and the extra `otel` is
installed; the other `OTEL_*` variables mean what they always do. A span holds names, numbers and the reasons of
errors: no prompt, no answer, no token, and no sentence of an error, for those may quote what was asked.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import SpectraError

log = logging.getLogger("vlm_spectra")

Value = str | int | float | bool
Attributes = Mapping[str, Value]
Headers = Mapping[str, Any]
NOTHING: Mapping[str, Any] = {}

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_SCOPE = "vlm_spectra"

_own: Any = None
_lock = threading.Lock()


class Span:
    """A piece of work in a trace. This one goes nowhere; with tracing on, `start` gives one that does.

    Attributes:
        headers: Metadata by which another process goes on with the trace (W3C Trace Context).
        trace_id: The trace's id in hexadecimal; empty without one.
    """

    headers: tuple[tuple[str, str], ...] = ()
    trace_id: str = ""

    def set(self, attributes: Attributes) -> None:
        """Say something about it."""

    def event(self, name: str, attributes: Attributes = NOTHING) -> None:
        """Something has happened in it."""

    def part(self, name: str, begun: float, ended: float, attributes: Attributes = NOTHING) -> None:
        """A part of it that is over.

        Args:
            name: What it was.
            begun: When it began, by `time.perf_counter()`.
            ended: When it ended.
            attributes: As for `set`.
        """

    @contextmanager
    def active(self) -> Iterator[None]:
        """Spans that begin inside are its children."""
        yield

    @contextmanager
    def whole(self) -> Iterator[Span]:
        """It is active inside, and ends with the block."""
        with self.active():
            try:
                yield self
            except BaseException as error:
                self.end(error)
                raise
        self.end()

    def end(self, error: BaseException | None = None) -> None:
        """It is over, and went wrong where there is an error."""


NONE = Span()
"""The span that goes nowhere."""


def asked() -> bool:
    """Whether the environment names somewhere to export to."""
    named = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or named == "none":
        return False
    return bool(named) or any(os.environ.get(name) for name in _ENDPOINTS)


def begin(service: str) -> None:
    """Export this process's spans where the environment says so; a second call changes nothing.

    Args:
        service: The process's name in traces, where `OTEL_SERVICE_NAME` gives none.
    """
    global _own
    with _lock:
        if _own is not None or _given() is not None or not asked():
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            log.warning(
                "the environment asks for traces (OTEL_*), and OpenTelemetry is not installed: "
                "pip install 'vlm-spectra[otel]'"
            )
            return
        resource = Resource.create()
        if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": service}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for name in (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(","):
            exporter = _exporter(name.strip().lower())
            if exporter is not None:
                provider.add_span_processor(BatchSpanProcessor(exporter))
        _own = provider
        atexit.register(close)


def close(seconds: float = 2.0) -> None:
    """Send what has not been sent yet, within so many seconds, and end."""
    global _own
    with _lock:
        provider, _own = _own, None
    if provider is not None:
        thread = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(seconds)


def start(name: str, kind: str, attributes: Attributes = NOTHING, headers: Headers = NOTHING) -> Span:
    """Begin a span.

    Args:
        name: What it is.
        kind: "client", "server" or "internal".
        attributes: As for `Span.set`.
        headers: Metadata from another process, whose span is the parent; else it is the span that is active here.
    """
    provider = _own if _own is not None else _given()
    return NONE if provider is None else _Recorded(provider.get_tracer(_SCOPE), name, kind, attributes, headers)


def _given() -> Any:
    """The provider that the program itself has set; None without one."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not hasattr(trace, "get_tracer_provider"):  # not imported, or not to its end
        return None
    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else provider


def _exporter(name: str) -> Any:
    """An exporter by the name that `OTEL_TRACES_EXPORTER` has for it; None, and a warning, where there is none."""
    from importlib.metadata import entry_points

    if name == "otlp":
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
        name = "otlp_proto_http" if protocol.startswith("http") else "otlp_proto_grpc"
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        return found.load()()
    log.warning("there is no exporter of traces %r; it is left out", name)
    return None


class _Recorded(Span):
    """A span that is exported."""

    def __init__(self, tracer: Any, name: str, kind: str, attributes: Attributes, headers: Headers) -> None:
        from opentelemetry import propagate, trace

        self._trace, self._tracer = trace, tracer
        texts = {key: value for key, value in headers.items() if isinstance(value, str)}
        parent = propagate.extract(texts) if texts else None
        kinds = {"client": trace.SpanKind.CLIENT, "server": trace.SpanKind.SERVER, "internal": trace.SpanKind.INTERNAL}
        self._span = tracer.start_span(name, context=parent, kind=kinds[kind], attributes=attributes)
        self._context = trace.set_span_in_context(self._span, parent)
        carrier: dict[str, str] = {}
        propagate.inject(carrier, self._context)
        self.headers = tuple(carrier.items())
        self.trace_id = trace.format_trace_id(self._span.get_span_context().trace_id)

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes = NOTHING) -> None:
        self._span.add_event(name, attributes)

    def part(self, name: str, begun: float, ended: float, attributes: Attributes = NOTHING) -> None:
        now, clock = time.time_ns(), time.perf_counter()
        at = [now - int((clock - moment) * 1e9) for moment in (begun, max(begun, ended))]
        span = self._tracer.start_span(name, context=self._context, start_time=at[0], attributes=attributes)
        span.end(end_time=at[1])

    @contextmanager
    def active(self) -> Iterator[None]:
        with self._trace.use_span(self._span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
            yield

    def end(self, error: BaseException | None = None) -> None:
        if error is not None:
            reason = error.reason if isinstance(error, SpectraError) else type(error).__name__
            self._span.set_attribute("error.type", reason)
            if isinstance(error, SpectraError) and error.request_id:
                self._span.set_attribute("vlm_spectra.request_id", error.request_id)
            self._span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, reason))
        self._span.end()
