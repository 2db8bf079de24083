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


def empty(shape: tuple[int, ...], dtype: str, kind: str) -> tuple[Array, memoryview]:
    """A new array and its bytes, C order, to be written into.

    Args:
        shape: The extents.
        dtype: The element type by name; bfloat16 and float8 are `ml_dtypes` types in numpy.
        kind: "torch" or "numpy".
    """
    element = dtypes.to_numpy(dtype)
    buffer = np.empty(max(int(np.prod(shape, dtype=np.int64)) * element.itemsize, 0), dtype=np.uint8)
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
