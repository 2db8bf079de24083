"""Forward and generate as a caller asks for them: options, interventions and captures to results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from vlm_spectra.calls import CaptureOptions, ForwardOptions, GenerateOptions
from vlm_spectra.dtypes import name_of
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.hooks import Catalogue, gradient_of
from vlm_spectra.interventions import HookedIntervention
from vlm_spectra.positions import Layout

from . import passes
from .catalogue import sizes
from .delivery import Delivery, TensorSpec
from .edits import AnyEdit
from .inputs import HookedInputs, extended, layout_of
from .reading import Reading
from .run import Capture, Run
from .selection import Columns, head_index, selected_shape
from .vision import extents, make_vision_edit, places


def make_edits(
    reading: Reading,
    catalogue: Catalogue,
    layout: Layout,
    interventions: Sequence[HookedIntervention],
    check: Callable[[], None],
) -> dict[str, list[AnyEdit]]:
    """Interventions as edits by full hook name, in order; their shapes are checked here, before anything runs.

    `check` is asked at each whether to go on: there may be thousands.
    """
    known = sizes(reading, len(layout.tokens), layout.length)
    edits: dict[str, list[AnyEdit]] = {}
    for pattern, action in interventions:
        for name in catalogue.expand(pattern, capture=False):
            check()
            edits.setdefault(name, []).append(make_vision_edit(action, name, catalogue.spec(name), layout, known))
    return edits


class Captures:
    """The captures of one forward pass, and what they will look like.

    Args:
        reading: The model.
        catalogue: Its hooks.
        layout: The sequence that the pass runs over.
    """

    def __init__(self, reading: Reading, catalogue: Catalogue, layout: Layout) -> None:
        self.catalogue, self.layout = catalogue, layout
        self.extents = sizes(reading, len(layout.tokens), layout.length)
        self.by_hook: dict[str, list[Capture]] = {}
        self.gradients: dict[str, list[Capture]] = {}
        self.specs: list[TensorSpec] = []

    def add(self, name: str, capture: Capture) -> None:
        """Capture one hook, or the gradient with respect to it, under `capture.output`."""
        spec = self.catalogue.spec(name)
        columns = capture.columns if spec.position_axis is not None else None
        sizes_here = self.extents | extents(self.layout, spec)
        heads = head_index(spec, capture.heads, sizes_here)
        dtype = spec.dtype if capture.dtype is None else name_of(capture.dtype)
        shape = selected_shape(spec, columns, heads, sizes_here)
        differentiated = gradient_of(name)
        where = self.by_hook if differentiated is None else self.gradients
        if capture.reduce is not None:
            gone = len(shape) - 1 if capture.reduce == "norm" else spec.head_axis
            shape = tuple(extent for axis, extent in enumerate(shape) if axis != gone)
        kept = replace(
            capture, columns=columns, heads=heads, places=places(self.layout, spec), head_axis=spec.head_axis
        )
        where.setdefault(differentiated or name, []).append(kept)
        self.specs.append(TensorSpec(capture.output, dtype, shape))

    def add_selection(self, options: CaptureOptions) -> None:
        """Capture what `run_with_cache` asks for, each hook under its own name."""
        columns = None if options.positions is None else Columns(self.layout.rectangle(options.positions))
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        for name in self.catalogue.expand(options.hooks, capture=True):
            self.add(name, Capture(name, columns, options.heads, dtype, reduce=options.reduce))

    def add_hidden_states(self, layers: int) -> None:
        """Capture what transformers calls hidden states: the stream before each block, then the final norm's output."""
        for layer in range(layers):
            self.add(f"lm.blocks.{layer}.hook_resid_pre", Capture(f"hidden_states.{layer}"))
        self.add("lm.ln_final.hook_out", Capture(f"hidden_states.{layers}"))

    def add_attentions(self, layers: int) -> None:
        """Capture every block's pattern under transformers' name."""
        for layer in range(layers):
            self.add(f"lm.blocks.{layer}.attn.hook_pattern", Capture(f"attentions.{layer}"))


def _run(delivery: Delivery, captures: Captures, edits: dict[str, list[AnyEdit]], layers: int) -> Run:
    return Run(
        captures=captures.by_hook,
        edits=edits,
        gradients=captures.gradients,
        sink=delivery.deliver,
        check=delivery.check,
        on_layer=lambda done: delivery.progress("forward", done, layers),
    )


def plan_capture(
    reading: Reading, catalogue: Catalogue, inputs: HookedInputs, capture: CaptureOptions
) -> list[TensorSpec]:
    """What a forward pass with a capture would deliver of it: shapes and types follow from the prepared inputs."""
    captures = Captures(reading, catalogue, layout_of(reading, inputs))
    captures.add_selection(capture)
    return captures.specs


def forward_call(
    reading: Reading,
    catalogue: Catalogue,
    inputs: HookedInputs,
    options: ForwardOptions,
    interventions: Sequence[HookedIntervention],
    capture: CaptureOptions | None,
    scalar: passes.Scalar | None,
    delivery: Delivery,
) -> Run:
    """One forward pass: delivers captures by hook name, `hidden_states.N`, `attentions.N` and `logits`.

    With a scalar, also one backward pass from it, for the gradients among the captures.
    """
    layout = layout_of(reading, inputs)
    layers = len(reading.blocks)
    captures = Captures(reading, catalogue, layout)
    if capture is not None:
        captures.add_selection(capture)
    if options.output_hidden_states:
        captures.add_hidden_states(layers)
    if options.output_attentions:
        captures.add_attentions(layers)
    specs, keep = list(captures.specs), options.logits_to_keep
    if keep is not None:
        rows = (min(keep, layout.length) or layout.length) if isinstance(keep, int) else len(keep)
        shape = (len(layout.tokens), rows, reading.vocab)
        specs.append(TensorSpec("logits", name_of(reading.dtype), shape))
    run = _run(delivery, captures, make_edits(reading, catalogue, layout, interventions, delivery.check), layers)
    delivery.announce(specs)
    if not specs:
        return run
    if scalar is None:
        logits = passes.forward(reading, inputs.tensors, run, keep)
    else:
        logits = passes.forward_and_backward(reading, inputs.tensors, run, keep, scalar)
    if logits is not None:
        delivery.deliver("logits", logits)
    return run


def generate_call(
    reading: Reading,
    catalogue: Catalogue,
    processor: Any,
    inputs: HookedInputs,
    options: GenerateOptions,
    interventions: Sequence[HookedIntervention],
    capture: CaptureOptions | None,
    delivery: Delivery,
) -> Run:
    """A generation: delivers `sequences`, `logprobs`, and from one pass over the finished sequence what is captured."""
    layout = layout_of(reading, inputs)
    layers = len(reading.blocks)
    total = min(options.max_new_tokens, reading.context - layout.length)
    wanted = capture is not None or options.output_hidden_states
    if wanted:
        # Refuse what cannot work, or is too large with the prompt alone, before an answer is generated.
        try:
            delivery.bound(_plan(reading, catalogue, layout, options, capture).specs)
        except InvalidInputError:  # positions may mean generated tokens
            _plan(reading, catalogue, layout, options, None if capture is None else replace(capture, positions=None))
    done = 0

    def on_token(token: Any) -> None:
        nonlocal done
        delivery.token(token)
        if token.index + 1 > done:
            done = token.index + 1
            delivery.progress("generating", done, total)

    if capture is not None and capture.backward_from is not None:
        raise InvalidInputError(
            "backward_from goes with forward(); generate() has no gradients. Put the answer into assistant_prefill and "
            "call forward().",
            field="backward_from",
        )
    run = Run(edits=make_edits(reading, catalogue, layout, interventions, delivery.check), check=delivery.check)
    answer = passes.generate(reading, processor, inputs, options, run, on_token)
    outputs = {"sequences": answer.sequences, "logprobs": answer.logprobs}
    specs = [TensorSpec(name, name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in outputs.items()]
    captures = None
    if wanted:
        captures = _plan(reading, catalogue, layout.extended(answer.tokens.numpy()), options, capture)
        specs += captures.specs
    delivery.announce(specs)
    for name, tensor in outputs.items():
        delivery.deliver(name, tensor)
    if captures is not None:
        # The same interventions again, their positions still those of the prompt.
        run = _run(delivery, captures, make_edits(reading, catalogue, layout, interventions, delivery.check), layers)
        tensors = extended(inputs, answer.sequences, answer.tokens, reading.family.answer_type)
        passes.forward(reading, tensors, run, None)
    return run


def _plan(
    reading: Reading,
    catalogue: Catalogue,
    layout: Layout,
    options: GenerateOptions,
    capture: CaptureOptions | None,
) -> Captures:
    captures = Captures(reading, catalogue, layout)
    if capture is not None:
        captures.add_selection(capture)
    if options.output_hidden_states:
        captures.add_hidden_states(len(reading.blocks))
    return captures
