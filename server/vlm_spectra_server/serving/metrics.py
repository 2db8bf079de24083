"""What is going on, for Prometheus. The names are in docs/server.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import nan
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from vlm_spectra.v1 import model_service_pb2

from .auth import Tokens
from .scrape import Scrape
from .tls import Certificates

_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
PHASES = ("queue", "prepare", "compute", "copy", "wire")
"""What the time of a call goes into; `all` is the whole."""
_OBSERVED = {**{f"{phase}_seconds": phase for phase in PHASES}, "total_seconds": "all"}


class Metrics:
    """A server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"namespace": "vlm_spectra", "registry": self.registry}
        self._requests = Counter(
            "requests", "Calls that have ended, by method and gRPC code", ["method", "code"], **named
        )
        self._at_work = Gauge("calls_at_work", "Calls that have begun and not ended", ["method"], **named)
        self._seconds = Histogram(
            "seconds", "Where the time of calls went", ["method", "phase"], buckets=_BUCKETS, **named
        )
        self._tokens = Counter("tokens", "Tokens sent", **named)
        self._bytes = Counter("sent_bytes", "Bytes of tensors sent or shared, by hook", ["hook"], **named)
        self._cancelled = Counter("cancellations", "Calls whose client left or cancelled", ["method"], **named)
        self._peak = Gauge("device_peak_bytes", "Peak memory of the device in the last request", **named)
        self.worker_deaths = Counter("worker_deaths", "Workers that died and were replaced", ["model"], **named)
        self._refused = Counter("refused_callers", "Calls without a token of the server's", **named)
        self._scrape: Scrape | None = None

    def refused(self) -> None:
        """A caller had no token of the server's."""
        self._refused.inc()

    def begun(self, method: str) -> None:
        """A call begins."""
        self._at_work.labels(method).inc()

    def ended(self, method: str, code: str, cost: Mapping[str, float], sent: Mapping[str, int], tokens: int) -> None:
        """A call has ended.

        Args:
            method: The call's name.
            code: The gRPC status.
            cost: `Call.cost()`.
            sent: Bytes by the names of tensors.
            tokens: Tokens sent.
        """
        self._at_work.labels(method).dec()
        self._requests.labels(method, code).inc()
        if code == "CANCELLED":
            self._cancelled.labels(method).inc()
        for name, phase in _OBSERVED.items():
            if name in cost:
                self._seconds.labels(method, phase).observe(cost[name])
        if cost.get("peak_memory_bytes"):
            self._peak.set(cost["peak_memory_bytes"])
        if tokens:
            self._tokens.inc(tokens)
        for name, count in sent.items():
            self._bytes.labels(hook_of(name)).inc(count)

    def watch(self, hosts: Callable[[], Mapping[str, Any]], budget: Any) -> None:
        """Read the models' queues and the memory of captures whenever somebody asks."""
        self.registry.register(_Watched(hosts, budget))  # type: ignore[arg-type]

    def listen(
        self, host: str, port: int, tokens: Tokens | None = None, certificates: Certificates | None = None
    ) -> str:
        """Answer Prometheus; the address. The arguments are those of `Scrape`.

        Raises:
            InvalidInputError: It cannot listen there.
        """
        if certificates is not None:
            expires = Gauge(
                "vlm_spectra_certificate_expires_timestamp_seconds",
                "When the server's certificate expires (Unix time)",
                registry=self.registry,
            )
            expires.set_function(lambda: end.timestamp() if (end := certificates.expires()) else nan)
        self._scrape = Scrape(self.registry, host, port, tokens, certificates)
        return self._scrape.url

    def close(self) -> None:
        """Stop listening."""
        if self._scrape is not None:
            self._scrape.close()
            self._scrape = None


class _Watched:
    """Gauges whose values are looked up when asked for."""

    def __init__(self, hosts: Callable[[], Mapping[str, Any]], budget: Any) -> None:
        self._hosts, self._budget = hosts, budget

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The values of now."""
        waiting = GaugeMetricFamily("vlm_spectra_queue", "Requests that wait", labels=["model"])
        ready = GaugeMetricFamily("vlm_spectra_model_ready", "1 while a model answers", labels=["model"])
        held = GaugeMetricFamily("vlm_spectra_model_bytes", "Memory of a model", labels=["model", "device"])
        devices: dict[str, tuple[int, int]] = {}
        for name, host in sorted(self._hosts().items(), key=lambda item: item[1].told):  # of a device the newest counts
            waiting.add_metric([name], len(host.queue))
            ready.add_metric([name], host.model.state == model_service_pb2.MODEL_STATE_READY)
            for device, (size, free, total) in host.memory.items():
                held.add_metric([name, device], size)
                devices[device] = free, total
        free_bytes = GaugeMetricFamily("vlm_spectra_device_free_bytes", "Free memory of a device", labels=["device"])
        all_bytes = GaugeMetricFamily("vlm_spectra_device_bytes", "All memory of a device", labels=["device"])
        for device, (free, total) in devices.items():
            free_bytes.add_metric([device], free)
            all_bytes.add_metric([device], total)
        yield from (waiting, ready, held, free_bytes, all_bytes)
        captures = GaugeMetricFamily("vlm_spectra_capture_bytes", "Host memory held by captures")
        captures.add_metric([], self._budget.held)
        yield captures
        bound = GaugeMetricFamily("vlm_spectra_capture_bytes_bound", "Host memory for captures in all")
        bound.add_metric([], self._budget.bound)
        yield bound

    describe = collect


def hook_of(name: str) -> str:
    """A tensor's name without its layer: few labels, however many layers a model has."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
