"""What the analysis finds inside spectra-tiny on clicks that it answered right.

The asked-for widget is where a trustworthy attribution of a coordinate must point, and the logit lens must see the
answer come up layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from vlm_spectra.arrays import to_numpy
from vlm_spectra.base import BaseVLM

from .curve import draw_layers
from .language import encode
from .lessons import Lesson
from .tower import COVERED, cover
from .world import Screen, Widget

METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "gradient_x_input": ({}, 200),
    "integrated_gradients": ({"steps": 16}, 200),
    "occlusion": ({}, 40),
}
"""The attributions that are tried: their options, and on how many clicks, for an occlusion runs the model 64 times."""

POINT = "start_box='("
"""What stands before the first coordinate."""


@dataclass(frozen=True)
class Answered:
    """A question about a screen and the model's answer."""

    screen: Screen
    lesson: Lesson
    answer: str


@dataclass(frozen=True)
class Pointing:
    """How often a method's strongest patch shows the asked-for widget."""

    by_size: list[bool]
    """The patch of the largest absolute score."""
    by_score: list[bool]
    """The patch of the largest score, which speaks most for the coordinate."""


def shown(screen: Screen, widget: Widget) -> np.ndarray:
    """[rows, columns]: the image tokens of which the widget's box covers a tenth or more."""
    return cover(screen)[screen.widgets.index(widget)] >= COVERED


def chance(clicks: Sequence[Answered]) -> list[float]:
    """How often a patch drawn at random would show the asked-for widget."""
    return [float(shown(click.screen, click.lesson.target).mean()) for click in clicks]


def pointings(model: BaseVLM, clicks: Sequence[Answered]) -> dict[str, Pointing]:
    """Where each method points, asked why the model says the first token of a click's coordinates."""
    found = {method: Pointing([], []) for method in METHODS}
    for number, click in enumerate(tqdm(clicks, desc="attribution", mininterval=5)):
        prefill = click.answer[: click.answer.index(POINT) + len(POINT)]
        inputs = model.prepare_messages(click.lesson.question, click.screen.render(), assistant_prefill=prefill)
        right = shown(click.screen, click.lesson.target).ravel()
        for method, (options, most) in METHODS.items():
            if number < most:
                scores = to_numpy(model.attribute(inputs, method=method, **options).image_grid(0)).ravel()
                found[method].by_size.append(bool(right[np.abs(scores).argmax()]))
                found[method].by_score.append(bool(right[scores.argmax()]))
    return found


@dataclass(frozen=True)
class Readings:
    """The lens by layer, over all tokens of an answer. [layers, tokens] each."""

    ranks: np.ndarray
    """How many tokens were more probable."""
    probs: np.ndarray

    def rows(self) -> dict[str, np.ndarray]:
        """[layers] each."""
        return {
            "mean rank": self.ranks.mean(1),
            "mean reciprocal rank": (1 / (1 + self.ranks)).mean(1),
            "mean probability": self.probs.mean(1),
        }


def readings(model: BaseVLM, clicks: Sequence[Answered]) -> dict[str, Readings]:
    """The lens on whole answers, and on the digits of their coordinates alone."""
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"whole answer": [], "coordinates": []}
    for click in tqdm(clicks, desc="logit lens", mininterval=5):
        prompt = model.prepare_messages(click.lesson.question, click.screen.render(), assistant_prefill=click.answer)
        length = len(encode(click.answer))
        lens = model.logit_lens(prompt, top_k=1, positions=slice(-length - 1, -1))
        ranks, probs = to_numpy(lens.ranks)[:, 0, :, 0], to_numpy(lens.target_probs)[:, 0, :, 0]
        digits = [token[0].isdigit() for token in lens.target_tokens[0]]
        parts["whole answer"].append((ranks, probs))
        parts["coordinates"].append((ranks[:, digits], probs[:, digits]))
    return {
        name: Readings(*(np.concatenate(each, axis=1) for each in zip(*values, strict=True)))
        for name, values in parts.items()
    }


def draw_readings(found: dict[str, Readings], picture: Path) -> None:
    """The lens's curves as a PNG."""
    panels: dict[str, dict[str, Sequence[float]]] = {
        f"logit lens: {what} of the answer's token": {
            name: reading.rows()[what].tolist() for name, reading in found.items()
        }
        for what in ("mean rank", "mean probability")
    }
    draw_layers(panels, picture)
