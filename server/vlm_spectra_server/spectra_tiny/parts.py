"""spectra-tiny's architecture and processor, built from parts: a Qwen2.5-VL of a few million parameters.

`build_processor` and `build_config` give what the trained model uses; `write_random` writes a random model of any
other shape, for tests that need one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from . import DIRECTORY

PATCH = 14
"""Pixels along a patch's edge."""

MERGE = 2
"""Patches along the edge of what becomes one image token."""

MAX_PIXELS = 224 * 224
"""A larger picture is reduced to about this area, 64 image tokens."""

MIN_PIXELS = 112 * 112
"""A smaller picture is enlarged to about this area, 16 image tokens."""

CONTEXT = 2048
"""Longest sequence in tokens."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or part['type'] == 'image_url' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}"
    "{{ part['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's turns. A system turn appears only where a system message is given: prompts stay short."""


@cache
def load_tokenizer() -> Qwen2Tokenizer:
    """The shipped tokenizer."""
    return Qwen2Tokenizer.from_pretrained(DIRECTORY)


def build_processor() -> Qwen2_5_VLProcessor:
    """Pictures and text to model inputs, as for any Qwen2.5-VL, with small limits for a picture's size."""
    sizes = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    shape = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=sizes, **shape),
        tokenizer=load_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=sizes, **shape),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None) -> Qwen2_5_VLConfig:
    """The trained model's configuration; `text` and `vision` replace single fields of its two halves.

    Every vision layer attends over the whole picture, and a window is as large as the largest one: hundreds of small
    attention calls would cost more than they save at this size.
    """
    tokenizer = load_tokenizer()
    special = tokenizer.convert_tokens_to_ids
    text_fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "bos_token_id": special("<|endoftext|>"),
        "eos_token_id": special("<|im_end|>"),
        "pad_token_id": special("<|endoftext|>"),
        **(text or {}),
    }
    head_dim = text_fields["hidden_size"] // text_fields["num_attention_heads"]
    text_fields.setdefault(
        "rope_parameters",
        {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": mrope_section(head_dim)},
    )
    vision_fields: dict[str, Any] = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": MAX_PIXELS // 28,
        "out_hidden_size": text_fields["hidden_size"],
        **(vision or {}),
    }
    vision_fields.setdefault("fullatt_block_indexes", list(range(vision_fields["depth"])))
    return Qwen2_5_VLConfig(
        text_config=text_fields,
        vision_config=vision_fields,
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
        tie_word_embeddings=text_fields.get("tie_word_embeddings", False),
    )


def mrope_section(head_dim: int) -> list[int]:
    """How many rotary frequencies go to time, height and width: Qwen's proportions, 1 : 1.5 : 1.5."""
    frequencies = head_dim // 2
    time = frequencies // 4
    height = (frequencies - time) // 2
    return [time, height, frequencies - time - height]


def build_generation_config() -> GenerationConfig:
    """Greedy answers that end at the end of the turn."""
    tokenizer = load_tokenizer()
    special = tokenizer.convert_tokens_to_ids
    return GenerationConfig(
        bos_token_id=special("<|endoftext|>"),
        eos_token_id=[special("<|im_end|>"), special("<|endoftext|>")],
        pad_token_id=special("<|endoftext|>"),
        do_sample=False,
    )


def build_model(
    seed: int = 0, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights in float32, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(build_config(text, vision))
        initialise(model)
    model.generation_config = build_generation_config()
    return model.eval()


@torch.no_grad()
def initialise(model: nn.Module, sharpness: float = 2.0) -> None:
    """Draw every weight so that a random model already has something to look at.

    A matrix keeps the scale of what passes through it (standard deviation 1/sqrt(inputs)); queries, keys and logits
    are larger by `sharpness`, else every attention pattern and every distribution over tokens would be nearly flat.
    """
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.02)
        elif weight.dim() == 1:
            weight.fill_(1.0)
        elif "embed_tokens" in name:
            weight.normal_(std=1.0)
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv", "lm_head"))
            weight.normal_(std=(sharpness if sharp else 1.0) / weight[0].numel() ** 0.5)


def write_random(
    directory: str | Path,
    seed: int = 0,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random model and its processor where `from_pretrained` of the Auto classes finds them."""
    directory = Path(directory)
    build_model(seed, text, vision).save_pretrained(directory)
    save_processor(directory)
    return directory


def save_processor(directory: str | Path) -> None:
    """Write the processor, and once more its image part alone, under the name that older tools look for."""
    processor = build_processor()
    processor.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
