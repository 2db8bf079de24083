"""The analyses: calls of `vlm_spectra.VLM`, and what of their results the page draws, as JSON.

Each is a generator of events; the last has the type "result". Large arrays travel packed: base64 of little-endian
float32, with their shape.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from vlm_spectra import VLM, Inputs
from vlm_spectra.arrays import to_numpy
from vlm_spectra.clicks import find_click
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.lens import LogitLens

from . import questions as ask

Event = dict[str, Any]
Images = Callable[[str], bytes]
"""The bytes of an image by its name."""


def prepare(model: VLM, question: ask.Question | ask.Second, images: Images) -> Inputs:
    """A question as inputs."""
    picture = images(question.filename) if question.filename else None
    return model.prepare_messages(question.task, picture, question.assistant_prefill)


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
        found.append({"size": size, "processed_size": processed, "grid": grid, "patches": patches})
    every = sorted(position for layout in inputs.images for position in layout.positions)
    return {"tokens": inputs.token_labels[0], "images": found, "image_positions": every}


def patch_info(model: VLM, question: ask.Question, images: Images) -> Iterator[Event]:
    """How the image becomes patches."""
    yield _result(describe(prepare(model, question, images)))


def predict(model: VLM, question: ask.Predict, images: Images) -> Iterator[Event]:
    """An answer, token by token."""
    inputs = prepare(model, question, images)
    yield _step("answering")
    tokens = []
    for token in model.stream(inputs, question.max_new_tokens):
        shown = {"text": token.text, "id": token.id, "prob": math.exp(token.logprob)}
        tokens.append(shown)
        yield {"type": "token", **shown}
    text = "".join(token["text"] for token in tokens)
    click = find_click(question.assistant_prefill + text, inputs.images_of(0), model.info.coordinates)
    point = None if click is None else {"x": click.x, "y": click.y}
    yield _result({"text": text, "tokens": tokens, "click": point, "prompt": describe(inputs)})


def forward(model: VLM, question: ask.Forward, images: Images) -> Iterator[Event]:
    """The most probable next tokens at every position: the last layer's logit lens, which is the model's output."""
    inputs = prepare(model, question, images)
    yield _step("running the model")
    lens = model.logit_lens(inputs, layers=[-1], top_k=question.top_k)
    probs, entropy = to_numpy(lens.probs)[0, 0], to_numpy(lens.entropy)[0, 0]
    rows = [
        {"top": _choices(lens.tokens[0][0][p], probs[p]), "entropy": float(entropy[p])} for p in range(len(entropy))
    ]
    yield _result({"positions": rows, "prompt": describe(inputs)})


def attention(model: VLM, question: ask.Attention, images: Images) -> Iterator[Event]:
    """What one token reads, in one layer or in all."""
    inputs = prepare(model, question, images)
    length = len(inputs.token_labels[0])
    if not -length <= question.position < length:
        raise InvalidInputError(
            f"position is {question.position}; the prompt has {length} tokens, 0 to {length - 1}.", field="position"
        )
    position = question.position % length
    layer = "*" if question.layer is None else question.layer
    yield _step("running the model")
    kept = []
    with model.run_with_cache(f"lm.blocks.{layer}.attn.hook_pattern", positions=[position], dtype="float32") as cache:
        model.forward(inputs, logits_to_keep=None)
        names = list(cache.names)
        for done, name in enumerate(names, 1):
            kept.append(to_numpy(cache[name])[0, :, 0])
            yield {"type": "progress", "done": done, "total": len(names)}
    patterns = np.stack(kept).astype("<f4")
    layers = [int(name.split(".")[2]) for name in names]
    about = {"position": position, "layers": layers, "heads": patterns.shape[1], "prompt": describe(inputs)}
    if question.layer is None or question.head is None:
        yield _result({**about, "patterns": _packed(patterns)})
        return
    row = _of_head(patterns[0], question.head)
    cells = [row[patch["position"]] for patch in about["prompt"]["images"][0]["patches"]] if inputs.images else []
    grid = np.array(cells).reshape(inputs.images[0].grid).tolist() if inputs.images else []
    yield _result({**about, "scores": row.tolist(), "attention": grid, "image_share": float(np.sum(cells))})


def attribution(model: VLM, question: ask.Attribution, images: Images) -> Iterator[Event]:
    """Which parts of the image made a target."""
    inputs = prepare(model, question, images)
    if question.against and not question.target:
        raise InvalidInputError("a difference needs both tokens: name the target too.", field="target")
    target: Any = (question.target, question.against) if question.against else question.target or None
    yield _step(question.method.replace("_", " "))
    why = model.attribute(inputs, question.method, target)
    heads = None if why.head_scores is None else to_numpy(why.head_scores)[0]
    mlps = None if why.mlp_scores is None else to_numpy(why.mlp_scores)[0]
    numbers = {name: _number(to_numpy(getattr(why, name))[0]) for name in ("target_value", "total", "residual")}
    yield _result(
        {
            "method": why.method,
            "target": why.target_tokens[0],
            **numbers,
            "steps": why.steps,
            "scores": _numbers(to_numpy(why.scores)[0]),
            "heads": None if heads is None else _numbers(heads),
            "mlps": None if mlps is None else _numbers(mlps),
            "embed": None if why.embed_score is None else _number(to_numpy(why.embed_score)[0]),
            "bias": None if why.bias is None else _number(to_numpy(why.bias)[0]),
            "prompt": describe(inputs),
        }
    )


def logit_lens(model: VLM, question: ask.Lens, images: Images, keep: Callable[[LogitLens], str]) -> Iterator[Event]:
    """What each layer would answer.

    Args:
        model: The model.
        question: What is asked.
        images: The images by name.
        keep: Keeps a lens, and gives the address of its page.
    """
    inputs = prepare(model, question, images)
    yield _step("reading every layer")
    lens = model.logit_lens(inputs, top_k=question.top_k, hook=question.hook)
    yield _step("writing the page")
    found: dict[str, Any] = {"page": keep(lens), "hook": lens.hook, "layers": lens.layers, "prompt": describe(inputs)}
    if not question.page:
        probs, entropy = to_numpy(lens.probs)[:, 0], to_numpy(lens.entropy)[:, 0]
        found["readings"] = [
            [_choices(lens.tokens[i][0][p], probs[i, p]) for p in range(probs.shape[1])] for i in range(len(probs))
        ]
        found["entropy"] = _numbers(entropy)
    yield _result(found)


def patching(model: VLM, question: ask.Patching, images: Images) -> Iterator[Event]:
    """A sweep of activation patching, a layer at a time."""
    clean, corrupted = prepare(model, question, images), prepare(model, question.corrupted, images)
    block = "lm.blocks.{layer}."
    name = "attn.hook_z" if question.over == "heads" else question.hook
    spec = next((each for each in model.hooks() if each.name == block + name), None)
    if spec is None:
        raise InvalidInputError(f"a decoder block has no {name!r} that can be patched.", field="hook")
    layers = list(spec.layers)
    heads = "all" if question.over == "heads" else None
    positions = question.over if question.over in ("image", "text") else None
    rows, sweep = [], None
    for done, layer in enumerate(layers, 1):
        sweep = model.patch_sweep(
            clean, corrupted, f"lm.blocks.{layer}.{name}", positions, question.target or None, question.mode,
            heads=heads,
        )  # fmt: skip
        rows.append(_numbers(to_numpy(sweep.normalized)[0]))
        about = {"columns": sweep.columns, "labels": sweep.labels, "axis": sweep.axis}
        yield {"type": "row", "done": done, "total": len(layers), "layer": layer, "values": rows[-1], **about}
    assert sweep is not None
    yield _result(
        {
            "hook": name,
            "mode": sweep.mode,
            "layers": layers,
            **about,
            "values": rows,
            "clean_value": _number(sweep.clean_value),
            "corrupted_value": _number(sweep.corrupted_value),
            "target": sweep.target_tokens,
            "prompt": describe(clean),
            "corrupted_prompt": describe(corrupted),
        }
    )


def _result(data: dict[str, Any]) -> Event:
    return {"type": "result", "data": data}


def _step(what: str) -> Event:
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
