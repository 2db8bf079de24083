"""The front's side of a worker: its process, its queue, what its messages mean. No PyTorch here."""

from __future__ import annotations

import itertools
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from google.rpc import status_pb2
from vlm_spectra.errors import (
    CancelledError,
    DeadlineError,
    InternalError,
    SpectraError,
    UnavailableError,
    WorkerDiedError,
)
from vlm_spectra.network.status import from_status
from vlm_spectra.v1 import model_service_pb2, stream_pb2

from . import logs
from .budget import Budget
from .limits import Limits
from .pipe import Pipe, read_only
from .turns import FairQueue, Job

log = logging.getLogger("vlm_spectra.server")

Memory = Mapping[str, tuple[int, int, int]]
"""By device, in bytes: what a worker holds of it, what is free, and all of it."""

GRANTED, WAIT = "granted", "wait"
"""Answers to a worker that asks whether there is room for its model; any other is a sentence that refuses."""

STUCK = 120.0
"""Seconds after which a worker that has not ended a cancelled request will not: a kernel may never return."""

MOST_DEATHS = 5
"""A model whose worker dies more often than this before it is ever ready is given up."""


@dataclass(frozen=True)
class Loading:
    """How to load a model: the worker's arguments."""

    name: str
    dtype: str = ""
    device: str = ""
    attention: str = ""
    revision: str = ""


class ModelHost:
    """A model in a worker process of its own.

    Args:
        loading: Which model, and how.
        limits: What one request takes at most, and how many may wait.
        budget: The host's memory for captures.
        changed: Called with the model's name and state whenever that has changed.
        room: Asked, with this object and what its worker says of the model's size and of its devices, whether to load
            it; see `Models.room`.

    Attributes:
        model: What the model is and does; `state` and `memory` are kept up to date.
        memory: By device, in bytes: what it holds, or will hold once loaded, what is free there, and all of it.
        told: When its worker last told its memory, by `time.monotonic()`.
        used: When the last request came.
        placed: Whether it is one of the models that there may be at a time; one that is loading may still wait for
            another to leave.
    """

    def __init__(
        self,
        loading: Loading,
        limits: Limits,
        budget: Budget,
        changed: Callable[[str, int | None], None] = lambda name, state: None,
        room: Callable[[ModelHost, int, Memory], str] = lambda host, size, memory: GRANTED,
    ) -> None:
        self.loading, self.limits, self.budget, self.changed, self.room = loading, limits, budget, changed, room
        self.memory: Memory = {}
        self.told = 0.0
        self.model = model_service_pb2.Model(name=loading.name, state=model_service_pb2.MODEL_STATE_LOADING)
        self.settled = threading.Event()
        self.vocabulary: list[str] | None = None
        self.queue = FairQueue(limits.waiting)
        self._seconds: dict[str, deque[float]] = {}
        self._lock = threading.RLock()
        self._ids = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._running: Job | None = None
        self._closed = False
        self._ended = threading.Condition(self._lock)
        self._deaths = 0
        self._hungry = False
        self.placed = False
        self.used = time.monotonic()
        self._start()
        budget.freed.append(self._on_freed)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        options = {"fd": theirs.fileno(), "model": self.loading.name, "limits": json.dumps(asdict(self.limits))}
        for name in ("dtype", "device", "attention", "revision"):
            if getattr(self.loading, name):
                options[name] = getattr(self.loading, name)
        arguments = [f"--{name}={value}" for name, value in options.items()]  # a value may begin with a dash
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLM_SPECTRA_TOKEN")}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vlm_spectra_server.serving.worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE if logs.structured() else None,
                env=environment,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._pipe = pipe = Pipe(ours)
        try:
            if self.process.stderr is not None:
                log_of = (self.process.stderr,)
                threading.Thread(target=logs.pass_on, args=log_of, name="worker-log", daemon=True).start()
            threading.Thread(target=self._deliver, args=(pipe,), name="worker-orders", daemon=True).start()
            threading.Thread(target=self._listen, args=(pipe,), name="worker-events", daemon=True).start()
        except RuntimeError:  # no thread is left, and nobody would hear the worker
            pipe.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether it is loading, or has requests."""
        return bool(self._jobs) or self.model.state == model_service_pb2.MODEL_STATE_LOADING

    @property
    def ready(self) -> bool:
        """Whether the model answers requests."""
        return self.model.state == model_service_pb2.MODEL_STATE_READY

    @property
    def held(self) -> dict[str, int]:
        """Bytes that it holds, by device; while it is loading, what it will."""
        return {device: held for device, (held, _, _) in self.memory.items()}

    def submit(
        self,
        client: str,
        method: str,
        request: bytes,
        images: dict[str, bytes],
        deadline: float | None,
        request_id: str = "",
        trace: Mapping[str, str] | None = None,
    ) -> Job:
        """Put a request into the queue.

        Raises:
            BusyError: The queue is full.
            DeadlineError: Its time will be over before its turn.
            UnavailableError: The model is loading, failed, or its worker is being replaced.
        """
        with self._lock:
            self._check_ready()
            if deadline is not None:
                self._check_deadline(client, deadline - time.monotonic())
            job = Job(next(self._ids), client, method, request, images, deadline, request_id, trace or {})
            self.queue.put(job)
            self._jobs[job.id] = job
            self.used = time.monotonic()
            self._next()
        return job

    def _check_ready(self) -> None:
        state, name = self.model.state, self.loading.name
        if self._closed:
            raise UnavailableError(f"the model {name!r} is being unloaded.", retry_after=5.0)
        if state == model_service_pb2.MODEL_STATE_FAILED:
            raise self._unloadable()
        if state != model_service_pb2.MODEL_STATE_READY:
            raise UnavailableError(f"the model {name!r} is still being loaded; try again soon.", retry_after=2.0)

    def _unloadable(self) -> UnavailableError:
        return UnavailableError(f"the model {self.loading.name!r} could not be loaded: {self.model.error}")

    def _check_deadline(self, client: str, given: float) -> None:
        """Refuse what cannot have its turn in time, by the shortest of the last runs of what is before it."""
        wait, running = sum(self._shortest(job) for job in self.queue.ahead(client)), self._running
        if running is not None and running.started:
            wait += max(self._shortest(running) - (time.perf_counter() - running.started), 0.0)
        if wait > given:
            raise DeadlineError(
                f"{len(self.queue)} requests wait, and this one's turn would come in some {wait:.1f} s; it was "
                f"given {given:.1f} s.",
                retry_after=wait,
                metadata={"wait_seconds": f"{wait:.3f}", "given_seconds": f"{given:.3f}"},
            )

    def _shortest(self, job: Job) -> float:
        return min(self._seconds.get(job.method, ()), default=0.0)

    def place(self, job: Job) -> tuple[int, int] | None:
        """A waiting job's place in the queue, 1 being next, and how many wait; None where it does not wait."""
        with self._lock:
            if job is self._running or job.id not in self._jobs:
                return None
            return len(self.queue.ahead(job.client, job)) + 1, len(self.queue)

    def cancel(self, job: Job) -> None:
        """End a job: out of the queue at once, out of the worker before its next layer."""
        with self._lock:
            if job.id not in self._jobs or job.cancelled:
                return
            job.cancelled = True
            if self._running is job:
                self._pipe.post({"kind": "cancel", "job": job.id})
                threading.Thread(target=self._see_end, args=(job,), name="cancelled", daemon=True).start()
            else:
                del self._jobs[job.id]
                self.queue.remove(job)
                self._settle(job)
                job.feed.put("error", CancelledError("the call was cancelled while it waited for its turn."))
                self._next()  # its client's others may have stood behind it

    def _see_end(self, job: Job) -> None:
        """Wait for the end of a job that was cancelled; a worker that does not come to it is replaced."""
        with self._lock:
            if not self._ended.wait_for(lambda: self._running is not job, STUCK):
                log.error("the worker of %s does not end a request cancelled %g s ago", self.loading.name, STUCK)
                self._pipe.close()  # which is heard, and dealt with, as any other death

    def leave(self) -> bool:
        """Take no more requests, if none is at work and none waits; False where one does."""
        with self._lock:
            self._closed = self._closed or not self.busy
            return self._closed

    def drain(self) -> None:
        """Take no more requests, refuse those that wait, and wait for the one at work."""
        with self._lock:
            self._closed = True
            for job in self.queue.drain():
                self._jobs.pop(job.id, None)
                self._refuse(job)
            self._ended.wait_for(lambda: self._running is None)

    def close(self) -> None:
        """End the worker; requests that are left are refused."""
        with self._lock:
            self._closed = True
            if self._on_freed in self.budget.freed:
                self.budget.freed.remove(self._on_freed)
            self._fail_all(UnavailableError("the server is stopping.", retry_after=5.0))
            self._pipe.close()
            if not self.ready:  # it is loading, and has nothing to bring to an end
                self.process.kill()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _refuse(self, job: Job) -> None:
        """A job that waits will not have its turn: the model leaves."""
        self._settle(job)
        job.feed.put("error", UnavailableError(f"the model {self.loading.name!r} is being unloaded.", retry_after=5.0))

    def _next(self) -> None:
        if self._running is not None or not self.ready or self._closed:
            return
        self._hungry = len(self.queue) > 0  # before the look: memory that comes free in the middle of it counts
        job = self.queue.take(self._fits)
        if job is None:
            return
        self._running, self._hungry = job, False
        message = {"kind": "job", "job": job.id, "method": job.method, "deadline": job.deadline}
        message |= {"request_id": job.request_id, "trace": job.trace}
        try:
            self._pipe.post({**message, "images": list(job.images)}, job.request, *job.images.values())
        except Exception:  # larger than a message can be, or than memory: nothing of it was sent
            log.exception("%s could not be handed to the worker of %s", job.request_id, self.loading.name)
            self._end(job)
            job.feed.put("error", InternalError("the request could not be handed to the model's worker."))
            self._next()

    def _fits(self, job: Job) -> bool:
        """Whether there is memory for a job that waits for some; it is set aside."""
        if job.needs and not job.reserved and self.budget.take(job.client, job.needs):
            job.reserved = job.needs
        return job.reserved >= job.needs

    def _on_freed(self) -> None:
        """Memory has come free, in whatever thread let it go: look again in one of our own."""
        if self._hungry:
            self._hungry = False
            threading.Thread(target=self._next_now, name="memory-freed", daemon=True).start()

    def _next_now(self) -> None:
        with self._lock:
            if not self._closed:
                self._next()

    def _reserve(self, job: Job | None, size: int) -> None:
        """The running job is about to make so many bytes of captures."""
        granted = job is None or job.reserved >= size
        if job is not None and not granted:
            granted = self.budget.take(job.client, size - job.reserved)
            job.reserved = size if granted else job.reserved
        self._pipe.post({"kind": "granted" if granted else "later", "job": 0 if job is None else job.id})

    def _postpone(self, job: Job, size: int) -> None:
        """There is no memory for the running job: it waits, and others run."""
        with self._lock:
            self._running = None
            self._ended.notify_all()
            self._give_back(job)
            job.needs, job.started = size, 0.0  # it waits for its turn once more, and that is no computing
            if not job.cancelled and not self._closed:
                self.queue.put_back(job)
            else:
                self._jobs.pop(job.id, None)
                if job.cancelled:
                    job.feed.put("error", CancelledError("the call was cancelled while it waited for memory."))
                else:
                    self._refuse(job)
            self._next()

    def _end(self, job: Job) -> None:
        """The running job has ended."""
        self._jobs.pop(job.id, None)
        self._running = None
        self._ended.notify_all()
        self._settle(job)

    def _settle(self, job: Job) -> None:
        """A job has ended: nothing that it needed is held any more."""
        job.request, job.images = b"", {}
        with job.lock:
            job.stop_timer()
        self._give_back(job)

    def _give_back(self, job: Job) -> None:
        """What was set aside for a job and not used is free."""
        if job.reserved:
            reserved, job.reserved = job.reserved, 0
            self.budget.give_back(job.client, reserved)

    def _deliver(self, pipe: Pipe) -> None:
        try:
            pipe.deliver()
        except OSError:
            log.warning("the worker of %s does not take messages any more", self.loading.name)

    def _listen(self, pipe: Pipe) -> None:
        try:
            while True:
                self._handle(*pipe.receive())
        except EOFError:
            pass
        except Exception:
            log.exception("the worker of %s said what cannot be dealt with, and is ended", self.loading.name)
        self._died()

    def _handle(self, message: dict[str, Any], blobs: Sequence[bytes], fd: int | None) -> None:
        kind = message["kind"]
        if "memory" in message and kind != "room":
            self._measured(message["memory"])
        if kind == "room":
            room = threading.Thread(target=self._make_room, args=(message, self._pipe), name="make-room", daemon=True)
            room.start()
            return
        if kind == "ready":
            memory = self.model.memory
            self.model.CopyFrom(model_service_pb2.Model.FromString(blobs[0]))
            self.model.memory = memory
            self._deaths = 0
            log.info("%s is ready, and takes %.2f GB", self.loading.name, memory / 1e9)
            self.settled.set()
            self.changed(self.loading.name, self.model.state)
            with self._lock:
                self._next()
            return
        if kind == "loading":
            self.model.progress = message["share"]
            return
        if kind == "failed":
            self.model.error = from_status(status_pb2.Status.FromString(blobs[0])).message
            if self.settled.is_set():  # it has served, and what is wrong now may pass: a device that is not back yet
                return  # the worker ends, which counts as a death
            self.model.state = model_service_pb2.MODEL_STATE_FAILED
            self._measured({})
            log.error("%s", self.model.error)
            self.settled.set()
            self.changed(self.loading.name, self.model.state)
            return
        job = self._jobs.get(message["job"])
        if kind == "tensors" and fd is not None:
            self._announce(job, message, stream_pb2.Header.FromString(blobs[0]), fd)
            return
        if kind == "reserve":
            self._reserve(job, message["size"])
            return
        if job is None:
            return
        if kind in ("done", "error"):
            content = from_status(status_pb2.Status.FromString(blobs[0])) if kind == "error" else blobs[0]
            with self._lock:
                job.cost = message.get("cost", {})
                if kind == "done" and job.started:
                    seconds = self._seconds.setdefault(job.method, deque(maxlen=16))
                    seconds.append(time.perf_counter() - job.started)
                self._end(job)
                job.feed.put(kind, content)
                if lost := message.get("lost", False):  # the worker can do no more, and is given no more
                    self.model.state = model_service_pb2.MODEL_STATE_RESTARTING
                self._next()
            self.budget.look_again()  # it is only kept from now on, and leaves for others
            if lost:
                raise EOFError
        elif kind == "later":
            self._postpone(job, message["size"])
        elif kind == "started":
            if not job.started:
                job.started = time.perf_counter()
                job.feed.put(kind)
        else:
            job.feed.put(kind, message.get("index") if kind == "tensor" else blobs[0])

    def _measured(self, memory: Memory) -> None:
        """The worker says what its devices hold."""
        self.memory = {device: (held, free, total) for device, (held, free, total) in memory.items()}
        self.told = time.monotonic()
        self.model.memory = sum(self.held.values())

    def _make_room(self, message: dict[str, Any], pipe: Pipe) -> None:
        """The worker has found out how large the model is, and asks whether to load it."""
        size = int(message["size"])
        try:
            answer = self.room(self, size, message["memory"])
        except Exception:
            log.exception("%s could not be given room, and its worker is ended", self.loading.name)
            pipe.close()  # which is heard, and dealt with, as any other death
            return
        with self._lock:
            if self._closed or self._pipe is not pipe:  # the worker that asked is gone
                return
            if answer == GRANTED:  # what it holds already, and the weights, spread over its devices
                share = size // max(len(message["memory"]), 1)
                self._measured({name: (held + share, *rest) for name, (held, *rest) in message["memory"].items()})
            pipe.post({"kind": "room", "answer": answer})

    def _announce(self, job: Job | None, message: dict[str, Any], header: stream_pb2.Header, fd: int) -> None:
        """Map a job's new memory; mapping, file descriptor and budget are free again when the last view goes."""
        size = message["size"]
        try:
            memory = mmap.mmap(fd, max(size, 1), prot=mmap.PROT_READ)
        except OSError:
            os.close(fd)
            raise
        segment = read_only(fd)
        weakref.finalize(memory, os.close, segment).atexit = False
        if job is None:
            return
        job.reserved -= size
        self.budget.give_back_with(memory, job.client, size)
        view = memoryview(memory)
        for tensor, offset in zip(header.tensors, message["offsets"], strict=True):
            tensor.shared.segment, tensor.shared.offset = len(job.segments), offset
            job.tensors[tensor.index] = (tensor, view[offset : offset + tensor.byte_count])
        job.segments.append(segment)
        job.feed.put("tensors", list(header.tensors))

    def _died(self) -> None:
        """The worker is gone: its request fails, the port stays open, and a new worker takes its place.

        Those that wait keep their places, and have their turn with the new one.
        """
        with self._lock:
            self._pipe.close()
            if self._closed:
                self._fail_all(UnavailableError("the model's worker process died.", retry_after=5.0))
                return
            failed, said, running = self.model.state == model_service_pb2.MODEL_STATE_FAILED, "", self._running
            if running is not None:
                self._end(running)
                died = "the model's worker process died while it ran this request; it is being replaced."
                running.feed.put("error", WorkerDiedError(died, retry_after=5.0))
            if not failed:
                said, self.model.error = self.model.error, ""
                self.model.state, self.model.progress = model_service_pb2.MODEL_STATE_RESTARTING, 0.0
        if not failed:
            self._tell()
        self.process.kill()
        how = f"with exit code {self.process.wait()}"  # which may take its time: a device that is lost holds on to it
        self._measured({})
        if failed:
            return
        if said:
            how += f": {said}"
        while self._once_more(how):
            try:
                with self._lock:
                    if not self._closed:
                        self._start()
                return
            except (OSError, RuntimeError) as error:  # no files, processes or threads are left
                how = f"before it began ({error})"
                self._tell()

    def _once_more(self, how: str) -> bool:
        """Count a death, and wait a little before the next worker; False where there were too many of them."""
        self._deaths += 1
        if self._deaths <= MOST_DEATHS:
            log.error("the worker of %s died %s and is being replaced", self.loading.name, how)
            time.sleep(min(0.1 * 2**self._deaths, 5))
            return True
        with self._lock:
            self.model.error = f"its worker died {self._deaths} times in a row, last {how}"
            self.model.state = model_service_pb2.MODEL_STATE_FAILED
            self._fail_all(self._unloadable())
        self.settled.set()
        log.error("%s: %s", self.loading.name, self.model.error)
        self._tell()
        return False

    def _tell(self) -> None:
        """Tell of a new state; a fault in whoever hears of it does not keep the model from coming back."""
        try:
            self.changed(self.loading.name, self.model.state)
        except Exception:
            log.exception("the state of %s could not be told", self.loading.name)

    def _fail_all(self, error: SpectraError) -> None:
        for job in self._jobs.values():
            self._settle(job)
            job.feed.put("error", error)
        self.queue.drain()
        self._jobs.clear()
        self._running = None
        self._ended.notify_all()
