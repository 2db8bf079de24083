"""What must hold between a model's hooks, measured on any checkpoint: `vlm-spectra check`, and in short at each load.

A row is one relation: its figure is the worst error found, beside what is allowed in the model's type. Errors are
differences by the largest number of the same position (by 1 where that is smaller), where a row says nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import vlm_spectra as vs
from PIL import Image, ImageDraw
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from vlm_spectra.errors import InvalidInputError, NotSupportedError, SpectraError
from vlm_spectra.images import Picture
from vlm_spectra.inputs import Inputs

from .hooked.attention import attend
from .hooked_vlm import HookedVLM

RELATIONS: dict[str, str] = {
    "logits": "logits with every hook captured are those of the model alone, to the last bit",
    "finite": "no number of the residual stream or the logits is NaN or infinite",
    "stream": "resid_pre + attn_out = resid_mid, + mlp_out = resid_post (+ deepstack) = the next resid_pre",
    "heads": "head_out summed over heads, plus the bias, is attn.hook_out",
    "rows": "each row of a pattern sums to 1",
    "pattern": "patterns are those of transformers' eager attention",
    "lens": "the last layer of the logit lens is the model's logits",
    "direct": "embedding, heads and MLPs add up to the target's logit (relative)",
    "sources": "a head's share split over the positions it read adds up to the head",
    "edits": "a halved pattern changes the last position, and nothing before it",
    "integration": "integrated gradients add up to F(x) - F(baseline) (a share of it)",
    "batch": "a padded batch gives what its rows give alone",
}
"""The rows by name, in their order."""

SHORT = ("logits", "finite", "stream", "heads", "rows", "pattern", "lens")
"""The rows that are measured whenever a server loads a model: four short forward passes."""

_FULL = {
    "logits": 0.0,
    "finite": 0.0,
    "stream": 1e-5,
    "heads": 1e-5,
    "rows": 1e-6,
    "pattern": 1e-6,
    "lens": 1e-5,
    "direct": 1e-4,
    "sources": 1e-4,
    "edits": 0.0,
    "integration": 0.005,
    "batch": 1e-4,
}
_HALF = {
    "logits": 0.0,
    "finite": 0.0,
    "stream": 0.01,
    "heads": 0.02,
    "rows": 0.02,
    "pattern": 0.02,
    "lens": 0.02,
    "direct": 0.05,
    "sources": 0.02,
    "edits": 0.0,
    "integration": 0.05,
    "batch": 0.05,
}
TOLERANCES: dict[str, dict[str, float]] = {
    "float32": _FULL,
    "float64": _FULL,
    # float16 has 11 bits of mantissa, bfloat16 8.
    "float16": {name: figure / 4 for name, figure in _HALF.items()},
    "bfloat16": _HALF,
}
"""What each figure may be at most, by the type of the model's activations."""

TASK = "Click on the blue button"


@dataclass(frozen=True)
class Row:
    """One relation, measured.

    Attributes:
        name: Its name in `RELATIONS`.
        figure: The worst error; None where the relation does not apply.
        allowed: The most it may be.
        note: Why it does not apply, or what else there is to say.
    """

    name: str
    figure: float | None
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it holds, or does not apply."""
        return self.figure is None or self.figure <= self.allowed


def drawn(width: int = 224, height: int = 168) -> Image.Image:
    """A screen with a window and a button, for models that are given no picture."""
    image = Image.new("RGB", (width, height), (40, 70, 120))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 10, height // 10, width * 9 // 10, height * 9 // 10), fill=(235, 235, 238))
    draw.ellipse((width // 5, height // 4, width * 2 // 5, height * 3 // 5), fill=(215, 40, 40))
    draw.rectangle((width // 2, height // 2, width * 4 // 5, height * 3 // 4), fill=(40, 90, 215))
    return image


def run_check(
    model: HookedVLM,
    image: Image.Image | None = None,
    names: Sequence[str] = tuple(RELATIONS),
) -> list[Row]:
    """Measure relations on a loaded model.

    Args:
        model: The model.
        image: The picture of the prompt; a drawn one where None.
        names: Which relations.
    """
    measured = _Measured(model, image or drawn())
    allowed = TOLERANCES.get(model.info.dtype)
    if allowed is None:
        raise NotSupportedError(
            f"there are no tolerances for {model.info.dtype} activations; possible are {', '.join(TOLERANCES)}.",
            field="dtype",
        )
    rows = []
    for name in names:
        try:
            rows.append(Row(name, float(getattr(measured, name)()), allowed[name]))
        except NotSupportedError as error:
            rows.append(Row(name, None, allowed[name], error.message))
    return rows


def refuse_if_broken(model: HookedVLM) -> float:
    """The short form, for a model that is about to serve; the seconds it took.

    Raises:
        NotSupportedError: A row fails; the message says which, by how much.
    """
    begun = time.perf_counter()
    image = drawn(112, 112) if model.reading.image_token_id >= 0 else None
    failed = [row for row in run_check(model, image, SHORT) if not row.ok]
    if failed:
        row = failed[0]
        raise NotSupportedError(
            f"the model {model.info.name!r} fails its check, so its hooks would tell lies: {row.name} "
            f"({RELATIONS[row.name]}) is off by {row.figure:.3g}, allowed is {row.allowed:.3g}. `vlm-spectra check` "
            "shows all rows."
        )
    return time.perf_counter() - begun


def command(options: Any) -> int:
    """`vlm-spectra check`: measure, print, and tell by the exit status whether all rows hold."""
    image = None if options.image is None else Picture.of(options.image).pixels
    begun = time.perf_counter()
    model = HookedVLM.from_pretrained(
        options.model,
        dtype=options.dtype or None,
        device=options.device_map or options.device or None,
        attn_implementation=options.attn_implementation or None,
        revision=options.revision or None,
    )
    loaded = time.perf_counter()
    rows = run_check(model, image)
    info = model.info
    seconds = time.perf_counter() - loaded
    if options.json:
        found = {"model": info.name, "family": info.family, "revision": info.revision, "dtype": info.dtype}
        found |= {"attention": info.attention, "device": info.device, "seconds": round(seconds, 3)}
        listed = [{**asdict(row), "ok": row.ok, "relation": RELATIONS[row.name]} for row in rows]
        print(json.dumps({**found, "ok": all(row.ok for row in rows), "rows": listed}, indent=2))
    else:
        print(f"{info.name}: {info.family}, {info.dtype}, {info.attention} attention, on {info.device}")
        print(f"loaded in {loaded - begun:.1f} s, measured in {seconds:.1f} s\n")
        print(table(rows))
    return 0 if all(row.ok for row in rows) else 1


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    lines = [f"{'row':<12}{'figure':>10}{'allowed':>10}  {'':<6}what must hold"]
    for row in rows:
        figure = "-" if row.figure is None else f"{row.figure:.2e}"
        verdict = "n/a" if row.figure is None else "ok" if row.ok else "FAILS"
        said = row.note if row.figure is None else RELATIONS[row.name]
        lines.append(f"{row.name:<12}{figure:>10}{row.allowed:>10.0e}  {verdict:<6}{said}")
    failed = [row.name for row in rows if not row.ok]
    lines.append("")
    lines.append(f"{', '.join(failed)}: not as it must be" if failed else "all rows hold")
    return "\n".join(lines)


class _Measured:
    """A model's figures, each relation a method; what several need is computed once."""

    def __init__(self, model: HookedVLM, image: Image.Image) -> None:
        self.model, self.image = model, image
        self.blocks = model.reading.blocks
        self.prefixes = [f"lm.blocks.{block.index}" for block in self.blocks]

    def has(self, name: str) -> bool:
        return name in self.model.catalogue.by_name

    @cached_property
    def inputs(self) -> Any:
        """A picture and a task; the task alone where the model's processor takes no picture."""
        try:
            return self.model.prepared(self.model.prepare_messages(TASK, self.image))
        except SpectraError:
            return self.model.prepared(self.model.prepare_messages(TASK))

    @cached_property
    def alone(self) -> torch.Tensor:
        """The logits of the model without a run: exactly transformers' own path."""
        tensors = {name: value.to(self.model.reading.device) for name, value in self.inputs.tensors.items()}
        with torch.no_grad():
            logits: torch.Tensor = self.model.model(**tensors, use_cache=False).logits
        return logits

    @cached_property
    def last(self) -> tuple[torch.Tensor, Any]:
        """A run with every hook captured at the last position, but for the large patterns of the vision tower."""

        def wanted(name: str) -> bool:
            return not (name.startswith("vision.") and name.endswith("hook_pattern"))

        with self.model.run_with_cache(wanted, positions="last") as cache:
            logits = self.model.forward(self.inputs).logits
        return logits, cache

    @cached_property
    def streams(self) -> Any:
        """A run with the residual stream's hooks captured at every position."""
        names = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
        names += ("hook_extra_out", "hook_deepstack")
        wanted = [f"{prefix}.{name}" for prefix in self.prefixes for name in names if self.has(f"{prefix}.{name}")]
        with self.model.run_with_cache(["lm.hook_embed", *wanted]) as cache:
            self.model.forward(self.inputs, logits_to_keep=None)
        return cache

    @property
    def attending(self) -> list[str]:
        prefixes = [prefix for prefix in self.prefixes if self.has(f"{prefix}.attn.hook_pattern")]
        if not prefixes:
            raise NotSupportedError("no layer has a pattern that can be seen")
        return prefixes

    def logits(self) -> float:
        return _largest(self.last[0], self.alone)

    def finite(self) -> float:
        tensors = [self.alone, *(self.streams[name] for name in self.streams.names)]
        return float(sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors))

    def stream(self) -> float:
        cache, errors, before = self.streams, [], self.streams["lm.hook_embed"]
        for block, prefix in zip(self.blocks, self.prefixes, strict=True):
            part = {
                name.removeprefix(f"{prefix}."): cache[name] for name in cache.names if name.startswith(f"{prefix}.")
            }
            errors.append(_error(before, part["hook_resid_pre"]))
            middle = part["hook_resid_pre"] + part["hook_attn_out"]
            if "hook_resid_mid" in part:
                errors.append(_error(middle, part["hook_resid_mid"]))
                middle = part["hook_resid_mid"]
            after = middle + part["hook_mlp_out"] + part.get("hook_extra_out", 0)
            errors.append(_error(after * block.scalar, part["hook_resid_post"]))
            before = part["hook_resid_post"]
            if "hook_deepstack" in part:
                before = before + part["hook_deepstack"]
        return max(errors)

    def heads(self) -> float:
        cache, errors = self.last[1], []
        for block, prefix in zip(self.blocks, self.prefixes, strict=True):
            if block.o is not None and f"{prefix}.attn.hook_head_out" in cache.names:
                total = cache[f"{prefix}.attn.hook_head_out"].float().sum(2)
                if block.o.bias is not None:
                    total = total + block.o.bias.float().to(total.device)
                errors.append(_error(total, cache[f"{prefix}.attn.hook_out"]))
        if not errors:
            raise NotSupportedError("no layer's heads can be told apart")
        return max(errors)

    def rows(self) -> float:
        cache = self.last[1]
        sums = [cache[f"{prefix}.attn.hook_pattern"].float().sum(-1) for prefix in self.attending]
        return max(float((each - 1).abs().max()) for each in sums)

    def pattern(self) -> float:
        wanted = [f"{prefix}.attn.hook_pattern" for prefix in self.attending]
        with _eager(self.model) as recorded:
            with self.model.run_with_cache(wanted) as cache:
                self.model.forward(self.inputs, logits_to_keep=None)
            weights = dict(recorded)
        if not weights:
            raise NotSupportedError("the family's attention returns no weights to compare with")
        return max(_largest(cache[name], weights[name]) for name in wanted if name in weights)

    def lens(self) -> float:
        top = min(8, self.model.info.vocab)
        lens = self.model.logit_lens(self.inputs, layers=[-1], top_k=top, positions="last")
        expected = self.alone[:, -1].gather(-1, lens.token_ids[0, :, 0].to(self.alone.device))
        return _error(lens.logits[0, :, 0], expected)

    @cached_property
    def attribution(self) -> Any:
        return self.model.attribute(self.inputs, "direct_logit")

    def direct(self) -> float:
        found = self.attribution
        return float(((found.total - found.target_value).abs() / found.target_value.abs()).max())

    def sources(self) -> float:
        found = self.attribution
        if found.source_scores is None or found.head_scores is None:
            raise NotSupportedError("the heads of this family are not split over positions")
        return _error(found.source_scores.sum(-1).flatten(1), found.head_scores.flatten(1))

    def edits(self) -> float:
        prefix = self.attending[len(self.attending) // 2]
        before = f"{prefix}.hook_resid_pre"
        edit = (f"{prefix}.attn.hook_pattern", vs.ScaleActivation(0.5, positions="last"))
        with self.model.run_with_cache(before) as cache:
            expected = self.model.forward(self.inputs).logits
        with self.model.run_with_hooks([edit]), self.model.run_with_cache(before) as changed:
            logits = self.model.forward(self.inputs).logits
        if torch.equal(logits[:, -1], expected[:, -1]):
            return float("inf")
        return max(_largest(changed[before], cache[before]), _largest(logits[:, :-1], expected[:, :-1]))

    def integration(self) -> float:
        # A half type's own rounding keeps the error above the default's end: as many steps would never do.
        steps = None if self.model.info.dtype in ("float32", "float64") else 32
        found = self.model.attribute(self.inputs, "integrated_gradients", steps=steps)
        distance = (found.target_value - found.baseline_value).abs()
        return float((found.residual.abs() / distance).max())

    def batch(self) -> float:
        tasks: list[str] = [TASK, "What is to be seen here? Say it in one short sentence."]
        images = [self.image if self.inputs.images else None, None]
        together = self.model.forward(self._batch(tasks, images), logits_to_keep=1).logits
        alone = [
            self.model.forward(self.model.prepare_messages(task, image), logits_to_keep=1).logits
            for task, image in zip(tasks, images, strict=True)
        ]
        return _error(together, torch.cat(alone))

    def _batch(self, tasks: list[str], images: list[Any]) -> Inputs:
        try:
            return self.model.prepare_messages_batch(tasks, images)
        except InvalidInputError as error:
            raise NotSupportedError(f"the model's processor makes no such batch: {error.message}") from error


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where one is NaN and the other is not."""
    expected = expected.to(found.device)
    difference = torch.where(found == expected, 0.0, (found.double() - expected.double()).abs())
    both = found.isnan() & expected.isnan()
    return float(difference.masked_fill(both, 0.0).nan_to_num(torch.inf).max())


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference by the largest number of its position."""
    found, expected = found.double(), expected.to(found.device).double()
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1.0)
    return float(((found - expected).abs() / scale).nan_to_num(torch.inf).max())


_WEIGHTS: dict[str, torch.Tensor] = {}
"""The weights of transformers' eager attention, by the name of the pattern they are compared with."""


def _recorded(module: Any, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    out, weights = attend("eager", module, *arguments, **options)
    if weights is not None and hasattr(module, "_spectra_site"):
        _WEIGHTS[module._spectra_site.pattern] = weights.detach()
    return out, weights


AttentionInterface.register("spectra_check", _recorded)
AttentionMaskInterface.register("spectra_check", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def _eager(model: HookedVLM) -> Iterator[dict[str, torch.Tensor]]:
    """The decoder attends as transformers does eagerly, and its own weights are kept beside our patterns."""
    reading = model.reading
    configs = [reading.config, reading.decoder.config]
    configs += [block.attn.config for block in reading.blocks if hasattr(block.attn, "config")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "spectra_check"
        yield _WEIGHTS
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _WEIGHTS.clear()
