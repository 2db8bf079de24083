"""HyperCLOVA X: logits are multiplied by the number that Granite, with the same name for it, divides them by."""

from __future__ import annotations

from typing import Any

from .family import Family


class HyperClovaX(Family):
    """The common shape but for that."""

    model_type = "hyperclovax_vision_v2"

    def logit_shape(self, config: Any, names: frozenset[str]) -> tuple[float, float | None]:
        """`logits_scaling` multiplies."""
        return float(config.logits_scaling), None
