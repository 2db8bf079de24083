"""What is said to people: of errors, and with text that came from elsewhere."""

from __future__ import annotations

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file has no room."""


def printable(text: str) -> str:
    """The text as a terminal may have it: what is not printable is written as in a Python string."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def reason(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines()]
    return ": ".join([type(error).__name__, *list(filter(None, lines))[:1]])
