"""Element types: their names, as numpy, as PyTorch and on the wire.

A name ("float32", "bfloat16", ...) is the type's identity everywhere in this library.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from .errors import InvalidInputError
from .v1 import tensor_pb2 as pb

_NUMPY: dict[str, np.dtype[Any]] = {
    "bool": np.dtype(np.bool_),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_SAFETENSORS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_WIRE: dict[str, pb.Dtype] = {name: getattr(pb, f"DTYPE_{name.upper()}") for name in _NUMPY}
_NAMES: dict[int, str] = {value: name for name, value in _WIRE.items()}

CASTS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
"""What activations can be cast to."""


def name_of(dtype: Any) -> str:
    """The name of a numpy or PyTorch dtype, or of a name itself."""
    name = str(dtype).removeprefix("torch.")
    if name in _NUMPY:
        return name
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in _NUMPY:
        raise InvalidInputError(f"{dtype!r} is no element type of tensors here; there are {', '.join(_NUMPY)}.")
    return name


def is_name(dtype: Any) -> bool:
    """Whether this means an element type, by name or as numpy's or PyTorch's, and not a device."""
    return str(dtype).removeprefix("torch.") in _NUMPY or (isinstance(dtype, type) and issubclass(dtype, np.generic))


def cast_name(dtype: Any) -> str:
    """The name of a type that activations can be cast to.

    Raises:
        InvalidInputError: It is not one of `CASTS`.
    """
    name = name_of(dtype)
    if name not in CASTS:
        raise InvalidInputError(
            f"activations cannot be cast to {name}; possible are {', '.join(CASTS)}.", field="dtype"
        )
    return name


def to_numpy(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name; bfloat16 and float8 come from `ml_dtypes`."""
    return _NUMPY[name]


def from_safetensors(code: str) -> str:
    """The name of what a safetensors file calls a type.

    Raises:
        KeyError: There is none.
    """
    return _SAFETENSORS[code]


def size_of(shape: tuple[int, ...], name: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * _NUMPY[name].itemsize


def to_wire(name: str) -> pb.Dtype:
    """The enum value of a name."""
    return _WIRE[name]


def from_wire(value: int) -> str:
    """The name of an enum value.

    Raises:
        InvalidInputError: The value is unknown to this version.
    """
    if value not in _NAMES:
        raise InvalidInputError(f"tensor element type {value} is unknown to this version of vlm-spectra.")
    return _NAMES[value]
