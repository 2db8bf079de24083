"""Chunks made smaller for slow links: bytes regrouped by their place in the element, then Zstandard.

Activations are noise in their low bits and alike in their high ones. With the bytes of one place side by side (first
all lowest bytes, last all highest) Zstandard finds the latter; without, it finds next to nothing (Collet and
Kucherawy, RFC 8878; the regrouping is that of Blosc's shuffle).
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import zstandard

from ..errors import InternalError

SLOW_LINK = 40e6
"""Bytes a second: on a link slower than this, regrouping and Zstandard gain more time than they take."""

_LEVEL = 1
_AT_ONCE = os.cpu_count() or 1
_COMPRESSORS: deque[zstandard.ZstdCompressor] = deque(maxlen=_AT_ONCE)
_DECOMPRESSORS: deque[zstandard.ZstdDecompressor] = deque(maxlen=_AT_ONCE)
"""Those at rest. Each holds some 400 kB of tables: one for each core, where one for each thread would add up."""

_Worker = TypeVar("_Worker", zstandard.ZstdCompressor, zstandard.ZstdDecompressor)


@contextlib.contextmanager
def _one(idle: deque[_Worker], make: Callable[[], _Worker]) -> Iterator[_Worker]:
    """One that no other thread has; the oldest at rest is dropped where there are more than cores."""
    try:
        worker = idle.pop()
    except IndexError:
        worker = make()
    try:
        yield worker
    finally:
        idle.append(worker)


def worthwhile(compression: str, bytes_per_second: float | None) -> bool:
    """Whether chunks are to be compressed.

    Args:
        compression: "none", "zstd", or "auto" to go by the link's speed.
        bytes_per_second: As measured on an earlier stream; None where not known.
    """
    if compression == "auto":
        return bytes_per_second is not None and bytes_per_second < SLOW_LINK
    return compression == "zstd"


def compress(data: bytes | memoryview, item: int) -> bytes:
    """The bytes of some elements, made smaller.

    Args:
        data: The bytes.
        item: Bytes of an element; data of another multiple is not regrouped.
    """
    if item > 1 and len(data) % item == 0:
        data = np.frombuffer(data, np.uint8).reshape(-1, item).T.tobytes()
    with _one(_COMPRESSORS, lambda: zstandard.ZstdCompressor(level=_LEVEL)) as compressor:
        return compressor.compress(data)


def decompress(data: bytes | memoryview, item: int, bound: int) -> bytes | memoryview:
    """The bytes that `compress` took.

    Args:
        data: What it gave.
        item: As it was given.
        bound: The most bytes there may be.

    Raises:
        InternalError: It is damaged, or larger than it may be.
    """
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= bound:
            raise InternalError(f"a compressed chunk says that it holds {size} bytes, where {bound} remain.")
        with _one(_DECOMPRESSORS, zstandard.ZstdDecompressor) as decompressor:
            plain = decompressor.decompress(data)
    except zstandard.ZstdError as error:
        raise InternalError(f"a compressed chunk cannot be read: {error}.") from error
    if item > 1 and len(plain) % item == 0:
        return memoryview(np.ascontiguousarray(np.frombuffer(plain, np.uint8).reshape(item, -1).T).reshape(-1).data)
    return plain
