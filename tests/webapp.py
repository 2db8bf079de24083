"""The web app in a process of its own, for the tests of its REST interface and of its page."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
from typing import IO, Any


def start_web(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The app, and its address once it listens."""
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "web", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, address_of(process.stdout)


def address_of(output: IO[str] | Any) -> str:
    """The page's address, as the command says it."""
    line = output.readline()
    assert "the page is at http" in line, f"the app said {line!r}"
    return line.strip().rsplit(" ", 1)[1]


def free_port() -> int:
    """A port that nothing listens on, none of those that the kernel gives away by itself (from 32768 on)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return port
