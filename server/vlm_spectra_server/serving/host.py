"""The front's side of a worker: its process, its queue, what its messages mean. No PyTorch here."""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.rpc import status_pb2
from vlm_spectra.errors import BusyError, CancelledError, SpectraError, UnavailableError
from vlm_spectra.status import from_status
from vlm_spectra.v1 import model_service_pb2, stream_pb2, tensor_pb2

from .pipe import Pipe

log = logging.getLogger("vlm_spectra.server")

MOST_DEATHS = 5
"""A model whose worker dies more often than this before it is ever ready is given up."""


@dataclass(frozen=True)
class Loading:
    """How to load a model: the worker's arguments."""

    name: str
    dtype: str = ""
    device: str = ""
    attention: str = ""


@dataclass
class Job:
    """A request on its way: waiting, then running.

    Attributes:
        events: What the worker says of it: (kind, message, blobs); ("error", SpectraError) ends it.
        tensors: By index: the header, and the memory that will hold the tensor.
    """

    id: int
    client: str
    method: str
    request: bytes
    images: dict[str, bytes]
    deadline: float | None
    events: queue.Queue[tuple[str, Any]] = field(default_factory=queue.Queue)
    tensors: dict[int, tuple[tensor_pb2.TensorHeader, memoryview]] = field(default_factory=dict)
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    cancelled: bool = False


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
            BusyError: The queue is full.
        """
        if len(self) >= self.bound:
            raise BusyError(
                f"{self.bound} requests are waiting already, and no more are taken; try again in a few seconds.",
                retry_after=2.0,
            )
        self._waiting.setdefault(job.client, deque()).append(job)

    def take(self) -> Job | None:
        """The next job; its client then goes to the end of the line."""
        while self._waiting:
            client, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[client] = jobs
            if not job.cancelled:
                return job
        return None

    def drain(self) -> list[Job]:
        """All jobs, which leave the queue."""
        jobs = [job for waiting in self._waiting.values() for job in waiting]
        self._waiting.clear()
        return jobs


class ModelHost:
    """A model in a worker process of its own.

    Args:
        loading: Which model, and how.
        limit: The most bytes of tensors that one request may take.
        queue_bound: The most requests that may wait.

    Attributes:
        model: What the model is and does; `state` is kept up to date.
    """

    def __init__(self, loading: Loading, limit: int, queue_bound: int) -> None:
        self.loading, self.limit = loading, limit
        self.model = model_service_pb2.Model(name=loading.name, state=model_service_pb2.MODEL_STATE_LOADING)
        self.settled = threading.Event()
        self.vocabulary: list[str] | None = None
        self._queue = FairQueue(queue_bound)
        self._lock = threading.RLock()
        self._ids = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._running: Job | None = None
        self._closed = False
        self._deaths = 0
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [sys.executable, "-m", "vlm_spectra_server.serving.worker", "--fd", str(theirs.fileno())]
        arguments += ["--model", self.loading.name, "--limit", str(self.limit)]
        for name in ("dtype", "device", "attention"):
            if getattr(self.loading, name):
                arguments += [f"--{name}", getattr(self.loading, name)]
        self.process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._pipe = Pipe(ours)
        threading.Thread(target=self._listen, args=(self._pipe,), name="worker-events", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the model answers requests."""
        return self.model.state == model_service_pb2.MODEL_STATE_READY

    def submit(self, client: str, method: str, request: bytes, images: dict[str, bytes], deadline: float | None) -> Job:
        """Put a request into the queue.

        Raises:
            BusyError: The queue is full.
            UnavailableError: The model is loading, failed, or its worker is being replaced.
        """
        with self._lock:
            self._check_ready()
            job = Job(next(self._ids), client, method, request, images, deadline)
            self._queue.put(job)
            self._jobs[job.id] = job
            self._next()
        return job

    def _check_ready(self) -> None:
        state, name = self.model.state, self.loading.name
        if self._closed:
            raise UnavailableError(f"the model {name!r} is being unloaded.", retry_after=5.0)
        if state == model_service_pb2.MODEL_STATE_FAILED:
            raise UnavailableError(f"the model {name!r} could not be loaded: {self.model.error}")
        if state != model_service_pb2.MODEL_STATE_READY:
            raise UnavailableError(f"the model {name!r} is still being loaded; try again soon.", retry_after=2.0)

    def cancel(self, job: Job) -> None:
        """End a job: out of the queue at once, out of the worker before its next layer."""
        with self._lock:
            if job.id not in self._jobs or job.cancelled:
                return
            job.cancelled = True
            if self._running is job:
                self._send({"kind": "cancel", "job": job.id})
            else:
                del self._jobs[job.id]
                job.events.put(("error", CancelledError("the call was cancelled while it waited for its turn.")))

    def close(self) -> None:
        """End the worker; waiting requests are refused."""
        with self._lock:
            self._closed = True
            self._fail_all(UnavailableError("the server is stopping.", retry_after=5.0))
            self._pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _next(self) -> None:
        if self._running is not None or not self.ready:
            return
        job = self._queue.take()
        if job is None:
            return
        self._running = job
        message = {"kind": "job", "job": job.id, "method": job.method, "deadline": job.deadline}
        self._send({**message, "images": list(job.images)}, job.request, *job.images.values())
        job.request, job.images = b"", {}

    def _send(self, message: dict[str, Any], *blobs: bytes) -> None:
        try:
            self._pipe.send(message, *blobs)
        except OSError:
            log.warning("the worker of %s does not take messages any more", self.loading.name)

    def _listen(self, pipe: Pipe) -> None:
        while True:
            try:
                message, blobs, fd = pipe.receive()
            except EOFError:
                self._died()
                return
            self._handle(message, blobs, fd)

    def _handle(self, message: dict[str, Any], blobs: Sequence[bytes], fd: int | None) -> None:
        kind = message["kind"]
        if kind == "ready":
            self.model.CopyFrom(model_service_pb2.Model.FromString(blobs[0]))
            self._deaths = 0
            log.info("%s is ready", self.loading.name)
            self.settled.set()
            with self._lock:
                self._next()
            return
        if kind == "failed":
            self.model.state = model_service_pb2.MODEL_STATE_FAILED
            self.model.error = from_status(status_pb2.Status.FromString(blobs[0])).message
            log.error("%s", self.model.error)
            self.settled.set()
            return
        job = self._jobs.get(message["job"])
        if kind == "tensors" and fd is not None:
            memory = mmap.mmap(fd, max(message["size"], 1), prot=mmap.PROT_READ)
            os.close(fd)
            if job is not None:
                header = stream_pb2.Header.FromString(blobs[0])
                view = memoryview(memory)
                for tensor, offset in zip(header.tensors, message["offsets"], strict=True):
                    job.tensors[tensor.index] = (tensor, view[offset : offset + tensor.byte_count])
                job.events.put(("tensors", list(header.tensors)))
            return
        if job is None:
            return
        if kind in ("done", "error"):
            with self._lock:
                self._jobs.pop(job.id, None)
                self._running = None
                self._next()
            result = from_status(status_pb2.Status.FromString(blobs[0])) if kind == "error" else blobs[0]
            job.events.put((kind, result))
        elif kind == "started":
            job.started = time.perf_counter()
            job.events.put((kind, None))
        else:
            job.events.put((kind, message.get("index") if kind == "tensor" else blobs[0]))

    def _died(self) -> None:
        """The worker is gone: its request fails, the port stays open, and a new worker takes its place."""
        with self._lock:
            if self._closed:
                return
            self.process.kill()
            code = self.process.wait()
            self._fail_all(UnavailableError("the model's worker process died; it is being replaced.", retry_after=5.0))
            if self.model.state == model_service_pb2.MODEL_STATE_FAILED:
                return
            self._deaths += 1
            if self._deaths > MOST_DEATHS:
                self.model.state = model_service_pb2.MODEL_STATE_FAILED
                self.model.error = f"its worker died {self._deaths} times in a row, last with exit code {code}"
                self.settled.set()
                log.error("%s: %s", self.loading.name, self.model.error)
                return
            self.model.state = model_service_pb2.MODEL_STATE_RESTARTING
        log.error("the worker of %s died (exit code %s) and is being replaced", self.loading.name, code)
        time.sleep(min(0.1 * 2**self._deaths, 5))
        with self._lock:
            if not self._closed:
                self._start()

    def _fail_all(self, error: SpectraError) -> None:
        for job in self._jobs.values():
            job.events.put(("error", error))
        self._queue.drain()
        self._jobs.clear()
        self._running = None
