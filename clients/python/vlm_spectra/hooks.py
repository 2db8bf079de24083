"""Hook names: their grammar, and a model's catalogue of them.

A hook name is a path of segments, `lm.blocks.{layer}.attn.hook_pattern`. In a request `*` stands for every layer, and
for any one segment. The names and their meaning are TransformerLens's wherever it has one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from . import scalars
from .errors import InvalidInputError, UnknownHookError, shown

GRADIENT = "_grad"
"""What ends the name of a gradient: that of a target with respect to the activation named before it."""

HookFilter = str | Sequence[str] | Callable[[str], bool]
"""A name or wildcard, a list of them, or a predicate on full names."""

POSITION_AXES = ("seq", "query")
"""The axis that a selection of positions applies to; of scores and patterns it is the query."""
HEAD_AXES = ("heads", "kv_heads", "vision_heads", "vision_kv_heads")
"""The axis that a selection of heads applies to."""


@dataclass(frozen=True)
class HookSpec:
    """A hook point.

    Attributes:
        name: Its name, `{layer}` in the place of the layer.
        shape: Its axes by name: batch, seq, query, key, heads, kv_heads, head_dim, hidden, mlp or 1; of the vision
            tower views, patches, vision_hidden, vision_heads, ...
        dtype: The element type, by name.
        description: What it is.
        layers: The layers that have it; empty where it is not in a layer.
        intervene_only: It can be changed but not captured.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    description: str
    layers: tuple[int, ...] = ()
    intervene_only: bool = False

    @property
    def position_axis(self) -> int | None:
        """The axis that positions select from, or None."""
        return next((i for i, axis in enumerate(self.shape) if axis in POSITION_AXES), None)

    @property
    def head_axis(self) -> int | None:
        """The axis that heads select from, or None."""
        return next((i for i, axis in enumerate(self.shape) if re.sub(r"_\d+$", "", axis) in HEAD_AXES), None)

    def names(self) -> list[str]:
        """The full names, one a layer."""
        return [self.name.format(layer=layer) for layer in self.layers] if self.layers else [self.name]


class Catalogue:
    """All hooks of a model, in the order in which a forward pass reaches them.

    Args:
        specs: The hook points; those of a layer stand together.
        family: The architecture's name, for messages.
    """

    def __init__(self, specs: Iterable[HookSpec], family: str) -> None:
        self.specs = list(specs)
        self.family = family
        self.by_name: dict[str, HookSpec] = {}
        for spec in _execution_order(self.specs):
            self.by_name[spec[0]] = spec[1]

    def spec(self, name: str) -> HookSpec:
        """The hook point of a full name.

        Raises:
            UnknownHookError: There is none; the message names the nearest.
        """
        base = gradient_of(name)
        if base in self.by_name:
            spec = self.by_name[base]
            return replace(spec, name=spec.name + GRADIENT, description=f"the gradient of: {spec.description}")
        if name not in self.by_name:
            raise UnknownHookError(self._unknown(name), field="hooks")
        return self.by_name[name]

    def expand(self, hooks: HookFilter, *, capture: bool, gradients: bool = False) -> list[str]:
        """The full names that a request means, in execution order; those of gradients behind all others.

        Args:
            hooks: A name or wildcard, a list of them, or a predicate on full names. A name or wildcard that ends in
                `_grad` means gradients, and no other does.
            capture: For a capture, hooks that can only be changed are left out of wildcards and refused by name.
            gradients: Whether a predicate is asked about gradients too.

        Raises:
            UnknownHookError: A name or wildcard that fits no hook.
            InvalidInputError: The request names nothing, or a hook that cannot be captured.
        """
        possible = [name for name, spec in self.by_name.items() if not (capture and spec.intervene_only)]
        differentiable = [name + GRADIENT for name in possible] if capture else []
        if callable(hooks):
            possible += differentiable if gradients else []
            wanted = {name for name in possible if hooks(name)}
            if not wanted:
                raise UnknownHookError("the predicate on hook names is true for none of them.", field="hooks")
            return [name for name in possible if name in wanted]
        wanted, known = set(), {*possible, *differentiable}
        patterns = hook_list(hooks)
        if not patterns:
            raise InvalidInputError("no hooks were named; `model.hooks()` lists all there are.", field="hooks")
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise InvalidInputError(f"a hook is named by a text, not {type(pattern).__name__}.", field="hooks")
            base = gradient_of(pattern)
            if base is not None and not capture:
                raise InvalidInputError(
                    f"{pattern} is a gradient and cannot be changed; {base} can.",
                    field="hooks",
                )
            names = possible if base is None else differentiable
            found = [pattern] if pattern in known else [name for name in names if matches(pattern, name)]
            if not found and (base or pattern) in self.by_name:
                raise InvalidInputError(
                    f"{base or pattern} can be changed but not captured; capture attn.hook_scores to see the mask at "
                    "work.",
                    field="hooks",
                )
            if not found:
                raise UnknownHookError(self._unknown(base or pattern), field="hooks")
            wanted.update(found)
        return [name for name in [*possible, *differentiable] if name in wanted]

    def _unknown(self, pattern: str) -> str:
        layer = re.search(r"(?<=\.blocks\.)-?\d+", pattern)
        if layer:
            tower = pattern.split(".")[0]
            same = [n for n in self.by_name if matches(_with_layer(pattern, "*"), n) and n.startswith(f"{tower}.")]
            if same:
                layers = [int(re.findall(r"\.(\d+)\.", name)[0]) for name in same]
                if any(name.startswith(f"{tower}.blocks.{layer.group()}.") for name in self.by_name):
                    why = re.search(r" \([^()]* have none\)", self.by_name[same[0]].description)
                    return (
                        f"layer {layer.group()} has no hook {shown(pattern)}{why.group() if why else ''}: the layers "
                        f"with it are {_ranges(layers)}."
                    )
                return (
                    f"layer {layer.group()} of {shown(pattern)} is out of range: the layers with this hook are "
                    f"{_ranges(layers)}; the last is {same[-1]!r}."
                )
        number = layer.group() if layer else "*"
        known = list(dict.fromkeys(name for real in self.by_name for name in (real, _with_layer(real, number))))
        known = [name for name in known if name in self.by_name or "*" in name]
        near = [name for name in known if name.split(".")[-1] == pattern.split(".")[-1]]
        near = list(dict.fromkeys([*difflib.get_close_matches(pattern, known, n=3, cutoff=0.4), *near]))[:3]
        return (
            f"the {self.family} model has no hook {shown(pattern)}; nearest: {', '.join(map(repr, near))}."
            if near
            else f"the {self.family} model has no hook {shown(pattern)}; `model.hooks()` lists all there are."
        )


def hook_list(hooks: Any) -> list[Any]:
    """One hook name or several, as a list.

    Raises:
        InvalidInputError: It is neither.
    """
    members = [hooks] if isinstance(hooks, str) else scalars.several(hooks)
    if members is None:
        raise InvalidInputError(
            f"hooks are a name or wildcard, a list of them, or a function of the name, not {shown(hooks)}.",
            field="hooks",
        )
    return members


def gradient_of(name: str) -> str | None:
    """The hook of which a name means the gradient; None where it means none."""
    return name.removesuffix(GRADIENT) if name.endswith(GRADIENT) else None


def matches(pattern: str, name: str) -> bool:
    """Whether a full name fits a pattern, segment by segment."""
    ours, theirs = pattern.split("."), name.split(".")
    return len(ours) == len(theirs) and all(map(fnmatchcase, theirs, ours))


def _execution_order(specs: list[HookSpec]) -> Iterable[tuple[str, HookSpec]]:
    block: list[HookSpec] = []
    for spec in [*specs, None]:
        if spec is not None and spec.layers and (not block or _tower(block[0]) == _tower(spec)):
            block.append(spec)
            continue
        for layer in sorted({layer for member in block for layer in member.layers}):
            for member in block:
                if layer in member.layers:
                    yield member.name.format(layer=layer), member
        block = []
        if spec is not None and spec.layers:
            block = [spec]
        elif spec is not None:
            yield spec.name, spec


def _tower(spec: HookSpec) -> str:
    return spec.name.split(".")[0]


def _with_layer(name: str, layer: str) -> str:
    return re.sub(r"(\.blocks\.)(-?\d+|\*)", rf"\g<1>{layer}", name)


def _ranges(numbers: Sequence[int]) -> str:
    numbers = sorted(set(numbers))
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
