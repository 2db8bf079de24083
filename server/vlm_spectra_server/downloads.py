"""`vlm-spectra download`: checkpoints into the Hugging Face cache. Loads neither PyTorch nor a model."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm
from vlm_spectra.errors import InvalidInputError, SpectraError, UnavailableError, UnknownModelError

from .known_checkpoints import KNOWN
from .sentences import printable, reason

IGNORED = ("*.gguf", "*.onnx", "onnx/*", "original/*", "*.h5", "*.msgpack")
"""Files of a repository that transformers does not read."""

_SHA256 = re.compile("[0-9a-f]{64}")


def command(options: Any) -> int:
    """Show the list, or fetch what was named; the exit status."""
    if options.list_models:
        print(listing())
        return 0
    wanted = [entry.repository for entry in KNOWN] if options.all_models else [repository(n) for n in options.model]
    if not wanted:
        raise InvalidInputError("name what to download: --model NAME, --all-models, or --list-models to see the list.")
    status = 0
    with _left_at_once():
        for name in dict.fromkeys(wanted):
            try:
                print(f"{name} -> {fetch(name, options.revision or None)}", flush=True)
            except SpectraError as error:
                print(f"vlm-spectra: {printable(str(error))}", file=sys.stderr)
                status = 1
    return status


@contextlib.contextmanager
def _left_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process: the hub's library would first wait for all that its threads are fetching."""

    def leave(*_: object) -> None:
        with contextlib.suppress(OSError, psutil.Error):
            for file in psutil.Process().open_files():  # a part of one is of no use to the library
                if file.path.endswith(".incomplete"):
                    os.unlink(file.path)
        os.write(2, b"\nvlm-spectra: stopped; whole files are kept, and the same command fetches the others.\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # else it is a shell's job in the background
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
        InvalidInputError: It is no name of the hub.
        UnavailableError: The hub cannot be reached, or does not give what it should.
    """
    try:
        directory = Path(snapshot_download(name, revision=revision, ignore_patterns=list(IGNORED)))
        damaged = _remove_damaged(directory)
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
        said = "cannot be reached" + " while HF_HUB_OFFLINE is set" * constants.HF_HUB_OFFLINE
        if answer := getattr(error.__cause__, "response", None):
            said = f"answers {answer.status_code} {answer.reason_phrase}"
        raise UnavailableError(
            f"the Hugging Face hub ({constants.ENDPOINT}) {said}, and {name} is not whole in the cache."
        ) from error
    except JSONDecodeError as error:
        raise UnavailableError(
            f"what answers at {constants.ENDPOINT} is not the Hugging Face hub, but perhaps a network's sign-in page."
        ) from error
    except Exception as error:  # whatever a connection or a hub does
        raise UnavailableError(f"{name} could not be fetched: {reason(error)}") from error
    if damaged:
        raise UnavailableError(
            f"{name} came with damaged files, which are removed: {', '.join(damaged)}; fetch it again."
        )
    return str(directory)


def _remove_damaged(directory: Path) -> list[str]:
    """Remove the files that are not what their name in the cache says, which is a large file's SHA-256."""
    links = [file for file in sorted(directory.rglob("*")) if file.is_symlink() and file.is_file()]
    links = [link for link in links if _SHA256.fullmatch(_blob(link).name)]
    damaged = []
    for link in tqdm(links, desc="Comparing SHA-256", unit="file", leave=False, disable=None):
        with link.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != _blob(link).name:
                damaged.append(link)
    for link in damaged:
        for path in (link.resolve(), _blob(link), link):
            path.unlink(missing_ok=True)
    return [str(link.relative_to(directory)) for link in damaged]


def _blob(link: Path) -> Path:
    """The file of the cache that a link of a checkpoint's directory means; another may be behind it."""
    return link.parent / link.readlink()
