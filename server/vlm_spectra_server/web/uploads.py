"""Images that people upload: typed by content, re-encoded, named by us, kept in a bounded folder for a while.

What is stored is a PNG made from the decoded pixels, so nothing else that a file held (scripts, metadata, places) is
ever served again. A name is the SHA-256 of those bytes; no other name is ever looked up.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from vlm_spectra.errors import InvalidImageError, OverLimitError
from vlm_spectra.images import Picture

from ..serving.limits import Limits, over
from .problems import WebError

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
NAME = re.compile(r"[0-9a-f]{32}\.png")
FOLDER = "vlm-spectra-web-"
PIECE = 1 << 18
"""Bytes of an image that are read at a time."""


@dataclass(frozen=True)
class UploadLimits:
    """What the folder takes.

    Attributes:
        file_bytes: One upload.
        pixels: One image.
        folder_bytes: All images together; the least recently used go first.
        files: How many.
        seconds: How long an image stays after it was last used.
    """

    file_bytes: int = Limits.one_image_bytes
    pixels: int = Limits.image_pixels
    folder_bytes: int = Limits.image_bytes
    files: int = 500
    seconds: float = 3600.0

    @classmethod
    def of(cls, limits: Limits) -> UploadLimits:
        """As a server's settings have them for images."""
        return cls(limits.one_image_bytes, limits.image_pixels, limits.image_bytes)


def too_large(what: str, limit: str, allowed: int, asked: int) -> WebError:
    """The refusal of an upload; the arguments are those of `over`."""
    refusal = over(OverLimitError, limit, allowed, asked, what, "file")
    return WebError(refusal.message, 413, "TOO_LARGE", refusal.field, refusal.metadata)


class Uploads:
    """The folder, which goes when the app does.

    Args:
        gallery: Examples that are there from the start, by name.
        limits: What it takes.
    """

    def __init__(self, gallery: dict[str, Path], limits: UploadLimits) -> None:
        self.gallery, self.limits = gallery, limits
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        self._used: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def add(self, data: bytes) -> tuple[str, tuple[int, int]]:
        """Take an upload; its name and its size in pixels.

        Raises:
            WebError: It is too large, or no image of a kind that is taken.
            InvalidImageError: It is damaged, or has too many pixels.
            OSError: The disk is full; nothing of it stays.
        """
        if len(data) > self.limits.file_bytes:
            raise too_large("the file has", "one_image_bytes", self.limits.file_bytes, len(data))
        png, size = self._encoded(data)
        if len(png) > self.limits.folder_bytes:
            raise too_large("the image, as it is kept, has", "image_bytes", self.limits.folder_bytes, len(png))
        name = f"{hashlib.sha256(png).hexdigest()[:32]}.png"
        with self._lock:
            self._forget(len(png))
            if not (self.folder / name).is_file():
                self._write(name, png)
            self._used[name] = (time.monotonic(), len(png))
        return name, size

    def _write(self, name: str, data: bytes) -> None:
        """Write an image whole or not at all."""
        if not self.folder.is_dir():  # systems clear what is some days old from where it lies
            self.folder = Path(tempfile.mkdtemp(prefix=FOLDER))
            self._used.clear()
        path = self.folder / name
        try:
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _encoded(self, data: bytes) -> tuple[bytes, tuple[int, int]]:
        try:
            with Image.open(io.BytesIO(data), formats=KINDS) as opened:
                pixels = opened.width * opened.height
        except Image.DecompressionBombError as bomb:
            pixels = int(re.findall(r"\d+", str(bomb))[0])
        except Exception as error:
            raise WebError(
                "this is not an image that is taken: PNG, JPEG, WebP, GIF and BMP are, by what is in the file.",
                415, "NOT_AN_IMAGE", "file",
            ) from error  # fmt: skip
        if pixels > self.limits.pixels:
            raise too_large("the image has", "image_pixels", self.limits.pixels, pixels)
        try:
            picture = Picture.of(data)
            buffer = io.BytesIO()
            picture.pixels.save(buffer, format="PNG", compress_level=1)
        except InvalidImageError:
            raise
        except Exception as error:
            raise InvalidImageError("the image is damaged.", field="file") from error
        return buffer.getvalue(), picture.size

    def path(self, name: str) -> Path:
        """Where an image lies.

        Raises:
            WebError: There is none of that name, or no longer.
        """
        if name in self.gallery:
            return self.gallery[name]
        with self._lock:
            self._forget(0)
            if NAME.fullmatch(name) and name in self._used:
                self._used[name] = (time.monotonic(), self._used[name][1])
                return self.folder / name
        raise WebError("that image is not here, or no longer: upload it again.", 404, "NO_SUCH_IMAGE", "filename")

    def read(self, name: str) -> bytes:
        """The bytes of an image.

        Raises:
            WebError: There is none of that name, or no longer.
        """
        return b"".join(self.pieces(name)[1])

    def pieces(self, name: str) -> tuple[int, Iterator[bytes]]:
        """How many bytes an image has, and those: read when they are wanted, so that who takes long holds few.

        Raises:
            WebError: There is none of that name, or no longer.
        """
        try:
            file = self.path(name).open("rb")
        except FileNotFoundError:
            raise WebError("that image has just gone: upload it again.", 404, "NO_SUCH_IMAGE", "filename") from None

        def read() -> Iterator[bytes]:
            with file:
                while piece := file.read(PIECE):
                    yield piece

        return os.fstat(file.fileno()).st_size, read()

    def forget(self) -> None:
        """Remove what has not been used for long."""
        with self._lock:
            self._forget(0)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _forget(self, coming: int) -> None:
        """Remove what is too old, and the least recently used until `coming` more bytes fit."""
        now, limits = time.monotonic(), self.limits
        oldest = sorted(self._used, key=lambda name: self._used[name][0])
        total, count = sum(size for _, size in self._used.values()), len(oldest)
        for name in oldest:
            used, size = self._used[name]
            full = coming > 0 and (total + coming > limits.folder_bytes or count >= limits.files)
            if now - used <= limits.seconds and not full:
                break
            del self._used[name]
            (self.folder / name).unlink(missing_ok=True)
            total, count = total - size, count - 1
