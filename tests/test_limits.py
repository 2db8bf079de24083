"""Every limit just below and just above it, on a server of its own process: what is refused names the limit.

A field of `Limits` without a test of its name here is a failure.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import vlm_spectra as vs
from calls import WAIT, Raw, Refusal, WorkerPipe, prompts, run, until
from conftest import Busy, another_door, start_server, stop_server
from grpc_health.v1 import health_pb2
from PIL import Image
from proxy import Proxy
from starlette.testclient import TestClient
from vlm_spectra import errors
from vlm_spectra.network import wire
from vlm_spectra.network.retries import LONGEST, Retries
from vlm_spectra.positions import Layout
from vlm_spectra.v1 import inputs_pb2, intervention_pb2, model_service_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.serving import health as health_module
from vlm_spectra_server.serving import messages, worker
from vlm_spectra_server.serving.auth import SHORTEST, Tokens
from vlm_spectra_server.serving.budget import Budget
from vlm_spectra_server.serving.limits import Limits, check_image
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.serving.stores import ImageStore
from vlm_spectra_server.serving.turns import FairQueue, Job
from vlm_spectra_server.web.app import create_app
from vlm_spectra_server.web.uploads import UploadLimits
from webapp import free_port

POST = "lm.blocks.0.hook_resid_post"
ELSEWHERE = {"models_bytes": ("test_serving.py", "max_models_gb")}
"""Limits whose test stands in another file."""


def test_every_limit_is_tested() -> None:
    tested = {name.removeprefix("test_limit_") for name in globals() if name.startswith("test_limit_")}
    assert {each.name for each in fields(Limits)} == tested | set(ELSEWHERE)
    for file, setting in ELSEWHERE.values():
        assert setting.replace("_", "-") in (Path(__file__).parent / file).read_text().replace("_", "-")


def flags(**limits: float) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]


# What one request may be.

SMALL = {
    "max_capture_gb": 0.001,
    "kept_captures_gb": 0.0015,
    "max_image_mb": 0.02,
    "max_image_megapixels": 0.06,
    "kept_images_mb": 0.04,
    "max_message_mb": 0.5,
    "max_prompt_tokens": 1400,
    "max_new_tokens": 6,
    "max_batch": 3,
    "max_sweep_cells": 24,
    "max_images": 4,
    "max_images_megapixels": 0.1,
    "max_items": 60,
}


@pytest.fixture(scope="module")
def small_address() -> Iterator[str]:
    process, address = start_server("--model", "spectra-tiny", "--device", "cpu", *flags(**SMALL))
    yield address
    stop_server(process)


@pytest.fixture(scope="module")
def small(small_address: str) -> Iterator[vs.RemoteVLM]:
    with vs.connect(small_address, arrays="numpy", retries=0, shared_memory=False) as model:
        yield model


@pytest.fixture
def raw(small_address: str) -> Iterator[Raw]:
    client = Raw(small_address)
    yield client
    client.close()


def refused(kind: type[errors.SpectraError], limit: str, value: float, call: Callable[[], Any], field: str = "") -> Any:
    """The call is refused with the limit's name and value, in the sentence and for programs."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    assert error.metadata["limit"] == limit
    assert float(error.metadata["value"]) == value
    assert float(error.metadata["asked"]) > value
    assert limit in str(error)
    assert "\n" not in str(error)
    assert error.field == field
    assert error.request_id
    return error


def words(model: vs.RemoteVLM, tokens: int) -> str:
    """A task whose prompt has so many tokens."""
    task = "word"
    while (have := model.prepare_messages(task).input_ids.shape[1]) < tokens:
        task += " word" * max((tokens - have) // 2, 1)
    assert have == tokens, "a word is one token"
    return task


@pytest.fixture(scope="module")
def long(small: vs.RemoteVLM) -> vs.Inputs:
    return small.prepare_messages(words(small, 1310))


def capture(model: vs.RemoteVLM, inputs: vs.Inputs, positions: int) -> vs.ActivationCache:
    """A capture of so many positions: 768 bytes each."""
    with model.run_with_cache(POST, positions=slice(0, positions)) as cache:
        model.forward(inputs, logits_to_keep=None)
    return cache


def test_limit_capture_bytes(small: vs.RemoteVLM, long: vs.Inputs) -> None:
    """1,302 positions are 999,936 bytes; one more is over."""
    assert capture(small, long, 1302)[POST].nbytes == 999_936
    error = refused(
        errors.CaptureTooLargeError, "max_capture_gb", 0.001, lambda: capture(small, long, 1303), field="hooks"
    )
    assert float(error.metadata["asked"]) == 0.001000704
    assert "would fit" in str(error)
    assert error.retry_after is None, "trying the same again makes no sense"


def test_a_lens_is_refused_before_it_is_computed(small: vs.RemoteVLM, long: vs.Inputs) -> None:
    """Its size is known from the prompt; what it would have computed may be more than memory holds."""
    phases: list[str] = []

    def lens(top_k: int) -> vs.LogitLens:
        with small.run_with_progress(lambda phase, done, total: phases.append(phase)):
            return small.logit_lens(long, top_k=top_k, layers=[0])

    assert lens(45).probs.shape[-1] == 45
    assert "analysing" in phases
    phases.clear()
    refused(errors.CaptureTooLargeError, "max_capture_gb", 0.001, lambda: lens(46), field="hooks")
    assert "analysing" not in phases


def test_a_generation_is_refused_before_its_first_token(small: vs.RemoteVLM, long: vs.Inputs) -> None:
    """Where what is wanted of the prompt alone is too much, nobody waits for the answer."""
    phases: list[str] = []

    def captured() -> None:
        with small.run_with_cache(POST):
            small.generate(long, 2)

    for call in (captured, lambda: small.generate(long, 2, output_hidden_states=True)):
        with small.run_with_progress(lambda phase, done, total: phases.append(phase)):
            refused(errors.CaptureTooLargeError, "max_capture_gb", 0.001, call, field="hooks")
    assert "generating" not in phases
    with small.run_with_cache(POST, positions=[-1, -2]) as cache:
        small.generate(long, 2)
    assert cache[POST].shape[1] == 2


def readable(client: Raw, capture_id: str) -> bool:
    """Whether a capture can be read."""
    answer = client.ask("RunWithCache", spb.RunWithCacheRequest(resume=spb.CaptureResume(capture_id=capture_id)))
    if isinstance(answer, Refusal):
        assert (answer.code, answer.reason, answer.fields) == ("NOT_FOUND", "CAPTURE_NOT_FOUND", ("capture_id",))
        assert "kept_captures_gb" in answer.message
        assert "kept_seconds" in answer.message
    return isinstance(answer, list)


def test_limit_kept_bytes(small: vs.RemoteVLM, raw: Raw, long: vs.Inputs) -> None:
    """Captures of 1,499,904 bytes in all stay; with 768 more the oldest goes, and no other."""
    first, second = (capture(small, long, positions).context.capture_id for positions in (1302, 651))
    assert readable(raw, first)
    assert readable(raw, second)
    third = capture(small, long, 1).context.capture_id
    assert not readable(raw, first)
    assert readable(raw, second)
    assert readable(raw, third)


def png(size: int, seed: int = 0) -> bytes:
    """An image file of so many bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (80, 60), (30 + seed, 60, 90)).save(buffer, "PNG")
    return buffer.getvalue() + bytes(size - buffer.tell())


def test_limit_one_image_bytes(small: vs.RemoteVLM) -> None:
    assert small.prepare_messages("Hi", png(20_000))
    refused(
        errors.InvalidImageError, "max_image_mb", 0.02, lambda: small.prepare_messages("Hi", png(20_001)), field="image"
    )


def test_limit_image_pixels(small: vs.RemoteVLM) -> None:
    """60,000 pixels are taken, 60,001 are not."""
    assert small.prepare_messages("Hi", Image.new("RGB", (300, 200)))
    over = Image.new("RGB", (2069, 29))
    refused(
        errors.InvalidImageError,
        "max_image_megapixels",
        0.06,
        lambda: small.prepare_messages("Hi", over),
        field="image",
    )


def test_an_image_is_checked_before_it_is_decoded() -> None:
    data = io.BytesIO()
    Image.new("1", (8000, 8000)).save(data, "PNG")
    check_image(Limits(), data.getvalue())
    check_image(Limits(), b"no image at all")  # the worker says so
    with pytest.raises(errors.InvalidImageError, match="64 million pixels; this server takes at most 63"):
        check_image(replace(Limits(), image_pixels=63_000_000), data.getvalue()[:200])


def sent(client: Raw, *data: bytes, wanted: tuple[bytes, ...] = ()) -> list[str] | Refusal:
    """Send image files for a prompt that wants them and others; what the server says is missing."""
    names = [hashlib.sha256(each).hexdigest() for each in (*data, *wanted)]
    images = [inputs_pb2.Image(sha256=name, data=each) for name, each in zip(names, data, strict=False)]
    answer = client.ask("Prepare", spb.PrepareRequest(prompts=prompts("Hi", images=tuple(names)), images=images))
    return answer if isinstance(answer, Refusal) else list(spb.PrepareResponse.FromString(answer[0]).missing_images)


def test_limit_image_bytes(raw: Raw) -> None:
    """Two files of 20,000 bytes stay together; with one byte more the one that was used longest ago goes."""
    first, second, third = (png(20_000, seed) for seed in (1, 2, 3))
    assert sent(raw, first) == sent(raw, second, wanted=(first,)) == []
    assert sent(raw, wanted=(second,)) == []
    assert sent(raw, third) == []
    assert sent(raw, wanted=(first, third)) == [hashlib.sha256(first).hexdigest()]
    assert sent(raw, wanted=(second, third)) == []
    tiny = png(200, 4)
    refusal = sent(raw, tiny, wanted=(second, third))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.reason, refusal.fields) == ("INVALID_ARGUMENT", "OVER_LIMIT", ("images",))
    assert refusal.metadata["limit"] == "kept_images_mb"
    assert float(refusal.metadata["value"]) == 0.04 < float(refusal.metadata["asked"])
    assert "kept_images_mb" in refusal.message


@pytest.mark.parametrize("how", ["get", "add"])
def test_a_look_at_an_image_is_a_use(how: str) -> None:
    """The one that was used longest ago goes, not the one that came first."""
    first, second, third = (
        inputs_pb2.Image(sha256=hashlib.sha256(data).hexdigest(), data=data)
        for data in (b"1" * 2000, b"2" * 2000, b"3" * 2000)
    )
    images = ImageStore(Limits(image_bytes=4000))
    images.add(first)
    images.add(second)
    if how == "get":
        images.get([first.sha256])
    images.add(third, [first.sha256] if how == "add" else ())
    assert images.missing([first.sha256, second.sha256, third.sha256]) == [second.sha256]


def test_small_images_count_too() -> None:
    """What it takes to keep one at all."""
    images = ImageStore(Limits(image_bytes=10 << 10))
    for number in range(30):
        data = number.to_bytes(3, "big")
        images.add(inputs_pb2.Image(sha256=hashlib.sha256(data).hexdigest(), data=data))
    assert len(images._images) == 10


def test_more_images_than_can_stay_are_one_sentence(small: vs.RemoteVLM) -> None:
    """The client does not send them for ever."""
    pictures = [png(19_000, seed) for seed in range(10, 13)]
    refused(
        errors.OverLimitError, "kept_images_mb", 0.04, lambda: small.prepare_messages("Hi", pictures), field="images"
    )


def test_limit_message_bytes(raw: Raw, small: vs.RemoteVLM) -> None:
    def message(size: int) -> bytes:
        made = spb.ReleaseCaptureRequest(capture_id="x" * (size - 4)).SerializeToString()
        assert len(made) == size
        return made

    assert isinstance(raw.ask("ReleaseCapture", message(500_000)), list)
    for size in (500_001, 999_999):
        refusal = raw.ask("ReleaseCapture", message(size))
        assert isinstance(refusal, Refusal)
        assert (refusal.code, refusal.reason, refusal.fields) == ("INVALID_ARGUMENT", "OVER_LIMIT", ("request",))
        assert refusal.metadata["limit"] == "max_message_mb"
        assert float(refusal.metadata["value"]) == 0.5
        assert float(refusal.metadata["asked"]) == pytest.approx(size / 1e6, rel=1e-5)
    task = "word " * 150_000
    with pytest.raises(errors.OverLimitError, match="max_message_mb"):
        small.prepare_messages(task)
    with pytest.raises(errors.OverLimitError, match="max_message_mb") as caught:  # gRPC itself does not take this in
        small.prepare_messages(task * 3)
    found = caught.value.metadata
    assert (found["limit"], float(found["value"])) == ("max_message_mb", 0.5)
    assert float(found["asked"]) > 2.25


def test_limit_prompt_tokens(small: vs.RemoteVLM) -> None:
    exact = words(small, 1400)
    call = lambda: small.prepare_messages(f"{exact} word")  # noqa: E731
    refused(errors.PromptTooLongError, "max_prompt_tokens", 1400, call, field="task")


def test_limit_new_tokens(small: vs.RemoteVLM) -> None:
    inputs = small.prepare_messages("Hi")
    assert small.generate(inputs, 6).text

    def captured() -> None:
        with small.run_with_cache(POST):
            small.generate(inputs, 7)

    for call in (lambda: small.generate(inputs, 7), lambda: list(small.stream(inputs, max_new_tokens=7)), captured):
        refused(errors.OverLimitError, "max_new_tokens", 6, call, field="max_new_tokens")


def test_limit_batch(small: vs.RemoteVLM, raw: Raw) -> None:
    tasks = ["a", "b", "c", "d"]
    assert len(small.prepare_messages_batch(tasks[:3])) == 3
    refused(errors.OverLimitError, "max_batch", 3, lambda: small.prepare_messages_batch(tasks), field="prompts")
    refusal = raw.ask("Attribute", spb.AttributeRequest(prompts=prompts("a"), corrupted=prompts(*tasks), method=8))
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.fields, refusal.metadata["limit"]) == ("OVER_LIMIT", ("corrupted",), "max_batch")


def over_limit(answer: Any, limit: str, value: float, field: str) -> None:
    assert isinstance(answer, Refusal), answer
    assert (answer.code, answer.reason, answer.fields) == ("INVALID_ARGUMENT", "OVER_LIMIT", (field,))
    assert answer.metadata["limit"] == limit
    assert float(answer.metadata["value"]) == value < float(answer.metadata["asked"])
    assert limit in answer.message


def test_limit_images(raw: Raw) -> None:
    """One image that is named often counts as often: each is prepared."""
    picture = png(1000)
    assert sent(raw, picture) == []
    assert sent(raw, wanted=(picture,) * 4) == []
    over_limit(sent(raw, wanted=(picture,) * 5), "max_images", 4, "images")


def test_limit_images_pixels(raw: Raw) -> None:
    pictures = []
    for size in ((300, 200), (200, 200), (201, 200)):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    assert sent(raw, *pictures[:2]) == []
    over_limit(sent(raw, pictures[0], pictures[2]), "max_images_megapixels", 0.1, "images")


def test_limit_items(raw: Raw) -> None:
    """A prompt and so many names of hooks."""
    assert isinstance(raw.ask("RunWithCache", run("Hi", *[POST] * 59)), list)
    over_limit(raw.ask("RunWithCache", run("Hi", *[POST] * 60)), "max_items", 60, "hooks")
    positions = inputs_pb2.Positions(items=[inputs_pb2.Position(index=0)] * 60)
    change = intervention_pb2.Intervention(
        hook=POST, positions=positions, zero_ablation=intervention_pb2.ZeroAblation()
    )
    over_limit(
        raw.ask("Forward", spb.ForwardRequest(prompts=prompts("Hi"), interventions=[change])), "max_items", 60, "items"
    )


def test_many_slices_of_a_prompt_take_no_more_memory_than_it() -> None:
    """Each of the entries of a list may mean all positions; they are asked for once."""
    layout = Layout(np.ones((4, 8192), dtype=bool), np.zeros((4, 8192), dtype=bool))
    tracemalloc.start()
    found = layout.rectangle([slice(8190, None, -1)] * 4000 + [slice(None)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == [[*range(8190, -1, -1), 8191]] * 4
    assert peak < 20e6


def test_what_is_named_often_is_computed_once(small: vs.RemoteVLM) -> None:
    """Layers are read once each; heads, whose order may matter, are not taken twice."""
    inputs, last = small.prepare_messages("Hi"), small.info.layers - 1
    lens = small.logit_lens(inputs, layers=[last, 0, -1, 0, 0], top_k=1)
    assert list(lens.layers) == [last, 0]
    pattern = "lm.blocks.0.attn.hook_pattern"
    for heads in ([0, 0], [1, 0, 1]):
        with (
            pytest.raises(errors.InvalidInputError, match="a head more than once") as caught,
            small.run_with_cache(pattern, heads=heads, reduce="mean_heads"),
        ):
            pytest.fail("it was taken")
        assert caught.value.field == "heads"


def test_heads_that_a_request_names_twice_are_refused(raw: Raw) -> None:
    request = run("Hi", "lm.blocks.0.attn.hook_pattern")
    request.run.selection.heads.indices.extend([0, 0])
    answer = raw.ask("RunWithCache", request)
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.fields) == ("INVALID_INPUT", ("heads",))


def test_a_change_at_many_hooks_is_many(small: vs.RemoteVLM) -> None:
    """Of a change with a wildcard each hook counts: it is made at all of them."""
    inputs, layers = small.prepare_messages("Hi"), small.info.layers
    change = ("lm.blocks.*.hook_resid_post", vs.ScaleActivation(1.0))
    fit = 60 // layers
    assert fit * layers + layers > 60 > fit + 2, "the request itself has few entries"
    with small.run_with_hooks([change] * fit):
        assert small.forward(inputs, 1).logits.shape[1] == 1
    with small.run_with_hooks([change] * (fit + 1)):
        refused(errors.OverLimitError, "max_items", 60, lambda: small.forward(inputs, 1), field="interventions")


def test_limit_characters(busy: Busy) -> None:
    """All texts of a request count; what is let through is too long for the model, which is another refusal."""
    client = busy.client("writer")
    for number, reason in ((60_000, "PROMPT_TOO_LONG"), (60_001, "OVER_LIMIT")):
        answer = client.ask("Prepare", spb.PrepareRequest(prompts=prompts("a" * 60_000, "b" * number)))
        assert isinstance(answer, Refusal)
        assert answer.reason == reason
    over_limit(answer, "max_characters", 120_000, "task")


def test_what_references_mean_counts_as_sent(small: vs.RemoteVLM, long: vs.Inputs) -> None:
    """A short request that names a large capture often is a large one: 651 positions are 499,968 bytes."""
    with small.run_with_cache(POST, positions=slice(0, 651)) as cache:
        small.forward(long, logits_to_keep=None)
    patch = (POST, vs.PatchActivation(cache.reference(POST), positions=slice(0, 651)))
    with small.run_with_hooks([patch]):
        assert small.forward(long, 1).logits.shape[1] == 1
    with small.run_with_hooks([patch, patch]):
        refused(errors.OverLimitError, "max_message_mb", 0.5, lambda: small.forward(long, 1), field="interventions")


def test_limit_sweep_cells(small: vs.RemoteVLM) -> None:
    inputs = small.prepare_messages("red cat")

    def sweep(positions: int) -> vs.PatchSweep:
        hooks = [POST, "lm.blocks.1.hook_resid_post"]
        return small.patch_sweep(inputs, inputs, hooks, positions=list(range(positions)), metric=vs.Target())

    assert inputs.input_ids.shape[1] > 12
    assert sweep(12).values.shape == (2, 12)
    refused(errors.OverLimitError, "max_sweep_cells", 24, lambda: sweep(13), field="hooks")


def test_a_refusal_costs_nothing_but_says_what_it_took(small: vs.RemoteVLM, long: vs.Inputs) -> None:
    with pytest.raises(errors.CaptureTooLargeError) as caught:
        capture(small, long, 1303)
    found = caught.value.metadata
    assert {"queue_seconds", "prepare_seconds", "compute_seconds", "total_seconds"} <= set(found)
    assert 0 <= float(found["compute_seconds"]) <= float(found["total_seconds"])
    assert caught.value.request_id


# How much at once. A worker waits where a prompt says so, and everything is counted while it does.

KEPT = Busy.LIMITS["kept_seconds"]


@pytest.fixture
def full(busy: Busy) -> Iterator[tuple[dict[str, Raw], list[Any]]]:
    """Clients by name, and the four calls that may be at work: one runs, two read along, one waits."""
    busy.idle()
    clients = {name: busy.client(name) for name in ("x", "y", "z", "new")}
    running = clients["x"].begin("RunWithCache", run("wait"))
    capture_id = spb.RunWithCacheResponse.FromString(next(running)).header.capture_id
    resume = spb.RunWithCacheRequest(resume=spb.CaptureResume(capture_id=capture_id))
    reading = [clients[name].begin("RunWithCache", resume) for name in ("y", "z")]
    for each in reading:
        next(each)
    busy.at_work(3)
    waiting = clients["x"].begin("RunWithCache", run("wait"))
    busy.at_work(4)
    busy.queued(1)
    calls = [running, waiting, *reading]
    yield clients, calls
    for each in calls:
        each.cancel()
    busy.at_work(0)
    for each in clients.values():
        each.close()


def busy_refusal(answer: list[bytes] | Refusal, reason: str, limit: str, value: int) -> None:
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", reason)
    assert answer.metadata["limit"] == limit
    assert float(answer.metadata["value"]) == value
    assert float(answer.metadata["asked"]) == value + 1
    assert limit in answer.message
    assert answer.retry_after, "it makes sense to try again"


def test_limit_client_requests(full: Any) -> None:
    """Two of one client are at work; a third is refused, whatever it is, but for what gives something back."""
    clients, _ = full
    for call, request in (("Forward", spb.ForwardRequest(prompts=prompts("Hi"))), ("ListModels", b"")):
        busy_refusal(clients["x"].ask(call, request), "CLIENT_BUSY", "max_client_requests", 2)
    assert isinstance(clients["x"].ask("ReleaseCapture", spb.ReleaseCaptureRequest(capture_id="none")), list)


def test_limit_connections(full: Any, busy: Busy) -> None:
    """Four calls are at work; a fifth is refused, and taken once one has ended."""
    clients, calls = full
    busy_refusal(clients["new"].ask("ListModels", b""), "QUEUE_FULL", "max_calls", 4)
    calls[-1].cancel()
    busy.at_work(3)
    assert isinstance(clients["new"].ask("ListModels", b""), list)


def test_limit_waiting(full: Any, busy: Busy) -> None:
    """One request waits; a second is refused, and waits once the first has left."""
    clients, calls = full
    calls[-1].cancel()
    busy.at_work(3)
    request = spb.ForwardRequest(prompts=prompts("wait"))
    busy_refusal(clients["new"].ask("Forward", request), "QUEUE_FULL", "max_queue", 1)
    calls[1].cancel()
    busy.queued(0)
    calls.append(clients["new"].begin("Forward", request))
    busy.queued(1)


def test_limit_models(full: Any, busy: Busy, tmp_path: Path) -> None:
    """One model is there and at work: it stays, and no second is taken; once it is idle, it leaves for another."""
    clients, calls = full
    calls[-1].cancel()
    busy.at_work(3)
    another = model_service_pb2.LoadModelRequest(name=str(tmp_path))
    busy_refusal(clients["new"].ask("LoadModel", another), "QUEUE_FULL", "max_models", 1)
    same = clients["new"].ask("LoadModel", model_service_pb2.LoadModelRequest(name="spectra-tiny"))
    assert isinstance(same, list)


def test_limit_kept_seconds(busy: Busy) -> None:
    """A capture can be read for two seconds, and not for ever."""
    client = busy.client("reader")
    while True:
        begun = time.monotonic()
        header = spb.RunWithCacheResponse.FromString(client.ask("RunWithCache", run("Hi"))[0]).header
        there = readable(client, header.capture_id)
        if time.monotonic() - begun < KEPT:  # on a machine that slept meanwhile nothing is said
            assert there
            break
    until(lambda: not readable(client, header.capture_id))
    assert time.monotonic() - begun >= KEPT
    client.close()


def test_limit_host_bytes(busy: Busy) -> None:
    """What all captures together may take, one alone may; not 768 bytes more."""
    with vs.connect(busy.address, arrays="numpy", retries=0, shared_memory=False) as model:
        inputs = model.prepare_messages(words(model, 1310))
        assert capture(model, inputs, 1302)[POST].nbytes == 999_936
        call = lambda: capture(model, inputs, 1303)  # noqa: E731
        refused(errors.CaptureTooLargeError, "host_memory_gb", 0.001, call, field="hooks")


def test_host_memory_bounds_a_capture() -> None:
    assert not Budget(100).take("a", 101)
    assert Budget(100).take("a", 100)


# The web app's.


def test_every_limit_of_uploads_is_tested() -> None:
    tested = {name.removeprefix("test_web_limit_") for name in globals() if name.startswith("test_web_limit_")}
    assert {each.name for each in fields(UploadLimits)} == tested
    assert UploadLimits.of(Limits()) == UploadLimits(64_000_000, 64_000_000, 512_000_000)


@contextmanager
def web(**limits: float) -> Iterator[TestClient]:
    """A web app, in this process."""
    with TestClient(create_app(f"127.0.0.1:{free_port()}", limits=UploadLimits(**limits))) as client:
        yield client


def upload(client: TestClient, data: bytes) -> str:
    """Upload a file that is taken; its name."""
    answer = client.post("/api/upload", files={"file": ("a.png", data)})
    assert answer.status_code == 200, answer.text
    return answer.json()["filename"]


def too_large(client: TestClient, data: bytes, limit: str, value: float) -> None:
    answer = client.post("/api/upload", files={"file": ("a.png", data)})
    details = answer.json()
    assert (answer.status_code, details["reason"], details["limit"]) == (413, "TOO_LARGE", limit)
    assert float(details["value"]) == value < float(details["asked"])
    assert limit in details["detail"]


def there(client: TestClient, name: str) -> bool:
    return client.get(f"/api/images/{name}").status_code == 200


def test_web_limit_file_bytes() -> None:
    with web(file_bytes=20_000) as client:
        assert upload(client, png(20_000))
        too_large(client, png(20_001), "max_image_mb", 0.02)


def test_web_limit_pixels() -> None:
    def blank(*size: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        return buffer.getvalue()

    with web(pixels=60_000) as client:
        assert upload(client, blank(300, 200))
        too_large(client, blank(2069, 29), "max_image_megapixels", 0.06)


def test_web_limit_folder_bytes() -> None:
    """Two images of equal size fit into a folder for two; a third takes the place of the one used longest ago."""
    with web() as client:
        one = client.get(f"/api/images/{upload(client, png(1000))}")
    with web(folder_bytes=2 * len(one.content)) as client:
        names = [upload(client, png(1000, seed)) for seed in (1, 2)]
        assert all(there(client, name) for name in names)
        names.append(upload(client, png(1000, 3)))
        assert [there(client, name) for name in names] == [False, True, True]


def test_web_limit_files() -> None:
    with web(files=2) as client:
        names = [upload(client, png(1000, seed)) for seed in (1, 2)]
        assert all(there(client, name) for name in names)
        names.append(upload(client, png(1000, 3)))
        assert [there(client, name) for name in names] == [False, True, True]


def test_web_limit_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with web(seconds=100) as client:
        name, now = upload(client, png(1000)), time.monotonic()
        for later, found in ((99, True), (198, True), (299, False)):  # each look is a use
            with monkeypatch.context() as patch:
                clock = SimpleNamespace(monotonic=lambda at=now + later: at)
                patch.setattr("vlm_spectra_server.web.uploads.time", clock)
                assert there(client, name) is found


# Turns and deadlines.


@pytest.fixture(scope="module")
def few(front: Server) -> Iterator[Server]:
    """A server that takes three requests of one client at a time."""
    with another_door(front, limits=Limits(client_requests=3)) as server:
        yield server


def test_a_deadline_before_its_turn_is_refused_at_once(front: Server) -> None:
    """Two requests of a second each are waiting: half a second is not enough, half a minute is."""
    host = front.first
    with host._lock:
        running = Job(-1, "a", "Slow", b"", {}, None, started=time.perf_counter())
        waiting = [Job(-2, "a", "Slow", b"", {}, None), Job(-3, "b", "Slow", b"", {}, None)]
        host._running, host._seconds["Slow"] = running, [1.0]
        for job in waiting:
            host.queue.put(job)
        try:
            with pytest.raises(errors.DeadlineError, match=r"some [23]\.\d s; it was given 0.5 s") as caught:
                host._check_deadline("c", 0.5)
            assert caught.value.retry_after > 1.9
            host._check_deadline("c", 30.0)
            host._check_deadline("c", 3.2)
            running.started -= 0.9  # so much of its second is over
            host._check_deadline("c", 2.6)
        finally:
            host.queue.drain()
            host._running = None
            del host._seconds["Slow"]


def test_one_who_waited_for_memory_is_the_first_again() -> None:
    queue = FairQueue(bound=5)
    first, second = (Job(number, "a", "Forward", b"", {}, None) for number in range(2))
    queue.put(first)
    queue.put(second)
    assert queue.take() is first
    queue.put_back(first)
    assert queue.take() is first


def test_one_client_takes_half_of_the_queue() -> None:
    queue = FairQueue(bound=5)
    for number in range(3):
        queue.put(Job(number, "a", "Forward", b"", {}, None))
    with pytest.raises(errors.ClientBusyError, match="max_queue") as caught:
        queue.put(Job(3, "a", "Forward", b"", {}, None))
    assert (caught.value.metadata["limit"], caught.value.metadata["value"]) == ("max_queue", "3")
    assert caught.value.retry_after
    queue.put(Job(4, "b", "Forward", b"", {}, None))


# Clients that let their calls stand.

CHECK = "/grpc.health.v1.Health/Check"


def unending() -> Iterator[bytes]:
    """A client's side of a call that never comes."""
    threading.Event().wait(WAIT)
    yield b""


@contextmanager
def idle_server(**limits: float) -> Iterator[Server]:
    """A front without a model, and a call `x/Flood` that answers for ever."""
    server = Server(limits=replace(Limits(), **limits))
    flood = server.guard.streaming("RunWithCache", lambda *_: itertools.repeat(bytes(1 << 20)), spb.RunWithCacheRequest)
    server._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x", {"Flood": flood}),))
    server.guard.stalls.start()
    server._grpc.start()
    yield server
    server.stop(0)


def test_limit_stall_seconds() -> None:
    """A request that does not come, and an answer that nobody reads, are ended; others are not."""
    with idle_server(stall_seconds=0.5) as server:
        client = Raw(server.address)
        unsent = client.channel.stream_unary("/vlm_spectra.v1.ModelService/ListModels").future(unending())
        unread = client.channel.unary_stream("/x/Flood")(b"")
        assert unsent.exception(WAIT).code() is grpc.StatusCode.CANCELLED
        until(lambda: not server.guard.active)
        assert isinstance(client.ask("ListModels", b""), list)
        with pytest.raises(grpc.RpcError, match="CANCELLED"):
            list(unread)
        client.close()


def test_calls_that_stand_are_in_nobodys_way() -> None:
    """More of them than the server has threads, of every service: another client is served."""
    with idle_server(connections=4, client_requests=2) as server:
        bad = Raw(server.address)
        reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        standing = [bad.channel.stream_stream(reflection)(unending()) for _ in range(25)]
        standing += [
            bad.channel.stream_unary(f"/{path}").future(unending())
            for path in ("grpc.health.v1.Health/Check", "vlm_spectra.v1.ModelService/ListModels")
            for _ in range(25)
        ]
        watched = [bad.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"") for _ in range(25)]
        good = Raw(server.address, "good")
        until(lambda: isinstance(good.ask("ListModels", b""), list))
        for each in [*standing, *watched]:
            each.cancel()
        bad.close()
        good.close()


def test_calls_that_give_back_and_stand_are_in_nobodys_way() -> None:
    """More of them than the server has threads: they are refused, or ended after two seconds."""
    with idle_server(connections=8, client_requests=2) as server:
        alone = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.insecure_channel(server.address, alone) for _ in range(3)]
        path = "/vlm_spectra.v1.SpectraService/ReleaseCapture"
        standing = [each.stream_unary(path).future(unending()) for each in channels for _ in range(14)]
        good = Raw(server.address, "good")
        until(lambda: isinstance(good.ask("ListModels", b""), list))
        codes = {each.exception(WAIT).code() for each in standing}
        assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        for each in channels:
            each.close()
        good.close()


def test_a_call_that_ends_before_it_is_counted_never_counts() -> None:
    class Leaving:
        """A call whose client leaves as soon as somebody wants to know who it is."""

        def invocation_metadata(self) -> tuple[()]:
            return ()

        def peer(self) -> str:
            return "ipv4:127.0.0.1:1"

        def add_callback(self, leave: Callable[[], None]) -> bool:
            self.leave = leave
            return True

        def auth_context(self) -> dict[str, Any]:
            self.leave()
            return {}

    with idle_server() as server:
        with pytest.raises(errors.CancelledError):
            server.guard._enter("ListModels", iter([model_service_pb2.ListModelsRequest()]), Leaving())
        assert not server.guard._clients
        assert not server.guard.active


def test_silent_calls_without_a_token_do_not_make_health_fail(front: Server) -> None:
    """As many as gRPC's own services have places."""
    with another_door(front, tokens=Tokens(text="alice * " + "x" * SHORTEST)) as door:
        nobody = Raw(door.address)
        silent = [nobody.channel.stream_unary(CHECK).future(unending()) for _ in range(messages.MOST)]
        for _ in range(20):
            answer = nobody.channel.unary_unary(CHECK)(b"", timeout=WAIT)
            assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
        for each in silent:
            each.cancel()
        nobody.close()


def test_who_watches_health_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused until another one has left; to ask is always free."""
    monkeypatch.setattr(health_module, "WATCHES", 2)
    with idle_server() as server:
        client = Raw(server.address)

        def watch() -> Any:
            call = client.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=WAIT)
            try:
                next(call)
            except grpc.RpcError as error:
                return Refusal.of(error)
            return call

        first, _second = watch(), watch()
        refusal = watch()
        assert (refusal.code, refusal.message) == ("RESOURCE_EXHAUSTED", "2 calls watch this server's health already.")
        assert refusal.retry_after
        assert client.channel.unary_unary(CHECK)(b"", timeout=WAIT)
        first.cancel()
        until(lambda: not isinstance(watch(), Refusal))
        client.close()


def test_a_long_request_to_grpcs_own_services_is_refused() -> None:
    with idle_server() as server:
        client = Raw(server.address)
        for size, code in ((messages.LONGEST, grpc.StatusCode.NOT_FOUND), (messages.LONGEST + 1, "INVALID_INPUT")):
            request = health_pb2.HealthCheckRequest(service="n" * (size - 4)).SerializeToString()
            assert len(request) == size
            with pytest.raises(grpc.RpcError) as caught:
                client.channel.unary_unary(CHECK)(request, timeout=WAIT)
            assert code in (caught.value.code(), Refusal.of(caught.value).reason)
        client.close()


def test_turns_ahead() -> None:
    queue = FairQueue(bound=10)
    for number, client in enumerate(["a", "a", "a", "b"]):
        queue.put(Job(number, client, "Forward", b"", {}, None))
    assert [job.id for job in queue.ahead("c")] == [0, 3]
    assert [job.id for job in queue.ahead("b")] == [0, 1, 3]
    assert [job.id for job in queue.ahead("a")] == [0, 1, 2, 3]


# Trying again.


def test_what_may_be_tried_again() -> None:
    slept: list[float] = []
    busy = errors.BusyError("full", retry_after=2.0)
    retries = Retries(3, None, slept.append)
    assert [retries.wait(busy) for _ in range(4)] == [True, True, True, False]
    assert all(0.75 * 2 * 1.5**n <= seconds <= 1.25 * 2 * 1.5**n for n, seconds in enumerate(slept))
    again = Retries(3, None, slept.append)
    for never in (
        errors.UnavailableError("gone"),
        errors.BusyError("full"),
        errors.InvalidInputError("no", retry_after=1.0),
        errors.DeadlineError("late", retry_after=1.0),
        errors.OutOfDeviceMemoryError("full", retry_after=1.0),
    ):
        assert not again.wait(never)
    assert not Retries(3, 1.0, slept.append).wait(busy), "the wait would be longer than the time that is left"
    assert not Retries(0, None, slept.append).wait(busy)
    died, other = errors.WorkerDiedError("died", retry_after=1.0), errors.UnavailableError("gone", retry_after=1.0)
    careful = Retries(9, None, slept.append)
    assert [careful.wait(error) for error in (other, died, other, died)] == [True, True, True, False]
    slept.clear()
    patient = Retries(2000, None, slept.append)
    assert all(patient.wait(busy) for _ in range(2000))
    assert max(slept) <= 1.25 * LONGEST
    assert len(set(slept[-10:])) > 1, "those who were refused together come back apart"
    assert patient.left is None
    assert 59 < Retries(3, 60.0).left <= 60


@pytest.mark.parametrize("call", ["forward", "stream", "estimate"])
def test_all_attempts_have_one_timeout(front: Server, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    tried: list[str] = []

    def refuses(client: str, method: str, *rest: Any, **more: Any) -> Job:
        tried.append(method)
        raise errors.UnavailableError("for now", retry_after=0.2)

    with vs.connect(front.address, arrays="numpy", timeout=1.0, retries=6) as model:
        inputs = model.prepare_messages("Hi")
        calls: dict[str, Callable[[], object]] = {
            "forward": lambda: model.forward(inputs, 1),
            "stream": lambda: list(model.stream(inputs, 1)),
            "estimate": lambda: model.estimate(inputs, "lm.blocks.0.hook_resid_post"),
        }
        monkeypatch.setattr(front.first, "submit", refuses)
        with pytest.raises((errors.UnavailableError, errors.DeadlineError)):
            calls[call]()
    assert 1 <= len(tried) < 7


@pytest.mark.parametrize("call", ["forward", "stream", "estimate"])
def test_a_later_attempt_has_what_is_left_of_the_timeout(
    front: Server, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Refused once, the call still ends when its caller wants it to. (Of long timeouts gRPC sends whole minutes.)"""
    ends: list[float] = []
    submit = front.first.submit

    def once(client: str, method: str, request: bytes, images: Any, deadline: float, *rest: Any) -> Job:
        ends.append(deadline)
        if len(ends) == 1:
            raise errors.UnavailableError("for now", retry_after=2.0)
        return submit(client, method, request, images, deadline, *rest)

    with vs.connect(front.address, arrays="numpy", timeout=30.0) as model:
        inputs = model.prepare_messages("Hi")
        calls: dict[str, Callable[[], object]] = {
            "forward": lambda: model.forward(inputs, 1).logits,
            "stream": lambda: list(model.stream(inputs, max_new_tokens=1)),
            "estimate": lambda: model.estimate(inputs, POST),
        }
        monkeypatch.setattr(front.first, "submit", once)
        assert calls[call]() is not None
    assert len(ends) == 2
    assert ends[1] < ends[0] + 1.0, "the wait of 1.5 s at least is a part of the timeout"


def test_a_model_that_is_not_loaded_in_time(front: Server) -> None:
    model, states = front.first.model, model_service_pb2.ModelState
    again = threading.Timer(20.0, lambda: setattr(model, "state", states.MODEL_STATE_READY))
    model.state = states.MODEL_STATE_LOADING
    again.start()
    try:
        with pytest.raises(errors.UnavailableError, match="still being loaded after 0 s"):
            vs.connect(front.address, load_timeout=0)
    finally:
        again.cancel()
        model.state = states.MODEL_STATE_READY


@pytest.fixture
def failing(front: Server) -> Iterator[Callable[..., list[str]]]:
    """Makes the next jobs fail, after `tokens` tokens each, with errors of a kind; counts them."""
    host, submit, seen = front.first, front.first.submit, []

    def arrange(times: int, tokens: int = 0, kind: type[errors.SpectraError] = errors.UnavailableError) -> list[str]:
        def replaced(client: str, method: str, *rest: Any, **more: Any) -> Job:
            job = submit(client, method, *rest, **more) if len(seen) >= times else None
            if job is None:
                job = Job(10**9 + len(seen), client, method, b"", {}, None)
                job.started = time.perf_counter()
                job.feed.put("started")
                for index in range(tokens):
                    token = spb.RunWithCacheResponse(token=spb.Token(row=0, index=index, id=5, text="x"))
                    job.feed.put("event", token.SerializeToString())
                job.feed.put("error", kind("the worker died.", retry_after=0.05))
            seen.append(method)
            return job

        host.submit = replaced  # type: ignore[method-assign]
        return seen

    yield arrange
    host.submit = submit  # type: ignore[method-assign]


def test_a_call_is_tried_again(front: Server, failing: Any) -> None:
    with vs.connect(front.address, arrays="numpy") as model:
        inputs = model.prepare_messages("Say hello")
        expected = model.forward(inputs, 1).logits
        seen = failing(2)
        assert (model.forward(inputs, 1).logits == expected).all()
        assert seen == ["Forward"] * 3
        seen.clear()
        with model.run_with_cache(POST) as cache:
            model.forward(inputs, logits_to_keep=None)
        assert seen == ["RunWithCache"] * 3
        assert len(cache) == 1
        seen.clear()
        assert model.estimate(inputs, POST).nbytes
        assert seen == ["Estimate"] * 3
        seen.clear()
        assert list(model.stream(inputs, max_new_tokens=2))
        assert seen == ["Generate"] * 3


def test_a_call_whose_worker_died_is_tried_again_once(front: Server, failing: Any) -> None:
    """It may be what workers die of."""
    with vs.connect(front.address, arrays="numpy") as model:
        inputs = model.prepare_messages("Say hello")
        seen = failing(9, kind=errors.WorkerDiedError)
        for call, method in (
            (lambda: model.forward(inputs, 1), "Forward"),
            (lambda: list(model.stream(inputs, max_new_tokens=2)), "Generate"),
            (lambda: model.estimate(inputs, POST), "Estimate"),
        ):
            seen.clear()
            with pytest.raises(errors.WorkerDiedError):
                call()
            assert seen == [method] * 2


def test_a_generation_that_has_begun_to_answer_is_not(front: Server, failing: Any) -> None:
    with vs.connect(front.address, arrays="numpy") as model:
        inputs = model.prepare_messages("Say hello")
        seen = failing(5, tokens=2)

        def captured() -> None:
            with model.run_with_cache(POST):
                model.generate(inputs, 4)

        for call, method in (
            (lambda: model.generate(inputs, 4), "Generate"),
            (lambda: list(model.stream(inputs, max_new_tokens=4)), "Generate"),
            (captured, "RunWithCache"),
        ):
            seen.clear()
            with pytest.raises(errors.UnavailableError, match="died"):
                call()
            assert seen == [method]


def test_a_generation_that_is_cut_is_not_begun_again(front: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that breaks off after the first tokens: the caller is told, and the server was asked once."""
    asked, submit = [], front.first.submit

    def counting(client: str, method: str, *rest: Any, **more: Any) -> Job:
        asked.append(method)
        return submit(client, method, *rest, **more)

    monkeypatch.setattr(front.first, "submit", counting)
    story: dict[str, Any] = {"max_new_tokens": 1900, "do_sample": True, "temperature": 100.0, "seed": 1}
    for call in (lambda m, i: m.generate(i, **story), lambda m, i: list(m.stream(i, **story))):
        with Proxy(front.address) as proxy, vs.connect(proxy.address, shared_memory=False, retries=8) as model:
            inputs = model.prepare_messages_batch(["Tell me a story"] * 4)
            asked.clear()
            proxy.cuts = [proxy.carried + 3000]
            with pytest.raises(errors.UnavailableError):
                call(model, inputs)
            assert asked == ["Generate"]
            assert not proxy.cuts


@pytest.mark.parametrize(("grants", "end"), [([False], "later"), ([True, False], "error"), ([True], "done")])
def test_a_generation_is_not_begun_twice_for_want_of_memory(hooked: vs.HookedVLM, grants: list[bool], end: str) -> None:
    """A worker asks for an answer's memory before its first token is told; after one it never starts over."""
    inputs, pipe = hooked.prepare_messages("Say hello"), WorkerPipe(*grants)
    capture = spb.CaptureRun(
        prompts=wire.prompts_to_wire(inputs.prompts),
        selection=spb.CaptureSelection(hooks=[POST]),
        generate=spb.GenerateOptions(max_new_tokens=3, do_sample=True, seed=1),
    )
    request = spb.RunWithCacheRequest(run=capture).SerializeToString()
    pipe.job = worker.Job({"job": 1, "method": "RunWithCache"}, [request])
    worker.Worker(hooked, pipe, Limits()).run(pipe.job)
    kinds = [message["kind"] for message in pipe.sent]
    assert kinds[-1] == end
    assert ("event" in kinds) == grants[0]
    assert "event" not in kinds[: kinds.index("reserve")]


def test_many_threads_of_one_client_all_get_their_answer(few: Server) -> None:
    """More at once than one client may have: those refused come again."""
    import threading

    faults: list[BaseException] = []
    with vs.connect(few.address, arrays="numpy", retries=100) as model:
        inputs = model.prepare_messages("Say hello")
        expected = model.forward(inputs, 1).logits

        def ask() -> None:
            try:
                assert (model.forward(inputs, 1).logits == expected).all()
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults
