"""gRPC calls as a browser makes them, over HTTP alone: a channel that `RemoteVLM` takes for one of gRPC's.

Written against the two protocols' texts, not with the code of the server: it reads what the server writes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

CODES = {code.name.lower().replace("cancelled", "canceled"): code for code in grpc.StatusCode}
DETAILS = "grpc-status-details-bin"
UNARY = {"connect": "application/proto", "connect json": "application/json"}
STREAM = {
    "connect": "application/connect+proto",
    "connect json": "application/connect+json",
    "grpc-web": "application/grpc-web+proto",
    "grpc-web json": "application/grpc-web+json",
    "grpc-web text": "application/grpc-web-text+proto",
}
KINDS = tuple(STREAM)
PREFIX = "/vlm_spectra.v1."


class Ended(grpc.RpcError):
    """A call that ended with an error."""

    def __init__(self, code: grpc.StatusCode, message: str, details: bytes = b"", http: int = 200) -> None:
        super().__init__(f"{code.name}: {message}")
        self._code, self._message, self._details, self.http = code, message, details, http

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._message

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((DETAILS, self._details),) if self._details else ()


def envelope(message: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BI", flags, len(message)) + message


def unpadded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def failed(error: dict[str, Any], http: int = 200) -> Ended:
    """What a Connect error says."""
    code = CODES[error["code"]]
    status = status_pb2.Status(code=code.value[0], message=error["message"])
    for detail in error["details"]:
        packed = status.details.add(type_url=f"type.googleapis.com/{detail['type']}", value=unpadded(detail["value"]))
        assert {"@type": packed.type_url, **detail["debug"]} == json_format.MessageToDict(packed)
    return Ended(code, error["message"], status.SerializeToString(), http)


def info(error: Ended) -> error_details_pb2.ErrorInfo:
    """The `ErrorInfo` of a failed call."""
    status, found = status_pb2.Status.FromString(error._details), error_details_pb2.ErrorInfo()
    assert status.message == error.details()
    assert status.code == error.code().value[0]
    assert status.details[0].Unpack(found)
    return found


def envelopes(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= 5:
            flags, size = struct.unpack_from(">BI", buffer)
            if len(buffer) < 5 + size:
                break
            yield flags, bytes(buffer[5 : 5 + size])
            del buffer[: 5 + size]
    assert not buffer, "the answer ends in the middle of an envelope"


def decoded(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Base64 of which any group of four letters may be padded."""
    rest = b""
    for piece in pieces:
        whole = len(rest + piece) // 4 * 4
        rest, groups = (rest + piece)[whole:], (rest + piece)[:whole]
        yield b"".join(base64.b64decode(part, validate=True) for part in re.findall(b"[^=]+=*", groups))
    assert not rest


class Channel:
    """Calls of one kind to one address.

    Args:
        url: The web app's.
        kind: One of `KINDS`.
        headers: What else goes along with every call.

    Attributes:
        spoil: What becomes of a request's body on its way.
    """

    def __init__(self, url: str, kind: str = "connect", **headers: str) -> None:
        self.kind, self._address, self._headers = kind, url.removeprefix("http://"), headers
        self.spoil: Callable[[bytes], bytes] = bytes

    def close(self) -> None:
        """Nothing is kept open between calls."""

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any = bytes) -> Any:
        return _Single(self, path, request_serializer, response_deserializer)

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any = bytes) -> Any:
        def call(request: Any, timeout: float | None = None, metadata: Any = ()) -> Call:
            return Call(self, path, request_serializer(request), timeout, metadata, response_deserializer)

        return call

    def message(self, path: str, request: Any, response: Any, timeout: float | None = None, **headers: str) -> Any:
        """The answer of a call that has one."""
        call = self.unary_unary(path, lambda message: message.SerializeToString(), response.FromString)
        return call(request, timeout, tuple(headers.items()))

    def messages(self, path: str, request: Any, response: Any, timeout: float | None = None, **headers: str) -> Call:
        """The answers of a call that has many."""
        call = self.unary_stream(path, lambda message: message.SerializeToString(), response.FromString)
        return call(request, timeout, tuple(headers.items()))

    def begin(self, path: str, body: bytes, timeout: float | None, metadata: Any, unary: bool) -> HTTPConnection:
        """Send a call."""
        connect = self.kind.startswith("connect")
        if self.kind.endswith("json"):
            body = as_json(path, body)
        if not (connect and unary):
            body = envelope(body)
        if self.kind == "grpc-web text":
            body = base64.b64encode(body)
        headers = {"connection": "close", "content-type": self._media(unary), **self._headers, **dict(metadata)}
        headers |= {"connect-protocol-version": "1"} if connect else {"x-grpc-web": "1"}
        if timeout is not None:
            milliseconds = round(timeout * 1000)
            headers |= {"connect-timeout-ms": str(milliseconds)} if connect else {"grpc-timeout": f"{milliseconds}m"}
        connection = HTTPConnection(self._address, timeout=120)
        connection.request("POST", path, self.spoil(body), headers)
        return connection

    def answer(self, connection: HTTPConnection, unary: bool) -> HTTPResponse:
        """The answer to a call, as far as its headers."""
        answer, media = connection.getresponse(), self._media(unary)
        if self.kind.startswith("connect") and unary and answer.status != 200:
            media = "application/json"
        assert answer.headers["content-type"] == media, (answer.status, answer.read())
        assert "content-encoding" not in answer.headers
        return answer

    def _media(self, unary: bool) -> str:
        return UNARY[self.kind] if unary and self.kind.startswith("connect") else STREAM[self.kind]


class _Single:
    def __init__(self, channel: Channel, path: str, serializer: Any, deserializer: Any) -> None:
        self._channel, self._path, self._serializer, self._deserializer = channel, path, serializer, deserializer

    def __call__(self, request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
        body = self._serializer(request)
        if not self._channel.kind.startswith("connect"):
            (answer,) = Call(self._channel, self._path, body, timeout, metadata, self._deserializer, unary=True)
            return answer
        answer = self._channel.answer(self._channel.begin(self._path, body, timeout, metadata, True), True)
        content = answer.read()
        if answer.status != 200:
            raise failed(json.loads(content), answer.status)
        return self._deserializer(as_proto(self._path, content) if self._channel.kind.endswith("json") else content)

    def future(self, request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
        self(request, timeout, metadata)
        return self

    def add_done_callback(self, _: Any) -> None:
        pass


class Call:
    """A call at work; iterating gives its messages."""

    def __init__(
        self,
        channel: Channel,
        path: str,
        body: bytes,
        timeout: float | None,
        metadata: Any,
        deserializer: Any,
        unary: bool = False,
    ) -> None:
        self._channel, self._path, self._deserializer = channel, path, deserializer
        self._connection = channel.begin(path, body, timeout, metadata, unary)
        self._link, self._unary = self._connection.sock, unary
        self._events, self._left = self._messages(), False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._events)
        except (AssertionError, HTTPException, OSError):
            if self._left:
                raise Ended(grpc.StatusCode.CANCELLED, "this side has left.") from None
            raise

    def cancel(self) -> None:
        """Leave, as a page does that is closed."""
        self._left = True
        with contextlib.suppress(OSError):  # it is over already
            self._link.shutdown(socket.SHUT_RDWR)

    def _messages(self) -> Iterator[Any]:
        kind, ended = self._channel.kind, False
        answer = self._channel.answer(self._connection, self._unary)
        assert answer.status == 200
        pieces = iter(lambda: answer.read1(1 << 16), b"")
        for flags, data in envelopes(decoded(pieces) if kind == "grpc-web text" else pieces):
            assert not ended, "something came after the end"
            if flags == 0:
                yield self._deserializer(as_proto(self._path, data) if kind.endswith("json") else data)
                continue
            ended = True
            if kind.startswith("connect"):
                assert flags == 2
                last = json.loads(data)
                if "error" in last:
                    raise failed(last["error"])
                assert last == {}
            else:
                assert flags == 0x80
                assert data.endswith(b"\r\n")
                trailers = dict(line.split(": ", 1) for line in data.decode("ascii").split("\r\n")[:-1])
                code = next(code for code in grpc.StatusCode if code.value[0] == int(trailers["grpc-status"]))
                if code is not grpc.StatusCode.OK:
                    message = unquote(trailers["grpc-message"], errors="strict")
                    raise Ended(code, message, unpadded(trailers.get(DETAILS, "")))
        assert ended, "the answer has no end"


def _method(path: str) -> Any:
    service, name = path[1:].split("/")
    return descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]


def as_json(path: str, message: bytes) -> bytes:
    """A request as JSON."""
    return json_format.MessageToJson(GetMessageClass(_method(path).input_type).FromString(message)).encode()


def as_proto(path: str, text: bytes) -> bytes:
    """A response in JSON as bytes."""
    return json_format.Parse(text, GetMessageClass(_method(path).output_type)()).SerializeToString()
