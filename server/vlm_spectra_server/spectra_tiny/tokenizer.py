"""spectra-tiny's tokenizer: a byte-level BPE trained on a page of text, with the special tokens of Qwen2.5-VL.

`python -m vlm_spectra_server.spectra_tiny.tokenizer` trains it again and writes it beside the model. Training takes a
second and always gives the same entries; the trained weights depend on them, so a changed text means a new training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from . import DIRECTORY
from .vocabulary import COLOURS, KINDS, LABELS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's, in its order; they follow the trained entries."""

ENTRIES = 1522
"""Bytes and merges; with the special tokens the vocabulary has 1536."""

QUESTIONS = (
    "Click on the {colour} {kind}. Click the {colour} {kind}. Please click on the {kind}. Press the {kind}.",
    "What color is the {kind}? What colour is the {kind}? Which color does the {kind} have? The {kind} is {colour}.",
    "Is there a {colour} {kind} on the screen? Where is the {colour} {kind}? Find the {kind}. Tap on the {kind}.",
    "How many widgets are there? How many widgets are on the screen? How many {kind}s are there? Count the widgets.",
    "Describe the screen. A screen with a {colour} {kind} and a {colour} {kind}. What is at (1,2)?",
    "Thought: The {colour} {kind}.\nAction: click(start_box='(1,2)')",
    "Thought: The {label} {kind}.\nAction: finished(content='{colour}')",
    "Click on {label}. Click the {label} {kind}. What color is {label}? The {label} {kind} is {colour}. Press {label}.",
    "Action: type(content='{label}')\nAction: scroll(start_box='(1,2)', direction='down')\nAction: wait()",
    "You are a helpful assistant. You are a GUI agent. You are given a task and a screenshot. user assistant system",
)

PROSE = (
    "A language model reads a picture as a row of patches, and every patch becomes a vector. The layers of the model "
    "pass these vectors on, each adding what it has found, until the last one says which token comes next. If we look "
    "at the values between the layers we can often see where an answer comes from: which patch was read, which head "
    "carried it, and at what depth the answer first appeared.",
    "The window has a title bar at the top and a task bar at the bottom. Between them there are buttons, icons, check "
    "boxes and text fields. Some of them are small, others are large; some have a label that tells you what will "
    "happen when you press them. Move the mouse to the left or to the right, up or down, and click once or double "
    "click. Type your name and password into the form, then press Enter to continue.",
    "Yesterday my friend and I walked along the river to the old mill. It was a cold morning, but the sun came out "
    "before noon, and we could hear birds in the trees. She told me about her new work at the hospital, how long the "
    "days are and how much she likes the people there. We had bread, cheese and apples for lunch, and came home late.",
    "What is this? Who are you? When does the train leave? Why is the sky blue? How does it work? Which one should I "
    "choose? Where can I find the file? Could you please show me the image and explain what you see in it? Yes, no, "
    "maybe, I do not know, I am not sure. Thank you very much, this is good enough for today.",
    "One two three four five six seven eight nine ten hundred thousand first second third last. Black white gray brown "
    "gold silver light dark bright small big round flat long short open closed empty full new old same other.",
    "import torch def forward(self, x): return self.layer(x) for i in range(len(items)): print(items[i]) if not found: "
    "raise ValueError('not found') class Model: pass True False None and or not in is lambda with as from while",
)
"""Ordinary English, so that a sentence from outside the world does not fall into single bytes."""


def corpus() -> Iterator[str]:
    """The text that the entries are learnt from: every question's pattern filled in, and the prose."""
    colours = list(COLOURS)
    for (i, kind), (j, label) in product(enumerate(KINDS), enumerate(LABELS)):
        for pattern in QUESTIONS:
            yield pattern.format(kind=kind, label=label, colour=colours[(i + j) % len(colours)])
    yield from PROSE * 3


def train_tokenizer() -> Qwen2Tokenizer:
    """Learn the merges and put Qwen's special tokens behind them."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(corpus(), trainer)
    return with_special_tokens(learner)


def with_special_tokens(learner: Tokenizer) -> Qwen2Tokenizer:
    """Qwen's tokenizer class over the learnt entries; a turn ends with <|im_end|>, padding is <|endoftext|>."""
    model = json.loads(learner.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        model_max_length=2048,
    )


if __name__ == "__main__":
    train_tokenizer().save_pretrained(DIRECTORY)
