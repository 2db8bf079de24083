"""Direct logit attribution: the residual stream's parts along a target's direction.

At the target's position the final residual stream is the embedding plus what every head and every MLP wrote (plus
biases). With the norms' scales held at this run's values the logit is linear in the stream, so it is the sum of the
parts' own logits (Elhage et al. 2021). A head's output is a mixture of what it read from each position: the pattern
splits it over them exactly. What a block adds besides (Gemma 4) is counted with its MLP; a scalar on the stream at a
block's end multiplies all that was written before. Where logits are capped, the logit before its cap is explained.
"""

from __future__ import annotations

import torch
from vlm_spectra.errors import NotSupportedError
from vlm_spectra.hooks import Catalogue

from ..hooked.reading import Block, Reading
from .targets import Resolved

PARTS = ("attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_mlp_out")
"""What is read of every block."""


def hooks(reading: Reading, catalogue: Catalogue) -> list[str]:
    """What a run must capture: all at the target's position but `hook_v`, which is of every position.

    Raises:
        NotSupportedError: A layer has no heads to tell apart.
    """
    known = catalogue.by_name
    names = [f"lm.blocks.{block.index}.{hook}" for block in reading.blocks for hook in PARTS]
    missing = [name for name in names if name not in known]
    if missing:
        raise NotSupportedError(
            f"direct_logit takes every layer's heads apart, and {missing[0]} does not exist in this model; methods of "
            "gradients, such as integrated_gradients, work.",
            field="method",
        )
    ends = ["lm.hook_embed", "lm.ln_final.hook_scale", "lm.ln_final.hook_out"]
    some = [
        f"lm.blocks.{block.index}.{hook}"
        for block in reading.blocks
        for hook in ("ln1_post.hook_scale", "hook_extra_out", "hook_deepstack")
    ]
    return [*names, *ends, *(name for name in some if name in known)]


def attribute(
    reading: Reading, target: Resolved, captured: dict[str, torch.Tensor], value: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The scores of every part.

    Args:
        reading: The model.
        target: The target.
        captured: The activations of `hooks` by name.
        value: [batch] the target's value in this run.

    Returns:
        The tensors of `AttributeResponse` for this method, float32 on the host.
    """
    scale = captured["lm.ln_final.hook_scale"][:, 0].float()
    direction, bias = target.direction(reading) / scale, target.bias(reading)
    if reading.softcap is not None:
        value = _uncapped(reading, target, captured["lm.ln_final.hook_out"][:, 0])
    embed = _along(captured["lm.hook_embed"], direction * reading.gain(reading.blocks[0]))
    heads, mlps, sources = [], [], []
    for block in reading.blocks:
        prefix, along = f"lm.blocks.{block.index}", direction * reading.gain(block)
        post = captured.get(f"{prefix}.ln1_post.hook_scale")
        inner, constant = reading.before_post_norm(block, along, None if post is None else post[:, 0])
        bias = bias + constant
        if block.o is not None and block.o.bias is not None:
            bias = bias + inner @ block.o.bias.float()
        pulled = torch.einsum("bd,dhk->bhk", inner, reading.head_weights(block).to(inner))
        z = captured[f"{prefix}.attn.hook_z"][:, 0].float()
        heads.append(torch.einsum("bhk,bhk->bh", z, pulled))
        values = captured[f"{prefix}.attn.hook_v"].float()
        pattern = captured[f"{prefix}.attn.hook_pattern"][:, :, 0].float()
        sources.append(_sources(block, pattern, values, z, pulled))
        added = captured[f"{prefix}.hook_mlp_out"]
        if f"{prefix}.hook_extra_out" in captured:
            added = added.float() + captured[f"{prefix}.hook_extra_out"]
        mlps.append(_along(added, along))
        if f"{prefix}.hook_deepstack" in captured:  # behind the block's scalar
            embed = embed + _along(captured[f"{prefix}.hook_deepstack"], along / block.scalar)
    head_scores, mlp_scores, source_scores = torch.stack(heads, 1), torch.stack(mlps, 1), torch.stack(sources, 1)
    scores = source_scores.sum((1, 2))
    rows = torch.arange(len(scores), device=scores.device)
    scores[rows, torch.tensor(target.columns, device=scores.device)[:, 0]] += embed
    tensors = {
        "scores": scores,
        "target_value": value,
        "total": embed + head_scores.sum((1, 2)) + mlp_scores.sum(1) + bias,
        "embed": embed,
        "bias": bias,
        "heads": head_scores,
        "mlps": mlp_scores,
        "sources": source_scores,
    }
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}


def _along(part: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """[batch], an activation [batch, 1, hidden] along a direction."""
    return torch.einsum("bd,bd->b", part[:, 0].float(), direction)


def _sources(
    block: Block, pattern: torch.Tensor, values: torch.Tensor, z: torch.Tensor, pulled: torch.Tensor
) -> torch.Tensor:
    """[batch, heads, seq], each head's score split over what it read."""
    values = values.repeat_interleave(block.heads // block.kv_heads, dim=2)
    mixed = torch.einsum("bhs,bshk->bhk", pattern, values)
    if not torch.allclose(mixed, z, rtol=1e-3, atol=1e-3 * float(mixed.abs().max())):
        # A gate, or an intervention, stands between the mixture and z: it acts on each source alike.
        pulled = pulled * torch.where(mixed != 0, z / mixed, 0.0)
    return torch.einsum("bhs,bshk,bhk->bhs", pattern, values, pulled)


def _uncapped(reading: Reading, target: Resolved, normed: torch.Tensor) -> torch.Tensor:
    """[batch], the target's value before the soft cap."""

    def logit(ids: list[int]) -> torch.Tensor:
        rows = reading.unembedding.weight[ids].float()
        bias = getattr(reading.unembedding, "bias", None)
        plain = torch.einsum("bd,bd->b", normed.float(), rows)
        return (plain if bias is None else plain + bias[ids].float()) * reading.logit_scale

    value = logit([ids[0] for ids in target.ids])
    return value if target.minus is None else value - logit(target.minus)
