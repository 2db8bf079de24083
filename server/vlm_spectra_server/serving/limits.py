"""How much one server takes: the limits, and the refusals that name them."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from google.protobuf.message import Message
from PIL import Image
from vlm_spectra.errors import InvalidImageError, OverLimitError, SpectraError
from vlm_spectra.images import FORMATS, MAX_PIXELS

MOST = 10**9
"""The most of any setting: more is a slip of the hand, and some would be too large for the system's own numbers."""
MOST_MESSAGE_MB = 1000
"""Of `max_message_mb`: gRPC takes in no message of 2 GB or more, and twice the setting has to be below that."""


@dataclass(frozen=True)
class Limit:
    """A limit as a setting.

    Attributes:
        setting: The setting's name, which has its unit at its end.
        default: The default, in that unit.
        unit: Bytes, pixels or seconds in one of it.
        help: What it is.
        least: The least that makes sense.
        most: The most that is possible.
    """

    setting: str
    default: float
    unit: float
    help: str
    least: float = 1
    most: float = MOST


def _limit(setting: str, default: float, help: str, unit: int = 1, least: float = 1, most: float = MOST) -> Any:
    value = default if unit == 1 else int(default * unit)
    return field(default=value, metadata={"limit": Limit(setting, default, unit, help, least, most)})


@dataclass(frozen=True)
class Limits:
    """What one server takes at most. The attributes are in bytes, pixels, seconds or a number of things.

    Attributes:
        capture_bytes: Tensors of one request.
        host_bytes: Tensors of all requests, running, being read or kept; one client may hold half of it.
        kept_bytes: Finished captures in all.
        kept_seconds: How long each stays.
        one_image_bytes: One image file.
        images: Images of one request; one that is named twice counts twice.
        images_pixels: All of them.
        image_pixels: One image.
        image_bytes: Images kept in all.
        message_bytes: One request message.
        characters: Texts of one request, all together.
        items: Entries of all lists in one request.
        prompt_tokens: Tokens of one prompt, those of its images included; the model's context where 0.
        new_tokens: Tokens of one answer.
        batch: Prompts of one request.
        sweep_cells: Forward passes of one patch sweep.
        client_requests: Calls of one client at a time.
        waiting: Requests that wait for one model.
        models: Models at a time; the least recently used one that is idle leaves for another.
        models_bytes: Memory of all models together, on whatever devices; what these have where 0.
        connections: Calls at a time, over all clients.
        stall_seconds: How long a client may keep a call waiting for it.
    """

    capture_bytes: int = _limit("max_capture_gb", 4.0, "tensors of one request, GB", 10**9, 0.001)
    host_bytes: int = _limit("host_memory_gb", 8.0, "captures of all requests, running or kept, GB", 10**9, 0.001)
    kept_bytes: int = _limit("kept_captures_gb", 2.0, "finished captures that stay readable, GB", 10**9, 0)
    kept_seconds: int = _limit("kept_seconds", 600, "how long each of them stays", 1, 0)
    one_image_bytes: int = _limit("max_image_mb", 64.0, "one image file, MB", 10**6, 0.001)
    image_pixels: int = _limit(
        "max_image_megapixels", 64.0, "one image, millions of pixels; 64 at most", 10**6, 0.001, MAX_PIXELS / 10**6
    )
    images: int = _limit("max_images", 256, "images of one request")
    images_pixels: int = _limit(
        "max_images_megapixels", 256.0, "all images of one request, millions of pixels", 10**6, 0.001
    )
    image_bytes: int = _limit("kept_images_mb", 512.0, "image files that stay on the server, MB", 10**6, 0.001)
    message_bytes: int = _limit(
        "max_message_mb", 256.0, "one request message, MB; 1,000 at most", 10**6, 0.01, MOST_MESSAGE_MB
    )
    characters: int = _limit("max_characters", 1_000_000, "characters of all texts of one request")
    items: int = _limit("max_items", 16_384, "hooks, positions, changes, tokens, ...: entries of a request's lists")
    prompt_tokens: int = _limit(
        "max_prompt_tokens", 0, "tokens of one prompt with its images; 0: the model's context", 1, 0
    )
    new_tokens: int = _limit("max_new_tokens", 16384, "tokens of one answer")
    batch: int = _limit("max_batch", 64, "prompts of one request")
    sweep_cells: int = _limit("max_sweep_cells", 65_536, "cells of one patch sweep")
    client_requests: int = _limit("max_client_requests", 64, "calls of one client at a time")
    waiting: int = _limit("max_queue", 64, "requests that wait for one model")
    models: int = _limit("max_models", 4, "models at a time; the least recently used idle one leaves for another")
    models_bytes: int = _limit("max_models_gb", 0.0, "memory of all models, GB; 0: what their devices have", 10**9, 0)
    connections: int = _limit("max_calls", 128, "calls at a time, over all clients")
    stall_seconds: float = _limit(
        "max_stall_seconds", 300.0, "how long a client may leave its request unsent, or its answer unread", 1, 0.1
    )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Limits:
        """The limits among settings."""
        given = {
            each.name: type(each.default)(settings[limit.setting] * limit.unit)
            for each in fields(cls)
            if (limit := each.metadata["limit"]).setting in settings
        }
        return cls(**given)


LIMITS = tuple(each.metadata["limit"] for each in fields(Limits))
_SETTING = {each.name: each.metadata["limit"] for each in fields(Limits)}


def setting(limit: str) -> str:
    """The setting of an attribute of `Limits`."""
    return _SETTING[limit].setting


def named(limit: str, allowed: float, asked: float) -> dict[str, str]:
    """The metadata of a refusal: the setting, its value, what was asked, in the setting's unit."""
    found = _SETTING[limit]
    return {"limit": found.setting, "value": f"{allowed / found.unit:.12g}", "asked": f"{asked / found.unit:.12g}"}


def over(kind: type[SpectraError], limit: str, allowed: float, asked: float, what: str, field: str) -> SpectraError:
    """The refusal of what is over a limit.

    Args:
        kind: The error's class.
        limit: The attribute of `Limits`.
        allowed: Its value.
        asked: What was asked.
        what: Begins the sentence, up to the number: "the answer would have".
        field: The field of the request.
    """
    metadata, name = named(limit, allowed, asked), setting(limit)
    unit = {"mb": " MB", "gb": " GB", "megapixels": " million pixels"}.get(name.rsplit("_", 1)[-1], "")
    return kind(
        f"{what} {metadata['asked']}{unit}; this server takes at most {metadata['value']}{unit} ({name}).",
        field=field,
        metadata=metadata,
    )


def check_image(limits: Limits, data: bytes) -> int:
    """Refuse an image that is too large, before it is kept or decoded; its pixels, 0 where it cannot be read.

    Raises:
        InvalidImageError: Its file or its picture is over the limit.
    """
    if len(data) > limits.one_image_bytes:
        raise over(
            InvalidImageError, "one_image_bytes", limits.one_image_bytes, len(data), "the image file has", "image"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = image.width * image.height
    except Exception:  # the worker says what is wrong with it
        return 0
    if pixels > limits.image_pixels:
        raise over(InvalidImageError, "image_pixels", limits.image_pixels, pixels, "the image has", "image")
    return pixels


class _Counts:
    """What a request is made of, counted until it is too much: the worker goes through all of it.

    Args:
        limits: How much.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self._counts = limits, Counter[str]()

    def add(self, message: Message) -> None:
        """Count a message.

        Raises:
            OverLimitError: It is too much.
        """
        for what in message.DESCRIPTOR.fields:
            if what.type == what.TYPE_BYTES:  # these have limits of their own, and are copied by each look
                continue
            if what.is_repeated:
                value = getattr(message, what.name)
                named = message.DESCRIPTOR.name == "Prompt" and what.name == "images"
                self._count("images" if named else "items", len(value), what.name)
                if what.type == what.TYPE_STRING:
                    self._count("characters", sum(map(len, value)), what.name)
                elif what.type == what.TYPE_MESSAGE:
                    for each in value:
                        self.add(each)
            elif what.type == what.TYPE_STRING:
                self._count("characters", len(getattr(message, what.name)), what.name)
            elif what.type == what.TYPE_MESSAGE and message.HasField(what.name):
                self.add(getattr(message, what.name))

    def _count(self, limit: str, number: int, where: str) -> None:
        self._counts[limit] += number
        most = getattr(self._limits, limit)
        if self._counts[limit] > most:
            what = {"images": "images", "items": "entries of its lists", "characters": "characters"}[limit]
            raise over(OverLimitError, limit, most, self._counts[limit], f"the number of {what} is", where)


def check_request(limits: Limits, method: str, request: Any) -> None:
    """Refuse a request that asks for too much, as far as the request itself tells.

    Raises:
        OverLimitError: It has too many prompts, images, characters or entries, or wants too many tokens.
    """
    body = request.run if method in ("RunWithCache", "Estimate") else request
    _Counts(limits).add(request)
    for name in ("prompts", "corrupted"):
        rows = len(getattr(body, name, ()))
        if rows > limits.batch:
            raise over(OverLimitError, "batch", limits.batch, rows, "the number of prompts is", name)
    options = body.generate if method == "RunWithCache" else request.options if method == "Generate" else None
    if options is not None and options.max_new_tokens > limits.new_tokens:
        raise over(
            OverLimitError,
            "new_tokens",
            limits.new_tokens,
            options.max_new_tokens,
            "the number of new tokens is",
            "max_new_tokens",
        )
