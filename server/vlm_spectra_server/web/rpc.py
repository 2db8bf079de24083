"""The gRPC calls for browsers: the Connect protocol and gRPC-Web at the app's port, passed on as they come.

A call goes to the server with the caller's own token, its deadline and its bytes; its messages and its status come back
unchanged. So whatever the server says of tokens, scopes, limits and turns holds here too. Nothing of the app's own is
lent to a caller: neither its token, nor the session of somebody who is signed in to the page, nor its certificate,
unless the server wants a token of everybody besides.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from vlm_spectra.errors import (
    DeadlineError,
    InvalidInputError,
    NotSupportedError,
    OverLimitError,
    SpectraError,
    UnavailableError,
)
from vlm_spectra.network.status import from_rpc_error, to_status
from vlm_spectra.v1 import model_service_pb2, spectra_service_pb2

from .dialects import DIALECTS, Connect, Dialect
from .guard import Guard
from .problems import WebError
from .upstream import Upstream

CLIENT_HEADER = "x-vlm-spectra-client"
"""Who calls, where no token says so: the address the call came from, whatever the caller itself says."""
_PASSED_ON = ("traceparent", "tracestate")
_ALLOWED = (
    "authorization",
    "connect-accept-encoding",
    "connect-protocol-version",
    "connect-timeout-ms",
    "grpc-accept-encoding",
    "grpc-timeout",
    "x-grpc-web",
    "x-user-agent",
    CLIENT_HEADER,
    *_PASSED_ON,
)
"""Headers that a page of a named origin may send, besides those that any may."""
_EXPOSED = ("grpc-status", "grpc-message", "grpc-status-details-bin")
_EARLY = 1 << 20
"""Bytes of a body that are taken before the server was asked whether it takes anything of this caller."""


@dataclass(frozen=True)
class Method:
    """A call of the contract.

    Attributes:
        streams: Whether it has a stream of responses.
        request: The class of its request.
        response: The class of its responses.
    """

    streams: bool
    request: type[Message]
    response: type[Message]


_FILES = (spectra_service_pb2, model_service_pb2, health_pb2)
_SERVICES = [service for file in _FILES for service in file.DESCRIPTOR.services_by_name.values()]
METHODS = {
    f"/{service.full_name}/{method.name}": Method(
        method.server_streaming, GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    )
    for service in _SERVICES
    for method in service.methods
}
"""The calls by path."""
_PREFIXES = tuple(f"/{service.full_name}/" for service in _SERVICES)


class Calls:
    """An ASGI app of the calls.

    Args:
        upstream: The server.
        message_bytes: The largest body.
    """

    def __init__(self, upstream: Upstream, message_bytes: int) -> None:
        self._upstream, self._most = upstream, message_bytes
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        """End the calls at work."""
        if self._channel is not None:
            await self._channel.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        headers = Headers(scope=scope)
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        method = METHODS.get(scope["path"])
        kind = DIALECTS.get(media)
        if scope["method"] != "POST":
            error = NotSupportedError(f"a call is a POST, not a {scope['method']}.")
            await _refuse(error, 405, (b"allow", b"POST"), send)
            return
        fits = [media for media, kind in DIALECTS.items() if method is None or kind.streams in (None, method.streams)]
        if kind is None or media not in fits:
            error = NotSupportedError(f"the content type is {media[:80]!r}; for this call it is {' or '.join(fits)}.")
            await _refuse(error, 415, (b"accept-post", ", ".join(fits).encode("ascii")), send)
            return
        dialect = kind(media, send)
        try:
            if method is None:
                raise NotSupportedError(f"there is no call {scope['path'][1:120]!r}.")
            await self._pass_on(method, dialect, scope, headers, receive)
        except SpectraError as refused:
            await dialect.end(to_status(refused))

    async def _pass_on(
        self, method: Method, dialect: Dialect, scope: Scope, headers: Headers, receive: Receive
    ) -> None:
        dialect.check(headers)
        seconds = dialect.seconds(headers)
        if seconds is not None and seconds <= 0:
            raise DeadlineError("the time given was over before the request began.")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        metadata = self._metadata(scope, headers, token)
        if self._upstream.exposed or self._upstream.certified:
            await self._admit(token)
        body = await self._body(headers, receive, token)
        if body is None:
            return
        message = dialect.unwrap(body)
        del body
        if dialect.json:
            message = await asyncio.to_thread(_from_json, method, message)
        if self._channel is None:
            self._channel = self._upstream.aio_channel()
        start: Any = self._channel.unary_stream(scope["path"])
        call = start(message, timeout=seconds, metadata=metadata)
        del message
        watch = asyncio.create_task(_until_gone(receive, call))
        try:
            async for data in call:
                await dialect.message(await asyncio.to_thread(_to_json, method, data) if dialect.json else data)
            await dialect.end()
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)
            await dialect.end(status or to_status(from_rpc_error(error, self._upstream.shown)))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # the caller has gone, and took the call along
        finally:
            watch.cancel()
            call.cancel()

    def _metadata(self, scope: Scope, headers: Headers, token: str) -> tuple[tuple[str, str], ...]:
        host = (scope.get("client") or ("",))[0]
        passed_on = ((name, _plain(headers[name])) for name in _PASSED_ON if name in headers)
        return (*self._upstream.metadata(token), (CLIENT_HEADER, f"web:{_plain(host)}"), *passed_on)

    async def _body(self, headers: Headers, receive: Receive, token: str) -> bytes | None:
        """A request's body, None where the caller has left. Of somebody whom the server refuses it is not kept."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most:
            raise _too_large(self._most, int(length[:20]))
        body, read, more = bytearray(), 0, True
        refused: SpectraError | None = None
        admitted = False
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            piece, more = event.get("body", b""), event.get("more_body", False)
            read += len(piece)
            if read > self._most:
                raise _too_large(self._most, read)
            if read > _EARLY and not admitted:
                admitted = True
                try:
                    await self._admit(token)
                except SpectraError as error:
                    refused = error
                    body.clear()
            if refused is None:
                body += piece
        if refused is not None:  # said now, for who is still sending may not be listening
            raise refused
        return bytes(body)

    async def _admit(self, token: str) -> None:
        try:
            await asyncio.to_thread(self._upstream.refuse_if_lent)
            await asyncio.to_thread(self._upstream.check, token)
        except WebError as error:
            raise UnavailableError(str(error)) from None


class Beside:
    """Stands before an app and answers what is a call; the rest is the app's.

    Args:
        app: The app.
        door: What answers calls.
    """

    def __init__(self, app: ASGIApp, door: ASGIApp) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or have the app do it."""
        call = scope["type"] == "http" and scope["path"].startswith(_PREFIXES)
        await (self._door if call else self._app)(scope, receive, send)


def door(calls: Calls, hosts: Iterable[str], origins: Iterable[str] = (), own: Iterable[str] = ()) -> ASGIApp:
    """The calls, behind the guard that stands before all else of the app.

    Args:
        calls: The calls.
        hosts: As for `Guard`.
        origins: Whose pages may make calls, besides the app's own; what else the app has stays closed to them.
        own: The app's own origins, besides the address that a call names.

    Raises:
        InvalidInputError: One of these is no origin.
    """
    origins = named(origins)
    opened = CORSMiddleware(
        calls,
        allow_origins=origins,
        allow_methods=("POST",),
        allow_headers=_ALLOWED,
        allow_private_network=True,
        expose_headers=_EXPOSED,
        max_age=7200,
    )
    return Guard(opened, hosts, None, (*origins, *own))


def named(origins: Iterable[str], field: str = "cors_origin") -> tuple[str, ...]:
    """Origins as browsers write them.

    Raises:
        InvalidInputError: One is no origin, or all of them at once.
    """
    found = []
    for origin in origins:
        written = re.fullmatch(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?/?", origin.strip().lower())
        if not written:
            raise InvalidInputError(
                f"an origin is a scheme, a host and perhaps a port, such as https://lab.example, not {origin!r}; "
                "each is named by itself.",
                field=field,
            )
        scheme, host, port = written[1], written[2], written[3] or ""
        usual = {"http": ":80", "https": ":443"}[scheme]
        found.append(f"{scheme}://{host}{'' if port == usual else port}")
    return tuple(found)


async def _until_gone(receive: Receive, call: Any) -> None:
    """Cancel a call once its caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.cancel()


def _plain(value: str) -> str:
    """A header's value as gRPC's metadata takes it."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in value)


def _too_large(most: int, found: int) -> OverLimitError:
    limit = {"limit": "max_message_mb", "value": f"{most / 1e6:g}", "asked": f"{found / 1e6:g}"}
    return OverLimitError(
        f"the request has {found / 1e6:g} MB or more; this server takes at most {most / 1e6:g} MB (max_message_mb).",
        metadata=limit,
    )


def _from_json(method: Method, body: bytes) -> bytes:
    try:
        return json_format.Parse(body, method.request()).SerializeToString()
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(
            f"the JSON is not a {method.request.DESCRIPTOR.name}: {str(error).rstrip('.')}."
        ) from None


def _to_json(method: Method, data: bytes) -> bytes:
    return json_format.MessageToJson(method.response.FromString(data), indent=None).encode("utf-8")


async def _refuse(error: SpectraError, http: int, header: tuple[bytes, bytes], send: Send) -> None:
    """Answer a request that is in none of the dialects."""

    async def headed(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"].append(header)
        await send(message)

    await Connect("application/json", headed).refuse(to_status(error), http)
