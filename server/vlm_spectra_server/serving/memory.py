"""How the C library holds what a server's process gives back.

glibc gives each busy thread an arena, and an arena keeps what was freed in it. The front has some sixty threads that do
little in Python at a time: a few arenas serve them as well, and its memory stays what it holds (mallopt(3)).
"""

from __future__ import annotations

import contextlib
import ctypes

ARENAS = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""As in glibc's malloc.h."""


def few_arenas() -> None:
    """Keep to a few arenas, where the C library is glibc. For the front alone, and before its threads are started."""
    _tell(_M_ARENA_MAX, ARENAS)


def keep_room() -> None:
    """Keep the room of a few messages of 1 MiB, where the C library is glibc, instead of asking the system for each.

    For a process that passes streams on: without it half of its time goes into fresh pages.
    """
    _tell(_M_MMAP_THRESHOLD, 4 << 20)
    _tell(_M_TRIM_THRESHOLD, 8 << 20)


def _tell(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(option, value)
