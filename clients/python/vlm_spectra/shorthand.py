"""TransformerLens's short names of activations: `("resid_post", 3)`, `("pattern", 0)`, `("scale", 2, "ln1")`."""

from __future__ import annotations

from typing import Any

from . import scalars
from .errors import InvalidInputError, UnknownHookError, shown

_OTHER = {"attn_scores": "scores", "result": "head_out"}
"""Names that TransformerLens has for hooks which are named otherwise here."""
_BLOCK = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "deepstack")
_ATTENTION = ("q", "k", "v", "rot_q", "rot_k", "z", "scores", "pattern", "head_out")
_MLP = ("pre", "pre_linear", "post")
_WHOLE = {
    "embed": "lm.hook_embed",
    "scale": "lm.ln_final.hook_scale",
    "normalized": "lm.ln_final.hook_normalized",
}
"""Those that are in no layer."""


def in_block(name: str, kind: str | None = None) -> str:
    """What stands behind `lm.blocks.{layer}.` in a hook's name.

    Args:
        name: TransformerLens's short name, or already what is asked for.
        kind: The part of the block, where the name alone does not say it: "attn", "mlp", "ln1", "ln2".

    Raises:
        UnknownHookError: The name means no hook of a block.
    """
    if "hook_" in name:
        return name
    name = _OTHER.get(name, name)
    if kind in (None, "") and name in _BLOCK:
        return f"hook_{name}"
    part = kind or ("attn" if name in _ATTENTION else "mlp" if name in _MLP else None)
    if part is None:
        known = ", ".join((*_BLOCK, *_ATTENTION, *_MLP))
        raise UnknownHookError(f"{name!r} is no short name of an activation of a layer; there are {known}.")
    return f"{part}.hook_{name}"


def full(key: tuple[Any, ...], layers: int | None) -> str:
    """A hook's full name.

    Args:
        key: TransformerLens's short name, then the layer, negative from the end (None for what is in no layer), and the
            part of the layer as for `in_block`; the last two may be left out.
        layers: The model's layers; None where they are not known.

    Raises:
        InvalidInputError: The key has another shape.
        UnknownHookError: The name means no hook.
    """
    name, layer, kind = (*key, None, None, None)[:3]
    number = scalars.whole(layer)
    if not 1 <= len(key) <= 3 or not isinstance(name, str) or (number is None and layer is not None):
        raise InvalidInputError(f"a short name is (name, layer) or (name, layer, part of the layer), not {shown(key)}.")
    if number is None:
        return _WHOLE.get(name, name)
    if number < 0 and layers is not None:
        number += layers
    return f"lm.blocks.{number}.{in_block(name, kind)}"
