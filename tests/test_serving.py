"""The server: fair and separate, rid of clients that leave, alive after bad input, seen from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import vlm_spectra as vs
from calls import WAIT as LONG
from calls import states, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from transformers.utils import logging as transformers_logging
from vlm_spectra import errors
from vlm_spectra.arrays import to_numpy
from vlm_spectra.v1 import model_service_pb2
from vlm_spectra_server.serving import health as health_module
from vlm_spectra_server.serving import models as models_module
from vlm_spectra_server.serving import worker as worker_module
from vlm_spectra_server.serving.budget import Budget
from vlm_spectra_server.serving.health import Health
from vlm_spectra_server.serving.host import GRANTED, WAIT, Loading
from vlm_spectra_server.serving.limits import Limits
from vlm_spectra_server.serving.models import Models
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.serving.stalls import Stalls

POST = "lm.blocks.*.hook_resid_post"


def test_it_listens_on_loopback_alone(server):
    host, port = server.split(":")
    assert host == "127.0.0.1"
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {host}:
        if not address.startswith("127."):
            with (
                pytest.raises((ConnectionError, TimeoutError)),
                socket.create_connection((address, int(port)), timeout=2),
            ):
                pass


def test_health_and_reflection(server):
    with grpc.insecure_channel(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "vlm_spectra.v1.SpectraService"):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        from google.protobuf.descriptor_pool import DescriptorPool
        from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

        database = ProtoReflectionDescriptorDatabase(channel)
        assert "vlm_spectra.v1.SpectraService" in database.get_services()
        service = DescriptorPool(database).FindServiceByName("vlm_spectra.v1.SpectraService")
        assert {"Prepare", "Generate", "RunWithCache"} <= set(service.methods_by_name)


def test_who_watches_health_and_leaves_at_once_is_forgotten(front):
    with grpc.insecure_channel(front.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for number in range(500):
            watched = stub.Watch(health_pb2.HealthCheckRequest(service=f"nothing-{number}"))
            if number % 2:
                assert next(watched).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            watched.cancel()
        stub.Check(health_pb2.HealthCheckRequest())
        until(lambda: not any(watch.service.startswith("nothing") for watch in front.health._watches))


def test_a_slow_watch_hears_the_newest_status_alone():
    """What came and went while a message was on its way is not told, and nothing twice."""
    health, told, may = Health(Stalls(LONG)), [], threading.Semaphore(0)

    def send(response):
        told.append(response.status)
        may.acquire()

    status = health_pb2.HealthCheckResponse
    context = SimpleNamespace(add_callback=lambda left: True)
    health.Watch(health_pb2.HealthCheckRequest(service="a"), context, send)
    until(lambda: told)
    for each in (status.NOT_SERVING, status.NOT_SERVING, status.SERVING):
        health.set("a", each)
        health.set("b", each)
    may.release(2)
    until(lambda: told == [status.SERVICE_UNKNOWN, status.SERVING])
    until(lambda: not any(watch.sending for watch in health._watches))
    health.set("a", status.SERVING)
    may.release()
    health.stop()
    until(lambda: told == [status.SERVICE_UNKNOWN, status.SERVING, status.NOT_SERVING])
    may.release()


@contextmanager
def unread_watch(address):
    """A `Watch` of a client whose HTTP/2 window is 0: its messages never leave the server."""

    def frame(kind, flags, stream, data):
        return struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + data

    headers = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Watch", ":authority": "x"}
    headers |= {"te": "trailers", "content-type": "application/grpc"}
    fields = [
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in headers.items()
    ]
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(4, 0, 0, struct.pack(">HI", 4, 0))  # SETTINGS: the window
            + frame(1, 4, 1, b"".join(fields))
            + frame(0, 1, 1, bytes(5))
        )
        yield


@pytest.fixture
def empty():
    """A server without a model, in this process."""
    server = Server()
    server.guard.stalls.start()
    server._grpc.start()
    ending = threading.Thread(target=server.stop, args=(1.0,), daemon=True)
    yield server
    ending.start()
    ending.join(LONG)
    assert not ending.is_alive()


def test_a_watch_that_nobody_reads_is_in_nobodys_way(empty):
    """Health is asked and watched by others, models change, and the server stops."""
    status = health_pb2.HealthCheckResponse
    with unread_watch(empty.address), grpc.insecure_channel(empty.address) as channel:
        until(lambda: any(watch.sending for watch in empty.health._watches))
        seen = states(channel, "")
        until(lambda: seen == [status.NOT_SERVING])
        changing = threading.Thread(target=empty.health.set, args=("", status.SERVING), daemon=True)
        changing.start()
        until(lambda: seen == [status.NOT_SERVING, status.SERVING])
        request = health_pb2.HealthCheckRequest()
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=LONG).status == status.SERVING
        assert any(watch.sending for watch in empty.health._watches)
        ending = threading.Thread(target=empty.stop, args=(1.0,), daemon=True)
        ending.start()
        ending.join(LONG)
        assert not ending.is_alive()


def test_a_watch_that_nobody_reads_is_ended(empty, monkeypatch, caplog):
    monkeypatch.setattr(health_module, "PATIENCE", 0.2)
    with unread_watch(empty.address):
        until(lambda: "its client let it stand" in caplog.text)
        until(lambda: not empty.health._watches)


def test_the_front_imports_no_torch():
    code = "import sys, vlm_spectra_server.serving.server; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_are_listed(server, remote):
    with grpc.insecure_channel(server) as channel:
        call = channel.unary_unary(
            "/vlm_spectra.v1.ModelService/ListModels",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=model_service_pb2.ListModelsResponse.FromString,
        )
        models = call(model_service_pb2.ListModelsRequest()).models
    ready = model_service_pb2.MODEL_STATE_READY
    assert [model.name for model in models if model.state == ready] == ["spectra-tiny"]
    assert remote.info.parameters > 1_000_000


def test_two_clients_never_see_each_other(server, screenshot, hooked):
    """50 rounds with different prompts, hooks and interventions at once."""
    cases = [
        ("Click on the red circle", POST, [("lm.blocks.0.hook_resid_post", vs.ScaleActivation(0.5))]),
        ("Say hello", "lm.blocks.*.attn.hook_pattern", [("lm.blocks.1.hook_mlp_out", vs.ZeroAblation())]),
    ]
    faults: list[object] = []

    def expected(task, hooks, interventions):
        with hooked.run_with_hooks(interventions), hooked.run_with_cache(hooks) as cache:
            output = hooked.forward(hooked.prepare_messages(task, screenshot), 1)
        return {name: to_numpy(cache[name]) for name in cache.names}, to_numpy(output.logits)

    right = [expected(*case) for case in cases]

    def client(number):
        try:
            task, hooks, interventions = cases[number]
            with vs.connect(server, arrays="numpy") as model:
                inputs = model.prepare_messages(task, screenshot)
                for _ in range(50):
                    with model.run_with_hooks(interventions), model.run_with_cache(hooks) as cache:
                        output = model.forward(inputs, 1)
                    arrays, logits = right[number]
                    assert cache.names == list(arrays)
                    assert all((cache[name] == array).all() for name, array in arrays.items())
                    assert (output.logits == logits).all()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_first_tensor_arrives_while_the_model_runs(busy):
    """The model stops after two layers; a block that is left frees it for the next request."""
    busy.idle()
    with vs.connect(busy.address, arrays="numpy") as model:
        with pytest.raises(RuntimeError, match="enough"), model.run_with_cache(POST) as cache:
            model.forward(model.prepare_messages("halfway"), logits_to_keep=None)
            assert cache["lm.blocks.0.hook_resid_post"].size
            assert not cache._source.arrived("lm.blocks.2.hook_resid_post")
            busy.at_work(1)
            raise RuntimeError("enough")
        busy.idle()
        assert model.generate(model.prepare_messages("Say hello"), max_new_tokens=1).sequences.shape[1] > 1


def test_nothing_runs_after_the_last_capture(remote):
    with remote.run_with_cache("lm.blocks.2.hook_resid_post") as cache:
        remote.forward(remote.prepare_messages("Say hello"), logits_to_keep=None)
    assert cache._source._stream.summary.layers_run == 3 < remote.info.layers


def test_a_run_ends_before_its_next_layer(hooked, inputs):
    """What a cancellation, a deadline and a vanished client all come to: the check before each layer."""
    from vlm_spectra.calls import ForwardOptions
    from vlm_spectra_server.hooked.delivery import Delivery

    class Leaving(Delivery):
        layers = 0

        def progress(self, phase, done, total):
            self.layers = done

        def check(self):
            if self.layers == 2:
                raise errors.CancelledError("the client has gone.")

    delivery = Leaving()
    with pytest.raises(errors.CancelledError):
        hooked.forward_into(delivery, inputs, ForwardOptions())
    assert delivery.layers == 2


def test_turns_are_fair_and_the_queue_is_bounded():
    from vlm_spectra_server.serving.turns import FairQueue, Job

    queue = FairQueue(bound=5)
    for number, client in enumerate(["busy", "busy", "busy", "calm", "other"]):
        queue.put(Job(number, client, "Forward", b"", {}, None))
    with pytest.raises(errors.BusyError, match="try again") as caught:
        queue.put(Job(9, "late", "Forward", b"", {}, None))
    assert caught.value.retry_after
    assert [queue.take().client for _ in range(5)] == ["busy", "calm", "other", "busy", "busy"]
    assert queue.take() is None


def test_models_are_loaded_and_unloaded_while_others_serve(server, remote, tmp_path):
    from vlm_spectra_server.spectra_tiny.parts import write_random

    name = str(write_random(tmp_path / "second", text={"num_hidden_layers": 2}))

    def ask(method, request, response):
        with grpc.insecure_channel(server) as channel:
            call = channel.unary_unary(
                f"/vlm_spectra.v1.ModelService/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response.FromString,
            )
            return call(request, timeout=LONG)

    ask("LoadModel", model_service_pb2.LoadModelRequest(name=name), model_service_pb2.LoadModelResponse)
    assert remote.forward(remote.prepare_messages("Hi"), 1).logits.shape[1] == 1
    with vs.connect(server, model=name) as second:
        assert second.info.layers == 2
        assert second.forward(second.prepare_messages("Hi"), 1).logits.shape[1] == 1
        ask("UnloadModel", model_service_pb2.UnloadModelRequest(name=name), model_service_pb2.UnloadModelResponse)
        with pytest.raises(errors.UnknownModelError):
            second.forward(second.prepare_messages("Hi"))
    assert remote.forward(remote.prepare_messages("Hi"), 1).logits.shape[1] == 1


def test_a_model_that_loads_says_how_far_it_is():
    shares = []
    with worker_module.telling(shares.append):
        vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu")
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    assert len(shares) > 50, "every percent, of 117 weights"
    with worker_module.telling(shares.append):
        assert list(transformers_logging.tqdm([1, 2, 3], desc="Something else", disable=True)) == [1, 2, 3]
    assert shares[-1] == 1.0


class _Host:
    """A model as `Models` sees it."""

    def __init__(self, name, held, used=0.0, busy=False, state=model_service_pb2.MODEL_STATE_READY):
        self.loading, self.model = Loading(name), model_service_pb2.Model(name=name, state=state)
        self.held, self.used, self.busy, self.placed = held, used, busy, state == model_service_pb2.MODEL_STATE_READY

    def leave(self):
        return not self.busy

    def close(self):
        self.held = {}


def models_of(*hosts, bound=0):
    gone = []
    models = Models(Limits(models_bytes=bound, models=9), Budget(0), lambda name, state: gone.append(name))
    models.hosts = {host.loading.name: host for host in hosts}
    return models, gone


def test_the_least_recently_used_idle_model_leaves_for_another():
    """On the new one's device, no more of them than needed, none that is at work."""
    old, older = _Host("old", {"cuda:0": 30}, used=2.0), _Host("older", {"cuda:0": 20}, used=1.0)
    other, busy = _Host("elsewhere", {"cuda:1": 90}), _Host("busy", {"cuda:0": 30}, busy=True)
    new = _Host("new", {}, busy=True, state=model_service_pb2.MODEL_STATE_LOADING)
    models, gone = models_of(old, older, other, busy, new)

    def ask(size, free):
        return models.room(new, size, {"cuda:0": (0, free, 100)})

    assert ask(20, 20) == GRANTED
    assert (ask(40, 20), gone) == (WAIT, ["older"])
    assert ask(40, 40) == GRANTED
    assert (ask(60, 40), gone) == (WAIT, ["older", "old"])
    refusal = ask(80, 70)
    assert "'new' takes" in refusal
    assert "'busy'" in refusal
    assert gone == ["older", "old"]
    with pytest.raises(errors.UnknownModelError, match=r"'old' any more \(it left to make room for 'new'"):
        models.get("old")


def test_models_at_a_time(monkeypatch):
    """One more than `max_models`: the least recently used idle one leaves, once the new one is known to be sound."""
    ready, loading, failed = (
        getattr(model_service_pb2, f"MODEL_STATE_{name}") for name in ("READY", "LOADING", "FAILED")
    )
    monkeypatch.setattr(
        models_module, "ModelHost", lambda each, *rest: _Host(each.name, {}, used=9.0, busy=True, state=loading)
    )
    old, new, busy = _Host("old", {}, used=1.0), _Host("new", {}, used=2.0), _Host("busy", {}, used=0.0, busy=True)
    models, gone = models_of(new, old, busy)
    models.limits = Limits(models=4)

    def ask(name):
        return models.room(models.hosts[name], 0, {})

    def settle(name, state):
        models.hosts[name].model.state, models.hosts[name].busy = state, False

    models.load(Loading("fourth"))
    assert (ask("fourth"), gone) == (GRANTED, ["fourth"])
    settle("fourth", ready)
    models.load(Loading("broken"))
    settle("broken", failed)  # before it asked for a place
    assert gone == ["fourth", "broken"], "a load that fails leaves the others as they are"
    models.load(Loading("fifth"))
    assert gone == ["fourth", "broken", "broken", "fifth"]
    assert (ask("fifth"), gone[4:]) == (WAIT, ["old"])
    assert ask("fifth") == GRANTED
    settle("fifth", ready)
    assert list(models.hosts) == ["new", "busy", "fourth", "fifth"]

    models.hosts["new"].busy = models.hosts["fourth"].busy = True
    models.load(Loading("sixth"))
    with pytest.raises(errors.BusyError):
        models.load(Loading("seventh"))  # only one is idle, and it leaves for the sixth
    models.hosts["fifth"].busy = True
    assert "4 models (max_models), all at work: 'new', 'busy', 'fourth', 'fifth'" in ask("sixth")
    settle("sixth", failed)
    with pytest.raises(errors.BusyError) as caught:
        models.load(Loading("seventh"))
    assert caught.value.metadata == {"limit": "max_models", "value": "4", "asked": "5"}
    assert models.load(Loading("fifth")) is models.hosts["fifth"]


def test_a_load_that_fails_moves_nobody(tmp_path):
    """Where there are as many models as there may be: none leaves for one that is not there, or is damaged."""
    from vlm_spectra_server.spectra_tiny.parts import write_random

    damaged, sound = (write_random(tmp_path / each, text={"num_hidden_layers": 1}) for each in ("damaged", "sound"))
    (damaged / "tokenizer.json").write_text("{")
    server = Server()
    server.models.limits = replace(server.models.limits, models=1)

    def load(name):
        host = server.models.load(Loading(str(name), device="cpu"))
        until(host.settled.is_set)
        return host

    try:
        first = load("spectra-tiny")
        for name in ("no/such/directory", damaged, tmp_path):
            assert "cannot be loaded" in load(name).model.error
            assert first.ready
            assert server.models.get("") is first
        assert load(sound).ready
        assert list(server.models.hosts) == [str(sound)]
    finally:
        server.stop(0)


def test_a_model_that_names_no_device_goes_where_the_server_was_told_to(tmp_path):
    """And not to the first GPU, which may be somebody else's: here to one that there is not, which says so."""
    from vlm_spectra_server.spectra_tiny.parts import write_random

    name = str(write_random(tmp_path / "second", text={"num_hidden_layers": 1}))
    server = Server(allow_models=["*"])
    server.start(Loading("spectra-tiny", device="cuda:99"))
    try:
        with grpc.insecure_channel(server.address) as channel:
            call = channel.unary_unary(
                "/vlm_spectra.v1.ModelService/LoadModel",
                request_serializer=lambda message: message.SerializeToString(),
            )
            call(model_service_pb2.LoadModelRequest(name=name), timeout=LONG)
        with pytest.raises(errors.UnavailableError, match="device 'cuda:99' is not possible here"):
            vs.connect(server.address, model=name, load_timeout=LONG)
    finally:
        server.stop(0)


def test_a_request_without_a_model_is_for_the_only_one_that_is_loaded():
    ready, loading, failed = (
        getattr(model_service_pb2, f"MODEL_STATE_{name}") for name in ("READY", "LOADING", "FAILED")
    )
    first = _Host("first", {}, state=loading)
    models, _ = models_of(first)
    assert models.get("") is first
    models, _ = models_of(_Host("bad", {}, state=failed), first, _Host("second", {}))
    assert models.get("").loading.name == "second"
    first.model.state = ready
    with pytest.raises(errors.UnknownModelError, match="several models"):
        models.get("")


def test_a_model_that_cannot_fit_is_refused_and_nobody_leaves_for_it():
    idle, new = _Host("idle", {"cpu": 3_000_000_000}), _Host("new", {}, busy=True)
    models, gone = models_of(idle, new, bound=4_000_000_000)
    assert models.room(new, 5_000_000_000, {"cpu": (0, 1 << 40, 1 << 40)}) == (
        "'new' takes 5.00 GB, and models may take 4.00 GB (max_models_gb)."
    )
    assert models.room(new, 1 << 41, {"cpu": (0, 1 << 20, 1 << 40)}).endswith("and cpu has 1099.51 GB in all.")
    assert models.room(new, 3_500_000_000, {"cpu": (600_000_000, 1 << 40, 1 << 40)}).startswith("'new' takes 4.10 GB")
    assert gone == []
    assert models.room(new, 3_400_000_000, {"cpu": (600_000_000, 1 << 40, 1 << 40)}) == WAIT
    assert gone == ["idle"]
    assert models.room(new, 3_400_000_000, {"cpu": (600_000_000, 1 << 40, 1 << 40)}) == GRANTED


def test_two_models_that_load_at_once_do_not_count_the_same_memory():
    loading = model_service_pb2.MODEL_STATE_LOADING
    first, second = _Host("first", {"cuda:0": 60}, busy=True, state=loading), _Host("second", {}, busy=True)
    models, _ = models_of(first, second)
    assert models.room(second, 60, {"cuda:0": (0, 100, 100)}) == WAIT
    first.model.state = model_service_pb2.MODEL_STATE_READY
    assert models.room(second, 60, {"cuda:0": (0, 40, 100)}).startswith("'second' takes")
    assert models.room(second, 40, {"cuda:0": (0, 40, 100)}) == GRANTED


def test_two_models_that_load_at_once_do_not_wait_for_each_other():
    """Where one at work leaves no room for either, both are told so."""
    loading, free = model_service_pb2.MODEL_STATE_LOADING, {"cuda:0": (0, 40, 100)}
    first, second = (_Host(name, {}, busy=True, state=loading) for name in ("first", "second"))
    models, _ = models_of(first, second, _Host("third", {"cuda:0": 60}, busy=True))
    for host in (first, second):
        assert "those at work stay" in models.room(host, 60, free)
    models.limits = Limits(models=1)
    for host in (first, second):
        assert "all at work: " in models.room(host, 40, free)


def test_a_model_is_found_while_others_come_and_go():
    models, _ = models_of(_Host("first", {}), _Host("second", {}))

    class State:
        """Looking at it, another model comes."""

        @property
        def state(self):
            models.hosts[str(len(models.hosts))] = _Host("late", {})
            return model_service_pb2.MODEL_STATE_READY

    models.hosts["first"].model = State()
    assert models.get("second") is models.hosts["second"]


def test_weights_are_measured_before_they_are_read(tmp_path):
    from safetensors.numpy import save_file
    from vlm_spectra_server.serving.devices import weights

    matrix = np.zeros((10, 20), np.float32)
    save_file({"a": matrix, "b": matrix.astype(np.int64)}, str(tmp_path / "model.safetensors"))
    assert weights(str(tmp_path), "", "") == 800 + 1600
    assert weights(str(tmp_path), "float16", "") == 400 + 1600
    index = {"weight_map": {"c": "part.safetensors"}}
    save_file({"c": matrix}, str(tmp_path / "part.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights(str(tmp_path), "", "") == 800
    assert weights("no/such-model", "", "") == 0


def test_models_come_and_go_with_their_memory(tmp_path):
    """A second model pushes the first out, none pushes out one at work, an unloaded one ends its request first.

    The health of each is watched all the while.
    """
    from vlm_spectra_server.spectra_tiny.parts import write_random

    names = [str(write_random(tmp_path / each, text={"num_hidden_layers": 1})) for each in ("one", "two", "three")]
    status = health_pb2.HealthCheckResponse
    server = Server()
    seen: dict[str, list[int]] = {}

    try:
        with grpc.insecure_channel(server.address) as channel:
            server._grpc.start()
            for name in names:
                seen[name] = states(channel, f"vlm_spectra.model/{name}")
                until(lambda name=name: seen[name] == [status.SERVICE_UNKNOWN])
            first = server.models.load(Loading(names[0], device="cpu"))
            until(lambda: seen[names[0]][-1] == status.SERVING)
            assert seen[names[0]] == [status.SERVICE_UNKNOWN, status.NOT_SERVING, status.SERVING]
            size = first.model.memory
            assert size > 10_000_000
            server.models.limits = replace(server.models.limits, models_bytes=int(size * 1.6))

            second = server.models.load(Loading(names[1], device="cpu"))
            until(second.settled.is_set)
            assert second.ready, second.model.error
            assert list(server.models.hosts) == [names[1]]
            until(lambda: seen[names[0]][-1] == status.SERVICE_UNKNOWN)
            until(lambda: seen[names[1]][-1] == status.SERVING)

            with vs.connect(server.address, arrays="numpy") as model:
                assert model.info.name == names[1]
                inputs = model.prepare_messages("Tell me a long story")
                os.kill(second.process.pid, signal.SIGSTOP)  # its request is at work as long as we want
                answers = []
                asking = threading.Thread(target=lambda: answers.append(model.generate(inputs, 2)))
                asking.start()
                until(lambda: second.busy)
                third = server.models.load(Loading(names[2], device="cpu"))
                until(third.settled.is_set)
                assert f"those at work stay: '{names[1]}'" in third.model.error
                assert "max_models_gb" in third.model.error
                until(lambda: seen[names[2]] == [status.SERVICE_UNKNOWN, status.NOT_SERVING])
                unloading = threading.Thread(target=server.models.unload, args=(names[1],))
                unloading.start()
                until(lambda: seen[names[1]][-1] == status.SERVICE_UNKNOWN)
                os.kill(second.process.pid, signal.SIGCONT)
                for thread in (asking, unloading):
                    thread.join(LONG)
                    assert not thread.is_alive()
                assert answers[0].sequences.shape[1] > 2
                assert second.process.poll() is not None
    finally:
        server.stop(0)


def test_a_deadline_ends_a_run(busy):
    busy.idle()
    with vs.connect(busy.address, arrays="numpy") as model:
        inputs = model.prepare_messages("wait")
        model._timeout = 1.0  # for what has connected and prepared without one
        with pytest.raises(errors.DeadlineError):
            model.forward(inputs)
        busy.idle()
        model._timeout = None
        assert model.generate(model.prepare_messages("Say hello"), max_new_tokens=1).text


def test_a_capture_over_the_limit_is_refused_before_it_runs(busy):
    with vs.connect(busy.address) as model:
        inputs = model.prepare_messages("one two three four five six seven eight nine ten " * 20)
        with pytest.raises(errors.CaptureTooLargeError, match=r"MB are possible.*would fit"):
            with model.run_with_cache("lm.blocks.*.attn.*"):
                model.forward(inputs)
        with model.run_with_cache("lm.blocks.*.attn.hook_pattern", positions="last") as cache:
            model.forward(inputs, logits_to_keep=None)
        assert len(cache) == model.info.layers


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda m: m.run_with_cache("lm.blocks.1.hook_resid_pots").__enter__(),
            errors.UnknownHookError,
            "hook_resid_post",
        ),
        (lambda m: m.run_with_cache("lm.blocks.99.hook_resid_post").__enter__(), errors.UnknownHookError, "0 to"),
        (lambda m: m.prepare_messages("Click", b"not an image"), errors.InvalidImageError, "not an image"),
        (lambda m: m.prepare_messages("Click", "/no/such.png"), errors.InvalidImageError, "cannot be read"),
        (
            lambda m: m.prepare_messages("Click", Image.new("1", (30_000, 30_000))),
            errors.InvalidImageError,
            "64,000,000",
        ),
        (lambda m: m.prepare_messages("  "), errors.InvalidInputError, "empty"),
        (lambda m: m.prepare_messages("word " * 3000), errors.PromptTooLongError, "context"),
        (lambda m: m.generate(m.prepare_messages("Hi"), 0), errors.InvalidInputError, "at least 1"),
        (lambda m: m.forward("Hi"), errors.InvalidInputError, "prepare_messages"),
        (lambda m: m.attribute(m.prepare_messages("Hi"), target="two words"), errors.InvalidInputError, "tokens"),
        (
            lambda m: m.run_with_hooks([("lm.hook_embed", lambda x: x)]).__enter__(),
            errors.UnsupportedInterventionError,
            "cannot be sent",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_the_server_goes_on(remote, call, kind, words):
    with pytest.raises(kind) as caught:
        call(remote)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert remote.forward(remote.prepare_messages("Hi"), 1).logits.shape[1] == 1


def test_a_patch_of_the_wrong_shape(remote):
    inputs = remote.prepare_messages("Hi")
    patch = vs.PatchActivation(np.zeros((3, 7), np.float32))
    with (
        remote.run_with_hooks([("lm.blocks.1.hook_resid_post", patch)]),
        pytest.raises(errors.ShapeMismatchError) as caught,
    ):
        remote.forward(inputs)
    assert "[3, 7]" in str(caught.value)
    assert caught.value.field == "value"


def test_a_reference_to_an_earlier_capture(remote, screenshot):
    inputs = remote.prepare_messages("Click on the red circle", screenshot)
    with remote.run_with_cache(POST) as cache:
        clean = remote.forward(inputs, 1)
    name = "lm.blocks.2.hook_resid_post"
    reference = cache.reference(name)
    assert isinstance(reference, vs.CaptureRef)
    with remote.run_with_hooks(
        [("lm.blocks.0.hook_resid_post", vs.ZeroAblation()), (name, vs.PatchActivation(reference))]
    ):
        patched = remote.forward(inputs, 1)
    assert (to_numpy(patched.logits) == to_numpy(clean.logits)).all()
    gone = vs.PatchActivation(vs.CaptureRef("0" * 32, name))
    with remote.run_with_hooks([(name, gone)]), pytest.raises(errors.CaptureNotFoundError):
        remote.forward(inputs)


def test_an_image_crosses_the_wire_once(server, screenshot, monkeypatch):
    sent = []
    original = vs.RemoteVLM._unary

    def watched(self, method, request, *rest):
        sent.extend(len(image.data) for image in getattr(request, "images", ()))
        return original(self, method, request, *rest)

    monkeypatch.setattr(vs.RemoteVLM, "_unary", watched)
    picture = screenshot.rotate(90, expand=True)
    with vs.connect(server) as model:
        inputs = model.prepare_messages("Click on the red circle", picture)
        model.forward(inputs, 1)
        model.generate(inputs, 2)
        model.prepare_messages("Something else", picture)
    assert len(sent) == 1


def test_a_wrong_address_and_an_unknown_model(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(errors.UnavailableError, match="cannot be reached"):
        vs.connect(f"127.0.0.1:{port}")
    with pytest.raises(errors.InvalidInputError, match="host:port"):
        vs.connect("gpu-box")
    with pytest.raises(errors.UnknownModelError, match="spectra-tiny"):
        vs.connect(server, model="no/such-model")


def test_unloading_a_model_that_is_replaced_at_that_moment(monkeypatch):
    """The one that came meanwhile stays."""
    failed = _Host("a", {}, state=model_service_pb2.MODEL_STATE_FAILED)
    failed.drain = lambda: None
    new = _Host("a", {})
    models, _ = models_of(failed)
    find = models.get

    def late(name):
        found = find(name)
        models.hosts[name] = new
        return found

    monkeypatch.setattr(models, "get", late)
    models.unload("a")
    assert models.hosts == {"a": new}
