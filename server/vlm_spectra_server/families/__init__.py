"""What differs between architectures, and only that: one file a family, found by `config.model_type`."""

from __future__ import annotations

from .family import Family
from .hyperclovax import HyperClovaX
from .mllama import Mllama
from .paligemma import PaliGemma
from .qwen import Qwen2VL, Qwen25VL

_FAMILIES: dict[str, type[Family]] = {
    cls.model_type: cls for cls in (Qwen2VL, Qwen25VL, HyperClovaX, Mllama, PaliGemma)
}


def family_of(model_type: str) -> Family:
    """The family of an architecture; one that has no file of its own has the common shape."""
    return _FAMILIES.get(model_type, Family)(model_type)


def register(family: type[Family]) -> type[Family]:
    """Add a family, found by its `model_type` from now on."""
    _FAMILIES[family.model_type] = family
    return family
