"""A request's bytes to its message, or to the error that they are.

gRPC answers bytes that it cannot read with INTERNAL, as if the server had failed. Here such bytes become an error of
the caller's, which the handler raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status
from vlm_spectra.errors import InvalidInputError, OverLimitError, SpectraError
from vlm_spectra.network.status import to_status

from .limits import over

TRANSPORT = 2
"""So many times the limit is the most that gRPC itself takes in: up to there a refusal names the limit."""


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
    """The same for the services that come with gRPC (health, reflection).

    Args:
        own: How the names of the services begin that read their requests themselves.
    """

    def __init__(self, own: str) -> None:
        self._own = own

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The handler, which refuses what cannot be read."""
        handler = continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None or self._own in handler_call_details.method:
            return handler  # type: ignore[no-any-return]
        read = handler.request_deserializer

        def attempt(data: bytes) -> Any:
            try:
                return read(data)
            except DecodeError:
                return InvalidInputError(f"the request's {len(data)} bytes cannot be read.", field="request")

        behaviour, make = _parts(handler)

        def guarded(request: Any, context: Any) -> Any:
            if handler.request_streaming:
                return behaviour(_checked(request, context), context)
            _check(request, context)
            return behaviour(request, context)

        return make(guarded, attempt, handler.response_serializer)  # type: ignore[no-any-return]


def _parts(handler: Any) -> tuple[Any, Any]:
    if handler.request_streaming and handler.response_streaming:
        return handler.stream_stream, grpc.stream_stream_rpc_method_handler
    if handler.request_streaming:
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _check(request: Any, context: Any) -> None:
    if isinstance(request, SpectraError):
        context.abort_with_status(rpc_status.to_status(to_status(request)))


def _checked(requests: Iterator[Any], context: Any) -> Iterator[Any]:
    for request in requests:
        _check(request, context)
        yield request
