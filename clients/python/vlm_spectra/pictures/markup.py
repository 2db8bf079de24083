"""HTML: documents that load nothing, and text that stays text.

Whatever comes from a prompt or a model is escaped: in markup by `html.escape`, in a script's data by writing `<`, `>`
and `&` as escapes of JavaScript.
"""

from __future__ import annotations

import base64
import io
import json
import os
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import whole_file

MAX_SIDE = 1280
"""Images are reduced to this many pixels along the longer side before they go into a page."""


def asset(name: str) -> str:
    """A style sheet or script of this package."""
    return (files("vlm_spectra.pictures") / "assets" / name).read_text("utf-8")


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; `style` comes after the styles that all pages share."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{asset('page.css')}{style}</style></head><body>{body}</body></html>\n"
    )


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page; the file appears whole or not at all.

    Raises:
        InvalidInputError: It cannot be written there.
    """
    write_whole(path, page.encode("utf-8", errors="backslashreplace"), "page")


def write_whole(path: str | os.PathLike[str], data: bytes, what: str) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path: Where.
        data: Its bytes.
        what: What to call it in an error.

    Raises:
        InvalidInputError: It cannot be written there.
    """
    with whole_file(path, what) as temporary:
        Path(temporary).write_bytes(data)


def script_json(data: Any) -> str:
    """JSON that may stand inside a script element, whatever texts it holds."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """A token as one sees it: spaces at its ends and line breaks have signs."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    inner = shown.strip(" ")
    if not inner:
        return "·" * len(shown) or "∅"
    start = shown.index(inner)
    return "·" * start + inner + "·" * (len(shown) - start - len(inner))


def data_uri(picture: Image.Image) -> str:
    """An image as an address that holds it, reduced to `MAX_SIDE`."""
    if max(picture.size) > MAX_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    kind = "PNG" if picture.size[0] * picture.size[1] <= 500_000 else "JPEG"
    picture.save(buffer, format=kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
