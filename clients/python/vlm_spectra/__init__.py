"""VLM Spectra: look inside a vision-language model that runs on somebody else's GPU.

model = vlm_spectra.connect("gpu-box:50051")                            # remote: needs no PyTorch here
model = vlm_spectra.HookedVLM.from_pretrained("spectra-tiny")           # in process, the same interface
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import pictures
from .attribution import Attribution
from .cache import ActivationCache
from .calls import Target
from .clicks import Point
from .cost import Cost
from .errors import MissingExtraError, SpectraError
from .estimate import Estimate
from .hooks import HookSpec
from .info import ModelInfo
from .inputs import ImageLayout, Inputs
from .interventions import (
    AddActivation,
    BlockAttention,
    CaptureRef,
    MeanAblation,
    PatchActivation,
    PatchHead,
    ProjectOut,
    ScaleActivation,
    SetAttentionMask,
    ZeroAblation,
)
from .lens import LogitLens
from .network.secure import TLS
from .remote import RemoteVLM, connect
from .results import ForwardOutput, Generation, Token
from .sweep import PatchSweep
from .vlm import VLM

if TYPE_CHECKING:
    from vlm_spectra_server.hooked_vlm import HookedVLM

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "VLM",
    "ActivationCache",
    "AddActivation",
    "Attribution",
    "BlockAttention",
    "CaptureRef",
    "Cost",
    "Estimate",
    "ForwardOutput",
    "Generation",
    "HookSpec",
    "HookedVLM",
    "ImageLayout",
    "Inputs",
    "LogitLens",
    "MeanAblation",
    "ModelInfo",
    "PatchActivation",
    "PatchHead",
    "PatchSweep",
    "Point",
    "ProjectOut",
    "RemoteVLM",
    "ScaleActivation",
    "SetAttentionMask",
    "SpectraError",
    "Target",
    "Token",
    "ZeroAblation",
    "connect",
    "pictures",
]


def __getattr__(name: str) -> Any:
    if name != "HookedVLM":
        raise AttributeError(f"module 'vlm_spectra' has no attribute {name!r}")
    try:
        from vlm_spectra_server.hooked_vlm import HookedVLM
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"HookedVLM runs models in this process and needs {error.name!r}: pip install 'vlm-spectra[server]' "
            "(a model behind a server, vlm_spectra.connect(...), needs nothing more)."
        ) from error
    return HookedVLM
