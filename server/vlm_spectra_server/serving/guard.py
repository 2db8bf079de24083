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
from vlm_spectra import tracing
from vlm_spectra.errors import (
    BusyError,
    CancelledError,
    ClientBusyError,
    InternalError,
    InvalidInputError,
    SpectraError,
    UnauthenticatedError,
    UnavailableError,
)
from vlm_spectra.network.checksum import Checksum
from vlm_spectra.network.status import sentence, to_status

from .auth import ANYONE, Caller, Tokens, caller_of, needed
from .limits import Limits, check_request, named, over
from .messages import reader
from .metrics import Metrics
from .sending import Sending
from .stalls import Stalls
from .tls import client_name
from .turns import Job

log = logging.getLogger("vlm_spectra.server")

CLIENT_HEADER = "x-vlm-spectra-client"
"""Metadata by which a client names itself, for fair turns, on servers that have no other way to tell."""

_CHANGING = ("LoadModel", "UnloadModel")
"""Calls that stand in the log also where no model worked on them and none failed: what others find changed."""

_FREEING = ("ReleaseCapture",)
"""Calls that do not count among their client's: they give something back."""
_FREEING_MOST, _FREEING_SECONDS = 8, 2.0
"""How many of them may wait for their request at a time, and for how long: their threads are beyond all limits."""


@dataclass
class Call:
    """A call at work.

    Attributes:
        id: The request's id: it stands in the log, in the header of its stream and in its error.
        method: The call's name.
        caller: Who makes it.
        client: Whose turn it takes.
        model: The one that works on it, is loaded or leaves.
        job: The work behind it, where there is some.
        sending: Its stream, where it has one.
        span: It in a trace.
        error: What it failed with.
        code: How it ended; CANCELLED until that is known.
    """

    id: str
    method: str
    caller: Caller = ANYONE
    client: str = ""
    model: str = ""
    job: Job | None = None
    sending: Sending | None = None
    span: tracing.Span = tracing.NONE
    error: SpectraError | None = None
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
            if self.job.started and not self.job.cost:  # the client has left, and the worker not ended yet
                found["compute_seconds"] = time.perf_counter() - self.job.started
            found.update(self.job.cost)
        if self.sending is not None:
            found["wire_seconds"] = self.sending.wire
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
        stalls: Ends those whose clients let them stand.
    """

    def __init__(self, tokens: Tokens, limits: Limits, metrics: Metrics) -> None:
        self.tokens, self.limits, self.metrics = tokens, limits, metrics
        self.active: dict[str, Call] = {}
        self.draining = False
        self.stalls = Stalls(limits.stall_seconds)
        self._numbers = itertools.count(1)
        self._prefix = uuid.uuid4().hex[:6]
        self._clients: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._freeing = threading.BoundedSemaphore(_FREEING_MOST)
        self._services: dict[str, str] = {}

    def single(self, method: str, call: Callable[..., bytes], request: type[Message]) -> grpc.RpcMethodHandler:
        """The handler of a call with one response."""
        self._services[method] = _service(method, request)

        def guarded(requests: Iterator[Any], context: Any) -> bytes:
            try:
                message = self._enter(method, requests, context)
                answer = Checksum().seal(call(message, context))
            except Exception as error:
                self._abort(context, error)
                raise AssertionError from error
            context.call.code = "OK"
            return answer

        return grpc.stream_unary_rpc_method_handler(guarded, reader(request, self.limits.message_bytes))

    def streaming(
        self, method: str, call: Callable[..., Iterator[bytes]], request: type[Message]
    ) -> grpc.RpcMethodHandler:
        """The handler of a call with a stream of responses."""
        self._services[method] = _service(method, request)

        def guarded(requests: Iterator[Any], context: Any) -> Iterator[bytes]:
            try:
                for part in call(self._enter(method, requests, context), context):
                    if not self.tokens.knows(context.call.caller.name):
                        raise UnauthenticatedError("the token was taken away while the call was at work.")
                    with self.stalls.waiting(context):
                        yield part
            except Exception as error:
                self._abort(context, error)
            context.call.code = "OK"

        return grpc.stream_stream_rpc_method_handler(guarded, reader(request, self.limits.message_bytes))

    def _enter(self, method: str, requests: Iterator[Any], context: Any) -> Any:
        """A call begins; its request, which is read once the call is counted.

        To gRPC every call is one of a stream of requests: for the others it would hold a thread until the request is
        there, before anybody here knows of it.
        """
        call = context.call = Call(f"{self._prefix}-{next(self._numbers)}", method)
        metadata = dict(context.invocation_metadata())
        rpc = {"rpc.system": "grpc", "rpc.service": self._services[method], "rpc.method": method}
        call.span = tracing.start(
            f"{self._services[method]}/{method}", "server", {**rpc, "vlm_spectra.request_id": call.id}, metadata
        )
        self.active[call.id] = call
        self.metrics.begun(method)
        counted: list[str] = []
        left = False

        def leave() -> None:
            nonlocal left
            with self._lock:
                left = True
                for client in counted:
                    self._clients[client] -= 1
                    if self._clients[client] <= 0:
                        del self._clients[client]
            try:
                self._report(call)
            finally:
                self.active.pop(call.id, None)

        if not context.add_callback(leave):
            leave()
            raise CancelledError("the client has gone.")
        call.caller = caller_of(self.tokens, context.invocation_metadata(), client_name(context))
        claimed = str(metadata.get(CLIENT_HEADER) or context.peer())
        call.client = call.caller.name or re.sub(r"[^\w.:%\[\]-]", "?", claimed)[:80]
        if self.draining and method not in _FREEING:
            raise UnavailableError("the server is stopping.", retry_after=5.0)
        if method in _FREEING:
            message = self._read_freeing(requests, context)
        else:
            with self._lock:
                if left:  # counted now, it would be so for good
                    raise CancelledError("the client has gone.")
                self._admit(call.client)
                self._clients[call.client] += 1
                counted.append(call.client)
            message = self._read(requests, context)
        call.begun = time.perf_counter()
        call.caller.check(needed(method, message))
        check_request(self.limits, method, message)
        return message

    def _read_freeing(self, requests: Iterator[Any], context: Any) -> Any:
        """The request of a call that gives something back."""
        if not self._freeing.acquire(blocking=False):
            raise BusyError(f"{_FREEING_MOST} such calls wait for their requests already.", retry_after=1.0)
        try:
            return self._read(requests, context, _FREEING_SECONDS)
        finally:
            self._freeing.release()

    def _read(self, requests: Iterator[Any], context: Any, seconds: float | None = None) -> Any:
        """The request of a call."""
        try:
            with self.stalls.waiting(context, seconds):
                message = next(requests)
        except StopIteration:
            raise InvalidInputError("the call has no request.", field="request") from None
        except grpc.RpcError:
            raise CancelledError("the client has gone.") from None
        if isinstance(message, SpectraError):
            raise message
        return message

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
        call.code, call.reason, call.error = error.code, f"{error.reason}: {sentence(str(error))}", error
        context.abort_with_status(rpc_status.to_status(to_status(error, call.id)))

    def _report(self, call: Call) -> None:
        """Count a call that has ended, and log it."""
        cost = call.cost()
        sent = {} if call.sending is None else call.sending.sent
        if call.code == "CANCELLED" and call.sending is not None and call.sending.finished:
            call.code = "OK"
        _trace(call, sum(sent.values()))
        self.metrics.ended(call.method, call.code, cost, sent, 0 if call.sending is None else call.sending.tokens)
        worth = call.job is not None or call.code != "OK" or call.method in _CHANGING
        if not log.isEnabledFor(logging.INFO if worth else logging.DEBUG):
            return
        fields = {"request_id": call.id, "method": call.method, "client": call.client, "code": call.code}
        fields |= {"model": call.model} if call.model else {}
        fields |= {"trace_id": call.span.trace_id} if call.span.trace_id else {}
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


def _service(method: str, request: type[Message]) -> str:
    """The full name of the service that has a method."""
    services = request.DESCRIPTOR.file.services_by_name.values()
    return next(service.full_name for service in services if method in service.methods_by_name)


def _trace(call: Call, size: int) -> None:
    """A call that has ended, in its trace: its turn, its sending, its end; the worker tells of its own part."""
    span, job, sending = call.span, call.job, call.sending
    if span is tracing.NONE:
        return
    if job is not None and job.submitted >= call.begun:
        span.part("queue", job.submitted, job.started or time.perf_counter())
    found: dict[str, tracing.Value] = {"rpc.grpc.status_code": grpc.StatusCode[call.code].value[0]}
    if call.model:
        found["vlm_spectra.model"] = call.model
    if sending is not None:
        found |= {"vlm_spectra.bytes": size, "vlm_spectra.tokens": sending.tokens}
        if sending.begun:
            span.part("send", sending.begun, sending.ended, {"vlm_spectra.wire_seconds": sending.wire})
    span.set(found)
    gone = CancelledError("the client has gone.") if call.code == "CANCELLED" else None
    span.end(call.error or gone)
