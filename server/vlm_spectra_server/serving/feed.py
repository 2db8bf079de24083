"""What happens to a request, as a list that any number of readers follow from its beginning."""

from __future__ import annotations

import threading
import time
from typing import Any

ENDS = ("done", "error")
"""The kinds of event after which nothing comes."""


class Feed:
    """Events in order. A reader that comes late, or a second time, misses nothing.

    Attributes:
        ended_at: When the last event came, by `time.monotonic()`; None before.
    """

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self.ended_at: float | None = None
        self._changed = threading.Condition()

    def put(self, kind: str, content: Any = None) -> None:
        """Add an event; nothing is added after the end."""
        with self._changed:
            if not self.ended:
                self._events.append((kind, content))
                if kind in ENDS:
                    self.ended_at = time.monotonic()
                self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the last event has come."""
        return self.ended_at is not None

    @property
    def succeeded(self) -> bool:
        """Whether it ended, and well."""
        return bool(self._events) and self._events[-1][0] == "done"

    def get(self, number: int, seconds: float) -> tuple[str, Any] | None:
        """The event of a number, waiting for it; None where it does not come in time."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > number, seconds)
            return self._events[number] if len(self._events) > number else None
