"""The logit lens: what each layer would answer (nostalgebraist 2020), read through the model's own final norm and
unembedding, so that the last layer's reading is the model's answer.

Shapes: L layers, b rows, p positions, k most probable tokens, t targets.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import arrays
from .arrays import Array
from .inputs import Inputs

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The readings of all chosen layers and positions.

    Attributes:
        hook: The stream that was read, `hook_resid_post` by default.
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

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a layer, batch row, position and rank: its token, logit and probability, entropy and KL.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        probs, logits = arrays.to_numpy(self.probs), arrays.to_numpy(self.logits)
        ids, entropy = arrays.to_numpy(self.token_ids), arrays.to_numpy(self.entropy)
        kl = arrays.to_numpy(self.kl_to_final)
        records = [
            {
                "layer": layer,
                "row": row,
                "position": position,
                "label": self.inputs.token_labels[row][position],
                "rank": k,
                "token_id": int(ids[i, row, j, k]),
                "token": self.tokens[i][row][j][k],
                "logit": float(logits[i, row, j, k]),
                "prob": float(probs[i, row, j, k]),
                "entropy": float(entropy[i, row, j]),
                "kl_to_final": float(kl[i, row, j]),
            }
            for i, layer in enumerate(self.layers)
            for row, columns in enumerate(self.positions)
            for j, position in enumerate(columns)
            for k in range(ids.shape[-1])
        ]
        return pandas.DataFrame.from_records(records)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The lens as one self-contained page: images with their token grid, and a table of layers by tokens.

        Args:
            path: Where to write it, whole or not at all; None to write nothing.

        Returns:
            The page's HTML.
        """
        from .pages import lens_page, write_page

        page = lens_page(self)
        if path is not None:
            write_page(path, page)
        return page

    def _repr_html_(self) -> str:
        from .pages import lens_section

        return lens_section(self)
