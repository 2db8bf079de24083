"""Pictures of results: attention and attribution over an image, heatmaps, a logit lens as a table.

    vs.pictures.attention(cache, inputs, layer=3, head="all")       # small multiples, one for each head
    vs.pictures.attribution(why)                                    # vermillion for the target, blue against it
    vs.pictures.heatmap(values, rows=layers, columns=tokens)        # patching, or whatever else is a matrix
    vs.pictures.lens(lens)                                          # a lens for a paper

Each gives a `Figure`: it shows itself in a notebook (pointing at a patch tells its value), `.save("figure.png")` or
`.save("figure.html")` writes it, `.to_image()` is a PIL image. Images keep their proportions, every figure has its
scale beside it, and no text becomes markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np

from . import arrays
from .arrays import Array
from .attribution import Attribution
from .cache import ActivationCache
from .errors import InvalidInputError
from .figure import Figure, Heatmap, Overlay, Scale, Values
from .inputs import ImageLayout, Inputs, layout_number
from .lens import LogitLens
from .lens_page import SHADES, column_names, layer_name
from .markup import visible
from .panes import Patch, panes, pixels
from .spatial import Box
from .sweep import PatchSweep


def overlay(
    inputs: Inputs,
    scores: Array,
    image: int = 0,
    *,
    label: str = "score",
    title: str = "",
    signed: bool | None = None,
    peak: float | None = None,
) -> Figure:
    """Scores of image tokens laid over their image.

    Args:
        inputs: What was asked.
        scores: [seq] one for each position of the image's row, or [grid_h, grid_w].
        image: The number of the image, over all rows of the batch.
        label: What is measured.
        title: What stands above it.
        signed: Whether scores speak for and against; None to see whether any is negative.
        peak: The value of full colour; None for the largest there is.

    Raises:
        InvalidInputError: There is no such image, or the scores do not fit it.
    """
    values = _by_position(arrays.to_numpy(scores).astype(np.float64), layout_number(inputs.images, image))
    return _figure(_overlays(inputs, image, values), label, signed, peak, title)


def attention(
    cache: ActivationCache,
    inputs: Inputs,
    layer: int | None = None,
    head: int | str = "mean",
    position: int = -1,
    image: int = 0,
    *,
    peak: float | None = None,
) -> Figure:
    """What a token reads from an image: its row of the attention pattern, over the image.

    Args:
        cache: Holds `lm.blocks.*.attn.hook_pattern` of the layers wanted.
        inputs: What was asked.
        layer: The layer; None for every layer the cache holds, a panel each.
        head: A head; "mean" over all the cache holds; "all" for a panel each.
        position: The reading token: a position of the sequence, negative from its end.
        image: The number of the image, over all rows of the batch.
        peak: The share of full colour; None for the largest there is. All panels have one scale.

    Raises:
        InvalidInputError: There is no such image, head or position in the cache.
        UnknownHookError: The cache holds no pattern of that layer.
    """
    layout, context = layout_number(inputs.images, image), cache.context
    names = cache._matching(f"lm.blocks.{'*' if layer is None else layer}.attn.hook_pattern")
    kept = None if context.positions is None else context.positions[layout.row]
    shares: list[tuple[str, Values]] = []
    for name in names:
        pattern = arrays.to_numpy(cache[name])
        pattern = pattern[None] if pattern.ndim == 3 else pattern
        query = _query(pattern.shape, kept, position)
        rows = pattern[layout.row, :, query].astype(np.float64)
        heads = context.heads or list(range(len(rows)))
        where = f"layer {name.split('.')[2]}"
        if head == "mean":
            shares.append((f"{where}, mean of {len(rows)} heads", rows.mean(0)))
        elif head == "all":
            shares += [(f"{where}, head {h}", row) for h, row in zip(heads, rows, strict=True)]
        elif isinstance(head, int) and head in heads:
            shares.append((f"{where}, head {head}", rows[heads.index(head)]))
        else:
            raise InvalidInputError(
                f"head is {head!r}; the cache holds heads {', '.join(map(str, heads))}, or take 'mean' or 'all'.",
                field="head",
            )
    panels = [
        replace(panel, title=f"{title}{panel.title and f', {panel.title}'}: {panel.values.sum():.0%}")
        for title, row in shares
        for panel in _overlays(inputs, image, row)
    ]
    labels = context.token_labels or inputs.token_labels
    last = kept[-1] if kept and position == -1 else position
    word = visible(labels[layout.row][last])
    per_line = len(panels) // len(names) if head == "all" and layer is None else None
    return _figure(panels, "share of the attention", False, peak, f"What “{word}” reads of the image", per_line)


def attribution(result: Attribution, image: int = 0, *, peak: float | None = None) -> Figure:
    """An attribution over an image: vermillion speaks for the target, blue against it.

    Args:
        result: From `model.attribute`.
        image: The number of the image, over all rows of the batch.
        peak: The score of full colour; None for the largest there is.

    Raises:
        InvalidInputError: There is no such image.
    """
    layout = layout_number(result.inputs.images, image)
    scores = arrays.to_numpy(result.scores)[layout.row].astype(np.float64)
    title = f"What “{visible(result.target_tokens[layout.row])}” comes from"
    return _figure(_overlays(result.inputs, image, scores), result.method.replace("_", " "), None, peak, title)


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
    matrix = np.asarray(arrays.to_numpy(values), dtype=np.float64)
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
    scale = _scale(matrix, label, signed, peak, "amount")
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
    if not 0 <= row < len(result.positions):
        raise InvalidInputError(f"there is no row {row}: the lens has {len(result.positions)}.", field="row")
    if by not in SHADES:
        raise InvalidInputError(f"by is {by!r}; possible are {', '.join(SHADES)}.", field="by")
    there = result.positions[row]
    length = len(result.inputs.token_labels[row])
    chosen = list(range(max(0, len(there) - 12), len(there)))
    if positions is not None:
        wanted = [p % length if p < 0 else p for p in positions]
        missing = [p for p in wanted if p not in there]
        if missing or not wanted:
            raise InvalidInputError(f"the lens has no position {missing}; it has {there}.", field="positions")
        chosen = [there.index(p) for p in wanted]
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


def attribution_html(result: Attribution) -> str:
    """An attribution in a notebook: its figures, and an overlay of every image."""
    value, total = arrays.to_numpy(result.target_value), arrays.to_numpy(result.total)
    lines = "".join(
        f"<div>“{escape(visible(token))}”: {float(value[row]):.4f}, all parts {float(total[row]):.4f}</div>"
        for row, token in enumerate(result.target_tokens)
    )
    pictures = "".join(attribution(result, image).to_html() for image in range(len(result.inputs.images)))
    return f"<div><b>Attribution</b> by {escape(result.method)}{lines}</div>{pictures}"


def _by_position(scores: Values, layout: ImageLayout) -> Values:
    """Scores given for the sequence or on the image's grid, by sequence position; NaN where there are none."""
    last = max((token.position for token in layout.tokens()), default=-1)
    if scores.ndim == 1 and len(scores) > last:
        return scores
    if scores.shape == layout.grid:
        found = np.full(last + 1, np.nan)
        for position, score in zip(layout.raster, scores.flat, strict=True):
            if position >= 0:
                found[position] = score
        return found
    raise InvalidInputError(
        f"scores are [seq], or [{layout.grid[0]}, {layout.grid[1]}] over the image's tokens, not {list(scores.shape)}.",
        field="scores",
    )


def _overlays(inputs: Inputs, image: int, values: Values) -> list[Overlay]:
    """A panel for each pane of an image that has values. What looks at the same pixels is added up."""
    made, picture = [], pixels(inputs, image)
    for pane in panes(inputs.images[image]):
        there: dict[Box, list[Patch]] = {}
        for patch in pane.patches:
            if not np.isnan(values[patch.position]):
                there.setdefault(patch.box, []).append(patch)
        if there:
            sums = np.array([sum(float(values[p.position]) for p in patches) for patches in there.values()])
            made.append(Overlay(picture, tuple(there), sums, tuple(map(_patch_name, there.values())), pane.name))
    return made


def _patch_name(patches: list[Patch]) -> str:
    if len(patches) > 1:
        return f"{len(patches)} tokens together"
    return f"row {patches[0].row}, column {patches[0].column}"


def _figure(
    panels: Sequence[Overlay],
    label: str,
    signed: bool | None,
    peak: float | None,
    title: str,
    columns: int | None = None,
) -> Figure:
    values = np.concatenate([panel.values for panel in panels]) if panels else np.zeros(1)
    return Figure(tuple(panels), _scale(values, label, signed, peak, "heat"), title, columns)


def _scale(values: Values, label: str, signed: bool | None, peak: float | None, colours: str) -> Scale:
    if peak is not None and not peak > 0:
        raise InvalidInputError(f"peak is {peak}; it is the value of full colour, above 0.", field="peak")
    finite = values[np.isfinite(values)]
    signed = bool((finite < 0).any()) if signed is None else signed
    high = peak if peak is not None else float(np.abs(finite).max(initial=0.0)) or 1.0
    return Scale(-high if signed else 0.0, high, label, colours)


def _query(shape: tuple[int, ...], kept: list[int] | None, position: int) -> int:
    """The index on a pattern's query axis that a position has."""
    if kept is None:
        count, keys = shape[2], shape[3]
        if not -keys <= position < keys or count != keys:
            raise InvalidInputError(f"position {position} is out of range: the run has {keys}.", field="position")
        return position % keys
    if position == -1:
        return len(kept) - 1
    wanted = position % shape[3] if position < 0 else position
    if wanted not in kept:
        raise InvalidInputError(f"the cache has no position {position}; it kept {kept}.", field="position")
    return kept.index(wanted)
