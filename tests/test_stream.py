"""The stream: chunks by hand equal to the generated classes, packed without loss, resumed after cuts, shared."""

from __future__ import annotations

import errno
import gc
import os
import random
import socket
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import vlm_spectra as vs
from calls import Raw, run, until
from conftest import start_server
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy import Proxy
from vlm_spectra import dtypes, errors
from vlm_spectra.arrays import to_numpy
from vlm_spectra.network import chunks, compression
from vlm_spectra.network.local import LocalMemory
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra.v1 import tensor_pb2
from vlm_spectra_server.serving import guard, services, stores
from vlm_spectra_server.serving.budget import Budget
from vlm_spectra_server.serving.local import LocalDoor
from vlm_spectra_server.serving.pipe import shared_memory
from vlm_spectra_server.serving.sending import Sending
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.serving.stores import CaptureStore, StoredCapture
from vlm_spectra_server.serving.turns import Job

POST = "lm.blocks.*.hook_resid_post"
TEXT = "one two three four five six seven eight nine ten " * 60

chunk_fields = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=300)
)


def generated(index, offset, crc, data):
    chunk = tensor_pb2.TensorChunk(index=index, offset=offset, crc32c=crc, data=data)
    return spb.RunWithCacheResponse(chunk=chunk)


@given(chunk_fields)
def test_a_chunk_is_written_and_read_as_by_the_generated_classes(fields):
    message = generated(*fields).SerializeToString()
    assert chunks.pack(*fields) == message
    parsed = chunks.parse(message)
    assert (parsed.tensor, parsed.offset, parsed.crc32c, bytes(parsed.data)) == fields


@settings(max_examples=500)
@given(chunk_fields, st.data())
def test_what_the_hand_parser_takes_the_generated_classes_read_alike(fields, data):
    message = bytearray(generated(*fields).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message)))
        message[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    parsed = chunks.parse(bytes(message))
    if parsed is not None:
        chunk = spb.RunWithCacheResponse.FromString(bytes(message)).chunk
        assert (parsed.tensor, parsed.offset, parsed.crc32c, bytes(parsed.data)) == (
            chunk.index,
            chunk.offset,
            chunk.crc32c,
            chunk.data,
        )


def test_other_messages_are_left_to_the_generated_classes():
    others = [
        spb.RunWithCacheResponse(token=spb.Token(id=7)),
        spb.RunWithCacheResponse(ready=tensor_pb2.TensorReady(index=3)),
        spb.RunWithCacheResponse(),
    ]
    assert [chunks.parse(other.SerializeToString()) for other in others] == [None] * 3
    twice = generated(1, 2, 3, b"x").SerializeToString() * 2
    assert chunks.parse(twice) is None


@pytest.mark.parametrize("item", [1, 2, 4, 8])
def test_compression_loses_nothing(item):
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32).tobytes()
    for data in (values, values[:-3], b""):
        packed = compression.compress(data, item)
        assert bytes(compression.decompress(packed, item, len(data))) == data


def test_regrouped_bytes_compress_better():
    values = np.random.default_rng(0).standard_normal(1 << 19).astype(dtypes.to_numpy("bfloat16")).tobytes()
    assert len(compression.compress(values, 2)) < 0.95 * len(compression.compress(values, 1))


def test_a_compressed_chunk_that_is_damaged_or_too_large():
    packed = compression.compress(bytes(1 << 20), 1)
    with pytest.raises(errors.InternalError, match="1048576 bytes, where 100 remain"):
        compression.decompress(packed, 1, 100)
    with pytest.raises(errors.InternalError, match="cannot be read"):
        compression.decompress(b"not zstd at all", 1, 100)


@pytest.mark.parametrize(("speed", "taken"), [(None, False), (12e6, True), (900e6, False)])
def test_auto_compresses_on_slow_links_alone(speed, taken):
    assert compression.worthwhile("auto", speed) is taken
    assert compression.worthwhile("zstd", speed)
    assert not compression.worthwhile("none", speed)


@pytest.fixture(scope="module")
def front(wide_front):
    return wide_front


def captured(model, **selection):
    inputs = model.prepare_messages(TEXT)
    with model.run_with_cache(POST, **selection) as cache:
        model.forward(inputs, logits_to_keep=None)
    return cache


def as_bytes(cache):
    return {name: to_numpy(cache[name]).tobytes() for name in cache.names}


@pytest.fixture(scope="module")
def truth(front):
    with vs.connect(front.address, shared_memory=False) as model:
        return as_bytes(captured(model))


def counted(front, monkeypatch):
    """The number of jobs given to the worker, by method."""
    submitted, original = [], front.first.submit

    def submit(client, method, *rest):
        submitted.append(method)
        return original(client, method, *rest)

    monkeypatch.setattr(front.first, "submit", submit)
    return submitted


def test_ten_cuts_and_the_model_ran_once(front, truth, monkeypatch):
    size = sum(map(len, truth.values()))
    cuts = sorted(random.Random(5).sample(range(2000, size), 10))
    submitted = counted(front, monkeypatch)
    with Proxy(front.address) as proxy, vs.connect(proxy.address, shared_memory=False) as model:
        model.prepare_messages(TEXT)
        proxy.cuts = [proxy.carried + cut for cut in cuts]
        cache = captured(model)
        assert not proxy.cuts
        assert as_bytes(cache) == truth
    assert submitted.count("RunWithCache") == 1


def test_a_damaged_byte_is_asked_for_again(front, truth, monkeypatch):
    submitted = counted(front, monkeypatch)
    with Proxy(front.address) as proxy, vs.connect(proxy.address, shared_memory=False) as model:
        model.prepare_messages(TEXT)
        proxy.damage = [proxy.carried + 3_000_000, proxy.carried + 9_000_000]
        assert as_bytes(captured(model)) == truth
        assert not proxy.damage
    assert submitted.count("RunWithCache") == 1


def test_a_server_that_is_gone_for_good(wide):
    """A capture and an answer under way end with one sentence and the id that stands in the server's log; what is in
    shared memory stays."""
    process, address = start_server("--model", wide, "--device", "cpu")
    with vs.connect(address) as here, Proxy(address, rate=2e6) as proxy:
        assert here._memory is not None
        kept = captured(here)
        copies = as_bytes(kept)
        with vs.connect(proxy.address, shared_memory=False) as model:
            inputs = model.prepare_messages(TEXT)
            with pytest.raises(errors.UnavailableError, match="cannot be reached") as of_capture:
                with model.run_with_cache(POST) as cache:
                    model.forward(inputs, logits_to_keep=None)
                    assert cache[cache.names[0]] is not None
                    tokens = here.stream(inputs, max_new_tokens=1500, do_sample=True, seed=1, temperature=20.0)
                    next(tokens)
                    process.kill()
                    proxy.close()
        with pytest.raises(errors.UnavailableError, match=address) as of_answer:
            for _ in tokens:
                pass
        numbers = [caught.value.request_id.rpartition("-")[2] for caught in (of_capture, of_answer)]
        assert int(numbers[0]) < int(numbers[1])
        process.wait()
        assert as_bytes(kept) == copies


def test_a_capture_that_is_no_longer_held(front):
    with vs.connect(front.address) as model:
        stream = model._resume("0" * 32, {})
        with pytest.raises(Exception, match="holds no capture"):
            next(stream)


def test_an_offset_that_a_reader_has_is_not_sent_again(front, truth):
    with vs.connect(front.address, shared_memory=False) as model:
        cache = captured(model)
        have = {i: len(truth[name]) for i, name in enumerate(cache.names)}
        have[2] = 1000
        del have[3]
        until(lambda: not front.guard.active)
        before = sent_bytes(front)
        messages = [spb.RunWithCacheResponse.FromString(m) for m in model._resume(cache.context.capture_id, have)]
    rest = {}
    for message in messages:
        if message.WhichOneof("event") == "chunk":
            rest[message.chunk.index] = rest.get(message.chunk.index, b"") + message.chunk.data
    assert rest == {2: truth[cache.names[2]][1000:], 3: truth[cache.names[3]]}
    assert messages[-1].HasField("summary")
    until(lambda: not front.guard.active)
    assert sent_bytes(front) - before == sum(map(len, rest.values()))


def sent_bytes(front):
    return front.metrics.registry.get_sample_value("vlm_spectra_sent_bytes_total", {"hook": POST})


def test_a_run_goes_on_without_its_reader_for_a_while_only(front):
    """What `linger_seconds` promises, and `ReleaseCapture` ends."""
    host = front.first
    with vs.connect(front.address, shared_memory=False) as model:
        inputs = model.prepare_messages(TEXT)
        options = vs.calls.GenerateOptions(1200, do_sample=True, temperature=3.0, seed=3)
        capture = vs.calls.CaptureOptions((POST,))
        generate = vs.network.wire.generate_to_wire(options)
        request = model._capturing(capture, generate=generate, **model._asked(inputs, ()))
        request.run.linger_seconds = 2
        call = model._call("RunWithCache", request)
        while spb.RunWithCacheResponse.FromString(next(call)).WhichOneof("event") != "token":
            pass
        running, left = host._running, time.monotonic()
        call.cancel()
        until(lambda: host._running is None)
        assert time.monotonic() - left >= 2
        assert running.cancelled, "it has not come to its end"
        until(lambda: host._running is None)
        request.run.linger_seconds = 100
        call = model._call("RunWithCache", request)
        first = spb.RunWithCacheResponse.FromString(next(call))
        call.cancel()
        model._release(first.header.capture_id)
        until(lambda: host._running is None)


def test_no_run_goes_on_for_long_without_its_reader(front):
    client = Raw(front.address)
    answer = client.ask("RunWithCache", run("Hi", linger_seconds=10**6))
    client.close()
    capture_id = spb.RunWithCacheResponse.FromString(answer[0]).header.capture_id
    assert front._spectra.captures.find(capture_id).linger == services.LONGEST_LINGER


def test_as_many_captures_as_one_likes_are_released(front):
    """More of them than may be at work at a time."""
    client = Raw(front.address)
    for _ in range(2 * guard._FREEING_MOST):
        assert isinstance(client.ask("ReleaseCapture", spb.ReleaseCaptureRequest(capture_id="none")), list)
    client.close()


def ended(number, event, content):
    """A capture that has ended."""
    job = Job(number, "a", "RunWithCache", b"", {}, None)
    job.tensors[0] = (tensor_pb2.TensorHeader(index=0, name=POST, byte_count=4), memoryview(bytes(4)))
    job.feed.put(event, content)
    return StoredCapture(job, None, Sending(job, {}), 0)


def test_no_patch_is_of_a_capture_that_failed():
    """Half of its numbers may be missing."""
    store = CaptureStore(1000, 600)
    store.add("x", ended(1, "error", errors.DeadlineError("late")))
    with pytest.raises(errors.InvalidInputError, match="failed"):
        store.tensor(tensor_pb2.CaptureReference(capture_id="x", hook=POST), "", 100, 100)
    store.close()


def test_so_many_captures_stay_at_most():
    store = CaptureStore(1000, 600, number=2)
    for number in range(3):
        store.add(str(number), ended(number, "done", b""))
    found = [store.find(str(number)) is not None for number in range(3)]
    store.close()
    assert found == [False, True, True]


def test_who_comes_back_ends_the_wait_of_before(front):
    """Each time that the last reader is lost, `linger_seconds` begin anew."""
    job, ended, leaving = Job(1, "a", "RunWithCache", b"", {}, None), [], []
    host = SimpleNamespace(cancel=ended.append)
    context = SimpleNamespace(add_callback=lambda leave: leaving.append(leave) or True)

    def attach():
        front._spectra._attach(host, job, context, 100)

    attach()
    leaving.pop()()
    first = job.timer
    assert first.is_alive()
    attach()
    attach()
    until(lambda: not first.is_alive())
    leaving.pop()()
    assert job.timer is None, "one is still there"
    leaving.pop()()
    assert job.timer.is_alive()
    assert not ended
    job.stop_timer()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8_e4m3fn"])
def test_zstd_changes_no_bit(front, dtype):
    with vs.connect(front.address, shared_memory=False) as model:
        plain = as_bytes(captured(model, compression="none", dtype=dtype))
        assert as_bytes(captured(model, compression="zstd", dtype=dtype)) == plain


def test_a_slow_link_is_noticed(front):
    hooks = [f"lm.blocks.{layer}.attn.hook_head_out" for layer in range(4)]
    with Proxy(front.address, rate=10e6) as proxy, vs.connect(proxy.address, shared_memory=False) as model:
        inputs = model.prepare_messages(TEXT)
        sent, caches = [], []
        for _ in range(2):
            before = proxy.carried
            with model.run_with_cache(hooks, heads=[0, 1]) as cache:
                model.forward(inputs, logits_to_keep=None)
            sent.append(proxy.carried - before)
            caches.append(as_bytes(cache))
    assert caches[0] == caches[1]
    assert sent[1] < 0.97 * sent[0]


def test_shared_memory_holds_the_same_bits(front, truth, monkeypatch):
    with Proxy(front.address) as proxy, vs.connect(proxy.address) as model:
        captured(model)
        before = proxy.carried
        cache = captured(model)
        assert as_bytes(cache) == truth
        assert proxy.carried - before < 100_000
        name = cache.names[0]
        array = to_numpy(cache[name])
        array[:] = 0  # a change stays with this reader
        again = b"".join(
            m.chunk.data
            for m in map(spb.RunWithCacheResponse.FromString, model_chunks(front, cache.context.capture_id))
            if m.WhichOneof("event") == "chunk" and m.chunk.index == 0
        )
        assert again == truth[name]


def model_chunks(front, capture_id):
    with vs.connect(front.address, shared_memory=False) as model:
        return list(model._resume(capture_id, {}))


def test_shared_memory_has_no_name():
    """However a process ends, nothing is left behind."""
    fd = shared_memory(4096)
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def closed(number, fd):
    """Whether a file descriptor is no longer another's copy."""
    try:
        return not os.path.sameopenfile(number, fd)
    except OSError:
        return True


def test_a_segment_stays_itself_while_its_capture_leaves(front):
    with vs.connect(front.address, shared_memory=False) as model:
        cache = captured(model)
        held = front._spectra.captures.find(cache.context.capture_id).job.segments[0]
        fd = front._spectra._segment(cache.context.capture_id, 0)
        assert fd != held
        assert os.path.sameopenfile(fd, held)
        os.close(fd)


def test_a_door_goes_on_when_no_file_is_left_and_ends_when_it_is_closed(monkeypatch):
    accept, faults = socket.socket.accept, [OSError(errno.EMFILE, "no files")]

    def short(listening):
        if faults:
            raise faults.pop()
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", short)
    before = set(threading.enumerate())
    door = LocalDoor(lambda *which: {}[which])
    mine = [each for each in set(threading.enumerate()) - before if each.name == "local-door"]
    assert mine
    until(lambda: not faults)
    assert LocalMemory.at(door.name) is not None
    door.close()
    until(lambda: not mine[0].is_alive())


def test_shared_memory_is_for_the_same_user_and_can_be_forbidden(monkeypatch):
    assert LocalDoor(lambda *_: 0, allowed=False).name == ""
    assert LocalMemory.at("") is None
    assert LocalMemory.at("vlm-spectra-of-another-host") is None
    fd = shared_memory(4096)
    given = []

    def segment(capture, number):
        given.append(os.dup({("c", 0): fd}[capture, number]))
        return given[-1]

    door = LocalDoor(segment)
    memory = LocalMemory.at(door.name)
    assert len(memory.segment("c", 0)) == 4096
    until(lambda: closed(given[0], fd))
    with pytest.raises(errors.UnavailableError, match="no shared memory of the capture 'd'"):
        memory.segment("d", 0)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert LocalMemory.at(door.name) is None
    door.close()
    os.close(fd)


def test_the_budget_of_a_host():
    budget = Budget(100, share=0.5)
    freed = []
    budget.freed.append(lambda: freed.append(1))
    assert budget.take("a", 80)  # alone and with nothing yet, a client may have more than its share
    assert not budget.take("a", 10)
    assert budget.take("b", 20)
    assert not budget.take("b", 1)
    budget.give_back("a", 80)
    assert freed == [1]
    assert budget.take("b", 30)
    assert not budget.take("b", 1)
    assert budget.held == 50
    budget.make_room = lambda missing, client: budget.give_back("b", 50)
    assert budget.take("c", 60)


def test_what_a_client_has_kept_leaves_for_what_it_asks():
    budget, asked = Budget(100, share=0.5), []
    assert budget.take("a", 40)
    budget.make_room = lambda *missing: asked.append(missing)
    assert not budget.take("a", 30)
    assert not budget.take("a", 60)
    assert asked == [(20, "a"), (40, "a")], "no more than it holds"
    budget.make_room = lambda missing, client: budget.give_back(client, missing)
    assert budget.take("a", 30)
    assert budget.held == 50


def kept_capture(client, size):
    job = Job(1, client, "RunWithCache", b"", {}, None)
    job.tensors[0] = (tensor_pb2.TensorHeader(byte_count=size), memoryview(b""))
    job.feed.put("done")
    return stores.StoredCapture(job, None, Sending(job, {}), 0)


def test_room_for_a_client_is_made_of_its_own_captures():
    kept = stores.CaptureStore(1000, 600)
    for name in ("a1", "b1", "a2", "a3"):
        kept.add(name, kept_capture(name[0], 10))
    kept.make_room(15, "a")
    assert list(kept._captures) == ["b1", "a3"]
    kept.make_room(5)
    assert list(kept._captures) == ["a3"]
    kept.close()


def test_a_client_does_not_wait_for_what_it_has_kept(front):
    """Half of 120 MiB is its part, and a capture of 39 MiB is kept when it asks for the same again."""
    with vs.connect(front.address, shared_memory=False, timeout=100) as model:
        inputs = model.prepare_messages(TEXT)
        for _ in range(2):
            with model.run_with_cache("lm.blocks.*.attn.hook_head_out", heads=[0, 1]) as cache:
                model.forward(inputs, logits_to_keep=None)
            assert len(cache) == 16


def test_a_capture_that_grows_while_it_is_looked_at():
    capture = kept_capture("a", 10)
    tensors = capture.job.tensors

    class Header:
        @property
        def byte_count(self):
            tensors[len(tensors)] = tensors[0]
            return 5

    tensors[0] = (Header(), memoryview(b""))
    assert capture.size == 5
    assert len(tensors) == 2


def test_a_look_at_what_is_kept_that_fails_is_not_the_last(monkeypatch):
    kept = stores.CaptureStore(1000, 0.05)
    expire, faults = kept._expire, [RuntimeError("dictionary changed size during iteration")]

    def failing():
        if faults and threading.current_thread().name == "captures":
            raise faults.pop()
        expire()

    monkeypatch.setattr(kept, "_expire", failing)
    monkeypatch.setattr(stores, "_AFTER_FAULT", 0.01)
    kept.add("a", kept_capture("a", 10))
    until(lambda: not kept._captures)
    assert not faults


def test_memory_that_the_garbage_collector_gives_back():
    """It may run anywhere, also where the budget is locked."""
    budget = Budget(100)
    assert budget.take("a", 50)

    class Held(Counter):
        def total(self):
            if self["a"]:
                budget.give_back("a", 50)
            return super().total()

    budget._held, taken = Held(budget._held), []
    thread = threading.Thread(target=lambda: taken.append(budget.take("b", 100)), daemon=True)
    thread.start()
    thread.join(10)
    assert taken == [True]


def test_a_capture_waits_for_memory_and_others_do_not(front, truth):
    """A slow reader holds 60 of 120 MiB, and a capture of 77 MiB has to wait; that counts as waiting for its turn."""
    budget = front.models.budget
    front._spectra.captures.make_room(1 << 40)
    gc.collect()
    until(lambda: budget.held == 0)
    assert budget.take("someone who reads slowly", 60 << 20)
    done = threading.Event()
    with vs.connect(front.address, shared_memory=False) as large, vs.connect(front.address) as small:
        inputs = large.prepare_messages(TEXT)

        def run():
            with large.run_with_cache("lm.blocks.*.attn.hook_head_out", heads=[0, 1, 2, 3]) as cache:
                large.forward(inputs, logits_to_keep=None)
            assert len(cache) == 16
            costs.append(cache.cost)
            done.set()

        costs = []
        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: len(front.first.queue))
        waits = time.perf_counter()
        time.sleep(1.0)
        assert not done.is_set()
        for _ in range(3):
            assert small.forward(inputs, 1).logits.shape[1] == 1
        assert not done.is_set()
        waited = time.perf_counter() - waits
        budget.give_back("someone who reads slowly", 60 << 20)
        assert done.wait(60)
        thread.join()
        assert costs[0].queue >= waited


@pytest.mark.parametrize("turn", range(4))
def test_memory_that_comes_free_at_the_moment_of_the_look(front, monkeypatch, turn):
    """Whoever waits for memory has its turn then too, at once, with no other call to wake the server."""
    budget = front.models.budget
    front._spectra.captures.make_room(1 << 40)
    gc.collect()
    until(lambda: budget.held == 0)
    assert budget.take("someone who reads slowly", 60 << 20)
    take, refused = budget.take, []

    def late(client, size):
        granted = take(client, size)
        if not granted:
            refused.append(client)
            if len(refused) == 2:  # the worker was told to wait, and the queue is looked through
                budget.give_back("someone who reads slowly", 60 << 20)
        return granted

    monkeypatch.setattr(budget, "take", late)
    with vs.connect(front.address, shared_memory=False, timeout=60) as model:
        with model.run_with_cache("lm.blocks.*.attn.hook_head_out", heads=[0, 1, 2, 3]) as cache:
            model.forward(model.prepare_messages(TEXT), logits_to_keep=None)
        assert len(cache) == 16
    assert len(refused) == 2


def test_every_channel_option_has_its_effect(front, monkeypatch):
    """A misspelt option is ignored without a word, so each is seen at work."""
    with Proxy(front.address) as proxy:
        with vs.connect(proxy.address), vs.connect(proxy.address):
            assert proxy.connections == 2  # grpc.use_local_subchannel_pool
        with vs.connect(proxy.address) as model:
            inputs = model.prepare_messages("Hi")

            def connects_again() -> float:
                proxy.cut()
                begun = time.monotonic()
                while True:
                    try:
                        model.forward(inputs, 1)
                        return time.monotonic() - begun
                    except errors.UnavailableError:
                        time.sleep(0.02)

            # grpc.initial_reconnect_backoff_ms: gRPC's own is 1 s after the last connection was opened, or 0.8 at least
            connects_again()
            assert any(connects_again() < 0.6 for _ in range(50))
    monkeypatch.setattr(vs.remote, "MESSAGE_BYTES", 100_000)  # grpc.max_receive_message_length
    with (
        vs.connect(front.address, shared_memory=False) as model,
        pytest.raises(errors.SpectraError, match="larger than"),
    ):
        captured(model)
    with pytest.raises(errors.InvalidInputError, match="cannot listen"):
        Server(port=int(front.address.split(":")[1]))  # grpc.so_reuseport


@pytest.mark.gpu
def test_side_copies_from_a_gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from vlm_spectra_server.serving.copying import Pinned, SideCopies

    arrived: list[int] = []
    copies = SideCopies(arrived.append)
    sources = [torch.randn(1 << 20, device="cuda") for _ in range(8)]
    targets = torch.empty(8, 1 << 20)
    pinned = Pinned(targets.view(-1).view(torch.uint8))
    wanted = [source.cpu() for source in sources]
    for number, source in enumerate(sources):
        copies.put(number, source, targets[number])
        source.zero_()  # the model may write over what it has given away
    copies.finish()
    pinned.release()
    assert arrived == list(range(8))
    assert all(torch.equal(targets[i], wanted[i]) for i in range(8))
