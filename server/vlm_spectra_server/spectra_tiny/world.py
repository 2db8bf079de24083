"""spectra-tiny's world: seeded synthetic screens that know what is on them.

A screen is a wallpaper between a title bar and a task bar, with one to five widgets. The wallpaper's colours change
steadily from left to right and from top to bottom: the architecture knows only relative positions, so a patch needs
something to see by which it can tell where it is. Widgets lie on a layout grid of 7 pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import COLOURS, ICONS, KINDS, LABELLED, LABELS

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

GRID = 7
"""Widgets' centres lie at odd steps of half this many pixels."""

TITLE_BAR, TASK_BAR, GAP, FONT_SIZE = 18, 16, 5, 13

SIZES = {(224, 224): 5, (280, 168): 1, (168, 280): 1, (252, 196): 1, (196, 252): 1, (168, 168): 1}
"""Screen sizes (width, height) and how common each is among ten."""

TITLES = ("Inbox", "Photos", "Notes", "Untitled", "Music", "Report", "Window", "Mail")
"""What title bars say; nobody asks about it."""

HELD_OUT = 10**9
"""Seeds from here on belong to the evaluation; training uses smaller ones."""


@dataclass(frozen=True)
class Theme:
    """Colours of a desktop: the wallpaper is `origin` at the top left and changes by `right`, `down` per 100 pixels."""

    origin: RGB
    right: RGB
    down: RGB
    bar: RGB
    text: RGB
    surface: RGB


THEMES = {
    "light": Theme((255, 250, 190), (-26, -4, 0), (0, -4, 24), (222, 226, 232), (25, 25, 30), (255, 255, 255)),
    "dark": Theme((16, 30, 90), (30, 2, 0), (0, 2, -28), (38, 40, 46), (240, 240, 240), (28, 28, 34)),
    "ocean": Theme((70, 130, 150), (34, 6, 0), (0, 6, 34), (20, 70, 100), (255, 255, 255), (235, 245, 250)),
    "sunset": Theme((205, 150, 100), (-30, -10, 0), (0, -10, 34), (120, 60, 60), (30, 15, 15), (255, 245, 235)),
}
"""`light` is the most common one."""

THEME_WEIGHTS = {"light": 4, "dark": 2, "ocean": 2, "sunset": 2}


@dataclass(frozen=True)
class Widget:
    """One thing on a screen. `box` is left, top, right, bottom in pixels, the last two exclusive."""

    kind: str
    colour: str
    label: str | None
    box: Box
    shade: RGB

    @property
    def centre(self) -> tuple[int, int]:
        """Where a click on it belongs, x and y."""
        left, top, right, bottom = self.box
        return (left + right) // 2, (top + bottom) // 2

    def contains(self, x: float, y: float) -> bool:
        """Whether a point lies on it."""
        left, top, right, bottom = self.box
        return left <= x < right and top <= y < bottom


@dataclass(frozen=True)
class Screen:
    """A desktop and the widgets on it; rendering it twice gives the same pixels."""

    width: int
    height: int
    theme: str
    title: str
    widgets: tuple[Widget, ...]

    def without(self, widget: Widget) -> Screen:
        """The same screen minus one widget; not a pixel outside that widget changes."""
        return replace(self, widgets=tuple(other for other in self.widgets if other != widget))

    def render(self) -> Image.Image:
        """The screen as an RGB picture."""
        picture = Image.fromarray(wallpaper(self.width, self.height, self.theme))
        draw = ImageDraw.Draw(picture)
        draw_bars(draw, self)
        for widget in self.widgets:
            PAINTERS[widget.kind](draw, widget, THEMES[self.theme])
        return picture


def make_screen(
    seed: int,
    count: int | tuple[int, int] = (1, 5),
    size: tuple[int, int] | None = None,
    theme: str | None = None,
) -> Screen:
    """The screen of a seed; `count`, `size` or `theme` narrow what it may be.

    No two widgets share a label, and none shares both colour and kind with another.
    """
    dice = random.Random(seed)
    drawn_size = dice.choices(list(SIZES), list(SIZES.values()))[0]
    drawn_theme = dice.choices(list(THEME_WEIGHTS), list(THEME_WEIGHTS.values()))[0]
    width, height = size or drawn_size
    title = dice.choice(TITLES)
    number = dice.randint(*count) if isinstance(count, tuple) else count
    widgets = place_widgets(dice, number, width, height)
    return Screen(width, height, theme or drawn_theme, title, widgets)


def place_widgets(dice: random.Random, number: int, width: int, height: int) -> tuple[Widget, ...]:
    """Up to `number` widgets that do not touch; fewer where the screen is too small for them."""
    labels = dice.sample(LABELS, len(LABELS))
    placed: list[Widget] = []
    for _ in range(40 * number):
        if len(placed) == number:
            break
        kind = dice.choice(dice.choice((ICONS, LABELLED)))
        colour = dice.choice(list(COLOURS))
        label = labels[len(placed) % len(labels)] if kind in LABELLED else None
        box = draw_box(dice, kind, label, width, height)
        taken = any((other.colour, other.kind) == (colour, kind) or overlap(box, other.box) for other in placed)
        if box and not taken:
            placed.append(Widget(kind, colour, label, box, vary(dice, COLOURS[colour])))
    return tuple(placed)


def draw_box(dice: random.Random, kind: str, label: str | None, width: int, height: int) -> Box | None:
    """A place for a widget between the bars, its centre on the layout grid; None where it does not fit."""
    if label is None:
        half_width = half_height = dice.choice((12, 14, 17))
    else:
        room = {"button": 14, "checkbox": 26, "field": 28}[kind]
        half_width = GRID * -(-(text_width(label) + room) // (2 * GRID)) + dice.choice((0, 0, GRID))
        half_height = {"button": dice.choice((11, 13, 15)), "checkbox": 10, "field": dice.choice((11, 13))}[kind]
    columns = lattice(half_width + 3, width - half_width - 3)
    rows = lattice(TITLE_BAR + half_height + 3, height - TASK_BAR - half_height - 3)
    if not columns or not rows:
        return None
    x, y = dice.choice(columns), dice.choice(rows)
    return x - half_width, y - half_height, x + half_width, y + half_height


def lattice(first: int, last: int) -> list[int]:
    """The layout grid's lines between two coordinates: 3, 10, 17, ..."""
    return [at for at in range(GRID // 2, last + 1, GRID) if at >= first]


def overlap(box: Box | None, other: Box) -> bool:
    """Whether two boxes come closer than `GAP`."""
    return box is not None and not (
        box[2] + GAP <= other[0] or other[2] + GAP <= box[0] or box[3] + GAP <= other[1] or other[3] + GAP <= box[1]
    )


def vary(dice: random.Random, colour: RGB, amount: int = 8) -> RGB:
    """A slightly different shade."""
    red, green, blue = (min(255, max(0, channel + dice.randint(-amount, amount))) for channel in colour)
    return red, green, blue


@cache
def wallpaper(width: int, height: int, theme: str) -> np.ndarray:
    """[height, width, 3] uint8: colours that tell the position."""
    colours = THEMES[theme]
    x = np.arange(width)[None, :, None] / 100
    y = np.arange(height)[:, None, None] / 100
    values = np.array(colours.origin) + x * np.array(colours.right) + y * np.array(colours.down)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@cache
def font() -> ImageFont.FreeTypeFont:
    """Pillow's own typeface, so that a screen looks the same everywhere."""
    return ImageFont.load_default(FONT_SIZE)


@cache
def text_width(text: str) -> int:
    """Pixels that a text takes."""
    return round(font().getlength(text))


def draw_bars(draw: ImageDraw.ImageDraw, screen: Screen) -> None:
    """The title bar with its three buttons, and the task bar with its menu and clock."""
    theme, width, height = THEMES[screen.theme], screen.width, screen.height
    draw.rectangle((0, 0, width - 1, TITLE_BAR - 1), fill=theme.bar)
    draw.text((6, TITLE_BAR // 2), screen.title, fill=theme.text, font=font(), anchor="lm")
    for number, colour in enumerate(((200, 70, 60), (220, 180, 60), (90, 170, 80))):
        draw.ellipse((width - 12 - 11 * number, 6, width - 6 - 11 * number, 12), fill=colour)
    draw.rectangle((0, height - TASK_BAR, width - 1, height - 1), fill=theme.bar)
    draw.rectangle((4, height - 12, 12, height - 4), outline=theme.text)
    draw.line((width - 26, height - 8, width - 8, height - 8), fill=theme.text, width=2)


def contrast(colour: RGB) -> RGB:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = colour
    return (15, 15, 15) if 0.3 * red + 0.59 * green + 0.11 * blue > 145 else (255, 255, 255)


def edge(colour: RGB) -> RGB:
    """A darker shade for an outline, so that a widget stands out from any wallpaper."""
    red, green, blue = (channel * 3 // 5 for channel in colour)
    return red, green, blue


def inside(widget: Widget) -> Box:
    """The box with its last row and column included, as Pillow draws it."""
    left, top, right, bottom = widget.box
    return left, top, right - 1, bottom - 1


def paint_circle(draw: ImageDraw.ImageDraw, widget: Widget, theme: Theme) -> None:
    draw.ellipse(inside(widget), fill=widget.shade, outline=edge(widget.shade))


def paint_square(draw: ImageDraw.ImageDraw, widget: Widget, theme: Theme) -> None:
    draw.rectangle(inside(widget), fill=widget.shade, outline=edge(widget.shade))


def polygon(points: tuple[tuple[float, float], ...]) -> Callable[[ImageDraw.ImageDraw, Widget, Theme], None]:
    """A painter of a shape whose corners are given as parts of the box's width and height."""

    def paint(draw: ImageDraw.ImageDraw, widget: Widget, theme: Theme) -> None:
        left, top, right, bottom = inside(widget)
        corners = [(left + x * (right - left), top + y * (bottom - top)) for x, y in points]
        draw.polygon(corners, fill=widget.shade, outline=edge(widget.shade))

    return paint


def star_points() -> tuple[tuple[float, float], ...]:
    """Five outer and five inner corners, starting at the top."""
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 0.5, 0.2)
    return tuple((0.5 + float(r * np.sin(a)), 0.5 - float(r * np.cos(a))) for a, r in zip(angles, radii, strict=True))


CROSS = ((0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67), (0.67, 1), (0.33, 1), (0.33, 0.67))
CROSS += ((0, 0.67), (0, 0.33), (0.33, 0.33))


def paint_button(draw: ImageDraw.ImageDraw, widget: Widget, theme: Theme) -> None:
    draw.rounded_rectangle(inside(widget), radius=5, fill=widget.shade, outline=edge(widget.shade))
    draw.text(widget.centre, widget.label, fill=contrast(widget.shade), font=font(), anchor="mm")


def paint_field(draw: ImageDraw.ImageDraw, widget: Widget, theme: Theme) -> None:
    draw.rectangle(inside(widget), fill=theme.surface, outline=widget.shade, width=3)
    draw.text(widget.centre, widget.label, fill=contrast(theme.surface), font=font(), anchor="mm")


def paint_checkbox(draw: ImageDraw.ImageDraw, widget: Widget, theme: Theme) -> None:
    left, middle = widget.box[0], widget.centre[1]
    x, y = left + 1, middle - 8
    draw.rectangle((x, y, x + 15, y + 15), fill=theme.surface, outline=widget.shade, width=3)
    draw.line((x + 4, y + 8, x + 7, y + 11, x + 12, y + 4), fill=widget.shade, width=2)
    draw.text((left + 22, middle), widget.label, fill=theme.text, font=font(), anchor="lm")


PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, Widget, Theme], None]] = {
    "circle": paint_circle,
    "square": paint_square,
    "triangle": polygon(((0.5, 0), (1, 1), (0, 1))),
    "star": polygon(star_points()),
    "diamond": polygon(((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))),
    "cross": polygon(CROSS),
    "button": paint_button,
    "checkbox": paint_checkbox,
    "field": paint_field,
}
assert set(PAINTERS) == set(KINDS)
