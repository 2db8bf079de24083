"""Images: what a caller may give, the pixels a model gets, and the bytes that cross the wire.

An image is an upright RGB picture: its EXIF orientation is applied and transparency is laid on white, here, so that a
model in process and one behind a server see the same pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from functools import cached_property
from typing import Any, Union

import numpy as np
from PIL import Image, ImageOps

from .errors import InvalidImageError, shown
from .files import contents

MAX_PIXELS = 64_000_000
"""The largest image that is decoded; an 8K screenshot has 33 million pixels."""

MAX_BYTES = 2**31 - 1
"""The largest image file that is read; gRPC has no larger message."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Files that are read, as Pillow calls them. Some of the others would start programs, Ghostscript for EPS."""

ImageLike = Union[Image.Image, str, "os.PathLike[str]", bytes, "np.ndarray[Any, Any]"]
"""A PIL image, a path, the bytes of an image file, or an array [height, width, 3] of uint8."""


class Picture:
    """One image, decoded or encoded when first needed.

    Attributes:
        pixels: The upright RGB image.
        data: An image file's bytes: those given, else a PNG of the pixels.
        sha256: The SHA-256 of `data`, in hexadecimal.
        size: Width and height in pixels, upright.
    """

    def __init__(self, *, image: Image.Image | None = None, data: bytes | None = None) -> None:
        self._image = image
        self._data = data

    @classmethod
    def of(cls, image: ImageLike | Picture) -> Picture:
        """The picture behind whatever a caller gave.

        Raises:
            InvalidImageError: It is no image, is damaged, or has more than `MAX_PIXELS` pixels.
        """
        if isinstance(image, Picture):
            return image
        if isinstance(image, Image.Image):
            picture = cls(image=image)
        elif isinstance(image, bytes | bytearray | memoryview):
            picture = cls(data=bytes(image))
        elif isinstance(image, str | os.PathLike):
            picture = cls(data=_read(image))
        elif isinstance(image, np.ndarray):
            picture = cls(image=_from_array(image))
        else:
            raise InvalidImageError(
                f"an image is a PIL image, a path, the bytes of an image file or an array [height, width, 3] of uint8, "
                f"not {type(image).__name__}.",
                field="image",
            )
        _ = picture.pixels
        return picture

    @cached_property
    def pixels(self) -> Image.Image:
        """The upright RGB image."""
        image = self._image if self._image is not None else _open(self._data or b"")
        _check_size(image.width * image.height, f"{image.width} x {image.height}")
        if image.mode in ("I", "F"):
            raise InvalidImageError(
                f"an image of mode {image.mode} holds numbers that do not say which is white; bring them to 0 to 255 "
                "first (mode L, or an array [height, width, 3] of uint8).",
                field="image",
            )
        try:
            return _rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # damage makes Pillow raise whatever it meets
            raise InvalidImageError(f"the image is damaged: {error}.", field="image") from error

    @cached_property
    def data(self) -> bytes:
        """The bytes of an image file."""
        if self._data is not None:
            return self._data
        buffer = io.BytesIO()
        self.pixels.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of `data`, 64 hexadecimal digits."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.size

    def __repr__(self) -> str:
        return f"Picture({self.size[0]}x{self.size[1]})"


def _read(path: str | os.PathLike[str]) -> bytes:
    name = os.fspath(path)
    if re.match(r"data:|[A-Za-z][\w+.-]+://", name):
        raise InvalidImageError(
            f"{shown(name)} is an address, not a path: fetch the image first, and give its bytes.", field="image"
        )
    try:
        return contents(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidImageError(f"the image {shown(name)} cannot be read: {why}.", field="image") from error


def _open(data: bytes) -> Image.Image:
    """Read an image file's header; the size is checked before any pixel is decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        _check_size(int(pixels.group()) if pixels else MAX_PIXELS + 1, "")
        raise
    except Exception as error:
        raise InvalidImageError(
            f"these {len(data)} bytes are not an image that can be read (PNG, JPEG, WebP, GIF, BMP and TIFF can).",
            field="image",
        ) from error


def _check_size(pixels: int, size: str) -> None:
    if pixels > MAX_PIXELS:
        size = f"{size} = {pixels:,}" if size else f"{pixels:,}"
        raise InvalidImageError(
            f"the image has {size} pixels; at most {MAX_PIXELS:,} are possible: make it smaller first "
            "(the processor would reduce it anyway).",
            field="image",
        )
    if pixels == 0:
        raise InvalidImageError("the image has no pixels.", field="image")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut off all above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InvalidImageError(
            f"an image array has shape [height, width, 3] and dtype uint8, not {list(array.shape)} {array.dtype}.",
            field="image",
        )
    return Image.fromarray(array)
