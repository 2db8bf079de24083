"""`vlm-spectra download`: checkpoints into the Hugging Face cache. Loads neither PyTorch nor a model."""

from __future__ import annotations

import difflib
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from vlm_spectra.errors import InvalidInputError, UnavailableError, UnknownModelError

from .known_checkpoints import KNOWN

IGNORED = ("*.gguf", "*.onnx", "onnx/*", "original/*", "*.h5", "*.msgpack")
"""Files of a repository that transformers does not read."""


def command(options: Any) -> int:
    """Show the list, or fetch what was named; the exit status."""
    if options.list_models:
        print(listing())
        return 0
    wanted = [entry.repository for entry in KNOWN] if options.all_models else [repository(n) for n in options.model]
    if not wanted:
        raise InvalidInputError("name what to download: --model NAME, --all-models, or --list-models to see the list.")
    for name in dict.fromkeys(wanted):
        print(f"{name} -> {fetch(name, options.revision or None)}", flush=True)
    return 0


def listing() -> str:
    """The known checkpoints as lines of text."""
    lines = [f"{'name':<38}{'family':<17}{'parameters':>10}  licence"]
    lines += [f"{each.name:<38}{each.family:<17}{each.parameters:>9.2f}B  {each.licence}" for each in KNOWN]
    return "\n".join(lines)


def repository(name: str) -> str:
    """The hub's name of a checkpoint that was named shortly, or as on the hub.

    Raises:
        UnknownModelError: No such short name; the message names the nearest.
    """
    known = {each.name.lower(): each.repository for each in KNOWN}
    if name.lower() in known:
        return known[name.lower()]
    if "/" in name:
        return name
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.3)
    names = ", ".join(known[each].split("/")[1] for each in near) or "see --list-models"
    raise UnknownModelError(
        f"there is no known checkpoint {name!r}; nearest: {names}. Any other is named as on the hub, owner/name."
    )


def fetch(name: str, revision: str | None = None) -> str:
    """Bring a checkpoint into the cache; files that are there already are not fetched again.

    Args:
        name: The hub's name.
        revision: A branch, tag or commit; the newest where None.

    Returns:
        Its directory.

    Raises:
        UnknownModelError: The hub has no such checkpoint or revision, or does not show it.
        UnavailableError: The hub cannot be reached.
    """
    try:
        return str(snapshot_download(name, revision=revision, ignore_patterns=list(IGNORED)))
    except GatedRepoError as error:
        raise UnknownModelError(
            f"{name} is given out to those who accepted its licence: do so on {constants.ENDPOINT}/{name}, then log in "
            "with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UnknownModelError(f"{name} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise UnknownModelError(
            f"{constants.ENDPOINT} has no model {name!r}, or shows it only after a login."
        ) from error
    except HFValidationError as error:
        raise InvalidInputError(f"{name!r} is no name of the hub: owner/name.", field="model") from error
    except OfflineModeIsEnabled as error:
        raise UnavailableError(f"{name} cannot be fetched while HF_HUB_OFFLINE is set.") from error
    except LocalEntryNotFoundError as error:
        why = " while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise UnavailableError(
            f"the Hugging Face hub ({constants.ENDPOINT}) cannot be reached{why}, and {name} is not in the cache."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UnavailableError(f"{name} could not be fetched: {str(error).splitlines()[0]}") from error
