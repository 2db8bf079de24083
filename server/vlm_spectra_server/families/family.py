"""The shape that nearly all vision-language models of transformers share; a family overrides what is different."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens an image became, and how they lie.

    Attributes:
        grid: Rows and columns of tokens.
        processed_size: Width and height in pixels after the processor's resizing.
    """

    grid: tuple[int, int]
    processed_size: tuple[int, int]


class Family:
    """Where to find the parts of a decoder block, and the conventions of a family.

    Args:
        name: `config.model_type`.
    """

    model_type: ClassVar[str] = ""

    coordinates: ClassVar[str] = "processed_pixels"
    """How the family writes points: "processed_pixels" or "thousandths"."""

    parts: ClassVar[Mapping[str, str]] = {
        "ln1": "input_layernorm",
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "ln2": "post_attention_layernorm",
        "mlp": "mlp",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    """Paths inside a decoder block, by role."""

    def __init__(self, name: str) -> None:
        self.name = name

    def norm_weight(self, norm: nn.Module) -> torch.Tensor:
        """What a norm multiplies its normalized input by, [hidden]."""
        weight = norm.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def image_tokens(
        self, processor: Any, features: Mapping[str, Any], sizes: Sequence[tuple[int, int]], count: int
    ) -> list[ImageTokens]:
        """The token grids of a batch's images.

        Args:
            processor: The model's processor.
            features: What the processor returned.
            sizes: Width and height of each image as given.
            count: Image tokens of the batch in all.

        Returns:
            One entry an image. Here: equal shares, square where a share is a square number.
        """
        share = count // max(len(sizes), 1)
        side = math.isqrt(share)
        grid = (side, side) if side * side == share else (1, share)
        return [ImageTokens(grid, size) for size in sizes]
