"""Captures in shared memory, as the client of the same host keeps them: nothing is mixed up, nothing runs out."""

from __future__ import annotations

import gc
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import vlm_spectra as vs
from vlm_spectra import errors
from vlm_spectra.network.local import LocalMemory
from vlm_spectra.network.streams import Rest, TensorStream
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra.v1 import stream_pb2, tensor_pb2

HOOK = "lm.blocks.*.hook_resid_post"
LAST = "lm.blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def model(server):
    with vs.connect(server, arrays="numpy") as found:
        assert found._memory is not None
        yield found


def captured(model, inputs):
    with model.run_with_cache(HOOK) as cache:
        model.forward(inputs, logits_to_keep=None)
    return cache


def mapped():
    return Path("/proc/self/maps").read_text().count("vlm-spectra-capture")


def test_an_interrupt_leaves_no_answer_for_the_next(model, monkeypatch):
    """A cell that is interrupted between a question to the server's socket and its answer."""
    first, second = model.prepare_messages("Say hello"), model.prepare_messages("Click on it")
    right, receive = captured(model, second)[LAST], socket.recv_fds

    def interrupted(*arguments):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return receive(*arguments)

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(socket, "recv_fds", interrupted)
        captured(model, first)
    for inputs, wanted in ((second, right), (first, captured(model, first)[LAST]), (second, right)):
        assert np.array_equal(captured(model, inputs)[LAST], wanted)


def test_another_thread_and_another_process_disturb_nobody(model):
    inputs = [model.prepare_messages(f"Say {word}") for word in ("hello", "nothing")]
    right = [captured(model, each)[LAST] for each in inputs]
    wrong: list[int] = []

    def capture(number):
        for _ in range(10):
            if not np.array_equal(captured(model, inputs[number])[LAST], right[number]):
                wrong.append(number)

    threads = [threading.Thread(target=capture, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if not child:
        for _ in range(50):
            model._memory.answers()
        os._exit(0)
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert not wrong


def test_arrays_that_are_kept_hold_no_files(model):
    inputs = model.prepare_messages("Say hello")
    captured(model, inputs)
    gc.collect()
    before, maps = len(os.listdir("/proc/self/fd")), mapped()
    kept = [captured(model, inputs)[LAST] for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert mapped() == maps + 20
    assert all(np.array_equal(each, kept[0]) for each in kept)
    kept[0][...] = 7.0
    assert kept[1].max() != 7.0, "what is changed stays with its array"
    del kept
    gc.collect()
    assert mapped() == maps


@pytest.mark.parametrize("there", ["no", "short"])
def test_memory_that_is_not_there_is_no_tensor(monkeypatch, there):
    """What is announced in shared memory is there whole, or the capture fails: never other bytes in its place."""
    tensor = tensor_pb2.TensorHeader(index=0, name="x", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[4], byte_count=16)
    tensor.shared.SetInParent()
    messages = [
        spb.RunWithCacheResponse(header=stream_pb2.Header(request_id="r", capture_id="c", tensors=[tensor])),
        spb.RunWithCacheResponse(ready={"index": 0}),
        spb.RunWithCacheResponse(summary=stream_pb2.Summary()),
    ]
    memory = None if there == "no" else LocalMemory("nobody")
    monkeypatch.setattr(LocalMemory, "segment", lambda *_: memoryview(bytearray(8)))

    class Played(list):
        def cancel(self):
            pass

    rest = Rest(lambda *_: pytest.fail("nothing to go on with"), lambda *_: None, memory)
    stream = TensorStream(Played(each.SerializeToString() for each in messages), "server:1", "numpy", rest=rest)
    with pytest.raises(errors.InternalError, match="in shared memory, where it is not"):
        stream.wait()
    with pytest.raises(errors.InternalError):
        stream.get("x")
