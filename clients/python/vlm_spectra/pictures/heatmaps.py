"""Matrices: patching over layers and positions, a logit lens as a table, whatever else has rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import arrays, scalars
from ..arrays import Array
from ..calls import choose
from ..errors import InvalidInputError, shown
from ..lens import LogitLens
from ..sweep import PatchSweep
from .figure import Figure, Heatmap, Scale, numbers
from .lens_page import SHADES, column_names, layer_name
from .markup import visible


def heatmap(
    values: Array,
    rows: Sequence[Any] | None = None,
    columns: Sequence[Any] | None = None,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    label: str = "",
    title: str = "",
    across: str = "",
    down: str = "",
    signed: bool | None = None,
    peak: float | None = None,
) -> Figure:
    """A matrix as a heatmap: activation patching over layers and positions, scores of heads, a pattern.

    Args:
        values: [rows, columns].
        rows: Their names; numbers where None.
        columns: Their names, for example token labels; numbers where None.
        texts: What stands in each cell.
        label: What is measured.
        title: What stands above it.
        across: What the columns are.
        down: What the rows are.
        signed: Whether values have two directions; None to see whether any is negative.
        peak: The value of full colour; None for the largest there is.

    Raises:
        InvalidInputError: The values are no matrix, or the names do not fit them.
    """
    matrix = numbers(values, "values")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InvalidInputError(f"a heatmap has values [rows, columns], not {list(matrix.shape)}.", field="values")
    named = []
    for field_name, given, count in (("rows", rows, matrix.shape[0]), ("columns", columns, matrix.shape[1])):
        names = tuple(visible(str(name)) for name in (range(count) if given is None else given))
        if len(names) != count:
            raise InvalidInputError(f"there are {len(names)} names for {count} {field_name}.", field=field_name)
        named.append(names)
    cells = None if texts is None else tuple(tuple(visible(text) for text in line) for line in texts)
    if cells is not None and (len(cells) != matrix.shape[0] or any(len(line) != matrix.shape[1] for line in cells)):
        raise InvalidInputError("the texts of a heatmap have the shape of its values.", field="texts")
    panel = Heatmap(matrix, named[0], named[1], cells, "", across, down)
    scale = Scale.over(matrix, label, signed, peak, "amount")
    return Figure((panel,), replace(scale, colours="signed") if scale.signed else scale, title)


def patching(sweep: PatchSweep, *, peak: float | None = 1.0) -> Figure:
    """A sweep of activation patching: hooks, the last layer on top, by positions or heads.

    Args:
        sweep: From `model.patch_sweep`.
        peak: The share of full colour; 1 is the whole way. None for the largest there is.
    """
    names = [name.split(".") for name in reversed(sweep.hooks)]
    kinds = {".".join(name[3:]) for name in names}
    rows = [f"layer {name[2]}" if len(kinds) == 1 and len(name) > 3 else ".".join(name) for name in names]
    single, target = kinds.pop() if len(kinds) == 1 else "", " ".join(visible(token) for token in sweep.target_tokens)
    return heatmap(
        arrays.to_numpy(sweep.normalized)[::-1],
        rows,
        sweep.labels,
        label=f"share of the way of “{target}” from {sweep.start:.3g} to {sweep.goal:.3g}",
        title=f"Activation patching, {sweep.mode}{f': {single}' if single else ''}",
        across=sweep.axis,
        signed=True,
        peak=peak,
    )


def lens(result: LogitLens, row: int = 0, positions: Sequence[int] | None = None, *, by: str = "probability") -> Figure:
    """A logit lens as a table: layers, the last on top, by tokens, each cell with its most probable token.

    Args:
        result: From `model.logit_lens`.
        row: The batch row.
        positions: Which of the lens's positions, negative from the end; None for the last 12.
        by: What the colours say: "probability", "entropy" or "kl" (to the final layer).

    Raises:
        InvalidInputError: There is no such row or position, or `by` is another.
    """
    row = scalars.index(row, "row", len(result.positions))
    choose("by", by, tuple(SHADES))
    there = result.positions[row]
    length = len(result.inputs.token_labels[row])
    chosen = list(range(max(0, len(there) - 12), len(there)))
    if positions is not None:
        given = scalars.each(positions)
        wanted = [p % length if p is not None and p < 0 else p for p in map(scalars.whole, given)]
        missing = [name for name, p in zip(given, wanted, strict=True) if p not in there]
        if missing or not wanted:
            raise InvalidInputError(
                f"the lens has no position {shown(missing)}; it has {shown(there)}.", field="positions"
            )
        chosen = [there.index(p) for p in wanted if p is not None]
    order = list(reversed(range(len(result.layers))))
    sources = {"probability": result.probs, "entropy": result.entropy, "kl": result.kl_to_final}
    values = arrays.to_numpy(sources[by])[:, row].astype(np.float64)
    values = (values[..., 0] if by == "probability" else values)[order][:, chosen]
    texts = [[result.tokens[i][row][j][0] for j in chosen] for i in order]
    labels = {
        "probability": "probability of the top token",
        "entropy": "entropy, nats",
        "kl": "KL to the final layer, nats",
    }
    columns = column_names(result.inputs, row, [there[j] for j in chosen])
    layers = [layer_name(result.layers[i]) for i in order]
    top = 1.0 if by == "probability" else None
    figure = heatmap(
        np.nan_to_num(values), layers, columns, texts=texts, label=labels[by], signed=False, peak=top,
        title="What each layer would answer", across="token", down="layer",
    )  # fmt: skip
    return replace(figure, scale=replace(figure.scale, colours=SHADES[by]))
