"""Qwen2-VL and Qwen2.5-VL (UI-TARS is one): pictures keep their proportions; a token is 2 x 2 patches."""

from __future__ import annotations

from .family import Family


class Qwen25VL(Family):
    """Qwen2.5-VL writes points in pixels of the resized image."""

    model_type = "qwen2_5_vl"


class Qwen2VL(Qwen25VL):
    """Qwen2-VL writes points in thousandths of the image."""

    model_type = "qwen2_vl"
    coordinates = "thousandths"
