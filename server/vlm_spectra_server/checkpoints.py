"""From a model's name to a loaded model: the embedded one, a directory, or a checkpoint of the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from vlm_spectra.errors import InvalidInputError, UnknownModelError

from . import spectra_tiny

EMBEDDED = "spectra-tiny"


@dataclass(frozen=True)
class Placement:
    """Where and how to load a model.

    Attributes:
        dtype: The weights' type by name; the checkpoint's own where None.
        device: "cpu", "cuda", "cuda:1", or "auto" to spread over all GPUs; the first GPU, else the CPU, where None.
        attention: The attention implementation; transformers' choice where None.
        revision: A revision of the hub; the newest where None.
    """

    dtype: str | None = None
    device: str | None = None
    attention: str | None = None
    revision: str | None = None


def load(name: str, placement: Placement) -> tuple[Any, Any, str]:
    """Load a model and its processor.

    Args:
        name: `spectra-tiny`, a directory, or a name on the Hugging Face hub.
        placement: Where and how.

    Returns:
        The model, ready and without gradients, its processor, and the revision of its weights.

    Raises:
        UnknownModelError: There is no such model, or it cannot be reached.
        InvalidInputError: It is no vision-language model, or the placement is not possible here.
    """
    path = str(spectra_tiny.DIRECTORY) if name == EMBEDDED else name
    device = placement.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    revision: dict[str, Any] = {} if placement.revision is None else {"revision": placement.revision}
    options: dict[str, Any] = {"dtype": placement.dtype or "auto", **revision}
    if placement.attention is not None:
        options["attn_implementation"] = placement.attention
    if device == "auto":
        options["device_map"] = "auto"
    try:
        config = AutoConfig.from_pretrained(path, **revision)
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
        processor = AutoProcessor.from_pretrained(path, **revision)
    except OSError as error:
        raise UnknownModelError(
            f"the model {name!r} cannot be loaded: it is neither {EMBEDDED!r}, nor a directory with a checkpoint, nor "
            f"reachable on the Hugging Face hub ({str(error).splitlines()[0]})."
        ) from error
    except (ValueError, ImportError) as error:
        raise InvalidInputError(f"the model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    model.eval().requires_grad_(False)
    if device != "auto":
        model.to(device)
    return model, processor, getattr(config, "_commit_hash", None) or _fingerprint(Path(path))


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
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
