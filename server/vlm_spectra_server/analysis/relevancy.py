"""Relevancy: attention weighted by its gradient, through the language model and the vision tower (Chefer et al. 2021).

In every layer a head's pattern times the target's gradient with respect to it, its positive part, averaged over heads,
says what the layer moved for the target: R <- R + relevance R, from the identity. The target's row of R is the
relevancy of the positions. That of an image token is handed on to the patches of the vision tower in the proportions of
the tower's own R (rows divided by their sums), so an image keeps its sum; a token's score is that of its own patches.
"""

from __future__ import annotations

import torch

from ..hooked.run import Capture
from .rollout import patterns
from .subject import Subject
from .targets import Resolved
from .tower import TokensOfPatches


def attribute(subject: Subject, target: Resolved) -> dict[str, torch.Tensor]:
    """The scores of every position; for an answer, the mean over its tokens.

    Args:
        subject: The batch.
        target: The target.
    """
    names = patterns(subject)
    tower = TokensOfPatches.of(subject)
    seen = [] if tower is None else tower.patterns()
    kept: dict[str, torch.Tensor] = {}
    rows, seq = subject.tensors["input_ids"].shape
    device = subject.reading.device
    found = torch.zeros(rows, seq, device=device)
    for row, columns in enumerate(target.columns):
        found[row, columns] = 1 / len(columns)
    through: torch.Tensor | None = None
    done = 0

    def take(name: str, part: torch.Tensor) -> None:
        # A backward pass comes to the last layer first, so R is built from its left end.
        nonlocal found, through, done
        if not name.endswith("_grad"):
            kept[name] = part
            return
        hook = name.removesuffix("_grad")
        relevance = (kept.pop(hook).float() * part.float()).clamp_min(0).mean(1)
        if hook.startswith("vision."):
            if through is None:
                through = torch.eye(relevance.shape[-1], device=relevance.device).expand(relevance.shape)
            through = through + through @ relevance
        else:
            found = found + (found[:, None] @ relevance.to(found.device))[:, 0]
        done += 1
        subject.step(done, len(names) + len(seen))

    captures = {name: [Capture(name)] for name in names}
    gradients = {name: [Capture(f"{name}_grad")] for name in names}
    if tower is not None:
        captures, gradients = captures | tower.captures(seen), gradients | tower.captures(seen, "_grad")
    value = subject.backward(subject.run(captures=captures, gradients=gradients, sink=take), target)
    scores = found if tower is None or through is None else tower.handed_on(found, through)
    return {"scores": scores, "total": scores.sum(1), "target_value": value}
