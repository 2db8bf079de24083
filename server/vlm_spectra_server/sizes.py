"""`vlm-spectra sizes`: the hooks of a real model and the bytes of their captures, from its configuration alone.

The model is built without weights (PyTorch's meta device), so that a 72B model takes no memory and a few seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from vlm_spectra import dtypes
from vlm_spectra.errors import InvalidInputError, UnknownModelError
from vlm_spectra.hooks import Catalogue

from .hooked.catalogue import build_catalogue, sizes
from .hooked.reading import Reading

_DATA = files(__package__) / "configurations"


@dataclass(frozen=True)
class Configuration:
    """A real model's configuration, written down in the package.

    Attributes:
        name: How it is called here.
        repository: Its name on the hub.
        source: Where the configuration can be read.
        note: How it came here.
        parameters: How many it has.
        dtype: The type of its weights.
        config: The fields of its `config.json` that decide its shape.
    """

    name: str
    repository: str
    source: str
    note: str
    parameters: int
    dtype: str
    config: dict[str, Any]


def configurations() -> dict[str, Configuration]:
    """All that are written down, by name."""
    found = sorted((file for file in _DATA.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    named = {file.name.removesuffix(".json"): json.loads(file.read_text("utf-8")) for file in found}
    return {name: Configuration(name=name, **fields) for name, fields in named.items()}


def configuration(name: str) -> Configuration:
    """One by its name, whatever the case, or by its name on the hub.

    Raises:
        UnknownModelError: It is not written down.
    """
    known = configurations()
    for each in known.values():
        if name.lower() in (each.name.lower(), each.repository.lower()):
            return each
    raise UnknownModelError(f"the sizes of {name!r} are not written down; there are {', '.join(known)}.")


def build(known: Configuration) -> Reading:
    """The model without weights."""
    fields = dict(known.config)
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, known.dtype))
    return Reading(model.eval())


@dataclass(frozen=True)
class Prompt:
    """The size of a prompt, and what is kept of it.

    Attributes:
        tokens: Positions, image tokens included.
        batch: Rows.
        patches: Patches of the picture that the vision tower sees.
        positions: Positions kept; 0 for all.
        heads: Heads kept; 0 for all.
        dtype: The type to cast to; None for the model's own.
    """

    tokens: int = 1000
    batch: int = 1
    patches: int = 1024
    positions: int = 0
    heads: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("batch", 1), ("patches", 1), ("positions", 0), ("heads", 0)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; at least {least} is possible.", field=name)
        if self.positions > self.tokens:
            raise InvalidInputError(
                f"{self.positions} positions cannot be kept of {self.tokens} tokens.", field="positions"
            )


@dataclass(frozen=True)
class Size:
    """What the capture of one hook takes.

    Attributes:
        name: The hook, `*` for the layers.
        count: Layers that have it.
        shape: The extents in one layer.
        dtype: The element type.
        bytes: Of all its layers.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def capture_sizes(reading: Reading, catalogue: Catalogue, prompt: Prompt, hooks: Sequence[str] = ()) -> list[Size]:
    """The shapes and bytes of a capture; hooks of the same name and shape together.

    Args:
        reading: The model.
        catalogue: Its hooks.
        prompt: The prompt, and what is kept of it.
        hooks: Names or wildcards; every hook where empty.
    """
    extents = sizes(reading, prompt.batch, prompt.tokens)
    extents |= {"views": 1, "images": 1, "patches": prompt.patches}
    if reading.vision is not None:
        tower, area = reading.vision, reading.vision.merge_size**2
        extents |= {"vision_hidden": tower.hidden, "vision_heads": tower.heads, "image_tokens": prompt.patches // area}
    found: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name in catalogue.expand(list(hooks) or (lambda name: True), capture=True):
        spec = catalogue.spec(name)
        shape = [extents[axis] if axis in extents else _from_tower(reading, axis) for axis in spec.shape]
        if prompt.positions and spec.position_axis is not None:
            shape[spec.position_axis] = prompt.positions
        if prompt.heads and spec.head_axis is not None:
            shape[spec.head_axis] = min(prompt.heads, shape[spec.head_axis])
        key = spec.name.replace("{layer}", "*"), tuple(shape), prompt.dtype or spec.dtype
        found[key] = found.get(key, 0) + 1
    listed = []
    for (name, shape, dtype), count in found.items():
        total = count * dtypes.to_numpy(dtype).itemsize
        for extent in shape:
            total *= extent
        listed.append(Size(name, count, shape, dtype, total))
    return listed


def _from_tower(reading: Reading, axis: str) -> int:
    """The extent of an axis of the vision tower, `vision_mlp`."""
    return int(getattr(reading.vision, axis.removeprefix("vision_")))


def command(options: Any) -> int:
    """Print the sizes of a capture, or which models are known; the exit status."""
    if not options.model:
        for each in configurations().values():
            print(f"{each.name:<18}{each.parameters / 1e9:>8.2f}B  {each.repository}")
        return 0
    dtype = dtypes.cast_name(options.dtype) if options.dtype else None
    prompt = Prompt(options.tokens, options.batch, options.patches, options.positions, options.heads, dtype)
    known = configuration(options.model)
    reading = build(known)
    catalogue = build_catalogue(reading)
    listed = capture_sizes(reading, catalogue, prompt, options.hooks)
    if options.json:
        rows = [
            {"hook": s.name, "count": s.count, "shape": s.shape, "dtype": s.dtype, "bytes": s.bytes} for s in listed
        ]
        print(
            json.dumps({"model": known.name, "source": known.source, "tokens": prompt.tokens, "hooks": rows}, indent=2)
        )
    else:
        print(f"{known.name}: {known.parameters / 1e9:.2f}B parameters, {known.dtype}; {known.source}\n{known.note}\n")
        print(table(listed))
    return 0


def table(listed: Sequence[Size]) -> str:
    """The sizes as lines of text, with their sum."""
    width = max(len(each.name) for each in listed)
    lines = [f"{'hook':<{width}}  {'count':>5}  {'shape':<24}{'dtype':<10}{'MB':>12}"]
    for each in listed:
        shape = str(list(each.shape))
        lines.append(f"{each.name:<{width}}  {each.count:>5}  {shape:<24}{each.dtype:<10}{each.bytes / 1e6:>12,.1f}")
    total = sum(each.bytes for each in listed)
    lines.append(f"{'in all':<{width}}  {sum(each.count for each in listed):>5}  {'':<34}{total / 1e6:>12,.1f}")
    return "\n".join(lines)
