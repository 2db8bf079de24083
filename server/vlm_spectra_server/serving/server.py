"""The front: a gRPC server over the models' workers, with health and reflection."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from vlm_spectra.errors import InvalidInputError

from .host import Loading
from .services import ModelCalls, Models, Spectra
from .stores import CaptureStore, ImageStore

log = logging.getLogger("vlm_spectra.server")

SERVICES = ("vlm_spectra.v1.SpectraService", "vlm_spectra.v1.ModelService")


@dataclass(frozen=True)
class Limits:
    """What one server holds at most.

    Attributes:
        capture_bytes: Tensors of one request.
        kept_bytes: Finished captures in all.
        kept_seconds: How long each stays.
        image_bytes: Images in all.
        message_bytes: One request message.
        waiting: Requests that wait for one model.
        connections: Requests at work or waiting, over all models.
    """

    capture_bytes: int = 4 << 30
    kept_bytes: int = 2 << 30
    kept_seconds: float = 600.0
    image_bytes: int = 512 << 20
    message_bytes: int = 256 << 20
    waiting: int = 64
    connections: int = 128


class Server:
    """A server that listens.

    Args:
        host: The address to listen on.
        port: The port; 0 for any free one.
        limits: What it holds at most.

    Attributes:
        address: host:port, as clients need it.

    Raises:
        InvalidInputError: It cannot listen there.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.models = Models(limits.capture_bytes, limits.waiting)
        self.health = health.HealthServicer()
        self._grpc = grpc.server(
            ThreadPoolExecutor(limits.connections + 16, thread_name_prefix="call"),
            options=[("grpc.max_receive_message_length", limits.message_bytes), ("grpc.so_reuseport", 0)],
        )
        images, captures = ImageStore(limits.image_bytes), CaptureStore(limits.kept_bytes, limits.kept_seconds)
        spectra = Spectra(self.models, images, captures)
        calls = ModelCalls(self.models, spectra)
        self._grpc.add_generic_rpc_handlers((spectra.handlers(), calls.handlers()))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        try:
            bound = self._grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise InvalidInputError(
                f"the server cannot listen on {host}:{port}: the port is taken or the address is not this machine's.",
                field="port",
            ) from error
        self.address = f"{host}:{bound}"
        self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    def _set(self, status: int) -> None:
        for service in ("", *SERVICES):
            self.health.set(service, status)

    def start(self, loading: Loading) -> None:
        """Listen, and load a model; health turns to SERVING once it is ready."""
        self._grpc.start()
        host = self.models.load(loading)

        def watch() -> None:
            host.settled.wait()
            if host.ready:
                self._set(health_pb2.HealthCheckResponse.SERVING)

        threading.Thread(target=watch, name="watch-loading", daemon=True).start()
        self.first = host

    def stop(self, grace: float = 5.0) -> None:
        """Take no more requests, let those at work end within `grace` seconds, then end the workers."""
        self.health.enter_graceful_shutdown()
        self._grpc.stop(grace).wait()
        self.models.close()
