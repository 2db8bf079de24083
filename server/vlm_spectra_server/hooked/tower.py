"""Where a vision-language model has its vision tower's parts: the blocks, their attention and MLP, the sizes.

Towers differ in names more than in shape: a list of blocks, in each a norm, attention, a norm, an MLP. What fits that
is read by the roles below; a model whose tower does not fit has no vision hooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_ATTENTION = ("attn", "self_attn", "attention")
_MLP = ("mlp", "ffn", "feed_forward")
_SECOND_NORM = (
    "norm2",
    "layer_norm2",
    "layernorm_after",
    "ffn_norm",
    "rms_norm2",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
)
_OUTPUT = ("proj", "out_proj", "o_proj", "projection_layer")
_CLASS_TOKENS = ("class_embedding", "cls_token")
_WITHOUT_VIEWS = ("mllama_vision_model",)
"""Towers whose tiles attend to each other, so that a view has no pattern of its own."""


@dataclass(frozen=True)
class TowerBlock:
    """The parts of one block of a vision tower, by their roles.

    Attributes:
        index: Its number.
        layer: The block.
        attn: Attention.
        o: The output projection.
        projections: Queries, keys and values: three modules, or one that makes all three, or none that can be read.
        ln2: The norm before the MLP.
        mlp: The MLP.
        attn_end: The module whose output, times `attn_gain`, is added to the residual stream; attention or a norm.
        mlp_end: The same of the MLP.
        attn_gain: What attention's share is multiplied by, [hidden], or None.
        mlp_gain: The same of the MLP.
    """

    index: int
    layer: nn.Module
    attn: nn.Module
    o: nn.Module
    projections: tuple[nn.Module, ...]
    ln2: nn.Module
    mlp: nn.Module
    attn_end: nn.Module
    mlp_end: nn.Module
    attn_gain: torch.Tensor | None = None
    mlp_gain: torch.Tensor | None = None


class Tower:
    """The parts and sizes of a vision tower.

    Args:
        module: The tower.
        layers: Its blocks.
        config: The whole model's configuration.

    Attributes:
        kind: Its own `config.model_type`.
        merge_size: Its patches along one side of an image token.
        block: The same where the tower's order puts the patches of a token side by side; else 1.
        window: Pixels along one side of an attention window where the order follows windows; else 0.
        specials: Class tokens that stand before and behind the patches of a view.
        watchable: Whether its attention goes through transformers' registry, so that patterns can be seen.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module], config: Any) -> None:
        self.module = module
        self.blocks = [_block(index, layer) for index, layer in enumerate(layers)]
        first = self.blocks[0]
        self.config: Any = getattr(first.attn, "config", None) or module.config
        self.kind = str(getattr(module.config, "model_type", ""))
        norm = first.ln2.weight
        assert isinstance(norm, torch.Tensor)
        self.hidden = int(norm.shape[-1])
        self.heads = _number(self.config, "num_attention_heads", "num_heads")
        self.head_dim = _number(first.attn, "head_dim") or self.hidden // max(self.heads, 1)
        self.kv_heads = _number(self.config, "num_key_value_heads") or self.heads
        self.patch_size = _number(module.config, "patch_size")
        self.merge_size = _merge_size(module, config)
        self.block = _number(module, "spatial_merge_size") or _number(module.config, "spatial_merge_size") or 1
        self.window = _number(module, "window_size") if hasattr(module, "fullatt_block_indexes") else 0
        names = [name.rsplit(".", 1)[-1] for name, _ in module.named_parameters()]
        count = sum(name in _CLASS_TOKENS for name in names)
        self.specials = (0, count) if self.kind == "llama4_vision_model" else (count, 0)
        self.watchable = hasattr(first.attn, "config")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.module.parameters()).dtype


def read_tower(model: Any) -> Tower | None:
    """A model's vision tower, or None where it has none of the known shape."""
    module = model.get_encoder(modality="image")
    if module is model or not isinstance(module, nn.Module):
        return None
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList) and len(each) and _fits(each[0])]
    if not lists or getattr(getattr(module, "config", None), "model_type", _WITHOUT_VIEWS[0]) in _WITHOUT_VIEWS:
        return None
    return Tower(module, list(max(lists, key=len)), model.config)


def _fits(layer: nn.Module) -> bool:
    attention = _child(layer, _ATTENTION)
    roles = (attention, _child(layer, _MLP), _child(layer, _SECOND_NORM), attention and _child(attention, _OUTPUT))
    return all(roles)


def _child(parent: nn.Module, names: Sequence[str]) -> nn.Module | None:
    children = dict(parent.named_children())
    return next((children[name] for name in names if name in children), None)


def _block(index: int, layer: nn.Module) -> TowerBlock:
    attention, mlp, norm = _child(layer, _ATTENTION), _child(layer, _MLP), _child(layer, _SECOND_NORM)
    assert attention is not None
    assert mlp is not None
    assert norm is not None
    output = _child(attention, _OUTPUT)
    assert output is not None
    projections = [_child(attention, (name,)) for name in ("q_proj", "k_proj", "v_proj")]
    if None in projections:
        projections = [_child(attention, ("qkv",))]
    children = dict(layer.named_children())
    both = "pre_feedforward_layernorm" in children  # a norm behind each of the two as well
    gains = [getattr(layer, name, None) for name in ("lambda_1", "lambda_2")]
    return TowerBlock(
        index,
        layer,
        attention,
        output,
        tuple(each for each in projections if each is not None),
        norm,
        mlp,
        children["post_attention_layernorm"] if both else attention,
        children["post_feedforward_layernorm"] if both else mlp,
        *gains,
    )


def _merge_size(module: nn.Module, config: Any) -> int:
    """The tower's patches along one side of an image token, as the different configurations have it."""
    vision = module.config
    for owner in (vision, config):
        found = _number(owner, "spatial_merge_size", "scale_factor", "downsample_factor", "hidden_stride")
        found = found or _number(owner, "pooling_kernel_size", "merge_kernel_size")
        if found:
            return found
        ratio = getattr(owner, "downsample_ratio", None) or getattr(owner, "pixel_shuffle_ratio", None)
        if ratio:
            return round(1 / float(ratio))
    tokens, side = _number(config, "mm_tokens_per_image"), _number(vision, "image_size")
    if tokens and side and _number(vision, "patch_size"):
        return max(1, side // _number(vision, "patch_size") // math.isqrt(tokens))
    return 1


def _number(owner: Any, *names: str) -> int:
    """The first of these attributes that is a number, or a list of equal ones; 0 where none is."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, list | tuple) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(value)
    return 0
