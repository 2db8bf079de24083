"""Attribution by gradients with respect to the input: embeddings with image features merged in, or pixels.

The inputs enter as leaves; nothing else of the model requires a gradient, and nothing stays on it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TOLERANCE = 0.005
"""The completeness error at which an integration of automatic length ends, as a share of F(x) - F(baseline)."""
MOST_STEPS = 1024
"""The longest integration of automatic length."""

Evaluate = Callable[..., torch.Tensor]
"""The inputs, one argument each, to the target's value [batch] float32, differentiable."""


def gradient_x_input(evaluate: Evaluate, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient times the embedding, summed over the width (Shrikumar et al. 2016).

    Args:
        evaluate: The model from its embeddings on.
        embeddings: [batch, seq, hidden].
    """
    (gradient,), value = _gradients(evaluate, [embeddings])
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


@dataclass(frozen=True)
class Way:
    """The straight way of one input from a baseline.

    Attributes:
        start: The baseline.
        end: The input, of the same shape.
        score: Puts what was integrated, of the same shape too, into scores [batch, seq].
    """

    start: torch.Tensor
    end: torch.Tensor
    score: Callable[[torch.Tensor], torch.Tensor]

    def at(self, share: float) -> torch.Tensor:
        """A point on the way: 0 is the baseline."""
        return (self.start.float() + share * self.distance).to(self.start.dtype)

    @property
    def distance(self) -> torch.Tensor:
        """From the baseline to the input, float32."""
        return self.end.float() - self.start.float()


def integrated_gradients(evaluate: Evaluate, ways: Sequence[Way], integration: Integration) -> dict[str, torch.Tensor]:
    """The gradient averaged on the straight way from the baseline, times the distance (Sundararajan et al. 2017).

    The average is by Gauss-Legendre quadrature, which is exact for polynomials of degree 2 * steps - 1.

    Args:
        evaluate: The model as a function of the ways' points.
        ways: The inputs, which go together.
        integration: How long, and whom to tell.
    """
    value = evaluate(*[way.end for way in ways]).detach()
    start = evaluate(*[way.start for way in ways]).detach()
    steps = integration.steps or 16
    while True:
        scores = _integral(evaluate, ways, steps, integration.on_step)
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


def _integral(evaluate: Evaluate, ways: Sequence[Way], steps: int, on_step: Callable[[int, int], None]) -> torch.Tensor:
    nodes, weights = gauss_legendre(steps)
    totals = [torch.zeros_like(way.distance) for way in ways]
    for done, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
        gradients, _ = _gradients(evaluate, [way.at((node + 1) / 2) for way in ways])
        for total, gradient in zip(totals, gradients, strict=True):
            total += weight / 2 * gradient.float()
        on_step(done + 1, steps)
    return torch.stack([way.score(total * way.distance) for way, total in zip(ways, totals, strict=True)]).sum(0)


def gauss_legendre(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1], by Newton's method; numpy's way takes steps cubed, and cannot be ended."""
    nodes = np.cos(np.pi * (np.arange(steps, 0, -1) - 0.25) / (steps + 0.5))
    slope = nodes
    for _ in range(6):  # the number of right digits doubles each time
        before, value = np.zeros(steps), np.ones(steps)
        for degree in range(steps):
            before, value = value, ((2 * degree + 1) * nodes * value - degree * before) / (degree + 1)
        slope = steps * (nodes * value - before) / (nodes**2 - 1)
        nodes = nodes - value / slope
    return nodes, 2 / ((1 - nodes**2) * slope**2)


def _gradients(evaluate: Evaluate, points: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    leaves = [point.detach().clone().requires_grad_(True) for point in points]
    with torch.enable_grad():
        value = evaluate(*leaves)
        gradients = torch.autograd.grad(value.sum(), leaves)
    return gradients, value.detach()
