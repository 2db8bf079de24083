"""The gRPC calls for browsers: the Connect protocol and gRPC-Web at the app's port, passed on as they come.

A call goes to the server with the caller's own token, its deadline and its bytes; its messages and its status come back
unchanged. So whatever the server says of tokens, scopes, limits and turns holds here too. Nothing of the app's own is
lent to a caller: neither its token, nor the session of somebody who is signed in to the page, nor its certificate,
unless the server wants a token of everybody besides.

What a call holds here, before the server has it and after, has limits like the server's own: how many calls at once,
how long a caller may keep one waiting, how many bytes. Of a caller whom the server refuses, nothing is kept and nothing
parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable
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
    BusyError,
    CancelledError,
    ClientBusyError,
    DeadlineError,
    InvalidInputError,
    NotSupportedError,
    OverLimitError,
    SpectraError,
    UnavailableError,
)
from vlm_spectra.network.status import from_rpc_error, to_status
from vlm_spectra.v1 import model_service_pb2, spectra_service_pb2

from ..serving.limits import Limits, over
from ..serving.limits import named as of_limit
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
_FREE = ("Check", "Watch", "ReleaseCapture")
"""Calls that are never refused for being too many: they tell of the server's health, or give something back."""
_FREE_BYTES = 1 << 14
"""The largest body of those: it is a name."""
_JSON_BYTES = 16_000_000
"""The largest body in JSON, which takes many times its size, and a second for each MB, while it is parsed."""
_JSON_BESIDE = 1 << 16
"""Up to here such bodies are parsed beside each other; larger ones one at a time."""
_BODIES = 4
"""So many times the largest body is what all callers may hold here; one of them may hold half."""


@dataclass(frozen=True)
class Method:
    """A call of the contract.

    Attributes:
        streams: Whether it has a stream of responses.
        request: The class of its request.
        response: The class of its responses.
        free: Whether it is one of those that are not counted; nobody is asked here who makes them.
    """

    streams: bool
    request: type[Message]
    response: type[Message]
    free: bool


_FILES = (spectra_service_pb2, model_service_pb2, health_pb2)
_SERVICES = [service for file in _FILES for service in file.DESCRIPTOR.services_by_name.values()]
METHODS = {
    f"/{service.full_name}/{method.name}": Method(
        method.server_streaming,
        GetMessageClass(method.input_type),
        GetMessageClass(method.output_type),
        method.name in _FREE,
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
        limits: What callers may hold here.
    """

    def __init__(self, upstream: Upstream, limits: Limits) -> None:
        self.limits, self._upstream = limits, upstream
        self._room, self._parsing = _Room(limits), asyncio.Lock()
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
        except _GoneError:
            pass
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
        host = (scope.get("client") or ("",))[0]
        metadata = self._metadata(host, headers, token)
        place = await self._place(method, token, host, receive)
        try:
            body = await self._body(method, dialect, headers, receive, place)
            message = dialect.unwrap(body)
            del body
            if dialect.json:
                async with self._parsing if len(message) > _JSON_BESIDE else contextlib.nullcontext():
                    message = await asyncio.to_thread(_from_json, method, message)
            if self._channel is None:
                self._channel = self._upstream.aio_channel()
            start: Any = self._channel.unary_stream(scope["path"])
            call = start(message, timeout=seconds, metadata=metadata)
            del message
            await self._answer(method, dialect, call, receive, place)
        finally:
            place.leave()

    async def _answer(self, method: Method, dialect: Dialect, call: Any, receive: Receive, place: _Place) -> None:
        watch = asyncio.create_task(_until_gone(receive, call))
        try:
            async for data in call:
                place.empty()  # the server has the request
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

    def _metadata(self, host: str, headers: Headers, token: str) -> tuple[tuple[str, str], ...]:
        passed_on = ((name, _plain(headers[name])) for name in _PASSED_ON if name in headers)
        return (*self._upstream.metadata(token), (CLIENT_HEADER, f"web:{_plain(host)}"), *passed_on)

    async def _place(self, method: Method, token: str, host: str, receive: Receive) -> _Place:
        """A place for a call. Of somebody who gets none the body is not kept."""
        try:
            known = self._upstream.exposed or self._upstream.certified or not method.free
            who = await self._admit(token, host) if known else host
            return self._room.place(who, counted=not method.free)
        except SpectraError:  # said once all has come, for who is still sending may not be listening
            with contextlib.suppress(CancelledError):
                async for _ in _pieces(receive, self.limits.stall_seconds):
                    pass
            raise

    async def _body(self, method: Method, dialect: Dialect, headers: Headers, receive: Receive, place: _Place) -> bytes:
        """A request's body."""
        length, largest = headers.get("content-length", ""), self._largest(method, dialect)
        if length.isdecimal() and int(length[:20]) > largest[0]:
            raise _too_large(*largest, int(length[:20]))
        body, read = bytearray(), 0
        refused: SpectraError | None = None
        async for piece in _pieces(receive, self.limits.stall_seconds):
            read += len(piece)
            if read > largest[0]:
                raise _too_large(*largest, read)
            try:
                if refused is None:
                    place.take(len(piece))
                    body += piece
            except SpectraError as error:
                refused = error
                body.clear()
                place.empty()
        if refused is not None:
            raise refused
        return bytes(body)

    def _largest(self, method: Method, dialect: Dialect) -> tuple[int, str, str]:
        """The most bytes of a call's body, the name of that limit, and what a refusal says of it."""
        most = self.limits.message_bytes
        if method.free and most > _FREE_BYTES:
            return _FREE_BYTES, "free_mb", "for this call it has at most {} MB."
        if dialect.json and most > _JSON_BYTES:
            binary = dialect.media.replace("json", "proto")
            return _JSON_BYTES, "json_mb", f"of JSON at most {{}} MB are taken, what is larger comes as {binary}."
        return most, "max_message_mb", "this server takes at most {} MB (max_message_mb)."

    async def _admit(self, token: str, host: str) -> str:
        """Who calls, for counting: as the server tells callers apart."""

        def check() -> str:
            self._upstream.refuse_if_lent()
            self._upstream.check(token)
            return token if self._upstream.wants_tokens() else host

        try:
            return await asyncio.to_thread(check)
        except WebError as error:
            raise UnavailableError(str(error)) from None


class _GoneError(Exception):
    """The caller has left."""


class _Room:
    """What callers hold here at once: calls, and bytes of requests that the server does not have yet.

    Args:
        limits: How much.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.calls, self.held = Counter[str](), Counter[str]()

    def place(self, caller: str, counted: bool) -> _Place:
        """A place for one call more.

        Raises:
            BusyError: There is none, or none for this caller.
        """
        if counted:
            mine, most = self.calls[caller], self.limits.client_requests
            if mine >= most:
                what = "the calls of this client at once would be"
                error = over(ClientBusyError, "client_requests", most, mine + 1, what, "")
                error.retry_after = 1.0
                raise error
            most = self.limits.connections
            if self.calls.total() >= most:
                raise BusyError(
                    f"{most} calls are at work already (max_calls); try again in a few seconds.",
                    retry_after=2.0,
                    metadata=of_limit("connections", most, self.calls.total() + 1),
                )
        return _Place(self, caller, counted)


class _Place:
    """What one call holds of the room."""

    def __init__(self, room: _Room, caller: str, counted: bool) -> None:
        self._room, self._caller = room, caller
        self._calls, self._bytes = int(counted), 0
        room.calls[caller] += self._calls

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            BusyError: They are too many, with those of all callers or with those of this one.
        """
        largest, held = self._room.limits.message_bytes, self._room.held
        for error, times, whose, found in (
            (ClientBusyError, _BODIES // 2, " of this client", held[self._caller] + size),
            (BusyError, _BODIES, "", held.total() + size),
        ):
            if found > times * largest:
                raise error(
                    f"the requests{whose} that are coming in have {found / 1e6:g} MB; this server takes at most "
                    f"{times * largest / 1e6:g} MB of them at once, {times} times max_message_mb.",
                    retry_after=2.0,
                    metadata=of_limit("message_bytes", largest, found),
                )
        held[self._caller] += size
        self._bytes += size

    def empty(self) -> None:
        """Hold no bytes any more."""
        self._room.held[self._caller] -= self._bytes
        self._bytes = 0

    def leave(self) -> None:
        """Hold nothing any more."""
        self.empty()
        self._room.calls[self._caller] -= self._calls
        self._room.calls, self._room.held = +self._room.calls, +self._room.held  # without those who hold nothing


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
    return Guard(opened, hosts, (*origins, *own))


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


async def _pieces(receive: Receive, seconds: float) -> AsyncIterator[bytes]:
    """A request's body, as it comes.

    Raises:
        CancelledError: It is not all there after so many seconds.
        _GoneError: The caller has left.
    """
    end, more = asyncio.get_running_loop().time() + seconds, True
    while more:
        try:
            async with asyncio.timeout_at(end):
                event = await receive()
        except TimeoutError:
            raise CancelledError(
                f"the request was not all there after {seconds:g} s (max_stall_seconds).",
                metadata={"limit": "max_stall_seconds", "value": f"{seconds:g}"},
            ) from None
        if event["type"] == "http.disconnect":
            raise _GoneError
        more = event.get("more_body", False)
        yield event.get("body", b"")


async def _until_gone(receive: Receive, call: Any) -> None:
    """Cancel a call once its caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.cancel()


def _plain(value: str) -> str:
    """A header's value as gRPC's metadata takes it."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in value)


def _too_large(most: int, limit: str, takes: str, found: int) -> OverLimitError:
    value, asked = f"{most / 1e6:.12g}", f"{found / 1e6:.12g}"
    return OverLimitError(
        f"the request has {asked} MB or more; {takes.format(value)}",
        field="request",
        metadata={"limit": limit, "value": value, "asked": asked},
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
