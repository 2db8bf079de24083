"""Chunks made smaller for slow links: bytes regrouped by their place in the element, then Zstandard.

Activations are noise in their low bits and alike in their high ones. With the bytes of one place side by side (first
all lowest bytes, last all highest) Zstandard finds the latter; without, it finds next to nothing (Collet and
Kucherawy, RFC 8878; the regrouping is that of Blosc's shuffle).
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from ..errors import InternalError

SLOW_LINK = 40e6
"""Bytes a second: on a link slower than this, regrouping and Zstandard gain more time than they take."""

_LEVEL = 1
_LOCAL = threading.local()


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
    if not hasattr(_LOCAL, "compressor"):
        _LOCAL.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    if item > 1 and len(data) % item == 0:
        data = np.frombuffer(data, np.uint8).reshape(-1, item).T.tobytes()
    packed: bytes = _LOCAL.compressor.compress(data)
    return packed


def decompress(data: bytes | memoryview, item: int, bound: int) -> bytes | memoryview:
    """The bytes that `compress` took.

    Args:
        data: What it gave.
        item: As it was given.
        bound: The most bytes there may be.

    Raises:
        InternalError: It is damaged, or larger than it may be.
    """
    if not hasattr(_LOCAL, "decompressor"):
        _LOCAL.decompressor = zstandard.ZstdDecompressor()
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= bound:
            raise InternalError(f"a compressed chunk says that it holds {size} bytes, where {bound} remain.")
        plain: bytes = _LOCAL.decompressor.decompress(data)
    except zstandard.ZstdError as error:
        raise InternalError(f"a compressed chunk cannot be read: {error}.") from error
    if item > 1 and len(plain) % item == 0:
        return memoryview(np.ascontiguousarray(np.frombuffer(plain, np.uint8).reshape(item, -1).T).reshape(-1).data)
    return plain
