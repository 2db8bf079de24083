"""The checksum of a call's answer: a running CRC-32C over its messages, chunks left out, which have their own.

It is the field `crc32c` of every answer (stream.proto), the last of the message as encoded. What was changed on its way
or is missing shows at the next message at the latest.
"""

from __future__ import annotations

from typing import Any, TypeVar

import crc32c
from google.protobuf.message import DecodeError

T = TypeVar("T")

_TAG = bytes((14 << 3 | 5,))
"""Of field 14, a fixed32."""
_SIZE = len(_TAG) + 4


class Damaged(Exception):  # noqa: N818
    """What came is not what was sent."""


class Checksum:
    """Of one call: made by the server that seals its messages, and by the client that opens them, in the same order.

    Args:
        sealed: Whether the server is known to seal its messages, so that one without a checksum has lost it.
    """

    def __init__(self, sealed: bool = False) -> None:
        self._crc, self._sealed = 0, sealed

    def seal(self, message: bytes) -> bytes:
        """A message as encoded, with the checksum behind it."""
        self._crc = crc32c.crc32c(message, self._crc)
        return b"".join((message, _TAG, self._crc.to_bytes(4, "little")))

    def check(self, message: Any, data: bytes) -> None:
        """Compare a message, which came as these bytes. Servers that are older send no checksum at all.

        Raises:
            Damaged: It, or one before it, is not what was sent.
        """
        sealed = message.HasField("crc32c")
        self._crc = crc32c.crc32c(memoryview(data)[:-_SIZE] if sealed else data, self._crc)
        if (sealed and self._crc != message.crc32c) or (self._sealed and not sealed):
            raise Damaged("a message of the answer was changed or lost on its way.")
        self._sealed = sealed

    def event(self, kind: Any, data: bytes) -> tuple[str | None, Any]:
        """A message of a stream: which event, and the message. Chunks have checksums of their own.

        Raises:
            Damaged: It, or one before it, is not what was sent.
        """
        message = _parse(kind, data)
        event: str | None = message.WhichOneof("event")
        if event != "chunk":
            self.check(message, data)
        return event, message


def _parse(kind: Any, data: bytes) -> Any:
    """A message of a class.

    Raises:
        Damaged: The bytes are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Damaged(f"a message of the answer is no {kind.DESCRIPTOR.name}: it was damaged on its way.") from None


def opened(kind: type[T], data: bytes | None, sealed: bool = False) -> T:
    """An answer of one message, of a server that is known to seal them or not.

    gRPC gives None for a call that ended well without one.

    Raises:
        Damaged: It is not what was sent.
    """
    if data is None:
        raise Damaged("the answer's message was lost on its way.")
    message: T = _parse(kind, data)
    Checksum(sealed).check(message, data)
    return message
