"""pandas, for results that make a table of themselves."""

from __future__ import annotations

from typing import Any

from .errors import MissingExtraError


def pandas() -> Any:
    """The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import pandas as module
    except ImportError as error:
        raise MissingExtraError("to_dataframe() needs pandas, which is not installed: pip install pandas.") from error
    return module
