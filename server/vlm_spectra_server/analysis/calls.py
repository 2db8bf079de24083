"""The lens and attribution as a caller asks for them: inputs and interventions to delivered tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from vlm_spectra.base import AttributionOptions, LensOptions
from vlm_spectra.dtypes import name_of
from vlm_spectra.hooks import Catalogue
from vlm_spectra.images import Picture
from vlm_spectra.interventions import HookedIntervention
from vlm_spectra.positions import Layout

from ..hooked import passes
from ..hooked.calls import make_edits
from ..hooked.delivery import Delivery, TensorSpec
from ..hooked.inputs import HookedInputs, layout_of, prepare
from ..hooked.reading import Reading
from ..hooked.run import Capture, Run
from ..hooked.selection import Columns
from . import direct, gradients, lens
from .targets import Resolved, resolve, target_columns

EMBED = "lm.hook_embed"


class Analysis:
    """One analysis of one batch.

    Args:
        reading: The model.
        catalogue: Its hooks.
        processor: Its processor.
        inputs: The batch.
        interventions: What to change in every pass.
        delivery: Who takes the results.
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

    def lens(self, options: LensOptions) -> None:
        """Deliver the tensors of `LogitLensResponse`."""
        reading, last = self.reading, len(self.reading.blocks) - 1
        columns = Columns(self.layout.rectangle(options.positions))
        final = f"lm.blocks.{last}.hook_resid_post"
        wanted = {f"lm.blocks.{layer}.{options.hook}": columns for layer in options.layers} | {final: columns}
        captured, _ = self._capture(wanted, None)
        streams = {layer: captured[f"lm.blocks.{layer}.{options.hook}"] for layer in options.layers}
        tensors = lens.read(reading, self.processor.tokenizer, options, streams, captured[final], self._step)
        tensors["layers"] = torch.tensor(options.layers)
        tensors["positions"] = torch.from_numpy(np.ascontiguousarray(columns.array))
        self._deliver(tensors)

    def attribute(self, options: AttributionOptions) -> None:
        """Deliver the tensors of `AttributeResponse`."""
        columns = target_columns(self.layout, options.target.position)
        at_target = Columns(np.asarray(columns)[:, None])
        wanted: dict[str, Columns | None] = {EMBED: None}
        if options.method == "direct_logit":
            wanted = {name: None if name.endswith("hook_v") else at_target for name in direct.hooks(self.reading)}
        captured, run = self._capture(wanted, columns)
        logits = captured.pop("logits")
        target = resolve(self.reading, self.processor.tokenizer, options.target, columns, logits)
        if options.method == "direct_logit":
            tensors = direct.attribute(self.reading, target, captured, target.value(logits))
        else:
            tensors = self._by_gradient(options, target, captured[EMBED], run)
        tensors["target_ids"] = torch.tensor(target.ids)
        self._deliver({name: tensor.cpu() for name, tensor in tensors.items()})

    def _by_gradient(
        self, options: AttributionOptions, target: Resolved, embeddings: torch.Tensor, run: Run
    ) -> dict[str, torch.Tensor]:
        evaluate = self._from_embeddings(target, run)
        if options.method == "gradient_x_input":
            return gradients.gradient_x_input(evaluate, embeddings)
        baseline = self._baseline(options.baseline, embeddings)
        integration = gradients.Integration(options.steps, self._step)
        return gradients.integrated_gradients(evaluate, embeddings, baseline, integration)

    def _from_embeddings(self, target: Resolved, run: Run) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model from its merged embeddings on, as a function; the vision tower is not run again."""
        inputs = {name: value for name, value in run.decoder_inputs.items() if name != "inputs_embeds"}

        def evaluate(embeddings: torch.Tensor) -> torch.Tensor:
            # Made anew for every pass: an edit may keep a mean of the pass that it sees first.
            edits = {name: each for name, each in self._edits().items() if name != EMBED}
            with Run(edits=edits, check=self.delivery.check).active():
                output = self.reading.decoder(inputs_embeds=embeddings, **inputs)
            rows = torch.arange(len(target.columns), device=embeddings.device)
            hidden = output.last_hidden_state[rows, torch.tensor(target.columns, device=embeddings.device)]
            return target.value(self.reading.logits(hidden))

        return evaluate

    def _baseline(self, kind: str, embeddings: torch.Tensor) -> torch.Tensor:
        """Where an integration starts; see `BaseVLM.attribute`."""
        if kind == "mean":
            return self._mean_embeddings(embeddings)
        prompts = [
            replace(prompt, images=tuple(_blanked(picture, kind) for picture in prompt.images))
            for prompt in self.inputs.prompts
        ]
        blank = prepare(self.reading, self.processor, prompts)
        captured, _ = Analysis(
            self.reading, self.catalogue, self.processor, blank, self.interventions, self.delivery
        )._capture({EMBED: None}, None)
        image = torch.from_numpy(self.layout.image).to(embeddings.device)[..., None]
        baseline = torch.where(image, captured[EMBED], embeddings)
        return self._mean_embeddings(baseline, only_without_images=True)

    def _mean_embeddings(self, embeddings: torch.Tensor, only_without_images: bool = False) -> torch.Tensor:
        baseline = embeddings.clone()
        for row in range(len(baseline)):
            images = self.inputs.images_of(row)
            if not images:
                tokens = torch.from_numpy(self.layout.tokens[row]).to(baseline.device)
                baseline[row, tokens] = embeddings[row, tokens].mean(0)
            elif not only_without_images:
                for image in images:
                    columns = list(image.positions)
                    baseline[row, columns] = embeddings[row, columns].mean(0)
        return baseline

    def _capture(
        self, wanted: dict[str, Columns] | dict[str, Columns | None], logits_at: Sequence[int] | None
    ) -> tuple[dict[str, torch.Tensor], Run]:
        """One pass: activations by hook name and, with `logits_at` [batch], the logits [batch, vocab] there."""
        kept = Delivery()
        run = Run(
            captures={name: [Capture(name, columns)] for name, columns in wanted.items()},
            edits=self._edits(),
            sink=kept.deliver,
            check=self.delivery.check,
        )
        keep = None if logits_at is None else tuple(sorted(set(logits_at)))
        logits = passes.forward(self.reading, self.inputs.tensors, run, keep)
        if logits is not None and logits_at is not None and keep is not None:
            rows = torch.arange(len(logits_at), device=logits.device)
            found = torch.tensor([keep.index(column) for column in logits_at], device=logits.device)
            kept.tensors["logits"] = logits[rows, found]
        return kept.tensors, run

    def _edits(self) -> Any:
        return make_edits(self.reading, self.catalogue, self.layout, self.interventions)

    def _step(self, done: int, total: int) -> None:
        self.delivery.check()
        self.delivery.progress("analysing", done, total)

    def _deliver(self, tensors: dict[str, torch.Tensor]) -> None:
        self.delivery.announce(
            [TensorSpec(name, name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        )
        for name, tensor in tensors.items():
            self.delivery.deliver(name, tensor)


def _blanked(picture: Picture, kind: str) -> Picture:
    """A black image of the same size, or the image blurred by a tenth of its shorter side."""
    if kind == "black":
        return Picture(image=Image.new("RGB", picture.size))
    return Picture(image=picture.pixels.filter(ImageFilter.GaussianBlur(min(picture.size) / 10)))
