"""What looking inside costs, as ratios against named references in the same run: `make bench`.

The model is random, of about 100 million parameters (24 layers of width 512), on the CPU; the server is another process
on this machine. Each round takes the candidates in another order; a candidate's ratio is the median of its ratios to
the reference of the same round: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
import vlm_spectra as vs
from served import served

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8}
POST, PATTERN = "lm.blocks.*.hook_resid_post", "lm.blocks.*.attn.hook_pattern"
PROMPT = "one two three four five six seven eight nine ten " * 40


def timed(
    candidates: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round by a clock, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name in random.sample(list(candidates), len(candidates)):
            begun = clock()
            candidates[name]()
            if number:
                times[name].append(clock() - begun)
    return times


def capture(model: vs.VLM, inputs: vs.Inputs, hooks: str, **selection: object) -> vs.ActivationCache:
    """A forward pass with captures, to the caller's arrays."""
    with model.run_with_cache(hooks, **selection) as cache:
        model.forward(inputs, logits_to_keep=1)
    return cache


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with served(SHAPE) as (address, directory), vs.connect(address) as remote:
        plain = transformers.AutoModelForImageTextToText.from_pretrained(directory).eval().requires_grad_(False)
        hooked = vs.HookedVLM.from_pretrained(str(directory), device="cpu")
        measure(plain, hooked, remote, rounds)


def measure(plain: torch.nn.Module, hooked: vs.HookedVLM, remote: vs.RemoteVLM, rounds: int) -> None:
    """The table."""
    inputs = hooked.prepare_messages(PROMPT)
    far = remote.prepare_messages(PROMPT)

    def reference(**extra: object) -> None:
        with torch.no_grad():
            plain(**inputs.tensors, use_cache=False, logits_to_keep=1, **extra)

    names = {
        "plain transformers forward (reference)": reference,
        "transformers, output_hidden_states": lambda: reference(output_hidden_states=True),
        "HookedVLM, no capture": lambda: hooked.forward(inputs, 1),
        "HookedVLM, all resid_post": lambda: capture(hooked, inputs, POST),
        "HookedVLM, last token's patterns": lambda: capture(hooked, inputs, PATTERN, positions="last"),
        "RemoteVLM, no capture": lambda: remote.forward(far, 1).logits,
        "RemoteVLM, all resid_post": lambda: capture(remote, far, POST),
        "RemoteVLM, last token's patterns": lambda: capture(remote, far, PATTERN, positions="last"),
    }
    found = timed(names, rounds)
    size = capture(remote, far, POST).nbytes / 1e6
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {hooked.info.parameters / 1e6:.0f} M parameters, "
        f"{inputs.input_ids.shape[1]} tokens, resid_post {size:.1f} MB; medians of {rounds}"
    )
    print("| | ms | ratio | middle half |")
    print("|---|---:|---:|---:|")
    base = found["plain transformers forward (reference)"]
    for name, seconds in found.items():
        ratios = [mine / reference for mine, reference in zip(seconds, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {statistics.median(seconds) * 1e3:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
