"""Where a transformers model has its parts: the decoder's blocks, the norms, the unembedding, the sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vlm_spectra.errors import NotSupportedError

from ..families import family_of
from ..families.family import Family


@dataclass(frozen=True)
class Block:
    """The parts of one decoder block, by their roles."""

    index: int
    layer: nn.Module
    ln1: nn.Module
    attn: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Linear
    ln2: nn.Module
    mlp: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class Reading:
    """The parts and sizes of a model.

    Args:
        model: A transformers model for image and text to text.

    Attributes:
        family: What is special about its architecture.
        decoder: The language model without its unembedding.
        blocks: The decoder's blocks.
        final_norm: The norm before the unembedding.
        unembedding: Hidden width to vocabulary.
        config: The language model's configuration.

    Raises:
        NotSupportedError: The model has not the shape this library reads; the message names the missing part.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.family: Family = family_of(self.model.config.model_type)
        self.config = self.model.config.get_text_config()
        self.decoder: Any = self.model.get_decoder()
        self.unembedding: Any = self.model.get_output_embeddings()
        self.blocks = [self._block(index, layer) for index, layer in enumerate(self.decoder.layers)]
        self.final_norm: Any = self.decoder.norm
        self.heads = int(self.config.num_attention_heads)
        self.kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        # Read off the weights: a head is not always hidden / heads wide.
        self.head_dim = self.blocks[0].o.in_features // self.heads
        self.hidden = int(self.config.hidden_size)
        self.mlp = int(self.blocks[0].down.in_features)  # type: ignore[arg-type]
        self.vocab = int(self.unembedding.weight.shape[0])
        self.context = int(self.config.max_position_embeddings)
        self.image_token_id = int(
            getattr(self.model.config, "image_token_id", getattr(self.model.config, "image_token_index", -1))
        )

    def _block(self, index: int, layer: nn.Module) -> Block:
        try:
            parts = {role: layer.get_submodule(path) for role, path in self.family.parts.items()}
        except AttributeError as error:
            raise NotSupportedError(
                f"the {self.family.name} model's decoder block has an unknown shape: {error}."
            ) from error
        return Block(index, layer, **parts)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream."""
        dtype: torch.dtype = self.final_norm.weight.dtype
        return dtype

    def scale(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What a norm divides by, [..., 1] float32: sqrt(mean(x^2) + eps)."""
        eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 1e-6)
        return (x.float().pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """What the model makes of the final norm's output: [..., hidden] to [..., vocab]."""
        logits: torch.Tensor = self.unembedding(normed)
        return logits

    def folded_unembedding(self, ids: list[int]) -> torch.Tensor:
        """The residual directions of tokens, [n, hidden] float32: unembedding rows times the final norm's weight."""
        rows = self.unembedding.weight[ids].float()
        return rows * self.family.norm_weight(self.final_norm).float()

    def unembedding_bias(self, ids: list[int]) -> torch.Tensor:
        """The unembedding's biases of tokens, [n] float32; zeros where it has none."""
        bias = getattr(self.unembedding, "bias", None)
        return torch.zeros(len(ids), device=self.unembedding.weight.device) if bias is None else bias[ids].float()

    def head_weights(self, block: Block) -> torch.Tensor:
        """The output projection split by heads: [hidden, heads, head_dim]."""
        weight = block.o.weight
        if weight.shape != (self.hidden, self.heads * self.head_dim) or not weight.is_floating_point():
            raise NotSupportedError("heads cannot be told apart in a quantized output projection.")
        return weight.view(self.hidden, self.heads, self.head_dim)
