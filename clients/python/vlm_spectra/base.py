"""What a model in process and a remote one share: the checking of arguments, the `with` blocks, the shapes of results.

A subclass says how a checked call is carried out: `_prepare`, `_forward`, `_generate`, `_stream`, `_lens`,
`_attribute`, `_unembed` and `_texts`. All else is here, once, so that the two cannot drift apart.

Captures and interventions belong to the block, in a context variable: threads and tasks never see each other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np

from . import arrays
from .arrays import Array
from .attribution import Attribution
from .cache import ActivationCache
from .calls import (
    BASELINES,
    LENS_HOOKS,
    METHODS,
    CaptureOptions,
    ForwardOptions,
    GenerateOptions,
    Target,
    TokenLike,
    check_heads,
    choose,
    token_list,
)
from .errors import InvalidInputError, NotSupportedError, UnsupportedInterventionError
from .hooks import Catalogue, HookFilter, HookSpec
from .images import ImageLike
from .info import ModelInfo
from .inputs import Inputs, Prompt, make_prompts
from .interventions import KINDS, MASK_KINDS, HookedIntervention, Intervention, PatchHead
from .lens import LogitLens
from .positions import PositionItem, Positions, listed
from .results import ForwardOutput, Generation, Token

Hooked = tuple[HookedIntervention, ...]


@dataclass(frozen=True)
class LensOptions:
    """A checked logit lens; see `BaseVLM.logit_lens`."""

    hook: str
    layers: tuple[int, ...]
    positions: tuple[PositionItem, ...] | None
    top_k: int
    targets: tuple[TokenLike, ...]


@dataclass(frozen=True)
class AttributionOptions:
    """A checked attribution; see `BaseVLM.attribute`."""

    method: str
    target: Target
    steps: int
    baseline: str


@dataclass(frozen=True)
class _Frame:
    """What the `with` blocks around a call ask for."""

    interventions: Hooked = ()
    capture: CaptureOptions | None = None
    cache: ActivationCache | None = None


_FRAMES: ContextVar[Mapping[int, _Frame]] = ContextVar("vlm_spectra_frames", default={})  # noqa: B039


class BaseVLM(ABC):
    """A vision-language model that can be looked into. See `vlm_spectra.VLM` for the interface alone."""

    accepts_callables: bool = False
    """Whether an intervention may be a Python function."""

    @property
    @abstractmethod
    def info(self) -> ModelInfo:
        """The model's sizes and names."""

    @property
    @abstractmethod
    def catalogue(self) -> Catalogue:
        """The model's hooks."""

    @abstractmethod
    def _prepare(self, prompts: tuple[Prompt, ...]) -> Inputs: ...

    @abstractmethod
    def _forward(
        self,
        inputs: Inputs,
        options: ForwardOptions,
        interventions: Hooked,
        capture: CaptureOptions | None,
        cache: ActivationCache | None,
    ) -> ForwardOutput: ...

    @abstractmethod
    def _generate(
        self,
        inputs: Inputs,
        options: GenerateOptions,
        interventions: Hooked,
        capture: CaptureOptions | None,
        cache: ActivationCache | None,
    ) -> Generation: ...

    @abstractmethod
    def _stream(self, inputs: Inputs, options: GenerateOptions, interventions: Hooked) -> Iterator[Token]: ...

    @abstractmethod
    def _lens(self, inputs: Inputs, options: LensOptions, interventions: Hooked) -> Mapping[str, Array]: ...

    @abstractmethod
    def _attribute(self, inputs: Inputs, options: AttributionOptions, interventions: Hooked) -> Mapping[str, Array]: ...

    @abstractmethod
    def _unembed(self, tokens: tuple[TokenLike, ...]) -> Array: ...

    @abstractmethod
    def _texts(self, ids: Sequence[int]) -> list[str]: ...

    def close(self) -> None:  # noqa: B027  # in process there is nothing to let go of
        """Let go of what the model holds. Nothing else may be called afterwards."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def hooks(self) -> list[HookSpec]:
        """The catalogue of hook points: name, axes, dtype, what each is."""
        return list(self.catalogue.specs)

    @overload
    def prepare_messages(
        self,
        task: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        assistant_prefill: str = "",
        return_text: Literal[False] = False,
        *,
        system: str = "",
    ) -> Inputs: ...

    @overload
    def prepare_messages(
        self,
        task: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        assistant_prefill: str = "",
        *,
        return_text: Literal[True],
        system: str = "",
    ) -> tuple[Inputs, str]: ...

    def prepare_messages(
        self,
        task: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        assistant_prefill: str = "",
        return_text: bool = False,
        *,
        system: str = "",
    ) -> Inputs | tuple[Inputs, str]:
        """Format a task and its images as the model expects, and turn them into tokens.

        Args:
            task: What the user asks.
            image: One image, a list, or None. A PIL image, a path, the bytes of a file, or an array
                [height, width, 3] of uint8.
            assistant_prefill: Text that the answer begins with.
            return_text: Also return the formatted prompt.
            system: A system message; the chat template's own default where empty.

        Returns:
            The inputs, a batch of one; with `return_text`, and the formatted prompt.

        Raises:
            InvalidInputError: The task is empty.
            InvalidImageError: An image cannot be read or is too large.
            PromptTooLongError: The prompt has more tokens than the model's context.
        """
        inputs = self._prepare(make_prompts([task], [image], assistant_prefill, system))
        return (inputs, inputs.text[0]) if return_text else inputs

    def prepare_messages_batch(
        self,
        tasks: Sequence[str],
        images: Sequence[ImageLike | Sequence[ImageLike] | None] | None = None,
        assistant_prefill: str | Sequence[str] = "",
        *,
        system: str = "",
    ) -> Inputs:
        """As `prepare_messages`, for several rows; shorter ones are padded on the left.

        Args:
            tasks: [batch] what to ask.
            images: [batch] of an image, a list of images, or None; None for no images at all.
            assistant_prefill: The start of every answer, or [batch] of them.
            system: The system message of every row.
        """
        return self._prepare(make_prompts(tasks, images, assistant_prefill, system))

    def generate(
        self,
        inputs: Inputs,
        max_new_tokens: int = 512,
        output_hidden_states: bool = False,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Let the model answer.

        Inside `run_with_cache` the cache covers prompt and answer: the model generates, then runs once more over the
        finished sequence with the captures on, so every hook has its usual shape over the whole sequence.

        Args:
            inputs: From `prepare_messages` or `prepare_messages_batch`.
            max_new_tokens: At most so many new tokens; fewer where the model's context ends first.
            output_hidden_states: Also the residual stream over prompt and answer (from that same second run).
            do_sample: Sample instead of taking the most probable token.
            temperature: Divides the logits before sampling.
            top_p: Sample from the smallest set of tokens with so much probability.
            seed: Makes sampling repeatable; no global random state is touched.
            stop: Texts that end the answer once they appear in it.

        Raises:
            InvalidInputError: An option is out of its range.
        """
        frame = self._frame()
        options = GenerateOptions(
            max_new_tokens, output_hidden_states, do_sample, temperature, top_p, seed, _texts_of(stop)
        )
        return self._generate(self._checked(inputs), options, frame.interventions, frame.capture, frame.cache)

    def stream(
        self,
        inputs: Inputs,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Token]:
        """The tokens of an answer as they are chosen. Leaving the loop early ends the generation.

        Raises:
            InvalidInputError: An option is out of its range, or the call stands inside `run_with_cache`.
        """
        frame = self._frame()
        if frame.capture is not None:
            raise InvalidInputError("stream() fills no cache; inside run_with_cache use generate() or forward().")
        options = GenerateOptions(max_new_tokens, False, do_sample, temperature, top_p, seed, _texts_of(stop))
        return self._stream(self._checked(inputs), options, frame.interventions)

    def forward(
        self,
        inputs: Inputs,
        logits_to_keep: int | Sequence[int] | None = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ForwardOutput:
        """One forward pass. The names mean what they mean in Hugging Face transformers.

        Args:
            inputs: From `prepare_messages` or `prepare_messages_batch`.
            logits_to_keep: Logits of the last so many positions, 0 for all; or a list of positions; None for none: then
                the pass ends as soon as the last requested activation is there.
            output_hidden_states: Also `hidden_states`, as Hugging Face has them.
            output_attentions: Also `attentions`, whatever attention implementation the model runs with.
        """
        frame = self._frame()
        keep = tuple(logits_to_keep) if isinstance(logits_to_keep, list | tuple | range) else logits_to_keep
        options = ForwardOptions(keep, output_hidden_states, output_attentions)  # type: ignore[arg-type]
        return self._forward(self._checked(inputs), options, frame.interventions, frame.capture, frame.cache)

    def generate_batch(self, inputs: Inputs, max_new_tokens: int = 512, **options: Any) -> Generation:
        """`generate` for a batch; the same method under the name that goes with `prepare_messages_batch`."""
        return self.generate(inputs, max_new_tokens, **options)

    def forward_batch(self, inputs: Inputs, **options: Any) -> ForwardOutput:
        """`forward` for a batch; the same method under the name that goes with `prepare_messages_batch`."""
        return self.forward(inputs, **options)

    @contextmanager
    def run_with_cache(
        self,
        hooks: HookFilter,
        *,
        positions: Positions = None,
        heads: Sequence[int] | None = None,
        dtype: Any = None,
    ) -> Iterator[ActivationCache]:
        """Capture activations of the run inside the block; a second run replaces what the first put into the cache.

        Slices and casts happen on the device, before anything is copied. Captures hold activations as interventions
        left them.

        Args:
            hooks: Names or wildcards, or a predicate on full names; `hooks()` lists all there are.
            positions: The positions to keep, in this order: columns, slices, "last", "image", "text". Of scores and
                patterns these are the query positions.
            heads: The heads to keep of hooks that have heads; of `hook_k` and `hook_v` key-value heads.
            dtype: The type to cast to: "float16", "bfloat16", "float32", ...

        Raises:
            UnknownHookError: A name fits no hook.
            InvalidInputError: A selection selects nothing, or blocks are nested.
        """
        frame = self._frame()
        if frame.capture is not None:
            raise InvalidInputError("run_with_cache blocks cannot be nested; name all hooks in one.")
        capture = CaptureOptions.checked(self.catalogue, hooks, positions, heads, dtype)
        cache = ActivationCache()
        try:
            with self._within(replace(frame, capture=capture, cache=cache)):
                yield cache
        except BaseException:
            cache._cancel()
            raise
        cache._wait()

    @contextmanager
    def run_with_hooks(self, hooks: Sequence[HookedIntervention]) -> Iterator[None]:
        """Change activations in every run inside the block: generation, forward, lens and attribution alike.

        Blocks can be nested; interventions apply in their order, outer blocks first.

        Args:
            hooks: Pairs of a hook name or wildcard and an intervention (`vlm_spectra.interventions`). In process, a
                function `f(activation) -> activation` will do too; it gets the whole activation of each pass.

        Raises:
            UnknownHookError: A name fits no hook.
            UnsupportedInterventionError: A function, for a remote model.
            InvalidInputError: An intervention does not go with its hook.
        """
        frame = self._frame()
        checked = tuple(self.check_intervention(pair) for pair in hooks)
        with self._within(replace(frame, interventions=frame.interventions + checked)):
            yield

    def logit_lens(
        self,
        inputs: Inputs,
        *,
        top_k: int = 5,
        hook: str = "hook_resid_post",
        layers: Sequence[int] | None = None,
        positions: Positions = None,
        targets: TokenLike | Sequence[TokenLike] | None = None,
    ) -> LogitLens:
        """What each layer would answer, computed where the weights are.

        Args:
            inputs: From `prepare_messages` or `prepare_messages_batch`.
            top_k: How many of the most probable tokens to return.
            hook: The stream to read: "hook_resid_post", "hook_resid_mid", "hook_resid_pre", "hook_attn_out" or
                "hook_mlp_out".
            layers: The layers, negative from the end; None for all.
            positions: The positions; None for all.
            targets: Tokens to follow through the layers, by text or id; None for the model's own answer at each
                position.
        """
        options = self.lens_options(top_k, hook, layers, positions, targets)
        tensors = self._lens(self._checked(inputs), options, self._frame().interventions)
        ids, target_ids = arrays.to_numpy(tensors["token_ids"]), arrays.to_numpy(tensors["target_ids"])
        return LogitLens(
            hook=options.hook,
            inputs=inputs,
            layers=list(options.layers),
            positions=arrays.to_numpy(tensors["positions"]).tolist(),
            token_ids=tensors["token_ids"],
            tokens=self._nested_texts(ids),
            logits=tensors["logits"],
            probs=tensors["probs"],
            entropy=tensors["entropy"],
            kl_to_final=tensors["kl_to_final"],
            target_ids=tensors["target_ids"],
            target_tokens=self._nested_texts(target_ids),
            target_logits=tensors["target_logits"],
            target_probs=tensors["target_probs"],
            ranks=tensors["target_ranks"],
        )

    def lens_options(
        self,
        top_k: int,
        hook: str,
        layers: Sequence[int] | None,
        positions: Positions,
        targets: TokenLike | Sequence[TokenLike] | None,
    ) -> LensOptions:
        """The arguments of `logit_lens`, checked."""
        if not isinstance(top_k, int) or not 1 <= top_k <= self.info.vocab:
            raise InvalidInputError(f"top_k is {top_k}; possible are 1 to {self.info.vocab}.", field="top_k")
        count = self.info.layers
        chosen = tuple(range(count)) if layers is None else tuple(layers)
        if not chosen or any(not -count <= layer < count for layer in chosen):
            raise InvalidInputError(f"layers is {list(chosen)}; the model has layers 0 to {count - 1}.", field="layers")
        return LensOptions(
            choose("hook", hook, LENS_HOOKS),
            tuple(layer % count for layer in chosen),
            listed(positions),
            top_k,
            token_list(targets),
        )

    def attribute(
        self,
        inputs: Inputs,
        method: str = "direct_logit",
        target: Any = None,
        *,
        position: int | None = None,
        steps: int | None = None,
        baseline: str = "mean",
    ) -> Attribution:
        """Which parts of the input or of the model made a logit; `vlm_spectra.attribution` describes the methods.

        Args:
            inputs: From `prepare_messages` or `prepare_messages_batch`.
            method: "direct_logit", "gradient_x_input" or "integrated_gradients".
            target: A token by text or id; a pair of tokens for the difference of their logits; None for the model's own
                next token.
            position: The position that predicts the target; None for the last of each row.
            steps: Steps of an integration; None to double them until the completeness error is below 0.5%.
            baseline: Where an integration starts: "mean" (image tokens have the mean embedding of their image), "black"
                or "blurred" (those of the black or the blurred image); text tokens keep theirs. In a row without an
                image text tokens have their mean embedding.

        Raises:
            InvalidInputError: A text that is not one token, or an option out of its range.
        """
        options = self.attribution_options(method, Target.of(target, position), steps, baseline)
        tensors = self._attribute(self._checked(inputs), options, self._frame().interventions)
        ids = arrays.to_numpy(tensors["target_ids"])
        return Attribution(
            method=method,
            inputs=inputs,
            target_ids=tensors["target_ids"],
            target_tokens=self._texts(ids.tolist()),
            target_value=tensors["target_value"],
            total=tensors["total"],
            scores=tensors["scores"],
            head_scores=tensors.get("heads"),
            mlp_scores=tensors.get("mlps"),
            embed_score=tensors.get("embed"),
            bias=tensors.get("bias"),
            source_scores=tensors.get("sources"),
            baseline_value=tensors.get("baseline_value"),
            steps=int(arrays.to_numpy(tensors["steps"]).max()) if "steps" in tensors else None,
        )

    def attribution_options(self, method: str, target: Target, steps: int | None, baseline: str) -> AttributionOptions:
        """The arguments of `attribute`, checked."""
        choose("method", method, METHODS)
        if method not in METHODS[:3]:
            raise NotSupportedError(
                f"attribution by {method} is not there yet; possible are {', '.join(METHODS[:3])}.", field="method"
            )
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 4096):
            raise InvalidInputError(f"steps is {steps!r}; possible are 1 to 4096, or None.", field="steps")
        return AttributionOptions(method, target, steps or 0, choose("baseline", baseline, BASELINES))

    def unembed(self, tokens: TokenLike | Sequence[TokenLike]) -> Array:
        """The residual directions of tokens: [n, hidden] float32, the final norm's weight folded in.

        `hook_normalized` of the final norm times such a direction is the token's logit (a bias or a soft cap of the
        logits, where the family has one, comes on top).

        Args:
            tokens: A token by its text or id, or several.
        """
        chosen = token_list(tokens)
        if not chosen:
            raise InvalidInputError("unembed needs at least one token.", field="tokens")
        return self._unembed(chosen)

    def _frame(self) -> _Frame:
        return _FRAMES.get().get(id(self), _Frame())

    @contextmanager
    def _within(self, frame: _Frame) -> Iterator[None]:
        token = _FRAMES.set({**_FRAMES.get(), id(self): frame})
        try:
            yield
        finally:
            _FRAMES.reset(token)

    def _checked(self, inputs: Inputs) -> Inputs:
        if not isinstance(inputs, Inputs):
            raise InvalidInputError(
                f"inputs come from prepare_messages or prepare_messages_batch, not {type(inputs).__name__}.",
                field="inputs",
            )
        return inputs

    def check_intervention(self, pair: HookedIntervention) -> HookedIntervention:
        """A pair of a hook and an intervention, if the two go together."""
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidInputError("run_with_hooks takes pairs of a hook name and an intervention.", field="hooks")
        pattern, action = pair
        if not isinstance(pattern, str):
            raise InvalidInputError(f"a hook is named by a text, not {type(pattern).__name__}.", field="hooks")
        names = self.catalogue.expand(pattern, capture=False)
        if isinstance(action, KINDS):
            _check_kind(action, [self.catalogue.spec(name) for name in names], pattern)
        elif callable(action) and not isinstance(action, type):
            if not self.accepts_callables:
                raise UnsupportedInterventionError(
                    "a function cannot be sent to a server; possible are "
                    f"{', '.join(kind.__name__ for kind in KINDS)}.",
                    field="hooks",
                )
        else:
            raise InvalidInputError(
                f"{action!r} is no intervention; possible are {', '.join(kind.__name__ for kind in KINDS)}.",
                field="hooks",
            )
        return pattern, action

    def _nested_texts(self, ids: np.ndarray[Any, Any]) -> Any:
        unique = np.unique(ids).tolist()
        texts = dict(zip(unique, self._texts(unique), strict=True))

        def walk(part: Any) -> Any:
            return texts[part] if isinstance(part, int) else [walk(each) for each in part]

        return walk(ids.tolist())


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
    listed(action.positions)


def _texts_of(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)
