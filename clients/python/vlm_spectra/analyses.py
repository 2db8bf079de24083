"""What an analysis asks for: the options of a lens, an attribution, a sweep; checked here, once for all models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from . import scalars
from .calls import Target, TokenLike, check_heads, choose, token_list
from .errors import InvalidInputError, shown
from .hooks import Catalogue, HookFilter, hook_list
from .info import ModelInfo
from .inputs import Inputs
from .positions import PositionItem, Positions, listed

METHODS = (
    "direct_logit",
    "gradient_x_input",
    "integrated_gradients",
    "occlusion",
    "attention_rollout",
    "relevancy",
    "grad_cam",
    "attribution_patching",
)
"""The attribution methods of the contract."""

BASELINES = ("mean", "black", "blurred")
"""What integrated gradients start from, and what occlusion covers an image with."""

MODES = ("denoising", "noising")
"""The directions of patching."""


@dataclass(frozen=True)
class LensOptions:
    """A checked logit lens; the arguments of `logit_lens`."""

    hook: str
    layers: tuple[int, ...]
    positions: tuple[PositionItem, ...] | None
    top_k: int
    targets: tuple[TokenLike, ...]

    @classmethod
    def checked(
        cls,
        catalogue: Catalogue,
        info: ModelInfo,
        top_k: int,
        hook: str,
        layers: Sequence[int] | None,
        positions: Positions,
        targets: TokenLike | Sequence[TokenLike] | None,
    ) -> LensOptions:
        """The options, or the error that says what is wrong with them."""
        top_k = scalars.count(top_k, "top_k", info.vocab)
        name, there = _readable(catalogue, hook)
        count = info.layers
        numbers = [scalars.whole(layer) for layer in scalars.each(there if layers is None else layers)]
        if not numbers or any(number is None or not -count <= number < count for number in numbers):
            raise InvalidInputError(
                f"layers is {shown(layers)}; it is a list of layers, and the model has 0 to {count - 1}.",
                field="layers",
            )
        chosen = tuple(dict.fromkeys(number % count for number in numbers if number is not None))
        if not set(chosen) <= set(there):
            raise InvalidInputError(
                f"layers is {list(chosen)}, but {name} is only in layers {', '.join(map(str, there))}.", field="layers"
            )
        return cls(name, chosen, listed(positions), top_k, token_list(targets))


@dataclass(frozen=True)
class AttributionOptions:
    """A checked attribution; the arguments of `attribute`."""

    method: str
    target: Target
    steps: int
    baseline: str
    window: int
    stride: int
    against: Inputs | None

    @classmethod
    def checked(
        cls,
        method: str,
        target: Target,
        steps: int | None,
        baseline: str,
        window: int | None,
        stride: int | None,
        against: Inputs | None,
    ) -> AttributionOptions:
        """The options, or the error that says what is wrong with them."""
        choose("method", method, METHODS)
        steps = _of_method("steps", steps, method, "integrated_gradients", 4096)
        window = _of_method("window", window, method, "occlusion", 256)
        stride = _of_method("stride", stride, method, "occlusion", window or 1)
        if (against is not None) != (method == "attribution_patching"):
            raise InvalidInputError(
                "attribution_patching, and no other method, compares with second prompts: against=...",
                field="against",
            )
        chosen = choose("baseline", baseline, BASELINES)
        return cls(method, target, steps or 0, chosen, window or 1, stride or window or 1, against)


@dataclass(frozen=True)
class SweepOptions:
    """A checked sweep; the arguments of `patch_sweep`."""

    hooks: tuple[str, ...]
    positions: tuple[PositionItem, ...] | None
    heads: tuple[int, ...] | None
    metric: Target
    mode: str

    @classmethod
    def checked(
        cls,
        catalogue: Catalogue,
        info: ModelInfo,
        hooks: HookFilter,
        positions: Positions,
        heads: Sequence[int] | Literal["all"] | None,
        metric: Target,
        mode: str,
    ) -> SweepOptions:
        """The options, or the error that says what is wrong with them."""
        hooks = hooks if callable(hooks) else hook_list(hooks)
        names = catalogue.expand(hooks, capture=True)
        specs = [catalogue.spec(name) for name in names]
        for spec in specs:
            if not spec.name.startswith("lm.") or spec.position_axis is None:
                raise InvalidInputError(
                    f"a sweep patches hooks of the language model that have positions; {spec.name} is none.",
                    field="hooks",
                )
        chosen: tuple[int, ...] | None = None
        if heads is not None:
            axes = {None if spec.head_axis is None else spec.shape[spec.head_axis] for spec in specs}
            if len(axes) > 1 or None in axes:
                raise InvalidInputError(
                    "a sweep over heads needs hooks that all have as many: attn.hook_z, hook_q, hook_pattern, ... or "
                    "attn.hook_k and hook_v.",
                    field="hooks",
                )
            count = info.kv_heads if "kv_heads" in axes else info.heads
            chosen = check_heads(range(count) if isinstance(heads, str) and heads == "all" else heads)
            beyond = [head for head in chosen or () if head >= count]
            if beyond:
                raise InvalidInputError(
                    f"head {beyond[0]} is out of range: these hooks have 0 to {count - 1}.", field="heads"
                )
        patterns = tuple(names) if callable(hooks) else tuple(hooks)
        return cls(patterns, listed(positions), chosen, metric, choose("mode", mode, MODES))


def _readable(catalogue: Catalogue, hook: str) -> tuple[str, tuple[int, ...]]:
    """What stands behind `lm.blocks.{layer}.` in the name of a stream that a lens can read, and its layers."""
    block = "lm.blocks.{layer}."
    streams = {
        spec.name.removeprefix(block): spec.layers
        for spec in catalogue.specs
        if spec.name.startswith(block) and spec.shape == ("batch", "seq", "hidden")
    }
    name = hook.removeprefix("lm.blocks.*.") if isinstance(hook, str) else hook
    return choose("hook", name, tuple(streams)), streams[name]


def _of_method(name: str, value: int | None, method: str, owner: str, most: int) -> int | None:
    """An option of one method; refused where it is out of its range or was given to another."""
    if value is None:
        return None
    number = scalars.count(value, name, most)
    if method != owner:
        raise InvalidInputError(f"{name} is an option of {owner}, not of {method}.", field=name)
    return number
