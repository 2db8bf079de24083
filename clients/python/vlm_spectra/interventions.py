"""Interventions: what to change inside a forward pass, as data.

    model.run_with_hooks([
        ("lm.blocks.10.hook_resid_post", vs.AddActivation(direction, scale=4.0, positions="last")),
        ("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys="image")),
    ])

Every intervention names the part it changes by `positions` (query positions where the hook is about attention; all
where None) and, where the hook has heads, `heads` (all where None). Positions refer to the prompt; while an answer is
generated, an intervention without positions also changes each new token. "The selected part" of a hook has the hook's
axes, with as many positions and heads as were selected, in the order in which they were named.

Being data, an intervention can cross the network; nothing is ever unpickled. A plain callable `f(activation) ->
activation` serves in process only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import arrays, dtypes, scalars
from .calls import check_heads
from .errors import InvalidInputError, UnsupportedInterventionError, shown
from .hooks import Catalogue, HookSpec
from .positions import Positions, listed


@dataclass(frozen=True)
class CaptureRef:
    """An activation of an earlier capture that the server still holds: a patch that needs no bytes sent.

    Attributes:
        capture_id: The capture's id.
        hook: The full name of the hook.
    """

    capture_id: str
    hook: str


Value = Any
"""A numpy array, a PyTorch tensor, a number, or a `CaptureRef`."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """The base of all interventions.

    Attributes:
        positions: The positions to change; None for all.
        heads: The heads to change; None for all.
    """

    positions: Positions = field(default=None, kw_only=True)
    heads: Sequence[int] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class PatchActivation(Intervention):
    """Replaces the selected part by `value`, which broadcasts to its shape.

    Activation patching: Vig et al. 2020 (causal mediation), Meng et al. 2022 (causal tracing).
    """

    value: Value


@dataclass(frozen=True, eq=False)
class ZeroAblation(Intervention):
    """Sets the selected part to zero."""


@dataclass(frozen=True, eq=False)
class MeanAblation(Intervention):
    """Replaces the selected part by a mean over positions.

    Attributes:
        value: What to average: a tensor with the axes of the hook, its mean taken over all but those of one position
            (what remains is [..., hidden], or [..., heads, head_dim]); where None, the row's own activation, padding
            left out.
    """

    value: Value = None


@dataclass(frozen=True, eq=False)
class AddActivation(Intervention):
    """Adds `scale * value`, broadcast to the selected part (activation steering, Turner et al. 2023)."""

    value: Value
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class ScaleActivation(Intervention):
    """Multiplies the selected part by `factor`."""

    factor: float


@dataclass(frozen=True, eq=False)
class ProjectOut(Intervention):
    """Removes the component along `direction` ([width of the last axis]): x - (x.d / d.d) d."""

    direction: Value


@dataclass(frozen=True, eq=False)
class PatchHead(PatchActivation):
    """Replaces what heads write: on `attn.hook_z`, by `value` broadcast to [batch, positions, heads, head_dim].

    The same as `PatchActivation` there, and refused elsewhere, so that a typing error is not a silent patch of
    something else.
    """


@dataclass(frozen=True, eq=False)
class BlockAttention(Intervention):
    """On `attn.hook_mask`: the query positions (`positions`) can no longer read the key positions (`keys`).

    A query that is left with nothing to read gets a pattern of zeros. Geva et al. 2023 (attention knockout).
    """

    keys: Positions = None


@dataclass(frozen=True, eq=False)
class SetAttentionMask(Intervention):
    """On `attn.hook_mask`: replaces the mask, the causal one too, of the selected query positions and heads.

    Attributes:
        mask: Boolean (true: may be read) or floating point (added to the scores), broadcast to
            [batch, heads, positions, seq].
    """

    mask: Value


KINDS: tuple[type[Intervention], ...] = (
    PatchActivation,
    ZeroAblation,
    MeanAblation,
    AddActivation,
    ScaleActivation,
    ProjectOut,
    PatchHead,
    BlockAttention,
    SetAttentionMask,
)
"""All declarative interventions."""

MASK_KINDS = (BlockAttention, SetAttentionMask)
"""Those that belong on `attn.hook_mask`, and only there."""

HookedIntervention = tuple[str, Intervention | Callable[[Any], Any]]
"""A hook name or wildcard with what to do there."""


def check_intervention(pair: Any, catalogue: Catalogue, callables: bool = False) -> HookedIntervention:
    """A pair of a hook and an intervention, if the two go together.

    Args:
        pair: The pair.
        catalogue: The model's hooks.
        callables: Whether a function is taken as an intervention.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InvalidInputError(
            "run_with_hooks takes a list of pairs of a hook name and an intervention.", field="hooks"
        )
    pattern, action = pair
    if not isinstance(pattern, str):
        raise InvalidInputError(f"a hook is named by a text, not {type(pattern).__name__}.", field="hooks")
    names = catalogue.expand(pattern, capture=False)
    possible = ", ".join(kind.__name__ for kind in KINDS)
    if isinstance(action, KINDS):
        _check_kind(action, [catalogue.spec(name) for name in names], pattern)
        action = _plain(action)
    elif not callable(action) or isinstance(action, type):
        raise InvalidInputError(f"{shown(action)} is no intervention; possible are {possible}.", field="hooks")
    elif not callables:
        raise UnsupportedInterventionError(
            f"a function cannot be sent to a server; possible are {possible}.", field="hooks"
        )
    return pattern, action


def _check_kind(action: Intervention, specs: Sequence[HookSpec], pattern: str) -> None:
    """Refuse an intervention that does not go with its hooks."""
    kind = type(action).__name__
    for spec in specs:
        if isinstance(action, MASK_KINDS) != spec.intervene_only:
            possible = MASK_KINDS if spec.intervene_only else [k for k in KINDS if k not in MASK_KINDS]
            raise InvalidInputError(
                f"{kind} does not go with {spec.name}; there, possible are {', '.join(k.__name__ for k in possible)}.",
                field="hooks",
            )
        if isinstance(action, PatchHead) and not spec.name.endswith("attn.hook_z"):
            raise InvalidInputError(f"PatchHead goes with attn.hook_z, not with {spec.name}.", field="hooks")
        if check_heads(action.heads) is not None and spec.head_axis is None and not spec.intervene_only:
            raise InvalidInputError(f"{kind} names heads, but {pattern} has none.", field="heads")
        if action.positions is not None and spec.position_axis is None:
            raise InvalidInputError(f"{kind} names positions, but {pattern} has none.", field="positions")


def _plain(action: Intervention) -> Intervention:
    """An intervention with plain numbers, tuples and arrays in it, whatever the caller wrote them as."""
    kind = type(action).__name__
    changed: dict[str, Any] = {"positions": listed(action.positions), "heads": check_heads(action.heads)}
    if isinstance(action, BlockAttention):
        changed["keys"] = listed(action.keys)
    for name in ("scale", "factor"):
        if hasattr(action, name):
            changed[name] = scalars.real(getattr(action, name))
            if changed[name] is None:
                raise InvalidInputError(
                    f"the {name} of {kind} is a number, not {shown(getattr(action, name))}.", field=name
                )
    for name in ("value", "direction", "mask"):
        given = getattr(action, name, None)
        if given is not None:
            changed[name] = _mask(given) if name == "mask" else _value(given)
        elif hasattr(action, name) and not isinstance(action, MeanAblation):
            raise InvalidInputError(f"{kind} has no {name}.", field=name)
    return replace(action, **changed)


def _mask(value: Value) -> Value:
    """A mask as `_value` gives it. Whole numbers are none: 0 and 1 mean false and true to some, and would be added."""
    mask = _value(value)
    kind = str(getattr(mask, "dtype", type(mask).__name__))
    if "int" in kind:
        raise InvalidInputError(
            f"a mask is boolean (true: may be read) or floating point (added to the scores), not {kind}.", field="mask"
        )
    return mask


def _value(value: Value) -> Value:
    """A value as a `CaptureRef`, a number, a dense tensor, or an array of numbers in this machine's order of bytes."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidInputError(
            f"an intervention's value is {shown(value)}; a whole number there is from -2**63 to 2**63 - 1.",
            field="value",
        )
    if isinstance(value, CaptureRef | bool | int | float):
        return value
    refusal = f"an intervention's value is an array or a number, not {type(value).__name__}"
    if arrays.is_torch(value):
        if value.is_meta or str(value.layout) != "torch.strided":
            raise InvalidInputError(f"{refusal} without data or in a sparse layout.", field="value")
        return value
    try:
        array = np.asarray(value)
        dtypes.name_of(array.dtype)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{refusal}.", field="value") from error
    return array.astype(array.dtype.newbyteorder("="), copy=False)
