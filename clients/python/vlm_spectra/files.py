"""Files that are read up to a bound, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InvalidInputError, shown

SMALL = 2**24
"""The most bytes of a file that a person writes: of tokens, settings, certificates."""

_PIECE = 2**20


def contents(path: str | os.PathLike[str], most: int = SMALL) -> bytes:
    """The bytes of a file; of a pipe or a device too, some of which have no end.

    Raises:
        OSError: It cannot be read, or has more than `most` bytes.
    """
    pieces, left = [], most
    with open(path, "rb") as file:
        while piece := file.read(min(left + 1, _PIECE)):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", os.fspath(path))
    return b"".join(pieces)


@contextmanager
def whole_file(path: str | os.PathLike[str], what: str) -> Iterator[str]:
    """Where to write a file that is put in its place at the end of the block; until then an earlier one stays.

    Args:
        path: Where it is to be; a link is followed.
        what: What to call it in an error.

    Raises:
        InvalidInputError: It cannot be written there.
    """
    try:
        name = os.fspath(path)
        target, temporary = Path(os.path.realpath(name)), ""
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"the {what} cannot be written to {shown(path)}: that is no path.", field="path"
        ) from None
    refusal = f"the {what} cannot be written to {shown(name)}"
    if not target.parent.is_dir():
        raise InvalidInputError(f"{refusal}: there is no directory {shown(str(Path(name).parent))}.", field="path")
    if target.is_dir() or (target.exists() and not target.is_file()):
        raise InvalidInputError(
            f"{refusal}: that is {'a directory' if target.is_dir() else 'a device, not a file'}.", field="path"
        )
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:64]}.", suffix=".part")
        os.close(handle)
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own mode would hide the file from everyone else
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInputError(f"{refusal}: {reason}.", field="path") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)
