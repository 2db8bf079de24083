"""A progress bar for what takes longer than a second. `TQDM_DISABLE=1` in the environment turns all of them off."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


class Bar:
    """A bar that appears after a second and leaves nothing behind.

    Args:
        title: What is going on; where empty, there is never a bar.
    """

    def __init__(self, title: str) -> None:
        self._bar: Any = tqdm(desc=title, delay=1.0, leave=False) if title else None

    def show(self, done: int, total: int) -> None:
        """So far it has come.

        Args:
            done: Units done.
            total: Units in all; 0 where unknown.
        """
        if self._bar is not None:
            self._bar.total = total or None
            self._bar.n = done
            self._bar.update(0)

    def close(self) -> None:
        """It is over."""
        if self._bar is not None:
            self._bar.close()
