"""Values over an image: what a token attends to, what an attribution found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np

from .. import arrays, scalars
from ..arrays import Array
from ..attribution import Attribution
from ..cache import ActivationCache
from ..context import CacheContext
from ..errors import InvalidInputError
from ..inputs import ImageLayout, Inputs, layout_number
from ..spatial import Box
from .figure import Figure, Overlay, Scale, Values, numbers
from .markup import visible
from .panes import Patch, numbered, panes, pixels


def overlay(
    inputs: Inputs,
    scores: Array,
    image: int | None = None,
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
        image: The number of one image, over all rows of the batch; None for all of the first image's row.
        label: What is measured.
        title: What stands above it.
        signed: Whether scores speak for and against; None to see whether any is negative.
        peak: The value of full colour; None for the largest there is.

    Raises:
        InvalidInputError: There is no such image, or the scores do not fit it.
    """
    given, first = numbers(scores, "scores"), layout_number(inputs.images, image or 0)
    if given.ndim > 1:  # over one image's grid
        image = image or 0
    return _figure(_overlays(inputs, image, _by_position(given, first)), label, signed, peak, title)


def attention(
    cache: ActivationCache,
    inputs: Inputs,
    layer: int | None = None,
    head: int | str = "mean",
    position: int = -1,
    image: int | None = None,
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
        image: The number of one image, over all rows of the batch; None for all of the first image's row.
        peak: The share of full colour; None for the largest there is. All panels have one scale.

    Raises:
        InvalidInputError: There is no such image, head or position in the cache.
        UnknownHookError: The cache holds no pattern of that layer.
    """
    layout, context = layout_number(inputs.images, image or 0), cache.context
    if context.reduce == "norm":
        raise InvalidInputError("this cache holds norms (reduce='norm'), and no pattern.", field="cache")
    names = cache._matching(f"lm.blocks.{'*' if layer is None else layer}.attn.hook_pattern")
    kept = None if context.positions is None else context.positions[layout.row]
    shares: list[tuple[str, Values]] = []
    for name in names:
        pattern = arrays.to_numpy(cache[name])
        pattern = pattern if context.has_batch_dim else pattern[None]
        pattern = pattern if context.reduce is None else pattern[:, None]
        if layout.row >= len(pattern):
            raise InvalidInputError(
                f"image {image or 0} is of row {layout.row}, and this cache has {len(pattern)}.", field="image"
            )
        query = _query(pattern.shape, kept, position)
        rows = pattern[layout.row, :, query].astype(np.float64)
        where = f"layer {name.split('.')[2]}"
        shares += [(f"{where}, {label}", row) for label, row in _by_head(rows, head, context)]
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


def _by_head(rows: Values, head: Any, context: CacheContext) -> list[tuple[str, Values]]:
    """The heads asked for, of [heads, keys]: of one row where the cache holds their mean."""
    averaged = context.reduce == "mean_heads"
    every = context.info.heads if averaged and context.info else len(rows)
    heads = context.heads or list(range(every))
    if head == "mean":
        return [(f"mean of {len(heads)} heads", rows.mean(0))]
    if averaged:
        raise InvalidInputError(
            f"head is {head!r}, and this cache holds the mean over the heads; take 'mean', or capture without "
            "reduce='mean_heads'.",
            field="head",
        )
    if head == "all":
        return [(f"head {each}", row) for each, row in zip(heads, rows, strict=True)]
    number = scalars.whole(head)
    if number not in heads:
        raise InvalidInputError(
            f"head is {head!r}; the cache holds heads {', '.join(map(str, heads))}, or take 'mean' or 'all'.",
            field="head",
        )
    return [(f"head {number}", rows[heads.index(number)])]


def attribution(result: Attribution, image: int | None = None, *, peak: float | None = None) -> Figure:
    """An attribution over an image: vermillion speaks for the target, blue against it.

    Args:
        result: From `model.attribute`.
        image: The number of one image, over all rows of the batch; None for all of the first image's row.
        peak: The score of full colour; None for the largest there is.

    Raises:
        InvalidInputError: There is no such image.
    """
    layout = layout_number(result.inputs.images, image or 0)
    scores = arrays.to_numpy(result.scores)[layout.row].astype(np.float64)
    title = f"What “{visible(result.target_tokens[layout.row])}” comes from"
    return _figure(_overlays(result.inputs, image, scores), result.method.replace("_", " "), None, peak, title)


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


def _overlays(inputs: Inputs, image: int | None, values: Values) -> list[Overlay]:
    """A panel for each pane of the images that has values. What looks at the same pixels is added up."""
    first = layout_number(inputs.images, image or 0)
    mine = numbered(inputs, first.row) if image is None else [(image, first)]
    made = []
    for count, (number, layout) in enumerate(mine, 1):
        picture = pixels(inputs, number)
        for pane in panes(layout):
            there: dict[Box, list[Patch]] = {}
            for patch in pane.patches:
                if not np.isnan(values[patch.position]):
                    there.setdefault(patch.box, []).append(patch)
            if there:
                sums = np.array([sum(float(values[p.position]) for p in patches) for patches in there.values()])
                title = ", ".join(name for name in (f"image {count}" if len(mine) > 1 else "", pane.name) if name)
                made.append(Overlay(picture, tuple(there), sums, tuple(map(_patch_name, there.values())), title))
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
    return Figure(tuple(panels), Scale.over(values, label, signed, peak, "heat"), title, columns)


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
