"""Many clients of one server: what one that reads slowly costs the others.

Nine clients ask for the last token's patterns in turn; a tenth reads a capture of all residual streams, 60 MB, through
a link that lets 1 MB/s pass. Compared are the nine's latencies with and without it, in alternating rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from contextlib import ExitStack, suppress

os.environ.setdefault("TQDM_DISABLE", "1")
import vlm_spectra as vs
from link import Link
from served import served
from vlm_spectra.errors import CancelledError

SHAPE = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8}
SLOW = [f"lm.blocks.*.hook_resid_{name}" for name in ("pre", "mid", "post")]
PROMPT = "one two three four five six seven eight nine ten " * 60


def latencies(models: list[vs.RemoteVLM], inputs: vs.Inputs, times: int) -> list[float]:
    """Seconds of each client's requests, all clients at once."""
    found: list[float] = []

    def ask(model: vs.RemoteVLM) -> None:
        for _ in range(times):
            begun = time.perf_counter()
            with model.run_with_cache("lm.blocks.*.attn.hook_pattern", positions="last"):
                model.forward(inputs, logits_to_keep=None)
            found.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=ask, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=4, help="requests a client and round")
    arguments = parser.parse_args()
    with served(SHAPE) as (address, _):
        measure(address, arguments.rounds, arguments.times)


def measure(address: str, rounds: int, times: int) -> None:
    """The table."""
    models = [vs.connect(address, arrays="numpy") for _ in range(9)]
    inputs = models[0].prepare_messages(PROMPT)
    found: dict[bool, list[float]] = {False: [], True: []}
    latencies(models, inputs, 1)
    for _ in range(rounds):
        found[False] += latencies(models, inputs, times)
        with ExitStack() as stack:
            slow = stack.enter_context(vs.connect(Link(address, 1e6).address, shared_memory=False))
            stack.enter_context(suppress(CancelledError))
            cache = stack.enter_context(slow.run_with_cache(SLOW, compression="none"))
            slow.forward(inputs, logits_to_keep=None)
            found[True] += latencies(models, inputs, times)
            assert len(cache) < 48, "the slow client was not slow"
            raise CancelledError("enough of it")
    base = statistics.median(found[False])
    print("| nine clients' median latency | ms | ratio |\n|---|---:|---:|")
    for slow_one, each in found.items():
        name = "and a tenth that reads 1 MB/s" if slow_one else "alone (reference)"
        print(f"| {name} | {statistics.median(each) * 1e3:.0f} | {statistics.median(each) / base:.2f} |")


if __name__ == "__main__":
    main()
