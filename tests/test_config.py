"""Settings and limits: where a value comes from, each limit just below and just above it, trying again."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import vlm_spectra as vs
from documents import table
from PIL import Image
from vlm_spectra import errors
from vlm_spectra.retries import Retries
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra_server.serving.budget import Budget
from vlm_spectra_server.serving.config import SETTINGS, resolve
from vlm_spectra_server.serving.host import FairQueue, Job, Loading
from vlm_spectra_server.serving.limits import LIMITS, Limits, check_image
from vlm_spectra_server.serving.server import Server
from vlm_spectra_server.serving.services import Models

DOCUMENT = Path(__file__).parents[1] / "docs" / "server.md"
HOOK = "lm.blocks.1.hook_resid_post"
ALL = ["lm.blocks.*.attn.*", "lm.blocks.*.mlp.*", "lm.blocks.*.hook_resid_post"]


def options(**values):
    return type("Options", (), values)


# Settings.


def test_precedence(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("max_batch = 3\nmax_queue = 4\nmax_capture_gb = 1\nport = 6000\n")
    environment = {"VLM_SPECTRA_MAX_BATCH": "5", "VLM_SPECTRA_PORT": "6001", "VLM_SPECTRA_MAX_BACH": "1"}
    config = resolve(options(config=str(file), port="6002"), environment)
    assert (config.port, config.sources["port"]) == (6002, "--port")
    assert (config.max_batch, config.sources["max_batch"]) == (5, "VLM_SPECTRA_MAX_BATCH")
    assert (config.max_queue, config.sources["max_queue"]) == (4, str(file))
    assert (config.host, config.sources["host"]) == ("127.0.0.1", "default")
    assert config.limits.capture_bytes == 10**9
    assert config.ignored == ("VLM_SPECTRA_MAX_BACH",)
    again = resolve(options(), {"VLM_SPECTRA_CONFIG": str(file)})
    assert again.max_batch == 3


def test_defaults_are_those_of_the_limits():
    assert resolve(options(), {}).limits == Limits()
    assert {limit.setting for limit in LIMITS} <= {setting.name for setting in SETTINGS}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_bach = 3", "did you mean 'max_batch'"),
        ("max_batch = 'many'", "a whole number, not 'many'"),
        ("max_batch = 2.5", "a whole number"),
        ("max_batch = true", "a whole number"),
        ("max_batch = 0", "at least 1"),
        ("max_capture_gb = nan", "a number"),
        ("insecure = 'maybe'", "true or false"),
        ("log_format = 'xml'", "text or json"),
        ("host = 7", "host is text"),
        ("[limits]\nmax_batch = 3", "no setting 'limits'"),
        ("max_batch =", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, words):
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(errors.InvalidInputError, match=words) as caught:
        resolve(options(config=str(file)), {})
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_shows_what_is_in_force():
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "config", "--max-batch", "7"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} >= {setting.name for setting in SETTINGS}
    assert "--max-batch" in shown
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert rows["max_batch"] == {"value": 7, "from": "--max-batch"}
    assert rows["max_capture_gb"] == {"value": 4.0, "from": "default"}
    refused = subprocess.run([*command, "--max-queue", "no"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "max_queue is a whole number" in refused.stderr


def test_the_limits_are_documented():
    """`SPECTRA_WRITE_DOCS=1` writes the table."""
    rows = [[f"`{limit.setting}`", f"{limit.default:,}", limit.help] for limit in LIMITS]
    begin, end = "<!-- limits -->\n", "<!-- end of limits -->"
    before, rest = DOCUMENT.read_text().split(begin)
    written, after = rest.split(end)
    text = table(["setting", "default", ""], rows) + "\n"
    if os.environ.get("SPECTRA_WRITE_DOCS"):
        DOCUMENT.write_text(before + begin + text + end + after)
    else:
        assert written == text


# Limits.

SMALL = Limits(
    capture_bytes=60_000,
    one_image_bytes=20_000,
    image_pixels=60_000,
    prompt_tokens=100,
    new_tokens=6,
    batch=3,
    sweep_cells=24,
    client_requests=3,
    waiting=2,
)


@pytest.fixture(scope="module")
def front():
    server = Server(limits=SMALL)
    server.start(Loading("spectra-tiny", device="cpu"))
    assert server.first.settled.wait(120)
    yield server
    server.stop(0)


@pytest.fixture(scope="module")
def small(front):
    with vs.connect(front.address, arrays="numpy", retries=0, shared_memory=False) as model:
        yield model


def refused(kind, limit, value, call):
    """The call is refused with the limit's name and value, in the sentence and for programs."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.metadata["limit"] == limit
    assert float(caught.value.metadata["value"]) == value
    assert float(caught.value.metadata["asked"]) > value
    assert limit in str(caught.value)
    return caught.value


def picture(width, height, noise=False):
    if noise:
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        return Image.fromarray(pixels)
    return Image.new("RGB", (width, height), (30, 60, 90))


def test_image_bytes(small):
    def padded(size):
        buffer = io.BytesIO()
        picture(80, 60).save(buffer, "PNG")
        return buffer.getvalue() + bytes(size - buffer.tell())

    assert small.prepare_messages("Hi", padded(20_000))
    refused(errors.InvalidImageError, "max_image_mb", 0.02, lambda: small.prepare_messages("Hi", padded(20_001)))


def test_image_pixels(small):
    assert small.prepare_messages("Hi", picture(300, 200))
    error = refused(
        errors.InvalidImageError, "max_image_megapixels", 0.06, lambda: small.prepare_messages("Hi", picture(301, 200))
    )
    assert error.field == "image"


def test_an_image_is_checked_before_it_is_decoded():
    data = io.BytesIO()
    Image.new("1", (8000, 8000)).save(data, "PNG")
    begun = time.monotonic()
    check_image(Limits(), data.getvalue())
    check_image(Limits(), b"no image at all")  # the worker says so
    with pytest.raises(errors.InvalidImageError, match="64 million pixels; this server takes at most 63"):
        check_image(replace(Limits(), image_pixels=63_000_000), data.getvalue())
    assert time.monotonic() - begun < 0.5


def test_prompt_length(small):
    overhead = small.prepare_messages("word").input_ids.shape[1] - 1
    step = small.prepare_messages("word word").input_ids.shape[1] - overhead - 1
    words = (100 - overhead) // step
    exact = " ".join(["word"] * words)
    assert small.prepare_messages(exact).input_ids.shape[1] <= 100
    refused(errors.PromptTooLongError, "max_prompt_tokens", 100, lambda: small.prepare_messages(exact + " word" * step))


def test_new_tokens(small):
    inputs = small.prepare_messages("Hi")
    assert small.generate(inputs, 6).text
    refused(errors.OverLimitError, "max_new_tokens", 6, lambda: small.generate(inputs, 7))
    refused(errors.OverLimitError, "max_new_tokens", 6, lambda: list(small.stream(inputs, max_new_tokens=7)))

    def captured():
        with small.run_with_cache(HOOK):
            small.generate(inputs, 7)

    refused(errors.OverLimitError, "max_new_tokens", 6, captured)


def test_batch(small):
    tasks = ["a", "b", "c", "d"]
    assert len(small.prepare_messages_batch(tasks[:3], [None] * 3)) == 3
    error = refused(errors.OverLimitError, "max_batch", 3, lambda: small.prepare_messages_batch(tasks, [None] * 4))
    assert error.field == "prompts"


def test_capture_bytes(small):
    inputs = small.prepare_messages("Hi")
    estimates = {name: small.estimate(inputs, name).nbytes for name in small.catalogue.expand(ALL, capture=True)}
    names, total = [], 0
    for name, size in estimates.items():
        if -(-size // 64) * 64 + total <= SMALL.capture_bytes:
            names.append(name)
            total += -(-size // 64) * 64
        else:
            over = [*names, name]
            break

    def run(hooks):
        with small.run_with_cache(hooks) as cache:
            small.forward(inputs, logits_to_keep=None)
        return cache

    assert len(run(names)) == len(names)
    error = refused(errors.CaptureTooLargeError, "max_capture_gb", 6e-05, lambda: run(over))
    assert "would fit" in str(error)


def test_sweep_cells(small):
    clean, corrupted = small.prepare_messages("red cat"), small.prepare_messages("big cat")
    if clean.input_ids.shape != corrupted.input_ids.shape:
        corrupted = clean

    def sweep(positions):
        hooks = ["lm.blocks.0.hook_resid_post", HOOK]
        return small.patch_sweep(clean, corrupted, hooks, positions=positions, metric=vs.Target())

    length = clean.input_ids.shape[1]
    assert length > 12
    assert sweep(list(range(12))).values.shape == (2, 12)
    refused(errors.OverLimitError, "max_sweep_cells", 24, lambda: sweep(list(range(13))))


def test_calls_of_one_client(small, front):
    """Three at once are taken, a fourth is not, and another client's is."""
    guard, inputs = front.guard, small.prepare_messages("Hi")
    client = dict(small._metadata)["x-vlm-spectra-client"]
    for held in (2, 3):
        for _ in range(100):
            if guard._clients[client] == 0:
                break
            time.sleep(0.02)
        guard._clients[client] += held
        try:
            if held == 2:
                assert small.forward(inputs, 1).logits.shape[1] == 1
            else:
                error = refused(errors.ClientBusyError, "max_client_requests", 3, lambda: small.estimate(inputs, HOOK))
                assert error.retry_after
                assert error.reason == "CLIENT_BUSY"
                with vs.connect(front.address, retries=0) as other:
                    assert other.forward(other.prepare_messages("Hi"), 1).logits.shape[1] == 1
        finally:
            for _ in range(100):
                if guard._clients[client] == held:
                    break
                time.sleep(0.02)
            del guard._clients[client]


def test_the_queue_names_its_limit():
    queue = FairQueue(bound=2)
    for number in range(2):
        queue.put(Job(number, "a", "Forward", b"", {}, None))
    refused(errors.BusyError, "max_queue", 2, lambda: queue.put(Job(2, "b", "Forward", b"", {}, None)))


class _Host:
    """A model as `Models` sees it."""

    def __init__(self, name, used, busy=False):
        self.loading, self.used, self.busy, self.closed = Loading(name), used, busy, False

    def close(self):
        self.closed = True


def test_models_at_a_time():
    """The least recently used idle one leaves; where all are at work, none does."""
    gone = []
    models = Models(replace(Limits(), models=3), Budget(1), lambda name, state: gone.append((name, state)))
    old, busy, new = _Host("old", 2.0), _Host("busy", 1.0, busy=True), _Host("new", 3.0)
    models.hosts = {"old": old, "busy": busy}
    models._make_room(0)
    assert not gone
    models.hosts["new"] = new
    models._make_room(0)
    assert (old.closed, busy.closed, new.closed) == (True, False, False)
    assert gone == [("old", None)]
    models.hosts = {name: _Host(name, 1.0, busy=True) for name in "abc"}
    refused(errors.BusyError, "max_models", 3, lambda: models._make_room(0))
    models._make_room(1)


def test_host_memory_bounds_a_capture():
    assert not Budget(100).take("a", 101)
    assert Budget(100).take("a", 100)


def test_a_refusal_costs_nothing_but_says_what_it_took(small):
    with pytest.raises(errors.CaptureTooLargeError) as caught, small.run_with_cache(ALL):
        small.forward(small.prepare_messages("Hi"), logits_to_keep=None)
    found = caught.value.metadata
    assert {"queue_seconds", "prepare_seconds", "compute_seconds", "total_seconds"} <= set(found)
    assert 0 <= float(found["compute_seconds"]) <= float(found["total_seconds"])
    assert caught.value.request_id


# Deadlines.


def test_a_deadline_before_its_turn_is_refused_at_once(front, small):
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
            assert caught.value.retry_after > 2
            host._check_deadline("c", 30.0)
            host._check_deadline("c", 3.2)
        finally:
            host.queue.drain()
            host._running = None
            del host._seconds["Slow"]


def test_turns_ahead():
    queue = FairQueue(bound=10)
    for number, client in enumerate(["a", "a", "a", "b"]):
        queue.put(Job(number, client, "Forward", b"", {}, None))
    assert [job.id for job in queue.ahead("c")] == [0, 3]
    assert [job.id for job in queue.ahead("b")] == [0, 1, 3]
    assert [job.id for job in queue.ahead("a")] == [0, 1, 2, 3]


# Trying again.


def test_what_may_be_tried_again():
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


@pytest.fixture
def failing(front):
    """Makes the next jobs fail, after `tokens` tokens each; counts them."""
    host, submit, seen = front.first, front.first.submit, []

    def arrange(times, tokens=0):
        def replaced(client, method, request, images, deadline):
            job = submit(client, method, request, images, deadline) if len(seen) >= times else None
            if job is None:
                job = Job(10**9 + len(seen), client, method, b"", {}, None)
                job.started = time.perf_counter()
                job.feed.put("started")
                for index in range(tokens):
                    token = spb.RunWithCacheResponse(token=spb.Token(row=0, index=index, id=5, text="x"))
                    job.feed.put("event", token.SerializeToString())
                job.feed.put("error", errors.UnavailableError("the worker died.", retry_after=0.05))
            seen.append(method)
            return job

        host.submit = replaced
        return seen

    yield arrange
    host.submit = submit


def test_a_call_is_tried_again(front, failing):
    with vs.connect(front.address, arrays="numpy") as model:
        inputs = model.prepare_messages("Say hello")
        expected = model.forward(inputs, 1).logits
        seen = failing(2)
        assert (model.forward(inputs, 1).logits == expected).all()
        assert seen == ["Forward"] * 3
        seen.clear()
        with model.run_with_cache(HOOK) as cache:
            model.forward(inputs, logits_to_keep=None)
        assert seen == ["RunWithCache"] * 3
        assert len(cache) == 1
        seen.clear()
        assert model.estimate(inputs, HOOK).nbytes
        assert seen == ["Estimate"] * 3
        seen.clear()
        assert list(model.stream(inputs, max_new_tokens=2))
        assert seen == ["Generate"] * 3


def test_a_generation_that_has_begun_to_answer_is_not(front, failing):
    with vs.connect(front.address, arrays="numpy") as model:
        inputs = model.prepare_messages("Say hello")
        seen = failing(5, tokens=2)
        for call in (
            lambda: model.generate(inputs, 4),
            lambda: list(model.stream(inputs, max_new_tokens=4)),
        ):
            seen.clear()
            with pytest.raises(errors.UnavailableError, match="died"):
                call()
            assert seen == ["Generate"]


def test_calls_at_once_over_all_clients(front):
    guard = front.guard
    with guard._lock:
        before = dict(guard._clients)
        guard._clients.clear()
        guard._clients["others"] = front.guard.limits.connections
        try:
            with pytest.raises(errors.BusyError, match="max_calls"):
                guard._admit("new")
            guard._clients["others"] -= 1
            guard._admit("new")
        finally:
            guard._clients.clear()
            guard._clients.update(before)


def test_many_threads_of_one_client_all_get_their_answer(front):
    """More at once than one client may have: those refused come again."""
    faults: list[BaseException] = []
    with vs.connect(front.address, arrays="numpy", retries=20) as model:
        inputs = model.prepare_messages("Say hello")
        expected = model.forward(inputs, 1).logits

        def ask():
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
