"""`grpc.health.v1`: who asks is told of the server as a whole, of each service and of each model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from vlm_spectra.errors import BusyError

from .messages import PATIENCE, refuse
from .stalls import Stalls

WATCHES = 64
"""Calls that watch the server's health at a time."""
_Response = health_pb2.HealthCheckResponse


@dataclass(eq=False)
class _Watch:
    """A call that hears of a service's status.

    Attributes:
        service: The service's name, which may be any.
        context: The call's.
        send: Sends a message, and waits until the client has room for it.
        status: The newest status.
        told: The one that was sent last.
        sending: Whether a thread sends to it now.
    """

    service: str
    context: Any
    send: Callable[[Any], None]
    status: int
    told: int | None = None
    sending: bool = False


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Tells who watches of changes alone, and forgets who has left.

    A watch holds a thread only while a message goes out to it, and nothing is sent under the lock: a client that takes
    no message is in nobody's way until its call is ended.

    Args:
        stalls: Ends calls whose clients let them stand.
    """

    def __init__(self, stalls: Stalls) -> None:
        self._stalls = stalls
        self._statuses: dict[str, int] = {}
        self._watches: set[_Watch] = set()
        self._stopping = False
        self._lock = threading.Lock()
        self._senders = ThreadPoolExecutor(WATCHES, thread_name_prefix="health")

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A service's status now."""
        status = self._statuses.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
        return _Response(status=status)

    def Watch(self, request: Any, context: Any, send: Callable[[Any], None]) -> None:  # noqa: N802
        """A service's status now and whenever it is another; the call outlasts this function."""
        with self._lock:
            if len(self._watches) >= WATCHES:
                refuse(BusyError(f"{WATCHES} calls watch this server's health already.", retry_after=5.0), context)
            status = self._statuses.get(request.service, _Response.SERVICE_UNKNOWN)
            watch = _Watch(request.service, context, send, status)
            self._watches.add(watch)
            self._tell(watch)
        if not context.add_callback(lambda: self._forget(watch)):
            self._forget(watch)  # the call has ended already: who left at once would be kept for good

    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def set(self, service: str, status: int) -> None:
        """A service's status; once the server stops, it stays what it is."""
        with self._lock:
            if not self._stopping:
                self._set(service, status)

    def stop(self) -> None:
        """Nothing serves from now on."""
        with self._lock:
            self._stopping = True
            for service in self._statuses:
                self._set(service, _Response.NOT_SERVING)

    def _set(self, service: str, status: int) -> None:
        self._statuses[service] = status
        for watch in self._watches:
            if watch.service == service:
                watch.status = status
                self._tell(watch)

    def _tell(self, watch: _Watch) -> None:
        if not watch.sending:
            watch.sending = True
            self._senders.submit(self._send, watch)

    def _send(self, watch: _Watch) -> None:
        """Send a watch its newest status, until it has it."""
        while True:
            with self._lock:
                if watch.told == watch.status:
                    watch.sending = False
                    return
                watch.told = watch.status
            with self._stalls.waiting(watch.context, PATIENCE):
                watch.send(_Response(status=watch.told))

    def _forget(self, watch: _Watch) -> None:
        with self._lock:
            self._watches.discard(watch)
