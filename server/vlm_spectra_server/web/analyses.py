"""The analyses: calls of `vlm_spectra.VLM`, and what of their results the page draws, as JSON.

Each returns its result, and tells events while it works. Large arrays travel packed: base64 of little-endian float32,
with their shape.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from vlm_spectra import VLM, Inputs, Target
from vlm_spectra.arrays import to_numpy
from vlm_spectra.clicks import find_click
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.inputs import on_grid
from vlm_spectra.lens import LogitLens
from vlm_spectra.pictures.panes import Patch, panes
from vlm_spectra.sweep import PatchSweep

from . import questions as ask
from .runs import Tell

Images = Callable[[str], bytes]
"""The bytes of an image by its name."""
Result = dict[str, Any]


def prepare(model: VLM, question: ask.Question | ask.Second, images: Images) -> Inputs:
    """A question as inputs."""
    names = [question.filename] if isinstance(question.filename, str) else question.filename
    pictures = [images(name) for name in names if name]
    return model.prepare_messages(question.task, pictures or None, question.assistant_prefill)


def describe(inputs: Inputs) -> dict[str, Any]:
    """The tokens of a prompt, and where those of its image look."""
    found = []
    for layout in inputs.images:
        patches = [
            {"position": position, "box": [round(edge, 2) for edge in layout.box(cell)]}
            for cell, position in enumerate(layout.raster)
            if position >= 0
        ]
        size, grid = list(layout.original_size), list(layout.grid)
        processed = list(layout.processed_size)
        shown = [{"name": pane.name, "patches": [_patch(patch) for patch in pane.patches]} for pane in panes(layout)]
        about = {"size": size, "processed_size": processed, "grid": grid}
        found.append({**about, "patches": patches, "panes": shown})
    every = sorted(position for layout in inputs.images for position in layout.positions)
    return {"tokens": inputs.token_labels[0], "images": found, "image_positions": every}


def _patch(patch: Patch) -> dict[str, Any]:
    box = [round(edge, 2) for edge in patch.box]
    return {"position": patch.position, "row": patch.row, "column": patch.column, "box": box}


def patch_info(model: VLM, tell: Tell, question: ask.Question, images: Images) -> Result:
    """How the image becomes patches."""
    return describe(prepare(model, question, images))


def predict(model: VLM, tell: Tell, question: ask.Predict, images: Images) -> Result:
    """An answer, token by token."""
    inputs = prepare(model, question, images)
    tell(_step("answering"))
    tokens = []
    for token in model.stream(inputs, question.max_new_tokens):
        shown = {"text": token.text, "id": token.id, "prob": math.exp(token.logprob)}
        tokens.append(shown)
        tell({"type": "token", **shown})
    text = "".join(token["text"] for token in tokens)
    click = find_click(question.assistant_prefill + text, inputs.images_of(0), model.info.coordinates)
    point = None if click is None else {"x": click.x, "y": click.y}
    return {"text": text, "tokens": tokens, "click": point, "prompt": describe(inputs)}


def forward(model: VLM, tell: Tell, question: ask.Forward, images: Images) -> Result:
    """The most probable next tokens at every position: the last layer's logit lens, which is the model's output."""
    inputs = prepare(model, question, images)
    tell(_step("running the model"))
    lens = model.logit_lens(inputs, layers=[-1], top_k=question.top_k)
    probs, entropy = to_numpy(lens.probs)[0, 0], to_numpy(lens.entropy)[0, 0]
    rows = [
        {"top": _choices(lens.tokens[0][0][p], probs[p]), "entropy": _number(entropy[p])} for p in range(len(entropy))
    ]
    return {"positions": rows, "prompt": describe(inputs)}


def attention(model: VLM, tell: Tell, question: ask.Attention, images: Images) -> Result:
    """What one token reads, in one layer or in all."""
    inputs = prepare(model, question, images)
    length = len(inputs.token_labels[0])
    if not -length <= question.position < length:
        raise InvalidInputError(
            f"position is {question.position}; the prompt has {length} tokens, 0 to {length - 1}.", field="position"
        )
    position = question.position % length
    layer = "*" if question.layer is None else question.layer
    tell(_step("running the model"))
    with model.run_with_cache(f"lm.blocks.{layer}.attn.hook_pattern", positions=[position], dtype="float32") as cache:
        model.forward(inputs, logits_to_keep=None)
    names = list(cache.names)
    patterns = np.stack([to_numpy(cache[name])[0, :, 0] for name in names]).astype("<f4")
    layers = [int(name.split(".")[2]) for name in names]
    about = {"position": position, "layers": layers, "heads": patterns.shape[1], "prompt": describe(inputs)}
    if question.layer is None or question.head is None:
        return {**about, "patterns": _packed(patterns)}
    row = _of_head(patterns[0], question.head)
    grids = [_numbers(to_numpy(on_grid(row, layout))) for layout in inputs.images]
    share = sum(float(row[list(layout.positions)].sum()) for layout in inputs.images)
    found = {"scores": _numbers(row), "attention": grids[0] if grids else [], "attentions": grids}
    return {**about, **found, "image_share": _number(share)}


def attribution(model: VLM, tell: Tell, question: ask.Attribution, images: Images) -> Result:
    """Which parts of the image made a target."""
    inputs = prepare(model, question, images)
    against = None if question.corrupted is None else prepare(model, question.corrupted, images)
    tell(_step(question.method.replace("_", " ")))
    why = model.attribute(
        inputs,
        question.method,
        _target(question),
        position=question.position,
        steps=question.steps,
        baseline=question.baseline or "mean",
        window=question.window,
        stride=question.stride,
        against=against,
    )
    heads = None if why.head_scores is None else to_numpy(why.head_scores)[0]
    mlps = None if why.mlp_scores is None else to_numpy(why.mlp_scores)[0]
    layers = None if why.layer_scores is None else to_numpy(why.layer_scores)[0]
    numbers = {name: _number(to_numpy(getattr(why, name))[0]) for name in ("target_value", "total", "residual")}
    return {
        "method": why.method,
        "target": why.target_tokens[0],
        **numbers,
        "baseline_value": None if why.baseline_value is None else _number(to_numpy(why.baseline_value)[0]),
        "steps": why.steps,
        "scores": _numbers(to_numpy(why.scores)[0]),
        "heads": None if heads is None else _numbers(heads),
        "mlps": None if mlps is None else _numbers(mlps),
        "layer_scores": None if layers is None else _packed(layers.astype("<f4")),
        "embed": None if why.embed_score is None else _number(to_numpy(why.embed_score)[0]),
        "bias": None if why.bias is None else _number(to_numpy(why.bias)[0]),
        "prompt": describe(inputs),
    }


def _target(question: ask.Attribution) -> Any:
    """What is explained, as `attribute` takes it."""
    if question.answer:
        if question.target != "" or question.against != "":
            raise InvalidInputError("an answer is explained whole: name it or a token, not both.", field="answer")
        return Target(answer=question.answer)
    if question.against != "":
        if question.target == "":
            raise InvalidInputError("a difference needs both tokens: name the target too.", field="target")
        return question.target, question.against
    return None if question.target == "" else question.target


def logit_lens(model: VLM, tell: Tell, question: ask.Lens, images: Images, keep: Callable[[LogitLens], str]) -> Result:
    """What each layer would answer.

    Args:
        model: The model.
        tell: Takes what it says while it works.
        question: What is asked.
        images: The images by name.
        keep: Keeps a lens, and gives the address of its page.
    """
    inputs = prepare(model, question, images)
    tell(_step("reading every layer"))
    lens = model.logit_lens(inputs, top_k=question.top_k, hook=question.hook)
    tell(_step("writing the page"))
    found: Result = {"page": keep(lens), "hook": lens.hook, "layers": lens.layers, "prompt": describe(inputs)}
    if not question.page:
        probs, entropy = to_numpy(lens.probs)[:, 0], to_numpy(lens.entropy)[:, 0]
        found["readings"] = [
            [_choices(lens.tokens[i][0][p], probs[i, p]) for p in range(probs.shape[1])] for i in range(len(probs))
        ]
        found["entropy"] = _numbers(entropy)
    return found


def patching(model: VLM, tell: Tell, question: ask.Patching, images: Images) -> Result:
    """A sweep of activation patching; each layer's row is told as soon as it is there."""
    clean, corrupted = prepare(model, question, images), prepare(model, question.corrupted, images)
    block = "lm.blocks.{layer}."
    name = "attn.hook_z" if question.over == "heads" else question.hook
    spec = next((each for each in model.hooks() if each.name == block + name), None)
    if spec is None:
        raise InvalidInputError(f"a decoder block has no {name!r} that can be patched.", field="hook")
    layers, rows = list(spec.layers), []

    def on_row(sweep: PatchSweep) -> None:
        row = len(rows)
        rows.append(_numbers(to_numpy(sweep.normalized)[row]))
        there = {"done": row + 1, "total": len(layers), "layer": layers[row], "values": rows[row]}
        tell({"type": "row", **there, **_about(sweep)})

    sweep = model.patch_sweep(
        clean,
        corrupted,
        f"lm.blocks.*.{name}",
        question.over if question.over in ("image", "text") else None,
        question.target or None,
        question.mode,
        heads="all" if question.over == "heads" else None,
        on_row=on_row,
    )
    prompts = {"prompt": describe(clean), "corrupted_prompt": describe(corrupted)}
    return {"hook": name, "mode": sweep.mode, "layers": layers, "values": rows, **_about(sweep), **prompts}


def _about(sweep: PatchSweep) -> dict[str, Any]:
    """What the rows of a sweep mean."""
    return {
        "columns": sweep.columns,
        "labels": sweep.labels,
        "axis": sweep.axis,
        "clean_value": _number(sweep.clean_value),
        "corrupted_value": _number(sweep.corrupted_value),
        "target": sweep.target_tokens,
    }


def _step(what: str) -> dict[str, Any]:
    return {"type": "step", "what": what}


def _choices(texts: list[str], probs: np.ndarray) -> list[dict[str, Any]]:
    return [{"text": text, "prob": float(prob)} for text, prob in zip(texts, probs, strict=True)]


def _of_head(patterns: np.ndarray, head: int | str) -> np.ndarray:
    """One head's row of [heads, seq], or their mean or maximum."""
    if isinstance(head, str):
        return patterns.mean(0) if head == "mean" else patterns.max(0)
    if not 0 <= head < len(patterns):
        raise InvalidInputError(f"head is {head}; possible are 0 to {len(patterns) - 1}, mean and max.", field="head")
    return patterns[head]


def _number(value: Any) -> float | None:
    """A number as JSON has it: None where it is none."""
    return float(value) if math.isfinite(float(value)) else None


def _numbers(array: np.ndarray) -> Any:
    """Nested lists of numbers, None for what is none."""
    return [_numbers(each) for each in array] if array.ndim else _number(array)


def _packed(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode("ascii")}
