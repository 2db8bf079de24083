"""The logit-lens page: one self-contained HTML file, a table of layers by tokens beside the image and its patches.

The readings stand in the page as base64 of whole numbers (2,000 tokens of 28 layers with five readings each are about
2 MB), and the script keeps only the visible columns in the document. Layers run down from the last.
"""

from __future__ import annotations

import base64
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..inputs import ImageLayout, Inputs
from ..lens import LogitLens
from .colours import SCALES, colours, css, ink
from .markup import asset, data_uri, document, script_json, visible
from .panes import Pane, extent, numbered, panes, pixels

FULL = 65535
"""Probabilities, entropies and divergences are stored in so many steps."""
SHADES = {"probability": "amount", "entropy": "doubt", "kl": "distance"}
"""The scale of each way to colour the table."""


def lens_page(lens: LogitLens, title: str = "Logit lens") -> str:
    """A logit lens as one self-contained page.

    For each row of the batch: its images with their token grid, and a table of layers by tokens, coloured by the
    probability of the most probable token, by entropy, or by the distance from the final layer. Pointing at a cell
    lists the most probable tokens and marks its patch, and pointing at a patch marks its column; a click pins; tokens
    can be searched; everything can be reached by keyboard. Padding is left out. The page loads nothing.

    Args:
        lens: The readings.
        title: The page's headline.
    """
    words: dict[str, int] = {}
    peaks = {"entropy": _peak(lens.entropy), "kl": _peak(lens.kl_to_final)}
    order = list(reversed(range(len(lens.layers))))
    kept = [_columns(lens, row) for row in range(len(lens.positions))]
    rows = [_row(lens, row, columns, order, words, peaks) for row, columns in enumerate(kept)]
    data = {
        "layers": [layer_name(lens.layers[i]) for i in order],
        "words": list(words),
        "rows": rows,
        "shades": {
            "probability": {"scale": SHADES["probability"], "peak": 1, "unit": "%", "low": "0 %"},
            "entropy": {"scale": SHADES["entropy"], "peak": peaks["entropy"], "unit": "nats", "low": "sure"},
            "kl": {"scale": SHADES["kl"], "peak": peaks["kl"], "unit": "nats", "low": "as the final layer"},
        },
        "scales": {name + end: SCALES[name + end] for name in SHADES.values() for end in ("", "-dark")},
    }
    hint = (
        "Point at a cell for its most probable tokens, at a patch for its column. A click pins, <kbd>Esc</kbd> lets "
        "go. By keyboard: <kbd>Tab</kbd> to the table or an image, arrow keys, <kbd>Enter</kbd> pins, "
        "<kbd>/</kbd> searches."
    )
    body = (
        f'<h1>{escape(title)}</h1><p class="mute">What each layer would answer: <code>{escape(lens.hook)}</code>, read '
        f"through the final norm and the unembedding. {hint}</p><noscript><p>This page needs JavaScript.</p></noscript>"
        f"{_tools()}{''.join(_section(lens, row) for row in range(len(lens.positions)))}"
        f'<div id="tip" role="status"></div><script type="application/json" id="data">{script_json(data)}</script>'
        f"<script>{asset('lens.js')}</script>"
    )
    return document(title, body, asset("lens.css"))


def lens_section(lens: LogitLens) -> str:
    """A fragment for a notebook: each row's last position, layers by the most probable tokens."""
    return "".join(last_position(lens, row) for row in range(len(lens.positions)))


def last_position(lens: LogitLens, row: int) -> str:
    """Layers by the most probable tokens of a row's last position. Styles stand inline: notebooks drop style sheets."""
    probs = arrays.to_numpy(lens.probs)[:, row, -1]
    grounds = colours(probs, SHADES["probability"])
    cell = "padding:2px 8px;text-align:left;white-space:pre;font-family:monospace;font-size:12px"
    lines = []
    for i in reversed(range(len(lens.layers))):
        cells = []
        for word, prob, ground in zip(lens.tokens[i][row][-1], probs[i], grounds[i], strict=True):
            look = f"background:{css(ground)};color:{css(ink(ground))}"
            cells.append(f'<td style="{cell};{look}">{escape(visible(word))} {100 * float(prob):.1f} %</td>')
        lines.append(f'<tr><th style="{cell}">layer {layer_name(lens.layers[i])}</th>{"".join(cells)}</tr>')
    task = escape(lens.inputs.prompts[row].task)
    return (
        f'<div style="margin:6px 0"><b>Logit lens</b> of <code>{escape(lens.hook)}</code> at position '
        f'{lens.positions[row][-1]} of <span style="white-space:pre-wrap">{task}</span>'
        f'</div><table style="border-collapse:collapse">{"".join(lines)}</table>'
    )


def layer_name(layer: int) -> str:
    """How a layer is called; -1 is the embedding, before all layers."""
    return "embed" if layer < 0 else str(layer)


def column_names(inputs: Inputs, row: int, positions: list[int]) -> list[str]:
    """A short name for each column: a token's text, or which patch of which image it is."""
    labels, names = inputs.token_labels[row], {}
    for number, (_, layout) in enumerate(numbered(inputs, row), 1):
        for pane in panes(layout):
            sign = "▨" if pane.name else "▦"
            names.update({p.position: f"{sign}{number} {p.row},{p.column}" for p in pane.patches})
    return [names.get(p) or (labels[p] if p < len(labels) else "") for p in positions]


def _columns(lens: LogitLens, row: int) -> list[int]:
    """The indices of a row's positions that are no padding; generated positions are behind the mask."""
    mask = arrays.to_numpy(lens.inputs.attention_mask)[row]
    return [j for j, position in enumerate(lens.positions[row]) if position >= len(mask) or mask[position]]


def _peak(values: Any) -> float:
    numbers = arrays.to_numpy(values).astype(np.float64)
    return float(np.nan_to_num(numbers, nan=0.0, posinf=0.0, neginf=0.0).max(initial=0.0))


def _row(
    lens: LogitLens, row: int, columns: list[int], order: list[int], words: dict[str, int], peaks: dict[str, float]
) -> dict[str, Any]:
    def number(word: str) -> int:
        return words.setdefault(word, len(words))

    def steps(values: Any, peak: float) -> NDArray[np.uint16]:
        chosen = np.nan_to_num(arrays.to_numpy(values)[:, row].astype(np.float64), posinf=peak)[order][:, columns]
        return np.rint(np.clip(chosen / (peak or 1.0), 0, 1) * FULL).astype("<u2")

    readings = [number(word) for i in order for j in columns for word in lens.tokens[i][row][j]]
    targets = [[number(word) for word in lens.target_tokens[row][j]] for j in columns]
    wide = len(words) > FULL
    positions = [lens.positions[row][j] for j in columns]
    labels = lens.inputs.token_labels[row]
    return {
        "positions": positions,
        "labels": [labels[p] if p < len(labels) else "" for p in positions],
        "heads": column_names(lens.inputs, row, positions),
        "targets": targets,
        "k": int(lens.probs.shape[-1]),
        "wide": wide,
        "words": _packed(np.array(readings, dtype="<u4" if wide else "<u2")),
        "probs": _packed(steps(lens.probs, 1.0)),
        "entropy": _packed(steps(lens.entropy, peaks["entropy"])),
        "kl": _packed(steps(lens.kl_to_final, peaks["kl"])),
        "ranks": _packed(arrays.to_numpy(lens.ranks)[:, row][order][:, columns].astype("<u4")),
    }


def _packed(numbers: NDArray[Any]) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _tools() -> str:
    names = {"probability": "probability", "entropy": "entropy", "kl": "distance from the final layer"}
    choices = "".join(
        f'<label><input type="radio" name="shade" value="{value}"{" checked" if value == "probability" else ""}>'
        f"{name}</label>"
        for value, name in names.items()
    )
    return (
        f'<div class="tools"><fieldset><legend>Colour by</legend>{choices}</fieldset>'
        '<div class="legend"><span id="low"></span><i id="ramp"></i><span id="high"></span></div>'
        '<div class="legend"><label>Search <input id="search" type="search" placeholder="a token" autocomplete="off" '
        'spellcheck="false"></label><button id="previous" type="button" aria-label="previous match">‹</button>'
        '<button id="next" type="button" aria-label="next match">›</button>'
        '<output id="found" for="search"></output></div></div>'
    )


def _section(lens: LogitLens, row: int) -> str:
    prompt = lens.inputs.prompts[row]
    figures = "".join(
        _figure(lens.inputs, image, number) for number, (image, _) in enumerate(numbered(lens.inputs, row), 1)
    )
    name = f"Row {row}: " if len(lens.positions) > 1 else ""
    shown = f'<div class="figs">{figures}</div>' if figures else ""
    return (
        f'<section data-row="{row}"><h2 class="said">{name}{escape(prompt.task)}</h2>'
        f'<div class="lens{"" if figures else " bare"}">{shown}'
        f'<div class="box" role="grid" tabindex="0" aria-label="layers by tokens, row {row}"></div></div></section>'
    )


def _figure(inputs: Inputs, image: int, number: int) -> str:
    layout = inputs.images[image]
    source, parts = data_uri(pixels(inputs, image)), []
    for pane in panes(layout):
        caption = escape(f"image {number}{', ' + pane.name if pane.name else ''}: {extent(layout, pane)}")
        parts.append(
            f'<figure><div class="shot"><img alt="{caption}" src="{source}">{patch_grid(layout, pane, caption)}</div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "".join(parts)


def patch_grid(layout: ImageLayout, pane: Pane, label: str) -> str:
    """A pane's patches as SVG over the image; each has its sequence position as `data-p`.

    Args:
        layout: The image's.
        pane: The patches.
        label: The image's name for those who cannot see it, escaped.
    """
    width, height = layout.original_size
    cells = []
    for patch in pane.patches:
        left, top, right, bottom = (round(edge, 2) for edge in patch.box)
        cells.append(
            f'<rect data-p="{patch.position}" x="{left:g}" y="{top:g}" '
            f'width="{right - left:g}" height="{bottom - top:g}"/>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" tabindex="0" role="group" '
        f'aria-label="patches of {label}">{"".join(cells)}<rect class="frame"/></svg>'
    )
