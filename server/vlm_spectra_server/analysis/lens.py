"""The logit lens: any residual vector through the model's own final norm and unembedding.

The vocabulary is read in chunks, and rows in blocks, so that memory holds neither [layers, seq, vocab] nor one row
block of all of it: the running top-k, log-sum-exp, entropy and ranks are all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vlm_spectra.base import LensOptions

from ..hooked.reading import Reading
from .targets import token_id

ROWS = 2048
"""Vectors read at a time."""
VOCABULARY = 16_384
"""Tokens read at a time; with `ROWS` 128 MiB of float32 logits."""


class Reader:
    """Reads residual vectors as distributions over tokens.

    Args:
        reading: The model.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def normalize(self, vectors: torch.Tensor) -> torch.Tensor:
        """Through the final norm, in the model's type: [n, hidden]."""
        return self.reading.final_norm(vectors)  # type: ignore[no-any-return]

    def _chunks(self, normed: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits [n, chunk] float32 with the id of their first token, the vocabulary in order."""
        weight, bias = self.reading.unembedding.weight, getattr(self.reading.unembedding, "bias", None)
        for start in range(0, self.reading.vocab, VOCABULARY):
            stop = min(start + VOCABULARY, self.reading.vocab)
            part = None if bias is None else bias[start:stop]
            yield start, torch.nn.functional.linear(normed, weight[start:stop], part).float()

    def distribution(
        self, normed: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k most probable tokens and the shape of the rest.

        Args:
            normed: [n, hidden] after the final norm.
            k: How many tokens.

        Returns:
            ids [n, k], logits [n, k], log-sum-exp [n], entropy [n] in nats; float32.
        """
        n, device = len(normed), normed.device
        best = torch.full((n, k), -torch.inf, device=device)
        ids = torch.zeros(n, k, dtype=torch.long, device=device)
        peak = torch.full((n,), -torch.inf, device=device)
        mass, moment = torch.zeros(n, device=device), torch.zeros(n, device=device)
        for start, logits in self._chunks(normed):
            values, indices = logits.topk(min(k, logits.shape[1]), dim=1)
            best, order = torch.cat([best, values], 1).topk(k, dim=1)
            ids = torch.cat([ids, indices + start], 1).gather(1, order)
            top = torch.maximum(peak, values[:, 0])
            shrink = torch.where(peak == -torch.inf, 0.0, (peak - top).exp())
            # mass = sum exp(l - top); moment = sum exp(l - top) (l - top), moved along as `top` grows.
            moment = shrink * (moment + mass * torch.where(peak == -torch.inf, 0.0, peak - top))
            mass = shrink * mass
            shifted = logits - top[:, None]
            weights = shifted.exp()
            mass, moment, peak = mass + weights.sum(1), moment + (weights * shifted).sum(1), top
        return ids, best, peak + mass.log(), mass.log() - moment / mass

    def follow(self, normed: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Given tokens' logits and ranks.

        Args:
            normed: [n, hidden] after the final norm.
            targets: [n, t] ids.

        Returns:
            logits [n, t] float32, and ranks [n, t]: how many tokens have a higher logit.
        """
        logits = torch.empty(targets.shape, device=normed.device)
        for start, chunk in self._chunks(normed):
            here = (targets >= start) & (targets < start + chunk.shape[1])
            found = chunk.gather(1, (targets - start).clamp(0, chunk.shape[1] - 1))
            logits = torch.where(here, found, logits)
        ranks = torch.zeros(targets.shape, dtype=torch.long, device=normed.device)
        for _, chunk in self._chunks(normed):
            for t in range(targets.shape[1]):
                ranks[:, t] += (chunk > logits[:, t : t + 1]).sum(1)
        return logits, ranks

    def divergence(
        self, final: torch.Tensor, final_lse: torch.Tensor, normed: torch.Tensor, lse: torch.Tensor
    ) -> torch.Tensor:
        """KL(final || these) [n] in nats, from vectors after the final norm and their log-sum-exps."""
        total = torch.zeros(len(normed), device=normed.device)
        for (_, reference), (_, chunk) in zip(self._chunks(final), self._chunks(normed), strict=True):
            log_p = reference - final_lse[:, None]
            total += (log_p.exp() * (log_p - (chunk - lse[:, None]))).sum(1)
        return total.clamp_min(0)


def read(
    reading: Reading,
    tokenizer: Any,
    options: LensOptions,
    streams: dict[int, torch.Tensor],
    final: torch.Tensor,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, torch.Tensor]:
    """The lens of captured streams.

    Args:
        reading: The model.
        tokenizer: Its tokenizer.
        options: What to read.
        streams: [batch, positions, hidden] by layer.
        final: [batch, positions, hidden], the last block's output: what the model answers from.
        on_step: Called with layers done and in all.

    Returns:
        The tensors of `LogitLensResponse`, on the host, without `positions`.
    """
    reader = Reader(reading)
    batch, count, width = final.shape
    ends = reader.normalize(final).reshape(-1, width)
    # The stream itself is what the norm is made for; the parts that blocks add are read through the same norm.
    answers = _blocked(ends, lambda rows: reader.distribution(rows, 1))
    answer_ids, answer_lse = answers[0], answers[2]
    if options.targets:
        named = [token_id(tokenizer, target, reading.vocab) for target in options.targets]
        targets = torch.tensor(named, device=final.device).expand(batch * count, -1)
    else:
        targets = answer_ids
    results: dict[str, list[torch.Tensor]] = {}
    for done, layer in enumerate(options.layers):
        normed = reader.normalize(streams[layer]).reshape(-1, width)
        ids, logits, lse, entropy = _blocked(normed, lambda rows: reader.distribution(rows, options.top_k))
        found, ranks = _blocked(torch.arange(len(normed), device=normed.device), _following(reader, normed, targets))
        kl = _blocked(
            torch.arange(len(normed), device=normed.device),
            _diverging(reader, ends, answer_lse, normed, lse),
        )[0]
        for name, value in (
            ("token_ids", ids),
            ("logits", logits),
            ("probs", (logits - lse[:, None]).exp()),
            ("entropy", entropy),
            ("kl_to_final", kl),
            ("target_logits", found),
            ("target_probs", (found - lse[:, None]).exp()),
            ("target_ranks", ranks),
        ):
            results.setdefault(name, []).append(value.view(batch, count, *value.shape[1:]).cpu())
        on_step(done + 1, len(options.layers))
    tensors = {name: torch.stack(values) for name, values in results.items()}
    tensors["target_ids"] = targets.reshape(batch, count, -1).cpu().contiguous()
    return tensors


def _following(reader: Reader, normed: torch.Tensor, targets: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    return lambda rows: reader.follow(normed[rows], targets[rows])


def _diverging(
    reader: Reader, final: torch.Tensor, final_lse: torch.Tensor, normed: torch.Tensor, lse: torch.Tensor
) -> Callable[[torch.Tensor], Any]:
    return lambda rows: (reader.divergence(final[rows], final_lse[rows], normed[rows], lse[rows]),)


def _blocked(rows: torch.Tensor, function: Callable[[torch.Tensor], Any]) -> tuple[torch.Tensor, ...]:
    """A function of rows, block by block, the results joined."""
    parts = [function(block) for block in rows.split(ROWS)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))
