"""How far a call is: told in process and across the network, shown while it works, and ended by who is told."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import vlm_spectra as vs
from calls import until
from starlette.testclient import TestClient
from vlm_spectra.arrays import to_numpy
from vlm_spectra_server.web.app import STATIC, create_app

LONG = 1000
"""Steps of an integration that nobody waits for."""
TASK = "Click on the Login button"
CLEAN, CORRUPTED = STATIC / "gallery" / "screen-1.png", STATIC / "gallery" / "screen-1-moved.png"
MOVED = {"filename": CORRUPTED.name, "task": TASK}


class Enough(Exception):  # noqa: N818
    """The caller has seen enough."""


@pytest.fixture(scope="module", params=["in process", "remote"])
def model(request, hooked, front):
    if request.param == "in process":
        yield hooked
        return
    with vs.connect(front.address) as remote:
        yield remote


@pytest.fixture
def said(front):
    """What the worker says of its jobs from here on: the kinds of its messages."""
    kinds: list[str] = []
    handle = front.first._handle

    def listening(message, blobs, fd):
        kinds.append(message["kind"])
        handle(message, blobs, fd)

    front.first._handle = listening
    yield kinds
    front.first._handle = handle


def wait_for(kinds: list[str], *ends: str) -> str:
    """How the job ended, once it has."""
    return until(lambda: next((kind for kind in kinds if kind in ends), ""))


CALLS = {
    "forward": (lambda m, inputs: m.forward(inputs, 1).logits, {"forward"}),
    "generate": (lambda m, inputs: m.generate(inputs, 3).text, {"generating"}),
    "stream": (lambda m, inputs: list(m.stream(inputs, 3)), {"generating"}),
    "logit_lens": (lambda m, inputs: m.logit_lens(inputs).probs, {"forward", "analysing"}),
    "direct_logit": (lambda m, inputs: m.attribute(inputs).scores, {"forward"}),
    "integrated_gradients": (
        lambda m, inputs: m.attribute(inputs, "integrated_gradients", steps=3).scores,
        {"forward", "analysing"},
    ),
    "occlusion": (lambda m, inputs: m.attribute(inputs, "occlusion", window=4).scores, {"forward", "analysing"}),
    "relevancy": (lambda m, inputs: m.attribute(inputs, "relevancy").scores, {"forward", "analysing"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_says_how_far_it_is(model, name):
    inputs = model.prepare_messages(TASK, CLEAN)
    call, phases = CALLS[name]
    seen: list[tuple[str, int, int]] = []
    with model.run_with_progress(lambda *so_far: seen.append(so_far) if so_far[0] != "queued" else None):
        call(model, inputs)
    assert {phase for phase, _, _ in seen} == phases
    for phase in phases:
        counts = [done for each, done, _ in seen if each == phase]
        totals = {total for each, _, total in seen if each == phase}
        assert len(totals) == 1
        left = max(totals) - counts[-1]
        assert left == 0 or (phase == "forward" and left == 1), "a pass ends inside the last layer that it needs"
        assert all(0 < done <= max(totals) for done in counts)
    layers = [so_far for so_far in seen if so_far[0] == "forward"][: model.info.layers - 1]
    assert not layers or layers == [("forward", i + 1, model.info.layers) for i in range(model.info.layers - 1)]
    seen.clear()
    call(model, inputs)
    assert not seen, "the block is over"


def test_integration_steps_are_counted(model):
    seen: list[tuple[str, int, int]] = []
    with model.run_with_progress(lambda *so_far: seen.append(so_far)):
        model.attribute(model.prepare_messages(TASK, CLEAN), "integrated_gradients", steps=5)
    assert [so_far for so_far in seen if so_far[0] == "analysing"] == [("analysing", i, 5) for i in range(1, 6)]


def test_a_sweep_fills_in_row_by_row(model):
    clean, corrupted = model.prepare_messages(TASK, CLEAN), model.prepare_messages(TASK, CORRUPTED)
    partial: list[vs.PatchSweep] = []
    sweep = model.patch_sweep(clean, corrupted, "lm.blocks.*.hook_resid_pre", "text", on_row=partial.append)
    whole = to_numpy(sweep.values)
    assert np.isfinite(whole).all()
    assert len(partial) == len(sweep.hooks) == model.info.layers
    for row, so_far in enumerate(partial):
        np.testing.assert_array_equal(to_numpy(so_far.values)[: row + 1], whole[: row + 1])
        assert np.isnan(to_numpy(so_far.values)[row + 1 :]).all()
        assert (so_far.hooks, so_far.columns, so_far.target_tokens) == (sweep.hooks, sweep.columns, sweep.target_tokens)
        assert (so_far.clean_value, so_far.corrupted_value) == (sweep.clean_value, sweep.corrupted_value)
    assert all(np.isfinite(effect) for _, _, effect in partial[0].top(3)), "what has not come is not strong"
    assert "nan" not in partial[0].picture().to_html().lower()


def long_call(model, inputs):
    model.attribute(inputs, "integrated_gradients", steps=LONG)


def test_an_interrupt_in_who_is_told_ends_it(model):
    def told(phase, done, total):
        raise KeyboardInterrupt

    inputs = model.prepare_messages(TASK, CLEAN)
    with model.run_with_progress(told), pytest.raises(KeyboardInterrupt):
        long_call(model, inputs)
    assert model.forward(inputs, 1).logits.shape[1] == 1


def test_a_cell_that_is_interrupted_while_it_waits_for_the_rest(model, monkeypatch):
    inputs, ended = model.prepare_messages(TASK, CLEAN), []

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(vs.ActivationCache, "_wait", interrupted)
    monkeypatch.setattr(vs.ActivationCache, "_cancel", lambda self: ended.append(self))
    with pytest.raises(KeyboardInterrupt), model.run_with_cache("lm.hook_embed") as cache:
        model.forward(inputs)
    assert [each is cache for each in ended] == [True]


def test_who_is_told_can_end_it(model):
    seen: list[int] = []

    def told(phase, done, total):
        if phase == "analysing":
            seen.append(done)
            raise Enough(f"after {done} of {total}")

    inputs = model.prepare_messages(TASK, CLEAN)
    with model.run_with_progress(told), pytest.raises(Enough, match=f"after 1 of {LONG}"):
        long_call(model, inputs)
    assert seen == [1]
    with pytest.raises(Enough):
        model.patch_sweep(inputs, inputs, "lm.blocks.*.hook_resid_pre", "text", on_row=_enough)
    assert model.forward(inputs, 1).logits.shape[1] == 1


def _enough(_: vs.PatchSweep) -> None:
    raise Enough


def test_the_worker_stops_at_the_next_step(front, said):
    """An integration of thousands of steps, ended after a few by its caller, ends in the worker and not by itself."""

    def told(phase, done, total):
        if phase == "analysing" and done == 3:
            raise Enough

    with vs.connect(front.address) as remote:
        inputs = remote.prepare_messages(TASK, CLEAN)
        said.clear()
        with remote.run_with_progress(told), pytest.raises(Enough):
            long_call(remote, inputs)
        assert wait_for(said, "error", "done") == "error"
        assert said.count("event") < LONG // 2
        assert remote.forward(inputs, 1).logits.shape[1] == 1


def test_a_call_that_waits_is_told_its_place(front):
    """Three calls of three clients, one at work until the others have been told; then those go on."""
    begun, told, faults = threading.Event(), [threading.Event(), threading.Event()], []

    def first(phase, done, total):
        begun.set()
        if all(each.is_set() for each in told):
            raise Enough

    def second(number, inputs, model):
        places = []

        def report(phase, done, total):
            places.append((phase, done, total))
            if phase == "queued" and total == 2:
                told[number].set()

        try:
            with model.run_with_progress(report):
                assert model.forward(inputs, 1).logits.shape[1] == 1
            assert ("queued", number + 1, 2) in places
            assert places[-1][0] == "forward"
        except BaseException as fault:
            faults.append(fault)
            told[number].set()

    with vs.connect(front.address) as one, vs.connect(front.address) as two, vs.connect(front.address) as three:
        inputs = [model.prepare_messages(TASK, CLEAN) for model in (one, two, three)]
        threads = [threading.Thread(target=second, args=(0, inputs[1], two), daemon=True)]
        threads += [threading.Thread(target=second, args=(1, inputs[2], three), daemon=True)]

        def begin():
            begun.wait()
            for number, thread in enumerate(threads):
                thread.start()
                until(lambda number=number: len(front.first.queue) > number)

        beginning = threading.Thread(target=begin, daemon=True)
        beginning.start()
        with one.run_with_progress(first), pytest.raises(Enough):
            one.attribute(inputs[0], "integrated_gradients", steps=4 * LONG)
        for thread in (beginning, *threads):
            thread.join()
    assert not faults


def test_an_answer_that_is_left_ends_in_the_worker(front, said):
    with vs.connect(front.address) as leaving:
        inputs = leaving.prepare_messages("Tell me a long story")
        said.clear()
        next(leaving.stream(inputs, max_new_tokens=1900, do_sample=True, seed=1, temperature=20.0))
    assert wait_for(said, "error", "done") == "error"


# The page.


@pytest.fixture(scope="module")
def web(front):
    with TestClient(create_app(front.address)) as client:
        yield client


def events(web, name, **question):
    asked = {"filename": CLEAN.name, "task": TASK, "stream": True, **question}
    with web.stream("POST", f"/api/{name}", json=asked) as answer:
        return [json.loads(line) for line in answer.iter_lines()]


@pytest.mark.parametrize(
    ("name", "question", "phases"),
    [
        ("predict", {"max_new_tokens": 4}, {"generating"}),
        ("forward", {}, {"forward", "analysing"}),
        ("attention", {}, {"forward"}),
        ("logit-lens", {}, {"forward", "analysing"}),
        ("attribution", {"method": "integrated_gradients", "steps": 4}, {"forward", "analysing"}),
        (
            "patching",
            {"corrupted": MOVED, "over": "text"},
            {"forward", "analysing"},
        ),
    ],
)
def test_every_view_says_how_far_it_is(web, name, question, phases):
    found = events(web, name, **question)
    assert found[-1]["type"] == "result", found[-1]
    steps = [event for event in found if event["type"] == "progress" and event["phase"] != "queued"]
    assert {event["phase"] for event in steps} == phases
    assert all(0 < event["done"] <= event["total"] for event in steps)
    last = {event["phase"]: event for event in steps}
    if "analysing" in last:
        assert last["analysing"]["done"] == last["analysing"]["total"]


def test_a_page_that_is_left_ends_its_call(front, said):
    """The connection of an analysis is closed while it works: its call ends in the worker."""
    from vlm_spectra_server.web import runs
    from vlm_spectra_server.web.models import Models
    from vlm_spectra_server.web.upstream import Upstream

    models, begun, ended, kept = Models(Upstream(front.address)), threading.Event(), threading.Event(), []

    def work(model, tell):
        long_call(model, model.prepare_messages(TASK, CLEAN))

    def emit(event):
        kept.append(event)
        if event.get("phase") == "analysing":
            begun.set()

    run = runs._Run(models, "", "", work, emit)
    thread = threading.Thread(target=run.go, args=(ended.set,))
    thread.start()
    assert begun.wait(200)
    said.clear()
    run.cancel()
    assert ended.wait(200)
    thread.join()
    assert wait_for(said, "error", "done") == "error"
    assert kept[-1]["problem"]["reason"] == "CANCELLED"
    models.close()


def test_a_capture_that_its_caller_ends_ends_at_once(front):
    """It does not go on for the time in which a reader may come back."""
    hook = "lm.blocks.0.hook_resid_post"

    def told(phase, done, total):
        if phase == "generating":
            raise Enough

    with vs.connect(front.address, arrays="numpy", shared_memory=False) as model:
        inputs = model.prepare_messages("Tell me a long story")
        with pytest.raises(Enough), model.run_with_progress(told), model.run_with_cache(hook):
            model.generate(inputs, 1900, do_sample=True, seed=1, temperature=20.0)
        running = front.first._running
        until(lambda: front.first._running is None)
        assert running is None or running.cancelled
