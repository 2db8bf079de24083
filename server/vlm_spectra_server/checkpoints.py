"""From a model's name to a loaded model: the embedded one, a directory, or a checkpoint of the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from vlm_spectra.errors import InvalidInputError

from . import spectra_tiny
from .known_checkpoints import EMBEDDED
from .model_names import check_name, unknown
from .sentences import reason

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread a model over several GPUs, accelerate's."""


@dataclass(frozen=True)
class Placement:
    """Where and how to load a model.

    Attributes:
        dtype: The weights' type by name; the checkpoint's own where None.
        device: "cpu", "cuda", "cuda:1"; one of `SPREAD` over all GPUs, or a mapping of module names to devices, as
            accelerate has them; the first GPU, else the CPU, where None.
        attention: The attention implementation; transformers' choice where None.
        revision: A revision of the hub; the newest where None.
    """

    dtype: str | None = None
    device: str | Mapping[str, Any] | None = None
    attention: str | None = None
    revision: str | None = None


def load(name: str, placement: Placement, before_weights: Callable[[], None] = lambda: None) -> tuple[Any, Any, str]:
    """Load a model and its processor.

    Args:
        name: `spectra-tiny`, a directory, or a name on the Hugging Face hub.
        placement: Where and how.
        before_weights: Called when everything small has been read, and found sound; what it raises ends the load.

    Returns:
        The model, ready and without gradients, its processor, and the revision of its weights.

    Raises:
        UnknownModelError: There is no such model, or it cannot be reached.
        InvalidInputError: It is no vision-language model, or the placement is not possible here.
    """
    path = str(spectra_tiny.DIRECTORY) if name == EMBEDDED else name
    check_name(name, placement.revision)
    device = placement.device or ("cuda" if torch.cuda.is_available() else "cpu")
    spread = not isinstance(device, str) or device in SPREAD
    if isinstance(device, str) and not spread:
        _check_device(device)
    revision: dict[str, Any] = {} if placement.revision is None else {"revision": placement.revision}
    options: dict[str, Any] = {"dtype": placement.dtype or "auto", **revision}
    if placement.attention is not None:
        options["attn_implementation"] = placement.attention
    with _refused(name):
        config = AutoConfig.from_pretrained(path, **revision)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(f"{config.model_type!r} is no vision-language model that transformers knows")
        processor = AutoProcessor.from_pretrained(path, **revision)
        _try(processor)
    before_weights()
    with _refused(name):
        quantized = getattr(config, "quantization_config", None) is not None
        if spread:
            options["device_map"] = device if isinstance(device, str) else dict(device)
        elif quantized:  # such weights are made where they stay
            options["device_map"] = {"": device}
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
        model.eval().requires_grad_(False)
        if not spread and not quantized:
            model.to(device)
    if spread:
        refuse_offloaded(name, model)
    return model, processor, getattr(config, "_commit_hash", None) or _fingerprint(Path(path))


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Say in a sentence why the block could not load a model."""
    try:
        yield
    except OSError as error:
        raise unknown(name, str(error).splitlines()[0].rstrip(".")) from error
    except Exception as error:  # whatever stands in a damaged file
        raise InvalidInputError(f"the model {name!r} cannot be loaded: {reason(error)}") from error


def refuse_offloaded(name: str, model: torch.nn.Module) -> None:
    """Refuse a model whose weights come to a device for each pass only: hooks could not read them.

    Raises:
        InvalidInputError: It is one; the message says how much of it has no place.
    """
    away = sum(parameter.numel() for parameter in model.parameters() if parameter.device.type == "meta")
    if away:
        total = sum(parameter.numel() for parameter in model.parameters())
        raise InvalidInputError(
            f"the model {name!r} does not fit: {away / 1e9:.2f} of its {total / 1e9:.2f} billion parameters would be "
            "offloaded, and hooks must be able to read all weights; more or larger GPUs, a smaller dtype, a quantized "
            "checkpoint or device='cpu' are possible.",
            field="device",
        )


def _try(processor: Any) -> None:
    """Have a text formatted and made into tokens, so that a damaged template or tokenizer shows at once."""
    text = "Hello"
    if processor.chat_template:
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        try:
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateSyntaxError:
            raise
        except Exception:  # it is sound, and may want an image or a system's message
            pass
    if not processor.tokenizer(text, add_special_tokens=False).input_ids:
        raise ValueError("its tokenizer makes no tokens of a text")


def _check_device(device: str) -> None:
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("tensors have no values there")
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise InvalidInputError(
            f"device {device!r} is not possible here: there is the CPU and {count} GPU{'s' if count != 1 else ''}.",
            field="device",
        ) from error


def _fingerprint(directory: Path) -> str:
    """A revision for a directory: over every file's name, size and first 64 KiB (a weight file's header is there)."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + stream.read(65536))
    return digest.hexdigest()[:12]
