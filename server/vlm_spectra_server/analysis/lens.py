"""The logit lens: any residual vector through the model's own final norm and unembedding.

Positions are read in blocks, all layers of a block at once, so that the final layer's distribution is there to compare
with and the unembedding is multiplied once. A block's logits over the whole vocabulary are all that memory holds beside
the results, never [layers, seq, vocab]; what is computed from them goes through the vocabulary in slices that fit a
processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vlm_spectra.analyses import LensOptions

from ..hooked.delivery import TensorSpec
from ..hooked.reading import Reading
from .targets import token_id

BLOCK_BYTES = 128 << 20
"""Of a block's float32 logits, at most, as long as one position of all layers fits."""
SLICE = 8192
"""Tokens of the vocabulary looked at together."""


class Block:
    """The logits of some vectors, and what they say.

    Args:
        logits: [layers, positions, vocab] float32.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.slices = logits.split(SLICE, dim=-1)
        self.log_total, self.entropy = self._spread()

    def _spread(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp and entropy in nats, [layers, positions]."""
        peak = self.logits.amax(-1, keepdim=True)
        mass = moment = torch.zeros((), device=peak.device)
        for part in self.slices:
            shifted = part - peak
            weights = shifted.exp()
            mass, moment = mass + weights.sum(-1), moment + torch.linalg.vecdot(weights, shifted)
        return peak[..., 0] + mass.log(), mass.log() - moment / mass

    def ranks(self, values: torch.Tensor) -> torch.Tensor:
        """How many tokens have a higher logit, [layers, positions, t] int64.

        Args:
            values: [layers, positions, t].
        """
        ranks = torch.zeros(values.shape, dtype=torch.long, device=values.device)
        for t in range(values.shape[-1]):
            for part in self.slices:
                ranks[..., t] += (part > values[..., t, None]).sum(-1)
        return ranks

    def divergence(self, final: int) -> torch.Tensor:
        """KL(one layer || every layer) in nats, [layers, positions].

        Args:
            final: The number of that one layer.
        """
        total = torch.zeros_like(self.log_total)
        for part in self.slices:
            reference = part[final]
            probs = (reference - self.log_total[final, :, None]).exp()
            total += torch.linalg.vecdot(probs, reference - part)
        return (total + self.log_total - self.log_total[final]).clamp_min(0)


def specs(options: LensOptions, batch: int, count: int) -> list[TensorSpec]:
    """The tensors of `LogitLensResponse`, of so many rows and positions; known before anything runs.

    Args:
        options: What to read.
        batch: Rows.
        count: Positions of each.
    """
    layers, targets = len(options.layers), len(options.targets) or 1
    places = (layers, batch, count)
    return [
        TensorSpec("token_ids", "int64", (*places, options.top_k)),
        TensorSpec("logits", "float32", (*places, options.top_k)),
        TensorSpec("probs", "float32", (*places, options.top_k)),
        TensorSpec("entropy", "float32", places),
        TensorSpec("kl_to_final", "float32", places),
        TensorSpec("target_ids", "int64", (batch, count, targets)),
        TensorSpec("target_logits", "float32", (*places, targets)),
        TensorSpec("target_probs", "float32", (*places, targets)),
        TensorSpec("target_ranks", "int64", (*places, targets)),
        TensorSpec("layers", "int64", (layers,)),
        TensorSpec("positions", "int64", (batch, count)),
    ]


def read(
    reading: Reading,
    tokenizer: Any,
    options: LensOptions,
    streams: Sequence[torch.Tensor],
    final: torch.Tensor,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, torch.Tensor]:
    """The lens of captured streams.

    Args:
        reading: The model.
        tokenizer: Its tokenizer.
        options: What to read.
        streams: [batch, positions, hidden], one a layer of `options`.
        final: [batch, positions, hidden], the last block's output: what the model answers from.
        on_step: Called with positions done and in all.

    Returns:
        The tensors of `LogitLensResponse`, on the host, without `layers` and `positions`.
    """
    batch, count, width = final.shape
    asked = len(streams)
    place = next((i for i, stream in enumerate(streams) if stream is final), asked)
    vectors = [stream.reshape(-1, width) for stream in (streams if place < asked else [*streams, final])]
    total = batch * count
    size = max(1, BLOCK_BYTES // (4 * reading.vocab * len(vectors)))
    named = [token_id(tokenizer, target, reading.vocab) for target in options.targets]
    # Results go into tensors of their own at once: small ones that outlive a block would keep its memory in pieces.
    kept: dict[str, torch.Tensor] = {}
    for start in range(0, total, size):
        stack = torch.stack([each[start : start + size] for each in vectors])
        block = Block(reading.logits(reading.final_norm(stack)).float())
        values, ids = block.logits.topk(options.top_k, dim=-1)
        if named:
            targets = torch.tensor(named, device=ids.device).expand(ids.shape[1], -1)
        else:
            targets = block.logits[place].argmax(-1, keepdim=True)
        found = block.logits.gather(-1, targets.expand(len(vectors), -1, -1))
        log_total = block.log_total[..., None]
        results = {
            "token_ids": ids,
            "logits": values,
            "probs": (values - log_total).exp(),
            "entropy": block.entropy,
            "kl_to_final": block.divergence(place),
            "target_ids": targets[None],
            "target_logits": found,
            "target_probs": (found - log_total).exp(),
            "target_ranks": block.ranks(found),
        }
        for name, value in results.items():
            value = value[:asked]
            if not start:
                kept[name] = torch.empty(len(value), total, *value.shape[2:], dtype=value.dtype)
            kept[name][:, start : start + size] = value
        del block, results
        on_step(min(start + size, total), total)
    tensors = {name: value.view(len(value), batch, count, *value.shape[2:]) for name, value in kept.items()}
    return {**tensors, "target_ids": tensors["target_ids"][0]}
