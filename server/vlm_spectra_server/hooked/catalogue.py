"""The hook points of a model, in the order in which a forward pass reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vlm_spectra.dtypes import name_of
from vlm_spectra.hooks import Catalogue, HookSpec

from .reading import Block, Reading
from .vision import specs as vision_specs

STREAM = ("batch", "seq", "hidden")
HEADS = ("batch", "seq", "heads", "head_dim")
KV_HEADS = ("batch", "seq", "kv_heads", "head_dim")
VALUES = ("batch", "seq", "kv_heads", "value_dim")
MIXED = ("batch", "seq", "heads", "value_dim")
PATTERN = ("batch", "heads", "query", "key")
NEURONS = ("batch", "seq", "mlp")
SCALE = ("batch", "seq", "1")

Has = Callable[[Block], bool]
"""Whether a block has a hook."""


def _has(role: str) -> Has:
    return lambda block: getattr(block, role) is not None


def _gated(block: Block) -> bool:
    return block.up is not None or block.gate_up is not None


def _activated(block: Block) -> bool:
    return block.gate is not None or block.gate_up is not None


def _always(block: Block) -> bool:
    return True


def _attends(block: Block) -> bool:
    return block.attends


_BLOCK: tuple[tuple[str, tuple[str, ...], Has, str], ...] = (
    ("hook_resid_pre", STREAM, _always, "the residual stream that enters the block"),
    ("ln1.hook_scale", SCALE, _has("ln1"), "what the norm before attention divides by"),
    ("attn.hook_in", STREAM, _always, "what attention reads: the block's input after its norm"),
    ("attn.hook_q", HEADS, _has("q"), "queries, before rotary position embedding"),
    ("attn.hook_k", KV_HEADS, _has("k"), "keys, before rotary position embedding"),
    ("attn.hook_v", VALUES, _attends, "values"),
    ("attn.hook_rot_q", HEADS, _attends, "queries, after rotary position embedding"),
    ("attn.hook_rot_k", KV_HEADS, _attends, "keys, after rotary position embedding"),
    (
        "attn.hook_mask",
        ("batch", "1", "query", "key"),
        _attends,
        "what may be read: 0, or -inf where masked; to intervene on only",
    ),
    ("attn.hook_scores", PATTERN, _attends, "what enters the softmax: scaled, masked with -inf"),
    (
        "attn.hook_pattern",
        PATTERN,
        _attends,
        "what leaves the softmax; each row sums to 1 (0 where nothing may be read)",
    ),
    ("attn.hook_z", MIXED, _attends, "values mixed by the pattern, before the output projection"),
    (
        "attn.hook_head_out",
        ("batch", "seq", "heads", "hidden"),
        _attends,
        "each head's share of attention's output, without bias",
    ),
    ("attn.hook_out", STREAM, _always, "the output projection's output"),
    ("ln1_post.hook_scale", SCALE, _has("ln1_post"), "what the norm after attention divides by"),
    ("hook_attn_out", STREAM, _always, "exactly what attention adds to the residual stream"),
    ("hook_resid_mid", STREAM, lambda block: not block.parallel, "the residual stream between attention and MLP"),
    ("ln2.hook_scale", SCALE, _has("ln2"), "what the norm before the MLP divides by"),
    ("mlp.hook_in", STREAM, _always, "what the MLP reads: hook_resid_mid after its norm"),
    (
        "mlp.hook_router_logits",
        ("batch", "seq", "experts"),
        lambda block: block.experts > 0,
        "what chooses the experts, before softmax or sigmoid; to capture only, in most families",
    ),
    ("mlp.hook_pre", NEURONS, _activated, "the gate, before its activation function"),
    ("mlp.hook_pre_linear", NEURONS, _gated, "what the gate multiplies"),
    ("mlp.hook_post", NEURONS, _has("down"), "what enters the down projection"),
    ("mlp.hook_out", STREAM, _always, "the down projection's output"),
    ("ln2_post.hook_scale", SCALE, _has("ln2_post"), "what the norm after the MLP divides by"),
    ("hook_mlp_out", STREAM, _always, "exactly what the MLP adds to the residual stream"),
    ("hook_extra_out", STREAM, _has("extra"), "what the block adds besides, from embeddings of its own"),
    ("hook_resid_post", STREAM, _always, "the residual stream that leaves the block"),
)


def build_catalogue(reading: Reading) -> Catalogue:
    """All hooks of the language model; a hook that a layer has not is not listed for it."""
    dtype = name_of(reading.dtype)
    specs = [HookSpec("lm.hook_embed", STREAM, dtype, "token embeddings with the image features merged in")]
    for name, shape, has, description in _BLOCK:
        kind = "float32" if shape == SCALE else dtype
        only = name == "attn.hook_mask"
        description += _without(reading, has)
        for axes, layers in _by_axes(reading, shape, has):
            specs.append(HookSpec(f"lm.blocks.{{layer}}.{name}", axes, kind, description, layers, only))
    layers = tuple(layer for layer in reading.deepstack if layer < len(reading.blocks) - 1)
    if layers:
        description = "image features added to the residual stream before the next block; 0 elsewhere"
        specs.append(HookSpec("lm.blocks.{layer}.hook_deepstack", STREAM, dtype, description, layers))
    specs += [
        HookSpec("lm.ln_final.hook_scale", SCALE, "float32", "what the final norm divides by"),
        HookSpec(
            "lm.ln_final.hook_normalized", STREAM, dtype, "the final residual stream over its scale, no weight yet"
        ),
        HookSpec("lm.ln_final.hook_out", STREAM, dtype, "the final norm's output, which the unembedding reads"),
    ]
    return Catalogue([*vision_specs(reading), *specs], reading.family.name)


def _without(reading: Reading, has: Has) -> str:
    """Which kinds of layer have not a hook that others have, for its description and for messages."""
    lacking = [block for block in reading.blocks if not has(block)]
    kinds = dict.fromkeys(block.kind if not block.attends else _mlp_kind(block) for block in lacking)
    return f" ({' and '.join(kinds)} layers have none)" if kinds and len(lacking) < len(reading.blocks) else ""


def _mlp_kind(block: Block) -> str:
    return "mixture-of-experts" if block.experts else "dense"


def _by_axes(reading: Reading, shape: tuple[str, ...], has: Has) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The layers with a hook, by the names of its axes: those that differ in an extent stand apart."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for block in reading.blocks:
        if has(block):
            groups.setdefault(tuple(_axis(reading, axis, block) for axis in shape), []).append(block.index)
    yield from ((axes, tuple(layers)) for axes, layers in groups.items())


_OF_BLOCK = {
    "heads": ("heads", "heads"),
    "kv_heads": ("kv_heads", "kv_heads"),
    "head_dim": ("head_dim", "head_dim"),
    "value_dim": ("head_dim", "value_dim"),
    "mlp": ("mlp", "neurons"),
    "experts": ("experts", "experts"),
}
"""Axes whose extent is a block's own: the name most blocks have it under, and the block's attribute."""


def _axis(reading: Reading, axis: str, block: Block) -> str:
    """An axis's name at a block: with its extent behind it, `head_dim_512`, where most blocks have another."""
    if axis not in _OF_BLOCK:
        return axis
    name, attribute = _OF_BLOCK[axis]
    extent = getattr(block, attribute)
    return name if extent == getattr(reading, name) else f"{name}_{extent}"


def sizes(reading: Reading, batch: int, seq: int) -> dict[str, int]:
    """The extent of each named axis for a batch."""
    extents = {"batch": batch, "seq": seq, "query": seq, "key": seq, "hidden": reading.hidden, "1": 1}
    extents |= {name: getattr(reading, name) for name, _ in _OF_BLOCK.values()}
    for block in reading.blocks:
        for axis, (_, attribute) in _OF_BLOCK.items():
            extents.setdefault(_axis(reading, axis, block), getattr(block, attribute))
    return extents
