"""Faults: a network that cuts, stalls, truncates and damages, processes that are killed, numbers that are none.

Every answer is right to the last bit or an error of ours; the next request works; nothing is left behind.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import ClassVar

import httpx
import numpy as np
import pytest
import torch
import vlm_spectra as vs
from calls import WAIT, Raw, WorkerPipe, prompts, run, until
from conftest import another_door, start_server, stop_server
from google.rpc import status_pb2
from PIL import Image
from proxy import Proxy
from soak.watch import Held
from sockets import descendants
from vlm_spectra import errors, remote
from vlm_spectra.arrays import to_numpy
from vlm_spectra.network.status import from_status, to_status
from vlm_spectra.v1 import model_service_pb2, stream_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.serving import host as host_module
from vlm_spectra_server.serving import pipe as pipe_module
from vlm_spectra_server.serving import server as server_module
from vlm_spectra_server.serving import worker as worker_module
from vlm_spectra_server.serving.budget import Budget
from vlm_spectra_server.serving.devices import Devices
from vlm_spectra_server.serving.guard import Call
from vlm_spectra_server.serving.host import Loading, ModelHost
from vlm_spectra_server.serving.limits import Limits
from vlm_spectra_server.serving.pipe import Pipe, shared_memory
from vlm_spectra_server.serving.sending import Sending
from vlm_spectra_server.serving.stores import CaptureStore, StoredCapture
from vlm_spectra_server.serving.worker import Worker
from webapp import address_of

POST = "lm.blocks.*.hook_resid_post"
HOOK = "lm.blocks.1.hook_resid_post"
REQUESTS = 150
"""Of the test of memory growth; `make soak` has the long one."""
PATIENCE = 20.0
"""Seconds of a call over a network in trouble: a bit of HTTP/2 that says where a stream ends may be lost."""


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
    return sorted(descendants(process.pid) - {process.pid})


# The network.


@pytest.mark.parametrize("kind", ["cuts", "truncations", "stalls", "damage"])
def test_a_network_in_trouble(served, right, kind, monkeypatch):
    """At twelve places of a session: the right answer or one of our errors, in a bounded time; captures come whole."""
    chance, whole, failed = random.Random(kind), 0, 0
    with Proxy(served[1]) as plain, vs.connect(plain.address, arrays="numpy", shared_memory=False) as model:
        same(look(model), right)
        length = plain.carried
    monkeypatch.setattr(remote, "KEEPALIVE_SECONDS", 0.5)
    for _ in range(12 if kind != "stalls" else 4):
        with Proxy(served[1], **{kind: [chance.randrange(length)]}) as proxy:
            try:
                with vs.connect(proxy.address, arrays="numpy", shared_memory=False, timeout=PATIENCE) as model:
                    same(look(model), right)
                whole += 1
            except errors.SpectraError as error:
                failed += 1
                assert "\n" not in str(error)
    assert whole + failed == (12 if kind != "stalls" else 4)
    monkeypatch.undo()
    with vs.connect(served[1], arrays="numpy") as model:
        same(look(model), right)


def test_a_link_that_is_slow_to_connect(served, right):
    """A server far away, or one whose machine is busy, is not taken for one that is not there."""
    with Proxy(served[1], latency=1.5) as proxy:
        with vs.connect(proxy.address, arrays="numpy", shared_memory=False) as model:
            same(look(model), right)


def test_a_stalled_capture_goes_on(served, right, monkeypatch):
    """The stream finds out by itself that nothing comes any more, and fetches the rest over a new connection."""
    monkeypatch.setattr(remote, "KEEPALIVE_SECONDS", 1.0)
    with Proxy(served[1]) as proxy, vs.connect(proxy.address, arrays="numpy", shared_memory=False) as model:
        inputs = model.prepare_messages("Say hello")
        proxy.stalls = [proxy.carried + 2000]
        begun = time.monotonic()
        with model.run_with_cache(POST) as cache:
            model.forward(inputs, 1)
        assert all(np.array_equal(cache[name], array) for name, array in right[0].items())
        assert time.monotonic() - begun > 1.0
        assert not proxy.stalls
        assert proxy.connections >= 2


def test_a_client_whose_machine_was_switched_off_is_found_out(front, monkeypatch):
    """Nothing comes from it any more, and its connection stays open."""
    monkeypatch.setattr(server_module, "KEEPALIVE", dict.fromkeys(server_module.KEEPALIVE, 500))
    monkeypatch.setattr(remote, "KEEPALIVE_SECONDS", 600.0)
    with another_door(front) as server, Proxy(server.address) as proxy:
        with vs.connect(proxy.address, arrays="numpy", retries=0) as model:
            inputs = model.prepare_messages("Tell me a long story")
            tokens = model.stream(inputs, max_new_tokens=1900, do_sample=True, seed=1, temperature=20.0)
            next(tokens)
            assert server.guard.active
            proxy.stalls = [proxy.carried + 1]
            until(lambda: not server.guard.active)
            assert not proxy.stalls, "it was not the answer's end"
            tokens.close()


def test_bytes_that_are_no_http(served, right):
    chance = random.Random(7)
    host, port = served[1].split(":")
    for size in (0, 1, 24, 1000, 100_000):
        with socket.create_connection((host, int(port)), WAIT) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: size % 25] + chance.randbytes(size))
    with vs.connect(served[1], arrays="numpy") as model:
        same(look(model), right)


# Every call over every kind of trouble.

CALLS = {
    "forward": lambda model, inputs: [model.forward(inputs, 1).logits],
    "generate": lambda model, inputs: [model.generate(inputs, 4).sequences],
    "stream": lambda model, inputs: [[token.id for token in model.stream(inputs, max_new_tokens=4)]],
    "capture": lambda model, inputs: list(look_inside(model, inputs).values()),
    "lens": lambda model, inputs: [model.logit_lens(inputs).probs],
    "attribute": lambda model, inputs: [model.attribute(inputs).scores],
    "sweep": lambda model, inputs: [model.patch_sweep(inputs, inputs, POST, positions=[0, 1]).values],
    "unembed": lambda model, inputs: [model.unembed([5, 6])],
}
"""Every call whose answer is a stream, and what of it must be right."""


def look_inside(model, inputs):
    with model.run_with_cache(POST) as cache:
        model.forward(inputs, logits_to_keep=None)
    return {name: cache[name] for name in cache.names}


def test_every_streaming_call_is_among_them():
    service = spb.DESCRIPTOR.services_by_name["SpectraService"]
    assert len(CALLS) == sum(method.server_streaming for method in service.methods) + 1, "generate has two forms"


@pytest.mark.parametrize("kind", ["cuts", "truncations", "stalls", "damage"])
def test_trouble_in_every_streaming_call(served, hooked, kind, monkeypatch):
    """At three places of each call's own bytes (a stall at one): the right answer or an error of ours, and an end."""
    chance, inputs = random.Random(kind), hooked.prepare_messages("Say hello")
    right = {name: [to_numpy(part) for part in call(hooked, inputs)] for name, call in CALLS.items()}
    for name, call in CALLS.items():
        with Proxy(served[1]) as proxy, vs.connect(proxy.address, arrays="numpy", shared_memory=False) as model:
            before = proxy.carried
            call(model, model.prepare_messages("Say hello"))
            length = proxy.carried - before
        monkeypatch.setattr(remote, "KEEPALIVE_SECONDS", 0.3)
        for _ in range(1 if kind == "stalls" else 3):
            options = {"arrays": "numpy", "shared_memory": False, "timeout": PATIENCE}
            with Proxy(served[1]) as proxy, vs.connect(proxy.address, **options) as model:
                try:
                    model.prepare_messages("Say hello")
                    setattr(proxy, kind, [proxy.carried + chance.randrange(length)])
                    found = call(model, model.prepare_messages("Say hello"))
                    assert len(found) == len(right[name])
                    assert all(map(np.array_equal, found, right[name])), f"{name} over {kind} is wrong"
                except errors.SpectraError as error:
                    assert "\n" not in str(error)
        monkeypatch.undo()
    with vs.connect(served[1], arrays="numpy") as model:
        for name, call in CALLS.items():
            assert all(map(np.array_equal, call(model, model.prepare_messages("Say hello")), right[name])), name


# Processes that are killed.

CLIENT = """
import sys, vlm_spectra as vs
model = vs.connect(sys.argv[1], arrays="numpy")
inputs = model.prepare_messages("Tell me a long story")
for token in model.stream(inputs, max_new_tokens=1900, do_sample=True, temperature=20.0, seed=1):
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
        with vs.connect(address, arrays="numpy") as model:
            same(look(model), right)

    def left():
        """Each capture that is kept holds a file; threads of calls are used again."""
        threads, files = open_things(process)
        return threads <= before[0] + 6 and files <= before[1] + 8

    until(left)


def test_a_worker_killed_under_load(served, right):
    """Four clients at work while the worker is killed: every answer is right or an error of ours, none is missing."""
    process, address = served
    answers: list[str] = []
    faults: list[BaseException] = []

    def client():
        try:
            with vs.connect(address, arrays="numpy", retries=100) as model:
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
    until(lambda: len(answers) >= 2)
    for child in worker_of(process):
        os.kill(child, signal.SIGKILL)
    for thread in threads:
        thread.join(2 * WAIT)
        assert not thread.is_alive()
    assert not faults
    assert len(answers) == 20
    assert answers.count("right") >= 16
    with vs.connect(address, arrays="numpy") as model:
        same(look(model), right)


def test_captures_leave_at_their_time_by_themselves(front):
    """Nobody asks the server for anything: their memory and its file descriptors are let go all the same."""
    with another_door(front, limits=Limits(kept_seconds=1)) as server:
        client, before = Raw(server.address), Held.by(os.getpid()).segments
        assert isinstance(client.ask("RunWithCache", run("Hi")), list)
        until(lambda: Held.by(os.getpid()).segments <= before)
        client.close()


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


def job_of(number, method, inputs):
    from vlm_spectra.calls import ForwardOptions
    from vlm_spectra.network import wire
    from vlm_spectra.v1 import spectra_service_pb2 as spb

    prompts = wire.prompts_to_wire(inputs.prompts)
    request = spb.ForwardRequest(prompts=prompts, options=wire.forward_to_wire(ForwardOptions(1)))
    images = {picture.sha256: picture.data for prompt in inputs.prompts for picture in prompt.images}
    message = {"job": number, "method": method, "images": list(images)}
    return worker_module.Job(message, [request.SerializeToString(), *images.values()])


@pytest.mark.parametrize("error", [AssertionError("in a kernel"), RuntimeError("odd"), MemoryError(), RecursionError()])
def test_code_that_fails_answers_its_own_request_alone(hooked, inputs, monkeypatch, caplog, error):
    pipe = WorkerPipe(True)
    worker = Worker(hooked, pipe, Limits())

    def run(number):
        pipe.job = job = job_of(number, "Forward", inputs)
        job.request_id = f"r-{number}"
        worker.run(job)
        return pipe.sent[-1]["kind"], pipe.sent[-1]["cost"]

    assert run(1)[0] == "done"
    with monkeypatch.context() as patch:
        patch.setattr(type(hooked), "forward_into", lambda *_: (_ for _ in ()).throw(error))
        kind, cost = run(2)
        assert kind == "error"
        assert cost["compute_seconds"] >= 0
    assert [record.request_id for record in caplog.records if record.exc_info] == ["r-2"]
    assert run(3)[0] == "done"


def test_a_worker_keeps_few_prepared_prompts(hooked):
    pipe = WorkerPipe(True)
    worker = Worker(hooked, pipe, Limits())
    for number in range(worker_module.PREPARED + 3):
        request = spb.PrepareRequest(prompts=prompts(f"Say {number}")).SerializeToString()
        pipe.job = worker_module.Job({"job": number, "method": "Prepare"}, [request])
        worker.run(pipe.job)
        assert pipe.sent[-1]["kind"] == "done"
    assert len(worker.prepared) == worker_module.PREPARED


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (torch.AcceleratorError, "CUDA error: out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (None, ""),
    ],
)
def test_memory_that_does_not_suffice_answers_its_own_request_alone(hooked, inputs, monkeypatch, kind, said):
    """As a GPU says it in three ways, and a CPU; all that the request held is free again, for other models too."""
    pipe, held, emptied = WorkerPipe(True), [], []
    worker = Worker(hooked, pipe, Limits())

    def run(number):
        pipe.job = job_of(number, "Forward", inputs)
        worker.run(pipe.job)
        return pipe.sent[-1]["kind"], pipe.blobs

    def short(*_):
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        if kind is None:
            torch.empty(1 << 50)
        raise kind(said)

    monkeypatch.setattr(worker_module.torch.cuda, "empty_cache", lambda: emptied.append(held[0]() is None))
    with monkeypatch.context() as patch:
        patch.setattr(type(hooked), "forward_into", short)
        how, blobs = run(1)
    assert how == "error"
    assert from_status(status_pb2.Status.FromString(blobs[0])).reason == "OUT_OF_DEVICE_MEMORY"
    assert emptied == [True]
    assert run(2)[0] == "done"


def test_a_request_that_failed_holds_nothing(hooked, inputs, monkeypatch):
    """Not until the next one either: that may be long in coming."""
    pipe, held = WorkerPipe(True), []
    worker = Worker(hooked, pipe, Limits())

    def gone(*_):
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise errors.CancelledError("the client has gone.")

    monkeypatch.setattr(type(hooked), "forward_into", gone)
    pipe.job = job_of(1, "Forward", inputs)
    worker.run(pipe.job)
    assert pipe.sent[-1]["kind"] == "error"
    assert held[0]() is None


@pytest.mark.parametrize("which", ["cuda:0", "cuda:1"])
def test_a_lost_device_ends_the_worker(hooked, inputs, monkeypatch, which):
    """On GPUs, where the context of one is broken; here they are pretended."""
    pipe = WorkerPipe(True)
    worker = Worker(hooked, pipe, Limits())
    worker.devices = Devices(["cuda:0", "cuda:1"])
    pipe.job = job_of(1, "Forward", inputs)

    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    def wait(device="cuda:0"):
        if device == which:
            broken()

    device = type("Device", (), {"type": "cuda"})()
    reading = type("Reading", (), {"device": device})()
    worker.model = type("Model", (), {"reading": reading, "forward_into": broken, "_prepare": broken})()
    monkeypatch.setattr(worker_module.torch.cuda, "synchronize", wait)
    monkeypatch.setattr(worker_module.torch.cuda, "reset_peak_memory_stats", lambda name: None)
    monkeypatch.setattr(worker_module.torch.cuda, "max_memory_allocated", lambda name: 0)
    with pytest.raises(worker_module.DeviceLost):
        worker.run(pipe.job)
    assert pipe.sent[-1]["kind"] == "error"
    assert pipe.sent[-1]["lost"]


# Workers whose part the test plays.


class Played:
    """Takes the place of a worker's process."""

    stderr = None
    refusals: ClassVar[list[errors.SpectraError]] = []
    """Why the next ones cannot load their model."""

    def __init__(self, arguments, pass_fds, **_):
        self.arguments = arguments
        connection = socket.socket(fileno=os.dup(pass_fds[0]))
        connection.settimeout(WAIT)
        self.pipe = Pipe(connection)
        if self.refusals:
            self.says({"kind": "failed"}, to_status(self.refusals.pop()).SerializeToString())
            self.kill()
            return
        ready = model_service_pb2.Model(name="played", state=model_service_pb2.MODEL_STATE_READY)
        self.says({"kind": "ready", "memory": {}}, ready.SerializeToString())

    def says(self, message, *blobs, fd=None):
        self.pipe.send(message, *blobs, fd=fd)

    def hears(self):
        """The next message of the front."""
        return self.pipe.receive()[0]

    def announces(self, job, size):
        """A job's capture, of so many bytes."""
        header = stream_pb2.Header(tensors=[tensor_pb2.TensorHeader(index=0, byte_count=size)])
        fd = shared_memory(size)
        message = {"kind": "tensors", "job": job.id, "offsets": [0], "size": size}
        self.says(message, header.SerializeToString(), fd=fd)
        os.close(fd)

    def waits(self, job, size):
        """A job that is at work finds no memory."""
        self.says({"kind": "reserve", "job": job.id, "size": size})
        assert self.hears()["kind"] == "later"
        self.says({"kind": "later", "job": job.id, "size": size})

    def kill(self):
        self.pipe.close()

    def wait(self, timeout=None):
        return -9


@pytest.fixture
def played(monkeypatch):
    """Makes hosts over a budget of 100 bytes; each has its `worker`, the last one that was started."""
    budget, hosts = Budget(100, share=1.0), []

    def make():
        def start(*arguments, **options):
            host.worker = Played(*arguments, **options)
            return host.worker

        host = ModelHost.__new__(ModelHost)
        monkeypatch.setattr(host_module.subprocess, "Popen", start)
        host.__init__(Loading("played", device="--x"), Limits(), budget)
        hosts.append(host)
        until(lambda: host.ready)
        return host

    yield make
    for host in hosts:
        host.close()


def ask(host, client="a", request=b""):
    return host.submit(client, "RunWithCache", request, {}, None)


def test_a_value_that_begins_with_a_dash_is_no_option(played):
    assert "--device=--x" in played().worker.arguments


def test_a_worker_that_cannot_be_started_is_tried_again(played, monkeypatch):
    host, start, faults = played(), host_module.subprocess.Popen, [OSError(errno.EMFILE, "no files"), RuntimeError()]

    def fails(*arguments, **options):
        if faults:
            raise faults.pop()
        return start(*arguments, **options)

    monkeypatch.setattr(host_module.subprocess, "Popen", fails)
    first = host.worker
    first.kill()
    until(lambda: host.ready and host.worker is not first)
    assert not faults
    job = ask(host)
    assert host.worker.hears()["job"] == job.id

    def never(*_, **__):
        raise OSError(errno.EMFILE, "no files")

    monkeypatch.setattr(host_module, "MOST_DEATHS", 1)
    monkeypatch.setattr(host_module.subprocess, "Popen", never)
    host.worker.kill()
    until(lambda: host.model.state == model_service_pb2.MODEL_STATE_FAILED)
    assert "2 times in a row" in host.model.error
    assert "no files" in host.model.error


def test_who_waits_keeps_his_turn_when_the_worker_dies(played):
    """The request at work fails, and no other."""
    host = played()
    running, *waiting = ask(host), ask(host, "b"), ask(host, "c")
    first = host.worker
    first.kill()
    kind, error = until(lambda: running.feed.get(0, 0))
    assert (kind, error.reason, error.retry_after) == ("error", "WORKER_DIED", 5.0)
    until(lambda: host.ready and host.worker is not first)
    for job in waiting:
        assert host.worker.hears()["job"] == job.id
        host.worker.says({"kind": "done", "job": job.id}, b"")
        assert until(lambda job=job: job.feed.get(0, 0)) == ("done", b"")


def test_a_worker_whose_device_is_lost_is_given_no_more(played):
    """It says so with the error of its request; whoever has the next turn has it with its successor."""
    host = played()
    running, waiting, first = ask(host), ask(host, "b"), host.worker
    assert first.hears()["job"] == running.id
    error = to_status(errors.UnavailableError("this request broke the device's context")).SerializeToString()
    first.says({"kind": "error", "job": running.id, "lost": True}, error)
    assert until(lambda: running.feed.get(0, 0))[1].message == "this request broke the device's context"
    until(lambda: host.ready and host.worker is not first)
    assert host.worker.hears()["job"] == waiting.id


def test_who_waits_is_told_when_no_worker_comes(played, monkeypatch):
    host = played()
    _, waiting = ask(host), ask(host, "b")
    monkeypatch.setattr(host_module, "MOST_DEATHS", 0)
    host.worker.kill()
    kind, error = until(lambda: waiting.feed.get(0, 0))
    assert (kind, error.reason) == ("error", "UNAVAILABLE")
    assert "could not be loaded: its worker died 1 times in a row" in error.message
    assert not host.busy


def test_a_model_that_cannot_be_loaded_again_at_once_comes_back(played, monkeypatch, caplog):
    """A device that was lost may be away for a while; a model that has served is tried again as after any death."""
    host = played()
    first, why = host.worker, "device 'cuda' is not possible here"
    monkeypatch.setattr(Played, "refusals", [errors.InvalidInputError(why)] * 2)
    first.kill()
    until(lambda: host.ready and host.worker is not first)
    assert not Played.refusals
    assert caplog.text.count(why) == 2
    assert host.model.error == ""
    monkeypatch.setattr(host_module, "MOST_DEATHS", 1)
    Played.refusals += [errors.InvalidInputError(why)] * 2
    host.worker.kill()
    until(lambda: host.model.state == model_service_pb2.MODEL_STATE_FAILED)
    assert why in host.model.error


def test_a_worker_that_does_not_listen_is_waited_for_by_nobody(played):
    """It was stopped, say; a request is larger than what fits into the pipe, and calls come and go all the same."""
    host, gone = played(), []

    def call():
        job = host.submit("a", "Prepare", b"", {"image": bytes(8 << 20)}, None)
        waiting = ask(host, "b")
        assert host.place(waiting) == (1, 1)
        host.cancel(waiting)
        host.cancel(job)
        gone.append(job)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(10)
    host.worker.kill()  # or the end of the test would wait as well
    assert gone


def test_a_worker_that_does_not_end_a_cancelled_request_is_replaced(played, monkeypatch, caplog):
    """A kernel that never returns: nothing between two layers would end it."""
    host = played()
    ended, first = ask(host), host.worker
    host.cancel(ended)
    first.says({"kind": "error", "job": ended.id}, to_status(errors.CancelledError("it was")).SerializeToString())
    until(lambda: not any(thread.name == "cancelled" for thread in threading.enumerate()))
    assert host.worker is first
    monkeypatch.setattr(host_module, "STUCK", 0.1)
    stuck, waiting = ask(host), ask(host, "b")
    host.cancel(stuck)
    assert until(lambda: stuck.feed.get(0, 0))[0] == "error"
    until(lambda: host.ready and host.worker is not first)
    assert host.worker.hears()["job"] == waiting.id
    assert "does not end a request" in caplog.text


def test_a_worker_that_is_long_in_dying_is_waited_for_by_nobody(played, monkeypatch):
    """What a lost device holds on to dies late."""
    host, dead = played(), threading.Event()
    first, running, waiting = host.worker, ask(host), ask(host, "b")
    monkeypatch.setattr(first, "wait", lambda timeout=None: dead.wait(WAIT) and -9)
    first.kill()
    try:
        until(lambda: running.feed.ended, 10)
        assert host.place(waiting) == (1, 1)
        assert not host.ready
        with pytest.raises(errors.UnavailableError):
            ask(host)
    finally:
        dead.set()
    until(lambda: host.ready and host.worker is not first)


def test_a_model_comes_back_whose_state_cannot_be_told(played, caplog):
    host = played()
    first, faults = host.worker, [RuntimeError("no threads")]

    def changed(name, state):
        if faults:
            raise faults.pop()

    host.changed = changed
    first.kill()
    until(lambda: host.ready and host.worker is not first)
    assert "no threads" in caplog.text


def test_room_is_for_the_worker_that_asked(played, monkeypatch):
    host, asked, answer = played(), threading.Event(), threading.Event()
    first = host.worker

    def room(*_):
        asked.set()
        answer.wait(WAIT)
        return host_module.GRANTED

    monkeypatch.setattr(host, "room", room)
    first.says({"kind": "room", "size": 8, "memory": {"cpu": [1, 2, 3]}})
    assert asked.wait(WAIT)
    first.kill()
    until(lambda: host.ready and host.worker is not first)
    answer.set()
    until(lambda: not any(thread.name == "make-room" for thread in threading.enumerate()))
    assert host.held == {}
    job = ask(host)
    assert host.worker.hears()["job"] == job.id


def test_a_worker_is_told_no_token(monkeypatch):
    monkeypatch.setenv("VLM_SPECTRA_TOKENS", f"one * {'a' * 30}")
    monkeypatch.setenv("VLM_SPECTRA_TOKEN", "a" * 30)
    given = []

    def start(arguments, env, **_):
        given.append(env)
        raise OSError("it is not started")

    monkeypatch.setattr(host_module.subprocess, "Popen", start)
    with pytest.raises(OSError, match="not started"):
        ModelHost(Loading("x"), Limits(), Budget(1))
    assert given[0]["PATH"] == os.environ["PATH"]
    assert not any("a" * 30 in value for value in given[0].values())


def test_a_model_that_has_gone_is_forgotten(played):
    host = played()
    assert host._on_freed in host.budget.freed
    host.close()
    assert host._on_freed not in host.budget.freed


@pytest.mark.parametrize("leaves", ["leave", "drain"])
def test_a_model_that_leaves_says_when_to_try_again(played, leaves):
    host = played()
    running, waiting = ask(host), ask(host)
    if leaves == "leave":
        host.cancel(waiting)
        host.worker.says({"kind": "done", "job": running.id}, b"")
        until(lambda: not host.busy)
        assert host.leave()
    else:
        threading.Thread(target=host.drain, daemon=True).start()
        refused = until(lambda: waiting.feed.get(0, 0))[1]
        assert isinstance(refused, errors.UnavailableError)
        assert refused.retry_after == 5.0
    with pytest.raises(errors.UnavailableError, match="being unloaded") as caught:
        ask(host)
    assert caught.value.retry_after == 5.0


def test_what_the_front_cannot_deal_with_ends_the_worker_and_not_the_model(played, monkeypatch):
    host = played()
    first, job = host.worker, ask(host)

    def no_files(*_):
        raise OSError(errno.EMFILE, "no files")

    with monkeypatch.context() as patch:
        patch.setattr(host_module, "read_only", no_files)
        first.announces(job, 10)
        until(lambda: job.feed.ended)
        assert isinstance(job.feed.get(0, 0)[1], errors.UnavailableError)
    until(lambda: host.ready and host.worker is not first)
    job = ask(host)
    assert host.worker.hears()["job"] == job.id


def test_the_front_hears_how_far_a_model_is(played):
    host = played()
    host.worker.says({"kind": "loading", "share": 0.25})
    until(lambda: host.model.progress == 0.25)
    first = host.worker
    first.kill()
    until(lambda: host.ready and host.worker is not first)
    assert host.model.progress != 0.25


def test_a_model_that_no_room_can_be_made_for_comes_back(played, monkeypatch, caplog):
    host = played()
    first = host.worker

    def breaks(*_):
        raise RuntimeError("no room can be made")

    monkeypatch.setattr(host, "room", breaks)
    first.says({"kind": "room", "size": 1, "memory": {}})
    until(lambda: host.ready and host.worker is not first)
    assert "no room can be made" in caplog.text


def test_a_request_larger_than_a_message_can_be_fails_alone(played, monkeypatch):
    host = played()
    monkeypatch.setattr(pipe_module, "_PREFIX", struct.Struct("<IB"))
    job = ask(host, request=bytes(300))
    assert isinstance(job.feed.get(0, 0)[1], errors.InternalError)
    job = ask(host)
    assert host.worker.hears()["job"] == job.id


def test_one_who_waited_for_memory_and_leaves_is_in_nobodys_way(played):
    host = played()
    host.budget.take("other", 90)
    first = ask(host)
    assert host.worker.hears()["job"] == first.id
    host.worker.waits(first, 50)
    until(lambda: host.place(first) == (1, 1))
    second = ask(host)
    host.cancel(first)
    assert host.worker.hears()["job"] == second.id


def test_one_who_waits_for_memory_holds_none(played):
    host = played()
    host.budget.take("other", 50)
    job = ask(host)
    assert host.worker.hears()["job"] == job.id
    host.worker.says({"kind": "reserve", "job": job.id, "size": 30})
    assert host.worker.hears()["kind"] == "granted"
    assert host.budget.held == 80
    host.worker.waits(job, 60)
    until(lambda: host.place(job))
    assert host.budget.held == 50
    host.budget.give_back("other", 50)
    assert host.worker.hears()["job"] == job.id


def test_waiting_for_memory_is_no_computing(played):
    """It says nothing of how long runs take, by which others are refused, and one who leaves was never at work."""
    host, cost = played(), lambda job: Call("id", "RunWithCache", job=job).cost()
    host.budget.take("other", 90)
    for leaves in (True, False):
        job = ask(host)
        assert host.worker.hears()["job"] == job.id
        host.worker.says({"kind": "started", "job": job.id})
        until(lambda job=job: job.started)
        host.worker.waits(job, 50)
        until(lambda job=job: host.place(job))
        if leaves:
            assert "compute_seconds" not in cost(job)
            host.cancel(job)
    time.sleep(1.0)
    host.budget.give_back("other", 90)
    for each in (job, other := ask(host, "b")):
        assert host.worker.hears()["job"] == each.id
        host.worker.says({"kind": "started", "job": each.id})
        until(lambda each=each: each.started)
        if each is job:
            assert cost(job)["queue_seconds"] >= 1.0
            host.worker.says({"kind": "done", "job": job.id}, b"")
    assert host._running is other
    host.submit("c", "RunWithCache", b"", {}, time.monotonic() + 0.5)


@pytest.mark.parametrize("models", [1, 2])
def test_what_is_kept_from_now_on_leaves_for_who_waits(played, models):
    """A capture that ends, of this model or another, makes the room that an earlier one waits for."""
    host, other = (played(), played()) if models == 2 else [played()] * 2
    captures, budget = CaptureStore(1000, 600), host.budget
    budget.make_room = captures.make_room
    budget.take("reader", 60)
    waiting = ask(host)
    assert host.worker.hears()["job"] == waiting.id
    host.worker.waits(waiting, 50)
    until(lambda: host.place(waiting))
    job = ask(other, "b")
    assert other.worker.hears()["job"] == job.id
    captures.add("kept", StoredCapture(job, other, Sending(job, {}), 0))
    other.worker.says({"kind": "reserve", "job": job.id, "size": 40})
    assert other.worker.hears()["kind"] == "granted"
    other.worker.announces(job, 40)
    until(lambda: other._running.tensors)
    budget.give_back("reader", 20)
    other.worker.says({"kind": "done", "job": job.id}, b"")
    del job
    assert host.worker.hears()["job"] == waiting.id
    captures.close()


# A full disk.


def on_a_small_disk(folder, size, command):
    """A command for which a folder has so many bytes: a file system of its own where this user may mount one, else no
    file may be larger."""
    mount = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    own = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    if shutil.which("unshare") and subprocess.run([*own, "true"], capture_output=True).returncode == 0:
        return [*own, *command]
    return ["sh", "-c", f'ulimit -f {size // 512} && exec "$@"', "sh", *command]


SAVE = """
import os, sys
import vlm_spectra as vs
folder, path = sys.argv[2], sys.argv[2] + "/cache.safetensors"
with vs.connect(sys.argv[1], arrays="numpy") as model:
    inputs = model.prepare_messages("Say hello")
    def capture(*hooks):
        with model.run_with_cache(hooks) as cache:
            model.forward(inputs, 1)
        return cache
    small = capture("lm.blocks.0.hook_resid_post")
    small.save(path)
    for name, write in {
        "cache": lambda: capture("lm.blocks.*.*", "lm.blocks.*.mlp.*", "lm.blocks.*.attn.*").save(path),
        "page": lambda: model.logit_lens(inputs, top_k=500).to_html(folder + "/lens.html"),
    }.items():
        try:
            write()
        except vs.SpectraError as error:
            print(name, "refused:", error)
    print(os.listdir(folder))
    assert (vs.ActivationCache.load(path)["lm.blocks.0.hook_resid_post"] == small["lm.blocks.0.hook_resid_post"]).all()
"""


def test_a_full_disk_leaves_no_half_written_file(served, tmp_path):
    command = [sys.executable, "-c", SAVE, served[1], str(tmp_path)]
    made = subprocess.run(on_a_small_disk(tmp_path, 200_704, command), capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    cache, page, left = made.stdout.splitlines()
    assert "cannot be written" in cache
    assert "page refused" in page
    assert left == "['cache.safetensors']", "the file that was there is whole, and nothing is beside it"


def test_a_full_disk_for_uploads(tmp_path):
    """The web app says so, keeps nothing of the file, and takes the next that fits."""

    def png(size):
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        return {"file": ("a.png", buffer.getvalue(), "image/png")}

    command = [sys.executable, "-m", "vlm_spectra_server.cli", "web", "--port", "0", "--server", "127.0.0.1:9"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        on_a_small_disk(tmp_path, 200_704, command), stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        with httpx.Client(base_url=address_of(process.stdout), timeout=60) as client:
            refused = client.post("/api/upload", files=png(400))
            assert refused.status_code == 507, refused.text
            assert refused.headers["content-type"] == "application/problem+json"
            assert "\n" not in refused.json()["detail"]
            taken = client.post("/api/upload", files=png(100))
            assert taken.status_code == 200, taken.text
            again = client.post("/api/upload", files=png(400))
            assert again.json()["reason"] == refused.json()["reason"]
        folder = Path(f"/proc/{process.pid}/root{tmp_path}")
        names = [path.name for path in folder.glob("vlm-spectra-web-*/*")]
        assert len(names) == 1, "of what was refused nothing stays"
    finally:
        process.terminate()
        process.wait(WAIT)


# Clocks.

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long jump(void) {
  char text[32] = {0};
  const char *path = getenv("WALL_CLOCK_JUMP");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
  close(file);
  return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *out) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, out);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) out->tv_sec += jump();
  return failed;
}

int gettimeofday(struct timeval *out, void *zone) {
  struct timespec now;
  int failed = clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec, out->tv_usec = now.tv_nsec / 1000;
  return failed;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""
"""A library that moves a process's wall clock, and no other, by as many seconds as stand in a file."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler is not installed: apt install gcc libc6-dev")
def test_the_wall_clock_jumps(right, tmp_path, monkeypatch):
    """A day on, two days back, in front and worker: deadlines, kept captures, tokens, calls at work stay right."""
    (tmp_path / "clock.c").write_text(CLOCK)
    library, jump, tokens = tmp_path / "clock.so", tmp_path / "jump", tmp_path / "tokens"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    jump.write_text("0")
    tokens.write_text(f"first * {'a' * 20}\n")
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("WALL_CLOCK_JUMP", str(jump))
        moved = [sys.executable, "-c", "import time; print(time.time())"]
        jump.write_text("86400")
        assert float(subprocess.run(moved, capture_output=True, text=True).stdout) > time.time() + 80_000
        jump.write_text("0")
        process, address = start_server("--model", "spectra-tiny", "--device", "cpu", f"--token-file={tokens}")
    try:
        with vs.connect(address, arrays="numpy", shared_memory=False, token="a" * 20) as model:
            inputs, long = model.prepare_messages("Say hello"), model.prepare_messages_batch(["Tell me a story"] * 8)
            with model.run_with_cache(HOOK) as cache:
                model.forward(inputs, 1)
            kept = vs.PatchActivation(cache.reference(HOOK))
            for number, seconds in enumerate(("86400", "-86400")):
                story = model.stream(inputs, max_new_tokens=60, do_sample=True, seed=3)
                begun = [next(story)]
                jump.write_text(seconds)
                assert len(begun) + len(list(story)) > 1
                same(look(model), right)
                with model.run_with_hooks([(HOOK, kept)]):
                    assert np.array_equal(model.forward(inputs, 1).logits, right[1]), "the capture is still there"
                name = "bc"[number] * 20
                tokens.write_text(f"first * {'a' * 20}\nnext * {name}\n")
                until(lambda name=name: takes(address, name))
                with vs.connect(address, arrays="numpy", token="a" * 20) as hurried:
                    hurried._timeout = 1.0  # once it has connected
                    with pytest.raises(errors.DeadlineError):
                        hurried.generate(long, 1900, do_sample=True, temperature=100.0, seed=1)
                same(look(model), right)
    finally:
        stop_server(process)


def takes(address, token):
    """Whether a server takes a token."""
    try:
        vs.connect(address, arrays="numpy", token=token).close()
    except errors.UnauthenticatedError:
        return False
    return True


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
