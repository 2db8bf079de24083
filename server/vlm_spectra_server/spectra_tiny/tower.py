"""First stage: teach the vision tower alone, by a throw-away linear layer that asks every image token what it shows.

From scratch and end to end the tower learns nothing for a long time: the only signal is a few digits of an answer. Here
each of its tokens must tell which widget covers it (kind, colour, label, centre), whether the widget's centre lies in
it, and where it is itself. All of that is then linear in what enters the language model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .pixels import TOKEN, grids, patchify, render
from .vocabulary import COLOURS, KINDS, LABELS
from .world import GRID, SIZES, Screen, make_screen

IGNORE = -100
"""No answer is asked of this token."""

SPAN = 48
"""Lines of the layout grid that a centre can lie on, along either side."""

SECTIONS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS),
    "label": len(LABELS) + 1,
    "column": SPAN,
    "row": SPAN,
    "centre": 2,
    "own_column": 16,
    "own_row": 16,
}
"""What every token is asked, and how many answers each question has."""

WEIGHTS = {"kind": 1.5, "label": 2.0}
"""How much a section counts in the loss, if not once: what is written is the hardest to see."""

COVERED = 0.1
"""A token belongs to a widget that covers this part of it; with less it is asked nothing about widgets."""


class Questionnaire(nn.Linear):
    """One linear layer for all `SECTIONS`."""

    def __init__(self, width: int):
        super().__init__(width, sum(SECTIONS.values()))

    def losses(self, features: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Mean cross entropy of each section. `features` [tokens, width]; `targets` [tokens] each."""
        answers = self(features).split(list(SECTIONS.values()), dim=-1)
        return {
            name: F.cross_entropy(answer, targets[name], ignore_index=IGNORE)
            for name, answer in zip(SECTIONS, answers, strict=True)
        }

    @torch.no_grad()
    def accuracies(self, features: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, float]:
        """Share of right answers in each section, among the tokens that were asked."""
        answers = self(features).split(list(SECTIONS.values()), dim=-1)
        result = {}
        for name, answer in zip(SECTIONS, answers, strict=True):
            asked = targets[name] != IGNORE
            result[name] = (answer.argmax(-1) == targets[name])[asked].float().mean().item()
        return result


@torch.no_grad()
def whiten(kernel: nn.Conv3d, patches: torch.Tensor, floor: float = 0.1) -> None:
    """Let the patch embedding begin with the patches' principal components, each brought to about the same size.

    A patch varies most in its overall colour and hundreds of times less in the strokes of a letter; with a random
    embedding the tower would see only the former for a long time. `patches` [n, 3 * 14 * 14].
    """
    centred = patches - patches.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    width = kernel.out_channels
    main, sizes = directions[:, -width:].T, variances[-width:]
    still = (main / (sizes + floor).sqrt()[:, None]).view(width, 3, 1, *kernel.kernel_size[1:])
    kernel.weight.copy_(still.expand_as(kernel.weight) / kernel.kernel_size[0])


def cover(screen: Screen) -> np.ndarray:
    """[widgets, rows, columns]: the part of each image token that each widget's box covers."""
    rows = np.arange(screen.height // TOKEN)[:, None] * TOKEN
    columns = np.arange(screen.width // TOKEN)[None, :] * TOKEN
    parts = []
    for widget in screen.widgets:
        left, top, right, bottom = widget.box
        high = np.minimum(rows + TOKEN, bottom) - np.maximum(rows, top)
        wide = np.minimum(columns + TOKEN, right) - np.maximum(columns, left)
        parts.append(np.maximum(high, 0) * np.maximum(wide, 0) / TOKEN**2)
    return np.stack(parts)


def token_targets(screen: Screen) -> dict[str, np.ndarray]:
    """[tokens] of class numbers for each section, in raster order."""
    parts = cover(screen)
    shape = parts.shape[1:]
    owner, most = parts.argmax(0), parts.max(0)
    owned = most >= COVERED
    targets = {name: np.full(shape, IGNORE, dtype=np.int64) for name in SECTIONS}
    targets["kind"][most == 0] = len(KINDS)
    targets["centre"][:] = 0
    targets["own_row"][:] = np.arange(shape[0])[:, None]
    targets["own_column"][:] = np.arange(shape[1])[None, :]
    for number, widget in enumerate(screen.widgets):
        mine = owned & (owner == number)
        x, y = widget.centre
        targets["kind"][mine] = KINDS.index(widget.kind)
        targets["colour"][mine] = list(COLOURS).index(widget.colour)
        targets["label"][mine] = LABELS.index(widget.label) if widget.label else len(LABELS)
        targets["column"][mine] = x // GRID
        targets["row"][mine] = y // GRID
        targets["centre"][y // TOKEN, x // TOKEN] = 1
    return {name: values.ravel() for name, values in targets.items()}


def draw_screens(step: int, batch: int, count: tuple[int, int]) -> list[Screen]:
    """The screens of a training step, all of one size, each from a seed of its own."""
    size = random.Random(step).choices(list(SIZES), list(SIZES.values()))[0]
    return [make_screen(step * batch + i, count=count, size=size) for i in range(batch)]


def tower_batch(screens: Sequence[Screen]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Patches, grids and targets of some screens of one size."""
    pictures = render(screens)
    each = [token_targets(screen) for screen in screens]
    targets = {name: torch.tensor(np.concatenate([one[name] for one in each])) for name in SECTIONS}
    return patchify(pictures), grids(pictures), targets
