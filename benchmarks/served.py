"""A server of a random model, as a process of its own, for a benchmark."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vlm_spectra_server.spectra_tiny.parts import write_random


@contextmanager
def served(shape: Mapping[str, int]) -> Iterator[tuple[str, Path]]:
    """A random Qwen2.5-VL of a shape, served on the CPU: the server's address, and where the checkpoint lies."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_random(Path(folder) / "model", text=dict(shape))
        command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port", "0", "--model", str(directory)]
        server = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip().rsplit(" ", 1)[1], directory
        finally:
            server.terminate()
            server.wait()
