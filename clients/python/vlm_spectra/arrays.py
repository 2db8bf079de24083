"""Numpy arrays and PyTorch tensors, whichever the caller has; PyTorch is never imported unless it is asked for."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import dtypes
from .errors import InvalidInputError, MissingExtraError

Array = Any
"""A numpy array or a PyTorch tensor."""


def choose(kind: str | None) -> str:
    """ "torch" or "numpy"; by default PyTorch where it is installed.

    Raises:
        InvalidInputError: It is neither.
        MissingExtraError: PyTorch was asked for and is not installed.
    """
    installed = importlib.util.find_spec("torch") is not None
    if kind is None:
        return "torch" if installed else "numpy"
    if kind not in ("torch", "numpy"):
        raise InvalidInputError(f"arrays is 'torch' or 'numpy', not {kind!r}.", field="arrays")
    if kind == "torch" and not installed:
        raise MissingExtraError("arrays='torch' needs PyTorch, which is not installed: pip install torch.")
    return kind


def over(memory: memoryview | None, shape: tuple[int, ...], dtype: str, kind: str) -> tuple[Array, memoryview]:
    """An array over some memory, and its bytes in C order.

    Args:
        memory: The bytes; None for new ones, to be written into.
        shape: The extents.
        dtype: The element type by name; bfloat16 and float8 are `ml_dtypes` types in numpy.
        kind: "torch" or "numpy".
    """
    element = dtypes.to_numpy(dtype)
    size = dtypes.size_of(shape, dtype)
    buffer = np.empty(size, dtype=np.uint8) if memory is None else np.frombuffer(memory, dtype=np.uint8)
    view = memoryview(buffer)  # type: ignore[arg-type]
    if kind == "numpy":
        return buffer.view(element).reshape(shape), view
    import torch

    return torch.from_numpy(buffer).view(getattr(torch, dtype)).reshape(shape), view


def is_torch(array: Array) -> bool:
    """Whether this is a PyTorch tensor, without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def to_numpy(array: Array) -> NDArray[Any]:
    """The array as numpy, on the host; bfloat16 and float8 through `ml_dtypes`. Copies only what it must."""
    if not is_torch(array):
        return np.asarray(array)
    import torch

    array = array.detach().cpu()
    name = dtypes.name_of(array.dtype)
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        integers = torch.int16 if name == "bfloat16" else torch.uint8
        return array.contiguous().view(integers).numpy().view(dtypes.to_numpy(name))  # type: ignore[no-any-return]
    return array.numpy()  # type: ignore[no-any-return]


def to_torch(array: Array) -> Array:
    """The array as a PyTorch tensor; shares memory where it can.

    Raises:
        MissingExtraError: PyTorch is not installed.
    """
    if is_torch(array):
        return array
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("to_torch() needs PyTorch, which is not installed: pip install torch.")
    import torch

    array = np.asarray(array)
    name = dtypes.name_of(array.dtype)
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        integers = np.int16 if name == "bfloat16" else np.uint8
        return torch.from_numpy(np.ascontiguousarray(array).view(integers)).view(getattr(torch, name))
    return torch.from_numpy(np.ascontiguousarray(array))


def convert(array: Array, kind: str) -> Array:
    """The array as `kind`, "torch" or "numpy"."""
    return to_torch(array) if kind == "torch" else to_numpy(array)


def index_of(selection: Any, field: str) -> Any:
    """A selection along one axis, in TransformerLens's manner, as an index.

    Args:
        selection: None for all; an int, which takes the axis away; a slice, or a tuple of its arguments; a list or
            array of numbers.
        field: The argument's name, for messages.

    Raises:
        InvalidInputError: It is none of these.
    """
    if selection is None:
        return slice(None)
    if isinstance(selection, tuple):
        return slice(*selection)
    if isinstance(selection, slice):
        return selection
    found = to_numpy(selection)
    if found.dtype.kind in "iu" and found.ndim <= 1:
        return found.tolist()
    raise InvalidInputError(
        f"{field} is an int, a slice, a tuple of a slice's arguments or a list of ints, not {selection!r}.", field=field
    )


def cut(array: Array, index: Any, axis: int) -> Array:
    """The part of an array that an index takes along one axis.

    Raises:
        InvalidInputError: The index is out of range.
    """
    places = [slice(None)] * array.ndim
    places[axis] = index
    try:
        return array[tuple(places)]
    except IndexError:
        raise InvalidInputError(
            f"{index} is out of range: this axis of the cached activations has {array.shape[axis]} entries."
        ) from None


def cast(array: Array, dtype: str) -> Array:
    """The array in another element type, by name."""
    if is_torch(array):
        import torch

        return array.to(getattr(torch, dtype))
    return array.astype(dtypes.to_numpy(dtype))


def wide(array: Array) -> Array:
    """The array in float32, unless it is float64."""
    return array if dtypes.name_of(array.dtype) in ("float32", "float64") else cast(array, "float32")


def on(array: Array, device: Any) -> Array:
    """The array on a device.

    Raises:
        InvalidInputError: There is no such device; a numpy array can be on no other than the CPU.
    """
    if is_torch(array):
        try:
            return array.to(device)
        except (RuntimeError, TypeError) as error:
            why = str(error).splitlines()[0].split(". ")[0]
            raise InvalidInputError(f"the activations cannot go to {device}: {why}.", field="device") from error
    if str(device) != "cpu":
        raise InvalidInputError(
            f"numpy arrays are on the CPU and cannot go to {device}; to_torch() makes tensors, which can.",
            field="device",
        )
    return array


def like(array: Array, other: Array) -> Array:
    """The array as numpy or PyTorch and on the device, whichever another is."""
    return to_torch(array).to(other.device) if is_torch(other) else to_numpy(array)
