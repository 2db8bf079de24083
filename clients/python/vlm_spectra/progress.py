"""How far a call is: a bar for what takes longer than a second, and whom the caller wants to be told.

`TQDM_DISABLE=1` in the environment turns all bars off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in a notebook without ipywidgets tqdm says so, and its bars are plain text
    from tqdm.auto import tqdm

Report = Callable[[str, int, int], None]
"""Told the phase ("forward", "generating" or "analysing"), the units done, and in all (0 where unknown); and while a
call waits for its turn on a server, about once a second "queued", its place (1 is next), and how many wait."""


class Bar:
    """A bar that appears after a second and leaves nothing behind.

    Args:
        title: What is going on; where empty, there is never a bar.
        report: Told too, where given.
    """

    def __init__(self, title: str, report: Report | None = None) -> None:
        self._title = title
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
            queued = phase == "queued"
            place = f" (place {done} of {total} in the queue)" if queued else ""
            self._bar.set_description_str(f"{self._title}{place}", refresh=False)
            self._bar.total, self._bar.n = (None, 0) if queued else (total or None, done)
            self._bar.update(0)
        if self._report is not None:
            self._report(phase, done, total)

    def close(self) -> None:
        """It is over."""
        if self._bar is not None:
            self._bar.close()
