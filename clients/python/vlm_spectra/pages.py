"""HTML pages and pictures of results: a logit lens, an attribution over an image, a report of a whole run.

Each page is one file that loads nothing from anywhere. All text that comes from a prompt or a model is escaped: in
HTML by `html.escape`, in the data of a page's script by writing `<`, `>` and `&` as escapes of JavaScript.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from . import arrays
from .attribution import Attribution
from .cache import ActivationCache
from .errors import InvalidInputError
from .inputs import ImageLayout, Inputs
from .lens import LogitLens
from .results import Generation

SHADES = ("#ffffff", "#eaf2fb", "#d3e4f5", "#b4d2ec", "#8cbbe0", "#62a1d2", "#3e84bf", "#2366a5", "#134a83", "#08305c")
"""Probability in tenths, white to dark blue: told apart by lightness alone, so by colour-blind readers and in print."""
DARK = 6
"""From this shade on, text is white."""
WARM, COLD = (213, 94, 0), (0, 114, 178)
"""For and against (Okabe and Ito's vermillion and blue, which colour-blind readers tell apart)."""
MAX_SIDE = 1280
"""Images are reduced to this many pixels along the longer side before they go into a page."""

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1b1f24;background:#fff;margin:24px auto;
padding:0 24px;max-width:1500px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 8px}p{margin:4px 0 12px;max-width:72em}
.mute{color:#57606a}.said{white-space:pre-wrap;overflow-wrap:anywhere}
pre.said{background:#f6f8fa;border-left:4px solid #2366a5;padding:10px 14px;margin:8px 0;font-size:14px}
table.plain{border-collapse:collapse;margin:8px 0}
.plain th,.plain td{padding:3px 12px 3px 0;border-bottom:1px solid #d0d7de;text-align:left}
.plain th.n,.plain td.n{text-align:right;font-variant-numeric:tabular-nums}
code,.lens{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}code{font-size:13px}
figure{margin:0}figcaption{color:#57606a;font-size:13px;margin-top:4px}
.side{display:flex;flex-wrap:wrap;gap:28px;align-items:flex-start}
.shot{position:relative;display:inline-block;line-height:0;border:1px solid #d0d7de}
.shot img{display:block;width:100%;height:auto}.shot svg{position:absolute;inset:0;width:100%;height:100%}
.shot rect{fill:transparent;stroke:#000;stroke-opacity:.22;stroke-width:1;vector-effect:non-scaling-stroke}
.shot rect.on,.shot rect:hover{stroke:#d55e00;stroke-opacity:1;stroke-width:3}
.legend{display:flex;align-items:center;gap:8px;margin:8px 0;font-size:13px;color:#57606a}
.legend i{display:inline-block;width:26px;height:14px;border-block:1px solid #8c959f}
.scroll{overflow:auto;max-height:80vh;border:1px solid #d0d7de;position:relative}
table.lens{border-collapse:separate;border-spacing:0;table-layout:fixed;font-size:12px;position:relative}
.lens td,.lens th{width:74px;height:22px;padding:0 4px;overflow:hidden;white-space:pre;text-overflow:ellipsis;
box-sizing:border-box;border-right:1px solid #eaeef2;border-bottom:1px solid #eaeef2;text-align:center;font-weight:400}
.lens thead th{position:sticky;top:0;background:#f6f8fa;z-index:3;border-bottom:2px solid #8c959f}
.lens th:first-child{position:sticky;left:0;width:58px;background:#f6f8fa;z-index:4;font-weight:600}
.lens thead th:first-child{z-index:5}
.bar{position:absolute;pointer-events:none;z-index:2;outline:2px solid #d55e00;outline-offset:-2px;display:none}
#tip{position:fixed;z-index:9;display:none;pointer-events:none;background:#fff;border:1px solid #57606a;
box-shadow:0 4px 14px #0003;padding:8px 10px;font-size:12px;white-space:pre;max-width:40em;overflow:hidden}
.bars{display:grid;grid-template-columns:max-content 300px max-content;gap:2px 10px;align-items:center;font-size:13px}
.bars div.track{height:14px;position:relative;background:linear-gradient(#8c959f,#8c959f) 50% 0/1px 100% no-repeat}
.bars div.track i{position:absolute;top:1px;bottom:1px;display:block}.bars .n{text-align:right;
font-variant-numeric:tabular-nums}
"""

_SCRIPT = """
(()=>{const D=JSON.parse(document.getElementById('data').textContent),tip=document.getElementById('tip');
const show=t=>JSON.stringify(t).slice(1,-1).replace(/\\\\"/g,'"');
document.querySelectorAll('section[data-row]').forEach(sec=>{
const R=D.rows[+sec.dataset.row],T=sec.querySelector('table.lens'),box=sec.querySelector('.scroll');
const col=sec.querySelector('.bar.c'),line=sec.querySelector('.bar.r'),index=new Map(R.positions.map((p,i)=>[p,i]));
let lit=null;const patch=p=>{if(lit)lit.classList.remove('on');
lit=p==null?null:sec.querySelector('rect[data-p="'+p+'"]');if(lit)lit.classList.add('on')};
const place=(bar,l,t,w,h)=>{
Object.assign(bar.style,{display:'block',left:l+'px',top:t+'px',width:w+'px',height:h+'px'})};
const column=j=>{const c=T.rows[0].cells[j+1];place(col,c.offsetLeft,0,c.offsetWidth,T.offsetHeight)};
const clear=()=>{patch(null);col.style.display=line.style.display=tip.style.display='none'};
const at=e=>{const w=tip.offsetWidth,h=tip.offsetHeight;
tip.style.left=Math.max(4,Math.min(e.clientX+14,innerWidth-w-8))+'px';
tip.style.top=(e.clientY+h+24>innerHeight?Math.max(4,e.clientY-h-10):e.clientY+14)+'px'};
const label=j=>'position '+R.positions[j]+'  '+show(R.labels[j]);
T.addEventListener('mouseover',e=>{const c=e.target.closest('td,th');if(!c)return;
const j=c.cellIndex-1,i=c.parentNode.rowIndex-1;
clear();if(i>=0){const r=c.parentNode;place(line,0,r.offsetTop,T.offsetWidth,r.offsetHeight)}
if(j<0)return;column(j);patch(R.positions[j]);let t=label(j);
if(i>=0){const x=R.cells[i][j];t='layer '+D.layers[i]+', '+t+'\\n\\n';
x[0].forEach((v,k)=>{t+=(x[1][k]/10).toFixed(1).padStart(5)+' %  '+show(D.words[v])+'\\n'});
t+='\\nentropy '+x[2]+' nats, KL to final '+x[3]+' nats'+
R.targets[j].map((w,k)=>'\\nrank of '+show(D.words[w])+': '+x[4][k]).join('')}
tip.textContent=t;tip.style.display='block';at(e)});
T.addEventListener('mousemove',at);T.addEventListener('mouseleave',clear);
sec.querySelectorAll('.shot svg').forEach(s=>{
s.addEventListener('mouseover',e=>{const p=e.target.dataset.p;if(p==null)return;
clear();const j=index.get(+p);if(j==null)return;column(j);patch(+p);
tip.textContent=label(j);tip.style.display='block';at(e)});
s.addEventListener('mousemove',at);s.addEventListener('mouseleave',clear);
s.addEventListener('click',e=>{const j=index.get(+e.target.dataset.p);if(j==null)return;
const c=T.rows[0].cells[j+1];box.scrollLeft=c.offsetLeft-box.clientWidth/2;
box.scrollIntoView({block:'nearest'});column(j)})})})})();
"""


def lens_page(lens: LogitLens) -> str:
    """A logit lens as one self-contained page.

    For each row of the batch: its images with their token grid, and a table of layers (the last on top) by tokens,
    shaded by the probability of the most probable token. Pointing at a cell lists the top k; pointing at a patch marks
    its column, and the other way round. Padding is left out.
    """
    words: dict[str, int] = {}
    sections, rows = [], []
    order = list(reversed(range(len(lens.layers))))
    kept = arrays.to_numpy(lens.inputs.attention_mask)
    for row, positions in enumerate(lens.positions):
        columns = [
            j
            for j, position in enumerate(positions)
            if position >= kept.shape[1] or kept[row, position]  # generated positions are behind the mask
        ]
        rows.append(_row_data(lens, row, columns, order, words))
        sections.append(_row_section(lens, row, columns, order))
    data = {"layers": [lens.layers[i] for i in order], "words": list(words), "rows": rows}
    body = (
        "<h1>Logit lens</h1>"
        f'<p class="mute">What each layer would answer: <code>{escape(lens.hook)}</code> of every layer, read through '
        "the final norm and the unembedding. Point at a cell for its most probable tokens, at a patch for its column; "
        f"click a patch to go there.</p>{_legend()}{''.join(sections)}"
        f'<div id="tip" role="status"></div><script type="application/json" id="data">{_json(data)}</script>'
        f"<script>{_SCRIPT}</script>"
    )
    return _page("Logit lens", body)


def lens_section(lens: LogitLens) -> str:
    """A fragment for a notebook: each row's last position, layers by the most probable tokens."""
    return "".join(_last_position(lens, row) for row in range(len(lens.positions)))


def attribution_overlay(attribution: Attribution, image: int = 0) -> Image.Image:
    """An image with the scores of its patches laid over it, in the image's own size.

    Vermillion speaks for the target, blue against it; the strongest patch of the image is the most opaque.

    Args:
        attribution: The scores.
        image: The number of the image, over all rows of the batch.

    Raises:
        InvalidInputError: There is no such image.
    """
    grid = arrays.to_numpy(attribution.image_grid(image)).astype(np.float32)
    layout = attribution.inputs.images[image]
    picture = _pixels(attribution.inputs, image).convert("RGBA")
    peak = float(np.abs(grid).max(initial=0.0)) or 1.0
    heat = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(heat)
    across, down = picture.size[0] / layout.original_size[0], picture.size[1] / layout.original_size[1]
    for patch, score in enumerate(grid.flat):
        left, top, right, bottom = layout.box(patch)
        corners = (round(left * across), round(top * down), round(right * across) - 1, round(bottom * down) - 1)
        if corners[2] >= corners[0] and corners[3] >= corners[1]:
            draw.rectangle(corners, fill=(*(WARM if score > 0 else COLD), round(190 * abs(float(score)) / peak)))
    return Image.alpha_composite(picture, heat).convert("RGB")


def report_page(
    answer: Generation,
    *,
    cache: ActivationCache | None = None,
    seconds: float | None = None,
    lens: LogitLens | None = None,
    attribution: Attribution | None = None,
    title: str = "A look inside",
    row: int = 0,
) -> str:
    """A whole run as one self-contained page.

    Args:
        answer: What the model said; its click is marked on the image.
        cache: What was captured: names, shapes, bytes.
        seconds: How long the captured run took.
        lens: Its last position, layer by layer.
        attribution: Heat over the image and, where the method has them, bars per layer.
        title: The page's headline.
        row: The batch row to report.
    """
    prompt = answer.inputs.prompts[row]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="said"><b>Asked:</b> {escape(prompt.task)}</p>',
        f'<pre class="said">{escape(prompt.assistant_prefill + answer.text[row])}</pre>',
        _pictures(answer, attribution, row),
    ]
    if cache is not None:
        parts.append(_cached(cache, seconds))
    if lens is not None:
        explanation = "What each layer would say next at the last position, and how probable it finds it."
        parts.append(f'<h2>Layer by layer</h2><p class="mute">{explanation}</p>{_last_position(lens, row)}')
    if attribution is not None and attribution.head_scores is not None and attribution.mlp_scores is not None:
        parts.append(_layer_bars(attribution, row))
    return _page(title, "".join(parts))


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page; the file appears whole or not at all.

    Raises:
        InvalidInputError: It cannot be written there.
    """
    path = Path(path)
    refusal = f"the page cannot be written to {str(path)!r}"
    if not path.parent.is_dir():
        raise InvalidInputError(f"{refusal}: there is no directory {str(path.parent)!r}.", field="path")
    if path.is_dir():
        raise InvalidInputError(f"{refusal}: that is a directory.", field="path")
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own mode would hide the page from everyone else
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInputError(f"{refusal}: {reason}.", field="path") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{_shades()}</style></head><body>{body}</body></html>\n"
    )


def _shades() -> str:
    return "".join(f".s{i}{{background:{shade}{';color:#fff' if i >= DARK else ''}}}" for i, shade in enumerate(SHADES))


def _legend() -> str:
    boxes = "".join(f'<i class="s{i}" title="{10 * i} to {10 * i + 10} %"></i>' for i in range(len(SHADES)))
    return f'<div class="legend">probability of the top token: 0 %<span style="line-height:0">{boxes}</span>100 %</div>'


def _shade(prob: float) -> int:
    return min(max(int(prob * len(SHADES)), 0), len(SHADES) - 1) if prob == prob else 0


def _json(data: Any) -> str:
    """JSON that may stand inside a script element, whatever texts it holds."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _visible(text: str) -> str:
    """A token as one sees it: spaces and line breaks have signs."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    stripped = shown.lstrip(" ")
    return ("·" * (len(shown) - len(stripped)) + stripped) or "∅"


def _row_data(lens: LogitLens, row: int, columns: list[int], order: list[int], words: dict[str, int]) -> dict[str, Any]:
    probs = np.nan_to_num(arrays.to_numpy(lens.probs)[:, row].astype(np.float64))
    entropy = np.nan_to_num(arrays.to_numpy(lens.entropy)[:, row].astype(np.float64))
    kl = np.nan_to_num(arrays.to_numpy(lens.kl_to_final)[:, row].astype(np.float64))
    ranks = arrays.to_numpy(lens.ranks)[:, row]
    labels = lens.inputs.token_labels[row]

    def number(word: str) -> int:
        return words.setdefault(word, len(words))

    cells = [
        [
            [
                [number(word) for word in lens.tokens[i][row][j]],
                [round(1000 * float(p)) for p in probs[i, j]],
                round(float(entropy[i, j]), 2),
                round(float(kl[i, j]), 2),
                ranks[i, j].tolist(),
            ]
            for j in columns
        ]
        for i in order
    ]
    positions = [lens.positions[row][j] for j in columns]
    return {
        "positions": positions,
        "labels": [labels[p] if p < len(labels) else "" for p in positions],
        "targets": [[number(word) for word in lens.target_tokens[row][j]] for j in columns],
        "cells": cells,
    }


def _row_section(lens: LogitLens, row: int, columns: list[int], order: list[int]) -> str:
    prompt, labels = lens.inputs.prompts[row], lens.inputs.token_labels[row]
    top = arrays.to_numpy(lens.probs)[:, row, :, 0]
    figures = "".join(
        _figure(_data_uri(prompt.images[i].pixels), layout, f"image {i + 1}: {_extent(layout)}", _grid(layout))
        for i, layout in enumerate(lens.inputs.images_of(row))
    )
    patches = {
        position: f"▦{i + 1} {patch // layout.grid[1]},{patch % layout.grid[1]}"
        for i, layout in enumerate(lens.inputs.images_of(row))
        for patch, position in enumerate(layout.positions)
    }
    head = "".join(
        f"<th>{patches.get(p) or escape(_visible(labels[p] if p < len(labels) else ''))}</th>"
        for p in (lens.positions[row][j] for j in columns)
    )
    body = "".join(
        f"<tr><th>L{lens.layers[i]}</th>"
        + "".join(
            f"<td class=s{_shade(float(top[i, j]))}>{escape(_visible(lens.tokens[i][row][j][0]))}</td>" for j in columns
        )
        + "</tr>"
        for i in order
    )
    number = f"Row {row}: " if len(lens.positions) > 1 else ""
    width = 58 + 74 * len(columns)
    return (
        f'<section data-row="{row}"><h2 class="said">{number}{escape(prompt.task)}</h2>'
        f'<div class="side">{figures}</div><p></p><div class="scroll">'
        f'<table class="lens" style="width:{width}px"><thead>'
        f"<tr><th>layer</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        '<div class="bar c"></div><div class="bar r"></div></div></section>'
    )


def _last_position(lens: LogitLens, row: int) -> str:
    """Layers by the top k of a row's last position. Styles stand inline: notebooks drop style sheets."""
    probs = arrays.to_numpy(lens.probs)[:, row, -1]
    cell = "padding:2px 8px;text-align:left;white-space:pre;font-family:monospace;font-size:12px"
    lines = []
    for i in reversed(range(len(lens.layers))):
        cells = []
        for word, prob in zip(lens.tokens[i][row][-1], probs[i], strict=True):
            shade = _shade(float(prob))
            colour = f"background:{SHADES[shade]};color:{'#fff' if shade >= DARK else '#1b1f24'}"
            cells.append(f'<td style="{cell};{colour}">{escape(_visible(word))} {100 * float(prob):.1f} %</td>')
        lines.append(f'<tr><th style="{cell}">layer {lens.layers[i]}</th>{"".join(cells)}</tr>')
    position = lens.positions[row][-1]
    task = escape(lens.inputs.prompts[row].task)
    hook = escape(lens.hook)
    return (
        f'<div style="margin:6px 0"><b>Logit lens</b> of <code>{hook}</code> at position {position} of '
        f'<span style="white-space:pre-wrap">{task}</span></div>'
        f'<table style="border-collapse:collapse">{"".join(lines)}</table>'
    )


def _pixels(inputs: Inputs, image: int) -> Image.Image:
    """The pixels of an image by its number over all rows."""
    row = inputs.images[image].row
    number = sum(1 for layout in inputs.images[:image] if layout.row == row)
    return inputs.prompts[row].images[number].pixels


def _data_uri(picture: Image.Image) -> str:
    if max(picture.size) > MAX_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    kind = "PNG" if picture.size[0] * picture.size[1] <= 500_000 else "JPEG"
    picture.save(buffer, format=kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _extent(layout: ImageLayout) -> str:
    return f"{layout.original_size[0]} × {layout.original_size[1]} pixels, {layout.grid[0]} × {layout.grid[1]} tokens"


def _grid(layout: ImageLayout) -> str:
    rows, columns = layout.grid
    cells = "".join(
        f'<rect data-p="{position}" x="{patch % columns}" y="{patch // columns}" width="1" height="1"/>'
        for patch, position in enumerate(layout.positions)
    )
    return f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">{cells}</svg>'


def _figure(source: str, layout: ImageLayout, caption: str, over: str = "") -> str:
    width, height = layout.original_size
    shown = max(1, round(min(620.0, 480.0 * width / height, max(width, 420.0 * min(1.0, width / height)))))
    return (
        f'<figure style="width:{shown}px;max-width:100%"><div class="shot" style="width:100%">'
        f'<img alt="{escape(caption)}" src="{source}">{over}</div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _pictures(answer: Generation, attribution: Attribution | None, row: int) -> str:
    figures = []
    layouts, click = answer.inputs.images_of(row), answer.clicks[row]
    for number, layout in enumerate(layouts):
        over, caption = "", "what the model was shown"
        if click is not None and number == len(layouts) - 1:
            width, height = layout.original_size
            x, y, r = click.x, click.y, max(width, height) / 36
            ring = f'<circle cx="{x}" cy="{y}" r="{r}" fill="none"'
            over = (
                f'<svg viewBox="0 0 {width} {height}">{ring} stroke="#fff" stroke-width="{r / 1.6}"/>'
                f'{ring} stroke="#d55e00" stroke-width="{r / 3.2}"/>'
                f'<circle cx="{x}" cy="{y}" r="{r / 5}" fill="#d55e00"/></svg>'
            )
            caption = f"the click: ({click.x:.0f}, {click.y:.0f}) of {width} × {height} pixels"
        pixels = answer.inputs.prompts[row].images[number].pixels
        figures.append(_figure(_data_uri(pixels), layout, caption, over))
    if attribution is not None:
        for image, layout in enumerate(attribution.inputs.images):
            if layout.row == row:
                target = _visible(attribution.target_tokens[row])
                caption = f"{attribution.method}: for “{target}” in vermillion, against it in blue"
                source = _data_uri(attribution_overlay(attribution, image))
                figures.append(_figure(source, layout, caption, _grid(layout)))
    return f'<div class="side">{"".join(figures)}</div>' if figures else ""


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
        colour = "rgb({},{},{})".format(*(WARM if value >= 0 else COLD))
        bar = f'<i style="left:{left:.2f}%;width:{width:.2f}%;background:{colour}"></i>'
        bars.append(f'<span>{name}</span><div class="track">{bar}</div><span class="n">{value:+.3f}</span>')
    value = float(arrays.to_numpy(attribution.target_value)[row])
    total = float(arrays.to_numpy(attribution.total)[row])
    target = escape(_visible(attribution.target_tokens[row]))
    return (
        f'<h2>Who wrote “{target}”</h2><p class="mute">The logit of “{target}” is {value:.4f}; the parts below add up '
        f'to {total:.4f} (difference {value - total:+.2g}).</p><div class="bars">{"".join(bars)}</div>'
    )
