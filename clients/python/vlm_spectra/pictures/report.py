"""A whole run as one self-contained page: the answer, what was cached, layer by layer, who wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from numpy.typing import NDArray

from .. import arrays
from ..attribution import Attribution
from ..cache import ActivationCache
from ..lens import LogitLens
from ..results import Generation
from . import overlays
from .colours import COLD, WARM, css
from .lens_page import last_position
from .markup import data_uri, document, visible
from .panes import extent, numbered, panes, pixels


def report_page(
    answer: Generation,
    *,
    cache: ActivationCache | None = None,
    seconds: float | None = None,
    lens: LogitLens | None = None,
    attributions: Sequence[Attribution] = (),
    title: str = "A look inside",
    row: int = 0,
) -> str:
    """A whole run as one self-contained page.

    Args:
        answer: What the model said; its click is marked on the image.
        cache: What was captured: names, shapes, bytes.
        seconds: How long the captured run took.
        lens: Its last position, layer by layer.
        attributions: For each, heat over the image and, where the method has them, bars per layer.
        title: The page's headline.
        row: The batch row to report.
    """
    prompt = answer.inputs.prompts[row]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="said"><b>Asked:</b> {escape(prompt.task)}</p>',
        f'<pre class="said">{escape(prompt.assistant_prefill + answer.text[row])}</pre>',
        _pictures(answer, attributions, row),
    ]
    if cache is not None:
        parts.append(_cached(cache, seconds))
    if lens is not None:
        explanation = "What each layer would say next at the last position, and how probable it finds it."
        parts.append(f'<h2>Layer by layer</h2><p class="mute">{explanation}</p>{last_position(lens, row)}')
    for attribution in attributions:
        if attribution.head_scores is not None and attribution.mlp_scores is not None:
            parts.append(_layer_bars(attribution, row))
    return document(title, "".join(parts))


def _pictures(answer: Generation, attributions: Sequence[Attribution], row: int) -> str:
    figures, click = [], answer.clicks[row]
    images = numbered(answer.inputs, row)
    for image, layout in images:
        width, height = layout.original_size
        shown = max(1, round(min(620.0, 480.0 * width / height, max(width, 420.0 * min(1.0, width / height)))))
        ring, caption = "", f"what the model was shown: {extent(layout, panes(layout)[0])}"
        if click is not None and image == images[-1][0]:
            ring = _ring(click.x, click.y, width, height)
            caption = f"the click: ({click.x:.0f}, {click.y:.0f}) of {width} × {height} pixels"
        source = data_uri(pixels(answer.inputs, image))
        figures.append(
            f'<figure style="width:{shown}px;max-width:100%"><div class="shot"><img alt="{escape(caption)}" '
            f'src="{source}">{ring}</div><figcaption>{escape(caption)}</figcaption></figure>'
        )
    for attribution in attributions:
        for image, _ in numbered(attribution.inputs, row):
            figures.append(overlays.attribution(attribution, image).to_html())
    return f'<div class="side">{"".join(figures)}</div>' if figures else ""


def _ring(x: float, y: float, width: int, height: int) -> str:
    """A mark around a point of an image."""
    r = max(width, height) / 36
    circle = f'<circle cx="{x}" cy="{y}" r="{r}" fill="none"'
    return (
        f'<svg viewBox="0 0 {width} {height}">{circle} stroke="#fff" stroke-width="{r / 1.6}"/>'
        f'{circle} stroke="#d55e00" stroke-width="{r / 3.2}"/>'
        f'<circle cx="{x}" cy="{y}" r="{r / 5}" fill="#d55e00"/></svg>'
    )


def _cached(cache: ActivationCache, seconds: float | None) -> str:
    rows = cache.summary()
    total = sum(size for *_, size in rows)
    count = sum(number for *_, number, _ in rows)
    took = "" if seconds is None else f" in {seconds:.2f} s"
    lines = (
        [f"<code>{escape(name)}</code>", escape(shape.replace("x", " × ")), escape(dtype), f"{number}", f"{size:,}"]
        for name, shape, dtype, number, size in rows
    )
    table = _table(["hook", "shape", "dtype", "tensors", "bytes"], lines, numbers=(3, 4))
    return f'<h2>What was cached</h2><p class="mute">{count} tensors, {total:,} bytes{took}.</p>{table}'


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A plain table; cells are HTML already."""
    kinds = [' class="n"' if i in numbers else "" for i in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    return f'<table class="plain">{line("th", head)}{"".join(line("td", cells) for cells in lines)}</table>'


def _layer_bars(attribution: Attribution, row: int) -> str:
    heads: NDArray[Any] = arrays.to_numpy(attribution.head_scores)[row].sum(axis=-1)
    mlps: NDArray[Any] = arrays.to_numpy(attribution.mlp_scores)[row]
    parts: list[tuple[str, float]] = []
    if attribution.embed_score is not None:
        parts.append(("embedding", float(arrays.to_numpy(attribution.embed_score)[row])))
    for layer, (head, mlp) in enumerate(zip(heads.tolist(), mlps.tolist(), strict=True)):
        parts += [(f"layer {layer} attention", head), (f"layer {layer} MLP", mlp)]
    if attribution.bias is not None:
        parts.append(("biases", float(arrays.to_numpy(attribution.bias)[row])))
    peak = max((abs(value) for _, value in parts), default=0.0) or 1.0
    bars = []
    for name, value in parts:
        width = 50 * abs(value) / peak
        left = 50.0 if value >= 0 else 50 - width
        colour = css(WARM if value >= 0 else COLD)
        bar = f'<i style="left:{left:.2f}%;width:{width:.2f}%;background:{colour}"></i>'
        bars.append(f'<span>{name}</span><div class="track">{bar}</div><span class="n">{value:+.3f}</span>')
    value = float(arrays.to_numpy(attribution.target_value)[row])
    total = float(arrays.to_numpy(attribution.total)[row])
    target = escape(visible(attribution.target_tokens[row]))
    return (
        f'<h2>Who wrote “{target}”</h2><p class="mute">The logit of “{target}” is {value:.4f}; the parts below add up '
        f'to {total:.4f} (difference {value - total:+.2g}).</p><div class="bars">{"".join(bars)}</div>'
    )
