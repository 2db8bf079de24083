"""Every image-text-to-text architecture that transformers knows: does the one reader read it, with no code of its own?

Text alone, tiny random weights, from the architecture's default configuration.
"""

from __future__ import annotations

from functools import cache

import documents
import pytest
import zoo
from relations import TOLERANCES, measure
from tiny import MODEL_TYPES, text, tiny_config, tiny_model
from vlm_spectra_server.families import family_of
from vlm_spectra_server.families.family import Family

ENOUGH = 50
"""How many must read without code."""

NEEDS_CODE = {
    "blip": "BERT's blocks, which read the picture by cross-attention inside each block",
    "diffusion_gemma": "answers by diffusion: the prompt and the block being written are two passes",
    "git": "BERT's blocks, normed after each addition",
    "glm5_next": "several residual streams, mixed by learnt gates",
    "hy_v4_vl": "several residual streams, mixed by learnt gates",
    "inkling2": "a block reads a mixture of all earlier streams, not the last one",
    "inkling2_loop": "a block reads a mixture of all earlier streams, and some blocks run several times",
    "inkling_mm_model": "a convolution stands between each part and the stream",
    "muse_spark": "learnt gates weigh the stream against what is added",
    "nemotron_h_omni": "a block is attention or an MLP or a recurrence, not two of them",
    "pi0": "a robot's policy: actions, not tokens, come out",
    "qwen4_exp": "several residual streams, mixed by learnt gates, and no final norm",
}
"""What has another shape, and how."""

CANNOT = {
    "blip-2": "takes no prompt without a picture",
    "dots3_note": "its blocks have configurations of their own, which cannot be made small from outside",
    "evolla": "reads proteins; its class is not one of images and text",
    "fast_vlm": "its vision tower comes from timm, which is not installed",
    "florence2": "an encoder and a decoder, not one stream of text and image tokens",
    "gemma3n": "its vision tower comes from timm, which is not installed",
    "idefics": "takes no prompt without a picture",
    "instructblip": "takes no prompt without a picture",
    "instructblipvideo": "takes no prompt without a picture",
    "kosmos-2": "takes no prompt without a picture",
    "perception_lm": "its vision tower comes from timm, which is not installed",
    "pix2struct": "an encoder and a decoder, not one stream of text and image tokens",
    "pp_formulanet": "an encoder and a decoder, not one stream of text and image tokens",
    "t5gemma2": "an encoder and a decoder, not one stream of text and image tokens",
    "udop": "an encoder and a decoder, not one stream of text and image tokens",
    "vision-encoder-decoder": "an encoder and a decoder, not one stream of text and image tokens",
}
"""What cannot be surveyed, and why."""


@cache
def figures(model_type: str) -> dict[str, float]:
    config = tiny_config(model_type)
    return measure(tiny_model(config), text(config))


def has_code(model_type: str) -> bool:
    """Whether the language model's reading has code for this family; how images lie is another matter."""
    cls = type(family_of(model_type))
    reads = ("parts", "parts_of", "attn_multiplier", "mlp_multiplier", "logit_shape", "deepstack")
    return any(getattr(cls, name) is not getattr(Family, name) for name in reads)


@pytest.mark.parametrize("model_type", [each for each in MODEL_TYPES if each not in NEEDS_CODE | CANNOT])
def test_the_reader_reads(model_type):
    zoo.require(model_type)
    found = figures(model_type)
    assert {row: value for row, value in found.items() if not value <= TOLERANCES[row]} == {}


@pytest.mark.parametrize("model_type", sorted((NEEDS_CODE | CANNOT).keys() & MODEL_TYPES))
def test_what_is_said_not_to_read_does_not(model_type):
    try:
        found = figures(model_type)
    except Exception:
        return
    assert any(value > TOLERANCES[row] for row, value in found.items()), f"{model_type} reads: take it off the list"


def test_enough_architectures_read_without_code():
    assert len(MODEL_TYPES) >= 97
    assert len([each for each in MODEL_TYPES if each not in NEEDS_CODE | CANNOT and not has_code(each)]) >= ENOUGH


def test_the_survey_in_the_documentation_is_current():
    known = documents.rows("survey")  # also of architectures that only another transformers has
    for model_type in MODEL_TYPES:
        if model_type in NEEDS_CODE:
            cells = [f"needs code: {NEEDS_CODE[model_type]}", *[""] * len(TOLERANCES)]
        elif model_type in CANNOT:
            cells = [f"cannot: {CANNOT[model_type]}", *[""] * len(TOLERANCES)]
        elif zoo.fault(model_type):
            continue
        else:
            found = figures(model_type)
            how = "reads, with a file" if has_code(model_type) else "reads"
            cells = [how, *(documents.figure(found[row]) if row in found else "" for row in TOLERANCES)]
        known[f"`{model_type}`"] = [f"`{model_type}`", *cells]
    rows = [known[name] for name in sorted(known, key=lambda name: name.strip("`"))]
    counts = [len(rows), len([row for row in rows if row[1] == "reads"])]
    text = f"Of {counts[0]} architectures {counts[1]} read without a line of code.\n\n"
    documents.check("survey", text + documents.table(["architecture", "", *TOLERANCES], rows))
