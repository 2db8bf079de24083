"""The front: a gRPC server over the models' workers, with health and reflection."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.network.secure import joined
from vlm_spectra.v1 import model_service_pb2

from .auth import CHANNELZ, Authenticator, Tokens
from .budget import Budget
from .guard import Guard
from .health import Health
from .host import Loading
from .limits import Limits
from .loadable import Loadable
from .messages import TRANSPORT, Readable
from .metrics import Metrics
from .models import Models
from .services import ModelCalls, Spectra
from .stores import CaptureStore, ImageStore
from .tls import Certificates, credentials

__all__ = ["Limits", "Server"]

log = logging.getLogger("vlm_spectra.server")

SERVICES = ("vlm_spectra.v1.SpectraService", "vlm_spectra.v1.ModelService")
MODEL_HEALTH = "vlm_spectra.model/"
"""Before a model's name: its service in `grpc.health.v1`."""
KEEPALIVE = {"grpc.keepalive_time_ms": 60_000, "grpc.http2.ping_timeout_ms": 20_000}
"""After so long a client that says nothing is asked for a sign of life, and after so long without one it has gone."""
_DRAIN_REPORT = 1.0
"""Seconds between two lines that say what a server that stops waits for."""


class Server:
    """A server that listens.

    Args:
        host: The address to listen on.
        port: The port; 0 for any free one.
        limits: What it holds at most.
        shared_memory: Whether clients on this host get captures in shared memory.
        tokens: Who may call; everybody where None.
        certificates: TLS; plain text where None.
        private: `unix:PATH`: a way in for the same process's web app, in plain text; tokens hold there too.
        allow_models: What clients may have loaded; see `Loadable`.

    Attributes:
        address: host:port, as clients need it.
        guard: What surrounds every call.
        metrics: Counts.

    Raises:
        InvalidInputError: It cannot listen there.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        shared_memory: bool = True,
        tokens: Tokens | None = None,
        certificates: Certificates | None = None,
        private: str = "",
        allow_models: Sequence[str] = (),
    ) -> None:
        limits, tokens = limits or Limits(), tokens or Tokens()
        budget = Budget(limits.host_bytes)
        self.metrics = Metrics()
        self.guard = Guard(tokens, limits, self.metrics)
        self.models = Models(limits, budget, self._changed)
        self.metrics.watch(lambda: self.models.hosts, budget)
        self.health, self._health_lock = Health(self.guard.stalls), threading.Lock()
        self._grpc = grpc.server(
            ThreadPoolExecutor(limits.connections + 16, thread_name_prefix="call"),
            options=[
                ("grpc.max_receive_message_length", min(TRANSPORT * limits.message_bytes, 2**31 - 1)),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 2 * limits.connections),
                *KEEPALIVE.items(),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
                ("grpc.http2.max_ping_strikes", 0),
            ],
            interceptors=[
                Readable(SERVICES[0].rsplit(".", 1)[0], self.guard.stalls),
                *([Authenticator(tokens, self.metrics.refused)] if tokens.required else []),
            ],
        )
        images, captures = ImageStore(limits), CaptureStore(limits.kept_bytes, limits.kept_seconds)
        budget.make_room = captures.make_room
        spectra = self._spectra = Spectra(self.models, images, captures, self.guard, shared_memory)
        self.loadable = Loadable(allow_models)
        calls = ModelCalls(self.models, spectra, self.loadable)
        self._grpc.add_generic_rpc_handlers((spectra.handlers(), calls.handlers()))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        channelz.add_channelz_servicer(self._grpc)
        standard = (health.SERVICE_NAME, reflection.SERVICE_NAME, CHANNELZ)
        reflection.enable_server_reflection((*SERVICES, *standard), self._grpc)
        where = joined(host, port)
        try:
            if certificates is None:
                bound = self._grpc.add_insecure_port(where)
            else:
                bound = self._grpc.add_secure_port(where, credentials(certificates))
            if private:
                self._grpc.add_insecure_port(private)
        except RuntimeError as error:
            raise InvalidInputError(
                f"the server cannot listen on {where}: the port is taken or the address is not this machine's.",
                field="port",
            ) from error
        self.address = joined(host, bound)
        self._changed("", None)

    def _changed(self, name: str, state: int | None) -> None:
        """A model's state is another: health follows, of the model and of the whole."""
        with self._health_lock:  # several threads tell; the last one to look is the last one to say
            hosts, status = dict(self.models.hosts), health_pb2.HealthCheckResponse
            whole = status.SERVING if any(host.ready for host in hosts.values()) else status.NOT_SERVING
            for service in ("", *SERVICES):
                self.health.set(service, whole)
            if name:
                there = status.SERVING if name in hosts and hosts[name].ready else status.NOT_SERVING
                self.health.set(MODEL_HEALTH + name, there if name in hosts else status.SERVICE_UNKNOWN)
        if state == model_service_pb2.MODEL_STATE_RESTARTING:
            self.metrics.worker_deaths.labels(name).inc()

    def start(self, loading: Loading) -> None:
        """Listen, and load a model; health turns to SERVING once it is ready. Later ones go to the same device."""
        self.loadable.add(loading.name)
        self.models.device = loading.device
        self.guard.stalls.start()
        self._grpc.start()
        self.first = self.models.load(loading)

    def refuse(self) -> None:
        """Take no more requests; health says so. Those at work go on."""
        self.health.stop()
        self.guard.draining = True

    def stop(self, grace: float = 5.0, hurry: threading.Event | None = None) -> None:
        """Take no more requests, let those at work end within `grace` seconds, then end the workers.

        Args:
            grace: The seconds.
            hurry: Once it is set, nothing is waited for any more.
        """
        hurry = hurry or threading.Event()
        self.refuse()
        begun = said = time.monotonic()
        while self.guard.active and (now := time.monotonic()) < begun + grace and not hurry.is_set():
            if now > said + _DRAIN_REPORT:
                log.info("waiting since %.0f s for %s", now - begun, "; ".join(self.guard.at_work()))
                said = now
            time.sleep(0.02)
        if hurry.is_set():
            log.info("waiting no longer: a second signal came")
        self._grpc.stop(0.2 if grace else 0).wait()
        self.guard.stalls.close()
        self._spectra.door.close()
        self._spectra.captures.close()
        self.models.close()
        self.metrics.close()
