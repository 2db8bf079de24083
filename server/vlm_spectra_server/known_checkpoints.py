"""Checkpoints that `vlm-spectra download` knows by a short name. Any other is named as on the Hugging Face hub.

Parameters and licences are those of the hub's model pages, written down from memory: the page itself decides.
"""

from __future__ import annotations

from dataclasses import dataclass

EMBEDDED = "spectra-tiny"
"""The model that is part of this package."""


@dataclass(frozen=True)
class KnownCheckpoint:
    """A checkpoint of the hub.

    Attributes:
        repository: Its name on the hub.
        family: Its `config.model_type`.
        parameters: Billions of parameters; in bfloat16 each takes two bytes.
        licence: Under which terms it may be used.
    """

    repository: str
    family: str
    parameters: float
    licence: str

    @property
    def name(self) -> str:
        """The short name."""
        return self.repository.split("/")[1]


KNOWN = (
    KnownCheckpoint("ByteDance-Seed/UI-TARS-1.5-7B", "qwen2_5_vl", 8.29, "Apache-2.0"),
    KnownCheckpoint("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 3.75, "Qwen Research, not for commerce"),
    KnownCheckpoint("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 8.29, "Apache-2.0"),
    KnownCheckpoint("Qwen/Qwen2.5-VL-72B-Instruct", "qwen2_5_vl", 73.4, "Qwen"),
    KnownCheckpoint("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl", 2.21, "Apache-2.0"),
    KnownCheckpoint("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", 8.77, "Apache-2.0"),
    KnownCheckpoint("llava-hf/llava-1.5-7b-hf", "llava", 7.06, "Llama 2"),
    KnownCheckpoint("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", 7.57, "Apache-2.0"),
    KnownCheckpoint("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision", 8.03, "Apache-2.0"),
    KnownCheckpoint("HuggingFaceTB/SmolVLM-256M-Instruct", "idefics3", 0.26, "Apache-2.0"),
    KnownCheckpoint("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm", 2.25, "Apache-2.0"),
    KnownCheckpoint("google/gemma-3-4b-it", "gemma3", 4.3, "Gemma, to be accepted on the hub"),
    KnownCheckpoint("google/paligemma2-3b-pt-224", "paligemma", 3.03, "Gemma, to be accepted on the hub"),
    KnownCheckpoint("OpenGVLab/InternVL3-8B-hf", "internvl", 7.94, "Apache-2.0"),
    KnownCheckpoint("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3", 24.0, "Apache-2.0"),
)
"""The list, the one to begin with first."""
