"""Which models a client may have loaded: never just any directory of the server, or any name of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath

from vlm_spectra.errors import InvalidInputError, ModelNotAllowedError, shown

from ..known_checkpoints import EMBEDDED, KNOWN

ANY = "*"
"""The pattern that allows everything."""


class Loadable:
    """The models that may be loaded: the embedded one, those named at the start, and what the operator allows.

    Args:
        patterns: Names, or patterns with `*`, `?` and `[...]`; the known checkpoints where there are none.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.names = [EMBEDDED, *(patterns or (each.repository for each in KNOWN))]

    def add(self, name: str) -> None:
        """Allow one more, by its name."""
        if name not in self.names:
            self.names.insert(0, name)

    def check(self, name: str) -> None:
        """Refuse what is not allowed, whether it exists or not.

        Raises:
            ModelNotAllowedError: It is not.
            InvalidInputError: It has characters that no log and no terminal should get.
        """
        if not name.isprintable():
            raise InvalidInputError(
                f"{shown(name)} is no model's name: it has characters that cannot be printed.", field="name"
            )
        climbs = ".." in PurePath(name).parts  # out of the directory that a pattern means
        for pattern in self.names:
            if name == pattern or pattern == ANY or (not climbs and fnmatchcase(name, pattern)):
                return
        some = ", ".join(self.names[:4]) + (", ..." if len(self.names) > 4 else "")
        raise ModelNotAllowedError(
            f"this server does not load {name!r}; it loads {some} (ListModels tells all), and what its operator "
            "allows with --allow-model.",
            field="name",
        )
