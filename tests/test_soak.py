"""The short form of `make soak`: a few clients for a few seconds. Memory is the long form's to judge, and that of ten
thousand requests here (`make test-long`)."""

from __future__ import annotations

import itertools
import threading

import grpc
import pytest
import vlm_spectra as vs
from calls import until
from conftest import start_server, stop_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from soak import cases, report
from soak.run import Plan, soak
from soak.watch import Held, children
from vlm_spectra import errors
from vlm_spectra_server.spectra_tiny.parts import write_random


def test_nothing_wrong_nothing_lost_nothing_left(hooked, tmp_path):
    """Random calls of every kind, cancels, cut connections and bad input, while clients and the worker are killed."""
    second = write_random(tmp_path / "second", text={"num_hidden_layers": 2})
    expected = cases.expected(hooked, vs.HookedVLM.from_pretrained(str(second), device="cpu"))
    plan = Plan(
        seconds=10.0,
        warm_up=0.0,
        clients=8,
        processes=2,
        least=25,
        worker_kills=1,
        client_kills=1,
        kept_seconds=1,
        keepalive=1.5,
    )
    outcome = soak(plan, tmp_path, expected, str(second))
    assert not outcome.faults
    assert (outcome.worker_kills, outcome.client_kills) == (1, 1)
    assert any(result == "right" for _, result, _, _ in outcome.notes)
    assert outcome.server_calls["OK"] > 0
    assert not [leak for leak in report.leaks(outcome, growth=float("inf")) if "threads" not in leak]


REQUESTS = 10_000
CLIENTS = 4
HOOK = "lm.blocks.1.hook_resid_post"


def some(address: str, numbers: range) -> None:
    """Small requests of every kind, one after the other; every fiftieth is the first of a new connection."""
    for start in range(numbers.start, numbers.stop, 50):
        with vs.connect(address, arrays="numpy", shared_memory=start % 100 == 0) as model:
            inputs = model.prepare_messages("Say hello")
            for number in range(start, min(start + 50, numbers.stop)):
                one(address, model, inputs, number)


def one(address: str, model: vs.RemoteVLM, inputs: vs.Inputs, number: int) -> None:
    match number % 10:
        case 0 | 1 | 2:
            assert model.forward(inputs, 1).logits.shape[1] == 1
        case 3 | 4:
            with model.run_with_cache(HOOK) as cache:
                model.forward(inputs, logits_to_keep=None)
            assert cache[HOOK].shape[1] == inputs.input_ids.shape[1]
        case 5:
            assert model.generate(inputs, 2).text
        case 6:
            assert model.prepare_messages(f"This is the prompt number {number}").text
        case 7:
            with pytest.raises(errors.UnknownHookError), model.run_with_cache(f"lm.blocks.{number}.hook_x"):
                model.forward(inputs, 1)
        case 8:
            next(model.stream(inputs, 20))
        case _:
            with grpc.insecure_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                watched = health.Watch(health_pb2.HealthCheckRequest(service=f"nothing-{number}"), timeout=60)
                assert next(watched).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_memory_after_ten_thousand_requests():
    """Neither front nor worker holds more than 5% more after all of them than after the first half."""
    process, address = start_server("--model", "spectra-tiny", "--device", "cpu", "--kept-seconds", "1")
    try:
        pids, held, faults = [process.pid, *children(process.pid)["running"]], [], []

        def client(numbers: range) -> None:
            try:
                some(address, numbers)
            except BaseException as fault:
                faults.append(fault)

        for begin, end in itertools.pairwise((0, REQUESTS // 2, REQUESTS)):
            each = (end - begin) // CLIENTS
            parts = [range(begin + each * part, begin + each * (part + 1)) for part in range(CLIENTS)]
            threads = [threading.Thread(target=client, args=(part,)) for part in parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not faults
            until(lambda: not Held.by(pids[0]).segments)  # captures leave at their time
            held.append([Held.by(pid) for pid in pids])
        assert len(pids) == 2
        print([[round(each.memory / 1e6, 1) for each in half] for half in held])
        for before, after in zip(*held, strict=True):
            assert after.memory < before.memory * 1.05, f"{before.memory / 1e6:.1f} MB became {after.memory / 1e6:.1f}"
            assert after.files <= before.files + 2
            assert after.threads <= before.threads + 4
    finally:
        stop_server(process)
