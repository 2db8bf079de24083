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
    if len(ids) != 1 and not token.startswith(" "):
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
        ids: [batch] the tokens.
        minus: [batch] the tokens whose logits are subtracted, or None.
        columns: [batch] the positions that predict them.
    """

    ids: list[int]
    minus: list[int] | None
    columns: list[int]

    def value(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch] float32.

        Args:
            logits: [batch, vocab] at the target's positions.
        """
        rows = torch.arange(len(self.ids), device=logits.device)
        value = logits[rows, torch.tensor(self.ids, device=logits.device)].float()
        if self.minus is not None:
            value = value - logits[rows, torch.tensor(self.minus, device=logits.device)].float()
        return value

    def direction(self, reading: Reading) -> torch.Tensor:
        """[batch, hidden] float32: the residual direction, the final norm's weight folded in."""
        direction = reading.folded_unembedding(self.ids)
        return direction if self.minus is None else direction - reading.folded_unembedding(self.minus)

    def bias(self, reading: Reading) -> torch.Tensor:
        """[batch] float32: the unembedding's bias."""
        bias = reading.unembedding_bias(self.ids)
        return bias if self.minus is None else bias - reading.unembedding_bias(self.minus)


def target_columns(layout: Layout, position: int | None) -> list[int]:
    """[batch] the position that predicts the target; the last of each row by default."""
    items = ["last"] if position is None else [position]
    return [int(column) for column in layout.rectangle(items)[:, 0]]


def resolve(reading: Reading, tokenizer: Any, target: Target, columns: Sequence[int], logits: torch.Tensor) -> Resolved:
    """A target with its tokens known; a target without a token is each row's most probable one.

    Args:
        reading: The model.
        tokenizer: Its tokenizer.
        target: The target.
        columns: [batch] the positions that predict it.
        logits: [batch, vocab] there.
    """
    if target.token is None:
        ids = logits.argmax(-1).tolist()
    else:
        ids = [token_id(tokenizer, target.token, reading.vocab)] * len(logits)
    minus = None if target.minus is None else [token_id(tokenizer, target.minus, reading.vocab)] * len(logits)
    return Resolved(ids, minus, list(columns))
