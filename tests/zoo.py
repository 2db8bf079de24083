"""The zoo: a tiny checkpoint of every family, made from the family's real classes with random weights.

`build(name)` writes a directory that the Auto classes load by `model_type` alone: the real configuration and model
class a few layers deep, the real processor class with small picture sizes, a byte-level tokenizer with the family's
special tokens, and a chat template in the family's form. `load(name)` opens it as a HookedVLM.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import vlm_spectra as vs
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, processors
from torch import nn
from vlm_spectra_server.spectra_tiny import DIRECTORY

CONTEXT = 2048
"""Longest sequence in tokens."""

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
"""A vision tower with transformers' usual names."""


@dataclass(frozen=True)
class Entry:
    """A family of the zoo.

    Attributes:
        parts: Makes its configuration and its processor.
        two_images: A prompt may have two images.
        batches: Prompts may be padded to a batch.
        tiled: A picture becomes several tiles.
        text_only: A prompt may have no image.
        mixed: A batch may have rows with and without images.
    """

    parts: Callable[[], tuple[Any, Any]]
    two_images: bool = True
    batches: bool = True
    tiled: bool = False
    text_only: bool = True
    mixed: bool = True


MISSING: dict[str, str] = {}
"""Families that cannot be built here, and why."""

FAULTS: dict[str, str] = {"llama4": "'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'"}
"""Families that some release of transformers cannot run by itself, and what it raises: Llama 4 in 5.24.0."""


def build(name: str) -> Path:
    """The directory of a family's checkpoint; written once a process."""
    return _build(name)


@cache
def load(name: str, attention: str | None = None) -> vs.HookedVLM:
    """A family's model in process, on the CPU in float32; the same object for the same arguments.

    Args:
        name: The family.
        attention: The implementation of attention; where None, "sdpa" in a family that has it, else "eager".
    """
    return vs.HookedVLM.from_pretrained(str(build(name)), device="cpu", attn_implementation=attention)


@cache
def fault(name: str) -> str | None:
    """Why the installed transformers cannot run a family; None where it can.

    Found by a pass of transformers' own model with nothing of ours on it. Only the very error of `FAULTS` counts.
    """
    if name not in FAULTS:
        return None
    model = tf.AutoModelForImageTextToText.from_pretrained(build(name))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3]]))
    except AttributeError as error:
        if str(error) != FAULTS[name]:
            raise
        return f"transformers {tf.__version__} by itself cannot run {name}: {error}"
    return None


def require(name: str) -> None:
    """Skip a test that runs a family where transformers by itself cannot."""
    if reason := fault(name):
        pytest.skip(reason)


@cache
def wide() -> Image.Image:
    """A screen wider than tall: title bar, red circle, blue button."""
    image = Image.new("RGB", (150, 90), (40, 70, 120))
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 8, 140, 84), fill=(235, 235, 238))
    draw.rectangle((10, 8, 140, 18), fill=(70, 80, 100))
    draw.ellipse((24, 30, 56, 62), fill=(215, 40, 40))
    draw.rectangle((80, 44, 126, 64), fill=(40, 90, 215))
    draw.text((88, 48), "Login", fill="white")
    return image


@cache
def tall() -> Image.Image:
    """A screen taller than wide: a list under a green header."""
    image = Image.new("RGB", (84, 170), (250, 246, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 84, 22), fill=(30, 140, 70))
    for row in range(5):
        draw.rectangle((8, 32 + 27 * row, 28, 50 + 27 * row), fill=(40 * row + 40, 120, 220 - 40 * row))
        draw.text((36, 35 + 27 * row), f"Item {row}", fill="black")
    return image


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vlm-spectra-zoo-")


@cache
def _build(name: str) -> Path:
    directory = Path(_directory().name) / name
    config, processor = FAMILIES[name].parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _draw_weights(model)
    tokenizer = processor.tokenizer
    model.generation_config = tf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@torch.no_grad()
def _draw_weights(model: nn.Module, sharpness: float = 2.0) -> None:
    """Weights that keep the scale of what passes through; queries and keys larger, so that attention is not uniform."""
    unembedding = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        if weight is unembedding:
            weight.normal_(std=sharpness / weight.shape[1] ** 0.5)
        elif name.endswith("bias"):
            weight.normal_(std=0.1)
        elif any(part in name for part in ("newline", "class_embedding", "latents", "cls_token")):
            weight.normal_()
        elif "A_log" in name or "dt_bias" in name or weight.numel() == 1:
            continue  # a recurrence keeps its own stable start
        elif weight.dim() == 1:
            weight.add_(torch.randn_like(weight) * 0.1)  # norms start at one, or at zero where one is added
        elif "embed_tokens" in name or "wte" in name:
            weight.normal_()
        elif "embed" in name and "patch" not in name:
            weight.normal_(std=0.5)  # positions, tiles
        elif "experts" in name and weight.dim() == 3:
            weight.normal_(std=min(weight.shape[1:]) ** -0.5)
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv", "att_proj", "query", "wq", "wk"))
            weight.normal_(std=(sharpness if sharp else 1.0) / weight[0].numel() ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # of the whole stream, 1 in a new model
            buffer.uniform_(0.7, 1.2)


# Tokenizers and chat templates


@cache
def _learnt() -> tuple[dict[str, int], list[list[str]]]:
    """The entries and merges that were learnt from text, without special tokens."""
    data = json.loads((DIRECTORY / "tokenizer.json").read_text())
    special = {token["content"] for token in data["added_tokens"]}
    vocabulary = {token: index for token, index in data["model"]["vocab"].items() if token not in special}
    return vocabulary, data["model"]["merges"]


def _tokenizer(
    eos: str,
    pad: str,
    special: Sequence[str],
    bos: str | None = None,
    named: dict[str, str] | None = None,
) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE with a family's special tokens behind the learnt entries.

    Args:
        eos: Ends a turn.
        pad: Fills a batch.
        special: The family's other tokens.
        bos: Begins every text, where the family's tokenizer puts one there.
        named: Tokens that the tokenizer has as attributes, as in `image_token`.
    """
    vocabulary, merges = _learnt()
    data = json.loads((DIRECTORY / "tokenizer.json").read_text())
    tokens = dict.fromkeys([pad, eos, *([bos] if bos else []), *special, *(named or {}).values()])
    ids = {token: len(vocabulary) + index for index, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": index, "content": token, **flags} for token, index in ids.items()]
    data["model"] = {**data["model"], "vocab": {**vocabulary, **ids}, "merges": merges}
    backend = Tokenizer.from_str(json.dumps(data))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
        )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=pad,
        padding_side="left",
        model_max_length=CONTEXT,
        extra_special_tokens=named or {},
        clean_up_tokenization_spaces=False,
    )


def _template(
    image: str, start: str, end: str, answer: str, *, bos: str = "", roles: dict[str, str] | None = None
) -> str:
    """A chat template.

    Args:
        image: What stands for an image.
        start: The head of a turn; ROLE stands for who speaks.
        end: The end of a turn.
        answer: The head of the answer to come.
        bos: The beginning of the text.
        roles: What the family calls user, assistant and system, where it has names of its own.
    """
    role = "message['role']"
    for ours, theirs in (roles or {}).items():
        role = f"('{theirs}' if message['role'] == '{ours}' else {role})"
    head = start.replace("ROLE", "{{ " + role + " }}")
    return (
        bos + "{% for message in messages %}" + head + "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}"
        + answer
        + "{% endif %}"
    )


def _chatml(image: str, bos: str = "") -> str:
    return _template(image, "<|im_start|>ROLE\n", "<|im_end|>\n", "<|im_start|>assistant\n", bos=bos)


def _text(tokenizer: Any, model_type: str, **fields: Any) -> dict[str, Any]:
    """A language model's configuration with transformers' usual names; heads are wider than hidden / heads."""
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **fields,
    }


# The Qwen families and their kin: a picture keeps its proportions, a token is 2 x 2 patches

QWEN_TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen(
    config_class: Any, processor_class: Any, text: dict[str, Any], vision: dict[str, Any], video_class: Any
) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<|im_end|>", "<|endoftext|>", QWEN_TOKENS)
    special = tokenizer.convert_tokens_to_ids
    shape = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    sizes = {"shortest_edge": 48 * 48, "longest_edge": 112 * 112}
    processor = processor_class(
        image_processor=tf.Qwen2VLImageProcessor(size=sizes, **shape),
        tokenizer=tokenizer,
        video_processor=video_class(size=sizes, **shape),
        chat_template=_chatml(QWEN_IMAGE),
    )
    config = config_class(
        text_config=_text(tokenizer, **text),
        vision_config={"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4, **vision},
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return config, processor


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections), **more}


def _qwen2_vl() -> tuple[Any, Any]:
    text = {"model_type": "qwen2_vl_text", "head_dim": 12, "rope_parameters": _mrope(2, 2, 2)}
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    return _qwen(tf.Qwen2VLConfig, tf.Qwen2VLProcessor, text, vision, tf.Qwen2VLVideoProcessor)


def _qwen2_5_vl() -> tuple[Any, Any]:
    text = {"model_type": "qwen2_5_vl_text", "head_dim": 12, "rope_parameters": _mrope(2, 2, 2)}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 48,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    return _qwen(tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLProcessor, text, vision, tf.Qwen2VLVideoProcessor)


QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 48,
    "num_position_embeddings": 36,
    "hidden_act": "gelu_pytorch_tanh",
}


def _qwen3_vl() -> tuple[Any, Any]:
    text = {"model_type": "qwen3_vl_text", "rope_parameters": _mrope(4, 2, 2, mrope_interleaved=True)}
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    return _qwen(tf.Qwen3VLConfig, tf.Qwen3VLProcessor, text, vision, tf.Qwen3VLVideoProcessor)


def _qwen3_vl_moe() -> tuple[Any, Any]:
    text = {
        "model_type": "qwen3_vl_moe_text",
        "rope_parameters": _mrope(4, 2, 2, mrope_interleaved=True),
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    }
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    return _qwen(tf.Qwen3VLMoeConfig, tf.Qwen3VLProcessor, text, vision, tf.Qwen3VLVideoProcessor)


def _qwen3_5() -> tuple[Any, Any]:
    text = {
        "model_type": "qwen3_5_text",
        "rope_parameters": _mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5),
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    return _qwen(tf.Qwen3_5Config, tf.Qwen3VLProcessor, text, QWEN3_VISION, tf.Qwen3VLVideoProcessor)


def _glm4v() -> tuple[Any, Any]:
    marks = ["image", "video"]
    tokenizer = _tokenizer(
        "<|user|>",
        "<|endoftext|>",
        [
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|assistant|>",
            "<|image|>",
            "<|video|>",
            *(f"<|{edge}_of_{mark}|>" for mark in marks for edge in ("begin", "end")),
        ],
    )
    special = tokenizer.convert_tokens_to_ids
    shape = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    sizes = {"shortest_edge": 48 * 48, "longest_edge": 112 * 112 * 2}
    processor = tf.Glm4vProcessor(
        image_processor=tf.Glm4vImageProcessor(size=sizes, **shape),
        tokenizer=tokenizer,
        video_processor=tf.Glm4vVideoProcessor(size=sizes, **shape),
        chat_template=_template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|ROLE|>\n", "", "<|assistant|>\n", bos="[gMASK]<sop>"
        ),
    )
    config = tf.Glm4vConfig(
        text_config=_text(tokenizer, "glm4v_text", head_dim=12, rope_parameters=_mrope(2, 2, 2)),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "num_heads": 4,
            "patch_size": 8,
            "image_size": 48,
            "spatial_merge_size": 2,
        },
        image_token_id=special("<|image|>"),
        video_token_id=special("<|video|>"),
        **{
            f"{m}_{e}_token_id": special(f"<|{w}_of_{m}|>")
            for m in marks
            for e, w in (("start", "begin"), ("end", "end"))
        },
    )
    return config, processor


# The LLaVA families: one square crop, or crops of a grid and an overview


LLAVA_TEMPLATE = _template("<image>\n", "ROLE: ", " ", "ASSISTANT:", roles={"user": "USER", "system": "SYSTEM"})


def _clip_processor() -> Any:
    return tf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", "<pad>", ["<image>"], bos="<s>")
    processor = tf.LlavaProcessor(
        image_processor=_clip_processor(),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = tf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 48, "patch_size": 8},
        text_config=_text(tokenizer, "llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
    )
    return config, processor


def _vipllava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", "<pad>", ["<image>"], bos="<s>")
    processor = tf.LlavaProcessor(
        image_processor=_clip_processor(),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>\n", "###ROLE: ", "", "###Assistant:", roles={"user": "Human"}),
    )
    config = tf.VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 48, "patch_size": 8},
        text_config=_text(tokenizer, "llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, -3],
        image_seq_length=36,
    )
    return config, processor


PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]


def _llava_next() -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", "<pad>", ["<image>"], bos="<s>")
    processor = tf.LlavaNextProcessor(
        image_processor=tf.LlavaNextImageProcessor(
            size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>\n", "[INST] ", " [/INST]", "", roles={}),
    )
    config = tf.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 48, "patch_size": 8},
        text_config=_text(tokenizer, "mistral"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=36,
    )
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<|im_end|>", "<|endoftext|>", ["<|im_start|>", "<image>", "<video>"])
    size = {"height": 48, "width": 48}
    processor = tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=tf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=_chatml("<image>\n"),
    )
    config = tf.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 48,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config=_text(tokenizer, "qwen2", head_dim=12),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    return config, processor


# The Idefics families: crops of a grid and an overview, or one picture through a resampler

IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<video>",
    "<end_of_utterance>",
    "<|im_start|>",
)
IDEFICS_TEMPLATE = _template(
    "<image>", "ROLE: ", "<end_of_utterance>\n", "Assistant:", bos="<|im_start|>", roles={"user": "User"}
)


def _idefics2() -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", "<unk>", ["<fake_token_around_image>", "<image>", "<end_of_utterance>"], bos="<s>")
    processor = tf.Idefics2Processor(
        image_processor=tf.Idefics2ImageProcessor(
            size={"shortest_edge": 48, "longest_edge": 96}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=8,
        chat_template=_template(
            "<image>", "ROLE:", "<end_of_utterance>\n", "Assistant:", roles={"user": "User", "system": "System"}
        ),
    )
    config = tf.Idefics2Config(
        vision_config={**VISION, "image_size": 96, "patch_size": 8},
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "num_key_value_heads": 2,
        },
        text_config=_text(tokenizer, "mistral"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


def _idefics(config_class: Any, processor_class: Any, image_class: Any, video_class: Any = None) -> tuple[Any, Any]:
    rows = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    tokenizer = _tokenizer("<end_of_utterance>", "<|im_end|>", [*IDEFICS_TOKENS, *rows])
    sizes = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    video = {} if video_class is None else {"video_processor": video_class(size={"longest_edge": 32})}
    processor = processor_class(
        image_processor=image_class(**sizes),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
        **video,
    )
    config = config_class(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config=_text(tokenizer, "llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return config, processor


def _idefics3() -> tuple[Any, Any]:
    return _idefics(tf.Idefics3Config, tf.Idefics3Processor, tf.Idefics3ImageProcessor)


def _smolvlm() -> tuple[Any, Any]:
    return _idefics(tf.SmolVLMConfig, tf.SmolVLMProcessor, tf.SmolVLMImageProcessor, tf.SmolVLMVideoProcessor)


# Google's: one square picture, stretched


def _gemma3() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        "<end_of_turn>",
        "<pad>",
        ["<start_of_turn>"],
        bos="<bos>",
        named={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    )
    processor = tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": 64, "width": 64}, do_pan_and_scan=False),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=_template(
            "<start_of_image>",
            "<start_of_turn>ROLE\n",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
            bos="{{ bos_token }}",
        ),
    )
    config = tf.Gemma3Config(
        text_config=_text(
            tokenizer,
            "gemma3_text",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=16,
        ),
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 64,
            "patch_size": 8,
            "vision_use_head": False,
        },
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    return config, processor


def _paligemma() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<eos>", "<pad>", ["<image>"], bos="<bos>", named={"image_token": "<image>"})
    image_processor = tf.SiglipImageProcessor(size={"height": 48, "width": 48})
    image_processor.image_seq_length = 36
    processor = tf.PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    config = tf.PaliGemmaConfig(
        text_config=_text(
            tokenizer,
            "gemma2",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=16,
        ),
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 48,
            "patch_size": 8,
            "vision_use_head": False,
            "projection_dim": 48,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=48,
        hidden_size=48,
    )
    return config, processor


# Others


def _internvl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        "<|im_end|>",
        "<|endoftext|>",
        ["<|im_start|>"],
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    processor = tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(
            size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6
        ),
        tokenizer=tokenizer,
        video_processor=tf.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=_chatml("<IMG_CONTEXT>\n"),
    )
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=_text(tokenizer, "qwen2", head_dim=12),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return config, processor


def _mistral3() -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", "<pad>", ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos="<s>")
    processor = tf.PixtralProcessor(
        image_processor=tf.PixtralImageProcessor(size={"longest_edge": 96}, patch_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=_template("[IMG]", "[INST]", "[/INST]", "", bos="{{ bos_token }}"),
    )
    config = tf.Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION, "image_size": 96, "patch_size": 8},
        text_config=_text(tokenizer, "mistral"),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return config, processor


def _aya_vision() -> tuple[Any, Any]:
    names = ["START", "END"]
    tokenizer = _tokenizer(
        "<|END_OF_TURN_TOKEN|>",
        "<PAD>",
        [
            "<image>",
            "<|IMG_PATCH|>",
            "<|IMG_LINE_BREAK|>",
            *(f"<|{name}_OF_IMG|>" for name in names),
            "<|START_OF_TURN_TOKEN|>",
            "TILE_GLOBAL",
            *(f"TILE_{index}" for index in range(1, 7)),
        ],
        bos="<BOS_TOKEN>",
    )
    processor = tf.AyaVisionProcessor(
        image_processor=tf.GotOcr2ImageProcessor(
            size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6
        ),
        tokenizer=tokenizer,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=_template(
            "<image>",
            "<|START_OF_TURN_TOKEN|>ROLE: ",
            "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|>chatbot: ",
            bos="{{ bos_token }}",
        ),
    )
    config = tf.AyaVisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config=_text(tokenizer, "cohere2", sliding_window=24, logit_scale=0.5),
        downsample_factor=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return config, processor


OVIS_MARKS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def _ovis2() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<|im_end|>", "<|endoftext|>", ["<|im_start|>", "<image>", "<IMG_ATOM>", *OVIS_MARKS])
    special = tokenizer.convert_tokens_to_ids
    processor = tf.Ovis2Processor(
        image_processor=tf.Ovis2ImageProcessor(
            size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_chatml("<image>\n"),
    )
    config = tf.Ovis2Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 8, "vocab_size": 64, "hidden_stride": 2},
        text_config=_text(tokenizer, "qwen2", head_dim=12),
        image_token_id=special("<IMG_ATOM>"),
        visual_indicator_token_ids=[special(mark) for mark in OVIS_MARKS],
        vocab_size=len(tokenizer),
        hidden_size=48,
        tie_word_embeddings=False,
    )
    return config, processor


def _molmo2() -> tuple[Any, Any]:
    marks = ["im_start", "im_end", "im_patch", "im_col", "low_res_im_start", "frame_start", "frame_end", "im_low"]
    tokenizer = _tokenizer(
        "<|im_end|>", "<|endoftext|>", ["<|im_start|>", "<|image|>", "<|video|>", *(f"<{mark}>" for mark in marks)]
    )
    special = tokenizer.convert_tokens_to_ids
    shape = {"size": {"height": 48, "width": 48}, "patch_size": 8, "pooling_size": [2, 2]}
    processor = tf.Molmo2Processor(
        image_processor=tf.Molmo2ImageProcessor(max_crops=4, overlap_margins=[1, 1], **shape),
        video_processor=tf.Molmo2VideoProcessor(**shape),
        tokenizer=tokenizer,
        chat_template=_chatml("<|image|>", bos="<|im_end|>"),
    )
    wide = {"num_key_value_heads": 4, "head_dim": 8, "hidden_size": 32, "num_attention_heads": 4}
    config = tf.Molmo2Config(
        vision_config={**VISION, **wide, "image_size": [48, 48], "patch_size": 8, "num_position_embeddings": 36},
        adapter_config={**wide, "intermediate_size": 64, "text_hidden_size": 48, "vision_feature_layer": [-1, -2]},
        text_config=_text(tokenizer, "molmo2_text", additional_vocab_size=8),
        image_start_token_id=special("<im_start>"),
        low_res_image_start_token_id=special("<low_res_im_start>"),
        image_end_token_id=special("<im_end>"),
        image_patch_id=special("<im_patch>"),
        frame_start_token_id=special("<frame_start>"),
        frame_end_token_id=special("<frame_end>"),
    )
    return config, processor


def _llama4() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        "<|eot|>",
        "<|finetune_right_pad|>",
        [
            "<|header_start|>",
            "<|header_end|>",
            "<|image|>",
            "<|patch|>",
            *(f"<|{name}|>" for name in ("image_start", "image_end", "tile_x_separator", "tile_y_separator")),
        ],
        bos="<|begin_of_text|>",
    )
    processor = tf.Llama4Processor(
        image_processor=tf.Llama4ImageProcessor(size={"height": 32, "width": 32}, max_patches=4),
        tokenizer=tokenizer,
        patch_size=8,
        pixel_shuffle_ratio=0.5,
        chat_template=_template(
            "<|image|>",
            "<|header_start|>ROLE<|header_end|>\n\n",
            "<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
            bos="{{ bos_token }}",
        ),
    )
    config = tf.Llama4Config(
        vision_config={
            **VISION,
            "intermediate_size": 128,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 48,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
        },
        text_config=_text(
            tokenizer,
            "llama4_text",
            intermediate_size=32,
            intermediate_size_mlp=96,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=2,
            attention_chunk_size=64,
        ),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )
    return config, processor


def _gemma4() -> tuple[Any, Any]:
    names = {f"{edge}{kind}_token": f"<|{edge}{kind}>" for edge in ("bo", "eo") for kind in ("i", "a")}
    tokenizer = _tokenizer(
        "<turn|>",
        "<pad>",
        ["<|turn>", "<|video|>"],
        bos="<bos>",
        named={"image_token": "<|image|>", "audio_token": "<|audio|>", **names},
    )
    special = tokenizer.convert_tokens_to_ids
    shape = {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = tf.Gemma4Processor(
        feature_extractor=tf.Gemma4AudioFeatureExtractor(),
        image_processor=tf.Gemma4ImageProcessor(**shape),
        tokenizer=tokenizer,
        video_processor=tf.Gemma4VideoProcessor(**shape),
        image_seq_length=70,
        chat_template=_template("<|image|>", "<|turn>ROLE\n", "<turn|>\n", "<|turn>model\n", bos="{{ bos_token }}"),
    )
    config = tf.Gemma4Config(
        text_config=_text(
            tokenizer,
            "gemma4_text",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            global_head_dim=16,
            vocab_size_per_layer_input=len(tokenizer),
            hidden_size_per_layer_input=8,
            final_logit_softcapping=30.0,
        ),
        vision_config={
            **VISION,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 256,
        },
        image_token_id=special("<|image|>"),
        video_token_id=special("<|video|>"),
        audio_token_id=special("<|audio|>"),
        boi_token_id=special(names["boi_token"]),
        eoi_token_id=special(names["eoi_token"]),
        boa_token_id=special(names["boa_token"]),
        eoa_token_index=special(names["eoa_token"]),
    )
    return config, processor


def _mllama() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|image|>"],
        bos="<|begin_of_text|>",
    )
    processor = tf.MllamaProcessor(
        image_processor=tf.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=4),
        tokenizer=tokenizer,
        chat_template=_template(
            "<|image|>",
            "<|start_header_id|>ROLE<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            bos="{{ bos_token }}",
        ),
    )
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [1],
        },
        text_config=_text(
            tokenizer,
            "mllama_text_model",
            head_dim=12,
            vocab_size=len(tokenizer),
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return config, processor


def _deepseek_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer("</s>", "<pad>", [], bos="<s>", named={"image_token": "<image_placeholder>"})
    processor = tf.DeepseekVLProcessor(
        image_processor=tf.DeepseekVLImageProcessor(size={"height": 48, "width": 48}, min_size=8),
        tokenizer=tokenizer,
        num_image_tokens=36,
        chat_template=_template(
            "<image_placeholder>", "ROLE: ", "\n\n", "Assistant:", roles={"user": "User", "system": "System"}
        ),
    )
    config = tf.DeepseekVLConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 48,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config=_text(tokenizer, "llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    return config, processor


def _lfm2_vl() -> tuple[Any, Any]:
    rows = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(4) for column in range(4)]
    tokenizer = _tokenizer(
        "<|im_end|>",
        "<|pad|>",
        ["<|im_start|>", *rows],
        bos="<|startoftext|>",
        named={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
    )
    processor = tf.Lfm2VlProcessor(
        image_processor=tf.Lfm2VlImageProcessor(
            encoder_patch_size=8,
            tile_size=48,
            min_tiles=2,
            max_tiles=4,
            min_image_tokens=4,
            max_image_tokens=12,
            max_num_patches=48,
            max_pixels_tolerance=1.5,
        ),
        tokenizer=tokenizer,
        chat_template=_chatml("<image>", bos="{{ bos_token }}"),
    )
    config = tf.Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", **VISION, "patch_size": 8, "num_patches": 36},
        text_config=_text(
            tokenizer,
            "lfm2",
            head_dim=12,
            layer_types=["conv", "full_attention", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=64,
        tie_word_embeddings=False,
    )
    return config, processor


def _kimi_k25() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        "<|im_end|>",
        "[PAD]",
        [
            *(f"<|im_{role}|>" for role in ("user", "assistant", "system", "middle")),
            *(f"<|media_{part}|>" for part in ("begin", "content", "pad", "end")),
            "<|kimi_k25_video_placeholder|>",
        ],
    )
    special = tokenizer.convert_tokens_to_ids
    shape = {"patch_size": 8, "merge_size": 2, "size": {"max_height": 64, "max_width": 64}}
    processor = tf.Kimi_K25Processor(
        image_processor=tf.Kimi_K25ImageProcessor(max_patches=128, **shape),
        tokenizer=tokenizer,
        video_processor=tf.Kimi_K25VideoProcessor(**shape),
        chat_template=_template(
            "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
            "<|im_ROLE|>ROLE<|im_middle|>",
            "<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
    )
    config = tf.Kimi_K25Config(
        vision_config={**VISION, "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config=_text(
            tokenizer,
            "deepseek_v3",
            num_key_value_heads=4,
            head_dim=8,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        projection_hidden_size=32,
        image_token_id=special("<|media_pad|>"),
        video_token_id=special("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=special("<|media_begin|>"),
        vision_end_token_id=special("<|media_end|>"),
        tie_word_embeddings=False,
    )
    return config, processor


FAMILIES: dict[str, Entry] = {
    "qwen2_vl": Entry(_qwen2_vl),
    "qwen2_5_vl": Entry(_qwen2_5_vl),
    "qwen3_vl": Entry(_qwen3_vl),
    "qwen3_vl_moe": Entry(_qwen3_vl_moe),
    "qwen3_5": Entry(_qwen3_5),
    "llava": Entry(_llava),
    "llava_next": Entry(_llava_next, tiled=True),
    "llava_onevision": Entry(_llava_onevision, tiled=True),
    "vipllava": Entry(_vipllava),
    "idefics2": Entry(_idefics2),
    "idefics3": Entry(_idefics3, tiled=True),
    "smolvlm": Entry(_smolvlm, tiled=True),
    "gemma3": Entry(_gemma3),
    "paligemma": Entry(_paligemma, text_only=False, mixed=False),
    "internvl": Entry(_internvl, tiled=True),
    "mistral3": Entry(_mistral3),
    "glm4v": Entry(_glm4v),
    "aya_vision": Entry(_aya_vision, tiled=True),
    "ovis2": Entry(_ovis2, tiled=True),
    "molmo2": Entry(_molmo2, tiled=True),
    "llama4": Entry(_llama4, tiled=True),
    "gemma4": Entry(_gemma4),
    "mllama": Entry(_mllama, mixed=False),
    "deepseek_vl": Entry(_deepseek_vl),
    "lfm2_vl": Entry(_lfm2_vl, tiled=True),
    "kimi_k25": Entry(_kimi_k25),
}
"""Every family by its `model_type`."""
