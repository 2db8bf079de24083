"""The hook points of a model, in the order in which a forward pass reaches them."""

from __future__ import annotations

from vlm_spectra.dtypes import name_of
from vlm_spectra.hooks import Catalogue, HookSpec

from .reading import Reading

STREAM = ("batch", "seq", "hidden")
HEADS = ("batch", "seq", "heads", "head_dim")
KV_HEADS = ("batch", "seq", "kv_heads", "head_dim")
PATTERN = ("batch", "heads", "query", "key")
NEURONS = ("batch", "seq", "mlp")
SCALE = ("batch", "seq", "1")

_BLOCK: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("hook_resid_pre", STREAM, "the residual stream that enters the block"),
    ("ln1.hook_scale", SCALE, "what the norm before attention divides by"),
    ("attn.hook_in", STREAM, "what attention reads: the block's input after its norm"),
    ("attn.hook_q", HEADS, "queries, before rotary position embedding"),
    ("attn.hook_k", KV_HEADS, "keys, before rotary position embedding"),
    ("attn.hook_v", KV_HEADS, "values"),
    ("attn.hook_rot_q", HEADS, "queries, after rotary position embedding"),
    ("attn.hook_rot_k", KV_HEADS, "keys, after rotary position embedding"),
    (
        "attn.hook_mask",
        ("batch", "1", "query", "key"),
        "what may be read: 0, or -inf where masked; to intervene on only",
    ),
    ("attn.hook_scores", PATTERN, "what enters the softmax: scaled, masked with -inf"),
    ("attn.hook_pattern", PATTERN, "what leaves the softmax; each row sums to 1 (0 where nothing may be read)"),
    ("attn.hook_z", HEADS, "values mixed by the pattern, before the output projection"),
    (
        "attn.hook_head_out",
        ("batch", "seq", "heads", "hidden"),
        "each head's share of attention's output, without bias",
    ),
    ("attn.hook_out", STREAM, "the output projection's output"),
    ("hook_attn_out", STREAM, "exactly what attention adds to the residual stream"),
    ("hook_resid_mid", STREAM, "the residual stream between attention and MLP"),
    ("ln2.hook_scale", SCALE, "what the norm before the MLP divides by"),
    ("mlp.hook_in", STREAM, "what the MLP reads: hook_resid_mid after its norm"),
    ("mlp.hook_pre", NEURONS, "the gate, before its activation function"),
    ("mlp.hook_pre_linear", NEURONS, "what the gate multiplies"),
    ("mlp.hook_post", NEURONS, "what enters the down projection"),
    ("mlp.hook_out", STREAM, "the down projection's output"),
    ("hook_mlp_out", STREAM, "exactly what the MLP adds to the residual stream"),
    ("hook_resid_post", STREAM, "the residual stream that leaves the block"),
)


def build_catalogue(reading: Reading) -> Catalogue:
    """All hooks of the language model."""
    dtype = name_of(reading.dtype)
    layers = tuple(range(len(reading.blocks)))
    specs = [HookSpec("lm.hook_embed", STREAM, dtype, "token embeddings with the image features merged in")]
    for name, shape, description in _BLOCK:
        kind = "float32" if shape == SCALE else dtype
        only = name == "attn.hook_mask"
        specs.append(HookSpec(f"lm.blocks.{{layer}}.{name}", shape, kind, description, layers, only))
    specs += [
        HookSpec("lm.ln_final.hook_scale", SCALE, "float32", "what the final norm divides by"),
        HookSpec(
            "lm.ln_final.hook_normalized", STREAM, dtype, "the final residual stream over its scale, no weight yet"
        ),
        HookSpec("lm.ln_final.hook_out", STREAM, dtype, "the final norm's output, which the unembedding reads"),
    ]
    return Catalogue(specs, reading.family.name)


def sizes(reading: Reading, batch: int, seq: int) -> dict[str, int]:
    """The extent of each named axis for a batch."""
    return {
        "batch": batch,
        "seq": seq,
        "query": seq,
        "key": seq,
        "heads": reading.heads,
        "kv_heads": reading.kv_heads,
        "head_dim": reading.head_dim,
        "hidden": reading.hidden,
        "mlp": reading.mlp,
        "1": 1,
    }
