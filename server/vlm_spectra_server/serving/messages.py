"""A request's bytes to its message, or to the error that they are.

gRPC answers bytes that it cannot read with INTERNAL, as if the server had failed. Here such bytes become an error of
the caller's, which the handler raises.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status
from vlm_spectra.errors import InvalidInputError, OverLimitError, SpectraError
from vlm_spectra.network.status import TRANSPORT, to_status

from .limits import over
from .stalls import Stalls

__all__ = ["PATIENCE", "TRANSPORT", "Readable", "reader", "refuse"]

PATIENCE = 15.0
"""Seconds that a client of gRPC's own services may leave its next request unsent, or an answer unread."""

MOST = 8
"""Calls of those services at a time."""

LONGEST = 1 << 16
"""Bytes of one of their requests: what it names may be kept for weeks."""

_SOON = 0.1
"""Seconds that another one waits for a place; then the oldest is ended."""


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
        self._open: deque[Any] = deque()
        self._places = threading.Condition()

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The handler, which refuses what cannot be read."""
        handler = continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None or self._own in handler_call_details.method:
            return handler  # type: ignore[no-any-return]
        read, behaviour = handler.request_deserializer, _behaviour(handler)

        def attempt(data: bytes) -> Any:
            if len(data) > LONGEST:
                return InvalidInputError(
                    f"the request has {len(data)} bytes; this service takes at most {LONGEST}.", field="request"
                )
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
                refuse(InvalidInputError("the call has no request.", field="request"), context)
            return request

        def single(requests: Iterator[Any], context: Any) -> Any:
            with self._place(context):
                return behaviour(asked(requests, context), context)

        def stream(requests: Iterator[Any], context: Any) -> Iterator[Any]:
            with self._place(context):
                for answer in behaviour(asked(requests, context), context):
                    with self._stalls.waiting(context, PATIENCE):
                        yield answer

        def threadless(requests: Iterator[Any], context: Any, send: Callable[[Any], None]) -> None:
            with self._place(context):
                request = asked(requests, context)
            behaviour(request, context, send)

        if not handler.response_streaming:
            return grpc.stream_unary_rpc_method_handler(single, attempt, handler.response_serializer)
        if getattr(behaviour, "experimental_non_blocking", False):  # health's Watch, as long as it lasts
            threadless.experimental_non_blocking = True  # type: ignore[attr-defined]
            return grpc.stream_stream_rpc_method_handler(threadless, attempt, handler.response_serializer)
        return grpc.stream_stream_rpc_method_handler(stream, attempt, handler.response_serializer)

    @contextmanager
    def _place(self, context: Any) -> Iterator[None]:
        """Inside, a call has a place: where none is free, the oldest one's, for it is most likely silent."""
        with self._places:
            self._places.wait_for(lambda: len(self._open) < MOST, _SOON)
            self._open.append(context)
            oldest = self._open.popleft() if len(self._open) > MOST else None
        if oldest is not None:
            oldest.cancel()
        try:
            yield
        finally:
            with self._places, suppress(ValueError):
                self._open.remove(context)
                self._places.notify()

    def _requests(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        while True:
            with self._stalls.waiting(context, PATIENCE):
                request = next(requests, None)
            if request is None:
                return
            if isinstance(request, SpectraError):
                refuse(request, context)
            yield request


def _behaviour(handler: Any) -> Any:
    return handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary


def refuse(error: SpectraError, context: Any) -> None:
    """End a call with an error."""
    context.abort_with_status(rpc_status.to_status(to_status(error)))
