"""What happens to a request, as a list that any number of readers follow from its beginning."""

from __future__ import annotations

import threading
from typing import Any

ENDS = ("done", "error")
"""The kinds of event after which nothing comes."""


class Feed:
    """Events in order. A reader that comes late, or a second time, misses nothing."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._changed = threading.Condition()

    def put(self, kind: str, content: Any = None) -> None:
        """Add an event; nothing is added after the end."""
        with self._changed:
            if not self.ended:
                self._events.append((kind, content))
                self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the last event has come."""
        return bool(self._events) and self._events[-1][0] in ENDS

    @property
    def succeeded(self) -> bool:
        """Whether it ended, and well."""
        return bool(self._events) and self._events[-1][0] == "done"

    def get(self, number: int, seconds: float) -> tuple[str, Any] | None:
        """The event of a number, waiting for it; None where it does not come in time."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > number, seconds)
            return self._events[number] if len(self._events) > number else None
