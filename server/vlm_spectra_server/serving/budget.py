"""Host memory for captures: how much there is in all, who holds how much, and when some comes free."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any


class Budget:
    """Bytes of captures on this host. What is taken is given back when the memory itself is let go.

    Args:
        bound: Bytes in all.
        share: The part of it that one client may hold.

    Attributes:
        make_room: Called with a number of bytes that are missing, and the client whose part they are missing of, or
            None for the whole; drops what is only kept for convenience.
        freed: Called, in no particular thread, after memory has come free.
    """

    def __init__(self, bound: int, share: float = 0.5) -> None:
        self.bound, self.client_bound = bound, int(bound * share)
        self.make_room: Callable[[int, str | None], None] = lambda missing, client: None
        self.freed: list[Callable[[], None]] = []
        self._held: Counter[str] = Counter()
        self._lock = threading.RLock()  # the garbage collector may give back in the middle of what the lock covers

    @property
    def held(self) -> int:
        """Bytes that are taken."""
        return self._held.total()

    def take(self, client: str, size: int) -> bool:
        """Take bytes for a client, if there are so many; a client that holds nothing always gets what the whole has."""
        with self._lock:
            mine = self._held[client]
        if mine and mine + size > self.client_bound:
            self.make_room(min(mine, mine + size - self.client_bound), client)
        with self._lock:
            missing = self.held + size - self.bound
        if missing > 0:
            self.make_room(missing, None)
        with self._lock:
            mine = self._held[client]
            if self.held + size > self.bound or (mine and mine + size > self.client_bound):
                return False
            self._held[client] += size
            return True

    def give_back_with(self, memory: Any, client: str, size: int) -> None:
        """Give bytes back once this object is gone."""
        weakref.finalize(memory, self.give_back, client, size).atexit = False

    def give_back(self, client: str, size: int) -> None:
        """Give bytes back."""
        with self._lock:
            self._held[client] -= size
            if self._held[client] <= 0:
                del self._held[client]
        self.look_again()

    def look_again(self) -> None:
        """Tell who waits for memory that some has come free, or can be made free."""
        for call in list(self.freed):
            call()
