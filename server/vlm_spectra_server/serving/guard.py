"""What surrounds every call: who makes it, whether it may, how many at once, its errors, cost, and line in the log."""

from __future__ import annotations

import copy
import itertools
import logging
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status
from vlm_spectra.errors import BusyError, CancelledError, ClientBusyError, InternalError, SpectraError, UnavailableError
from vlm_spectra.status import to_status

from .auth import ANYONE, Caller, Tokens, caller_of, needed
from .host import Job
from .limits import Limits, check_request, named, over
from .metrics import Metrics
from .sending import Sending
from .tls import client_name

log = logging.getLogger("vlm_spectra.server")

CLIENT_HEADER = "x-vlm-spectra-client"
"""Metadata by which a client names itself, for fair turns, on servers that have no other way to tell."""

_FREEING = ("ReleaseCapture",)
"""Calls that are never refused for being too many: they give something back."""


@dataclass
class Call:
    """A call at work.

    Attributes:
        id: The request's id: it stands in the log, in the header of its stream and in its error.
        method: The call's name.
        caller: Who makes it.
        client: Whose turn it takes.
        job: The work behind it, where there is some.
        sending: Its stream, where it has one.
        code: How it ended; CANCELLED until that is known.
    """

    id: str
    method: str
    caller: Caller = ANYONE
    client: str = ""
    model: str = ""
    job: Job | None = None
    sending: Sending | None = None
    code: str = "CANCELLED"
    reason: str = ""
    begun: float = field(default_factory=time.perf_counter)

    def cost(self) -> dict[str, float]:
        """Where its time went, in seconds, and the device's peak memory in bytes; as far as it is known."""
        found = {"total_seconds": time.perf_counter() - self.begun}
        if self.job is not None:
            if self.job.started:
                found["queue_seconds"] = self.job.started - self.job.submitted
            else:
                found["queue_seconds"] = time.perf_counter() - self.job.submitted
            found.update(self.job.cost)
        return found


class Guard:
    """Wraps the calls of the services.

    Args:
        tokens: Who may call.
        limits: How much.
        metrics: Counts.

    Attributes:
        active: The calls at work, by id.
        draining: Whether the server stops and takes no more.
    """

    def __init__(self, tokens: Tokens, limits: Limits, metrics: Metrics) -> None:
        self.tokens, self.limits, self.metrics = tokens, limits, metrics
        self.active: dict[str, Call] = {}
        self.draining = False
        self._numbers = itertools.count(1)
        self._prefix = uuid.uuid4().hex[:6]
        self._clients: Counter[str] = Counter()
        self._lock = threading.Lock()

    def single(self, method: str, call: Callable[..., bytes], request: type[Message]) -> grpc.RpcMethodHandler:
        """The handler of a call with one response."""

        def guarded(message: Any, context: Any) -> bytes:
            try:
                self._enter(method, message, context)
                answer = call(message, context)
            except Exception as error:
                self._abort(context, error)
                raise AssertionError from error
            context.call.code = "OK"
            return answer

        return grpc.unary_unary_rpc_method_handler(guarded, request_deserializer=request.FromString)

    def streaming(
        self, method: str, call: Callable[..., Iterator[bytes]], request: type[Message]
    ) -> grpc.RpcMethodHandler:
        """The handler of a call with a stream of responses."""

        def guarded(message: Any, context: Any) -> Iterator[bytes]:
            try:
                self._enter(method, message, context)
                yield from call(message, context)
            except Exception as error:
                self._abort(context, error)
            context.call.code = "OK"

        return grpc.unary_stream_rpc_method_handler(guarded, request_deserializer=request.FromString)

    def _enter(self, method: str, message: Any, context: Any) -> None:
        call = context.call = Call(f"{self._prefix}-{next(self._numbers)}", method)
        metadata = dict(context.invocation_metadata())
        self.active[call.id] = call
        self.metrics.begun(method)
        counted: list[str] = []

        def leave() -> None:
            with self._lock:
                for client in counted:
                    self._clients[client] -= 1
                    if self._clients[client] <= 0:
                        del self._clients[client]
            self.active.pop(call.id, None)
            self._report(call)

        if not context.add_callback(leave):
            leave()
            raise CancelledError("the client has gone.")
        call.caller = caller_of(self.tokens, metadata, client_name(context))
        claimed = str(metadata.get(CLIENT_HEADER) or context.peer())
        call.client = call.caller.name or re.sub(r"[^\w.:%\[\]-]", "?", claimed)[:80]
        call.caller.check(needed(method, message))
        if self.draining and method not in _FREEING:
            raise UnavailableError("the server is stopping.", retry_after=5.0)
        if method not in _FREEING:
            with self._lock:
                self._admit(call.client)
                self._clients[call.client] += 1
                counted.append(call.client)
        check_request(self.limits, method, message)

    def _admit(self, client: str) -> None:
        mine, most = self._clients[client], self.limits.client_requests
        if mine >= most:
            error = over(
                ClientBusyError, "client_requests", most, mine + 1, "the calls of this client at once would be", ""
            )
            error.retry_after = 1.0
            raise error
        if self._clients.total() >= self.limits.connections:
            raise BusyError(
                f"{self.limits.connections} calls are at work already (max_calls); try again in a few seconds.",
                retry_after=2.0,
                metadata=named("connections", self.limits.connections, self._clients.total() + 1),
            )

    def _abort(self, context: Any, error: Exception) -> None:
        call: Call = context.call
        if not isinstance(error, SpectraError):
            log.exception("%s failed", call.id, extra={"request_id": call.id})
            error = InternalError(f"the server failed on this request: {type(error).__name__}: {error}")
        error = copy.copy(error)  # several calls may share one
        error.metadata = {**{name: f"{value:.6g}" for name, value in call.cost().items()}, **error.metadata}
        call.code, call.reason = error.code, f"{error.reason}: {error}"
        context.abort_with_status(rpc_status.to_status(to_status(error, call.id)))

    def _report(self, call: Call) -> None:
        """Count a call that has ended, and log it."""
        cost = call.cost()
        sent = {} if call.sending is None else call.sending.sent
        if call.code == "CANCELLED" and call.sending is not None and call.sending.finished:
            call.code = "OK"
        self.metrics.ended(call.method, call.code, cost, sent, 0 if call.sending is None else call.sending.tokens)
        worth = call.job is not None or call.code != "OK"
        if not log.isEnabledFor(logging.INFO if worth else logging.DEBUG):
            return
        fields = {"request_id": call.id, "method": call.method, "client": call.client, "code": call.code}
        fields |= {"model": call.model} if call.model else {}
        fields |= {name: round(value, 6) for name, value in cost.items()} | {"bytes": sum(sent.values())}
        log.log(
            logging.INFO if worth else logging.DEBUG,
            "%s %s of %s: %s%s, waited %.3f s, computed %.3f s, %.3f s in all, %.1f MB",
            call.id,
            call.method,
            call.client,
            call.code,
            f" ({call.reason})" if call.reason else "",
            cost.get("queue_seconds", 0.0),
            cost.get("compute_seconds", 0.0),
            cost["total_seconds"],
            fields["bytes"] / 1e6,
            extra=fields,
        )

    def at_work(self) -> list[str]:
        """The calls at work, each in a few words."""
        now = time.perf_counter()
        calls = list(self.active.values())
        return [f"{call.id} {call.method} of {call.client} ({now - call.begun:.0f} s)" for call in calls]
