"""HookedVLM: a vision-language model in this process, with TransformerLens-style hook points.

The whole interface is `vlm_spectra.VLM`; this file only says how each call is carried out on a loaded model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import replace
from queue import Queue
from typing import Any, Self

import torch
from vlm_spectra.analyses import AttributionOptions, LensOptions, SweepOptions
from vlm_spectra.base import BaseVLM, Hooked
from vlm_spectra.cache import ActivationCache, InMemory
from vlm_spectra.calls import CaptureOptions, ForwardOptions, GenerateOptions, TokenLike
from vlm_spectra.context import CacheContext
from vlm_spectra.dtypes import name_of
from vlm_spectra.errors import CancelledError
from vlm_spectra.estimate import Estimate
from vlm_spectra.hooks import Catalogue
from vlm_spectra.info import ModelInfo
from vlm_spectra.inputs import Inputs, Prompt
from vlm_spectra.progress import Bar, Report
from vlm_spectra.results import Answer, ForwardOutput, Generation, Token

from .analysis.calls import Analysis
from .analysis.targets import resolve, target_columns, token_id
from .checkpoints import Placement, load
from .hooked.attention import plain_name
from .hooked.calls import forward_call, generate_call, plan_capture
from .hooked.catalogue import build_catalogue
from .hooked.delivery import Delivery, TensorSpec
from .hooked.inputs import HookedInputs, layout_of, prepare
from .hooked.passes import Scalar
from .hooked.points import install
from .hooked.reading import Reading
from .hooked.run import Run


class HookedVLM(BaseVLM):
    """A transformers model with hook points; `vlm_spectra.base.BaseVLM` describes the methods.

    One call at a time runs: transformers keeps some of a generation's state on the model. Captures and interventions
    are the calling thread's own.

    Args:
        model: A transformers model for image and text to text.
        processor: Its processor.
        name: What to call it.
        revision: The revision of its weights.

    Attributes:
        model: The transformers model, as it is.
        processor: Its processor.
    """

    accepts_callables = True

    def __init__(self, model: Any, processor: Any, name: str = "", revision: str = "") -> None:
        self.model = model
        self.processor = processor
        self.reading = Reading(model)
        self._catalogue = build_catalogue(self.reading)
        self._name, self._revision = name or type(model).__name__, revision
        self._lock = threading.RLock()
        self._pace: float | None = None
        install(self.reading)
        # transformers 4 had the norm here, and code written for it says `model.model.norm`; a plain attribute is no
        # second owner of the weights.
        if (inner := getattr(model, "model", None)) is not None and not hasattr(inner, "norm"):
            inner.__dict__["norm"] = self.reading.final_norm
        self._info = self._describe()

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: Any = None,
        device: str | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
    ) -> HookedVLM:
        """Load a model.

        Args:
            name: `spectra-tiny` (embedded), a directory made by `save_pretrained`, or a name on the Hugging Face hub.
            dtype: The weights' type; the checkpoint's own where None.
            device: "cpu", "cuda", "cuda:1"; "auto", "balanced", "balanced_low_0" or "sequential" to spread over all
                GPUs, or a mapping of module names to devices (accelerate's `device_map`); the first GPU, else the CPU,
                where None.
            attn_implementation: "sdpa", "eager", "flash_attention_2", ...; transformers' choice where None.
            revision: A revision of the hub; the newest where None.

        Raises:
            UnknownModelError: There is no such model, or it cannot be reached.
            NotSupportedError: Its architecture has not the shape this library reads.
        """
        placement = Placement(None if dtype is None else name_of(dtype), device, attn_implementation, revision)
        model, processor, revision = load(name, placement)
        return cls(model, processor, name, revision)

    def __repr__(self) -> str:
        return f"HookedVLM({self._info.name!r} on {self._info.device})"

    @property
    def info(self) -> ModelInfo:
        """The model's sizes and names."""
        return self._info

    def _describe(self) -> ModelInfo:
        reading, tower = self.reading, self.reading.vision
        return ModelInfo(
            name=self._name,
            family=reading.family.name,
            layers=len(reading.blocks),
            heads=reading.heads,
            kv_heads=reading.kv_heads,
            head_dim=reading.head_dim,
            hidden=reading.hidden,
            mlp=reading.mlp,
            vocab=reading.vocab,
            vision_layers=len(tower.blocks) if tower else 0,
            vision_heads=tower.heads if tower else 0,
            vision_hidden=tower.hidden if tower else 0,
            patch_size=tower.patch_size if tower else 0,
            merge_size=tower.merge_size if tower else 1,
            image_token_id=reading.image_token_id,
            context=reading.context,
            dtype=name_of(reading.dtype),
            revision=self._revision,
            attention=plain_name(reading.config._attn_implementation),
            device=str(reading.device),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            coordinates=reading.family.coordinates,
            norm_eps=float(reading.scale(reading.final_norm, torch.zeros(1, reading.hidden)) ** 2),
            norm_centers=reading.kind_of(reading.final_norm).centered,
            scales_outputs=any(block.scales_outputs for block in reading.blocks),
            stream_scales=reading.stream_scales,
        )

    def get_model_components(self) -> dict[str, Any]:
        """The model's own parts that read its residual stream: `norm`, `lm_head` and `tokenizer`."""
        return {
            "norm": self.reading.final_norm,
            "lm_head": self.reading.unembedding,
            "tokenizer": self.processor.tokenizer,
        }

    @property
    def catalogue(self) -> Catalogue:
        """The model's hooks."""
        return self._catalogue

    def prepared(self, inputs: Inputs) -> HookedInputs:
        """The inputs with this model's tensors; those of another model are prepared again."""
        return inputs if isinstance(inputs, HookedInputs) else self._prepare(inputs.prompts)

    def _prepare(self, prompts: tuple[Prompt, ...]) -> HookedInputs:
        return prepare(self.reading, self.processor, prompts)

    def forward_into(
        self,
        delivery: Delivery,
        inputs: Inputs,
        options: ForwardOptions,
        interventions: Hooked = (),
        capture: CaptureOptions | None = None,
    ) -> Run:
        """`forward`, its tensors delivered as they are made."""
        with self._lock, torch.no_grad():
            prepared = self.prepared(inputs)
            begun = time.perf_counter()
            run = forward_call(
                self.reading,
                self.catalogue,
                prepared,
                options,
                interventions,
                capture,
                self._scalar(prepared, capture),
                delivery,
            )
            if run.layers_run:
                self._pace = (time.perf_counter() - begun) / (prepared.input_ids.numel() * run.layers_run)
            return run

    def plan(self, inputs: Inputs, capture: CaptureOptions) -> tuple[list[TensorSpec], float | None]:
        """What a capture would deliver, and the seconds of its pass by the pace of the last one."""
        prepared = self.prepared(inputs)
        specs = plan_capture(self.reading, self.catalogue, prepared, capture)
        layers = len(self.reading.blocks)
        return specs, None if self._pace is None else self._pace * prepared.input_ids.numel() * layers

    def _estimate(self, inputs: Inputs, capture: CaptureOptions) -> Estimate:
        specs, seconds = self.plan(inputs, capture)
        size = sum(spec.nbytes for spec in specs)
        return Estimate({spec.name: spec.shape for spec in specs}, size, seconds, 0.0)

    def _scalar(self, inputs: HookedInputs, capture: CaptureOptions | None) -> Scalar | None:
        """Where the backward pass of a capture with gradients begins."""
        if capture is None or capture.backward_from is None:
            return None
        target, tokenizer = capture.backward_from, self.processor.tokenizer
        columns = target_columns(layout_of(self.reading, inputs), target)
        return Scalar(columns, lambda at: resolve(self.reading, tokenizer, target, columns, at).value(at))

    def generate_into(
        self,
        delivery: Delivery,
        inputs: Inputs,
        options: GenerateOptions,
        interventions: Hooked = (),
        capture: CaptureOptions | None = None,
    ) -> Run:
        """`generate`, its tokens and tensors delivered as they are made."""
        with self._lock, torch.no_grad():
            return generate_call(
                self.reading,
                self.catalogue,
                self.processor,
                self.prepared(inputs),
                options,
                interventions,
                capture,
                delivery,
            )

    def analysis(self, delivery: Delivery, inputs: Inputs, interventions: Hooked = ()) -> Analysis:
        """A lens or an attribution to come; its tensors go to the delivery. Call it under `exclusive()`."""
        return Analysis(self.reading, self.catalogue, self.processor, self.prepared(inputs), interventions, delivery)

    def lens_into(self, delivery: Delivery, inputs: Inputs, options: LensOptions, interventions: Hooked = ()) -> None:
        """`logit_lens`, its tensors delivered."""
        with self._lock, torch.no_grad():
            self.analysis(delivery, inputs, interventions).lens(options)

    def attribute_into(
        self, delivery: Delivery, inputs: Inputs, options: AttributionOptions, interventions: Hooked = ()
    ) -> None:
        """`attribute`, its tensors delivered."""
        against = None if options.against is None else self.prepared(options.against)
        with self._lock, torch.no_grad():
            self.analysis(delivery, inputs, interventions).attribute(replace(options, against=against))

    def sweep_into(
        self, delivery: Delivery, clean: Inputs, corrupted: Inputs, options: SweepOptions, interventions: Hooked = ()
    ) -> None:
        """`patch_sweep`, its tensors delivered as they are made."""
        with self._lock, torch.no_grad():
            self.analysis(delivery, clean, interventions).sweep(self.prepared(corrupted), options)

    def token_ids(self, tokens: Sequence[TokenLike]) -> list[int]:
        """The ids of tokens given by text or id."""
        return [token_id(self.processor.tokenizer, token, self.reading.vocab) for token in tokens]

    def directions(self, ids: list[int]) -> torch.Tensor:
        """The residual directions of tokens: [n, hidden] float32, the final norm's weight folded in."""
        return self.reading.folded_unembedding(ids).cpu()

    def _forward(
        self,
        inputs: Inputs,
        options: ForwardOptions,
        interventions: Hooked,
        capture: CaptureOptions | None,
        cache: ActivationCache | None,
    ) -> ForwardOutput:
        inputs = self.prepared(inputs)
        with _Shown("forward", self._frame().report) as delivery:
            self.forward_into(delivery, inputs, options, interventions, capture)
        if cache is not None and capture is not None:
            self._fill(cache, delivery, inputs, capture, inputs.token_labels)
        return ForwardOutput(delivery.tensors, self._texts)

    def _generate(
        self,
        inputs: Inputs,
        options: GenerateOptions,
        interventions: Hooked,
        capture: CaptureOptions | None,
        cache: ActivationCache | None,
    ) -> Generation:
        inputs = self.prepared(inputs)
        with _Answer(len(inputs), self._frame().report) as delivery:
            self.generate_into(delivery, inputs, options, interventions, capture)
        if cache is not None and capture is not None:
            self._fill(cache, delivery, inputs, capture, delivery.answer.labels(inputs))
        return delivery.answer.generation(inputs, delivery.tensors, self.reading.family.coordinates)

    def _fill(
        self,
        cache: ActivationCache,
        delivery: Delivery,
        inputs: HookedInputs,
        capture: CaptureOptions,
        labels: list[list[str]],
    ) -> None:
        names = self.catalogue.expand(capture.hooks, capture=True)
        tensors = {name: delivery.tensors[name] for name in names}
        context = CacheContext.of(inputs, labels, capture, self)
        cache._fill(InMemory(tensors), context)

    def _stream(self, inputs: Inputs, options: GenerateOptions, interventions: Hooked) -> Iterator[Token]:
        delivery = _Tokens(self._frame().report)

        def work() -> None:
            try:
                self.generate_into(delivery, inputs, options, interventions)
                delivery.queue.put(None)
            except BaseException as error:
                delivery.queue.put(error)

        thread = threading.Thread(target=copy_context().run, args=(work,), name="vlm-spectra-stream", daemon=True)
        thread.start()
        try:
            while (item := delivery.queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            delivery.stopped = True
            thread.join()

    def _lens(self, inputs: Inputs, options: LensOptions, interventions: Hooked) -> Mapping[str, torch.Tensor]:
        with _Shown("logit lens", self._frame().report) as delivery:
            self.lens_into(delivery, inputs, options, interventions)
        return delivery.tensors

    def _attribute(
        self, inputs: Inputs, options: AttributionOptions, interventions: Hooked
    ) -> Mapping[str, torch.Tensor]:
        with _Shown("attribution", self._frame().report) as delivery:
            self.attribute_into(delivery, inputs, options, interventions)
        return delivery.tensors

    def _sweep(
        self,
        clean: Inputs,
        corrupted: Inputs,
        options: SweepOptions,
        interventions: Hooked,
        on_tensor: Callable[[str, torch.Tensor], None],
    ) -> None:
        with _Shown("patch sweep", self._frame().report, on_tensor) as delivery:
            self.sweep_into(delivery, clean, corrupted, options, interventions)

    def _unembed(self, tokens: tuple[TokenLike, ...]) -> torch.Tensor:
        return self.directions(self.token_ids(tokens))

    def _down_projection(self, layer: int) -> torch.Tensor:
        return self.reading.down_projection(self.reading.blocks[layer])

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return [self.processor.tokenizer.decode([int(token)]) for token in ids]


class _Shown(Delivery):
    """Keeps tensors, hands them on where they are wanted at once, and shows a progress bar."""

    def __init__(
        self,
        title: str,
        report: Report | None,
        on_tensor: Callable[[str, torch.Tensor], None] = lambda name, tensor: None,
    ) -> None:
        super().__init__()
        self._bar, self._on_tensor = Bar(title, report), on_tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def deliver(self, name: str, tensor: torch.Tensor) -> None:
        """Here is one."""
        super().deliver(name, tensor)
        self._on_tensor(name, self.tensors[name])

    def progress(self, phase: str, done: int, total: int) -> None:
        """So far the call has come."""
        self._bar.show(phase, done, total)


class _Answer(_Shown):
    """Keeps tensors and the answer's text."""

    def __init__(self, rows: int, report: Report | None) -> None:
        super().__init__("generate", report)
        self.answer = Answer(rows)

    def token(self, token: Token) -> None:
        """A token was chosen."""
        self.answer.add(token)


class _Tokens(Delivery):
    """Hands tokens to another thread, and ends the generation when that has lost interest."""

    def __init__(self, report: Report | None) -> None:
        super().__init__()
        self._bar = Bar("", report)
        self.queue: Queue[Token | BaseException | None] = Queue()
        self.stopped = False

    def token(self, token: Token) -> None:
        """A token was chosen."""
        self.queue.put(token)

    def progress(self, phase: str, done: int, total: int) -> None:
        """So far the call has come."""
        self._bar.show(phase, done, total)

    def check(self) -> None:
        """Ends the generation once the reader has left."""
        if self.stopped:
            raise CancelledError("the reader of this generation has left.")
