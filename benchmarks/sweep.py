"""What a sweep of activation patching costs against the same cells as single calls, over the wire, in one run.

The model is random (6 layers of width 192, a vision tower of 4 layers), on the CPU; the server is another process on
this machine. A sweep of 6 layers by about 100 positions is run whole; of the single calls a sample is timed, for there
are hundreds, and its mean is multiplied.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import vlm_spectra as vs
from PIL import Image, ImageDraw
from served import served

HOOK = "lm.blocks.*.hook_resid_pre"


def screen(colour: str) -> Image.Image:
    """A page with a disc, 64 image tokens."""
    image = Image.new("RGB", (224, 224), (40, 70, 120))
    ImageDraw.Draw(image).ellipse((60, 60, 160, 160), fill=colour)
    return image


class Counted:
    """A stream of answers whose bytes are counted."""

    def __init__(self, call: Any, sizes: list[int]) -> None:
        self.call, self.sizes = call, sizes

    def __iter__(self) -> Iterator[Any]:
        for message in self.call:
            self.sizes.append(len(message))
            yield message

    def cancel(self) -> None:
        """Give up."""
        self.call.cancel()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=24, help="single calls to time")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with served({"num_hidden_layers": 6}) as (address, _), vs.connect(address) as model:
        measure(model, options.sample, options.rounds)


def measure(model: vs.RemoteVLM, sample: int, rounds: int) -> None:
    """The figures."""
    task = "Click on the circle that has this colour, and then say which colour it is, please and thank you"
    clean, corrupted = (model.prepare_messages(task, screen(colour)) for colour in ("red", "blue"))
    length = min(clean.input_ids.shape[1], 100)
    positions = list(range(clean.input_ids.shape[1] - length, clean.input_ids.shape[1]))
    cells = model.info.layers * length
    sizes: list[int] = []
    call = model._call
    whole, single = [], []
    with model.run_with_cache(HOOK) as cache:
        output = model.forward(clean, 1)
    token = int(output.logits[0, 0].argmax())
    for _ in range(rounds):
        sizes.clear()
        model._call = lambda *arguments: Counted(call(*arguments), sizes)  # type: ignore[method-assign]
        begun = time.perf_counter()
        sweep = model.patch_sweep(clean, corrupted, HOOK, positions, metric=token)
        whole.append(time.perf_counter() - begun)
        model._call = call  # type: ignore[method-assign]
        begun, worst = time.perf_counter(), 0.0
        for number in range(sample):
            row, column = divmod(number * cells // sample, length)
            hook, position = sweep.hooks[row], positions[column]
            patch = vs.PatchActivation(cache[hook][:, [position]], positions=position)
            with model.run_with_hooks([(hook, patch)]):
                value = float(model.forward(corrupted, 1).logits[0, 0, token])
            worst = max(worst, abs(value - float(sweep.values[row, column])))
        single.append((time.perf_counter() - begun) / sample)
    ours, theirs = statistics.median(whole), statistics.median(single) * cells
    size = model.info.parameters / 1e6
    print(
        f"{model.info.layers} layers by {length} positions: {cells} cells, {size:.1f} M parameters; medians of {rounds}"
    )
    print(f"  sweep             {ours:8.2f} s, {sum(sizes) / 1e3:.1f} kB to the client")
    print(f"  single calls      {theirs:8.2f} s ({sample} timed), {theirs / ours:.1f}x the sweep's time")
    print(f"  largest difference of a cell {worst:.1e}")


if __name__ == "__main__":
    main()
