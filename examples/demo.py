"""A look inside a model that a server in another process holds: `make demo`, or `python examples/demo.py`."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import vlm_spectra as vs
from PIL import Image
from vlm_spectra.pictures.markup import write_page
from vlm_spectra.pictures.report import report_page

SCREENSHOT = Path(__file__).with_name("screenshot.png")
REPORT = Path("demo.report.html")
TASK = "Click on the Login button"
HOOKS = ["lm.blocks.*.attn.hook_pattern", "lm.blocks.*.hook_resid_post", "lm.blocks.*.mlp.hook_out"]


def main() -> int:
    """Serve, connect, look."""
    try:
        title("Server")
        with served("spectra-tiny") as address, vs.connect(address) as model:
            look(model)
    except vs.SpectraError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def look(model: vs.VLM) -> None:
    """The tour. It works on a model in process as well."""
    info = model.info
    print(f"  {info.name}: {info.family}, {info.layers} layers, {info.heads} heads, {info.parameters / 1e6:.1f} M")
    print(f"  parameters in {info.dtype} on {info.device}")

    title("Question and answer")
    image = Image.open(SCREENSHOT)
    answer = model.generate(model.prepare_messages(TASK, image), max_new_tokens=64)
    text, click = answer.text[0], answer.clicks[0]
    print(f"  {SCREENSHOT.name}, {image.width} x {image.height} pixels: {TASK}")
    print("".join(f"  > {line}\n" for line in text.splitlines()), end="")
    where = f"({click.x:.0f}, {click.y:.0f}), in pixels of the screenshot" if click else "none in this answer"
    print(f"  click: {where}")

    # From here on, stop the answer just before its first number: what does the model look at to write it?
    start, bracket, _ = text.partition("(")
    start, bracket, _ = text.partition("start_box='(") if "start_box='(" in text else (start, bracket, "")
    inputs = model.prepare_messages(TASK, image, assistant_prefill=start + bracket if bracket else "")

    title("What was cached")
    began = time.perf_counter()
    with model.run_with_cache(HOOKS) as cache:
        model.forward(inputs, logits_to_keep=1)
    seconds = time.perf_counter() - began
    rows = cache.summary()
    for name, shape, dtype, tensors, size in rows:
        print(f"  {name:32} {tensors} x [{shape.replace('x', ' x ')}] {dtype:8} {size:>10,} bytes")
    print(f"  {len(cache)} tensors, {cache.nbytes:,} bytes, {seconds:.2f} s from request to last byte")

    title("Logit lens: what each layer would write after " + repr(("..." + (start + bracket)[-18:]) if bracket else ""))
    lens = model.logit_lens(inputs, top_k=4, positions="last")
    for i, layer in enumerate(lens.layers):
        readings = zip(lens.tokens[i][0][-1], lens.probs[i, 0, -1].tolist(), strict=True)
        print(f"  layer {layer:2}  " + "".join(f"{token!r:>14} {prob:6.1%}" for token, prob in readings))

    patches = model.attribute(inputs, method="integrated_gradients")
    target = patches.target_tokens[0]
    title(f"The image patches that decide {target!r}, by integrated gradients")
    for row, column, score in patches.top_patches(0, k=5):
        left, top, right, bottom = inputs.images[0].box(row * inputs.images[0].grid[1] + column)
        box = f"x {left:3.0f} to {right:3.0f}, y {top:3.0f} to {bottom:3.0f}"
        print(f"  row {row:2}, column {column:2}   {box}   {score:+.4f}")

    parts = model.attribute(inputs, method="direct_logit")
    title(f"Who writes {target!r}, by direct logit attribution")
    scores = [
        (f"layer {layer} head {h}", float(s)) for layer, each in enumerate(parts.heads(0)) for h, s in enumerate(each)
    ]
    scores += [(f"layer {layer} MLP", float(s)) for layer, s in enumerate(parts.mlp_scores[0])]
    for name, score in sorted(scores, key=lambda item: -abs(item[1]))[:5]:
        print(f"  {name:14} {score:+.4f}")
    value, total = float(parts.target_value[0]), float(parts.total[0])
    print(f"  all parts add up to {total:.4f}; the logit is {value:.4f}")

    page = report_page(
        answer,
        cache=cache,
        seconds=seconds,
        lens=lens,
        attributions=[patches, parts],
        title=f"{info.name}: a look inside",
    )
    write_page(REPORT, page)
    print(f"\nThe report, one HTML file: {REPORT.resolve()}")


@contextlib.contextmanager
def served(name: str, patience: float = 180) -> Iterator[str]:
    """A server in its own process; its address."""
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--model", name, "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            address = wait_for_address(process.stdout, began + patience)
            if address is None:
                log.seek(0)
                sys.stderr.write(log.read())
                raise vs.SpectraError("the server did not start; its log stands above.")
            print(f"  {address}, process {process.pid}, ready after {time.perf_counter() - began:.1f} s")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_address(stdout: IO[str], deadline: float) -> str | None:
    """What the server prints once its model is ready; None where it ends or takes too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (left := deadline - time.perf_counter()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            break
        if line is None:
            break
        if ": serving " in line:
            return line.split()[-1]
    return None


def title(text: str) -> None:
    """A headline."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
