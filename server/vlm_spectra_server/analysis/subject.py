"""What an analysis runs: a batch under interventions, as often as it needs, alone or as several copies in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from vlm_spectra.calls import Target
from vlm_spectra.errors import NotSupportedError, PromptTooLongError
from vlm_spectra.hooks import Catalogue
from vlm_spectra.interventions import HookedIntervention
from vlm_spectra.positions import Layout

from ..hooked import passes
from ..hooked.calls import make_edits
from ..hooked.delivery import Delivery
from ..hooked.edits import AnyEdit
from ..hooked.inputs import HookedInputs, extended, layout_of, prepare
from ..hooked.reading import Reading
from ..hooked.run import Capture, Run
from ..hooked.selection import Columns
from .targets import Resolved, answer_ids, resolve, target_columns

EMBED = "lm.hook_embed"

Edits = dict[str, list[AnyEdit]]


class Subject:
    """One batch of prompts and what is asked of it.

    Args:
        reading: The model.
        catalogue: Its hooks.
        processor: Its processor.
        inputs: The batch.
        interventions: What to change in every pass.
        delivery: Who takes the results.

    Attributes:
        layout: The prompts' positions, which interventions and callers mean.
        tensors: What the model is run on: the prompts, and behind them the answer that a target asks about.
        columns: [batch][n] the positions that predict the target, once `aim` was called.
    """

    def __init__(
        self,
        reading: Reading,
        catalogue: Catalogue,
        processor: Any,
        inputs: HookedInputs,
        interventions: Sequence[HookedIntervention],
        delivery: Delivery,
    ) -> None:
        self.reading, self.catalogue, self.processor = reading, catalogue, processor
        self.inputs, self.interventions, self.delivery = inputs, interventions, delivery
        self.layout: Layout = layout_of(reading, inputs)
        self.tensors: Mapping[str, torch.Tensor] = inputs.tensors
        self.target = Target()
        self.columns: list[list[int]] = []

    def aim(self, target: Target) -> None:
        """Choose the target; where it is a whole answer, that now stands behind every prompt.

        Raises:
            InvalidInputError: The target's position is out of range.
            PromptTooLongError: Prompt and answer are longer than the model's context.
        """
        ids = [] if target.answer is None else answer_ids(self.processor.tokenizer, target.answer)
        self.target, self.columns = target, target_columns(self.layout, target, max(len(ids), 1))
        if not ids:
            return
        length = self.layout.length + len(ids)
        if length > self.reading.context:
            raise PromptTooLongError(
                f"prompt and answer have {length} tokens; the model's context holds {self.reading.context}.",
                field="target",
            )
        rows = len(self.inputs)
        answer = torch.tensor([ids] * rows)
        sequences = torch.cat([self.inputs.tensors["input_ids"], answer], dim=1)
        tokens = torch.ones(rows, len(ids), dtype=torch.bool)
        self.tensors = extended(self.inputs, sequences, tokens, self.reading.family.answer_type)

    def other(self, inputs: HookedInputs) -> Self:
        """The same question of other inputs."""
        found = type(self)(self.reading, self.catalogue, self.processor, inputs, self.interventions, self.delivery)
        found.aim(self.target)
        return found

    def copies(self, count: int) -> Copies:
        """What the model is run on for so many copies of the batch in one pass."""
        return Copies(self, count)

    def edits(self) -> Edits:
        """The interventions, made anew for every pass: an edit may keep a mean of the pass that it sees first."""
        return make_edits(self.reading, self.catalogue, self.layout, self.interventions, self.delivery.check)

    def resolve(self, logits: torch.Tensor) -> Resolved:
        """The target with its tokens known; `logits` [batch, n, vocab] as `value_pass` gives them."""
        return resolve(self.reading, self.processor.tokenizer, self.target, self.columns, logits)

    def run(self, **fields: Any) -> Run:
        """A run with the interventions, which asks the caller between layers whether to go on."""
        return Run(**({"edits": self.edits(), "check": self.delivery.check} | fields))

    def logits(
        self,
        run: Run,
        columns: Sequence[Sequence[int]] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One pass: logits [batch, n, vocab] at `columns` [batch][n], those of the target by default."""
        columns = self.columns if columns is None else columns
        keep = tuple(sorted({column for row in columns for column in row}))
        logits = passes.forward(self.reading, self.tensors if tensors is None else tensors, run, keep)
        assert logits is not None
        found = torch.tensor([[keep.index(column) for column in row] for row in columns], device=logits.device)
        return logits[torch.arange(len(found), device=logits.device)[:, None], found]

    def backward(self, run: Run, target: Resolved) -> torch.Tensor:
        """One pass and the way back from the target: activations and gradients go to the run's sink.

        Returns:
            [batch] float32, the target's value.
        """
        values: list[torch.Tensor] = []

        def value(logits: torch.Tensor) -> torch.Tensor:
            values.append(target.value(logits))
            return values[0]

        run.on_layer = self._on_layer
        passes.forward_and_backward(self.reading, self.tensors, run, None, passes.Scalar(target.columns, value))
        return values[0].detach()

    def capture(
        self, wanted: Mapping[str, Columns | None], columns: Sequence[Sequence[int]] | None = None
    ) -> tuple[dict[str, torch.Tensor], Run]:
        """One pass: activations by hook name and, with `columns` [batch][n], the `logits` [batch, n, vocab] there."""
        kept = Delivery()
        captures = {name: [Capture(name, positions)] for name, positions in wanted.items()}
        run = self.run(captures=captures, sink=kept.deliver, on_layer=self._on_layer)
        if columns is None:
            passes.forward(self.reading, self.tensors, run, None)
        else:
            kept.tensors["logits"] = self.logits(run, columns)
        return kept.tensors, run

    def prepared(self, change: Callable[[Any], Any]) -> Self:
        """The same question with every image changed.

        Args:
            change: Picture to picture, of the same size.
        """
        prompts = [replace(prompt, images=tuple(map(change, prompt.images))) for prompt in self.inputs.prompts]
        return self.other(prepare(self.reading, self.processor, prompts))

    def _on_layer(self, done: int) -> None:
        self.delivery.progress("forward", done, len(self.reading.blocks))

    def step(self, done: int, total: int) -> None:
        """So far an analysis has come; raises where the caller has left."""
        self.delivery.check()
        self.delivery.progress("analysing", done, total)


class Copies:
    """Several copies of a batch in one pass.

    Along which axis a tensor of the model's inputs grows with the batch is found by preparing the batch twice over,
    so no family needs to say it.

    Args:
        subject: The batch.
        count: How many copies at most.
    """

    def __init__(self, subject: Subject, count: int) -> None:
        self.subject, self.count = subject, count
        self.twice: Mapping[str, torch.Tensor] = subject.tensors
        if count > 1:
            doubled = prepare(subject.reading, subject.processor, subject.inputs.prompts * 2)
            self.twice = subject.other(doubled).tensors

    def tensors(self, count: int) -> dict[str, torch.Tensor]:
        """The model's inputs for `count` copies, row by row: copy 0's rows, copy 1's rows, ..."""
        found: dict[str, torch.Tensor] = tiled(dict(self.subject.tensors), dict(self.twice), count)
        return found

    def decoder_inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the decoder is called with for one copy and for two."""
        return self._decoder_inputs(self.subject.tensors), self._decoder_inputs(self.twice)

    def _decoder_inputs(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        run = Run(captures={EMBED: [Capture(EMBED)]}, check=self.subject.delivery.check)
        passes.forward(self.subject.reading, tensors, run, None)
        return dict(run.decoder_inputs)

    def edits(self, count: int, tower: bool = True) -> Edits:
        """The interventions for `count` copies, each copy under its own.

        Args:
            count: How many copies.
            tower: Whether the vision tower runs again.

        Raises:
            NotSupportedError: It does, and there are interventions on it, where copies cannot be told apart.
        """
        each = [self.subject.edits() for _ in range(count)]
        rows = len(self.subject.inputs)
        inside = [name for name in each[0] if name.startswith("vision.")]
        if inside and tower:
            raise NotSupportedError(
                f"this runs several copies of the image at once and does not go together with an intervention at "
                f"{inside[0]}; integrated_gradients does.",
                field="interventions",
            )
        return {
            name: [_CopyEdit([edits[name][i] for edits in each], rows) for i in range(len(found))]
            for name, found in each[0].items()
            if name not in inside
        }


class _CopyEdit:
    """An intervention on several copies of a batch.

    Args:
        edits: The intervention, made once for each copy.
        rows: The rows of the batch.
    """

    def __init__(self, edits: list[AnyEdit], rows: int) -> None:
        self.edits, self.rows = edits, rows

    def __call__(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        """The changed activation."""
        rows = self.rows * len(self.edits)
        if len(tensor) != rows:  # a mask that is the same for all rows
            tensor = tensor.expand(rows, *tensor.shape[1:])
        parts = tensor.split(self.rows)
        return torch.cat([edit(part, start) for edit, part in zip(self.edits, parts, strict=True)])


def tiled(one: Any, two: Any, count: int) -> Any:
    """Tensors for `count` copies from those for one and for two: repeated along the axis that has grown."""
    if isinstance(one, torch.Tensor):
        grown = [axis for axis in range(one.dim()) if one.shape[axis] != two.shape[axis]]
        if not grown or count == 1:
            return one
        repeats = [1] * one.dim()
        repeats[grown[0]] = count
        return one.repeat(repeats)
    if isinstance(one, dict):
        return {name: tiled(one[name], two[name], count) for name in one}
    if isinstance(one, list | tuple):
        return type(one)(tiled(a, b, count) for a, b in zip(one, two, strict=True))
    return one
