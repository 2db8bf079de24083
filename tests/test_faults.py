"""Faults: a network that cuts, stalls, truncates and damages, processes that are killed, numbers that are none.

Every answer is right to the last bit or an error of ours; the next request works; nothing is left behind.

`SPECTRA_REQUESTS=10000` makes the test of memory growth a long one (`make soak`).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import vlm_spectra as vs
from conftest import start_server, stop_server
from proxy import Proxy
from vlm_spectra import errors, remote
from vlm_spectra.arrays import to_numpy
from vlm_spectra_server.serving import worker as worker_module
from vlm_spectra_server.serving.worker import Worker

POST = "lm.blocks.*.hook_resid_post"
HOOK = "lm.blocks.1.hook_resid_post"
REQUESTS = int(os.environ.get("SPECTRA_REQUESTS", "150"))


@pytest.fixture(scope="module")
def served():
    """A server of this module's own, to be hurt: its process and address."""
    process, address = start_server("--model", "spectra-tiny", "--device", "cpu")
    yield process, address
    stop_server(process)


@pytest.fixture(scope="module")
def right(hooked):
    """Hooks, logits and answer of a prompt, in process."""
    inputs = hooked.prepare_messages("Say hello")
    with hooked.run_with_cache(POST) as cache:
        logits = hooked.forward(inputs, 1).logits
    arrays = {name: to_numpy(cache[name]) for name in cache.names}
    return arrays, to_numpy(logits), to_numpy(hooked.generate(inputs, 4).sequences)


def look(model):
    """The same from a server."""
    inputs = model.prepare_messages("Say hello")
    with model.run_with_cache(POST) as cache:
        logits = model.forward(inputs, 1).logits
    return {name: cache[name] for name in cache.names}, logits, model.generate(inputs, 4).sequences


def same(found, expected):
    arrays, logits, sequences = found
    assert list(arrays) == list(expected[0])
    assert all(np.array_equal(arrays[name], array) for name, array in expected[0].items())
    assert np.array_equal(logits, expected[1])
    assert np.array_equal(sequences, expected[2])


def worker_of(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


# The network.


@pytest.mark.parametrize("kind", ["cuts", "truncations", "stalls", "damage"])
def test_a_network_in_trouble(served, right, kind, monkeypatch):
    """At twelve places of a session: the right answer or one of our errors, in a bounded time; captures come whole."""
    monkeypatch.setattr(remote, "KEEPALIVE_SECONDS", 0.5)
    chance, whole, failed = random.Random(kind), 0, 0
    with Proxy(served[1]) as plain, vs.connect(plain.address, arrays="numpy", shared_memory=False) as model:
        same(look(model), right)
        length = plain.carried
    for _ in range(12 if kind != "stalls" else 4):
        with Proxy(served[1], **{kind: [chance.randrange(length)]}) as proxy:
            begun = time.monotonic()
            try:
                with vs.connect(proxy.address, arrays="numpy", shared_memory=False) as model:
                    same(look(model), right)
                whole += 1
            except errors.SpectraError as error:
                failed += 1
                assert "\n" not in str(error)
            assert time.monotonic() - begun < 30
    assert whole + failed == (12 if kind != "stalls" else 4)
    with vs.connect(served[1], arrays="numpy") as model:
        same(look(model), right)


def test_a_stalled_capture_goes_on(served, right, monkeypatch):
    """The stream finds out by itself that nothing comes any more, and fetches the rest over a new connection."""
    monkeypatch.setattr(remote, "KEEPALIVE_SECONDS", 0.5)
    with Proxy(served[1]) as proxy, vs.connect(proxy.address, arrays="numpy", shared_memory=False) as model:
        inputs = model.prepare_messages("Say hello")
        proxy.stalls = [proxy.carried + 2000]
        begun = time.monotonic()
        with model.run_with_cache(POST) as cache:
            model.forward(inputs, 1)
        assert all(np.array_equal(cache[name], array) for name, array in right[0].items())
        assert 0.5 < time.monotonic() - begun < 20
        assert not proxy.stalls
        assert proxy.connections == 2


def test_bytes_that_are_no_http(served, right):
    chance = random.Random(7)
    host, port = served[1].split(":")
    for size in (0, 1, 24, 1000, 100_000):
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: size % 25] + chance.randbytes(size))
    with vs.connect(served[1], arrays="numpy") as model:
        same(look(model), right)


# Processes that are killed.

CLIENT = """
import sys, vlm_spectra as vs
model = vs.connect(sys.argv[1], arrays="numpy")
inputs = model.prepare_messages("Tell me a long story")
for token in model.stream(inputs, max_new_tokens=1900, do_sample=True, seed=1):
    print("token", flush=True)
"""


def open_things(process):
    """Threads and open files of a server's front."""
    proc = Path("/proc") / str(process.pid)
    return len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))


def test_clients_that_are_killed_leave_nothing(served, right):
    process, address = served
    with vs.connect(address, arrays="numpy") as model:
        same(look(model), right)
    time.sleep(0.5)
    before = open_things(process)
    for _ in range(3):
        client = subprocess.Popen([sys.executable, "-c", CLIENT, address], stdout=subprocess.PIPE, text=True)
        assert client.stdout.readline() == "token\n"
        client.kill()
        client.wait()
        client.stdout.close()
        begun = time.monotonic()
        with vs.connect(address, arrays="numpy") as model:
            same(look(model), right)
        assert time.monotonic() - begun < 20
    for _ in range(50):
        after = open_things(process)
        if after[1] <= before[1] + 8:
            break
        time.sleep(0.2)
    assert after[1] <= before[1] + 8, "each capture that is kept holds a file"
    assert after[0] <= before[0] + 6, "threads of calls are used again"


def test_a_worker_killed_under_load(served, right):
    """Four clients at work while the worker is killed: every answer is right or an error of ours, none is missing."""
    process, address = served
    answers: list[str] = []
    faults: list[BaseException] = []

    def client():
        try:
            with vs.connect(address, arrays="numpy", retries=8) as model:
                for _ in range(5):
                    try:
                        same(look(model), right)
                        answers.append("right")
                    except errors.SpectraError as error:
                        assert isinstance(error, errors.UnavailableError), error
                        answers.append("refused")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    for child in worker_of(process):
        os.kill(child, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not faults
    assert len(answers) == 20
    assert answers.count("right") >= 16
    with vs.connect(address, arrays="numpy") as model:
        same(look(model), right)


# Numbers that are none, and code that fails.


def test_nan_answers_its_own_request_alone(served, right):
    process, address = served
    before = worker_of(process)
    poison = [(HOOK, vs.ScaleActivation(float("nan")))], [(HOOK, vs.AddActivation(np.full(1, np.nan, np.float32)))]
    with vs.connect(address, arrays="numpy") as model, vs.connect(address, arrays="numpy") as other:
        inputs = model.prepare_messages("Say hello")
        for interventions in poison:
            for call in (
                lambda: model.forward(inputs, 1).logits,
                lambda: model.generate(inputs, 4, do_sample=True, seed=1).sequences,
                lambda: model.logit_lens(inputs).probs,
            ):
                try:
                    with model.run_with_hooks(interventions):
                        call()
                except errors.SpectraError as error:
                    assert "\n" not in str(error)
                same(look(other), right)
    assert worker_of(process) == before, "the worker did not die of it"


class _Pipe:
    """What a worker sends, as a list."""

    def __init__(self):
        self.sent: list[dict] = []

    def send(self, message, *blobs, fd=None):
        self.sent.append(message)
        if message["kind"] == "reserve":
            self.job.grants.put(True)


def job_of(number, method, inputs):
    from vlm_spectra import wire
    from vlm_spectra.calls import ForwardOptions
    from vlm_spectra.v1 import spectra_service_pb2 as spb

    prompts = wire.prompts_to_wire(inputs.prompts)
    request = spb.ForwardRequest(prompts=prompts, options=wire.forward_to_wire(ForwardOptions(1)))
    images = {picture.sha256: picture.data for prompt in inputs.prompts for picture in prompt.images}
    message = {"job": number, "method": method, "images": list(images)}
    return worker_module.Job(message, [request.SerializeToString(), *images.values()])


@pytest.mark.parametrize("error", [AssertionError("in a kernel"), RuntimeError("odd"), MemoryError(), RecursionError()])
def test_code_that_fails_answers_its_own_request_alone(hooked, inputs, monkeypatch, error):
    pipe = _Pipe()
    worker = Worker(hooked, pipe, 1 << 30, 0, 1 << 30)

    def run(number):
        pipe.job = job = job_of(number, "Forward", inputs)
        worker.run(job)
        return pipe.sent[-1]["kind"], pipe.sent[-1]["cost"]

    assert run(1)[0] == "done"
    with monkeypatch.context() as patch:
        patch.setattr(type(hooked), "forward_into", lambda *_: (_ for _ in ()).throw(error))
        kind, cost = run(2)
        assert kind == "error"
        assert cost["compute_seconds"] >= 0
    assert run(3)[0] == "done"


def test_a_lost_device_ends_the_worker(hooked, inputs, monkeypatch):
    """On a GPU whose context is broken; here both are pretended."""
    pipe = _Pipe()
    worker = Worker(hooked, pipe, 1 << 30, 0, 1 << 30)
    pipe.job = job_of(1, "Forward", inputs)

    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    device = type("Device", (), {"type": "cuda"})()
    reading = type("Reading", (), {"device": device})()
    worker.model = type("Model", (), {"reading": reading, "forward_into": broken, "_prepare": broken})()
    monkeypatch.setattr(worker_module.torch.cuda, "synchronize", broken)
    monkeypatch.setattr(worker_module.torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(worker_module.torch.cuda, "max_memory_allocated", lambda: 0)
    with pytest.raises(worker_module.DeviceLost):
        worker.run(pipe.job)
    assert pipe.sent[-1]["kind"] == "error"


# Time and memory.


def resident(pid):
    """Bytes of memory of a process, its own and not shared."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def test_memory_does_not_grow(right):
    """After a first part of the requests to warm up, 5% and 4 MB are the most that either process may grow."""
    process, address = start_server("--model", "spectra-tiny", "--device", "cpu", "--kept-captures-gb", "0")
    try:
        pids = [process.pid, *worker_of(process)]
        with vs.connect(address, arrays="numpy", shared_memory=False) as model:
            inputs = model.prepare_messages("Say hello")

            def ask(number):
                for index in range(number):
                    if index % 3 == 0:
                        with model.run_with_cache(POST) as cache:
                            model.forward(inputs, logits_to_keep=None)
                        assert np.array_equal(cache[HOOK], right[0][HOOK])
                    elif index % 3 == 1:
                        assert np.array_equal(model.forward(inputs, 1).logits, right[1])
                    else:
                        with pytest.raises(errors.InvalidInputError):
                            model.generate(inputs, 2, temperature=-1.0, do_sample=True)

            ask(max(REQUESTS // 2, 100))
            before = [resident(pid) for pid in pids]
            ask(REQUESTS)
            after = [resident(pid) for pid in pids]
        assert len(pids) == 2
        for old, new in zip(before, after, strict=True):
            assert new < old * 1.05 + 4e6, f"{old / 1e6:.1f} MB became {new / 1e6:.1f} MB"
    finally:
        stop_server(process)
