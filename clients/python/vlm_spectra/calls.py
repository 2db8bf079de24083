"""What a call asks for: its options, its target, its capture. Checked here, once for every kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import dtypes, scalars
from .errors import InvalidInputError, shown
from .hooks import Catalogue, HookSpec, gradient_of, hook_list
from .positions import PositionItem, Positions, listed

TokenLike = int | str
"""A token by its id, or by its text, which must be exactly one token."""

REDUCTIONS = ("mean_heads", "norm")
"""What can be computed of a capture before it is kept: the mean over heads, the Euclidean norm over the last axis."""

COMPRESSIONS = ("auto", "none", "zstd")
"""How what a server sends can be packed; "auto" goes by the link's speed."""


@dataclass(frozen=True)
class GenerateOptions:
    """How to choose tokens; the arguments of `generate`."""

    max_new_tokens: int = 512
    output_hidden_states: bool = False
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count, temperature = scalars.whole(self.max_new_tokens), scalars.single(self.temperature)
        top_p, seed = scalars.single(self.top_p), scalars.whole(self.seed)
        if count is None or count < 1:
            raise InvalidInputError(
                f"max_new_tokens is {shown(self.max_new_tokens)}; at least 1 token is possible (forward() looks at the "
                "prompt alone).",
                field="max_new_tokens",
            )
        if self.temperature is not None and not (temperature and temperature > 0):
            raise InvalidInputError(
                f"temperature is {shown(self.temperature)}; it must be greater than 0, also as float32 "
                "(do_sample=False takes the most probable token).",
                field="temperature",
            )
        if self.top_p is not None and not (top_p and 0 < top_p <= 1):
            raise InvalidInputError(
                f"top_p is {shown(self.top_p)}; it must be in (0, 1], also as float32.", field="top_p"
            )
        if self.seed is not None and (seed is None or not 0 <= seed < 2**63):
            raise InvalidInputError(f"seed is {shown(self.seed)}; it must be from 0 to 2**63 - 1.", field="seed")
        flags = {name: scalars.flag(getattr(self, name), name) for name in ("output_hidden_states", "do_sample")}
        plain = {"max_new_tokens": min(count, scalars.LARGEST), "temperature": temperature, "top_p": top_p, **flags}
        for name, value in (*plain.items(), ("seed", seed)):
            object.__setattr__(self, name, value)
        chosen = [name for name in ("temperature", "top_p", "seed") if getattr(self, name) is not None]
        if chosen and not self.do_sample:
            raise InvalidInputError(f"{', '.join(chosen)} needs do_sample=True.", field=chosen[0])
        if not all(scalars.text(text, "stop", "each of stop") for text in self.stop):
            raise InvalidInputError("stop is a list of texts that are not empty.", field="stop")


@dataclass(frozen=True)
class ForwardOptions:
    """What a forward pass returns; the arguments of `forward`.

    Attributes:
        logits_to_keep: The last so many positions, 0 for all; or a tuple of positions; None for no logits.
        output_hidden_states: Also the residual stream before each block and the final norm's output.
        output_attentions: Also each block's attention pattern.
    """

    logits_to_keep: int | tuple[int, ...] | None = 0
    output_hidden_states: bool = False
    output_attentions: bool = False

    def __post_init__(self) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            object.__setattr__(self, name, scalars.flag(getattr(self, name), name))
        keep = self.logits_to_keep
        if keep is None:
            return
        number, members = scalars.whole(keep), scalars.several(keep)
        found = [scalars.whole(member) for member in members or ()] if number is None else [number]
        least = -scalars.LARGEST if number is None else 0
        if not found or any(each is None or not least <= each <= scalars.LARGEST for each in found):
            raise InvalidInputError(
                f"logits_to_keep is {shown(keep)}; possible are a number of last positions (0 for all), a list of "
                "positions, or None for no logits.",
                field="logits_to_keep",
            )
        object.__setattr__(self, "logits_to_keep", tuple(found) if number is None else number)


@dataclass(frozen=True)
class CaptureOptions:
    """What a run captures; the arguments of `run_with_cache`.

    Attributes:
        hooks: Names or wildcards, checked against the catalogue.
        positions: The positions to keep; None for all.
        heads: The heads to keep; None for all.
        dtype: The type to cast to, by name; None for the model's own.
        backward_from: Whose gradient the `_grad` hooks hold; None where there are none.
        reduce: What to compute of each before it is kept, one of `REDUCTIONS`; None for nothing.
        compression: How to pack what a server sends: one of `COMPRESSIONS`.
    """

    hooks: tuple[str, ...]
    positions: tuple[PositionItem, ...] | None = None
    heads: tuple[int, ...] | None = None
    dtype: str | None = None
    backward_from: Target | None = None
    reduce: str | None = None
    compression: str = "auto"

    @classmethod
    def checked(
        cls,
        catalogue: Catalogue,
        hooks: Any,
        positions: Positions,
        heads: Sequence[int] | None,
        dtype: Any,
        backward_from: Target | None = None,
        reduce: str | None = None,
    ) -> CaptureOptions:
        """The options, or the error that says what is wrong with them."""
        hooks = hooks if callable(hooks) else hook_list(hooks)
        names = catalogue.expand(hooks, capture=True, gradients=backward_from is not None)
        gradients = [name for name in names if gradient_of(name) is not None]
        if gradients and backward_from is None:
            raise InvalidInputError(
                f"{gradients[0]} needs backward_from=...: a token, a pair of tokens for the difference of their "
                "logits, or a vs.Target.",
                field="backward_from",
            )
        if backward_from is not None and backward_from.answer is not None:
            raise InvalidInputError(
                "backward_from is a logit or a difference of two, not an answer; put the answer into assistant_prefill "
                "and name a token.",
                field="backward_from",
            )
        if backward_from is not None and not gradients:
            raise InvalidInputError(
                f"backward_from was given, but no gradient is asked for; {names[0]}_grad would be one.",
                field="backward_from",
            )
        patterns = tuple(names) if callable(hooks) else tuple(hooks)
        chosen = check_heads(heads)
        if chosen is not None and not any(catalogue.spec(name).head_axis is not None for name in names):
            raise InvalidInputError(
                "heads were given, but none of the hooks has heads; attn.hook_q, hook_k, hook_v, hook_z, hook_pattern, "
                "hook_scores and hook_head_out have.",
                field="heads",
            )
        if positions is not None and not any(catalogue.spec(name).position_axis is not None for name in names):
            axes = _axes(catalogue.spec(names[0]))
            raise InvalidInputError(
                f"positions were given, but none of the hooks has any: {names[0]} has {axes}.",
                field="positions",
            )
        if reduce is not None:
            choose("reduce", reduce, REDUCTIONS)
        headless = [name for name in names if catalogue.spec(name).head_axis is None]
        if reduce == "mean_heads" and headless:
            axes = _axes(catalogue.spec(headless[0]))
            raise InvalidInputError(
                f"reduce='mean_heads' needs hooks with heads, and {headless[0]} has {axes}.", field="reduce"
            )
        cast = None if dtype is None else dtypes.cast_name(dtype)
        return cls(patterns, listed(positions), chosen, cast, backward_from, reduce)


@dataclass(frozen=True)
class Target:
    """A scalar of the output: a token's logit at a position, the difference of two, or an answer's log-probability.

    Attributes:
        token: The token; None for the model's own next token, row by row.
        minus: The token whose logit is subtracted.
        position: The position that predicts the token; None for the last of each row.
        answer: Text behind the prompt: the sum of its tokens' log-probabilities, each with those before it given.

    Raises:
        InvalidInputError: A position that is no number; an answer that is empty, or with a token or a position.
    """

    token: TokenLike | None = None
    minus: TokenLike | None = None
    position: int | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        position = scalars.whole(self.position)
        if self.position is not None and (position is None or abs(position) > scalars.LARGEST):
            raise InvalidInputError(
                f"position is {shown(self.position)}; it is a column of the prompt (negative from the end), or None "
                "for the last of each row.",
                field="position",
            )
        object.__setattr__(self, "position", position)
        if self.answer is None:
            return
        if not scalars.text(self.answer, "target", "an answer to explain"):
            raise InvalidInputError("an answer to explain is a text that is not empty.", field="target")
        if (self.token, self.minus, self.position) != (None, None, None):
            raise InvalidInputError(
                "an answer stands behind the prompt and is explained whole; it goes with no token and no position.",
                field="target",
            )

    @classmethod
    def of(cls, target: Any, position: int | None = None) -> Target:
        """A target from what `attribute` takes: None, a token, a pair of tokens, or a `Target`."""
        if isinstance(target, Target):
            return target if position is None else replace(target, position=position)
        if target is None:
            return cls(position=position)
        if isinstance(target, tuple | list) and len(target) == 2:
            return cls(_token(target[0]), _token(target[1]), position)
        return cls(_token(target), None, position)


def _axes(spec: HookSpec) -> str:
    return f"[{', '.join(spec.shape)}]"


def _token(token: Any) -> TokenLike:
    if isinstance(token, str):
        return scalars.text(token, "target", "a token")
    number = scalars.whole(token)
    if number is None or abs(number) > scalars.LARGEST:
        raise InvalidInputError(
            f"a target is a token (its text or id), a pair of tokens for a difference, or None, not {shown(token)}.",
            field="target",
        )
    return number


def token_list(tokens: Any) -> tuple[TokenLike, ...]:
    """One token or several, as a tuple."""
    if tokens is None:
        return ()
    return tuple(_token(token) for token in scalars.each(tokens))


def choose(name: str, value: str, possible: Sequence[str]) -> str:
    """The value, if it is a possible one of the named argument."""
    if value not in possible:
        raise InvalidInputError(f"{name} is {value!r}; possible are {', '.join(possible)}.", field=name)
    return value


def check_heads(heads: Sequence[int] | int | None) -> tuple[int, ...] | None:
    """Heads as a tuple of numbers from 0, or None for all."""
    if heads is None:
        return None
    numbers = [scalars.whole(head) for head in scalars.each(heads)]
    if not numbers or any(number is None or not 0 <= number <= scalars.LARGEST for number in numbers):
        raise InvalidInputError(f"heads is a list of head numbers from 0, not {shown(heads)}.", field="heads")
    if len(set(numbers)) < len(numbers):  # thousands of one would be computed, whatever is kept of them
        raise InvalidInputError(f"heads names a head more than once: {shown(heads)}; give each once.", field="heads")
    return tuple(number for number in numbers if number is not None)
