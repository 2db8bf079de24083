"""A request's bytes to its message, or to the error that they are.

gRPC answers bytes that it cannot read with INTERNAL, as if the server had failed. Here such bytes become an error of
the caller's, which the handler raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status
from vlm_spectra.errors import BusyError, InvalidInputError, OverLimitError, SpectraError
from vlm_spectra.network.status import TRANSPORT, to_status

from .limits import over
from .stalls import Stalls

__all__ = ["TRANSPORT", "Readable", "reader"]

PATIENCE = 15.0
"""Seconds that a client of gRPC's own services may leave its next request unsent."""

MOST = 8
"""Calls of those services that hold a thread at a time."""


def reader(request: type[Message], limit: int) -> Callable[[bytes], Message | SpectraError]:
    """What reads a call's requests.

    Args:
        request: The message's class.
        limit: The most bytes of one.
    """

    def read(data: bytes) -> Message | SpectraError:
        if len(data) > limit:
            return over(OverLimitError, "message_bytes", limit, len(data), "the request has", "request")
        try:
            return request.FromString(data)
        except DecodeError:
            return InvalidInputError(
                f"the request's {len(data)} bytes are no {request.DESCRIPTOR.full_name}.", field="request"
            )

    return read


class Readable(grpc.ServerInterceptor):
    """The same for the services that come with gRPC (health, reflection, channelz), whose calls it keeps few and short.

    Args:
        own: How the names of the services begin that read their requests themselves.
        stalls: Ends calls whose clients let them stand.
    """

    def __init__(self, own: str, stalls: Stalls) -> None:
        self._own, self._stalls = own, stalls
        self._free = threading.BoundedSemaphore(MOST)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The handler, which refuses what cannot be read."""
        handler = continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None or self._own in handler_call_details.method:
            return handler  # type: ignore[no-any-return]
        read, behaviour = handler.request_deserializer, _behaviour(handler)

        def attempt(data: bytes) -> Any:
            try:
                return read(data)
            except DecodeError:
                return InvalidInputError(f"the request's {len(data)} bytes cannot be read.", field="request")

        def asked(requests: Iterator[Any], context: Any) -> Any:
            readable = self._requests(requests, context)
            if handler.request_streaming:
                return readable
            request = next(readable, None)
            if request is None:
                _refuse(InvalidInputError("the call has no request.", field="request"), context)
            return request

        def single(requests: Iterator[Any], context: Any) -> Any:
            with self._thread(context):
                return behaviour(asked(requests, context), context)

        def stream(requests: Iterator[Any], context: Any) -> Iterator[Any]:
            with self._thread(context):
                for answer in behaviour(asked(requests, context), context):
                    with self._stalls.waiting(context, PATIENCE):
                        yield answer

        def threadless(requests: Iterator[Any], context: Any, send: Callable[[Any], None]) -> None:
            with self._thread(context):
                request = asked(requests, context)
            behaviour(request, context, send)

        if not handler.response_streaming:
            return grpc.stream_unary_rpc_method_handler(single, attempt, handler.response_serializer)
        if getattr(behaviour, "experimental_non_blocking", False):  # health's Watch, as long as it lasts
            threadless.experimental_non_blocking = True  # type: ignore[attr-defined]
            return grpc.stream_stream_rpc_method_handler(threadless, attempt, handler.response_serializer)
        return grpc.stream_stream_rpc_method_handler(stream, attempt, handler.response_serializer)

    @contextmanager
    def _thread(self, context: Any) -> Iterator[None]:
        """Inside, a call holds a thread, if there is one left for it."""
        if not self._free.acquire(blocking=False):
            _refuse(BusyError(f"{MOST} calls of this service are at work already.", retry_after=1.0), context)
        try:
            yield
        finally:
            self._free.release()

    def _requests(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        while True:
            with self._stalls.waiting(context, PATIENCE):
                request = next(requests, None)
            if request is None:
                return
            if isinstance(request, SpectraError):
                _refuse(request, context)
            yield request


def _behaviour(handler: Any) -> Any:
    return handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary


def _refuse(error: SpectraError, context: Any) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))
