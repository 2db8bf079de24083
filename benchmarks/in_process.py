"""What looking inside costs in process, beside transformers' own outputs and TransformerLens on the same weights.

A random Qwen2.5-VL of about 100 million parameters (24 layers of width 512), a text prompt, on the CPU. TransformerLens
is its `TransformerBridge`, which wraps the same transformers model and needs eager attention. Each round takes the
candidates in another order; a ratio is the median of the ratios of the same round. What is compared is CPU time:
machines are shared, and nothing here waits for anything but the processor.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import vlm_spectra as vs
from stream import PROMPT, SHAPE, timed
from transformer_lens.model_bridge import TransformerBridge
from vlm_spectra_server.spectra_tiny.parts import write_random

POST, PATTERN = "lm.blocks.*.hook_resid_post", "lm.blocks.*.attn.hook_pattern"
REFERENCE = "transformers"
"""Whose plain forward, with SDPA, the ratios refer to."""


def ours(model: vs.HookedVLM, inputs: vs.Inputs, hooks: Any) -> Callable[[], vs.ActivationCache]:
    """A forward pass with captures."""

    def call() -> vs.ActivationCache:
        with model.run_with_cache(hooks) as cache:
            model.forward(inputs, logits_to_keep=1)
        return cache

    return call


def theirs(
    bridge: TransformerBridge, ids: torch.Tensor, ending: str | None
) -> Callable[[], Mapping[str, torch.Tensor]]:
    """A forward pass of TransformerLens that caches the hooks with an ending, or all."""
    wanted = None if ending is None else (lambda name: name.startswith("blocks.") and name.endswith(ending))

    @torch.no_grad()
    def call() -> Mapping[str, torch.Tensor]:
        cache: Mapping[str, torch.Tensor] = bridge.run_with_cache(ids, names_filter=wanted)[1].cache_dict
        return cache

    return call


def plain(model: torch.nn.Module, inputs: Any, **extra: bool) -> Callable[[], object]:
    """A forward pass of transformers."""

    @torch.no_grad()
    def call() -> object:
        return model(**inputs.tensors, use_cache=False, logits_to_keep=1, **extra)

    return call


def in_language_model(name: str) -> bool:
    """Every hook that TransformerLens has too: not what each head wrote, which it leaves out unless asked."""
    return name.startswith("lm.") and not name.endswith("hook_head_out")


def megabytes(found: object) -> str:
    """The size of what was cached; tensors that share their memory count once."""
    values = list(found.values()) if isinstance(found, Mapping) else []
    if isinstance(found, transformers.utils.ModelOutput):
        values = [tensor for name in ("hidden_states", "attentions") for tensor in found.get(name) or ()]
    sizes = {each.untyped_storage().data_ptr(): each.nbytes for each in values if isinstance(each, torch.Tensor)}
    return f"{sum(sizes.values()) / 1e6:.0f}" if sizes else ""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        directory = str(write_random(Path(folder) / "model", text=SHAPE))
        auto = transformers.AutoModelForImageTextToText
        sdpa, eager = (
            auto.from_pretrained(directory, attn_implementation=name).eval().requires_grad_(False)
            for name in ("sdpa", "eager")
        )
        hooked = vs.HookedVLM.from_pretrained(directory, device="cpu")
        bridge = TransformerBridge.boot_transformers(
            directory, hf_model=copy.deepcopy(eager), tokenizer=hooked.processor.tokenizer, device="cpu"
        )
    inputs = hooked.prepare_messages(PROMPT)
    ids = inputs.input_ids

    @torch.no_grad()
    def bridged() -> object:
        return bridge(ids)

    candidates: dict[str, tuple[str, Callable[[], object]]] = {
        REFERENCE: (REFERENCE, plain(sdpa, inputs)),
        "transformers, `output_hidden_states`": (REFERENCE, plain(sdpa, inputs, output_hidden_states=True)),
        "transformers, eager": ("transformers, eager", plain(eager, inputs)),
        "transformers, eager, `output_attentions`": (
            "transformers, eager",
            plain(eager, inputs, output_attentions=True),
        ),
        "TransformerBridge": ("TransformerBridge", bridged),
        "TransformerBridge, all resid_post": ("TransformerBridge", theirs(bridge, ids, ".hook_resid_post")),
        "TransformerBridge, all patterns": ("TransformerBridge", theirs(bridge, ids, ".attn.hook_pattern")),
        "TransformerBridge, every hook": ("TransformerBridge", theirs(bridge, ids, None)),
        "HookedVLM": ("HookedVLM", lambda: hooked.forward(inputs, 1)),
        "HookedVLM, all resid_post": ("HookedVLM", ours(hooked, inputs, POST)),
        "HookedVLM, all patterns": ("HookedVLM", ours(hooked, inputs, PATTERN)),
        "HookedVLM, every hook but `hook_head_out`": ("HookedVLM", ours(hooked, inputs, in_language_model)),
    }
    check(hooked, bridge, inputs)
    sizes = {name: megabytes(call()) for name, (_, call) in candidates.items()}
    times = timed({name: call for name, (_, call) in candidates.items()}, rounds, time.process_time)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, transformer-lens {version('transformer-lens')}; "
        f"{hooked.info.parameters / 1e6:.0f} M parameters, {ids.shape[1]} tokens; medians of {rounds}\n"
    )
    print("| | CPU ms | over transformers | over its own forward | cached, MB |\n|---|---:|---:|---:|---:|")
    for name, (own, _) in candidates.items():
        ratios = [
            statistics.median(ours / theirs for ours, theirs in zip(times[name], times[other], strict=True))
            for other in (REFERENCE, own)
        ]
        milliseconds = statistics.median(times[name]) * 1e3
        print(f"| {name} | {milliseconds:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {sizes[name]} |")


def check(hooked: vs.HookedVLM, bridge: TransformerBridge, inputs: vs.Inputs) -> None:
    """The same is measured: both cache the same streams and patterns."""
    for ending, hooks in ((".hook_resid_post", POST), (".attn.hook_pattern", PATTERN)):
        cached, cache = theirs(bridge, inputs.input_ids, ending)(), ours(hooked, inputs, hooks)()
        assert len(cached) == len(cache)
        for layer in range(hooked.info.layers):
            expected = cached[f"blocks.{layer}{ending}"]
            error = (cache[hooks.replace("*", str(layer))] - expected).abs().max() / expected.abs().max()
            assert error <= 1e-3, f"layer {layer}{ending}: {error}"


if __name__ == "__main__":
    main()
