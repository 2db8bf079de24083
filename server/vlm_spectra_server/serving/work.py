"""A request at work in a worker: what it is, and how its results reach the front as they are made."""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from vlm_spectra import dtypes
from vlm_spectra.errors import (
    BusyError,
    CancelledError,
    CaptureTooLargeError,
    DeadlineError,
    InternalError,
    OverLimitError,
)
from vlm_spectra.results import Token
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra.v1 import stream_pb2, tensor_pb2

from ..hooked.delivery import Delivery, TensorSpec
from .copying import Pinned, SideCopies
from .limits import Limits, named, over, setting
from .pipe import Pipe, shared_memory

ALIGNMENT = 64
"""Every tensor starts at a multiple of so many bytes in shared memory."""

_PHASES = {
    "forward": stream_pb2.PHASE_FORWARD,
    "generating": stream_pb2.PHASE_GENERATING,
    "analysing": stream_pb2.PHASE_ANALYSING,
}


class Job:
    """One request at work.

    Attributes:
        id: The front's number for it.
        method: The call's name.
        cancelled: Set by the reader's thread when the front says so.
    """

    def __init__(self, message: dict[str, Any], blobs: list[bytes]) -> None:
        self.id: int = message["job"]
        self.method: str = message["method"]
        self.deadline: float | None = message.get("deadline")
        self.request = blobs[0]
        self.request_id: str = message.get("request_id", "")
        self.trace: dict[str, str] = message.get("trace", {})
        self.images = dict(zip(message.get("images", []), blobs[1:], strict=True))
        self.cancelled = threading.Event()
        self.grants: queue.Queue[bool] = queue.Queue()


class Postponed(Exception):  # noqa: N818
    """There is no host memory for a request's captures now.

    Args:
        size: The bytes it needs.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class SharedDelivery(Delivery):
    """Delivers into shared memory that the front reads.

    Args:
        pipe: The way to the front.
        job: The request.
        limits: What one request may take.
        cuda: Whether captures come from a GPU.
    """

    def __init__(self, pipe: Pipe, job: Job, limits: Limits, cuda: bool) -> None:
        super().__init__()
        self.pipe, self.job, self.limits, self.cuda = pipe, job, limits, cuda
        self.copies = SideCopies(self._arrived)
        self.pinned: list[Pinned] = []
        self.slots: dict[str, tuple[int, TensorSpec, torch.Tensor]] = {}
        self.total = 0
        self.told = False
        self.waited = 0.0

    def bound(self, specs: Sequence[TensorSpec]) -> None:
        """Refuse tensors that are over the limit."""
        size = sum(map(_aligned, specs))
        name = "capture_bytes" if self.limits.capture_bytes <= self.limits.host_bytes else "host_bytes"
        limit = getattr(self.limits, name)
        if self.total + size > limit:
            raise CaptureTooLargeError(
                _too_large(specs, self.total + size, limit, setting(name)),
                field="hooks",
                metadata=named(name, limit, self.total + size),
            )

    def announce(self, specs: Sequence[TensorSpec]) -> None:
        """Make room for the tensors and tell the front; refused over the limit, before anything runs."""
        self.bound(specs)
        offsets, size = [], 0
        for spec in specs:
            offsets.append(size)
            size += _aligned(spec)
        cells = sum(spec.shape[0] for spec in specs if spec.name.startswith("values."))
        most = self.limits.sweep_cells
        if self.job.method == "PatchSweep" and cells > most:
            raise over(OverLimitError, "sweep_cells", most, cells, "the number of cells of the sweep is", "hooks")
        if not specs:
            return
        self._reserve(size)
        fd = shared_memory(size)
        try:
            memory = mmap.mmap(fd, max(size, 1))
            if self.cuda:
                self.pinned.append(Pinned(torch.frombuffer(memory, dtype=torch.uint8)))
            header = stream_pb2.Header()
            for spec, offset in zip(specs, offsets, strict=True):
                index = len(self.slots)
                count = spec.nbytes
                view = (
                    torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=offset) if count else torch.empty(0)
                )
                self.slots[spec.name] = (index, spec, view)
                header.tensors.add(
                    index=index,
                    name=spec.name,
                    dtype=dtypes.to_wire(spec.dtype),
                    shape=spec.shape,
                    byte_count=count,
                    compression=tensor_pb2.COMPRESSION_NONE,
                )
            self.total += size
            self.pipe.send(
                {"kind": "tensors", "job": self.job.id, "offsets": offsets, "size": size},
                header.SerializeToString(),
                fd=fd,
            )
        finally:
            os.close(fd)

    def expect(self, size: int) -> None:
        """Set memory aside for tensors to come, before a first token is told: a generation cannot begin twice."""
        self._reserve(min(size, self.limits.capture_bytes, self.limits.host_bytes))

    def _reserve(self, size: int) -> None:
        """Ask the front for so much of the host's memory. At the beginning of a request it can wait without loss."""
        self.pipe.send({"kind": "reserve", "job": self.job.id, "size": size})
        if self.job.grants.get():
            return
        if not self.slots and not self.told:
            raise Postponed(size)
        raise BusyError(
            f"the server's memory for captures is full (host_memory_gb), and {size / 1e6:,.1f} MB more were needed; "
            "try again when other captures have been read.",
            retry_after=5.0,
            metadata=named("host_bytes", self.limits.host_bytes, size),
        )

    def deliver(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor to its place and say that it is there."""
        index, spec, view = self.slots[name]
        if tuple(tensor.shape) != spec.shape:
            raise InternalError(f"{name} has shape {list(tensor.shape)}, but {list(spec.shape)} was announced.")
        if view.numel():
            target = view.view(getattr(torch, spec.dtype)).view(spec.shape)
            if tensor.is_cuda:
                self.copies.put(index, tensor, target)
                return
            begun = time.perf_counter()
            target.copy_(tensor)
            self._wait(begun)
        self._arrived(index)

    def _wait(self, begun: float) -> None:
        """A copy that the computation waited for has ended."""
        seconds = time.perf_counter() - begun
        self.waited += seconds
        self.copies.seconds += seconds

    def _arrived(self, index: int) -> None:
        self.pipe.send({"kind": "tensor", "job": self.job.id, "index": index})

    def finish(self) -> None:
        """Wait for what is still on its way from the device."""
        begun = time.perf_counter()
        try:
            self.copies.finish()
        finally:
            self.waited += time.perf_counter() - begun
            for each in self.pinned:
                each.release()
            self.pinned, self.slots = [], {}  # and with them this process's hold of the shared memory

    def event(self, **event: Any) -> None:
        """Send a response message; its fields have the same numbers in every streaming response of the contract."""
        self.pipe.send({"kind": "event", "job": self.job.id}, spb.RunWithCacheResponse(**event).SerializeToString())

    def token(self, token: Token) -> None:
        """A token was chosen."""
        self.told = True
        self.event(
            token=spb.Token(row=token.row, index=token.index, id=token.id, text=token.text, logprob=token.logprob)
        )

    def progress(self, phase: str, done: int, total: int) -> None:
        """So far the call has come."""
        self.event(progress=stream_pb2.Progress(phase=_PHASES[phase], done=done, total=total))

    def check(self) -> None:
        """Ends the call between layers once the client is gone or its time is over."""
        if self.job.cancelled.is_set():
            raise CancelledError("the client has gone; the run was ended between two layers.")
        if self.job.deadline is not None and time.monotonic() > self.job.deadline:
            raise DeadlineError("the time given was over before the run was; it was ended between two layers.")


def _aligned(spec: TensorSpec) -> int:
    """Bytes that a tensor takes up in shared memory."""
    return -(-spec.nbytes // ALIGNMENT) * ALIGNMENT


def _too_large(specs: Sequence[TensorSpec], size: int, limit: int, name: str) -> str:
    largest = max(specs, key=lambda spec: spec.nbytes)
    same = [spec for spec in specs if spec.name.split(".")[-1] == largest.name.split(".")[-1]]
    fitting = max(limit * len(same) // max(size, 1), 0)
    hint = f"{fitting} of its {len(same)} layers would fit" if fitting else "a few positions of it would fit"
    return (
        f"this would take {size / 1e6:,.7g} MB, and at most {limit / 1e6:,.7g} MB are possible ({name}); the "
        f"largest part is {largest.name} {list(largest.shape)}: {hint}, or positions='last' "
        f"({largest.nbytes // max(largest.shape[-2] if len(largest.shape) > 1 else 1, 1) / 1e6:,.3f} MB a layer)."
    )
