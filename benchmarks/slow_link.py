"""Fewer bytes first: what to ask for through a slow link, 100 Mbit/s and 20 ms there and back.

A random Qwen2.5-VL of 12 layers and 8 heads on 1,000 tokens; the forward pass is part of every time. All patterns are
384 MB; the last token's rows are what most questions need.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("TQDM_DISABLE", "1")

import vlm_spectra as vs
from link import Link
from served import served

SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 8}
PROMPT = "one two three four five six seven eight nine ten " * 100
PATTERN, POST = "lm.blocks.*.attn.hook_pattern", "lm.blocks.*.hook_resid_post"
CANDIDATES = {
    "all patterns (reference)": (PATTERN, {"compression": "none"}),
    "all patterns, zstd": (PATTERN, {"compression": "zstd"}),
    "patterns, mean over heads": (PATTERN, {"reduce": "mean_heads", "compression": "none"}),
    "the last token's patterns": (PATTERN, {"positions": "last", "compression": "none"}),
    "all residual streams": (POST, {"compression": "none"}),
    "all residual streams, zstd": (POST, {"compression": "zstd"}),
    "all residual streams, as it chooses": (POST, {"compression": "auto"}),
    "all residual streams, bfloat16": (POST, {"dtype": "bfloat16", "compression": "none"}),
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=100, help="Mbit/s")
    parser.add_argument("--delay", type=float, default=20, help="milliseconds, there and back")
    arguments = parser.parse_args()
    with served(SHAPE) as (address, _):
        link = Link(address, arguments.rate * 1e6 / 8, arguments.delay / 2e3)
        with vs.connect(link.address, shared_memory=False) as model:
            measure(model, link, arguments.rounds)


def measure(model: vs.RemoteVLM, link: Link, rounds: int) -> None:
    """The table."""
    inputs = model.prepare_messages(PROMPT)
    model.forward(inputs, 1)
    print(f"{inputs.input_ids.shape[1]} tokens, {link.rate * 8 / 1e6:.0f} Mbit/s, {link.delay * 2e3:.0f} ms")
    print("| | s | ratio | MB over the link |")
    print("|---|---:|---:|---:|")
    base = 0.0
    for name, (hooks, selection) in CANDIDATES.items():
        times, before = [], link.carried
        for _ in range(rounds):
            begun = time.perf_counter()
            with model.run_with_cache(hooks, **selection):
                model.forward(inputs, logits_to_keep=None)
            times.append(time.perf_counter() - begun)
        seconds = statistics.median(times)
        base = base or seconds
        print(f"| {name} | {seconds:.2f} | {seconds / base:.3f} | {(link.carried - before) / rounds / 1e6:.1f} |")


if __name__ == "__main__":
    main()
