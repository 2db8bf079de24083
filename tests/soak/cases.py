"""Calls with known answers: each is a function of a model, in process or remote, and says what came out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import vlm_spectra as vs
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from vlm_spectra.arrays import to_numpy

POST = "lm.blocks.*.hook_resid_post"
PATTERN = "lm.blocks.*.attn.hook_pattern"
PROMPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("Say hello", ()),
    "screen": ("Click on the red circle", ("screen",)),
    "photo": ("How many widgets are there?", ("photo",)),
    "both": ("What is different?", ("screen", "photo")),
}
"""Tasks and the names of their pictures, by name."""

Picture = Callable[[str], bytes]
"""The file of a picture, by its name."""
Ask = Callable[[Any, Picture], Mapping[str, Any]]
"""A call: what came out of it, by name: arrays, texts, numbers, and lists of them."""


@dataclass(frozen=True)
class Case:
    """A call with a known answer.

    Attributes:
        kind: What it is about; the first part of its name.
        weight: How often it is made, beside the others.
        ask: The call.
    """

    kind: str
    weight: float
    ask: Ask


@lru_cache
def _drawn(name: str) -> Image.Image:
    if name == "photo":
        grey = Image.radial_gradient("L").resize((180, 240))
        return Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    image = Image.new("RGB", (224, 160), (235, 235, 238))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 80, 90), fill=(215, 40, 40))
    draw.rectangle((120, 80, 190, 110), fill=(40, 90, 215))
    return image


def picture(name: str, salt: str = "") -> bytes:
    """A picture as a PNG file. With a salt the same pixels are another file, which no server has seen."""
    info, buffer = PngInfo(), io.BytesIO()
    if salt:
        info.add_text("salt", salt)
    _drawn(name).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def prepared(model: Any, prompt: str, picture: Picture) -> vs.Inputs:
    """The inputs of one of the prompts."""
    task, names = PROMPTS[prompt]
    return model.prepare_messages(task, [picture(name) for name in names] or None)


def digest(result: Mapping[str, Any]) -> str:
    """A fingerprint of what came out, to the last bit."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Mapping):
            for name in sorted(part):
                found.update(name.encode())
                add(part[name])
        elif isinstance(part, list | tuple):
            found.update(f"[{len(part)}".encode())
            for each in part:
                add(each)
        elif hasattr(part, "shape"):
            array = np.ascontiguousarray(to_numpy(part))
            found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            found.update(repr(part).encode())

    add(result)
    return found.hexdigest()


def _prepare(prompt: str) -> Ask:
    def ask(model: Any, picture: Picture) -> Mapping[str, Any]:
        return _inputs(prepared(model, prompt, picture))

    return ask


def _batch(model: Any, picture: Picture) -> Mapping[str, Any]:
    tasks = ["Say hello", "Click on the red circle"]
    inputs = model.prepare_messages_batch(tasks, [None, picture("screen")])
    return {**_inputs(inputs), "logits": model.forward_batch(inputs, logits_to_keep=1).logits}


def _inputs(inputs: vs.Inputs) -> Mapping[str, Any]:
    return {"ids": inputs.input_ids, "mask": inputs.attention_mask, "labels": inputs.token_labels, "text": inputs.text}


def _generate(prompt: str, **options: Any) -> Ask:
    def ask(model: Any, picture: Picture) -> Mapping[str, Any]:
        answer = model.generate(prepared(model, prompt, picture), **options)
        hidden = list(answer.hidden_states) if options.get("output_hidden_states") else []
        return {"ids": answer.sequences, "text": answer.text, "logprobs": answer.logprobs, "hidden": hidden}

    return ask


STREAM: dict[str, Any] = {"max_new_tokens": 48, "do_sample": True, "seed": 3, "temperature": 5.0}
"""A stream long enough to be left."""


def streamed(model: Any, picture: Picture, most: int = 1 << 30) -> list[list[Any]]:
    """The first tokens of a stream."""
    found: list[list[Any]] = []
    tokens = model.stream(prepared(model, "screen", picture), **STREAM)
    for token in tokens:
        found.append([token.row, token.index, token.id, token.text, float(np.float32(token.logprob))])
        if len(found) == most:
            tokens.close()
            break
    return found


def _forward(prompt: str, *, interventions: Callable[[], list[Any]] = list, **options: Any) -> Ask:
    def ask(model: Any, picture: Picture) -> Mapping[str, Any]:
        inputs = prepared(model, prompt, picture)
        with model.run_with_hooks(interventions()):
            output = model.forward(inputs, **options)
        found: dict[str, Any] = {"logits": output.logits}
        for name in ("hidden_states", "attentions"):
            if options.get(f"output_{name}"):
                found[name] = list(getattr(output, name))
        return found

    return ask


def _capture(prompt: str, hooks: str | list[str], keep: int | None = 1, **selection: Any) -> Ask:
    def ask(model: Any, picture: Picture) -> Mapping[str, Any]:
        inputs = prepared(model, prompt, picture)
        with model.run_with_cache(hooks, **selection) as cache:
            output = model.forward(inputs, logits_to_keep=keep)
        found = {name: cache[name] for name in cache.names}
        return {"names": cache.names, **found} | ({} if keep is None else {"logits": output.logits})

    return ask


def _capture_answer(model: Any, picture: Picture) -> Mapping[str, Any]:
    inputs = prepared(model, "screen", picture)
    with model.run_with_cache(POST, positions=[0, -1]) as cache:
        answer = model.generate(inputs, max_new_tokens=4)
    return {name: cache[name] for name in cache.names} | {"ids": answer.sequences}


def _reference(model: Any, picture: Picture) -> Mapping[str, Any]:
    """A patch whose tensor is named, not sent: the activation of a capture that the server holds."""
    inputs, name = prepared(model, "screen", picture), "lm.blocks.2.hook_resid_post"
    with model.run_with_cache(name) as cache:
        model.forward(inputs, logits_to_keep=None)
    patch = (name, vs.PatchActivation(cache.reference(name)))
    with model.run_with_hooks([("lm.blocks.0.hook_resid_post", vs.ZeroAblation()), patch]):
        return {"logits": model.forward(inputs, logits_to_keep=1).logits}


def _lens(prompt: str, **options: Any) -> Ask:
    def ask(model: Any, picture: Picture) -> Mapping[str, Any]:
        lens = model.logit_lens(prepared(model, prompt, picture), **options)
        return {"ids": lens.token_ids, "probs": lens.probs, "entropy": lens.entropy, "ranks": lens.ranks}

    return ask


def _attribute(method: str, **options: Any) -> Ask:
    def ask(model: Any, picture: Picture) -> Mapping[str, Any]:
        inputs = prepared(model, "screen", picture)
        against = {"against": inputs} if method == "attribution_patching" else {}
        why = model.attribute(inputs, method, **options, **against)
        return {"target": why.target_ids, "value": why.target_value, "total": why.total, "scores": why.scores}

    return ask


def _sweep(**options: Any) -> Ask:
    def ask(model: Any, picture: Picture) -> Mapping[str, Any]:
        clean, corrupted = model.prepare_messages("Say hello"), model.prepare_messages("Say horse")
        if clean.input_ids.shape != corrupted.input_ids.shape:
            corrupted = clean
        sweep = model.patch_sweep(clean, corrupted, "lm.blocks.*.attn.hook_z", metric=vs.Target(), **options)
        return {"values": sweep.values, "clean": sweep.clean_value, "corrupted": sweep.corrupted_value}

    return ask


def _estimate(model: Any, picture: Picture) -> Mapping[str, Any]:
    found = model.estimate(prepared(model, "both", picture), [POST, PATTERN], positions="image", dtype="float16")
    return {"shapes": {name: list(shape) for name, shape in found.shapes.items()}, "nbytes": found.nbytes}


def _steps(count: int) -> np.ndarray:
    return np.linspace(-1.0, 1.0, count, dtype=np.float32)


INTERVENTIONS: dict[str, Callable[[], list[Any]]] = {
    "zero": lambda: [("lm.blocks.1.hook_mlp_out", vs.ZeroAblation(positions="last"))],
    "mean": lambda: [("lm.blocks.2.hook_attn_out", vs.MeanAblation(positions="image"))],
    "scale": lambda: [(POST, vs.ScaleActivation(0.9))],
    "add": lambda: [("lm.blocks.0.hook_resid_post", vs.AddActivation(_steps(1), scale=0.5))],
    "heads": lambda: [("lm.blocks.3.attn.hook_z", vs.ZeroAblation(heads=[0, 2]))],
    "block": lambda: [("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys="image"))],
    "patch": lambda: [("lm.blocks.1.hook_resid_post", vs.PatchActivation(_steps(1), positions=[0]))],
}

CASES: dict[str, Case] = {}


def _add(kind: str, weight: float, **asks: Ask) -> None:
    for name, ask in asks.items():
        CASES[f"{kind}: {name}"] = Case(kind, weight / len(asks), ask)


_add("prepare", 3, **{name: _prepare(name) for name in PROMPTS}, batch=_batch)
_add(
    "generate",
    3,
    greedy=_generate("screen", max_new_tokens=12),
    sampled=_generate("text", max_new_tokens=8, do_sample=True, seed=7, temperature=2.0, top_p=0.9),
    stopped=_generate("photo", max_new_tokens=12, stop="e"),
    hidden=_generate("text", max_new_tokens=3, output_hidden_states=True),
    stream=lambda model, picture: {"tokens": streamed(model, picture)},
)
_add(
    "forward",
    3,
    last=_forward("screen", logits_to_keep=1),
    all=_forward("text"),
    hidden=_forward("text", logits_to_keep=1, output_hidden_states=True),
    attentions=_forward("photo", logits_to_keep=1, output_attentions=True),
)
_add(
    "capture",
    6,
    stream=_capture("screen", POST),
    both=_capture("both", [POST, "lm.blocks.*.hook_mlp_out"], keep=None),
    last=_capture("both", PATTERN, positions="last", heads=[0, 3], dtype="float16", keep=None),
    image=_capture("screen", "lm.blocks.*.attn.hook_z", positions="image"),
    picked=_capture("photo", ["lm.hook_embed", "lm.blocks.*.attn.hook_*"], positions=[0, 3, -1], keep=None),
    norm=_capture("screen", POST, reduce="norm"),
    mean=_capture("screen", PATTERN, reduce="mean_heads", dtype="bfloat16"),
    packed=_capture("screen", POST, compression="zstd"),
    vision=_capture("photo", ["vision.blocks.*.hook_resid_post", "vision.hook_out"], keep=None),
    answer=_capture_answer,
)
_add(
    "gradients",
    1,
    stream=_capture("text", "lm.blocks.*.hook_resid_post_grad", backward_from=vs.Target()),
    patterns=_capture("screen", "lm.blocks.*.attn.hook_pattern_grad", backward_from=vs.Target()),
)
_add(
    "intervention",
    3,
    **{name: _forward("screen", logits_to_keep=1, interventions=made) for name, made in INTERVENTIONS.items()},
)
_add("reference", 1, patch=_reference)
_add("lens", 2, all=_lens("text", top_k=3), some=_lens("screen", layers=[0, -1], positions="last"))
_add(
    "attribution",
    2,
    direct=_attribute("direct_logit"),
    gradient=_attribute("gradient_x_input"),
    integrated=_attribute("integrated_gradients", steps=4),
    occlusion=_attribute("occlusion", window=4),
    rollout=_attribute("attention_rollout"),
    relevancy=_attribute("relevancy"),
    grad_cam=_attribute("grad_cam"),
    patching=_attribute("attribution_patching"),
)
_add("sweep", 0.5, heads=_sweep(heads=[0, 1]), positions=_sweep(positions="last"))
_add("estimate", 1, shapes=_estimate)
_add("unembed", 1, tokens=lambda model, picture: {"directions": model.unembed([5, 6, 7])})

SECOND: dict[str, Case] = {
    "second model: capture": Case("second model", 1, _capture("text", POST)),
    "second model: forward": Case("second model", 1, _forward("text", logits_to_keep=1)),
}
"""Of a model that comes and goes."""


def expected(model: vs.VLM, second: vs.VLM) -> dict[str, Any]:
    """What must come out of every case, as fingerprints, and the tokens of the long stream."""
    found: dict[str, Any] = {name: digest(case.ask(model, picture)) for name, case in CASES.items()}
    found |= {name: digest(case.ask(second, picture)) for name, case in SECOND.items()}
    return {"digests": found, "tokens": streamed(model, picture)}
