"""Trying again: what a server refused for now, and nothing that has begun to answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from ..errors import BusyError, SpectraError, UnavailableError, WorkerDiedError

LONGEST = 30.0
"""Seconds between two attempts at most."""
_STEPS = 20
"""After so many attempts the wait grows no more: it is long since the longest, and a number can be too large."""
_SHORTEST = 0.001
"""Seconds of an attempt for which no time is left: gRPC itself then says so."""


class Retries:
    """The attempts of one call.

    Args:
        number: How often it may be tried again.
        timeout: Seconds that all attempts may take together; None for no limit.
        sleep: Waits so many seconds.
    """

    def __init__(self, number: int, timeout: float | None, sleep: Callable[[float], object] = time.sleep) -> None:
        self._left, self._sleep = number, sleep
        self._end = None if timeout is None else time.monotonic() + timeout
        self._tried, self._deaths = 0, 0

    @property
    def left(self) -> float | None:
        """Seconds that are left of the timeout, for the next attempt; None for no limit."""
        return None if self._end is None else max(self._end - time.monotonic(), _SHORTEST)

    def wait(self, error: SpectraError) -> bool:
        """Wait until trying again makes sense; False where it does not, at once.

        It does where the server said when (`RetryInfo`): it is busy, or replaces a worker. A request whose worker died
        may have killed it: it is tried again once, or it would kill one worker after the other, for everybody.
        """
        if self._left <= 0 or error.retry_after is None or not isinstance(error, BusyError | UnavailableError):
            return False
        self._deaths += isinstance(error, WorkerDiedError)
        if self._deaths > 1:
            return False
        seconds = min(error.retry_after * 1.5 ** min(self._tried, _STEPS), LONGEST) * random.uniform(0.75, 1.25)
        if self._end is not None and time.monotonic() + seconds > self._end:
            return False
        self._left -= 1
        self._tried += 1
        self._sleep(seconds)
        return True
