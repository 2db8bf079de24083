"""Memory that is free goes back to the system when a server rests.

The C library keeps what threads have freed, in an arena for every few of them, each at its own highest mark: after a
busy hour that is memory which nobody else on the machine can have.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time

_SECONDS = 10.0
"""Between two times at least."""


class Rest:
    """Gives free memory back, now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0.0

    def __call__(self) -> None:
        """To be called when nothing is at work."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < _SECONDS:
                return
            self._last = now
        with contextlib.suppress(OSError, AttributeError):  # not the GNU C library
            ctypes.CDLL(None).malloc_trim(0)
