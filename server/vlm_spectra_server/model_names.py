"""What is wrong with a model's name, said at once where that can be known: before PyTorch, before any retries."""

from __future__ import annotations

import difflib
import os
import re

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from vlm_spectra.errors import UnknownModelError

from .known_checkpoints import EMBEDDED, KNOWN

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""A model's name on the hub."""
PATIENCE = 5.0
"""Seconds that the hub has to say whether it has a model."""


def check_name(name: str, revision: str | None = None) -> None:
    """Refuse the name of a model that cannot be there.

    Args:
        name: `spectra-tiny`, a directory, or a name on the Hugging Face hub.
        revision: A revision of the hub; the newest where None.

    Raises:
        UnknownModelError: There is no such directory, no such model on the hub, or the hub does not answer and the
            model is not in its cache.
    """
    if name == EMBEDDED or os.path.isdir(name):
        return
    if not HUB_NAME.fullmatch(name):
        near = difflib.get_close_matches(name, [EMBEDDED, *(each.repository for each in KNOWN)], 1, 0.5)
        hint = f"; is it {near[0]}?" if near else ""
        raise unknown(name, f"there is no such directory, and on the hub a name is owner/name{hint}")
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(name, revision=revision, timeout=PATIENCE)
    except RevisionNotFoundError as error:
        raise unknown(name, f"there it has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise unknown(name, "it is not there, or shown only after a login") from error
    except Exception as error:
        raise unknown(name, f"{constants.ENDPOINT} does not answer: {type(error).__name__}") from error


def unknown(name: str, why: str) -> UnknownModelError:
    """The refusal of a name."""
    return UnknownModelError(
        f"the model {name!r} cannot be loaded: it is neither {EMBEDDED!r}, nor a directory with a checkpoint, nor "
        f"reachable on the Hugging Face hub ({why})."
    )
