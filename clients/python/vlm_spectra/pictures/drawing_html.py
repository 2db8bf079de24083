"""Figures as HTML fragments: no script and no style sheet, so a notebook keeps them as they are."""

from __future__ import annotations

from html import escape

import numpy as np
from PIL import Image

from .colours import COLD, WARM, colours, css, ink
from .drawing import cell_size, legend_colours, number, opacity, panel_width, panels_in_line, shown_names
from .figure import Figure, Heatmap, Overlay, Scale
from .markup import data_uri

FONT = "font:12px/1.35 system-ui,-apple-system,'Segoe UI',sans-serif"


def fragment(figure: Figure) -> str:
    """A figure as a fragment of HTML."""
    per_line = panels_in_line(figure)
    width = panel_width(figure, per_line)
    panels = "".join(
        _overlay(panel, figure.scale, width) if isinstance(panel, Overlay) else _heatmap(panel, figure.scale)
        for panel in figure.panels
    )
    title = f'<div style="font-weight:600;font-size:15px">{escape(figure.title)}</div>' if figure.title else ""
    return (
        f'<div style="{FONT};color:#1b1f24;background:#fff;padding:8px;display:inline-block;max-width:100%;'
        f'overflow:auto">{title}<div style="display:grid;grid-template-columns:repeat({per_line},max-content);'
        f'gap:10px 14px;align-items:start">{panels}</div>{_legend(figure.scale)}</div>'
    )


def _overlay(panel: Overlay, scale: Scale, width: float) -> str:
    """An image, faded, with heat over its patches; pointing at one tells its value."""
    across, down = panel.picture.size
    shown = min(width, 620.0 * across / down)
    side = round(min(2 * shown, across))
    small = panel.picture.convert("RGB").resize((side, max(round(side * down / across), 1)), Image.Resampling.LANCZOS)
    places = scale.places(panel.values)
    rects = []
    for box, name, value, place, alpha in zip(
        panel.boxes, panel.names, panel.values, places, opacity(places), strict=True
    ):
        left, top, right, bottom = (round(edge, 2) for edge in box)
        rects.append(
            f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" '
            f'fill="{css(COLD if place < 0 else WARM)}" fill-opacity="{float(alpha):.3f}">'
            f"<title>{escape(name)}: {number(float(value))}</title></rect>"
        )
    caption = f'<div style="color:#57606a">{escape(panel.title)}</div>' if panel.title else ""
    return (
        f'<div style="width:{shown:.0f}px">{caption}<div style="position:relative;line-height:0;'
        f'border:1px solid #d0d7de"><img alt="{escape(panel.title or "image")}" src="{data_uri(small)}" '
        f'style="width:100%;height:auto;opacity:.65;margin:0"><svg viewBox="0 0 {across} {down}" '
        f'preserveAspectRatio="none" style="position:absolute;left:0;top:0;width:100%;height:100%">{"".join(rects)}'
        "</svg></div></div>"
    )


def _heatmap(panel: Heatmap, scale: Scale) -> str:
    """A matrix as a table; pointing at a cell tells its value."""
    wide, high = cell_size(panel)
    paints = colours(scale.places(panel.values), scale.colours)
    plain = "padding:0;border:0;background:none;font-weight:400;text-align:center"
    heads = shown_names(panel.columns, wide, 12)
    flat = all(7 * len(name) <= wide for name in heads) or panel.texts is not None
    turn = "" if flat else "writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;vertical-align:bottom;"
    top = "".join(
        f'<th style="{plain};{turn}white-space:pre;overflow:hidden;max-width:{wide:.0f}px" title="{escape(full)}">'
        f"{escape(name)}</th>"
        for name, full in zip(heads, panel.columns, strict=True)
    )
    lines = []
    for i, name in enumerate(shown_names(panel.rows, high, 12, 32)):
        cells = []
        for j, value in enumerate(panel.values[i]):
            empty = bool(np.isnan(value))
            ground = "#eee" if empty else css(paints[i, j])
            text = "" if panel.texts is None or empty else panel.texts[i][j]
            said = "nothing" if empty else number(float(value))
            hint = escape(f"{panel.rows[i]}, {panel.columns[j]}: {f'{text}, ' if text else ''}{said}")
            cells.append(
                f'<td title="{hint}" style="{plain};background:{ground};color:{css(ink(paints[i, j]))};'
                f"min-width:{wide:.1f}px;max-width:{wide:.1f}px;height:{high:.1f}px;overflow:hidden;white-space:pre;"
                f'font-size:11px">{escape(text)}</td>'
            )
        head = f'<th style="{plain};text-align:right;padding-right:5px;white-space:pre">{escape(name)}</th>'
        lines.append(f'<tr style="background:none">{head}{"".join(cells)}</tr>')
    axes = escape(" by ".join(part for part in (panel.down, panel.across) if part))
    caption = f'<div style="color:#57606a">{escape(panel.title)}{axes}</div>' if panel.title or axes else ""
    return (
        f'<div>{caption}<table style="border-collapse:collapse;border:0;margin:0;font-size:11px">'
        f'<tr style="background:none"><th style="{plain}"></th>{top}</tr>{"".join(lines)}</table></div>'
    )


def _legend(scale: Scale) -> str:
    """The scale: a bar with its ends' values, and what is measured."""
    stops = legend_colours(scale, np.linspace(-1 if scale.signed else 0, 1, 11))
    middle = "<span>0</span>" if scale.signed else ""
    return (
        '<div style="display:flex;gap:10px;margin-top:8px;color:#57606a"><div style="width:220px"><div style="'
        f"height:12px;border:1px solid #57606a;background:linear-gradient(90deg,{','.join(css(c) for c in stops)})"
        f'"></div><div style="display:flex;justify-content:space-between"><span>{number(scale.low)}</span>{middle}'
        f'<span>{number(scale.high)}</span></div></div><div style="color:#1b1f24">{escape(scale.label)}</div></div>'
    )
