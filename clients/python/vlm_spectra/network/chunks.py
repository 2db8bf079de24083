"""A chunk message as bytes, written and read by hand: the payload is copied once on either side.

The generated classes remain the reference. What `parse` does not know to be a plain chunk it leaves to them, and a
test holds the two equal. The layout is protobuf's (https://protobuf.dev/programming-guides/encoding): the message has
one field, number 15, the chunk; in it index (1, varint), offset (2, varint), crc32c (3, fixed32) and data (15, bytes),
each absent where it is zero.
"""

from __future__ import annotations

from typing import NamedTuple

_LENGTH_15 = 0x7A
"""Tag of field 15, length-delimited: of the chunk in its message, and of the data in the chunk."""
_INDEX, _OFFSET, _CRC = 0x08, 0x10, 0x1D


class Chunk(NamedTuple):
    """A run of a tensor's bytes: the fields of `TensorChunk`, `tensor` being its index."""

    tensor: int
    offset: int
    crc32c: int
    data: memoryview


def pack(index: int, offset: int, crc32c: int, data: bytes | memoryview) -> bytes:
    """A streaming response that holds one chunk, encoded."""
    head = bytearray()
    if index:
        head.append(_INDEX)
        head += _varint(index)
    if offset:
        head.append(_OFFSET)
        head += _varint(offset)
    if crc32c:
        head.append(_CRC)
        head += crc32c.to_bytes(4, "little")
    if len(data):
        head.append(_LENGTH_15)
        head += _varint(len(data))
    return b"".join((bytes((_LENGTH_15,)), _varint(len(head) + len(data)), head, data))


def parse(message: bytes) -> Chunk | None:
    """The chunk in an encoded response; None where it is anything but a chunk in the usual form."""
    size = len(message)
    if not size or message[0] != _LENGTH_15:
        return None
    length, at = _read_varint(message, 1, size)
    if at < 0 or at + length != size:
        return None
    index = offset = crc = last = 0
    data = memoryview(b"")
    while at < size:
        tag = message[at]
        if tag <= last:  # a field twice, or out of order: not how we write
            return None
        last = tag
        if tag == _INDEX:
            index, at = _read_varint(message, at + 1, size)
            if at < 0 or index >> 32:
                return None
        elif tag == _OFFSET:
            offset, at = _read_varint(message, at + 1, size)
            if at < 0 or offset >> 64:
                return None
        elif tag == _CRC:
            if at + 5 > size:
                return None
            crc, at = int.from_bytes(message[at + 1 : at + 5], "little"), at + 5
        elif tag == _LENGTH_15:
            length, at = _read_varint(message, at + 1, size)
            if at < 0 or at + length != size:
                return None
            data, at = memoryview(message)[at:], size
        else:
            return None
    return Chunk(index, offset, crc, data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int, size: int) -> tuple[int, int]:
    """The number at a place and the place behind it; -1 for the place where there is none."""
    value = shift = 0
    while at < size and shift < 64:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return 0, -1
