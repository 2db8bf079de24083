"""ActivationCache: the activations of one run, by hook name.

    with model.run_with_cache(["lm.blocks.*.hook_resid_post"]) as cache:
        model.forward(inputs)
    cache["lm.blocks.5.hook_resid_post"]            # [batch, seq, hidden]
    cache["lm.blocks.*.hook_resid_post"]            # a cache of those alone
    cache.stack("lm.blocks.*.hook_resid_post")      # [layers, batch, seq, hidden]

The same class serves a model in process and one behind a server, on PyTorch tensors and on numpy arrays. Behind a
server the cache fills while the model runs: `cache[name]` waits for that tensor alone, `len` and `keys` tell what has
come so far, and leaving the `with` block waits for the rest.
"""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import array_api_compat
import numpy as np

from . import arrays, dtypes
from .arrays import Array
from .calls import CaptureOptions
from .errors import InvalidInputError, UnknownHookError
from .hooks import matches
from .inputs import ImageLayout, Inputs, layout_number, on_grid
from .interventions import CaptureRef
from .positions import Layout


class Source(Protocol):
    """Where a cache's tensors come from: all there at once, or still arriving."""

    @property
    def names(self) -> list[str]:
        """The tensors that are there or will come, in execution order."""
        ...

    def arrived(self, name: str) -> bool:
        """Whether a tensor is complete."""
        ...

    def get(self, name: str) -> Array:
        """A tensor, waiting for it where need be."""
        ...

    def wait(self) -> None:
        """Wait for all tensors."""
        ...

    def cancel(self) -> None:
        """Give up what has not come yet."""
        ...


class InMemory:
    """Tensors that are all there.

    Args:
        tensors: By hook name, in execution order.
    """

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = dict(tensors)

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return list(self._tensors)

    def arrived(self, name: str) -> bool:
        """Always: all there are."""
        return name in self._tensors

    def get(self, name: str) -> Array:
        """A tensor."""
        return self._tensors[name]

    def wait(self) -> None:
        """Nothing to wait for."""

    def cancel(self) -> None:
        """Nothing to give up."""


@dataclass(frozen=True)
class CacheContext:
    """What a cache's arrays are about.

    Attributes:
        token_labels: [batch][seq] labels of all tokens of the run.
        images: The images, with the sequence positions of their tokens.
        positions: [batch][n] the sequence position behind each index of a position axis; None where all were kept.
        heads: The heads kept; None for all.
        capture_id: The server's id of the capture, or "".
        model: The model's name and revision.
    """

    token_labels: list[list[str]] = field(default_factory=list)
    images: tuple[ImageLayout, ...] = ()
    positions: list[list[int]] | None = None
    heads: list[int] | None = None
    capture_id: str = ""
    model: str = ""

    @classmethod
    def of(
        cls, inputs: Inputs, labels: list[list[str]], capture: CaptureOptions, model: str, capture_id: str = ""
    ) -> CacheContext:
        """The context of a run.

        Args:
            inputs: What was asked.
            labels: [batch][seq] labels of the tokens that the run went over.
            capture: What was captured.
            model: The model's name and revision.
            capture_id: The server's id of the capture.
        """
        positions = None
        if capture.positions is not None:
            tokens = np.zeros((len(labels), len(labels[0])), dtype=bool)
            image = np.zeros_like(tokens)
            prompt = arrays.to_numpy(inputs.attention_mask).astype(bool)
            tokens[:, : prompt.shape[1]] = prompt
            tokens[:, prompt.shape[1] :] = [[bool(label) for label in row[prompt.shape[1] :]] for row in labels]
            for layout in inputs.images:
                image[layout.row, list(layout.positions)] = True
            positions = Layout(tokens, image).rectangle(capture.positions).tolist()
        heads = None if capture.heads is None else list(capture.heads)
        return cls(labels, inputs.images, positions, heads, capture_id, model)


class ActivationCache(Mapping[str, Any]):
    """Activations by hook name, in execution order.

    Args:
        source: The tensors; None until something has run.
        context: What they are about.
    """

    def __init__(self, source: Source | Mapping[str, Array] | None = None, context: CacheContext | None = None) -> None:
        self._source: Source | None = None
        self.context = context or CacheContext()
        if source is not None:
            self._fill(InMemory(source) if isinstance(source, Mapping) else source, self.context)

    def _fill(self, source: Source, context: CacheContext) -> None:
        """Take the tensors of a run, in the place of an earlier one's."""
        self._source = source
        self.context = context

    def _wait(self) -> None:
        if self._source is not None:
            self._source.wait()

    def _cancel(self) -> None:
        if self._source is not None:
            self._source.cancel()

    @property
    def names(self) -> list[str]:
        """The hooks of this cache, come or still to come."""
        return list(self._source.names) if self._source is not None else []

    def __getitem__(self, name: str) -> Any:
        """An activation by its full name, or a cache of all that fit a wildcard.

        Raises:
            UnknownHookError: The cache has no such activation; the message says what it has.
        """
        if self._source is None:
            raise UnknownHookError(
                f"the cache is empty: nothing has run in its `with` block yet, so there is no {name!r}."
            )
        if name in self._source.names:
            return self._source.get(name)
        found = self._matching(name)
        return ActivationCache({each: self._source.get(each) for each in found}, self.context)

    def _matching(self, pattern: str) -> list[str]:
        found = [name for name in self.names if matches(pattern, name)]
        if not found:
            kinds = ", ".join(sorted({_kind(name) for name in self.names})) or "nothing"
            raise UnknownHookError(f"nothing in this cache is named {pattern!r}; it holds {kinds}.")
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if self._source is not None and self._source.arrived(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def stack(self, pattern: str) -> Array:
        """The activations that fit a wildcard, on a new first axis: [layers, ...] in execution order.

        Raises:
            UnknownHookError: None fit.
            InvalidInputError: Their shapes differ.
        """
        found = [self[name] for name in self._matching(pattern)]
        if len({tuple(array.shape) for array in found}) > 1:
            raise InvalidInputError(f"the activations named {pattern!r} differ in shape and cannot be stacked.")
        return array_api_compat.array_namespace(found[0]).stack(found)

    def image_positions(self, image: int = 0) -> list[int]:
        """The sequence positions of an image's tokens, in raster order.

        Args:
            image: The number of the image, over all rows of the batch.
        """
        return list(layout_number(self.context.images, image).positions)

    def image_grid(self, vector: Array, image: int = 0) -> Array:
        """A vector over sequence positions, [seq], laid out as the image's token grid, [grid_h, grid_w]."""
        return on_grid(vector, layout_number(self.context.images, image))

    def reference(self, name: str) -> Any:
        """An activation as the value of an intervention: by name where a server still holds it, else the array."""
        if self.context.capture_id and name in self.names:
            return CaptureRef(self.context.capture_id, name)
        return self[name]

    def to_numpy(self) -> ActivationCache:
        """The same cache on numpy arrays; bfloat16 and float8 through `ml_dtypes`."""
        return ActivationCache({name: arrays.to_numpy(self[name]) for name in self.names}, self.context)

    def to_torch(self) -> ActivationCache:
        """The same cache on PyTorch tensors.

        Raises:
            MissingExtraError: PyTorch is not installed.
        """
        return ActivationCache({name: arrays.to_torch(self[name]) for name in self.names}, self.context)

    @property
    def nbytes(self) -> int:
        """Bytes of the activations that are there."""
        return sum(int(np.prod(tuple(a.shape), dtype=np.int64)) * _itemsize(a) for _, a in self.items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, with the context in its metadata. The file appears whole or not at all.

        Raises:
            InvalidInputError: The file cannot be written there.
        """
        from safetensors.numpy import save_file

        path = Path(path)
        tensors = {name: np.ascontiguousarray(arrays.to_numpy(self[name])) for name in self.names}
        metadata = {"vlm_spectra": json.dumps(_context_to_json(self.context)), "order": json.dumps(self.names)}
        if not path.parent.is_dir():
            raise InvalidInputError(f"the cache cannot be saved to {str(path)!r}: there is no such directory.")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        except OSError as error:
            raise InvalidInputError(f"the cache cannot be saved to {str(path)!r}: {error}.") from error
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], arrays_as: str | None = None) -> ActivationCache:
        """Read what `save` wrote.

        Args:
            path: The file.
            arrays_as: "torch" or "numpy"; by default PyTorch where it is installed.

        Raises:
            InvalidInputError: The file is not there, or not one that `save` wrote.
        """
        from safetensors import SafetensorError, safe_open

        kind = arrays.choose(arrays_as)
        try:
            with safe_open(os.fspath(path), framework="pt" if kind == "torch" else "np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in json.loads(metadata["order"])}
                return cls(tensors, _context_from_json(json.loads(metadata["vlm_spectra"])))
        except FileNotFoundError as error:
            raise InvalidInputError(f"there is no file {os.fspath(path)!r}.") from error
        except (KeyError, ValueError, OSError, SafetensorError) as error:
            raise InvalidInputError(f"{os.fspath(path)!r} is not a cache that this library saved: {error}.") from error

    def summary(self) -> list[tuple[str, str, str, int, int]]:
        """What the cache holds, a row a kind of hook: name with `*` for the layer, shape, dtype, tensors, bytes."""
        rows: dict[tuple[str, str, str], list[int]] = {}
        for name, array in self.items():
            key = (_kind(name), "x".join(map(str, array.shape)), dtypes.name_of(array.dtype))
            rows.setdefault(key, []).append(int(np.prod(tuple(array.shape), dtype=np.int64)) * _itemsize(array))
        return [(*key, len(sizes), sum(sizes)) for key, sizes in rows.items()]

    def __repr__(self) -> str:
        lines = [f"ActivationCache: {len(self)} of {len(self.names)} tensors, {_bytes(self.nbytes)}"]
        lines += [f"  {n:3} x {name} [{shape}] {dtype}" for name, shape, dtype, n, _ in self.summary()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{shape.replace('x', ' × ')}</td><td>{dtype}</td>"
            f"<td>{n}</td><td>{_bytes(size)}</td></tr>"
            for name, shape, dtype, n, size in self.summary()
        )
        return (
            f"<b>ActivationCache</b>: {len(self)} of {len(self.names)} tensors, {_bytes(self.nbytes)}"
            f"<table><tr><th>hook</th><th>shape</th><th>dtype</th><th>tensors</th><th>size</th></tr>{rows}</table>"
        )


def _kind(name: str) -> str:
    segments = name.split(".")
    return ".".join("*" if segment.isdigit() else segment for segment in segments)


def _itemsize(array: Array) -> int:
    return dtypes.to_numpy(dtypes.name_of(array.dtype)).itemsize


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _context_to_json(context: CacheContext) -> dict[str, Any]:
    return {
        "token_labels": context.token_labels,
        "images": [vars(image) for image in context.images],
        "positions": context.positions,
        "heads": context.heads,
        "model": context.model,
    }


def _context_from_json(data: dict[str, Any]) -> CacheContext:
    tuples: Callable[[dict[str, Any]], dict[str, Any]] = lambda image: {  # noqa: E731
        key: tuple(value) if isinstance(value, list) else value for key, value in image.items()
    }
    images = tuple(ImageLayout(**tuples(image)) for image in data["images"])
    return CacheContext(data["token_labels"], images, data["positions"], data["heads"], "", data["model"])
