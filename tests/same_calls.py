"""What the TypeScript client's `test/calls.ts` asks for, asked by Python: the same calls, in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import vlm_spectra as vs
from vlm_spectra.arrays import to_numpy
from vlm_spectra.inputs import on_grid

POST = "lm.blocks.*.hook_resid_post"
PATTERN = "lm.blocks.*.attn.hook_pattern"

Summary = list[Any]
"""Type, shape and SHA-256 of an array."""

SCORES = {
    "scores": "scores",
    "target_ids": "target_ids",
    "target_value": "target_value",
    "total": "total",
    "heads": "head_scores",
    "mlps": "mlp_scores",
    "layers": "layer_scores",
    "embed": "embed_score",
    "bias": "bias",
    "sources": "source_scores",
    "baseline_value": "baseline_value",
}
"""The tensors of an attribution by their names on the wire, and in Python."""


def summary(array: Any) -> Summary:
    array = to_numpy(array)
    return [array.dtype.name, list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


class Expected:
    """What the calls give: arrays by name, and the rest as JSON has it.

    Args:
        model: A server's.
        first: The file of an image.
        second: The file of another.
    """

    def __init__(self, model: vs.RemoteVLM, first: Path, second: Path) -> None:
        self.model, self.files = model, (first, second)
        self.arrays: dict[str, Summary] = {}
        self.plain: dict[str, Any] = {}
        self.inputs = model.prepare_messages("Click on the red circle", first)
        self.corrupted = model.prepare_messages("Click on the red square", first)
        tasks = ["Click on the red circle", "How many widgets are there?", "Say hello"]
        self.batch = model.prepare_messages_batch(
            tasks, [first, second, None], assistant_prefill=["", "", "He"], system="Be brief."
        )
        for part in (self._described, self._captured, self._selected, self._attributed, self._changed, self._swept):
            part()
        self._streamed()
        self.plain = json.loads(json.dumps(self.plain))

    def add(self, prefix: str, found: Mapping[str, Any]) -> None:
        self.arrays.update({f"{prefix}/{name}": summary(array) for name, array in found.items()})

    def cached(self, prefix: str, hooks: Any, call: Any = None, **options: Any) -> Any:
        with self.model.run_with_cache(hooks, **options) as cache:
            answer = (call or (lambda: self.model.forward(self.inputs, None)))()
        self.add(prefix, {hook: cache[hook] for hook in cache.names})
        return answer

    def _described(self) -> None:
        model, inputs, batch, plain = self.model, self.inputs, self.batch, self.plain
        info = model.info
        plain["info"] = [info.name, info.layers, info.vocab, info.dtype, info.parameters]
        plain["hooks"] = sorted(model.catalogue.by_name)
        plain["ids"] = [inputs.input_ids.tolist(), batch.input_ids.tolist(), batch.attention_mask.tolist()]
        plain["labels"] = [inputs.token_labels, batch.token_labels, batch.text]
        plain["layouts"] = [
            [i.row, i.original_size, i.processed_size, i.grid, i.positions, i.patch_grids] for i in batch.images
        ]
        plain["texts"] = model._texts([5, 6])
        (width, height), token = inputs.images[0].original_size, inputs.images[0].tokens()
        overlaps = inputs.tokens_in((10, 20, 40, 30))
        plain["overlaps"] = [[o.position, o.tile, o.row, o.column, o.fraction] for o in overlaps]
        plain["looked at"] = inputs.images[0].boxes_of(inputs.images[0].positions[3:5])
        plain["boxes"] = [[each.position, *each.box] for each in token]
        box = (10, 20, width / 2, height - 7)
        plain["positions"] = [inputs.positions_in(box), batch.positions_in((0, 0, 30, 30), 1, 0.5)]

    def _captured(self) -> None:
        model, plain = self.model, self.plain
        for name, each in (("one", self.inputs), ("batch", self.batch)):
            with model.run_with_cache(lambda name: True) as cache:
                output = model.forward(each)
            self.add(name, {hook: cache[hook] for hook in cache.names})
            pattern = cache["lm.blocks.1.attn.hook_pattern"][0][0][-1]
            grid = on_grid(pattern, each.images[0])
            self.add(name, {"logits": output.logits, "stack": cache.stack(POST), "grid": grid})
            vision = ("vision.blocks.1.hook_resid_post", "vision.blocks.0.attn.hook_pattern", "vision.hook_out")
            self.add(f"{name} image", {hook: cache.image(hook, len(each.images) - 1) for hook in vision})
            plain[f"image positions {name}"] = cache.image_positions()
            plain[f"names {name}"], plain[f"bytes {name}"] = cache.names, cache.nbytes
            answer = model.generate(each, max_new_tokens=6)
            self.add(f"generate {name}", {"sequences": answer.sequences, "logprobs": answer.logprobs})
            plain[f"text {name}"] = answer.text
            lens = model.logit_lens(each, top_k=3, positions="last")
            fields = ("token_ids", "logits", "probs", "entropy", "kl_to_final")
            self.add(f"lens {name}", {field: getattr(lens, field) for field in fields})
            targets = {"targetIds": lens.target_ids, "targetLogits": lens.target_logits}
            self.add(f"lens {name}", {**targets, "targetProbs": lens.target_probs, "ranks": lens.ranks})
            plain[f"lens {name}"] = [lens.tokens[0][0][0], lens.target_tokens[0][0]]
            why = model.attribute(each)
            plain[f"patches {name}"] = [why.top_patches(0, 3), len(why.tokens()), why.target_tokens]
            self.add(
                f"direct {name}",
                {"residual": why.residual, "scores": why.scores, "total": why.total, "value": why.target_value},
            )
            self.add(f"direct {name}", {"heads": why.head_scores, "mlps": why.mlp_scores, "grid": why.image_grid(0)})
            parts = {"embed": why.embed_score, "bias": why.bias, "sources": why.source_scores}
            self.add(f"direct {name}", parts)

    def _selected(self) -> None:
        model, inputs, plain = self.model, self.inputs, self.plain
        self.cached("gradient", f"{POST}_grad", backward_from=(5, 6))
        target = vs.Target(7, position=-2)
        self.cached("gradient of a target", f"{POST}_grad", backward_from=target, positions=slice(-2, None))
        answer = self.cached(
            "selected",
            [PATTERN, POST],
            lambda: model.generate(inputs, 4, do_sample=True, temperature=0.8, top_p=0.9, seed=7),
            positions="last",
            heads=[1],
            dtype="bfloat16",
        )
        self.add("selected", {"sequences": answer.sequences})
        for name, options in {
            "heads": {"reduce": "mean_heads", "positions": "image"},
            "norm": {"reduce": "norm", "dtype": "float16"},
            "packed": {},
            "text": {"positions": ["text", -1, slice(0, 4, 2)], "dtype": "float16"},
        }.items():
            hooks = PATTERN if name == "heads" else POST
            self.cached(f"reduced {name}", hooks, **options)
            estimate = model.estimate(inputs, hooks, **options)
            shapes = [[hook, list(shape)] for hook, shape in estimate.shapes.items()]
            plain[f"estimate {name}"] = [estimate.nbytes, shapes]
        output = model.forward(self.batch, [-1, -3], output_hidden_states=True, output_attentions=True)
        self.add("forward", {"logits": output.logits})
        for name, tensors in (("hidden_states", output.hidden_states), ("attentions", output.attentions)):
            self.add("forward", {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)})
        plain["top"] = [[token.text for token in place] for place in model.forward(inputs, 2).top_tokens(3)[0]]
        self.add("unembed", {"directions": model.unembed(["click", 5])})

    def _attributed(self) -> None:
        model, inputs = self.model, self.inputs
        answer = vs.Target(answer=" red")
        for name, method, options in (
            ("pair", "direct_logit", {"target": (5, 6)}),
            ("gradient", "gradient_x_input", {"target": 7, "position": -2}),
            ("answer", "gradient_x_input", {"target": answer}),
            ("integrated", "integrated_gradients", {"steps": 4, "baseline": "black"}),
            ("occlusion", "occlusion", {"window": 4, "stride": 4, "baseline": "blurred"}),
            ("rollout", "attention_rollout", {}),
            ("relevancy", "relevancy", {}),
            ("cam", "grad_cam", {}),
            ("patching", "attribution_patching", {"against": self.corrupted}),
            ("changed", "direct_logit", {}),
        ):
            with model.run_with_hooks([("lm.blocks.1.hook_mlp_out", vs.ZeroAblation())] if name == "changed" else []):
                why = model.attribute(inputs, method, **options)
            missing = bool(np.isnan(to_numpy(why.residual)[0]))
            self.plain[f"attribute {name}"] = [why.target_tokens, why.steps, missing]
            found = {wire: getattr(why, ours) for wire, ours in SCORES.items()}
            self.add(f"attribute {name}", {wire: array for wire, array in found.items() if array is not None})
        lens = model.logit_lens(
            inputs, layers=[0, -1], hook="hook_mlp_out", positions=[-1, 0], top_k=2, targets=["click", 5]
        )
        self.add("lens of targets", {"probs": lens.probs, "target_probs": lens.target_probs})

    def _changed(self) -> None:
        model, inputs = self.model, self.inputs
        with model.run_with_cache("lm.blocks.1.hook_resid_post") as held:
            model.forward(inputs, None)
        with model.run_with_cache("lm.blocks.1.attn.hook_z", positions="last", heads=[1]) as part:
            model.forward(inputs, None)
        stream, head = held["lm.blocks.1.hook_resid_post"], part["lm.blocks.1.attn.hook_z"]
        vector = np.array([np.floor(1000 * np.sin(i) + 0.5) / 1000 for i in range(model.info.hidden)], np.float32)
        mask = np.zeros(inputs.input_ids.shape[1], np.float32)
        mask[3] = -1e9
        changes: dict[str, list[Any]] = {
            "add": [("lm.blocks.2.hook_resid_post", vs.AddActivation(vector, 2.0, positions="last"))],
            "zero": [("lm.blocks.*.hook_mlp_out", vs.ZeroAblation(positions=[-1, slice(0, 3)]))],
            "scale": [("lm.blocks.1.attn.hook_pattern", vs.ScaleActivation(0.5, heads=[0]))],
            "project": [
                ("lm.blocks.*.hook_resid_pre", vs.ProjectOut(vector)),
                ("lm.blocks.1.hook_attn_out", vs.MeanAblation()),
            ],
            "mean": [("lm.blocks.2.hook_resid_post", vs.MeanAblation(stream, positions="last"))],
            "block": [("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys=[0, 1]))],
            "mask": [("lm.blocks.1.attn.hook_mask", vs.SetAttentionMask(mask, positions="last"))],
            "patch": [("lm.blocks.2.hook_resid_post", vs.PatchActivation(stream))],
            "sent": [("lm.blocks.2.hook_resid_post", vs.PatchActivation(stream))],
            "head": [("lm.blocks.2.attn.hook_z", vs.PatchHead(head, heads=[1], positions="last"))],
        }
        for name, interventions in changes.items():
            with model.run_with_hooks(interventions):
                output = model.forward(inputs, 2, output_hidden_states=True)
            self.add(f"change {name}", {"logits": output.logits, "last": output.hidden_states[-1]})
        with model.run_with_hooks(changes["add"]):
            self.add("steered", {"sequences": model.generate(inputs, 4).sequences})

    def _swept(self) -> None:
        model, inputs, corrupted, plain = self.model, self.inputs, self.corrupted, self.plain
        sweep = model.patch_sweep(inputs, corrupted, POST, positions=[-2, -1])
        self.add("sweep", {f"values.{hook}": values for hook, values in zip(sweep.hooks, sweep.values, strict=True)})
        whole = {"values": sweep.values, "effect": sweep.effect, "normalized": sweep.normalized}
        self.add("sweep as a whole", whole)
        plain["sweep"] = [sweep.hooks, sweep.columns, sweep.clean_value, sweep.corrupted_value]
        plain["sweep"] += [sweep.labels, sweep.target_tokens, sweep.top(2)]
        image = model.patch_sweep(inputs, corrupted, "lm.blocks.1.hook_resid_pre", positions="image")
        self.add("sweep of an image", {"grid": image.image_grid(0)})
        sweep = model.patch_sweep(
            inputs, corrupted, "lm.blocks.1.attn.hook_z", heads=[0, 2], metric=(5, 6), mode="noising"
        )
        self.add("sweep of heads", {f"values.{sweep.hooks[0]}": sweep.values[0]})
        plain["sweep of heads"] = [sweep.hooks, sweep.columns, sweep.start, sweep.goal, sweep.labels]
        missing: list[int] = []
        sweep = model.patch_sweep(
            inputs,
            corrupted,
            "lm.blocks.*.attn.hook_k",
            heads="all",
            on_row=lambda so_far: missing.append(int(np.isnan(to_numpy(so_far.values)).sum())),
        )
        self.add("sweep of all heads", {"values": sweep.values})
        plain["sweep of all heads"] = [sweep.columns, missing]

    def _streamed(self) -> None:
        model, inputs, plain = self.model, self.inputs, self.plain
        plain["stream"] = [[token.text, token.id] for token in model.stream(inputs, 6)]
        options = {"do_sample": True, "temperature": 1.5, "seed": 11, "stop": [")"]}
        rows = [[token.row, token.index, token.id] for token in model.stream(self.batch, 5, **options)]
        answer = model.generate(self.batch, 5, output_hidden_states=True, **options)
        plain["rows"] = sorted(rows)
        plain["clicks"] = [None if click is None else [click.x, click.y] for click in answer.clicks]
        self.add("sampled", {"sequences": answer.sequences, "last": answer.hidden_states[-1]})
        plain["phases"] = plain["costs"] = True
        plain["raised"] = [["RangeError: the caller's own"]] * 3


def compare(found: dict[str, Any], expected: Expected) -> None:
    """Every array and everything else is Python's; and every hook is among them."""
    every = {name for name, spec in expected.model.catalogue.by_name.items() if not spec.intervene_only}
    assert every == {name.removeprefix("one/") for name in expected.arrays} & every
    assert found["plain"] == expected.plain
    assert {name: found["arrays"].get(name) for name in expected.arrays} == expected.arrays
