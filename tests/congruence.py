"""The calls of the contract suite: a model and two pictures to arrays and texts that must be the same on every kind of
model, bit for bit. Imports nothing that a laptop lacks."""

from __future__ import annotations

import numpy as np
import vlm_spectra as vs
from vlm_spectra.arrays import to_numpy
from vlm_spectra.inputs import layout_to_json

POST = "lm.blocks.2.hook_resid_post"


def _prompt(model, first, second):
    return model.prepare_messages("Click on the red circle", first)


def _batch(model, first, second):
    tasks = ["Click on the red circle", "How many widgets are there on this screen?", "Say hello"]
    return model.prepare_messages_batch(tasks, [first, second, None])


def _two_images(model, first, second):
    return model.prepare_messages("What has changed?", [first, second])


def _text_only(model, first, second):
    return model.prepare_messages("Say hello")


PROMPTS = {"one image": _prompt, "batch of three": _batch, "two images": _two_images, "text only": _text_only}


def _interventions(model) -> dict[str, list]:
    width, head_dim, heads = model.info.hidden, model.info.head_dim, model.info.heads
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(width).astype(np.float32)
    z = "lm.blocks.1.attn.hook_z"
    mask = "lm.blocks.*.attn.hook_mask"
    return {
        "PatchActivation": [(POST, vs.PatchActivation(vector, positions="last"))],
        "ZeroAblation": [("lm.blocks.*.hook_mlp_out", vs.ZeroAblation(positions=[-1, -2]))],
        "MeanAblation": [("lm.blocks.1.hook_attn_out", vs.MeanAblation())],
        "AddActivation": [(POST, vs.AddActivation(vector, 2.0))],
        "ScaleActivation": [("lm.blocks.0.hook_resid_mid", vs.ScaleActivation(0.5, positions="text"))],
        "ProjectOut": [("lm.blocks.*.hook_resid_pre", vs.ProjectOut(vector))],
        "PatchHead": [(z, vs.PatchHead(rng.standard_normal((1, head_dim)).astype(np.float32), heads=[heads - 1]))],
        "BlockAttention": [(mask, vs.BlockAttention(positions="last", keys=[0, 1], heads=[0, 1]))],
        "SetAttentionMask": [(mask, vs.SetAttentionMask(np.True_, positions="last"))],
        "pattern": [("lm.blocks.1.attn.hook_pattern", vs.ScaleActivation(0.5, heads=[0]))],
        "vision": [
            ("vision.blocks.0.hook_resid_post", vs.ScaleActivation(0.5)),
            ("vision.hook_out", vs.MeanAblation()),
        ],
    }


def _arrays(prefix: str, mapping) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": to_numpy(value) for name, value in mapping.items()}


def _wanted(inputs, name) -> bool:
    """Every hook; those of the tower where there is an image, its patterns, which are large, of one layer."""
    if not name.startswith("vision."):
        return True
    return bool(inputs.images) and (".blocks.1." in name or not name.endswith(("hook_scores", "hook_pattern")))


def _changed(inputs, name) -> bool:
    """What shows an intervention at work."""
    shows = ".hook_resid" in name or name.endswith(("hook_pattern", "hook_z", "hook_out"))
    return shows and _wanted(inputs, name)


def _forward(model, inputs, prefix, wanted=_wanted) -> dict[str, np.ndarray]:
    with model.run_with_cache(lambda name: wanted(inputs, name)) as cache:
        output = model.forward(inputs, output_hidden_states=True, output_attentions=True)
    found = _arrays(prefix, {name: cache[name] for name in cache.names})
    found |= _arrays(prefix, {"logits": output.logits, "input_ids": inputs.input_ids, "mask": inputs.attention_mask})
    for name in ("hidden_states", "attentions"):
        found |= _arrays(prefix, {f"{name}.{i}": each for i, each in enumerate(getattr(output, name))})
    return found


def collect(model, first, second) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """All results of all calls: arrays, and what compares by equality."""
    found: dict[str, np.ndarray] = {}
    plain: dict[str, object] = {"hooks": [repr(hook) for hook in model.hooks()]}
    for name, make in PROMPTS.items():
        inputs = make(model, first, second)
        plain[f"inputs {name}"] = [inputs.token_labels, [layout_to_json(image) for image in inputs.images], inputs.text]
        found |= _forward(model, inputs, name)
        answer = model.generate(inputs, max_new_tokens=6)
        found |= _arrays(f"generate {name}", {"sequences": answer.sequences, "logprobs": answer.logprobs})
        plain[f"generate {name}"] = [answer.text, [repr(click) for click in answer.clicks]]
        lens = model.logit_lens(inputs, top_k=3, positions="last", targets=None)
        for field in ("token_ids", "logits", "probs", "entropy", "kl_to_final", "target_ids", "target_logits", "ranks"):
            found |= _arrays(f"lens {name}", {field: getattr(lens, field)})
        plain[f"lens {name}"] = [lens.tokens, lens.target_tokens, lens.positions, lens.layers]
        for method in ("direct_logit", "gradient_x_input"):
            why = model.attribute(inputs, method)
            found |= _arrays(f"{method} {name}", {"scores": why.scores, "total": why.total, "value": why.target_value})
            plain[f"{method} {name}"] = why.target_tokens
    inputs = _prompt(model, first, second)
    for name, hooks in _interventions(model).items():
        with model.run_with_hooks(hooks):
            found |= _forward(model, inputs, name, _changed)
    with model.run_with_cache(
        ["lm.blocks.*.attn.hook_pattern", POST], positions="last", heads=[1], dtype="bfloat16"
    ) as cut:
        answer = model.generate(inputs, max_new_tokens=4, do_sample=True, temperature=0.8, top_p=0.9, seed=7)
    found |= _arrays("selected", {name: cut[name] for name in cut.names} | {"sequences": answer.sequences})
    plain["selected"] = [cut.context.positions, cut.context.token_labels, answer.text]
    why = model.attribute(inputs, "integrated_gradients", target=("click", 5), steps=4)
    found |= _arrays("integrated", {"scores": why.scores, "total": why.total, "baseline": why.baseline_value})
    found["unembed"] = to_numpy(model.unembed(["click", 5]))
    plain["stream"] = [[token.text, token.id] for token in model.stream(inputs, max_new_tokens=6)]
    plain["top"] = [[t.text for t in place] for place in model.forward(inputs, 2).top_tokens(3)[0]]
    return found, plain
