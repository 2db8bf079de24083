"""Fewer bytes first: what a capture would take, told before; reductions where the model runs."""

from __future__ import annotations

import numpy as np
import pytest
from vlm_spectra import errors
from vlm_spectra.arrays import to_numpy

PATTERN, Z, POST = "lm.blocks.*.attn.hook_pattern", "lm.blocks.*.attn.hook_z", "lm.blocks.*.hook_resid_post"

SELECTIONS = [
    {"hooks": [POST]},
    {"hooks": [PATTERN, Z], "positions": "last", "heads": [0, 3]},
    {"hooks": [PATTERN], "reduce": "mean_heads", "dtype": "bfloat16"},
    {"hooks": [POST, Z], "reduce": "norm"},
    {"hooks": ["vision.*.*.hook_resid_post"]},
]


def captured(model, inputs, **selection):
    with model.run_with_cache(selection.pop("hooks"), **selection) as cache:
        model.forward(inputs, logits_to_keep=None)
    return cache


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda each: "-".join(map(str, each.values())))
def test_an_estimate_is_exact_in_bytes(hooked, remote, screenshot, selection):
    for model in (hooked, remote):
        inputs = model.prepare_messages("Click on the red circle", screenshot)
        estimate = model.estimate(inputs, **selection)
        cache = captured(model, inputs, **selection)
        assert estimate.shapes == {name: tuple(cache[name].shape) for name in cache.names}
        assert estimate.nbytes == cache.nbytes
        assert model.estimate(inputs, **selection).compute_seconds > 0
        assert "MB" in str(estimate)


def test_an_estimate_refuses_what_the_capture_would(hooked, remote, inputs):
    for model in (hooked, remote):
        with pytest.raises(errors.UnknownHookError):
            model.estimate(inputs, "lm.blocks.99.hook_resid_post")


@pytest.mark.parametrize("heads", [None, [1, 4]])
def test_the_mean_over_heads(hooked, remote, inputs, heads):
    whole = captured(hooked, inputs, hooks=[PATTERN, Z], heads=heads)
    for model in (hooked, remote):
        mean = captured(model, inputs, hooks=[PATTERN, Z], heads=heads, reduce="mean_heads")
        for name in whole.names:
            axis = 1 if "pattern" in name else 2
            wanted = to_numpy(whole[name]).astype(np.float64).mean(axis)
            assert mean[name].shape == wanted.shape
            assert np.abs(to_numpy(mean[name]) - wanted).max() < 1e-6


def test_the_norm_over_the_last_axis(hooked, remote, inputs):
    whole = captured(hooked, inputs, hooks=[POST, Z], positions="image")
    for model in (hooked, remote):
        norm = captured(model, inputs, hooks=[POST, Z], positions="image", reduce="norm")
        for name in whole.names:
            wanted = np.linalg.norm(to_numpy(whole[name]).astype(np.float64), axis=-1)
            assert norm[name].shape == wanted.shape
            assert np.abs(to_numpy(norm[name]) / wanted - 1).max() < 1e-5
        with pytest.raises(errors.InvalidInputError, match="reduce='norm'; the residual stream is taken apart"):
            norm.accumulated_resid(1, pos_slice=1)


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"hooks": [POST], "reduce": "mean_heads"}, "needs hooks with heads"),
        ({"hooks": [POST], "reduce": "median"}, "possible are mean_heads, norm"),
    ],
)
def test_a_reduction_that_is_not_possible(remote, inputs, selection, words):
    with pytest.raises(errors.InvalidInputError, match=words):
        captured(remote, inputs, **selection)
