"""Parts of a document that the tests write: `SPECTRA_WRITE_DOCS=1` writes them, otherwise they must be current."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

FAMILIES = Path(__file__).parents[1] / "docs" / "families.md"


def figure(error: float) -> str:
    """An error as the next power of ten above it: what can be said on every machine."""
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error))}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows(name: str) -> dict[str, list[str]]:
    """The rows of a table in docs/families.md as they stand, by their first cell, which is a name in backticks.

    What the installed transformers does not let us measure stays as it was measured with another.
    """
    written = FAMILIES.read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0]
    found = [line[2:-2].split(" | ") for line in written.splitlines() if line.startswith("| `")]
    return {row[0]: row for row in found}


def check(name: str, text: str) -> None:
    """Hold a part of docs/families.md to `text`, or write it there; figures may differ by a power of ten."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    document = FAMILIES.read_text()
    before, rest = document.split(begin)
    written, after = rest.split(end)
    if os.environ.get("SPECTRA_WRITE_DOCS"):
        FAMILIES.write_text(before + begin + text + end + after)
        return
    assert _masked(written) == _masked(text), "docs/families.md is out of date: SPECTRA_WRITE_DOCS=1 writes it"
    pairs = zip(_figures(written), _figures(text), strict=True)
    assert all(ours <= 10.5 * max(theirs, 1e-8) for theirs, ours in pairs), "figures in docs/families.md are too good"


def _masked(text: str) -> str:
    return re.sub(r"\| (?:1e-\d+|0)(?= \|)", "| n", text)


def _figures(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"\| (1e-\d+|0)(?= \|)", text)]
