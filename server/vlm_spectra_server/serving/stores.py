"""What the front keeps for a while: images by hash, finished captures by id. Both are bounded."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vlm_spectra.errors import CaptureNotFoundError, ImageNotFoundError, InvalidInputError, OverLimitError
from vlm_spectra.v1 import inputs_pb2, tensor_pb2

from .host import ModelHost
from .limits import Limits, check_image, over
from .sending import Sending
from .turns import Job

log = logging.getLogger("vlm_spectra.server")

_SHORTEST_LOOK = 0.05
"""Seconds between two looks at what is kept, at least."""
_AFTER_FAULT = 1.0
"""Seconds until the next look after one that failed."""
_LEAST = 1024
"""Bytes that an image counts for at least: to be kept at all takes some."""


class _Image(NamedTuple):
    data: bytes
    pixels: int

    @property
    def size(self) -> int:
        """Bytes that it counts for."""
        return max(len(self.data), _LEAST)


class ImageStore:
    """Encoded images by the SHA-256 of their bytes; the least recently used leave.

    Args:
        limits: How much it holds, and of one image.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.bound = limits, limits.image_bytes
        self._images: OrderedDict[str, _Image] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def add(self, image: inputs_pb2.Image, wanted: Iterable[str] = ()) -> None:
        """Take an image.

        Args:
            image: The image.
            wanted: The hashes of all images that its request needs at once.

        Raises:
            InvalidInputError: Its hash is not that of its bytes.
            InvalidImageError: It is too large.
            OverLimitError: All that the request needs would not stay here together.
        """
        pixels = check_image(self.limits, image.data)
        if hashlib.sha256(image.data).hexdigest() != image.sha256:
            raise InvalidInputError("an image's SHA-256 is not that of its bytes.", field="images")
        with self._lock:
            others = {each for each in wanted if each in self._images and each != image.sha256}
            new = _Image(image.data, pixels)
            together = new.size + sum(self._images[each].size for each in others)
            if together > self.bound:
                raise over(OverLimitError, "image_bytes", self.bound, together, "the request's images have", "images")
            for each in others:
                self._images.move_to_end(each)
            if image.sha256 not in self._images:
                self._images[image.sha256] = new
                self._size += new.size
            while self._size > self.bound and len(self._images) > 1:
                _, dropped = self._images.popitem(last=False)
                self._size -= dropped.size

    def missing(self, hashes: Iterable[str]) -> list[str]:
        """Those that are not here."""
        with self._lock:
            return [each for each in dict.fromkeys(hashes) if each not in self._images]

    def get(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Images by hash.

        Raises:
            ImageNotFoundError: Some are not here.
            OverLimitError: They have too many pixels, each as often as it is named.
        """
        times = Counter(hashes)
        hashes = list(times)
        with self._lock:
            absent = [each for each in hashes if each not in self._images]
            if absent:
                raise ImageNotFoundError(
                    f"{len(absent)} of the images are not on the server; send them with Prepare.",
                    metadata={"sha256": ",".join(absent)},
                )
            pixels = sum(self._images[each].pixels * times[each] for each in hashes)
            most = self.limits.images_pixels
            if pixels > most:
                raise over(OverLimitError, "images_pixels", most, pixels, "the request's images have", "images")
            for each in hashes:
                self._images.move_to_end(each)
            return {each: self._images[each].data for each in hashes}


@dataclass(frozen=True)
class StoredCapture:
    """A capture: its job, at work or finished, with the memory that holds its tensors.

    Attributes:
        job: The job.
        host: The model's host.
        sending: How it was sent first.
        linger: Seconds that it goes on without a reader.
        owner: The name of the token that made it; no other can read it.
    """

    job: Job
    host: ModelHost
    sending: Sending
    linger: int
    owner: str = ""

    @property
    def size(self) -> int:
        """Bytes of tensors."""
        return sum(header.byte_count for header, _ in list(self.job.tensors.values()))  # more may come meanwhile


class CaptureStore:
    """Captures by id, finished ones for a bounded time, size and number; the oldest leave.

    As long as there are any, a thread lets go those whose time is over.

    Args:
        bound: Bytes in all.
        seconds: How long each stays once it has ended.
        number: The most captures: each holds file descriptors.
    """

    def __init__(self, bound: int, seconds: float, number: int = 200) -> None:
        self.bound, self.seconds, self.number = bound, seconds, number
        self._captures: OrderedDict[str, StoredCapture] = OrderedDict()
        self._lock = threading.Lock()
        self._watched, self._closed = False, threading.Event()

    def add(self, capture_id: str, capture: StoredCapture) -> None:
        """Keep a capture."""
        with self._lock:
            self._captures[capture_id] = capture
            self._expire()
            watch, self._watched = not self._watched, True
        if watch:
            threading.Thread(target=self._watch, name="captures", daemon=True).start()

    def close(self) -> None:
        """Forget all captures."""
        self._closed.set()
        with self._lock:
            self._captures.clear()

    def _watch(self) -> None:
        """Let captures go at their time, until there are none; what has not ended stays `seconds` more at least."""
        wait: float | None = 0.0
        while wait is not None and not self._closed.wait(wait):
            try:
                wait = self._look()
            except Exception:
                log.exception("captures could not be let go at their time; the next look follows")
                wait = _AFTER_FAULT

    def _look(self) -> float | None:
        """Let go what is late; the seconds until the next look, None where nothing is left to look at."""
        with self._lock:
            self._expire()
            self._watched = bool(self._captures)
            if not self._watched:
                return None
            ends = [capture.job.feed.ended_at for capture in self._captures.values()]
        now = time.monotonic()
        return max(min(now if end is None else end for end in ends) + self.seconds - now, _SHORTEST_LOOK)

    def pop(self, capture_id: str, owner: str = "") -> StoredCapture | None:
        """Forget a capture; None where there is none of this owner's."""
        with self._lock:
            found = self._captures.get(capture_id)
            return self._captures.pop(capture_id) if found is not None and found.owner == owner else None

    def find(self, capture_id: str) -> StoredCapture | None:
        """A capture, or None where there is none."""
        with self._lock:
            return self._captures.get(capture_id)

    def make_room(self, missing: int, client: str | None = None) -> None:
        """Drop the oldest finished captures, so many bytes of them; of one client alone where it is named."""
        dropped = []
        with self._lock:
            for capture_id, capture in list(self._captures.items()):
                if missing <= 0:
                    break
                if capture.job.feed.ended and client in (None, capture.job.client):
                    missing -= capture.size
                    dropped.append(self._captures.pop(capture_id))

    def get(self, capture_id: str, owner: str = "") -> StoredCapture:
        """A capture of this owner's.

        Raises:
            CaptureNotFoundError: It has expired, never existed, or is another's.
        """
        with self._lock:
            self._expire()
            found = self._captures.get(capture_id)
            if found is None or found.owner != owner:
                raise CaptureNotFoundError(
                    f"the server holds no capture {capture_id[:80]!r}: finished captures stay for {self.seconds:g} s "
                    f"(kept_seconds), at most {self.number} of them and {self.bound / 1e9:g} GB in all "
                    "(kept_captures_gb); run it again.",
                    field="capture_id",
                    metadata={"kept_seconds": f"{self.seconds:g}", "kept_captures_gb": f"{self.bound / 1e9:g}"},
                )
            return found

    def tensor(self, reference: tensor_pb2.CaptureReference, owner: str, room: int, most: int) -> tensor_pb2.Tensor:
        """An activation that an intervention refers to, by value.

        Args:
            reference: Which.
            owner: Who asks.
            room: Bytes that it may have.
            most: Bytes that all of a request may.

        Raises:
            OverLimitError: It has more.
            CaptureNotFoundError: The capture has expired.
            InvalidInputError: It has no such hook.
        """
        capture = self.get(reference.capture_id, owner)
        if not capture.job.feed.succeeded:
            raise InvalidInputError(
                f"the capture {reference.capture_id!r} is not finished, or failed; wait for it first.", field="value"
            )
        tensors = capture.job.tensors.values()
        for header, memory in tensors:
            if header.name == reference.hook:
                if header.byte_count > room:
                    asked = most - room + header.byte_count
                    what = "with what its references mean the request has"
                    raise over(OverLimitError, "message_bytes", most, asked, what, "interventions")
                return tensor_pb2.Tensor(dtype=header.dtype, shape=header.shape, data=bytes(memory))
        names = ", ".join(header.name for header, _ in list(tensors)[:3])
        raise InvalidInputError(
            f"the capture {reference.capture_id!r} has no {reference.hook!r}; it has {names}, ...", field="value"
        )

    def _expire(self) -> None:
        now = time.monotonic()
        size = sum(capture.size for capture in self._captures.values())
        for capture_id, capture in list(self._captures.items()):
            ended_at = capture.job.feed.ended_at
            if ended_at is None:
                continue
            late = now - ended_at > self.seconds
            if late or size > self.bound or len(self._captures) > self.number:
                size -= capture.size
                del self._captures[capture_id]
