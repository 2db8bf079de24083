"""What a logit lens costs beside the loop that notebooks have for it: every layer and position by itself.

The model is random, 6 layers of width 256 with a vocabulary of 152,064, on the CPU; the lens reads all layers at 1,000
positions. The reference reads some of the positions one by one, and its time is scaled up; both give the five most
probable tokens with their texts, the rank of the answer, its probability and the entropy. Memory is the process's peak
over what it holds after a forward pass, in a process of its own (Linux).

    python benchmarks/lens.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import vlm_spectra as vs
from vlm_spectra_server.spectra_tiny.parts import write_random

LAYERS, WIDTH, VOCABULARY, POSITIONS, TOP = 6, 256, 152_064, 1000, 5
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def prepared(directory: str) -> tuple[vs.HookedVLM, vs.Inputs]:
    """The model and a prompt of at least as many tokens as are read."""
    model = vs.HookedVLM.from_pretrained(directory, device="cpu")
    words = 200
    while (inputs := model.prepare_messages("red circle blue button " * words)).input_ids.shape[1] < POSITIONS:
        words += 50
    return model, inputs


@torch.no_grad()
def one_by_one(model: vs.HookedVLM, inputs: vs.Inputs, positions: range) -> list[object]:
    """The reference: for each layer, for each position, a distribution, its order, its texts."""
    network, tokenizer = model.model, model.processor.tokenizer
    states = network(**inputs.tensors, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
    norm, head = network.get_decoder().norm, network.get_output_embeddings()
    readings: list[object] = []
    answers = {p: int(head(states[-1][0, p]).argmax()) for p in positions}
    for layer in range(LAYERS):
        for p in positions:
            state = states[layer + 1][0, p]
            logits = head(state if layer == LAYERS - 1 else norm(state)).float()
            probs = logits.softmax(-1)
            order = logits.argsort(descending=True)
            rank = int((order == answers[p]).nonzero())
            entropy = float(-(probs * logits.log_softmax(-1)).sum())
            texts = [tokenizer.decode([int(token)]) for token in order[:TOP]]
            readings.append((texts, rank, float(probs[answers[p]]), entropy))
    return readings


def peak() -> int:
    """The most memory this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(directory: str) -> dict[str, float]:
    """The peak with a lens over what a process that has loaded the model and run it once holds; for `--memory`."""
    model, inputs = prepared(directory)
    model.forward(inputs, 1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    lens = model.logit_lens(inputs, top_k=TOP, positions=slice(0, POSITIONS))
    assert tuple(lens.token_ids.shape) == (LAYERS, 1, POSITIONS, TOP)
    return {"before": before / 1e6, "extra": (peak() - before) / 1e6}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=25, help="positions that the reference reads")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = str(write_random(Path(folder) / "model", text=SHAPE))
        child = subprocess.run([sys.executable, __file__, "--memory", directory], stdout=subprocess.PIPE, check=True)
        found = json.loads(child.stdout)
        model, inputs = prepared(directory)
        calls: dict[str, Callable[[int], object]] = {
            "loop": lambda share: one_by_one(model, inputs, range(max(options.sample // share, 1))),
            "lens": lambda share: model.logit_lens(inputs, top_k=TOP, positions=slice(0, POSITIONS // share)),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for number in range(options.rounds + 1):
            for name, call in calls.items():
                begun = time.perf_counter(), time.process_time()
                call(1 if number else 20)
                if number:
                    times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    scaled = POSITIONS / options.sample
    loop, loop_cpu = (statistics.median(each) * scaled for each in zip(*times["loop"], strict=True))
    lens, lens_cpu = (statistics.median(each) for each in zip(*times["lens"], strict=True))
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {LAYERS} layers of width "
        f"{WIDTH}, {POSITIONS} positions, vocabulary {VOCABULARY:,}; medians of {options.rounds}"
    )
    print(f"  position by position (reference) {loop:8.1f} s ({loop_cpu:.1f} s of CPU), scaled from {options.sample}")
    print(f"  logit_lens                       {lens:8.1f} s ({lens_cpu:.1f} s of CPU)")
    print(f"  faster by                        {loop / lens:8.1f}   ({loop_cpu / lens_cpu:.1f} by CPU)")
    print(f"  memory: {found['before']:.0f} MB after a forward pass, {found['extra']:.0f} MB more with the lens")


if __name__ == "__main__":
    main()
