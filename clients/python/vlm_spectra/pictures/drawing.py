"""Figures as PIL images. Sizes are pixels at scale 1; larger scales draw everything larger, not blurred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .colours import COLD, RGB, WARM, colours, ink
from .figure import Figure, Heatmap, Overlay, Scale, Values

WIDE = 960
"""Pixels that a line of panels may take."""
GAP = 14
"""Pixels between panels."""
PAPER, INK, MUTE, LINE = (255, 255, 255), (27, 31, 36), (87, 96, 106), (208, 215, 222)
EMPTY = (238, 238, 238)
"""A heatmap's cell without a value."""
FADE = 0.35
"""How much white lies over an image, so that heat stands out from its own colours."""
OPAQUE = 0.82
"""The opacity of full heat."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw(figure: Figure, scale: float) -> Image.Image:
    """A figure as an RGB image."""
    per_line = panels_in_line(figure)
    width = panel_width(figure, per_line)
    drawn = [_panel(panel, figure.scale, width, scale) for panel in figure.panels]
    lines = [drawn[i : i + per_line] for i in range(0, len(drawn), per_line)] or [[]]
    legend = _legend(figure.scale, scale)
    gap = round(GAP * scale)
    heading = _text(figure.title, 15, scale, bold=True) if figure.title else None
    parts = [part for part in (heading, *(_row(line, gap) for line in lines), legend) if part is not None]
    whole = _column(parts, gap)
    page = Image.new("RGB", (whole.width + 2 * gap, whole.height + 2 * gap), PAPER)
    page.paste(whole, (gap, gap))
    return page


def panels_in_line(figure: Figure) -> int:
    """How many panels stand side by side."""
    count = max(len(figure.panels), 1)
    return min(figure.columns or (count if count <= 3 else math.ceil(math.sqrt(1.5 * count))), count)


def panel_width(figure: Figure, per_line: int) -> float:
    """Pixels of an image's panel at scale 1."""
    return max(min((WIDE - GAP * (per_line - 1)) / per_line, 480.0), 96.0)


def opacity(places: Values) -> Values:
    """How opaque heat is, 0 to 1, from places on the scale."""
    return np.abs(places) * OPAQUE


def shown_names(names: Sequence[str], room: float, least: float, longest: int = 16) -> list[str]:
    """Names along an axis, thinned out where there is less room for each than `least`; longer ones are cut."""
    step = max(1, math.ceil(least / room))
    short = [name if len(name) <= longest else name[: longest - 1] + "…" for name in names]
    return [name if i % step == 0 else "" for i, name in enumerate(short)]


def cell_size(panel: Heatmap) -> tuple[float, float]:
    """Pixels of a heatmap's cell at scale 1: width and height."""
    rows, columns = panel.values.shape
    if panel.texts is not None:
        return 78.0, 21.0
    return max(min(WIDE / columns, 42.0), 5.0), max(min(WIDE / 2 / rows, 26.0), 5.0)


@lru_cache(maxsize=64)
def _font(size: int, bold: bool = False) -> Font:
    """DejaVu where it is installed, since it has most scripts and signs, else the font that PIL brings along."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _text(text: str, size: float, scale: float, colour: RGB = INK, bold: bool = False) -> Image.Image:
    """One line of text as a picture of its own size."""
    font = _font(max(round(size * scale), 4), bold)
    line = "".join(c if c.isprintable() else "�" for c in text)
    box = font.getbbox(line)
    ascent = round(size * scale * 1.35)
    picture = Image.new("RGB", (max(math.ceil(box[2]) + 1, 1), ascent), PAPER)
    ImageDraw.Draw(picture).text((0, ascent * 0.06), line, fill=colour, font=font)
    return picture


def _fitted(text: str, size: float, scale: float, width: float, colour: RGB = INK) -> Image.Image:
    """A line of text of at most a width in pixels."""
    picture = _text(text, size, scale, colour)
    while picture.width > width and len(text) > 2:
        text = text[:-2].rstrip() + "…"
        picture = _text(text, size, scale, colour)
    return picture


def _panel(panel: Overlay | Heatmap, scale: Scale, width: float, factor: float) -> Image.Image:
    body = _overlay(panel, scale, width, factor) if isinstance(panel, Overlay) else _heatmap(panel, scale, factor)
    if not panel.title:
        return body
    return _column([_fitted(panel.title, 11, factor, body.width, MUTE), body], round(3 * factor))


def _overlay(panel: Overlay, scale: Scale, width: float, factor: float) -> Image.Image:
    """An image, faded, with heat over its patches."""
    across, down = panel.picture.size
    narrow = min(width, 620.0 * across / down)  # tall images are bounded by their height
    size = max(round(narrow * factor), 1), max(round(narrow * factor * down / across), 1)
    picture = panel.picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    picture = Image.blend(picture, Image.new("RGB", size, PAPER), FADE).convert("RGBA")
    heat = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(heat)
    places = scale.places(panel.values)
    for box, place, alpha in zip(panel.boxes, places, opacity(places), strict=True):
        left, right = round(box[0] * size[0] / across), round(box[2] * size[0] / across) - 1
        top, bottom = round(box[1] * size[1] / down), round(box[3] * size[1] / down) - 1
        if right >= left and bottom >= top:
            pen.rectangle((left, top, right, bottom), fill=(*(COLD if place < 0 else WARM), round(255 * float(alpha))))
    done = Image.alpha_composite(picture, heat).convert("RGB")
    ImageDraw.Draw(done).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=LINE)
    return done


def _heatmap(panel: Heatmap, scale: Scale, factor: float) -> Image.Image:
    """A matrix with its axes."""
    count, across = panel.values.shape
    wide, high = (side * factor for side in cell_size(panel))
    paints = colours(scale.places(panel.values), scale.colours)
    paints[np.isnan(panel.values)] = EMPTY
    size = round(wide * across) + 1, round(high * count) + 1
    body = Image.fromarray(paints).resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(body)
    if min(wide, high) > 9 * factor:
        for i in range(count):
            pen.line((0, round(i * high), size[0], round(i * high)), fill=LINE)
        for j in range(across):
            pen.line((round(j * wide), 0, round(j * wide), size[1]), fill=LINE)
    for (i, j), value in np.ndenumerate(panel.values):
        if panel.texts is None:
            break
        if not np.isnan(value):
            label = _cell_text(panel.texts[i][j], factor, wide - 6 * factor, ink(paints[i, j]), paints[i, j].tolist())
            body.paste(label, (round((j + 0.5) * wide - label.width / 2), round(i * high + 3 * factor)))
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=MUTE)
    names = [_text(name, 10.5, factor) for name in shown_names(panel.rows, high / factor, 12, 32)]
    tops = [_text(name, 10.5, factor) for name in shown_names(panel.columns, wide / factor, 12)]
    if any(name.width > wide for name in tops):
        tops = [name.rotate(90, expand=True) for name in tops]
    left = max(name.width for name in names) + round(6 * factor)
    top = max(name.height for name in tops) + round(4 * factor)
    whole = Image.new("RGB", (left + body.width, top + body.height), PAPER)
    whole.paste(body, (left, top))
    for i, name in enumerate(names):
        whole.paste(name, (left - name.width - round(5 * factor), top + round((i + 0.5) * high - name.height / 2)))
    for j, name in enumerate(tops):
        x = left + round((j + 0.5) * wide - name.width / 2)
        whole.paste(name, (max(x, 0), top - name.height - round(2 * factor)))
    if panel.across:
        whole = _column([_indented(_text(panel.across, 11, factor, MUTE), left), whole], 0)
    if panel.down:
        side = _text(panel.down, 11, factor, MUTE).rotate(90, expand=True)
        whole = _row([_lowered(side, whole.height - body.height), whole], round(4 * factor))
    return whole


def _cell_text(text: str, factor: float, width: float, colour: RGB, ground: Sequence[int]) -> Image.Image:
    mask = _fitted(text, 10, factor, width, (0, 0, 0)).convert("L").point(lambda level: 255 - level)
    label = Image.new("RGB", mask.size, tuple(ground))
    label.paste(Image.new("RGB", mask.size, colour), mask=mask)
    return label


def _legend(scale: Scale, factor: float) -> Image.Image:
    """The scale: a bar with its ends' values, and what is measured."""
    width, height = round(220 * factor), round(12 * factor)
    places = np.linspace(-1 if scale.signed else 0, 1, width)
    line = legend_colours(scale, places)
    bar = Image.fromarray(np.repeat(line[None], height, axis=0))
    ImageDraw.Draw(bar).rectangle((0, 0, width - 1, height - 1), outline=MUTE)
    middle = "0" if scale.signed else ""
    ends = [_text(text, 11, factor, MUTE) for text in (number(scale.low), middle, number(scale.high))]
    under = Image.new("RGB", (width, ends[0].height), PAPER)
    under.paste(ends[1], (round((width - ends[1].width) / 2), 0))
    under.paste(ends[0], (0, 0))
    under.paste(ends[2], (width - ends[2].width, 0))
    label = _text(scale.label, 12, factor)
    return _row([_column([bar, under], round(2 * factor)), label], round(10 * factor))


def legend_colours(scale: Scale, places: Values) -> NDArray[np.uint8]:
    """The colours of places on a figure's scale, [n, 3]; heat as it looks over white."""
    if scale.colours != "heat":
        return colours(places, scale.colours)
    alpha = opacity(places)[:, None]
    ground = np.where(places[:, None] < 0, np.array(COLD), np.array(WARM))
    mixed: NDArray[np.uint8] = np.rint(255 * (1 - alpha) + ground * alpha).astype(np.uint8)
    return mixed


def number(value: float) -> str:
    """A scale's end in few digits."""
    return f"{value:.3g}"


def _row(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Side by side, tops aligned."""
    width = sum(picture.width for picture in pictures) + gap * max(len(pictures) - 1, 0)
    whole = Image.new("RGB", (max(width, 1), max((p.height for p in pictures), default=1)), PAPER)
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + gap
    return whole


def _column(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """One under another, left edges aligned."""
    height = sum(picture.height for picture in pictures) + gap * max(len(pictures) - 1, 0)
    whole = Image.new("RGB", (max(p.width for p in pictures), height), PAPER)
    y = 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height + gap
    return whole


def _indented(picture: Image.Image, left: int) -> Image.Image:
    whole = Image.new("RGB", (picture.width + left, picture.height), PAPER)
    whole.paste(picture, (left, 0))
    return whole


def _lowered(picture: Image.Image, top: int) -> Image.Image:
    whole = Image.new("RGB", (picture.width, picture.height + top), PAPER)
    whole.paste(picture, (0, top))
    return whole
