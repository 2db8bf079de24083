"""Llama 3.2 Vision: pictures stand beside the text, and gated cross-attention layers read them."""

from __future__ import annotations

import torch
from torch import nn

from .family import Family


class Mllama(Family):
    """A cross-attention layer does not run where a prompt has no picture."""

    model_type = "mllama"

    def attn_multiplier(self, layer: nn.Module) -> float | torch.Tensor:
        """The gate of a cross-attention layer."""
        gate = getattr(layer, "cross_attn_attn_gate", None)
        return super().attn_multiplier(layer) if gate is None else gate.detach().tanh()

    def mlp_multiplier(self, layer: nn.Module) -> float | torch.Tensor | None:
        """A cross-attention layer also silences the rows of text before the first picture."""
        return None if hasattr(layer, "cross_attn_mlp_gate") else super().mlp_multiplier(layer)
