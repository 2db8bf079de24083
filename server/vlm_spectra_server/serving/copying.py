"""Captures on their way from the device to the host, without the device ever waiting.

On a GPU a capture is copied on the device (the model may write over it), then by a side stream straight into shared
memory, which is page-locked for that; a thread of its own waits for each copy's end and says that the tensor is there.
The main stream goes on with the next layers all the while. On the CPU a copy is a copy.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("vlm_spectra.worker")


class Pinned:
    """Page-locks host memory for the time of a request, so that the device can write to it by itself.

    Args:
        tensor: The memory, uint8.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._address = 0
        if tensor.numel() and torch.cuda.is_available():
            error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
            if int(error) == 0:
                self._address = tensor.data_ptr()
            else:
                log.warning("shared memory could not be page-locked (CUDA error %s); copies wait for the device", error)

    def release(self) -> None:
        """Unlock it."""
        if self._address:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._address = 0


class SideCopies:
    """Copies from GPUs, each on a side stream of its device.

    Args:
        arrived: Called with a tensor's number once it is on the host, from a thread of this object's.

    Attributes:
        seconds: What the copies took, in sum.
    """

    def __init__(self, arrived: Callable[[int], None]) -> None:
        self._arrived = arrived
        self.seconds = 0.0
        self._streams: dict[torch.device, Any] = {}
        self._queue: queue.Queue[tuple[int, Any, Any, torch.Tensor] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def put(self, number: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a tensor of a GPU to the host.

        Args:
            number: What `arrived` is told.
            source: The capture, on its device.
            target: Its place on the host, of the same shape and type.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="side-copies", daemon=True)
            self._thread.start()
        device = source.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        own = source.clone(memory_format=torch.contiguous_format)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            begun = torch.cuda.Event(enable_timing=True)
            begun.record(side)
            target.copy_(own, non_blocking=True)
            done = torch.cuda.Event(enable_timing=True)
            done.record(side)
        own.record_stream(side)
        self._queue.put((number, begun, done, own))

    def _wait(self) -> None:
        while (item := self._queue.get()) is not None:
            number, begun, done, _ = item
            try:
                done.synchronize()
                self.seconds += begun.elapsed_time(done) / 1000
                self._arrived(number)
            except BaseException as error:  # told to the request that waits for it
                self._error = self._error or error

    def finish(self) -> None:
        """Wait for all copies.

        Raises:
            Exception: What went wrong with one of them.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
