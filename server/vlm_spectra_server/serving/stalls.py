"""Calls that their clients let stand: the request never comes, or nothing is read of the answer."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

log = logging.getLogger("vlm_spectra.server")

_LOOK_AGAIN = 0.5
"""Seconds between two looks, at most."""


class Stalls:
    """Ends calls that wait for their client too long: each holds a thread of the server's.

    Args:
        seconds: How long one may wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._waiting: dict[int, tuple[float, grpc.ServicerContext]] = {}
        self._numbers = itertools.count()
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._watch, name="stalls", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    @contextmanager
    def waiting(self, context: grpc.ServicerContext, seconds: float | None = None) -> Iterator[None]:
        """Inside, a call waits for its client, for so many seconds at most."""
        number = next(self._numbers)
        self._waiting[number] = (time.monotonic() + (self.seconds if seconds is None else seconds), context)
        try:
            yield
        finally:
            self._waiting.pop(number, None)

    def _watch(self) -> None:
        while not self._closed.wait(min(_LOOK_AGAIN, self.seconds / 4)):
            self._end()  # by itself: between two looks nothing here holds a call, or what it captured

    def _end(self) -> None:
        now = time.monotonic()
        for number, (end, context) in list(self._waiting.items()):
            if now > end and self._waiting.pop(number, None):
                log.warning("a call of %s was ended: its client let it stand", context.peer())
                context.cancel()
