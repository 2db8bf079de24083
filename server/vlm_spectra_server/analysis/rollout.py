"""Attention rollout: how far each position reaches the target's through all layers (Abnar and Zuidema 2020).

A layer's pattern is the mean over its heads; the residual stream is half of what a layer passes on, so a layer mixes
by (pattern + identity) / 2. The product over the layers says how much of each position is in the last one. Nothing but
the patterns is read: values, MLPs and the vision tower are left out.
"""

from __future__ import annotations

import torch
from vlm_spectra.errors import NotSupportedError

from ..hooked.run import Capture
from .subject import Subject
from .targets import Resolved


def patterns(subject: Subject) -> list[str]:
    """The pattern of every layer.

    Raises:
        NotSupportedError: A layer has none.
    """
    names = [f"lm.blocks.{block.index}.attn.hook_pattern" for block in subject.reading.blocks]
    missing = [name for name in names if name not in subject.catalogue.by_name]
    if missing:
        raise NotSupportedError(
            f"not every layer of this model has an attention pattern ({missing[0]} does not exist); "
            "methods of gradients, such as integrated_gradients, work.",
            field="method",
        )
    return names


def attribute(subject: Subject, target: Resolved) -> dict[str, torch.Tensor]:
    """The scores of every position, which sum to 1; for an answer, the mean over its tokens.

    Args:
        subject: The batch.
        target: The target.
    """
    names = patterns(subject)
    rolled: torch.Tensor | None = None
    done = 0

    def take(name: str, pattern: torch.Tensor) -> None:
        nonlocal rolled, done
        mixing = pattern.float().mean(1)
        mixing = mixing + torch.eye(mixing.shape[-1], device=mixing.device)
        mixing = mixing / mixing.sum(-1, keepdim=True)
        rolled = mixing if rolled is None else mixing @ rolled
        done += 1
        subject.step(done, len(names))

    run = subject.run(captures={name: [Capture(name)] for name in names}, sink=take)
    value = target.value(subject.logits(run))
    assert rolled is not None
    rows = torch.arange(len(target.columns), device=rolled.device)[:, None]
    scores = rolled[rows, torch.tensor(target.columns, device=rolled.device)].mean(1)
    return {"scores": scores, "total": scores.sum(1), "target_value": value}
