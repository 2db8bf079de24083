"""Figures as small pictures: the training log by steps, and the logit lens by layers."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 360, 220, 34

PANELS = {
    "tower: loss": ("tower", ("loss",)),
    "tower: right tokens": ("tower", ("kind", "colour", "label", "column", "row")),
    "language: loss": ("language", ("answers",)),
    "language: right answers": ("language", ("click", "label", "colour", "count", "looking")),
}
"""Each panel's title, stage and figures."""

PENS = ("#1f4e9c", "#c23b22", "#2f8f4e", "#8e5bb5", "#c98a1b")

Series = dict[tuple[str, str], list[tuple[int, float]]]


def read_log(path: Path) -> Series:
    """Steps and values of every figure; a row that was logged twice (a run that was resumed) counts the last time."""
    points: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for stage, step, name, value in csv.reader(file):
            points[stage, name][int(step)] = float(value)
    return {key: smooth(sorted(values.items())) for key, values in points.items()}


def smooth(points: list[tuple[int, float]], span: int = 5) -> list[tuple[int, float]]:
    """A running mean."""
    values = [value for _, value in points]
    means = [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - span + 1) : i + 1])]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def draw_panel(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], title: str, lines: dict[str, list[tuple[int, float]]], unit: str
) -> None:
    """Axes from zero, one line a figure, its name in the line's colour; `unit` is what is counted to the right."""
    font = ImageFont.load_default(10)
    left, top, right, bottom = at[0] + MARGIN, at[1] + MARGIN, at[0] + WIDTH - 10, at[1] + HEIGHT - 20
    draw.text((left, at[1] + 4), title, fill="black", font=font)
    draw.rectangle((left, top, right, bottom), outline="#999999")
    steps = max((step for line in lines.values() for step, _ in line), default=1)
    highest = max((value for line in lines.values() for _, value in line), default=1.0)
    draw.text((left, bottom + 3), f"{unit} 0 to {steps}", fill="black", font=font)
    draw.text((at[0] + 4, top), f"{highest:.3g}", fill="black", font=font)
    for number, (name, line) in enumerate(lines.items()):
        pen = PENS[number % len(PENS)]
        draw.text((left + 310 // len(lines) * number, at[1] + 18), name, fill=pen, font=font)
        corners = [(left + (right - left) * s / steps, bottom - (bottom - top) * v / highest) for s, v in line]
        if len(corners) > 1:
            draw.line(corners, fill=pen, width=2)


def draw_curves(log: Path, picture: Path) -> None:
    """Write the four panels as a PNG."""
    series = read_log(log)
    canvas = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, (stage, names)) in enumerate(PANELS.items()):
        lines = {name: series[stage, name] for name in names if (stage, name) in series}
        draw_panel(draw, (WIDTH * (number % 2), HEIGHT * (number // 2)), title, lines, "steps")
    canvas.quantize(32).save(picture, optimize=True)


def draw_layers(panels: dict[str, dict[str, Sequence[float]]], picture: Path) -> None:
    """Write panels of values by layer side by side as a PNG."""
    canvas = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, lines) in enumerate(panels.items()):
        draw_panel(
            draw, (WIDTH * number, 0), title, {name: list(enumerate(line)) for name, line in lines.items()}, "layers"
        )
    canvas.quantize(32).save(picture, optimize=True)
