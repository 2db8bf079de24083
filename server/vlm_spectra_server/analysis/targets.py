"""Tokens and targets: texts to ids, and a target's value and direction in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vlm_spectra.calls import Target, TokenLike
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.positions import Layout

from ..hooked.reading import Reading


def token_id(tokenizer: Any, token: TokenLike, vocab: int) -> int:
    """The id of a token given by its id or its text; a word may be named without the space before it.

    Raises:
        InvalidInputError: The id is beyond the vocabulary, or the text is not exactly one token.
    """
    if isinstance(token, int):
        if not 0 <= token < vocab:
            raise InvalidInputError(f"token {token} is out of range: the vocabulary has {vocab}.", field="target")
        return token
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 and token.strip() and not token.startswith(" "):
        # Inside a sentence most vocabularies have a word together with the space before it.
        spaced = tokenizer.encode(f" {token}", add_special_tokens=False)
        ids = spaced if len(spaced) == 1 else ids
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
        raise InvalidInputError(
            f"{token!r} is {len(ids)} tokens ({pieces}); name exactly one, by its text or its id.", field="target"
        )
    return int(ids[0])


@dataclass(frozen=True)
class Resolved:
    """A target in a batch.

    Attributes:
        ids: [batch][n] the tokens: one, or all of an answer.
        minus: [batch] the tokens whose logits are subtracted, or None.
        columns: [batch][n] the positions that predict them.
        answer: Whether the value is the log-probability of the tokens, one after the other, and not a logit.
    """

    ids: list[list[int]]
    minus: list[int] | None
    columns: list[list[int]]
    answer: bool = False

    def value(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch] float32.

        Args:
            logits: [batch, n, vocab] at the target's positions.
        """
        logits = logits.float()
        ids = torch.tensor(self.ids, device=logits.device)[..., None]
        if self.answer:
            return logits.log_softmax(-1).gather(-1, ids).sum((1, 2))
        value = logits.gather(-1, ids)[:, 0, 0]
        if self.minus is not None:
            rows = torch.arange(len(self.minus), device=logits.device)
            value = value - logits[rows, 0, torch.tensor(self.minus, device=logits.device)]
        return value

    def copies(self, count: int) -> Resolved:
        """The target of a batch of so many copies of this batch."""
        minus = None if self.minus is None else self.minus * count
        return Resolved(self.ids * count, minus, self.columns * count, self.answer)

    def direction(self, reading: Reading) -> torch.Tensor:
        """[batch, hidden] float32: the residual direction, the final norm's weight folded in."""
        direction = reading.folded_unembedding([ids[0] for ids in self.ids])
        return direction if self.minus is None else direction - reading.folded_unembedding(self.minus)

    def bias(self, reading: Reading) -> torch.Tensor:
        """[batch] float32: the unembedding's bias."""
        bias = reading.unembedding_bias([ids[0] for ids in self.ids])
        return bias if self.minus is None else bias - reading.unembedding_bias(self.minus)


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """The tokens of an answer.

    Raises:
        InvalidInputError: It has none.
    """
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if not ids:
        raise InvalidInputError("the answer to explain has no token.", field="target")
    return [int(token) for token in ids]


def target_columns(layout: Layout, target: Target, count: int = 1) -> list[list[int]]:
    """[batch][count] the positions that predict the target's tokens; by default the last of each row.

    Args:
        layout: The prompt.
        target: The target.
        count: How many tokens it has; all but the first stand behind the prompt.
    """
    first = layout.rectangle(["last"] if target.position is None else [target.position])[:, 0]
    return [[int(column) + step for step in range(count)] for column in first]


def resolve(
    reading: Reading, tokenizer: Any, target: Target, columns: Sequence[Sequence[int]], logits: torch.Tensor
) -> Resolved:
    """A target with its tokens known; a target without a token is each row's most probable one.

    Args:
        reading: The model.
        tokenizer: Its tokenizer.
        target: The target.
        columns: [batch][n] the positions that predict it.
        logits: [batch, n, vocab] there.
    """
    places = [list(row) for row in columns]
    if target.answer is not None:
        return Resolved([answer_ids(tokenizer, target.answer)] * len(places), None, places, answer=True)
    if target.token is None:
        ids = logits[:, 0].argmax(-1).tolist()
    else:
        ids = [token_id(tokenizer, target.token, reading.vocab)] * len(logits)
    minus = None if target.minus is None else [token_id(tokenizer, target.minus, reading.vocab)] * len(logits)
    return Resolved([[token] for token in ids], minus, places)
