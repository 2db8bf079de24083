"""Signals to a server: what it waits for, what a second one does, and one that comes while it is loading."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import vlm_spectra as vs
from conftest import stop_server
from soak.watch import arguments
from sockets import descendants
from vlm_spectra import errors

SERVE = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port", "0", "--device", "cpu"]


def eventually(found, seconds=120.0):
    """What `found` returns, once that is something."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


def test_a_second_signal_ends_the_waiting():
    """With ten minutes to wait the log says again and again for whom; after the second signal nobody is waited for."""
    command = [*SERVE, "--grace", "600", "--log-format", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip().rsplit(" ", 1)[1]
        with vs.connect(address, arrays="numpy", retries=0) as model:
            inputs = model.prepare_messages("Tell me a long story")
            tokens = model.stream(inputs, max_new_tokens=1900, do_sample=True, seed=1, temperature=20.0)
            next(tokens)
            process.terminate()
            assert "waiting up to 600 s for: " in process.stdout.readline()
            lines = (json.loads(line)["message"] for line in process.stderr)
            assert "Generate of" in next(line for line in lines if line.startswith("waiting since"))
            process.send_signal(signal.SIGINT)
            assert any("a second signal" in line for line in lines)
            with pytest.raises((errors.UnavailableError, errors.CancelledError)):
                for _ in tokens:
                    pass
        assert process.wait(60) == 0
    finally:
        process.stdout.close()
        process.stderr.close()
        process.kill()
        process.wait()


def test_a_signal_while_a_model_is_loading():
    """It ends well, and takes the worker with it."""
    process = subprocess.Popen(SERVE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        worker = eventually(lambda: descendants(process.pid) - {process.pid})
        stop_server(process)
        assert process.returncode == 0
        assert not any(arguments(pid) for pid in worker)
    finally:
        process.kill()
        process.wait()
