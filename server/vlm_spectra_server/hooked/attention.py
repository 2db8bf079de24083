"""Attention that can be looked into: a function of our own in transformers' registry, always active.

Without a run it calls the implementation the model was loaded with and does nothing else. With one it also computes
scores and pattern from the very queries, keys, mask and scaling that the model used; where an intervention changed
them, the rows of the output that differ are computed from the changed pattern, and no other number moves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .reading import Block, Reading
from .run import Capture, Run, current_run, select
from .selection import Columns

PREFIX = "spectra_"
SLICE_BYTES = 4 << 20
"""Scores that a CPU works on at a time: few enough to stay in its cache until they are a pattern."""


class Site:
    """The hook names of one attention module, kept on the module.

    Args:
        prefix: Their beginning, `lm.blocks.3.attn`.
        values: Whether values are seen here, where no projection of their own gives them.
    """

    def __init__(self, prefix: str, values: bool) -> None:
        self.v = f"{prefix}.hook_v" if values else ""
        self.rot_q, self.rot_k = f"{prefix}.hook_rot_q", f"{prefix}.hook_rot_k"
        self.mask, self.scores, self.pattern = f"{prefix}.hook_mask", f"{prefix}.hook_scores", f"{prefix}.hook_pattern"


def watch(reading: Reading, block: Block, prefix: str) -> None:
    """Let a block's attention be looked into.

    Args:
        reading: The model.
        block: A block that attends.
        prefix: The hook names' beginning, `lm.blocks.3.attn`.
    """
    # The decoder makes the mask and the module chooses the implementation, each by a configuration of its own.
    for config in (reading.config, reading.decoder.config, getattr(block.attn, "config", reading.config)):
        name = config._attn_implementation or "eager"
        if not name.startswith(PREFIX):
            _register(name)
            config._attn_implementation = PREFIX + name
    block.attn._spectra_site = Site(prefix, block.v is None)  # type: ignore[assignment]


def plain_name(name: str) -> str:
    """The name of an attention implementation without ours around it."""
    return (name or "eager").removeprefix(PREFIX)


def _register(name: str) -> None:
    AttentionInterface.register(PREFIX + name, partial(attend, name))
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _implementation(name: str, module: nn.Module) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type, no-any-return]


def attend(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in the registry's form.

    Args:
        name: The implementation the model was loaded with.
        module: The attention module.
        query: [batch, heads, query, head_dim], after rotary position embedding.
        key: [batch, kv_heads, key, head_dim].
        value: [batch, kv_heads, key, head_dim].
        attention_mask: None, boolean, additive, or [batch, key], as the implementation has it.

    Returns:
        [batch, query, heads, head_dim], and the implementation's own weights, if any.
    """
    run = current_run()
    site: Site | None = getattr(module, "_spectra_site", None)
    inner = _implementation(name, module)
    if run is None or site is None:
        return inner(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    first = run.start + query.shape[2] - key.shape[2]  # the sequence position of the first key
    if run.wants(site.rot_q):
        query = run.reach(site.rot_q, query.transpose(1, 2), 2).transpose(1, 2)
    if run.wants(site.rot_k):
        key = run.reach(site.rot_k, key.transpose(1, 2), 2, start=first).transpose(1, 2)
    if run.wants(site.v):
        value = run.reach(site.v, value.transpose(1, 2), 2, start=first).transpose(1, 2)
    out, weights = inner(module, query, key, value, attention_mask, **kwargs)
    if run.wants(site.mask, site.scores, site.pattern):
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(run.edits or run.gradients)):
            out = _look(run, site, module, query, key, value, attention_mask, kwargs, out)
    return out, weights


def _look(
    run: Run,
    site: Site,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    out: torch.Tensor,
) -> torch.Tensor:
    """Keep scores and pattern, and carry out what interventions do to them."""
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5

    def scores_of(queries: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        scores = grouped_scores(queries, keys)
        cap, fixed = kwargs.get("softcap"), rows.to(scores.dtype)
        if scores.requires_grad:
            scores = scores * scaling
            return (scores if cap is None else torch.tanh(scores / cap) * cap) + fixed
        scores.mul_(scaling)  # in place: these are the largest tensors there are
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        return scores.add_(fixed)

    edited = any(name in run.edits for name in (site.mask, site.scores, site.pattern))
    traced = run.traces(site.scores, site.pattern)
    if not edited and not traced:
        made: dict[object, torch.Tensor] = {}

        def rows_of(capture: Capture) -> Callable[[Columns | None], torch.Tensor]:
            """Gives the scores of query rows, for the heads that a capture asks for."""
            keys, chosen = key, None
            if capture.heads is not None:
                chosen = torch.tensor(capture.heads, device=query.device)
                keys = key.index_select(1, chosen // (query.shape[1] // key.shape[1]))

            def of_rows(columns: Columns | None) -> torch.Tensor:
                queries = query if columns is None else columns.take(query, 2)
                rows = additive_mask(module, query, key, attention_mask, kwargs, columns)
                if chosen is not None:
                    queries = queries.index_select(1, chosen)
                    rows = rows if rows.shape[1] == 1 else rows.index_select(1, chosen)
                return scores_of(queries, rows, keys)

            return of_rows

        def scores_part(capture: Capture) -> torch.Tensor:
            scores = made[_selected(capture)] = rows_of(capture)(capture.columns)
            return scores

        def pattern_part(capture: Capture) -> torch.Tensor:
            scores = made.get(_selected(capture))
            if scores is not None:
                return softmax(scores)
            heads, of_rows = query.shape[1] if capture.heads is None else len(capture.heads), rows_of(capture)
            return _slice_by_slice(
                lambda columns: softmax(of_rows(columns)), capture.columns, query, heads, key.shape[2]
            )

        run.keep(site.scores, scores_part)
        run.keep(site.pattern, pattern_part)
        return out

    def reach(name: str, tensor: torch.Tensor) -> torch.Tensor:
        run.keep(name, lambda capture: select(tensor, capture, 2, 1))
        return run.trace(name, tensor, lambda gradient, capture: select(gradient, capture, 2, 1))

    mask = additive_mask(module, query, key, attention_mask, kwargs)
    scores = reach(site.scores, run.edited(site.scores, scores_of(query, run.edited(site.mask, mask), key)))
    pattern = reach(site.pattern, run.edited(site.pattern, softmax(scores)))
    mixed = mix(pattern, value).transpose(1, 2)
    if torch.is_grad_enabled():  # the implementation's own values, and a gradient that goes through the pattern
        out = out.detach() + (mixed - mixed.detach())
    if not edited:
        return out
    with torch.no_grad():
        before = softmax(scores_of(query, mask, key))
        differs = (pattern != before).any(-1).transpose(1, 2)[..., None]
    return torch.where(differs, mixed, out)


def _selected(capture: Capture) -> object:
    """What part of an activation a capture asks for; equal where scores and pattern are asked for together."""
    return capture.columns, heads_of(capture)


def heads_of(capture: Capture) -> tuple[int, ...] | None:
    """The heads that a capture asks for; None for all."""
    return None if capture.heads is None else tuple(capture.heads)


def _slice_by_slice(
    of_rows: Callable[[Columns | None], torch.Tensor],
    columns: Columns | None,
    query: torch.Tensor,
    heads: int,
    keys: int,
) -> torch.Tensor:
    """What a function makes of query rows, [batch, heads, rows, keys]; on a CPU of a few at a time."""
    batch, count = len(query), query.shape[2] if columns is None else columns.count
    step = max(1, SLICE_BYTES // (batch * heads * keys * query.element_size()))
    if query.device.type != "cpu" or step >= count:
        return of_rows(columns)
    every = np.arange(count)[None] if columns is None else columns.array
    whole = query.new_empty(batch, heads, count, keys)
    for start in range(0, count, step):
        whole[:, :, start : start + step] = of_rows(Columns(every[:, start : start + step]))
    return whole


def additive_mask(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    columns: Columns | None = None,
) -> torch.Tensor:
    """Whatever mask an implementation was given, as [batch or 1, heads or 1, query, key] float32: 0, -inf or a bias.

    A lowest finite value counts as -inf: after it no probability is left in float32, and none should be in float16.

    Args:
        module: The attention module.
        query: Its queries.
        key: Its keys.
        mask: The mask as it came.
        kwargs: What else the implementation was told.
        columns: The query rows to give; None for all.
    """

    def chosen(rows: torch.Tensor) -> torch.Tensor:
        return rows if columns is None else columns.take(rows.expand(len(query), -1, -1, -1), 2)

    queries, keys = query.shape[2], key.shape[2]
    if mask is not None and mask.dim() == 4:
        mask = chosen(mask[..., :keys])
        if mask.dtype == torch.bool:
            return _additive(mask)
        return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    column = torch.arange(keys, device=query.device)
    row = chosen(torch.arange(keys - queries, keys, device=query.device)[None, None, :, None])
    allowed = column <= row if causal else torch.ones_like(row, dtype=torch.bool).expand(-1, -1, -1, keys)
    if kwargs.get("sliding_window") is not None:
        allowed = allowed & (row - column < kwargs["sliding_window"])
    if mask is not None:  # [batch, key], as flash attention has it
        allowed = allowed & mask[:, None, None, -keys:].bool()
    return _additive(allowed)


def _additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)


def grouped_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query . key for every head, [batch, heads, query, key], without repeating keys for grouped heads."""
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, width)
    return (grouped @ key.transpose(2, 3)).view(batch, heads, rows, key.shape[2])


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last axis, in float32, back in the scores' type; zeros where every score is -inf."""
    nothing = scores.amax(-1, keepdim=True) == -torch.inf
    if scores.requires_grad:  # the gradient of a row of -inf is 0, not NaN
        pattern = scores.masked_fill(nothing, 0.0).softmax(-1, dtype=torch.float32)
        return pattern.masked_fill(nothing, 0.0).to(scores.dtype)
    pattern = scores.softmax(-1, dtype=torch.float32)
    if scores.device.type != "cpu" or nothing.any():  # a GPU fills sooner than it answers
        pattern.masked_fill_(nothing, 0.0)
    return pattern.to(scores.dtype)


def mix(pattern: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Values mixed by a pattern: [batch, heads, query, head_dim]."""
    batch, heads, rows, keys = pattern.shape
    kv_heads = value.shape[1]
    grouped = pattern.reshape(batch, kv_heads, heads // kv_heads * rows, keys)
    return (grouped @ value).view(batch, heads, rows, value.shape[-1])
