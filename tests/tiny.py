"""Tiny random models of any image-text-to-text architecture that transformers knows, from its default configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vlm_spectra_server.hooked.inputs import HookedInputs

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""What the installed transformers has."""

LARGEST = {
    4: (
        "num_hidden_layers num_layers n_layer n_layers num_attention_heads num_heads attention_heads n_head "
        "encoder_attention_heads decoder_attention_heads num_experts n_routed_experts num_local_experts "
        "moe_num_experts num_query_tokens num_experts_per_layer resampler_n_heads"
    ),
    2: (
        "num_key_value_heads num_global_key_value_heads depth encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers num_experts_per_tok moe_k moe_topk n_shared_experts "
        "moe_num_shared_experts audio_num_hidden_layers swa_num_key_value_heads n_group num_expert_group"
    ),
    1: "topk_group",
    16: (
        "head_dim global_head_dim swa_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim "
        "linear_value_head_dim resampler_head_dim attention_head_dim"
    ),
    8: (
        "qk_rope_head_dim hidden_size_per_layer_input linear_num_key_heads linear_num_value_heads n_groups "
        "mamba_n_groups"
    ),
    32: (
        "base_channels moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size moe_latent_size"
    ),
    64: (
        "hidden_size d_model dim embed_dim n_embd width projection_dim out_hidden_size output_hidden_size "
        "num_latents text_hidden_size"
    ),
    96: (
        "intermediate_size mlp_dim ffn_dim encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp "
        "dense_intermediate_size block_ff_dim ffn_hidden_size"
    ),
    256: "vocab_size vocab_size_per_layer_input num_embeddings image_vocab_size",
    56: "image_size",
    14: "patch_size",
    512: (
        "max_position_embeddings projector_hidden_size projection_hidden_dim projection_intermediate_size "
        "shared_intermediate_size moe_hidden_size codebook_size"
    ),
}
"""The most that a number in a configuration may be, by name."""

TWEAKS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 200}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": None}},
    "deepseek_ocr2": {
        "text_config.num_experts_per_tok": 2,
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "emu3": {"vocabulary_map": {"<image>": 200}, "text_config.vocab_size": 256},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "granite4_vision": {
        "deepstack_layer_map": [(-1, 1), (-2, 2)],
        "downsample_rate": "1/2",
        "text_config.embedding_multiplier": 3.0,
        "text_config.logits_scaling": 2.0,
        "text_config.residual_multiplier": 0.5,
    },
    "hyperclovax_vision_v2": {"text_config.logits_scaling": 2.0, "text_config.residual_multiplier": 0.5},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 201, "audio_start_token_id": 202},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 201, "audio_start_token_id": 202},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 64,
        "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 8},
}
"""What a default configuration leaves open, or shrinking breaks, by path."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The architecture's default configuration, made small."""
    config = shrink(CONFIG_MAPPING[model_type]())
    for path, value in TWEAKS.get(model_type, {}).items():
        owner, *names = config, *path.split(".")
        for name in names[:-1]:
            owner = getattr(owner, name) if not isinstance(owner, dict) else owner[name]
        if isinstance(owner, dict):
            owner[names[-1]] = value
        else:
            setattr(owner, names[-1], value)
    return config


def shrink(config: Any) -> Any:
    """Make a configuration and those inside it small, in place."""
    limits = {name: most for most, names in LARGEST.items() for name in names.split()}
    before = dict(vars(config))
    for name, value in before.items():
        if isinstance(value, PreTrainedConfig):
            shrink(value)
        elif name in limits and isinstance(value, int) and not isinstance(value, bool) and value > limits[name]:
            setattr(config, name, limits[name])
        elif name.endswith("token_id") and isinstance(value, int) and value >= 200:
            setattr(config, name, 200 + value % 50)
    for name, like in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim")):
        if before.get(name) is not None and before.get(name) == before.get(like):
            setattr(config, name, getattr(config, like))
    layers = getattr(config, "num_hidden_layers", None)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = before.get(name)
        if kinds and layers and len(kinds) != layers:  # each kind at least once
            rest = list(kinds)
            first = [rest.pop(rest.index(kind)) for kind in dict.fromkeys(kinds)]
            setattr(config, name, sorted([*first, *rest][:layers], key=list(dict.fromkeys(kinds)).index))
    rope = before.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        # The widths of a rotary embedding for several axes must fit the head; models without them read none.
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        half, parts = int(width * share) // 2, len(rope.get("mrope_section", (0, 0, 0)))
        rope["mrope_section"] = [half - half // parts * (parts - 1), *[half // parts] * (parts - 1)]
    return config


def tiny_model(config: PreTrainedConfig) -> Any:
    """A model with random weights under which attention is not uniform and no norm is the identity."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and weight.numel() > 1 and "A_log" not in name and "dt_bias" not in name:
            weight.add_(torch.randn_like(weight) * 0.1)
        elif weight.dim() == 2:
            weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
        elif weight.dim() == 3:
            weight.normal_(std=max(weight.shape[1:]) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.7, 1.2)
    return model


def text(config: Any, rows: int = 2, length: int = 11) -> HookedInputs:
    """Random tokens, each row but the first padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 150, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row + 1] = 0
    labels = [[str(token) for token in row] for row in ids.tolist()]
    return HookedInputs((), ids, mask, labels, (), [], tensors={"input_ids": ids, "attention_mask": mask})
