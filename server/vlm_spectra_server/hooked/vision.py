"""The hooks of the vision tower: what there is, where it is reached, and how it is changed.

The tower's modules are wrapped as the decoder's are. At each hook the activation is turned from the tower's own order
into views with their patches in raster order (see `views`), and back after an intervention.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from vlm_spectra.dtypes import name_of
from vlm_spectra.errors import InvalidInputError, NotSupportedError
from vlm_spectra.hooks import HookSpec
from vlm_spectra.positions import Layout

from .attention import PREFIX, _implementation, additive_mask, grouped_scores, heads_of, softmax
from .edits import AnyEdit, make_edit
from .run import Capture, Run, current_run
from .tower import Tower, TowerBlock
from .views import Places, SeenLayout

OUT = "vision.hook_out"
STREAM = ("views", "patches", "vision_hidden")
HEADS = ("views", "patches", "vision_heads", "vision_head_dim")
KV_HEADS = ("views", "patches", "vision_kv_heads", "vision_head_dim")
PATTERN = ("views", "vision_heads", "patches", "patches")

_BLOCK: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("hook_resid_pre", STREAM, "the tower's residual stream that enters the block"),
    ("attn.hook_q", HEADS, "queries, before any norm or rotary position embedding"),
    ("attn.hook_k", KV_HEADS, "keys, before any norm or rotary position embedding"),
    ("attn.hook_v", KV_HEADS, "values"),
    ("attn.hook_scores", PATTERN, "what enters the softmax: scaled; -inf where a patch may not read another"),
    ("attn.hook_pattern", PATTERN, "what leaves the softmax; each row sums to 1, and is 0 outside a patch's window"),
    ("attn.hook_z", HEADS, "values mixed by the pattern, before the output projection"),
    ("attn.hook_out", STREAM, "attention's output"),
    ("hook_attn_out", STREAM, "exactly what attention adds to the residual stream"),
    ("hook_resid_mid", STREAM, "the residual stream between attention and MLP"),
    ("mlp.hook_out", STREAM, "the MLP's output"),
    ("hook_mlp_out", STREAM, "exactly what the MLP adds to the residual stream"),
    ("hook_resid_post", STREAM, "the residual stream that leaves the block"),
)


def specs(reading: Any) -> list[HookSpec]:
    """The vision hooks of a model; of a tower that cannot be read, only what enters the language model."""
    tower: Tower | None = reading.vision
    out = HookSpec(
        OUT,
        ("images", "image_tokens", "hidden"),
        name_of(reading.dtype),
        "what enters the language model",
    )
    if getattr(reading.config, "cross_attention_layers", None):
        return []  # images enter through attention, not through tokens
    if tower is None:
        return [out]
    dtype, layers = name_of(tower.dtype), tuple(range(len(tower.blocks)))
    tail = "; the class token stands behind the patches" if any(tower.specials) else ""
    found = [HookSpec("vision.hook_embed", STREAM, dtype, f"the patches as they enter the tower's first block{tail}")]
    for name, shape, description in _BLOCK:
        if shape == PATTERN and not tower.watchable:
            continue
        if name in ("attn.hook_q", "attn.hook_k", "attn.hook_v") and not tower.blocks[0].projections:
            continue
        found.append(HookSpec(f"vision.blocks.{{layer}}.{name}", shape, dtype, description, layers))
    return [*found, out]


# What a request means


def is_vision(spec: HookSpec) -> bool:
    """Whether a hook is one of the vision tower's."""
    return spec.name.startswith("vision.")


def places(layout: Layout, spec: HookSpec) -> Places | None:
    """Where the rows of a vision hook stand in the activation; None for another hook.

    Raises:
        InvalidInputError: There is no image.
        NotSupportedError: The inputs have a form in which the order of patches is not known.
    """
    if not is_vision(spec):
        return None
    assert isinstance(layout, SeenLayout)
    if not layout.pictures:
        raise InvalidInputError(
            f"{spec.name} needs an image, and the prompt has none; give one, or ask for hooks of lm.* alone.",
            field="hooks",
        )
    found = layout.tokens_of_images if spec.name.removesuffix("_grad") == OUT else layout.patches
    if found is None:
        raise NotSupportedError(f"{spec.name} is not possible: the order of patches in these inputs is not known.")
    return found


def extents(layout: Layout, spec: HookSpec) -> dict[str, int]:
    """The extents of a vision hook's own axes for prepared inputs; none for another hook."""
    found = places(layout, spec)
    if found is None:
        return {}
    count, length = found.index.shape
    if "images" in spec.shape:
        return {"images": count, "image_tokens": length}
    assert isinstance(layout, SeenLayout)
    assert layout.tower is not None
    tower = layout.tower
    return {
        "views": count,
        "patches": length,
        "vision_hidden": tower.hidden,
        "vision_heads": tower.heads,
        "vision_kv_heads": tower.kv_heads,
        "vision_head_dim": tower.head_dim,
    }


class _RowsSpec(HookSpec):
    """A vision hook whose patches are its positions, for the interventions' own arithmetic."""

    @property
    def position_axis(self) -> int | None:
        """The axis of patches; of patterns that of those which read."""
        return 2 if self.shape == PATTERN else 1


class VisionEdit:
    """An intervention at a vision hook, for one run: on views with their patches in raster order.

    Args:
        edit: What it does.
        where: Where the patches stand in the activation.
    """

    def __init__(self, edit: AnyEdit, where: Places) -> None:
        self.edit, self.places = edit, where

    def __call__(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        """The changed activation."""
        return self.edit(tensor, 0)


def make_vision_edit(action: Any, name: str, spec: HookSpec, layout: Layout, sizes: dict[str, int]) -> AnyEdit:
    """The edit that carries an intervention out at a hook, of the vision tower or not."""
    where = places(layout, spec)
    if where is None:
        return make_edit(action, name, spec, layout, sizes)
    rows = _RowsSpec(spec.name, spec.shape, spec.dtype, spec.description, spec.layers)
    own = Layout(where.valid, np.zeros_like(where.valid))
    return VisionEdit(make_edit(action, name, rows, own, sizes | extents(layout, spec)), where)


# The hook points

Around = Callable[..., Any]


def install(tower: Tower | None) -> None:
    """Put the hook points on a vision tower."""
    if tower is None:
        return
    if tower.watchable:
        _watch(tower)
    for block in tower.blocks:
        _install_block(tower, block)


def _wrap(module: nn.Module, around: Around) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = current_run()
        return inner(*args, **kwargs) if run is None else around(run, inner, *args, **kwargs)

    module.forward = forward


def _install_block(tower: Tower, block: TowerBlock) -> None:
    prefix, width = f"vision.blocks.{block.index}", (tower.hidden,)
    heads, kv_heads = (tower.heads, tower.head_dim), (tower.kv_heads, tower.head_dim)
    _wrap(block.layer, _around_block(prefix, width, block.index == 0))
    names = [f"{prefix}.attn.hook_{each}" for each in "qkv"]
    if len(block.projections) == 1:
        _wrap(block.projections[0], _around_fused(names, heads))
    for name, module, shape in zip(names, block.projections, (heads, kv_heads, kv_heads), strict=False):
        if len(block.projections) == 3:
            _wrap(module, _around_projection(name, shape))
    _wrap(block.o, _around_input(f"{prefix}.attn.hook_z", heads))
    gain = block.attn_gain
    out = f"{prefix}.attn.hook_out", f"{prefix}.hook_attn_out"
    here = out if block.attn_end is block.attn else out[:1]
    _wrap(block.attn, _around_attention(block.attn, prefix, width, here, gain))
    if block.attn_end is not block.attn:
        _wrap(block.attn_end, _around_branch(out[1:], width, gain))
    _wrap(block.ln2, _around_stream(f"{prefix}.hook_resid_mid", width))
    gain = block.mlp_gain
    out = f"{prefix}.mlp.hook_out", f"{prefix}.hook_mlp_out"
    _wrap(block.mlp, _around_branch(out if block.mlp_end is block.mlp else out[:1], width, gain))
    if block.mlp_end is not block.mlp:
        _wrap(block.mlp_end, _around_branch(out[1:], width, gain))


def _places_of(run: Run, *names: str) -> Places:
    for name in names:
        for each in (*run.edits.get(name, ()), *run.captures.get(name, ()), *run.gradients.get(name, ())):
            found: Places = each.places  # type: ignore[union-attr]
            return found
    raise AssertionError(names)


def _part(tensor: torch.Tensor, capture: Capture, width: tuple[int, ...]) -> torch.Tensor:
    """What a capture asks for of an activation in the tower's order: [views, patches, *width]."""
    assert capture.places is not None
    rows = capture.places.take(tensor, width)
    if capture.heads is None or len(width) == 1:
        return rows
    return rows.index_select(2, torch.tensor(capture.heads, device=rows.device))


def _reach(run: Run, name: str, tensor: torch.Tensor, width: tuple[int, ...]) -> torch.Tensor:
    """An activation in the tower's order arrives at a hook: change it, keep it, go on with it."""
    if not run.wants(name):
        return tensor
    if name in run.edits:
        where = _places_of(run, name)
        tensor = where.put(tensor, width, run.edited(name, where.take(tensor, width), 0))
    run.keep(name, lambda capture: _part(tensor, capture, width))
    return run.trace(name, tensor, lambda gradient, capture: _part(gradient, capture, width))


def reach_features(run: Run, embeds: torch.Tensor) -> torch.Tensor:
    """The decoder's input arrives: what stands at the images' tokens is `vision.hook_out`.

    Args:
        run: The run.
        embeds: [batch, seq, hidden], the prompt with or without an answer behind, or a later token alone.
    """
    if run.start or not run.wants(OUT):
        return embeds
    length = _places_of(run, OUT).total // len(embeds)
    prompt = embeds[:, :length]
    changed = _reach(run, OUT, prompt, (embeds.shape[-1],))
    return embeds if changed is prompt else torch.cat([changed, embeds[:, length:]], 1)


def _around_block(prefix: str, width: tuple[int, ...], first: bool) -> Around:
    names = ["vision.hook_embed"] * first + [f"{prefix}.hook_resid_pre"]

    def around(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
        run.check()
        key = None if args else next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        x = args[0] if key is None else kwargs[key]
        for name in names:
            x = _reach(run, name, x, width)
        output = inner(x, *args[1:], **kwargs) if key is None else inner(**{**kwargs, key: x})
        return _first(output, lambda y: _reach(run, f"{prefix}.hook_resid_post", y, width))

    return around


def _first(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A module's output, or the first of several, changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _around_projection(name: str, width: tuple[int, ...]) -> Around:
    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        return _reach(run, name, inner(x), width)

    return around


def _around_fused(names: list[str], width: tuple[int, int]) -> Around:
    """One linear layer that makes queries, keys and values, side by side."""

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        y = inner(x)
        if not run.wants(*names):
            return y
        parts = y.chunk(3, -1)
        changed = [_reach(run, name, part, width) for name, part in zip(names, parts, strict=True)]
        same = all(after is before for after, before in zip(changed, parts, strict=True))
        return y if same else torch.cat(changed, -1)

    return around


def _around_input(name: str, width: tuple[int, ...]) -> Around:
    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        return inner(_reach(run, name, x, width))  # type: ignore[no-any-return]

    return around


def _around_stream(name: str, width: tuple[int, ...]) -> Around:
    """The norm before the MLP. The block adds to its very input later, so a change goes into that memory."""

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        if name in run.edits:
            where = _places_of(run, name)
            x.copy_(where.put(x, width, run.edited(name, where.take(x, width), 0)))
        run.keep(name, lambda capture: _part(x, capture, width))
        run.watch(name, x, lambda gradient, capture: _part(gradient, capture, width))
        return inner(x)  # type: ignore[no-any-return]

    return around


def _branch(
    run: Run, names: tuple[str, ...], y: torch.Tensor, width: tuple[int, ...], gain: torch.Tensor | None
) -> torch.Tensor:
    """The output of attention, MLP or a norm behind them: a hook, and what is added to the stream another."""
    for name in names:
        if gain is None or name.endswith("attn.hook_out") or name.endswith("mlp.hook_out"):
            y = _reach(run, name, y, width)
        elif run.wants(name):
            added = gain * y
            changed = _reach(run, name, added, width)
            y = y if changed is added else y + (changed - added) / gain
    return y


def _around_branch(names: tuple[str, ...], width: tuple[int, ...], gain: torch.Tensor | None) -> Around:
    def around(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
        return _first(inner(*args, **kwargs), lambda y: _branch(run, names, y, width, gain))

    return around


# Attention


class _Look:
    """What one attention module reads in one pass, call by call; a tower may call it once for every window."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []
        self.scaling = 1.0
        self.mixed: torch.Tensor | None = None
        self.differs: torch.Tensor | None = None
        self.traced = False
        self.done = 0

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: Any) -> None:
        """One call: [batch, heads, n, head_dim]; with flash attention several stretches in one."""
        self.scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        ends = kwargs.get("cu_seq_lens_q")
        cuts = [0, query.shape[2]] if ends is None else ends.tolist()
        for start, stop in pairwise(cuts):
            q, k, v = (each[:, :, start:stop] for each in (query, key, value))
            rows = additive_mask(self.module, q, k, mask, {**kwargs, "is_causal": bool(kwargs.get("is_causal"))})
            for number in range(len(q)):
                self.queries.append(q[number])
                self.keys.append(k[number])
                self.values.append(v[number])
                self.masks.append(rows[number if len(rows) > 1 else 0])

    def scores(self, heads: Any = None) -> list[torch.Tensor]:
        """[heads, n, n] of each call."""
        found = []
        for query, key, mask in zip(self.queries, self.keys, self.masks, strict=True):
            if heads is not None:
                chosen = torch.tensor(heads, device=query.device)
                key = key.index_select(0, chosen // (len(query) // len(key)))
                query, mask = query.index_select(0, chosen), mask if len(mask) == 1 else mask.index_select(0, chosen)
            scores = grouped_scores(query[None], key[None])[0] * self.scaling
            found.append(scores + mask.to(scores.dtype))
        return found

    def replaced(self, out: torch.Tensor) -> torch.Tensor:
        """A call's output [batch, n, heads, head_dim] with the rows that a changed pattern changes."""
        assert self.mixed is not None
        assert self.differs is not None
        count = out.shape[0] * out.shape[1]
        mixed = self.mixed[self.done : self.done + count].view(out.shape)
        differs = self.differs[self.done : self.done + count].view(*out.shape[:3], 1)
        self.done += count
        if self.traced:  # the implementation's own values, and a gradient that goes through the pattern
            out = out.detach() + (mixed - mixed.detach())
        return torch.where(differs, mixed, out)


_LOOK: ContextVar[_Look | None] = ContextVar("vlm_spectra_vision_look", default=None)


@contextmanager
def _looking(look: _Look) -> Iterator[_Look]:
    token = _LOOK.set(look)
    try:
        yield look
    finally:
        _LOOK.reset(token)


def _watch(tower: Tower) -> None:
    """Let the tower's attention be looked into: an attention function of our own, as for the language model."""
    name = tower.config._attn_implementation or "eager"
    ours = f"{PREFIX}vision_"
    if name.startswith(ours):
        return
    AttentionInterface.register(ours + name, partial(_attend, name))
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(ours + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    tower.config._attn_implementation = ours + name


def _attend(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in the registry's form: the implementation the model was loaded with, looked at where asked for."""
    look = _LOOK.get()
    inner = _implementation(name, module)
    if name == "eager":  # a file with two has one for its tower
        inner = getattr(sys.modules[type(module).__module__], "vision_eager_attention_forward", inner)
    out, weights = inner(module, query, key, value, attention_mask, **kwargs)
    if look is None or look.module is not module:
        return out, weights
    if look.mixed is not None:
        return look.replaced(out), weights
    look.add(query, key, value, attention_mask, kwargs)
    return out, weights


def _around_attention(
    module: nn.Module, prefix: str, width: tuple[int, ...], names: tuple[str, ...], gain: torch.Tensor | None
) -> Around:
    scores, pattern = f"{prefix}.attn.hook_scores", f"{prefix}.attn.hook_pattern"

    def around(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
        if not run.wants(scores, pattern):
            output = inner(*args, **kwargs)
        else:
            with _looking(_Look(module)) as look:
                output = inner(*args, **kwargs)
                if run.traces(scores, pattern) or scores in run.edits or pattern in run.edits:
                    _change(run, scores, pattern, look)
                    output = inner(*args, **kwargs)  # again, with the changed pattern
                else:
                    made = functools.cache(look.scores)  # the pattern is made of the scores that are kept beside it
                    run.keep(scores, lambda capture: _squares(capture, made(heads_of(capture)), -torch.inf))
                    run.keep(pattern, lambda capture: _squares(capture, map(softmax, made(heads_of(capture))), 0.0))
        return _first(output, lambda y: _branch(run, names, y, width, gain))

    return around


def _squares(capture: Capture, parts: Any, outside: float) -> torch.Tensor:
    assert capture.places is not None
    return capture.places.squares(list(parts), outside)


def _change(run: Run, scores_name: str, pattern_name: str, look: _Look) -> None:
    """Carry out what interventions do to scores and pattern: the values mixed anew, in the tower's order."""
    where = _places_of(run, scores_name, pattern_name)

    def reach(name: str, tensor: torch.Tensor) -> torch.Tensor:
        def part(whole: torch.Tensor, capture: Capture) -> torch.Tensor:
            return whole if capture.heads is None else whole[:, list(capture.heads)]

        tensor = run.edited(name, tensor, 0)
        run.keep(name, lambda capture: part(tensor, capture))
        return run.trace(name, tensor, part)

    traced, parts = run.traces(scores_name, pattern_name), look.scores()
    raw = where.squares(parts, -torch.inf)
    # Rows that nobody changes keep the very values that a capture has; a gradient needs them as a function of scores.
    before = softmax(raw) if traced else where.squares([softmax(part) for part in parts], 0.0)
    scores = reach(scores_name, raw)
    anew = softmax(scores)
    pattern = reach(pattern_name, anew if traced else torch.where((scores != raw).any(-1, keepdim=True), anew, before))
    value = torch.cat([each.transpose(0, 1) for each in look.values])  # [total, kv_heads, head_dim]
    value = value.repeat_interleave(pattern.shape[1] // value.shape[1], 1)
    shape = value.shape[1:]
    mixed = torch.einsum("vhqk,vkhd->vqhd", pattern, where.take(value, shape))
    differs = (pattern != before).any(-1).transpose(1, 2)[..., None]
    look.mixed = where.put(torch.zeros_like(value), shape, mixed)
    look.differs = where.put(torch.zeros_like(value[..., :1], dtype=torch.bool), (shape[0], 1), differs)
    look.traced = traced
