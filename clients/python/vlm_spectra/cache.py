"""ActivationCache: the activations of one run, by hook name.

    with model.run_with_cache(["lm.blocks.*.hook_resid_post"]) as cache:
        model.forward(inputs)
    cache["lm.blocks.5.hook_resid_post"]            # [batch, seq, hidden]
    cache["lm.blocks.*.hook_resid_post"]            # a cache of those alone
    cache.stack("lm.blocks.*.hook_resid_post")      # [layers, batch, seq, hidden]
    cache.decompose_resid(return_labels=True)       # what each layer added; as TransformerLens's method

The same class serves a model in process and one behind a server, on PyTorch tensors and on numpy arrays. Behind a
server the cache fills while the model runs: `cache[name]` waits for that tensor alone, `len` and `keys` tell what has
come so far, and leaving the `with` block waits for the rest.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import array_api_compat
import numpy as np

from . import arrays, dtypes, scalars, shorthand
from .arrays import Array
from .context import CacheContext
from .cost import Cost
from .errors import InvalidInputError, UnknownHookError, shown
from .files import whole_file
from .hooks import GRADIENT, matches
from .inputs import layout_number, on_grid
from .interventions import CaptureRef
from .residual import ResidualStream


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
        cost: What the call took on the server.
    """

    def __init__(self, tensors: Mapping[str, Array], cost: Cost | None = None) -> None:
        self._tensors, self.cost = dict(tensors), cost

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


class ActivationCache(ResidualStream):
    """Activations by hook name, in execution order; `vlm_spectra.residual` has the methods on the residual stream.

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

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied deeply: the activations, all of them waited for."""
        whole = None if self._source is None else InMemory({name: self[name] for name in self.names}, self.cost)
        return {"_source": whole, "context": self.context}

    @property
    def cost(self) -> Cost | None:
        """What the call took on the server; None in process, and for a part of a cache. Waits for its end."""
        return getattr(self._source, "cost", None)

    @property
    def names(self) -> list[str]:
        """The hooks of this cache, come or still to come."""
        return list(self._source.names) if self._source is not None else []

    def __getitem__(self, name: str | tuple[Any, ...]) -> Any:
        """An activation by its full name, or a cache of all that fit a wildcard.

        Args:
            name: The name or wildcard; or TransformerLens's short name with the layer, `cache["resid_post", -1]`, and
                where it needs one the part of the layer, `cache["scale", 2, "ln1"]`.

        Raises:
            UnknownHookError: The cache has no such activation; the message says what it has.
        """
        if isinstance(name, tuple):
            info = self.context.info
            name = shorthand.full(name, None if info is None else info.layers)
        if self._source is None:
            raise UnknownHookError(
                "the cache is empty: nothing has run in its `with` block yet (forward and generate fill it), so there "
                f"is no {shown(name)}."
            )
        if name in self._source.names:
            return self._source.get(name)
        found = self._matching(name)
        return ActivationCache({each: self._source.get(each) for each in found}, self.context)

    def _matching(self, pattern: str) -> list[str]:
        if not isinstance(pattern, str):
            raise InvalidInputError(f"a cache is read by the name of a hook or a wildcard, not by {shown(pattern)}.")
        found = [name for name in self.names if matches(pattern, name)]
        if not found:
            kinds = ", ".join(sorted({_kind(name) for name in self.names})) or "nothing"
            raise UnknownHookError(f"nothing in this cache is named {shown(pattern)}; it holds {kinds}.")
        return found

    def _ipython_key_completions_(self) -> list[str]:
        return self.names

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

    def image_grid(self, vector: Array, image: int = 0, tile: int | None = None) -> Array:
        """A vector over sequence positions, [seq], laid out as an image's token grid, [grid_h, grid_w], or a tile's."""
        return on_grid(vector, layout_number(self.context.images, image), tile)

    def image(self, name: str, image: int = 0, view: int | None = None) -> Array:
        """The part of a vision hook that belongs to one image, its patches as they lie in the picture.

        Args:
            name: A hook of the vision tower.
            image: The number of the image, over all rows of the batch.
            view: One of the image's views (tiles); all of them where None.

        Returns:
            [rows, columns, ...], with [views, ...] before where there are several; of scores and patterns
            [heads, rows, columns, rows, columns]. Class tokens and padding are left out. Of `vision.hook_out` the
            image's grid of tokens, [grid_h, grid_w, hidden]. An axis that `reduce` took is missing.

        Raises:
            UnknownHookError: The cache has no such activation.
            InvalidInputError: It is not a vision hook, there is no such image or view, or the views differ in size.
        """
        layout, array = layout_number(self.context.images, image), self[name]
        if not name.startswith("vision."):
            raise InvalidInputError(
                f"{name} is no hook of the vision tower; possible are names that begin with vision."
            )
        xp = array_api_compat.array_namespace(array)
        if name.startswith("vision.hook_out"):
            order = xp.asarray([layout.positions.index(position) for position in layout.raster])
            tokens = xp.take(array[image], order, axis=0)
            return xp.reshape(tokens, (*layout.grid, *tokens.shape[1:]))
        grids = layout.patch_grids
        if view is None and len(set(grids)) > 1:
            sizes = ", ".join(f"{rows} x {columns}" for rows, columns in grids)
            raise InvalidInputError(f"the views of image {image} differ in size ({sizes}); choose one by view=.")
        number = 0 if view is None else scalars.whole(view)
        if number is None or not 0 <= number < len(grids):
            raise InvalidInputError(
                f"image {image} has {len(grids)} views of known shape; there is no {shown(view or 0)}.", field="view"
            )
        first = sum(len(each.patch_grids) for each in self.context.images[:image])
        chosen = range(len(grids)) if view is None else [number]
        square = name.removesuffix(GRADIENT).endswith(("hook_scores", "hook_pattern"))
        axes = _SQUARE[self.context.reduce] if square else (0,)
        parts = [_laid_out(xp, array[first + each], grids[each], axes) for each in chosen]
        return xp.stack(parts) if len(parts) > 1 else parts[0]

    def reference(self, name: str) -> Any:
        """An activation as the value of an intervention: by name where a server still holds it, else the array."""
        if self.context.capture_id and name in self.names:
            return CaptureRef(self.context.capture_id, name)
        return self[name]

    def remove_batch_dim(self) -> ActivationCache:
        """Take the batch axis of one row away, from this cache itself; vision hooks have none.

        Returns:
            This cache.

        Raises:
            InvalidInputError: The batch has several rows.
        """
        if not self.context.has_batch_dim:
            return self
        rows = len(self.context.token_labels)
        if rows != 1:
            raise InvalidInputError(
                f"the batch axis cannot be removed: it has {rows} rows; apply_slice_to_batch_dim takes one of them."
            )
        taken = self.apply_slice_to_batch_dim(0)
        self._source, self.context = taken._source, taken.context
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """A cache of some rows of the batch, with their images.

        Args:
            batch_slice: An int, which takes the batch axis away; a slice, or a tuple of its arguments; a list of ints.

        Raises:
            InvalidInputError: The batch axis is gone already, or a row is out of range.
        """
        index = arrays.index_of(batch_slice, "batch_slice")
        if not self.context.has_batch_dim:
            raise InvalidInputError("this cache has no batch axis any more.", field="batch_slice")
        context = self.context.rows(index)
        tensors = {}
        for name in self.names:
            array = self[name]
            if name.startswith("lm."):
                tensors[name] = arrays.cut(array, index, 0)
            else:
                tensors[name] = arrays.cut(array, self.context.entries(array.shape[0], index), 0)
        return ActivationCache(tensors, context)

    def to(self, device: Any = None, dtype: Any = None) -> ActivationCache:
        """Move this cache itself to a device, or its floating-point activations to another type.

        Args:
            device: "cpu", "cuda", ...; numpy arrays stay on the CPU. A type stands here as well: `cache.to("float16")`.
            dtype: "float32", "bfloat16", `torch.float16`, ...

        Returns:
            This cache.
        """
        if dtype is None and dtypes.is_name(device):
            device, dtype = None, device
        name = None if dtype is None else dtypes.cast_name(dtype)
        tensors = {}
        for hook in self.names:
            array = self[hook] if device is None else arrays.on(self[hook], device)
            tensors[hook] = array if name is None else arrays.cast(array, name)
        self._source, self.context = InMemory(tensors), replace(self.context, capture_id="")
        return self

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
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors = {name: np.ascontiguousarray(arrays.to_numpy(self[name])) for name in self.names}
        metadata = {"vlm_spectra": json.dumps(self.context.to_json()), "order": json.dumps(self.names)}
        with whole_file(path, "cache") as temporary:
            try:
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:
                raise OSError(str(error)) from error

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
            with safe_open(os.fspath(path), framework="np") as whole:  # its header goes with its bytes
                metadata = whole.metadata() or {}
            if "vlm_spectra" not in metadata:
                raise ValueError("it is a safetensors file of something else")
            tensors = {}
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                start = file.tell()
                for name in json.loads(metadata["order"]):
                    stored = header[name]
                    dtype = dtypes.from_safetensors(stored["dtype"])
                    tensors[name], memory = arrays.over(None, tuple(stored["shape"]), dtype, kind)
                    file.seek(start + stored["data_offsets"][0])
                    file.readinto(memory)
            return cls(tensors, CacheContext.from_json(json.loads(metadata["vlm_spectra"])))
        except FileNotFoundError as error:
            raise InvalidInputError(f"there is no file {shown(os.fspath(path))}.", field="path") from error
        except (AttributeError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise InvalidInputError(
                f"{shown(path)} is not a cache that this version of vlm-spectra can read: {error}.", field="path"
            ) from error

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


_SQUARE = {None: (1, 2), "mean_heads": (0, 1), "norm": (1,)}
"""The axes of one view's scores or pattern, [heads, patches, patches], that count patches, by what was reduced."""


def _laid_out(xp: Any, view: Array, grid: tuple[int, int], axes: tuple[int, ...]) -> Array:
    """One view of a vision hook, with its patches as rows and columns on each of the axes that count them."""
    shape: list[int] = []
    for axis, extent in enumerate(view.shape):
        if axis in axes:
            view = arrays.cut(view, slice(grid[0] * grid[1]), axis)
        shape += grid if axis in axes else (extent,)
    return xp.reshape(view, tuple(shape))


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
