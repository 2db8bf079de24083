"""Requests on their way to a model, and whose turn it is."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vlm_spectra.errors import BusyError, ClientBusyError
from vlm_spectra.v1 import tensor_pb2

from .feed import Feed
from .limits import named


@dataclass
class Job:
    """A request on its way: waiting, then running.

    Attributes:
        feed: What the worker says of it.
        tensors: By index: the header, and the memory that will hold the tensor.
        segments: File descriptors of that memory, for reading; open as long as the memory is held.
        readers: How many follow it.
        timer: Ends it after a while, once its last reader has been lost.
        lock: Held while readers come and leave, and the timer with them.
        needs: Bytes of host memory that it waits for.
        deadline: By the host's monotonic clock, which both processes share and nobody sets.
        reserved: Bytes that were set aside for it and are not in use yet.
        started: When its turn came, by `time.perf_counter()`; 0 while it waits, also where it waits again, for memory.
        request_id: The name of the request that it is for.
        trace: Headers of the trace that it is a part of.
        cost: What the worker says it took, in seconds and bytes; empty until it has ended.
    """

    id: int
    client: str
    method: str
    request: bytes
    images: dict[str, bytes]
    deadline: float | None
    request_id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)
    feed: Feed = field(default_factory=Feed)
    tensors: dict[int, tuple[tensor_pb2.TensorHeader, memoryview]] = field(default_factory=dict)
    segments: list[int] = field(default_factory=list)
    readers: int = 0
    needs: int = 0
    reserved: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    cancelled: bool = False
    timer: threading.Timer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    cost: dict[str, float] = field(default_factory=dict)

    def stop_timer(self) -> None:
        """A reader has come back, or it has ended: nothing is to end it. Under its lock."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class FairQueue:
    """Jobs in the order of turns: one of each client after the other's. Bounded.

    Args:
        bound: The most jobs that may wait.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, job: Job) -> None:
        """Add a job.

        Raises:
            BusyError: The queue is full, or the half of it that one client may take.
        """
        if len(self) >= self.bound:
            raise BusyError(
                f"{self.bound} requests are waiting already, and no more are taken (max_queue); try again in a few "
                "seconds.",
                retry_after=2.0,
                metadata=named("waiting", self.bound, len(self) + 1),
            )
        mine, share = len(self._waiting.get(job.client, ())), (self.bound + 1) // 2
        if mine >= share:
            raise ClientBusyError(
                f"{share} requests of this client are waiting already, and one client may take half of the queue "
                "(max_queue); try again in a few seconds.",
                retry_after=2.0,
                metadata=named("waiting", share, mine + 1),
            )
        self._waiting.setdefault(job.client, deque()).append(job)

    def put_back(self, job: Job) -> None:
        """Add a job that has been taken once, before its client's others."""
        self._waiting.setdefault(job.client, deque()).appendleft(job)

    def take(self, fits: Callable[[Job], bool] = lambda job: True) -> Job | None:
        """The next job that fits; its client then goes to the end of the line."""
        for client, jobs in list(self._waiting.items()):
            if fits(jobs[0]):
                job = jobs.popleft()
                del self._waiting[client]
                if jobs:
                    self._waiting[client] = jobs
                return job
        return None

    def remove(self, job: Job) -> None:
        """Take a job out that has been given up: it is in nobody's way any more."""
        jobs = self._waiting.get(job.client, deque())
        if job in jobs:
            jobs.remove(job)
        if not jobs:
            self._waiting.pop(job.client, None)

    def ahead(self, client: str, job: Job | None = None) -> list[Job]:
        """The jobs that have their turn before one of this client's, or before a new one of its."""
        mine = self._waiting.get(client, deque())
        turns = len(mine) if job is None else mine.index(job)
        found, before = [], 1
        for other, jobs in self._waiting.items():
            if other == client:
                before = 0
            found += list(jobs)[: turns + before]
        return found

    def drain(self) -> list[Job]:
        """All jobs, which leave the queue."""
        jobs = [job for waiting in self._waiting.values() for job in waiting]
        self._waiting.clear()
        return jobs
