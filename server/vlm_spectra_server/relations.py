"""What must hold between a model's hooks: each relation once, measured on any model and prompt.

`vlm-spectra check`, a server that loads a model, and the tests of every family measure these. A relation's figure is
the worst error found: where nothing else is said, a difference by the largest number of the same position (by 1 where
that is smaller).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import vlm_spectra as vs
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from vlm_spectra.errors import NotSupportedError

from .hooked.attention import attend
from .hooked.inputs import HookedInputs
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
"""The relations by name, in the order of `vlm-spectra check`."""

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

STREAM = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_extra_out",
    "hook_resid_post",
    "hook_deepstack",
)
"""A block's hooks on the residual stream, as far as it has them."""

Error = Callable[[torch.Tensor, torch.Tensor], float]
"""How far what was found is from what was expected."""


def absolute(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where one is NaN and the other is not."""
    assert found.shape == expected.shape, f"{list(found.shape)} and {list(expected.shape)}"
    expected = expected.to(found.device)
    difference = torch.where(found == expected, 0.0, (found.double() - expected.double()).abs())
    both = found.isnan() & expected.isnan()
    return float(difference.masked_fill(both, 0.0).nan_to_num(torch.inf).max()) if found.numel() else 0.0


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference by the largest number of its position, or by 1."""
    assert found.shape == expected.shape, f"{list(found.shape)} and {list(expected.shape)}"
    found, expected = found.double(), expected.to(found.device).double()
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(1.0)
    return float(((found - expected).abs() / scale).nan_to_num(torch.inf).max())


def reached(model: HookedVLM, inputs: HookedInputs) -> Callable[[str], bool]:
    """Which hooks a prompt leads through, the large patterns of the vision tower left out.

    Without a picture neither the vision tower runs nor what attends to it.
    """
    pictures = any(name.startswith("pixel") for name in inputs.tensors)
    idle = [
        f"lm.blocks.{block.index}.{inside}"
        for block in model.reading.blocks
        if block.kind == "cross-attention" and not pictures
        for inside in ("attn.", "mlp.", "ln")
    ]

    def wanted(name: str) -> bool:
        if name.startswith("vision."):
            return pictures and not name.endswith("hook_pattern")
        return not name.startswith(tuple(idle))

    return wanted


class Measured:
    """A model's figures for a prompt, each relation a method; what several need is computed once.

    Args:
        model: The model.
        inputs: The prompt, padded on the left where it is a batch. Padding is left out everywhere.
        positions: None to look at every position, "last" for one of each row.
        alone: The logits of the model without hook points; None to take them from this one, no run around it.
        error: How to measure a difference.
    """

    def __init__(
        self,
        model: HookedVLM,
        inputs: HookedInputs,
        positions: str | None = "last",
        alone: torch.Tensor | None = None,
        error: Error = relative,
    ) -> None:
        self.model, self.inputs, self.positions, self.error = model, inputs, positions, error
        self.reading = model.reading
        self.blocks = self.reading.blocks
        self.prefixes = [f"lm.blocks.{block.index}" for block in self.blocks]
        self._alone = alone
        self.real = inputs.attention_mask.bool()

    def at_real(self, tensor: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """An activation's positions that are no padding, [n, ...]; all where the last alone were kept."""
        tensor = tensor.movedim(axis, 1)
        return tensor[self.real.to(tensor.device)] if tensor.shape[1] == self.real.shape[1] else tensor.flatten(0, 1)

    @cached_property
    def alone(self) -> torch.Tensor:
        """The logits of the model without a run: exactly transformers' own path."""
        if self._alone is not None:
            return self._alone
        tensors = {name: value.to(self.reading.device) for name, value in self.inputs.tensors.items()}
        with torch.no_grad():
            logits: torch.Tensor = self.model.model(**tensors, use_cache=False).logits
        return logits

    @cached_property
    def run(self) -> tuple[torch.Tensor, Any]:
        """A run with every hook captured that the prompt leads through."""
        with self.model.run_with_cache(reached(self.model, self.inputs), positions=self.positions) as cache:
            logits = self.model.forward(self.inputs).logits
        return logits, cache

    @cached_property
    def streams(self) -> dict[str, torch.Tensor]:
        """The residual stream's hooks at every position, by name."""
        wanted = [f"{prefix}.{name}" for prefix in self.prefixes for name in STREAM]
        wanted = ["lm.hook_embed", *(name for name in wanted if name in self.model.catalogue.by_name)]
        cache = self.run[1]
        if self.positions is not None:
            with self.model.run_with_cache(wanted) as cache:
                self.model.forward(self.inputs, logits_to_keep=None)
        return {name: cache[name] for name in wanted}

    @property
    def attending(self) -> list[str]:
        prefixes = [prefix for prefix in self.prefixes if f"{prefix}.attn.hook_pattern" in self.model.catalogue.by_name]
        if not prefixes:
            raise NotSupportedError("no layer has a pattern that can be seen")
        return prefixes

    def logits(self) -> float:
        return absolute(self.run[0], self.alone)

    def finite(self) -> float:
        tensors = [self.alone, *self.streams.values()]
        return float(sum(int((~torch.isfinite(self.at_real(tensor))).sum()) for tensor in tensors))

    def stream(self) -> float:
        errors, before = [], self.at_real(self.streams["lm.hook_embed"])
        for block, prefix in zip(self.blocks, self.prefixes, strict=True):

            def part(name: str, prefix: str = prefix) -> torch.Tensor | None:
                full = f"{prefix}.{name}"
                return self.at_real(self.streams[full]) if full in self.streams else None

            entering, written, extra = part("hook_resid_pre"), part("hook_mlp_out"), part("hook_extra_out")
            errors.append(self.error(before, entering))
            middle = entering + part("hook_attn_out")
            if (seen := part("hook_resid_mid")) is not None:
                errors.append(self.error(middle, seen))
                middle = seen
            after = middle + written if extra is None else middle + written + extra
            before = part("hook_resid_post")
            errors.append(self.error(after * block.scalar, before))
            if (added := part("hook_deepstack")) is not None:
                before = before + added
        return max(errors)

    def heads(self) -> float:
        cache, errors = self.run[1], []
        for block, prefix in zip(self.blocks, self.prefixes, strict=True):
            if block.o is not None and f"{prefix}.attn.hook_head_out" in cache:
                total = self.at_real(cache[f"{prefix}.attn.hook_head_out"]).float().sum(1)
                if block.o.bias is not None:
                    total = total + block.o.bias.float().to(total.device)
                errors.append(self.error(total, self.at_real(cache[f"{prefix}.attn.hook_out"])))
        if not errors:
            raise NotSupportedError("no layer's heads can be told apart")
        return max(errors)

    def rows(self) -> float:
        cache = self.run[1]
        patterns = (self.at_real(cache[f"{prefix}.attn.hook_pattern"], 2) for prefix in self.attending)
        return max(float((pattern.float().sum(-1) - 1).abs().max()) for pattern in patterns)

    def pattern(self) -> float:
        wanted = [f"{prefix}.attn.hook_pattern" for prefix in self.attending]
        with eager(self.model), self.model.run_with_cache(wanted) as cache:
            # To the end: the last layer's weights come after its pattern.
            self.model.forward(self.inputs, logits_to_keep=1)
            weights = dict(_WEIGHTS)
        if not weights:
            raise NotSupportedError("the family's attention returns no weights to compare with")
        pairs = ((cache[name], weights[name]) for name in wanted if name in weights)
        return max(absolute(self.at_real(ours, 2), self.at_real(theirs, 2)) for ours, theirs in pairs)

    def lens(self) -> float:
        top = min(1024, self.model.info.vocab)
        lens = self.model.logit_lens(self.inputs, layers=[-1], top_k=top, positions=self.positions)
        expected = self.alone if self.positions is None else self.alone[:, -1:]
        expected = expected.gather(-1, lens.token_ids[0].to(expected.device))
        return self.error(self.at_real(lens.logits[0]), self.at_real(expected))

    @cached_property
    def attribution(self) -> Any:
        return self.model.attribute(self.inputs, "direct_logit")

    def direct(self) -> float:
        """Of some tokens from the hooks, and of the model's own next token as `attribute` has it."""
        errors = [self._from_parts(row) for row in range(len(self.real))]
        try:
            found = self.attribution
        except NotSupportedError:  # not every layer has heads; the hooks are there all the same
            return max(errors)
        return max(*errors, float(((found.total - found.target_value).abs() / found.target_value.abs()).max()))

    def _from_parts(self, row: int) -> float:
        """Logits of a row's last position as the sum of what embedding, heads and MLPs wrote, relative."""
        cache, reading = self.run[1], self.reading
        ids = list(range(0, reading.vocab, max(7, reading.vocab // 256)))

        def at(name: str) -> torch.Tensor:
            value: torch.Tensor = cache[name][row, -1].float()
            return value

        everywhere = self.model.directions(ids).to(self.alone.device) / at("lm.ln_final.hook_scale")
        parts = everywhere @ at("lm.hook_embed") * reading.gain(reading.blocks[0]) + reading.unembedding_bias(ids)
        for block, prefix in zip(self.blocks, self.prefixes, strict=True):
            along = everywhere * reading.gain(block)
            if f"{prefix}.attn.hook_head_out" not in cache:
                parts = parts + along @ at(f"{prefix}.hook_attn_out")
            else:
                post = None if block.ln1_post is None else at(f"{prefix}.ln1_post.hook_scale")
                pulled, constant = reading.before_post_norm(block, along, post)
                written = at(f"{prefix}.attn.hook_head_out").sum(0)
                bias = None if block.o is None else block.o.bias
                parts = parts + pulled @ (written if bias is None else written + bias.float()) + constant
            for name in ("hook_mlp_out", "hook_extra_out"):
                if f"{prefix}.{name}" in cache:
                    parts = parts + along @ at(f"{prefix}.{name}")
            if f"{prefix}.hook_deepstack" in cache:  # behind the block's scalar
                parts = parts + along @ at(f"{prefix}.hook_deepstack") / block.scalar
        if reading.softcap is not None:
            parts = torch.tanh(parts / reading.softcap) * reading.softcap
        expected = self.alone[row, -1, ids].float()
        return float((parts - expected).abs().max() / expected.abs().max())

    def sources(self) -> float:
        found = self.attribution
        if found.source_scores is None or found.head_scores is None:
            raise NotSupportedError("the heads of this family are not split over positions")
        return self.error(found.source_scores.sum(-1).flatten(1), found.head_scores.flatten(1))

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
        return max(absolute(changed[before], cache[before]), absolute(logits[:, :-1], expected[:, :-1]))

    def integration(self) -> float:
        # A half type's own rounding keeps the error above the default's end: as many steps would never do.
        steps = None if self.model.info.dtype in ("float32", "float64") else 32
        found = self.model.attribute(self.inputs, "integrated_gradients", steps=steps)
        distance = (found.target_value - found.baseline_value).abs()
        return float((found.residual.abs() / distance).max())


def batch(
    model: HookedVLM, together: HookedInputs, alone: Sequence[HookedInputs], positions: str | None, error: Error
) -> float:
    """How far logits, streams and patterns of a padded batch are from those of its rows; and no row reads padding.

    Args:
        model: The model.
        together: The batch.
        alone: Its rows.
        positions: None to look at every position, "last" for one of each row.
        error: How to measure a difference.
    """
    hooks = [
        name
        for block in model.reading.blocks
        for name in (f"lm.blocks.{block.index}.hook_resid_post", f"lm.blocks.{block.index}.attn.hook_pattern")
        if name in model.catalogue.by_name
    ]
    keep = 0 if positions is None else 1
    with model.run_with_cache(hooks, positions=positions) as whole:
        logits = model.forward(together, logits_to_keep=keep).logits
    errors = []
    for row, inputs in enumerate(alone):
        pad = together.input_ids.shape[1] - inputs.input_ids.shape[1]
        kept = slice(pad if positions is None else None, None)
        with model.run_with_cache(hooks, positions=positions) as single:
            errors.append(error(logits[row, kept], model.forward(inputs, logits_to_keep=keep).logits[0]))
        for hook in hooks:
            part = whole[hook][row]
            if hook.endswith("hook_pattern"):
                part = part[:, kept]
                errors.append(float(part[..., :pad].abs().max()) if pad else 0.0)
                part = part[..., pad:]
            else:
                part = part[kept]
            errors.append(error(part, single[hook][0]))
    return max(errors)


_WEIGHTS: dict[str, torch.Tensor] = {}
"""The weights of transformers' eager attention, by the name of the pattern they are compared with."""


def _recorded(module: Any, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    out, weights = attend("eager", module, *arguments, **options)
    if weights is not None and hasattr(module, "_spectra_site"):
        _WEIGHTS[module._spectra_site.pattern] = weights.detach()
    return out, weights


def register_eager(name: str, function: Callable[..., Any]) -> None:
    """Give transformers an attention implementation that gets the masks of its eager one."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


register_eager("spectra_check", _recorded)


@contextmanager
def eager(model: HookedVLM, implementation: str = "spectra_check") -> Iterator[None]:
    """The decoder attends as transformers does eagerly.

    Args:
        model: The model.
        implementation: What attends, by a name of `register_eager`; as it is, the weights are kept beside our patterns.
    """
    reading = model.reading
    configs = [reading.config, reading.decoder.config]
    configs += [block.attn.config for block in reading.blocks if hasattr(block.attn, "config")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = implementation
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _WEIGHTS.clear()
