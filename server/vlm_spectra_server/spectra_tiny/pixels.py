"""Screens as the vision tower's input, many at once: what the image processor does, without its per-picture cost.

Only for screens that the processor would not resize (both sides multiples of 28 pixels, area within the limits), as all
sizes of the world are; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .parts import MERGE, PATCH
from .world import Screen

TOKEN = PATCH * MERGE
"""Pixels along the edge of one image token."""


def render(screens: Sequence[Screen]) -> np.ndarray:
    """[screens, height, width, 3] uint8; all screens have one size."""
    return np.stack([np.asarray(screen.render()) for screen in screens])


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Soft patches of colour without an edge: a picture that is no screen."""
    dice = np.random.default_rng(seed)
    rows, columns = dice.integers(2, 24, 2)
    coarse = dice.normal(dice.uniform(40, 220, 3), dice.uniform(5, 60), (rows, columns, 3))
    return Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def patchify(pictures: np.ndarray) -> torch.Tensor:
    """[screens * patches, 3 * 14 * 14] float32, the patches of an image token one after the other, as Qwen orders them.

    The processor repeats every patch for a second, equal moment of time; `FoldedEmbedding` does without.
    """
    values = torch.tensor(pictures).float().div_(255)
    values = (values - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    number, height, width, _ = values.shape
    rows, columns = height // TOKEN, width // TOKEN
    values = values.view(number, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    return values.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * PATCH * PATCH)


def grids(pictures: np.ndarray) -> torch.Tensor:
    """[screens, 3]: moments, rows and columns of patches."""
    number, height, width, _ = pictures.shape
    return torch.tensor([[1, height // PATCH, width // PATCH]] * number)


class FoldedEmbedding(torch.nn.Module):
    """The patch embedding for still pictures: one matrix product with the kernel summed over its two equal moments."""

    def __init__(self, kernel: torch.nn.Conv3d):
        super().__init__()
        self.proj = kernel

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[patches, 3 * 14 * 14] to [patches, width]."""
        return patches @ self.proj.weight.sum(2).flatten(1).T
