"""What a model in process and a remote one share: the checking of arguments, the `with` blocks, the shapes of results.

A subclass says how a checked call is carried out: `_prepare`, `_forward`, `_generate`, `_estimate`, `_stream`,
`_lens`, `_attribute`, `_sweep`, `_unembed` and `_texts`. All else is here, once, so that the two cannot drift apart.

Captures and interventions belong to the block, in a context variable: threads and tasks never see each other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import array_api_compat
import numpy as np

from . import arrays, scalars
from .analyses import AttributionOptions, LensOptions, SweepOptions
from .arrays import Array
from .attribution import Attribution
from .cache import ActivationCache
from .calls import (
    COMPRESSIONS,
    CaptureOptions,
    ForwardOptions,
    GenerateOptions,
    Target,
    TokenLike,
    choose,
    token_list,
)
from .cost import Cost
from .errors import InvalidInputError, NotSupportedError, shown
from .estimate import Estimate
from .hooks import Catalogue, HookFilter, HookSpec
from .images import ImageLike
from .info import ModelInfo
from .inputs import Inputs, Prompt, make_prompts
from .interventions import HookedIntervention, check_intervention
from .lens import LogitLens
from .positions import Positions
from .progress import Report
from .results import ForwardOutput, Generation, Token
from .sweep import PatchSweep

if TYPE_CHECKING:
    from .vlm import VLM

    def _has_the_interface(model: BaseVLM) -> VLM:
        return model


Hooked = tuple[HookedIntervention, ...]


@dataclass(frozen=True)
class _Frame:
    """What the `with` blocks around a call ask for."""

    interventions: Hooked = ()
    capture: CaptureOptions | None = None
    cache: ActivationCache | None = None
    report: Report | None = None


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
    def _estimate(self, inputs: Inputs, capture: CaptureOptions) -> Estimate: ...

    @abstractmethod
    def _stream(self, inputs: Inputs, options: GenerateOptions, interventions: Hooked) -> Iterator[Token]: ...

    @abstractmethod
    def _lens(self, inputs: Inputs, options: LensOptions, interventions: Hooked) -> Mapping[str, Array]: ...

    @abstractmethod
    def _attribute(self, inputs: Inputs, options: AttributionOptions, interventions: Hooked) -> Mapping[str, Array]: ...

    @abstractmethod
    def _sweep(
        self,
        clean: Inputs,
        corrupted: Inputs,
        options: SweepOptions,
        interventions: Hooked,
        on_tensor: Callable[[str, Array], None],
    ) -> Cost | None: ...

    @abstractmethod
    def _unembed(self, tokens: tuple[TokenLike, ...]) -> Array: ...

    def _down_projection(self, layer: int) -> Array:
        """What each neuron of a layer writes, [mlp, hidden]."""
        raise NotSupportedError(
            "neurons need the weights of the MLPs' down projections, which a server does not send: run the model in "
            "process, or take MLPs as wholes (decompose_resid, get_full_resid_decomposition(expand_neurons=False))."
        )

    @abstractmethod
    def _texts(self, ids: Sequence[int]) -> list[str]: ...

    def close(self) -> None:  # noqa: B027  # in process there is nothing to let go of
        """Let go of what the model holds. Nothing else may be called afterwards."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotSupportedError(
            "a model cannot be pickled or copied; let each process open its own (vlm_spectra.connect(...) or "
            "HookedVLM.from_pretrained(...))."
        )

    def __enter__(self) -> Self:
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
        options = ForwardOptions(logits_to_keep, output_hidden_states, output_attentions)  # type: ignore[arg-type]
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
        backward_from: Any = None,
        position: int | None = None,
        reduce: str | None = None,
        compression: str = "auto",
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
            backward_from: The scalar whose gradient the hooks named with `_grad` hold (`hook_resid_post_grad`), each in
                the shape of its activation: a token's logit (text or id), the difference of two (a pair), or
                `vs.Target()` for the model's own next token. Each row has its own. `forward()` alone gives gradients.
            position: The position that predicts `backward_from`; None for the last of each row.
            reduce: "mean_heads" keeps the mean over (the selected) heads, "norm" the Euclidean norm over the last axis;
                both computed in float32 where the model runs. The axis is gone from the array.
            compression: For a model behind a server: "zstd" to make what is sent smaller (without loss), "none",
                or "auto" to go by the speed of the link as earlier captures showed it.

        Raises:
            UnknownHookError: A name fits no hook.
            InvalidInputError: A selection selects nothing, blocks are nested, or of `_grad` names and `backward_from`
                only one is given.
        """
        frame = self._frame()
        if frame.capture is not None:
            raise InvalidInputError("run_with_cache blocks cannot be nested; name all hooks in one.")
        if backward_from is None and position is not None:
            raise InvalidInputError("position is that of backward_from, which was not given.", field="position")
        target = None if backward_from is None else Target.of(backward_from, position)
        checked = CaptureOptions.checked(self.catalogue, hooks, positions, heads, dtype, target, reduce)
        capture = replace(checked, compression=choose("compression", compression, COMPRESSIONS))
        cache = ActivationCache()
        try:
            with self._within(replace(frame, capture=capture, cache=cache)):
                yield cache
            cache._wait()
        except BaseException:
            cache._cancel()
            raise

    def estimate(
        self,
        inputs: Inputs,
        hooks: HookFilter,
        *,
        positions: Positions = None,
        heads: Sequence[int] | None = None,
        dtype: Any = None,
        reduce: str | None = None,
    ) -> Estimate:
        """What capturing these hooks in a forward pass would take, without running it.

        Args:
            inputs: From `prepare_messages`.
            hooks: As for `run_with_cache`, and so the other arguments.

        Returns:
            The bytes, exactly, and the seconds, as far as earlier calls allow to tell.
        """
        inputs = self._checked(inputs)
        capture = CaptureOptions.checked(self.catalogue, hooks, positions, heads, dtype, None, reduce)
        return self._estimate(inputs, capture)

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
        pairs = scalars.several(hooks)
        if pairs is None:
            raise InvalidInputError("run_with_hooks takes a list of pairs.", field="hooks")
        checked = tuple(check_intervention(pair, self.catalogue, self.accepts_callables) for pair in pairs)
        with self._within(replace(frame, interventions=frame.interventions + checked)):
            yield

    @contextmanager
    def run_with_progress(self, report: Report) -> Iterator[None]:
        """Be told how far each call inside the block is: steps of an analysis, layers, tokens, cells of a sweep.

        Args:
            report: Called with the phase ("forward", "generating" or "analysing"), the units done, and those in all
                (0 where unknown); while a call waits for its turn on a server, about once a second with "queued", its
                place in the queue and how many wait. Not always on the caller's thread. What it raises ends the call,
                before the next step, on a server too.
        """
        if not callable(report):
            raise InvalidInputError(
                f"run_with_progress takes a function of (phase, done, total), not {shown(report)}.", field="report"
            )
        with self._within(replace(self._frame(), report=report)):
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
            hook: What to read in each layer: "hook_resid_post", "hook_resid_mid", "hook_attn_out", "mlp.hook_out", ...;
                any hook of a decoder block with the axes batch, seq, hidden.
            layers: The layers, negative from the end, each once; None for all that have the hook.
            positions: The positions; None for all.
            targets: Tokens to follow through the layers, by text or id; None for the model's own answer at each
                position.
        """
        options = LensOptions.checked(self.catalogue, self.info, top_k, hook, layers, positions, targets)
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
            cost=getattr(tensors, "cost", None),
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
        window: int | None = None,
        stride: int | None = None,
        against: Inputs | None = None,
    ) -> Attribution:
        """Which parts of the input or of the model made a target; `vlm_spectra.attribution` describes the methods.

        Args:
            inputs: From `prepare_messages` or `prepare_messages_batch`.
            method: "direct_logit", "gradient_x_input", "integrated_gradients", "occlusion", "attention_rollout",
                "relevancy", "grad_cam" or "attribution_patching".
            target: A token by text or id; a pair of tokens for the difference of their logits; `vs.Target(answer=...)`
                for the log-probability of a whole answer; None for the model's own next token.
            position: The position that predicts the target; None for the last of each row.
            steps: Steps of an integration; None to double them until the completeness error is below 0.5%.
            baseline: Where an integration starts, text tokens keeping their embedding: "mean" (image tokens have the
                mean embedding of their image), "black" or "blurred" (the pixels of a black or of the blurred image,
                from which the integration goes through the vision tower). In a row without an image text tokens have
                their mean embedding. For occlusion, what covers the image: its mean colour, black, or it blurred.
            window: For occlusion, how many image tokens a window is wide and high; 1 by default.
            stride: For occlusion, image tokens from one window to the next; the window's own size by default.
            against: For attribution_patching, the second prompts, with as many tokens in every row.

        Raises:
            InvalidInputError: A text that is not one token, an option out of its range or not of this method.
        """
        second = None if against is None else self._checked(against)
        options = AttributionOptions.checked(
            method, Target.of(target, position), steps, baseline, window, stride, second
        )
        tensors = self._attribute(self._checked(inputs), options, self._frame().interventions)
        ids = arrays.to_numpy(tensors["target_ids"])
        answer = options.target.answer
        return Attribution(
            method=method,
            inputs=inputs,
            target_ids=tensors["target_ids"],
            target_tokens=self._texts(ids.tolist()) if answer is None else [answer] * len(ids),
            target_value=tensors["target_value"],
            total=tensors["total"],
            scores=tensors["scores"],
            head_scores=tensors.get("heads"),
            mlp_scores=tensors.get("mlps"),
            layer_scores=tensors.get("layers"),
            embed_score=tensors.get("embed"),
            bias=tensors.get("bias"),
            source_scores=tensors.get("sources"),
            baseline_value=tensors.get("baseline_value"),
            steps=int(arrays.to_numpy(tensors["steps"]).max()) if "steps" in tensors else None,
            cost=getattr(tensors, "cost", None),
        )

    def patch_sweep(
        self,
        clean: Inputs,
        corrupted: Inputs,
        hooks: HookFilter,
        positions: Positions = None,
        metric: Any = None,
        mode: str = "denoising",
        *,
        heads: Sequence[int] | Literal["all"] | None = None,
        position: int | None = None,
        on_row: Callable[[PatchSweep], object] | None = None,
    ) -> PatchSweep:
        """Activation patching over hooks (layers) by positions, or by heads, computed where the weights are.

        Each cell is what a forward pass of one prompt gives with one activation of the other: as with
        `run_with_hooks([(hook, PatchActivation(value, positions=p))])`, but in batches, from the patched layer on. The
        metric of each cell is all that leaves the server.

        Args:
            clean: The prompt whose activations are right, a batch of one.
            corrupted: Another of as many tokens: other words, or another image of the same size.
            hooks: Hook names or wildcards of the language model, or a predicate on full names.
            positions: The positions to patch, a column each; None for all. With `heads`, they are patched together.
            metric: The target, as in `attribute`; None for the clean prompt's own next token.
            mode: "denoising" puts clean activations into the corrupted prompt, "noising" the other way round.
            heads: Heads to patch, a column each, instead of positions; "all" for all of them.
            position: The position that predicts the metric; None for the last.
            on_row: Called each time that a hook's row is done, with the sweep as far as it has come: the rows to come
                are NaN. What it raises ends the sweep.

        Raises:
            UnknownHookError: A name fits no hook.
            InvalidInputError: The prompts have different numbers of tokens, the hooks no heads, or there are too many
                cells.
        """
        if on_row is not None and not callable(on_row):
            raise InvalidInputError(f"on_row is a function of the sweep so far, not {shown(on_row)}.", field="on_row")
        target = Target.of(metric, position)
        options = SweepOptions.checked(self.catalogue, self.info, hooks, positions, heads, target, mode)
        names = self.catalogue.expand(list(options.hooks), capture=True)
        found: dict[str, Array] = {}

        def so_far() -> PatchSweep:
            space = array_api_compat.array_namespace(found["clean"])
            device = array_api_compat.device(found["clean"])
            missing = space.full(found["columns"].shape, float("nan"), dtype=space.float32, device=device)
            return PatchSweep(
                mode=mode,
                axis="positions" if options.heads is None else "heads",
                clean=clean,
                corrupted=corrupted,
                hooks=names,
                columns=arrays.to_numpy(found["columns"]).tolist(),
                values=space.stack([found.get(f"values.{name}", missing) for name in names]),
                clean_value=float(found["clean"][0]),
                corrupted_value=float(found["corrupted"][0]),
                target_tokens=self._texts(arrays.to_numpy(found["target_ids"]).tolist()),
            )

        def arrived(name: str, tensor: Array) -> None:
            found[name] = tensor
            if on_row is not None and name.startswith("values."):
                on_row(so_far())

        asked = self._checked(clean), self._checked(corrupted)
        cost = self._sweep(*asked, options, self._frame().interventions, arrived)
        return replace(so_far(), cost=cost)

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

    def get_model_components(self) -> dict[str, Any]:
        """The model's own parts that read its residual stream: `norm`, `lm_head` and `tokenizer`.

        Raises:
            NotSupportedError: The model is behind a server; modules cannot cross the network.
        """
        raise NotSupportedError(
            "a remote model's modules stay on the server; logit_lens() reads the residual stream there, and unembed() "
            "sends tokens' directions. A model in process (HookedVLM) hands out its modules."
        )

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

    def _nested_texts(self, ids: np.ndarray[Any, Any]) -> Any:
        unique = np.unique(ids).tolist()
        texts = dict(zip(unique, self._texts(unique), strict=True))

        def walk(part: Any) -> Any:
            return texts[part] if isinstance(part, int) else [walk(each) for each in part]

        return walk(ids.tolist())


def _texts_of(stop: str | Sequence[str]) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else scalars.several(stop)
    if texts is None:
        raise InvalidInputError(f"stop is a text or a list of texts, not {shown(stop)}.", field="stop")
    return tuple(texts)
