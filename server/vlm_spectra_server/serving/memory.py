"""How the C library holds what the front gives back.

glibc gives each busy thread an arena, and an arena keeps what was freed in it. The front has some sixty threads that do
little in Python at a time: a few arenas serve them as well, and its memory stays what it holds (mallopt(3)).
"""

from __future__ import annotations

import contextlib
import ctypes

ARENAS = 2
_M_ARENA_MAX = -8
"""As in glibc's malloc.h."""


def few_arenas() -> None:
    """Keep to a few arenas, where the C library is glibc. For the front alone, and before its threads are started."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, ARENAS)
