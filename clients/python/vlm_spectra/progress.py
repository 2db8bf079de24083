"""How far a call is: a bar for what takes longer than a second, and whom the caller wants to be told.

`TQDM_DISABLE=1` in the environment turns all bars off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

Report = Callable[[str, int, int], None]
"""Told the phase ("forward", "generating" or "analysing"), the units done, and in all (0 where unknown)."""


class Bar:
    """A bar that appears after a second and leaves nothing behind.

    Args:
        title: What is going on; where empty, there is never a bar.
        report: Told too, where given.
    """

    def __init__(self, title: str, report: Report | None = None) -> None:
        self._bar: Any = tqdm(desc=title, delay=1.0, leave=False) if title else None
        self._report = report

    def show(self, phase: str, done: int, total: int) -> None:
        """So far it has come.

        Args:
            phase: What the units are of.
            done: Units done.
            total: Units in all; 0 where unknown.
        """
        if self._bar is not None:
            self._bar.total = total or None
            self._bar.n = done
            self._bar.update(0)
        if self._report is not None:
            self._report(phase, done, total)

    def close(self) -> None:
        """It is over."""
        if self._bar is not None:
            self._bar.close()
