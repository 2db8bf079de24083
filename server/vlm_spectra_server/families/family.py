"""The shape that nearly all vision-language models of transformers share; a family overrides what is different."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from .layouts import LAYOUTS, ImageTokens, Seen, common, unplaced

ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "decoder": ("model", "decoder", "language_model", "text_model", "transformer"),
        "final_norm": ("norm", "final_layernorm", "final_layer_norm", "layer_norm", "embedding_norm", "norm_f"),
        "attn": ("self_attn", "linear_attn", "attention", "attn", "conv", "cross_attn"),
        "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2"),
        "entry": ("fc1",),
        "ln1": (
            "input_layernorm",
            "pre_self_attn_layernorm",
            "operator_norm",
            "attention_norm",
            "attention_layernorm",
            "self_attn_layer_norm",
        ),
        "ln2": ("pre_feedforward_layernorm", "feedforward_layernorm", "ffn_norm", "final_layer_norm"),
        "ln1_post": ("post_self_attn_layernorm", "post_operator_norm", "post_norm1", "post_attention_layernorm"),
        "ln2_post": ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm", "post_norm2"),
        "extra": ("post_per_layer_input_norm",),
        "attn.q": ("q_proj", "q_b_proj"),
        "attn.k": ("k_proj",),
        "attn.v": ("v_proj",),
        "attn.own_v": ("v_norm", "v_sconv"),
        "attn.o": ("o_proj", "out_proj", "dense"),
        "mlp.gate": ("gate_proj", "w1", "fc1", "dense_h_to_4h"),
        "mlp.up": ("up_proj", "w3"),
        "mlp.gate_up": ("gate_up_proj",),
        "mlp.down": ("down_proj", "w2", "fc2", "dense_4h_to_h"),
        "mlp.router": ("gate", "router"),
    }
)
"""The names that transformers has for each part, by role; those of "attn." and "mlp." are inside attention and MLP.

A `post_attention_layernorm` stands before the MLP, unless the block has another norm there.
"""


class Family:
    """Where a family's parts are, where `ROLES` does not name them, and its conventions.

    Args:
        name: `config.model_type`.
    """

    model_type: ClassVar[str] = ""

    coordinates: ClassVar[str] = "processed_pixels"
    """How the family writes points: "processed_pixels" or "thousandths"."""

    answer_type: ClassVar[int] = 0
    """The token type of an answer's tokens, where the processor gives tokens types."""

    parts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Paths inside a decoder block, by role, where `ROLES` does not name them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def parts_of(self, index: int) -> Mapping[str, tuple[str, ...]]:
        """The roles of block `index` that are not found as in `ROLES`."""
        return {role: (path,) for role, path in self.parts.items()}

    def attn_multiplier(self, layer: nn.Module) -> float | torch.Tensor:
        """What a block multiplies attention's output by before it adds it to the stream."""
        return _residual_multiplier(layer)

    def mlp_multiplier(self, layer: nn.Module) -> float | torch.Tensor | None:
        """The same of its MLP's; None where more is done to it, so that what is added is the stream's difference."""
        return _residual_multiplier(layer)

    def logit_shape(self, config: Any, names: frozenset[str]) -> tuple[float, float | None]:
        """What logits are multiplied by and where they are capped, if at all.

        Args:
            config: The language model's configuration.
            names: The names that the model's forward uses: a configuration may have a number that no one reads.
        """
        scales = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier") if name in names)
        scale = next((each for each in scales if each is not None), None)
        if "logits_scaling" in names:
            scale = 1.0 / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None) if "final_logit_softcapping" in names else None
        return float(scale or 1.0), None if cap is None else float(cap)

    def deepstack(self, config: Any) -> tuple[int, ...]:
        """The layers after which image features are added to the stream."""
        indexes = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
        before = getattr(config, "deepstack_layer_map", None) or ()
        return tuple(range(len(indexes))) if indexes else tuple(layer - 1 for _, layer in before if layer > 0)

    def image_tokens(
        self,
        processor: Any,
        features: Mapping[str, Any],
        sizes: Sequence[Sequence[tuple[int, int]]],
        counts: Sequence[int],
    ) -> list[list[ImageTokens]]:
        """The token grids of a batch's images; see `layouts`.

        Args:
            processor: The model's processor.
            features: What the processor returned.
            sizes: [batch][images] width and height of each image as given.
            counts: [batch] image tokens of each prompt.

        Returns:
            [batch][images] with as many tokens as there are. Images whose tokens cannot be told apart by place have
            equal shares, each token of which stands for the whole image.
        """
        layout, number, batch = LAYOUTS.get(self.name, common), 0, []
        total = sum(map(len, sizes))
        for row, count in zip(sizes, counts, strict=True):
            share = count // max(len(row), 1)
            seen = [
                Seen(processor, features, number + i, total, size, share, len(row) == 1) for i, size in enumerate(row)
            ]
            tokens = [layout(image) for image in seen]
            if sum(image.count for image in tokens) != count:
                tokens = [unplaced(image) for image in seen]
            batch.append(tokens)
            number += len(row)
        return batch


def _residual_multiplier(layer: nn.Module) -> float:
    multiplier = getattr(layer, "residual_multiplier", 1.0)
    return multiplier if isinstance(multiplier, float) else 1.0
