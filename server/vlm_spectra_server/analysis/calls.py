"""The lens, attribution and sweeps as a caller asks for them: inputs and interventions to delivered tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageStat
from vlm_spectra.analyses import AttributionOptions, LensOptions, SweepOptions
from vlm_spectra.dtypes import name_of
from vlm_spectra.errors import InvalidInputError, NotSupportedError
from vlm_spectra.images import Picture

from ..hooked.delivery import TensorSpec
from ..hooked.inputs import HookedInputs
from ..hooked.run import Run
from ..hooked.selection import Columns
from . import direct, grad_cam, gradients, lens, occlusion, patching, relevancy, rollout, sweep
from .pixels import PIXELS, PixelMap
from .subject import EMBED, Subject
from .targets import Resolved


class Analysis(Subject):
    """One analysis of one batch; the arguments are those of `Subject`."""

    def lens(self, options: LensOptions) -> None:
        """Deliver the tensors of `LogitLensResponse`."""
        reading, last = self.reading, len(self.reading.blocks) - 1
        columns = Columns(self.layout.rectangle(options.positions))
        self.delivery.announce(lens.specs(options, *columns.array.shape))
        final = f"lm.blocks.{last}.hook_resid_post"
        wanted = {f"lm.blocks.{layer}.{options.hook}": columns for layer in options.layers} | {final: columns}
        captured, _ = self.capture(wanted)
        streams = [captured[f"lm.blocks.{layer}.{options.hook}"] for layer in options.layers]
        tensors = lens.read(reading, self.processor.tokenizer, options, streams, captured[final], self.step)
        tensors["layers"] = torch.tensor(options.layers)
        tensors["positions"] = torch.from_numpy(np.ascontiguousarray(columns.array))
        for name, tensor in tensors.items():
            self.delivery.deliver(name, tensor)

    def attribute(self, options: AttributionOptions) -> None:
        """Deliver the tensors of `AttributeResponse`."""
        self.aim(options.target)
        if options.method == "direct_logit":
            target, tensors = self._direct()
        else:
            captured, run = self.capture({EMBED: None}, self.columns)
            target = self.resolve(captured["logits"])
            tensors = self._scores(options, target, captured[EMBED], run)
        tensors["scores"] = tensors["scores"][:, : self.layout.length]
        ids = torch.tensor(target.ids)
        tensors["target_ids"] = ids if target.answer else ids[:, 0]
        self._deliver({name: tensor.cpu() for name, tensor in tensors.items()})

    def sweep(self, corrupted: HookedInputs, options: SweepOptions) -> None:
        """Deliver the tensors of `PatchSweepResponse`; this batch is the clean one."""
        self.aim(options.metric)
        other = self.other(corrupted)
        sweep.run(self, other, options)

    def _direct(self) -> tuple[Resolved, dict[str, torch.Tensor]]:
        if self.target.answer is not None:
            raise InvalidInputError(
                "direct_logit takes a logit apart, which is linear in the residual stream; the log-probability of an "
                "answer is not: explain one of its tokens, or use a method of gradients.",
                field="target",
            )
        at_target = Columns(np.asarray(self.columns))
        wanted = {
            name: None if name.endswith("hook_v") else at_target for name in direct.hooks(self.reading, self.catalogue)
        }
        captured, _ = self.capture(wanted, self.columns)
        logits = captured.pop("logits")
        target = self.resolve(logits)
        return target, direct.attribute(self.reading, target, captured, target.value(logits))

    def _scores(
        self, options: AttributionOptions, target: Resolved, embeddings: torch.Tensor, run: Run
    ) -> dict[str, torch.Tensor]:
        method = options.method
        if method == "gradient_x_input":
            return gradients.gradient_x_input(self._from_embeddings(target, run), embeddings)
        if method == "integrated_gradients":
            integration = gradients.Integration(options.steps, self.step)
            return gradients.integrated_gradients(*self._ways(options.baseline, target, embeddings, run), integration)
        if method == "occlusion":
            places = PixelMap(self.processor, self._pictured("occlusion"))
            baseline = self._baseline_pixels(options.baseline)
            return occlusion.attribute(self, target, baseline, places, options.window, options.stride)
        if method == "attribution_patching":
            assert isinstance(options.against, HookedInputs)
            return patching.attribute(self, target, self.other(options.against))
        if method == "attention_rollout":
            return rollout.attribute(self, target)
        if method == "relevancy":
            return relevancy.attribute(self, target)
        self._pictured("grad_cam")
        return grad_cam.attribute(self, target)

    def _pictured(self, method: str) -> HookedInputs:
        """The inputs, which must have an image."""
        if PIXELS not in self.inputs.tensors:
            raise InvalidInputError(f"{method} explains images, and the prompt has none.", field="method")
        return self.inputs

    def _from_embeddings(self, target: Resolved, run: Run) -> gradients.Evaluate:
        """The model from its merged embeddings on, as a function; the vision tower is not run again."""

        def evaluate(embeddings: torch.Tensor) -> torch.Tensor:
            # The embeddings are as interventions left them.
            edits = self.edits() | {EMBED: [lambda tensor, start: embeddings]}
            with self.run(edits=edits).active():
                output = self.reading.decoder(**run.decoder_inputs)
            rows = torch.arange(len(target.columns), device=embeddings.device)[:, None]
            hidden = output.last_hidden_state[rows, torch.tensor(target.columns, device=embeddings.device)]
            return target.value(self.reading.logits(hidden))

        return evaluate

    def _ways(
        self, baseline: str, target: Resolved, embeddings: torch.Tensor, run: Run
    ) -> tuple[gradients.Evaluate, list[gradients.Way]]:
        """The function that is integrated and the ways on which it is; see `BaseVLM.attribute`."""
        pictured = {image.row for image in self.inputs.images}

        def summed(part: torch.Tensor) -> torch.Tensor:
            return part.sum(-1)

        if baseline == "mean" or not pictured:
            way = gradients.Way(self._mean_embeddings(embeddings), embeddings, summed)
            return self._from_embeddings(target, run), [way]
        # Images from the pixels of the baseline image; rows without one from their mean embedding, as a shift.
        places = PixelMap(self.processor, self.inputs)
        pixels = self.tensors[PIXELS].to(self.reading.device)
        ways = [gradients.Way(self._baseline_pixels(baseline).to(pixels.device), pixels, places.by_token)]
        shifted = len(pictured) < len(self.inputs)
        if shifted:
            without = torch.tensor([row not in pictured for row in range(len(self.inputs))], device=embeddings.device)
            start = (self._mean_embeddings(embeddings) - embeddings) * without[:, None, None]
            ways.append(gradients.Way(start, torch.zeros_like(start), lambda part: summed(part)[:, : places.seq]))

        def evaluate(pixels: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
            edits = self.edits()
            if shift is not None:
                edits.setdefault(EMBED, []).append(lambda tensor, start: tensor + shift)
            logits = self.logits(self.run(edits=edits), target.columns, {**self.tensors, PIXELS: pixels})
            return target.value(logits)

        return evaluate, ways

    def _baseline_pixels(self, kind: str) -> torch.Tensor:
        """`pixel_values` of the batch with every image blanked."""
        pixels = self.prepared(_BLANKED[kind]).tensors[PIXELS]
        if pixels.shape != self.tensors[PIXELS].shape:
            raise NotSupportedError(
                "the processor cuts this image by its content, so a blank one cannot stand in its place; "
                "baseline='mean' of integrated_gradients works.",
                field="baseline",
            )
        return pixels

    def _mean_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Image tokens with their image's mean embedding; in a row without an image, text tokens with theirs."""
        baseline = embeddings.clone()
        for row in range(len(baseline)):
            images = self.inputs.images_of(row)
            for image in images:
                columns = list(image.positions)
                baseline[row, columns] = embeddings[row, columns].mean(0)
            if not images:
                tokens = np.flatnonzero(self.layout.tokens[row])
                baseline[row, tokens] = embeddings[row, tokens].mean(0)
        return baseline

    def _deliver(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.delivery.announce(
            [TensorSpec(name, name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        )
        for name, tensor in tensors.items():
            self.delivery.deliver(name, tensor)


def _mean_colour(picture: Picture) -> Picture:
    colour = tuple(round(value) for value in ImageStat.Stat(picture.pixels).mean)
    return Picture(image=Image.new("RGB", picture.size, colour))


def _black(picture: Picture) -> Picture:
    return Picture(image=Image.new("RGB", picture.size))


def _blurred(picture: Picture) -> Picture:
    return Picture(image=picture.pixels.filter(ImageFilter.GaussianBlur(min(picture.size) / 10)))


_BLANKED: dict[str, Callable[[Picture], Picture]] = {"mean": _mean_colour, "black": _black, "blurred": _blurred}
"""What stands in an image's place: its mean colour, black, or the image blurred by a tenth of its shorter side."""
