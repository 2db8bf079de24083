"""A worker's devices: what weights will take there, what is held and free, the peak of a request, how they fail."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path

import psutil
import torch
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from vlm_spectra import dtypes

from .. import spectra_tiny
from ..checkpoints import EMBEDDED, SPREAD

Memory = dict[str, tuple[int, int, int]]
"""By device, in bytes: what this process holds of it, what is free, and all of it."""

_STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the types that a `dtype` converts, as safetensors names them."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Devices:
    """The devices of a model.

    Args:
        names: Their names, "cpu" or "cuda:0".
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(set(names))
        self._peak_known = True

    @classmethod
    def planned(cls, device: str) -> Devices:
        """Those that a model will be on, by the device that was asked for."""
        if device in SPREAD:
            return cls([f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"])
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls([_name(found)])

    @classmethod
    def of(cls, model: torch.nn.Module) -> Devices:
        """Those that a loaded model is on."""
        return cls(_name(parameter.device) for parameter in model.parameters())

    def memory(self) -> Memory:
        """What is held and free now."""
        found: Memory = {}
        for name in self.names:
            if name.startswith("cuda"):
                found[name] = (torch.cuda.memory_reserved(name), *torch.cuda.mem_get_info(name))
            else:
                found[name] = (resident(), *_host())
        return found

    def forget_peak(self) -> None:
        """Peaks count from now on."""
        for name in self.names:
            if name.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(name)
                continue
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self._peak_known = False

    def peak(self) -> int:
        """The most that was held since then, in bytes; 0 where unknown."""
        gpus = [name for name in self.names if name.startswith("cuda")]
        if gpus:
            return sum(torch.cuda.max_memory_allocated(name) for name in gpus)
        return _status().get("VmHWM", 0) if self._peak_known else 0


def device_lost(devices: Devices) -> bool:
    """Whether a GPU's context is broken: after a failed assertion in a kernel every call fails, on that GPU alone."""
    try:
        for name in devices.names:
            if name.startswith("cuda"):
                torch.cuda.synchronize(name)
    except RuntimeError:
        return True
    return False


_NO_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
"""What errors say that are no `OutOfMemoryError`: of CUDA itself, of a library of its, of PyTorch on a CPU."""


def out_of_memory(error: Exception) -> bool:
    """Whether a device's memory did not suffice."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(each in said for each in _NO_MEMORY)
    )


def weights(name: str, dtype: str, revision: str) -> int:
    """The bytes of a checkpoint's weights once they are loaded, by the headers of its files; 0 where unknown.

    Args:
        name: The embedded model, a directory, or a name on the hub.
        dtype: The type to load them as; the checkpoint's own where empty.
        revision: A revision of the hub; the newest where empty.
    """
    item = dtypes.to_numpy(dtype).itemsize if dtype else 0
    directory = Path(spectra_tiny.DIRECTORY if name == EMBEDDED else name)
    try:
        if directory.is_dir():
            index = directory / _INDEX
            return _files(directory, index if index.exists() else None, item)
        for file in (_INDEX, _SINGLE):
            if isinstance(path := try_to_load_from_cache(name, file, revision=revision or None), str):
                return _files(Path(path).parent, Path(path) if file == _INDEX else None, item)
        found = get_safetensors_metadata(name, revision=revision or None).parameter_count
        return sum(count * _size(kind, item) for kind, count in found.items())
    except Exception:  # whatever is wrong with it, loading says better
        return 0


def _files(directory: Path, index: Path | None, item: int) -> int:
    if index is None:
        names = {path.name for path in directory.glob("*.safetensors")}
    else:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    total = 0
    for name in names:
        with (directory / name).open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        for tensor in header.values():
            begin, end = tensor["data_offsets"]
            kept = tensor["dtype"] not in _STORED or not item
            total += end - begin if kept else prod(tensor["shape"]) * item
    return total


def _size(kind: str, item: int) -> int:
    """Bytes of an element of a stored type, once loaded."""
    return (item or _STORED[kind]) if kind in _STORED else 8 if kind.endswith("64") else 1


def resident() -> int:
    """Bytes of memory of this process, captures in shared memory left out: those have a bound of their own."""
    found = _status()
    if "VmRSS" in found:
        return found["VmRSS"] - found.get("RssShmem", 0)
    return int(psutil.Process().memory_info().rss)


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _host() -> tuple[int, int]:
    """The host's free memory and all of it, in bytes; a container's, where that has less."""
    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    group = Path("/sys/fs/cgroup")
    try:
        bound = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a bound
        return free, total
    return min(free, max(bound - used + int(kept.get("inactive_file", 0)), 0)), min(total, bound)


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"
