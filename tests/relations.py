"""The numbers that must hold between a model's hooks, whatever its family: measured, each as its worst error."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import vlm_spectra as vs
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlm_spectra_server.hooked.inputs import HookedInputs
from vlm_spectra_server.hooked.reading import Reading

TOLERANCES = {
    "logits": 0.0,
    "pattern": 1e-6,
    "scores": 4e-6,
    "rows": 1e-6,
    "stream": 1e-5,
    "heads": 1e-5,
    "lens": 1e-5,
    "direct": 1e-4,
}
"""What each figure of `measure` may be at most."""

RECORDED: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
"""By attention module: what entered Hugging Face's eager softmax in the newest pass, and the weights it gave."""


def _recording(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    if not getattr(module, "recorded", False):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    softmax, entered = torch.nn.functional.softmax, []

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        entered.append(x)
        return softmax(x, *args, **kwargs)

    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    torch.nn.functional.softmax = spy  # type: ignore[assignment]
    try:
        output, weights = eager(module, query, key, value, attention_mask, **kwargs)
    finally:
        torch.nn.functional.softmax = softmax
    RECORDED[id(module)] = entered[0], weights
    return output, weights


AttentionInterface.register("recording", _recording)
AttentionMaskInterface.register("recording", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def language(hooked: vs.HookedVLM, inputs: HookedInputs) -> Callable[[str], bool]:
    """Every hook of the language model that a prompt reaches: cross-attention does not run without an image."""
    pictures = any(name.startswith("pixel") for name in inputs.tensors)
    idle = [
        f"lm.blocks.{block.index}."
        for block in hooked.reading.blocks
        if block.kind == "cross-attention" and not pictures
    ]
    inside = ("attn.", "mlp.", "ln")

    def wanted(name: str) -> bool:
        return name.startswith("lm.") and not any(
            name.startswith(prefix) and name[len(prefix) :].startswith(inside) for prefix in idle
        )

    return wanted


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number and the other is."""
    assert a.shape == b.shape, f"{list(a.shape)} and {list(b.shape)}"
    difference = (a.double() - b.double()).abs()
    return float(torch.where(a == b, 0.0, difference).nan_to_num(torch.inf).max()) if a.numel() else 0.0


def measure(model: Any, inputs: HookedInputs) -> dict[str, float]:
    """The worst error of each relation.

    Args:
        model: A transformers model without hook points; it stays as it is.
        inputs: A prompt, padded on the left where it is a batch.

    Returns:
        By row: "logits", of a model with every capture on against the plain one; "pattern" and "scores" against
        Hugging Face's eager attention; "rows", a pattern's sums; "stream", the residual stream's sums; "heads", their
        shares' sum; "lens", the last layer read through the lens; "direct", the logits as a sum of parts, relative.
    """
    found: dict[str, float] = {}
    with torch.no_grad():
        expected = model(**inputs.tensors, use_cache=False).logits
    hooked = vs.HookedVLM(copy.deepcopy(model), processor=None)
    with hooked.run_with_cache(language(hooked, inputs)) as cache:
        output = hooked.forward(inputs)
    found["logits"] = worst(output.logits, expected)
    assert not expected.isnan().any()
    real = inputs.attention_mask.bool()
    found["stream"], found["heads"] = _stream(hooked, cache, real), _heads(hooked, cache, real)
    found["lens"] = _lens(hooked.reading, cache, output.logits, real)
    found["direct"] = _direct(hooked, cache, output.logits, real)
    return found | against_eager(model, inputs, real)


def against_eager(model: Any, inputs: HookedInputs, real: torch.Tensor) -> dict[str, float]:
    """Patterns and scores where both sides compute eagerly: the same queries and keys to the last bit."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("recording")
    modules = [block.attn for block in Reading(eager).blocks]
    for module in modules:
        module.recorded = True  # type: ignore[assignment]
    hooked = vs.HookedVLM(copy.deepcopy(eager), processor=None)
    attending = [block.index for block in hooked.reading.blocks if block.attends]
    RECORDED.clear()
    with torch.no_grad():
        eager(**inputs.tensors, use_cache=False)
    recorded = {index: RECORDED[id(modules[index])] for index in attending}
    wanted = [f"lm.blocks.{index}.attn.hook_{name}" for index in attending for name in ("pattern", "scores")]
    found = {"pattern": 0.0, "scores": 0.0, "rows": 0.0}
    if not wanted:
        return {}
    with hooked.run_with_cache(wanted) as cache:
        hooked.forward(inputs)
    for index in attending:
        entered, weights = recorded[index]
        pattern, scores = (cache[f"lm.blocks.{index}.attn.hook_{name}"] for name in ("pattern", "scores"))
        rows = real[:, None].expand(-1, pattern.shape[1], -1)
        found["pattern"] = max(found["pattern"], worst(pattern[rows], weights[rows]))
        found["rows"] = max(found["rows"], float((pattern[rows].sum(-1) - 1).abs().max()))
        entered, scores = entered.expand(scores.shape)[rows], scores[rows]
        masked = entered <= torch.finfo(entered.dtype).min / 2
        assert torch.equal(scores == -torch.inf, masked), "other positions are masked than in Hugging Face's"
        error = (scores - entered)[~masked].abs() / entered[~masked].abs().clamp_min(1)
        found["scores"] = max(found["scores"], float(error.max()))
    return found


def _parts(cache: Mapping[str, torch.Tensor], layer: int, real: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix = f"lm.blocks.{layer}."
    return {name[len(prefix) :]: cache[name][real] for name in cache if name.startswith(prefix) and "attn." not in name}


def _stream(hooked: vs.HookedVLM, cache: Any, real: torch.Tensor) -> float:
    errors, before = [], cache["lm.hook_embed"][real]
    for block in hooked.reading.blocks:
        part = _parts(cache, block.index, real)
        errors.append(worst(before, part["hook_resid_pre"]))
        mid = part["hook_resid_pre"] + part["hook_attn_out"]
        if "hook_resid_mid" in part:
            errors.append(worst(mid, part["hook_resid_mid"]))
            mid = part["hook_resid_mid"]
        after = (mid + part["hook_mlp_out"] + part.get("hook_extra_out", 0)) * block.scalar
        errors.append(worst(after, part["hook_resid_post"]))
        before = part["hook_resid_post"] + part.get("hook_deepstack", 0)
    return max(errors)


def _heads(hooked: vs.HookedVLM, cache: Any, real: torch.Tensor) -> float:
    errors = [0.0]
    for block in hooked.reading.blocks:
        if block.o is not None:
            shares = cache[f"lm.blocks.{block.index}.attn.hook_head_out"][real].sum(1)
            bias = 0 if block.o.bias is None else block.o.bias
            errors.append(worst(shares + bias, cache[f"lm.blocks.{block.index}.attn.hook_out"][real]))
    return max(errors)


def _lens(reading: Reading, cache: Any, logits: torch.Tensor, real: torch.Tensor) -> float:
    with torch.no_grad():
        last = cache[f"lm.blocks.{len(reading.blocks) - 1}.hook_resid_post"][real]
        return worst(reading.logits(reading.final_norm(last)), logits[real])


def _direct(hooked: vs.HookedVLM, cache: Any, logits: torch.Tensor, real: torch.Tensor) -> float:
    """Every token's logit at each row's last position as the sum of what embedding, heads and MLPs wrote."""
    reading, total = hooked.reading, 0.0
    ids = list(range(0, logits.shape[-1], 7))
    directions = hooked.directions(ids)
    scale = cache["lm.ln_final.hook_scale"][:, -1]
    for row in range(len(real)):
        along = directions / scale[row]

        def at(name: str, row: int = row) -> torch.Tensor:
            return cache[name][row, -1].float()

        parts = along @ at("lm.hook_embed") * reading.gain(reading.blocks[0]) + reading.unembedding_bias(ids)
        everywhere = along
        for block in reading.blocks:
            prefix, along = f"lm.blocks.{block.index}", everywhere * reading.gain(block)
            if block.o is None:
                parts = parts + along @ at(f"{prefix}.hook_attn_out")
            else:
                post = None if block.ln1_post is None else at(f"{prefix}.ln1_post.hook_scale")
                pulled, constant = reading.before_post_norm(block, along, post)
                written = at(f"{prefix}.attn.hook_head_out").sum(0)
                written = written if block.o.bias is None else written + block.o.bias
                parts = parts + pulled @ written + constant
            parts = parts + along @ at(f"{prefix}.hook_mlp_out")
            if f"{prefix}.hook_extra_out" in cache:
                parts = parts + along @ at(f"{prefix}.hook_extra_out")
            if f"{prefix}.hook_deepstack" in cache:
                parts = parts + along @ at(f"{prefix}.hook_deepstack") / block.scalar
        if reading.softcap is not None:
            parts = torch.tanh(parts / reading.softcap) * reading.softcap
        expected = logits[row, -1, ids]
        total = max(total, float((parts - expected).abs().max() / expected.abs().max()))
    return total
