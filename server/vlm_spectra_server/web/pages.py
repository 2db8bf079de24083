"""The pages of logit lenses, kept for a while, and the same readings as files to take home."""

from __future__ import annotations

import csv
import io
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import vlm_spectra as vs
from vlm_spectra.arrays import to_numpy
from vlm_spectra.pictures.lens_page import lens_page

from .problems import WebError

Kind = Literal["html", "json", "csv", "png"]
MEDIA: dict[Kind, str] = {
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "png": "image/png",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


@dataclass(frozen=True)
class _Kept:
    made: float
    lens: vs.LogitLens
    page: str
    token: str


class Pages:
    """Lenses and their pages, for a while; the oldest go first.

    Args:
        own: The most of one token.
        letters: The most of all pages together.
        seconds: How long each stays.
    """

    def __init__(self, own: int = 24, letters: int = 256_000_000, seconds: float = 1800.0) -> None:
        self._pages: OrderedDict[str, _Kept] = OrderedDict()
        self._own, self._letters, self._seconds = own, letters, seconds
        self._lock = threading.Lock()

    def keep(self, lens: vs.LogitLens, token: str = "") -> str:
        """Keep a lens for who has a token; the address of its page."""
        page, name = lens_page(lens), secrets.token_urlsafe(12)
        lens = _without_images(lens)
        self.forget()
        with self._lock:
            self._pages[name] = _Kept(time.monotonic(), lens, page, token)
            mine = [each for each, kept in self._pages.items() if kept.token == token]
            for each in mine[: -self._own]:
                del self._pages[each]
            while sum(len(kept.page) for kept in self._pages.values()) > self._letters and len(self._pages) > 1:
                self._pages.popitem(last=False)
        return f"/api/pages/{name}"

    def forget(self) -> None:
        """Let go those whose time is over."""
        with self._lock:
            for name, kept in list(self._pages.items()):
                if time.monotonic() - kept.made > self._seconds:
                    del self._pages[name]

    def get(self, name: str) -> str:
        """A page.

        Raises:
            WebError: There is none, or no longer.
        """
        return self._found(name)[1]

    def file(self, name: str, kind: Kind) -> bytes:
        """A lens as a file: its page, its readings as JSON or CSV, or a picture of the last positions.

        Raises:
            WebError: There is none, or no longer.
        """
        lens, page = self._found(name)
        makers: dict[Kind, Callable[[], bytes]] = {
            "html": lambda: page.encode("utf-8", errors="backslashreplace"),
            "json": lambda: as_json(lens),
            "csv": lambda: as_csv(lens),
            "png": lambda: as_png(lens),
        }
        return makers[kind]()

    def _found(self, name: str) -> tuple[vs.LogitLens, str]:
        self.forget()
        kept = self._pages.get(name)
        if kept is None:
            raise WebError("that page is not here, or no longer: run the analysis again.", 404, "NO_SUCH_PAGE")
        return kept.lens, kept.page


def _without_images(lens: vs.LogitLens) -> vs.LogitLens:
    """A lens as its files need it: decoded, images take far more than all else of it, and the page has its own copy."""
    prompts = tuple(replace(prompt, images=()) for prompt in lens.inputs.prompts)
    return replace(lens, inputs=replace(lens.inputs, prompts=prompts))


def as_json(lens: vs.LogitLens) -> bytes:
    """All readings: for each layer and position the most probable tokens, the entropy, how far the last layer is."""
    probs, entropy, distance = (to_numpy(each)[:, 0].tolist() for each in (lens.probs, lens.entropy, lens.kl_to_final))
    found = {
        "hook": lens.hook,
        "layers": lens.layers,
        "positions": lens.positions[0],
        "tokens": _labels(lens),
        "readings": [
            [
                [{"text": text, "prob": prob} for text, prob in zip(texts, shares, strict=True)]
                for texts, shares in zip(lens.tokens[layer][0], probs[layer], strict=True)
            ]
            for layer in range(len(lens.layers))
        ],
        "entropy": entropy,
        "kl_to_final": distance,
    }
    return json.dumps(found).encode("ascii")


def as_csv(lens: vs.LogitLens) -> bytes:
    """A line for each layer, position and rank; a text that a spreadsheet would take for a formula gets a quote."""
    probs, entropy = to_numpy(lens.probs)[:, 0].tolist(), to_numpy(lens.entropy)[:, 0].tolist()
    labels, file = _labels(lens), io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["layer", "position", "token", "rank", "next", "probability", "entropy"])
    for i, layer in enumerate(lens.layers):
        for j, position in enumerate(lens.positions[0]):
            for rank, text in enumerate(lens.tokens[i][0][j]):
                row = [layer, position, _safe(labels[j]), rank, _safe(text), probs[i][j][rank], entropy[i][j]]
                writer.writerow(row)
    return file.getvalue().encode("utf-8", errors="backslashreplace")


def as_png(lens: vs.LogitLens) -> bytes:
    """The last positions as a table, each cell with its most probable token."""
    file = io.BytesIO()
    vs.pictures.lens(lens).to_image(2.0).save(file, "PNG")
    return file.getvalue()


def _labels(lens: vs.LogitLens) -> list[str]:
    labels = lens.inputs.token_labels[0]
    return [labels[position] if position < len(labels) else "" for position in lens.positions[0]]


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text
