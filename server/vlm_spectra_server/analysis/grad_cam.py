"""Grad-CAM on the vision tower: feature maps weighted by their gradients (Selvaraju et al. 2017).

The maps are the residual stream after the tower's last block that the target depends on, one a channel. A channel's
weight is the target's mean gradient over the patches; the positive part of the weighted sum is a patch's score, and a
token has the sum over its patches.
"""

from __future__ import annotations

import torch

from .subject import Subject
from .targets import Resolved
from .tower import TokensOfPatches


def attribute(subject: Subject, target: Resolved) -> dict[str, torch.Tensor]:
    """The scores of image tokens; other tokens have 0.

    Args:
        subject: The batch, which has images.
        target: The target.
    """
    tower = TokensOfPatches.required(subject)
    names = tower.streams()
    kept: dict[str, torch.Tensor] = {}
    maps: torch.Tensor | None = None

    def take(name: str, part: torch.Tensor) -> None:
        # The first gradient that a backward pass comes to is that of the last block.
        nonlocal maps
        if not name.endswith("_grad"):
            kept[name] = part
        elif maps is None and bool(part.any()):
            weight = tower.mean(part.float())[:, None]
            maps = (weight * kept[name.removesuffix("_grad")].float()).sum(-1).clamp_min(0)

    run = subject.run(captures=tower.captures(names), gradients=tower.captures(names, "_grad"), sink=take)
    value = subject.backward(run, target)
    rows, seq = subject.tensors["input_ids"].shape
    scores = torch.zeros(rows, seq, device=value.device) if maps is None else tower.by_token(maps)
    return {"scores": scores, "total": scores.sum(1), "target_value": value}
