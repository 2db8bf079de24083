"""Attribution by gradients with respect to the input embeddings, image features merged in.

The embeddings enter as a leaf at `lm.hook_embed`; nothing else of the model requires a gradient, and nothing stays on
it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

TOLERANCE = 0.005
"""The completeness error at which an integration of automatic length ends, as a share of F(x) - F(baseline)."""
MOST_STEPS = 1024
"""The longest integration of automatic length."""

Evaluate = Callable[[torch.Tensor], torch.Tensor]
"""Embeddings [batch, seq, hidden] to the target's value [batch] float32, differentiable."""


def gradient_x_input(evaluate: Evaluate, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient times the embedding, summed over the width (Shrikumar et al. 2016).

    Args:
        evaluate: The model from its embeddings on.
        embeddings: [batch, seq, hidden].
    """
    gradient, value = _gradient(evaluate, embeddings)
    scores = (gradient.float() * embeddings.float()).sum(-1)
    return {"scores": scores, "total": scores.sum(1), "target_value": value}


@dataclass(frozen=True)
class Integration:
    """How an integration goes.

    Attributes:
        steps: Its length; 0 to double it until the error is below `TOLERANCE`.
        on_step: Called with steps done and, as far as known, in all.
    """

    steps: int = 0
    on_step: Callable[[int, int], None] = lambda done, total: None


def integrated_gradients(
    evaluate: Evaluate, embeddings: torch.Tensor, baseline: torch.Tensor, integration: Integration
) -> dict[str, torch.Tensor]:
    """The gradient averaged on the straight way from the baseline, times the distance (Sundararajan et al. 2017).

    The average is by Gauss-Legendre quadrature, which is exact for polynomials of degree 2 * steps - 1.

    Args:
        evaluate: The model from its embeddings on.
        embeddings: [batch, seq, hidden].
        baseline: [batch, seq, hidden].
        integration: How long, and whom to tell.
    """
    value = evaluate(embeddings).detach()
    start = evaluate(baseline).detach()
    distance = (embeddings - baseline).float()
    steps = integration.steps or 16
    while True:
        scores = _integral(evaluate, baseline, distance, steps, integration.on_step)
        error = (value - start - scores.sum(1)).abs()
        close = (error <= TOLERANCE * (value - start).abs()).all()
        if integration.steps or close or steps >= MOST_STEPS:
            break
        steps *= 2
    return {
        "scores": scores,
        "total": scores.sum(1) + start,
        "target_value": value,
        "baseline_value": start,
        "steps": torch.full((len(value),), steps, dtype=torch.int64),
    }


def _integral(
    evaluate: Evaluate,
    baseline: torch.Tensor,
    distance: torch.Tensor,
    steps: int,
    on_step: Callable[[int, int], None],
) -> torch.Tensor:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(distance)
    for done, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
        point = (baseline.float() + (node + 1) / 2 * distance).to(baseline.dtype)
        gradient, _ = _gradient(evaluate, point)
        total += weight / 2 * gradient.float()
        on_step(done + 1, steps)
    return (total * distance).sum(-1)


def _gradient(evaluate: Evaluate, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = point.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        value = evaluate(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient, value.detach()
