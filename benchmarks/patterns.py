"""What the last token's attention patterns cost, of all layers and heads, against transformers' `output_attentions`.

A random Qwen2.5-VL of 12 layers and 8 heads on 2,000 tokens of text. Each candidate runs in a process of its own, so
that its peak of memory is its own, and there by turns with a plain forward pass, the reference of its time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
}
TOKENS = 2000
CANDIDATES = {
    "plain forward, SDPA (reference)": "plain",
    "transformers, eager, output_attentions": "eager",
    "HookedVLM, the last token's patterns": "hooked",
    "HookedVLM, all patterns": "all",
}


def candidate(kind: str, directory: str) -> Callable[[], object]:
    """The call to measure, its model loaded."""
    import torch
    import transformers
    import vlm_spectra as vs

    text = "one two three four five six seven eight nine ten " * (TOKENS // 10)
    hooked = vs.HookedVLM.from_pretrained(directory, device="cpu")
    inputs = hooked.prepare_messages(text)
    if kind in ("hooked", "all"):
        positions = "last" if kind == "hooked" else None

        def look() -> object:
            with hooked.run_with_cache("lm.blocks.*.attn.hook_pattern", positions=positions) as cache:
                hooked.forward(inputs, logits_to_keep=1)
            return cache

        return look
    attention = "eager" if kind == "eager" else "sdpa"
    auto = transformers.AutoModelForImageTextToText
    plain = auto.from_pretrained(directory, attn_implementation=attention).eval().requires_grad_(False)

    def forward() -> object:
        with torch.no_grad():
            return plain(**inputs.tensors, use_cache=False, logits_to_keep=1, output_attentions=kind == "eager")

    return forward


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(kind: str, directory: str, rounds: int) -> None:
    """Print seconds, those of the plain forward, and the bytes above what was there before the call."""
    plain, call = candidate("plain", directory), candidate(kind, directory)
    reference, times, peaks = [], [], []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        plain()
        reference.append(time.perf_counter() - begun)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, begun = memory("VmRSS"), time.perf_counter()
        result = call()
        times.append(time.perf_counter() - begun)
        peaks.append(memory("VmHWM") - before)
        del result
    print(json.dumps([statistics.median(times[1:]), statistics.median(reference[1:]), max(peaks)]))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.rounds)
        return
    from vlm_spectra_server.spectra_tiny.parts import write_random

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = write_random(Path(folder) / "model", text=SHAPE)
        for name, kind in CANDIDATES.items():
            command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--measure", kind, str(directory)]
            found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    least = next(iter(found.values()))[2]
    print("| | ms | ratio | peak memory of a call, MB | above the plain forward, MB |\n|---|---:|---:|---:|---:|")
    for name, (seconds, reference, peak) in found.items():
        above = (peak - least) / 1e6
        print(f"| {name} | {seconds * 1e3:.0f} | {seconds / reference:.2f} | {peak / 1e6:.0f} | {above:.0f} |")


if __name__ == "__main__":
    main()
