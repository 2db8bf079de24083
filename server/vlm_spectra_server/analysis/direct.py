"""Direct logit attribution: the residual stream's parts along a target's direction.

At the target's position the final residual stream is the embedding plus what every head and every MLP wrote (plus
biases). With the final norm's scale held at this run's value the logit is linear in the stream, so it is the sum of the
parts' own logits (Elhage et al. 2021). A head's output is a mixture of what it read from each position: the pattern
splits it over them exactly.
"""

from __future__ import annotations

import torch

from ..hooked.reading import Reading
from .targets import Resolved


def hooks(reading: Reading) -> list[str]:
    """What a run must capture: all at the target's position but `hook_v`, which is of every position."""
    blocks = [f"lm.blocks.{block.index}" for block in reading.blocks]
    return [
        "lm.hook_embed",
        *(f"{block}.{hook}" for block in blocks for hook in ("attn.hook_v", "attn.hook_pattern")),
        *(f"{block}.{hook}" for block in blocks for hook in ("attn.hook_z", "hook_mlp_out")),
        "lm.ln_final.hook_scale",
    ]


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
    direction = target.direction(reading) / scale
    along = "bd,bd->b"
    embed = torch.einsum(along, captured["lm.hook_embed"][:, 0].float(), direction)
    heads, mlps, sources, bias = [], [], [], target.bias(reading)
    for block in reading.blocks:
        prefix = f"lm.blocks.{block.index}"
        weights = reading.head_weights(block).float()
        pulled = torch.einsum("bd,dhk->bhk", direction, weights)
        z = captured[f"{prefix}.attn.hook_z"][:, 0].float()
        head = torch.einsum("bhk,bhk->bh", z, pulled)
        if block.o.bias is not None:
            bias = bias + direction @ block.o.bias.float()
        values = captured[f"{prefix}.attn.hook_v"].float().repeat_interleave(reading.heads // reading.kv_heads, dim=2)
        pattern = captured[f"{prefix}.attn.hook_pattern"][:, :, 0].float()
        sources.append(torch.einsum("bhs,bshk,bhk->bhs", pattern, values, pulled))
        heads.append(head)
        mlps.append(torch.einsum(along, captured[f"{prefix}.hook_mlp_out"][:, 0].float(), direction))
    head_scores, mlp_scores = torch.stack(heads, 1), torch.stack(mlps, 1)
    source_scores = torch.stack(sources, 1)
    scores = source_scores.sum((1, 2))
    rows = torch.arange(len(scores), device=scores.device)
    scores[rows, torch.tensor(target.columns, device=scores.device)] += embed
    total = embed + head_scores.sum((1, 2)) + mlp_scores.sum(1) + bias
    tensors = {
        "scores": scores,
        "target_value": value,
        "total": total,
        "embed": embed,
        "bias": bias,
        "heads": head_scores,
        "mlps": mlp_scores,
        "sources": source_scores,
    }
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}
