"""Trying again: what a server refused for now, and nothing that has begun to answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from ..errors import BusyError, SpectraError, UnavailableError, WorkerDiedError

LONGEST = 30.0
"""Seconds between two attempts at most."""


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
        seconds = min(error.retry_after * 1.5**self._tried, LONGEST) * random.uniform(0.75, 1.25)
        if self._end is not None and time.monotonic() + seconds > self._end:
            return False
        self._left -= 1
        self._tried += 1
        self._sleep(seconds)
        return True
