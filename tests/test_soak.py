"""The short form of `make soak`: a few clients for a few seconds. Memory is the long form's to judge."""

from __future__ import annotations

import vlm_spectra as vs
from soak import cases, report
from soak.run import Plan, soak
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
