"""How browsers put a gRPC call into HTTP: the Connect protocol (connectrpc.com/docs/protocol) and gRPC-Web.

Of one call, a dialect knows how the request's body holds its message, how long it may take, and how messages and the
status go back. The answer is never compressed; neither may the request be.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import struct
from abc import ABC, abstractmethod
from typing import Any, ClassVar
from urllib.parse import quote

from google.protobuf.json_format import MessageToDict
from google.rpc import code_pb2
from google.rpc.status_pb2 import Status
from starlette.datastructures import Headers
from starlette.types import Send
from vlm_spectra.errors import InvalidInputError, NotSupportedError

_PREFIX = struct.Struct(">BI")
"""Before a message: its flags, and how many bytes it has."""
_COMPRESSED, _CONNECT_END, _WEB_TRAILERS = 0x01, 0x02, 0x80
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class Dialect(ABC):
    """One call in one HTTP exchange.

    Args:
        media: The content type of request and answer.
        send: Takes the answer, as ASGI's messages.
    """

    streams: ClassVar[bool | None]
    """Whether calls with a stream of responses use it; None for both kinds."""

    def __init__(self, media: str, send: Send) -> None:
        self.media, self.json = media, media.endswith("json")
        self._send, self._begun = send, False

    def check(self, headers: Headers) -> None:
        """Look at the headers of the request.

        Raises:
            NotSupportedError: The request is compressed.
            InvalidInputError: It is of another version.
        """
        for name in ("content-encoding", "connect-content-encoding", "grpc-encoding"):
            if headers.get(name, "identity").lower() not in ("", "identity"):
                raise NotSupportedError(
                    f"{name} is {headers[name][:40]!r}; requests are taken as they are, which is called identity.",
                    field=name,
                )

    @abstractmethod
    def seconds(self, headers: Headers) -> float | None:
        """How long the call may take; None for as long as it does.

        Raises:
            InvalidInputError: What stands there is no time.
        """

    @abstractmethod
    def unwrap(self, body: bytes) -> bytes:
        """The one message in a request's body.

        Raises:
            InvalidInputError: There is none, or more.
            NotSupportedError: It is compressed.
        """

    @abstractmethod
    async def message(self, data: bytes) -> None:
        """Send a message of the answer. Waits for a reader that is slower."""

    @abstractmethod
    async def end(self, status: Status | None = None) -> None:
        """End the answer: well, or with an error."""

    async def _write(self, data: bytes, more: bool, status: int = 200, media: str = "") -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", (media or self.media).encode("ascii"))]
            if more:
                headers.append((b"x-accel-buffering", b"no"))  # a reverse proxy hands each message on at once
            else:
                headers.append((b"content-length", str(len(data)).encode("ascii")))
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


class Connect(Dialect):
    """A call with one response: bodies are the messages, a failure is an HTTP status with JSON."""

    streams = False

    def __init__(self, media: str, send: Send) -> None:
        super().__init__(media, send)
        self._answer = b""

    def check(self, headers: Headers) -> None:
        super().check(headers)
        version = headers.get("connect-protocol-version", "1")
        if version != "1":
            raise InvalidInputError(
                f"this server speaks version 1 of the Connect protocol, not {version[:40]!r}.",
                field="connect-protocol-version",
            )

    def seconds(self, headers: Headers) -> float | None:
        given = headers.get("connect-timeout-ms")
        if given is None:
            return None
        if not re.fullmatch("[0-9]{1,10}", given):
            raise InvalidInputError(
                f"connect-timeout-ms is a number of milliseconds of at most 10 digits, not {given[:40]!r}.",
                field="connect-timeout-ms",
            )
        return int(given) / 1000

    def unwrap(self, body: bytes) -> bytes:
        return body

    async def message(self, data: bytes) -> None:
        self._answer = data

    async def end(self, status: Status | None = None) -> None:
        if status is None:
            await self._write(self._answer, more=False)
        else:
            await self.refuse(status, CONNECT[status.code][1])

    async def refuse(self, status: Status, http: int) -> None:
        """End with an error under an HTTP status."""
        await self._write(_json(connect_error(status)), more=False, status=http, media="application/json")


class ConnectStream(Connect):
    """A call with a stream of responses, each in an envelope; the last one says in JSON how it ended."""

    streams = True

    def unwrap(self, body: bytes) -> bytes:
        return _opened(body)

    async def message(self, data: bytes) -> None:
        await self._write(_enveloped(0, data), more=True)

    async def end(self, status: Status | None = None) -> None:
        last = _json({} if status is None else {"error": connect_error(status)})
        await self._write(_enveloped(_CONNECT_END, last), more=False)


class GrpcWeb(Dialect):
    """gRPC's own frames, for both kinds of calls; the trailers are one more of them."""

    streams = None

    def seconds(self, headers: Headers) -> float | None:
        given = headers.get("grpc-timeout")
        if given is None:
            return None
        found = re.fullmatch("([0-9]{1,8})([HMSmun])", given)
        if not found:
            raise InvalidInputError(
                f"grpc-timeout is at most 8 digits and a unit of H, M, S, m, u, n, not {given[:40]!r}.",
                field="grpc-timeout",
            )
        return int(found[1]) * {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}[found[2]]

    def unwrap(self, body: bytes) -> bytes:
        return _opened(body)

    async def message(self, data: bytes) -> None:
        await self._write(self._coded(_enveloped(0, data)), more=True)

    async def end(self, status: Status | None = None) -> None:
        lines = [f"grpc-status: {0 if status is None else status.code}"]
        if status is not None:
            details = base64.b64encode(status.SerializeToString()).rstrip(b"=").decode("ascii")
            lines += [f"grpc-message: {quote(status.message, safe=_PRINTABLE)}", f"grpc-status-details-bin: {details}"]
        trailers = "".join(f"{line}\r\n" for line in lines).encode("ascii")
        await self._write(self._coded(_enveloped(_WEB_TRAILERS, trailers)), more=False)

    def _coded(self, frame: bytes) -> bytes:
        return frame


class GrpcWebText(GrpcWeb):
    """The same in base64, for what can read text alone."""

    def unwrap(self, body: bytes) -> bytes:
        try:  # padding may stand in the middle, where a frame ended
            parts = re.findall(rb"[^=]+=*", re.sub(rb"\s", b"", body))
            return super().unwrap(b"".join(base64.b64decode(part, validate=True) for part in parts))
        except binascii.Error as error:
            raise InvalidInputError(f"the body is not base64: {error}.") from None

    def _coded(self, frame: bytes) -> bytes:
        return base64.b64encode(frame)


DIALECTS: dict[str, type[Dialect]] = {
    "application/proto": Connect,
    "application/json": Connect,
    "application/connect+proto": ConnectStream,
    "application/connect+json": ConnectStream,
    "application/grpc-web": GrpcWeb,
    "application/grpc-web+proto": GrpcWeb,
    "application/grpc-web+json": GrpcWeb,
    "application/grpc-web-text": GrpcWebText,
    "application/grpc-web-text+proto": GrpcWebText,
}
"""By the request's content type."""

CONNECT = {
    code_pb2.CANCELLED: ("canceled", 499),
    code_pb2.UNKNOWN: ("unknown", 500),
    code_pb2.INVALID_ARGUMENT: ("invalid_argument", 400),
    code_pb2.DEADLINE_EXCEEDED: ("deadline_exceeded", 504),
    code_pb2.NOT_FOUND: ("not_found", 404),
    code_pb2.ALREADY_EXISTS: ("already_exists", 409),
    code_pb2.PERMISSION_DENIED: ("permission_denied", 403),
    code_pb2.RESOURCE_EXHAUSTED: ("resource_exhausted", 429),
    code_pb2.FAILED_PRECONDITION: ("failed_precondition", 400),
    code_pb2.ABORTED: ("aborted", 409),
    code_pb2.OUT_OF_RANGE: ("out_of_range", 400),
    code_pb2.UNIMPLEMENTED: ("unimplemented", 501),
    code_pb2.INTERNAL: ("internal", 500),
    code_pb2.UNAVAILABLE: ("unavailable", 503),
    code_pb2.DATA_LOSS: ("data_loss", 500),
    code_pb2.UNAUTHENTICATED: ("unauthenticated", 401),
}
"""What the Connect protocol calls gRPC's codes, and their HTTP statuses."""


def connect_error(status: Status) -> dict[str, Any]:
    """A status as the Connect protocol has it in JSON; `debug` is for people, programs read `value`."""
    details: list[dict[str, Any]] = []
    for detail in status.details:
        value = base64.b64encode(detail.value).rstrip(b"=").decode("ascii")
        details.append({"type": detail.TypeName(), "value": value})
        with contextlib.suppress(TypeError):  # a type that is not known here
            details[-1]["debug"] = {name: text for name, text in MessageToDict(detail).items() if name != "@type"}
    return {"code": CONNECT[status.code][0], "message": status.message, "details": details}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _enveloped(flags: int, data: bytes) -> bytes:
    return _PREFIX.pack(flags, len(data)) + data


def _opened(body: bytes) -> bytes:
    """The message in a body of one envelope."""
    if len(body) < _PREFIX.size:
        raise InvalidInputError(
            f"the body has {len(body)} bytes; a message comes in an envelope: one byte of flags, four of its length, "
            "and as many bytes of message."
        )
    flags, size = _PREFIX.unpack_from(body)
    if flags & _COMPRESSED:
        raise NotSupportedError("the message is compressed; messages are taken as they are, which is called identity.")
    if flags:
        raise InvalidInputError(f"the flags of a request's envelope are 0, not {flags}.")
    found = len(body) - _PREFIX.size
    if found < size:
        raise InvalidInputError(f"the envelope announces {size} bytes, and {found} came.")
    if found > size:
        raise InvalidInputError(f"a call has one message; {found - size} bytes came after it.")
    return body[_PREFIX.size :]
