"""The logit lens: what each layer would answer (nostalgebraist 2020), read through the model's own final norm and
unembedding, so that the last layer's reading is the model's answer.

Shapes: L layers, b rows, p positions, k most probable tokens, t targets.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arrays, tables
from .arrays import Array
from .calls import choose
from .cost import Cost
from .inputs import Inputs

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The readings of all chosen layers and positions.

    Attributes:
        hook: What was read in each layer, `hook_resid_post` by default.
        inputs: What was asked.
        layers: The L layers.
        positions: [b][p] the sequence positions.
        token_ids: [L, b, p, k] int64, most probable first.
        tokens: [L][b][p][k] their texts.
        logits: [L, b, p, k] float32.
        probs: [L, b, p, k] float32, softmax in float32 over the whole vocabulary.
        entropy: [L, b, p] float32, in nats.
        kl_to_final: [L, b, p] float32, KL(final layer || this layer) in nats.
        target_ids: [b, p, t] int64; where no targets were given, the model's own answer at each position.
        target_logits: [L, b, p, t] float32.
        target_probs: [L, b, p, t] float32.
        ranks: [L, b, p, t] int64, how many tokens have a higher logit than the target; 0 is the most probable.
        cost: What the call took on the server; None in process.
    """

    hook: str
    inputs: Inputs = field(repr=False)
    layers: list[int]
    positions: list[list[int]] = field(repr=False)
    token_ids: Array = field(repr=False)
    tokens: list[Any] = field(repr=False)
    logits: Array = field(repr=False)
    probs: Array = field(repr=False)
    entropy: Array = field(repr=False)
    kl_to_final: Array = field(repr=False)
    target_ids: Array = field(repr=False)
    target_tokens: list[Any] = field(repr=False)
    target_logits: Array = field(repr=False)
    target_probs: Array = field(repr=False)
    ranks: Array = field(repr=False)
    cost: Cost | None = field(default=None, repr=False)

    def to_dataframe(self, of: str = "tokens") -> pandas.DataFrame:
        """The readings as a table.

        Args:
            of: "tokens": a row a layer, batch row, position and place among the most probable, `rank` from 0; or
                "targets": a row a layer, batch row, position and target, `rank` its rank among all tokens.

        Returns:
            Columns layer, row, position, label (the token at the position), rank, token_id, token, logit, prob,
            entropy, kl_to_final.

        Raises:
            InvalidInputError: `of` is neither.
            MissingExtraError: pandas is not installed.
        """
        choose("of", of, ("tokens", "targets"))
        table = tables.pandas().DataFrame
        logits = arrays.to_numpy(self.logits if of == "tokens" else self.target_logits)
        shape = logits.shape
        layer, row, position, k = (np.asarray(each).reshape(-1) for each in np.indices(shape))
        if of == "tokens":
            ids, probs, ranks = arrays.to_numpy(self.token_ids), arrays.to_numpy(self.probs), np.asarray(k)
            texts = [text for rows in self.tokens for places in rows for chosen in places for text in chosen]
        else:
            ids = np.broadcast_to(arrays.to_numpy(self.target_ids), shape)
            probs, ranks = arrays.to_numpy(self.target_probs), arrays.to_numpy(self.ranks).reshape(-1)
            texts = [text for places in self.target_tokens for chosen in places for text in chosen] * shape[0]
        columns = np.asarray(self.positions)[row, position]
        frame: pandas.DataFrame = table(
            {
                "layer": np.asarray(self.layers)[layer],
                "row": row,
                "position": columns,
                "label": [self.inputs.token_labels[r][c] for r, c in zip(row, columns, strict=True)],
                "rank": ranks,
                "token_id": ids.reshape(-1),
                "token": texts,
                "logit": logits.reshape(-1),
                "prob": probs.reshape(-1),
                "entropy": arrays.to_numpy(self.entropy)[layer, row, position],
                "kl_to_final": arrays.to_numpy(self.kl_to_final)[layer, row, position],
            }
        )
        return frame

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The lens as one self-contained page: images with their token grid, and a table of layers by tokens.

        Args:
            path: Where to write it, whole or not at all; None to write nothing.

        Returns:
            The page's HTML.
        """
        from .pictures.lens_page import lens_page
        from .pictures.markup import write_page

        page = lens_page(self)
        if path is not None:
            write_page(path, page)
        return page

    def _repr_html_(self) -> str:
        from .pictures.lens_page import lens_section

        return lens_section(self)
