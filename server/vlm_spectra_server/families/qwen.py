"""Qwen2-VL and Qwen2.5-VL (UI-TARS is one): pictures keep their proportions; a token is 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .family import Family, ImageTokens


class Qwen25VL(Family):
    """Qwen2.5-VL writes points in pixels of the resized image."""

    model_type = "qwen2_5_vl"

    def image_tokens(
        self, processor: Any, features: Mapping[str, Any], sizes: Sequence[tuple[int, int]], count: int
    ) -> list[ImageTokens]:
        """`image_grid_thw` has each image's patches: 1, rows, columns."""
        merge, patch = processor.image_processor.merge_size, processor.image_processor.patch_size
        return [
            ImageTokens((rows // merge, columns // merge), (columns * patch, rows * patch))
            for _, rows, columns in features["image_grid_thw"].tolist()
        ]


class Qwen2VL(Qwen25VL):
    """Qwen2-VL writes points in thousandths of the image."""

    model_type = "qwen2_vl"
    coordinates = "thousandths"
