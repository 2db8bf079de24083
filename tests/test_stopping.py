"""Signals to a server: what it waits for, what a second one does, and one that comes while it is loading."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import grpc
import pytest
import vlm_spectra as vs
from calls import WAIT, states, until
from conftest import another_door
from grpc_health.v1 import health_pb2
from soak.watch import arguments
from sockets import descendants, ended
from vlm_spectra import errors
from webapp import free_port

STATUS = health_pb2.HealthCheckResponse
SERVE = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port", "0", "--device", "cpu"]


def serving(*flags, **options):
    """A server, and its address."""
    process = subprocess.Popen([*SERVE, *flags], stdout=subprocess.PIPE, text=True, **options)
    return process, process.stdout.readline().strip().rsplit(" ", 1)[1]


def story(model, tokens):
    """A long answer that has begun."""
    inputs = model.prepare_messages("Tell me a long story")
    answer = model.stream(inputs, max_new_tokens=tokens, do_sample=True, seed=1, temperature=20.0)
    next(answer)
    return answer


def stop_workers(process, number=signal.SIGSTOP):
    """The answers of a server are at work as long as we want."""
    for worker in descendants(process.pid) - {process.pid}:
        os.kill(worker, number)


def test_a_second_signal_ends_the_waiting():
    """With ten minutes to wait the log says again and again for whom; after the second signal nobody is waited for."""
    process, address = serving("--grace", "600", "--log-format", "json", stderr=subprocess.PIPE)
    with ended(process), vs.connect(address, arrays="numpy", retries=0) as model:
        tokens = story(model, 1900)
        stop_workers(process)
        process.terminate()
        assert "waiting up to 600 s for: " in process.stdout.readline()
        lines = (json.loads(line)["message"] for line in process.stderr)
        assert "Generate of" in next(line for line in lines if line.startswith("waiting since"))
        process.send_signal(signal.SIGINT)
        assert any("a second signal" in line for line in lines)
        stop_workers(process, signal.SIGCONT)
        with pytest.raises((errors.UnavailableError, errors.CancelledError)):
            for _ in tokens:
                pass
        assert process.wait(WAIT) == 0


def test_it_waits_no_longer_than_it_was_told():
    process, address = serving("--grace", "1")
    with ended(process), vs.connect(address, arrays="numpy", retries=0) as model:
        tokens = story(model, 1900)
        stop_workers(process)
        process.terminate()
        begun = time.monotonic()
        assert "waiting up to 1 s for: " in process.stdout.readline()
        with pytest.raises((errors.UnavailableError, errors.CancelledError)):
            for _ in tokens:
                pass
        assert process.wait(WAIT) == 0
        assert time.monotonic() - begun < 45


def test_health_says_that_it_stops():
    """As long as it waits."""
    process, address = serving("--grace", "600")
    with (
        ended(process),
        grpc.insecure_channel(address) as channel,
        vs.connect(address, arrays="numpy", retries=0) as model,
    ):
        seen = states(channel, "")
        until(lambda: seen[-1:] == [STATUS.SERVING])
        tokens = story(model, 1900)
        stop_workers(process)
        process.terminate()
        until(lambda: seen[-1] == STATUS.NOT_SERVING)
        assert process.poll() is None
        del tokens


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_waits_too(number):
    """A terminal tells each of a Ctrl-C and of its end, `timeout` and job schedulers of theirs: the worker works on."""
    process, address = serving("--grace", "600")
    with ended(process), vs.connect(address, arrays="numpy", retries=0) as model:
        tokens = story(model, 300)
        for each in descendants(process.pid):
            os.kill(each, number)
        assert len(list(tokens)) > 10
        assert process.wait(WAIT) == 0


def test_under_nohup_a_hang_up_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process, address = serving()
    finally:
        signal.signal(signal.SIGHUP, before)
    with ended(process):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)  # it would be "stopping" at once
        vs.connect(address, arrays="numpy").close()
        process.terminate()
        assert process.stdout.readline().startswith("vlm-spectra: stopping")
        assert process.wait(WAIT) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_a_model_is_loading(number):
    """It ends well, and takes the worker with it."""
    process = subprocess.Popen(SERVE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended(process):
        worker = until(lambda: descendants(process.pid) - {process.pid})
        process.send_signal(number)
        process.wait(WAIT)
        assert process.returncode == 0
        assert not any(arguments(pid) for pid in worker)


BARE = """
import sys
if "vlm_spectra_server.serving.worker" in sys.orig_argv:
    import os
    os.write(2, b"a line of a library's own\\n\\xff{\\n[1]\\n")
    sys.modules["torch"] = None
"""


def test_whatever_a_worker_writes_is_json(tmp_path):
    """Its libraries' own lines, and an exception before it has a log."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    command = [*SERVE, "--log-format", "json"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True, errors="strict"
    )
    try:
        messages = []
        while not any("ModuleNotFoundError" in message for message in messages):
            messages.append(json.loads(process.stderr.readline())["message"])
        assert "a line of a library's own" in messages
        assert "[1]" in messages
        process.terminate()
        assert process.wait(WAIT) == 0
    finally:
        process.stderr.close()
        process.kill()
        process.wait()


LOADS_FOR_EVER = """
import sys
if "vlm_spectra_server.serving.worker" in sys.orig_argv:
    import pathlib, time
    from transformers import AutoModelForImageTextToText

    def from_pretrained(*_, **__):
        pathlib.Path(__file__).with_name("loading").touch()
        time.sleep(3600)

    AutoModelForImageTextToText.from_pretrained = from_pretrained
"""


def test_a_worker_does_not_outlive_its_front(tmp_path):
    """Not even while it reads weights, and the front was killed."""
    (tmp_path / "sitecustomize.py").write_text(LOADS_FOR_EVER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    process = subprocess.Popen(SERVE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    workers = set()
    try:
        until((tmp_path / "loading").exists)
        workers = descendants(process.pid) - {process.pid}
        process.kill()
        process.wait()
        until(lambda: not any(arguments(pid) for pid in workers))
        workers = set()
    finally:
        process.kill()
        process.wait()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def test_a_full_disk_for_standard_output_and_log(tmp_path):
    """What it says is lost, and nothing else: it serves, drains, and ends well."""
    port = free_port()
    with open("/dev/full", "w") as full:
        command = [*SERVE[:4], "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(command, stdout=full, stderr=full)
    try:
        with until(lambda: connected(f"127.0.0.1:{port}")) as model:
            assert model.generate(model.prepare_messages("Say hello"), 2).text
        process.send_signal(signal.SIGHUP)
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.wait()


def connected(address):
    try:
        return vs.connect(address, arrays="numpy")
    except errors.UnavailableError:
        return None


@pytest.mark.parametrize("analysis", ["lens", "attribution", "sweep"])
def test_an_analysis_that_a_stopping_server_lets_end_is_whole(front, analysis):
    """Its reader has no more to ask once it is there, be it the first that is asked over this connection."""
    with (
        another_door(front) as door,
        vs.connect(door.address, arrays="numpy", shared_memory=False, retries=0) as model,
    ):
        inputs, other = model.prepare_messages("Say hello"), model.prepare_messages("Say howdy")
        told = []

        def stopping(*_):
            told.append(door.refuse())

        with model.run_with_progress(stopping):
            if analysis == "lens":
                assert model.logit_lens(inputs).tokens
            elif analysis == "attribution":
                assert model.attribute(inputs).target_tokens
            else:
                assert model.patch_sweep(inputs, other, "lm.blocks.*.hook_resid_post", "last").target_tokens
        assert told
        with pytest.raises(errors.UnavailableError, match="stopping"):
            model.prepare_messages("Say more")
