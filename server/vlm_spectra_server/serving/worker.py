"""A model's worker process: it alone holds PyTorch and the device, and runs one request at a time.

Results go into shared memory as they are made; short messages tell the front what is there. When the pipe closes, the
front is gone, and so is the worker.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import queue
import signal
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from vlm_spectra import dtypes, wire
from vlm_spectra.calls import CaptureOptions
from vlm_spectra.errors import (
    BusyError,
    CancelledError,
    CaptureTooLargeError,
    DeadlineError,
    InternalError,
    InvalidInputError,
    OutOfDeviceMemoryError,
    OverLimitError,
    PromptTooLongError,
    SpectraError,
    UnavailableError,
)
from vlm_spectra.images import Picture
from vlm_spectra.inputs import Prompt
from vlm_spectra.results import Token
from vlm_spectra.status import to_status
from vlm_spectra.v1 import inputs_pb2, model_service_pb2, stream_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb

from ..check import refuse_if_broken
from ..hooked.delivery import Delivery, TensorSpec
from ..hooked.inputs import HookedInputs
from ..hooked.run import Run
from ..hooked_vlm import HookedVLM
from . import logs
from .copying import Pinned, SideCopies
from .limits import named, over
from .pipe import Pipe, shared_memory

log = logging.getLogger("vlm_spectra.worker")

ALIGNMENT = 64
"""Every tensor starts at a multiple of so many bytes in shared memory."""
PREPARED = 8
"""Prepared prompts kept: a script asks the same thing several times."""

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
        limit: The most bytes that one request may take.
        cuda: Whether captures come from a GPU.
        cells: The most cells of a patch sweep.
    """

    def __init__(self, pipe: Pipe, job: Job, limit: int, cuda: bool, cells: int = 1 << 62) -> None:
        super().__init__()
        self.cells = cells
        self.pipe, self.job, self.limit, self.cuda = pipe, job, limit, cuda
        self.copies = SideCopies(self._arrived)
        self.pinned: list[Pinned] = []
        self.slots: dict[str, tuple[int, TensorSpec, torch.Tensor]] = {}
        self.total = 0

    def announce(self, specs: Sequence[TensorSpec]) -> None:
        """Make room for the tensors and tell the front; refused over the limit, before anything runs."""
        offsets, size = [], 0
        for spec in specs:
            offsets.append(size)
            size += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        if self.total + size > self.limit:
            raise CaptureTooLargeError(
                _too_large(specs, self.total + size, self.limit),
                field="hooks",
                metadata=named("capture_bytes", self.limit, self.total + size),
            )
        cells = sum(spec.shape[0] for spec in specs if spec.name.startswith("values."))
        if self.job.method == "PatchSweep" and cells > self.cells:
            raise over(OverLimitError, "sweep_cells", self.cells, cells, "the number of cells of the sweep is", "hooks")
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

    def _reserve(self, size: int) -> None:
        """Ask the front for so much of the host's memory. At the beginning of a request it can wait without loss."""
        self.pipe.send({"kind": "reserve", "job": self.job.id, "size": size})
        if self.job.grants.get():
            return
        if not self.slots:
            raise Postponed(size)
        raise BusyError(
            f"the server's memory for captures is full, and {size / 1e6:,.1f} MB more were needed; try again when "
            "other captures have been read.",
            retry_after=5.0,
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
            target.copy_(tensor)
        self._arrived(index)

    def _arrived(self, index: int) -> None:
        self.pipe.send({"kind": "tensor", "job": self.job.id, "index": index})

    def finish(self) -> None:
        """Wait for what is still on its way from the device."""
        try:
            self.copies.finish()
        finally:
            for each in self.pinned:
                each.release()
            self.pinned = []

    def event(self, **event: Any) -> None:
        """Send a response message; its fields have the same numbers in every streaming response of the contract."""
        self.pipe.send({"kind": "event", "job": self.job.id}, spb.RunWithCacheResponse(**event).SerializeToString())

    def token(self, token: Token) -> None:
        """A token was chosen."""
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


def _too_large(specs: Sequence[TensorSpec], size: int, limit: int) -> str:
    largest = max(specs, key=lambda spec: spec.nbytes)
    same = [spec for spec in specs if spec.name.split(".")[-1] == largest.name.split(".")[-1]]
    fitting = max(limit * len(same) // max(size, 1), 0)
    hint = f"{fitting} of its {len(same)} layers would fit" if fitting else "a few positions of it would fit"
    return (
        f"this would take {size / 1e6:,.1f} MB, and at most {limit / 1e6:,.1f} MB are possible (max_capture_gb); the "
        f"largest part is {largest.name} {list(largest.shape)}: {hint}, or positions='last' "
        f"({largest.nbytes // max(largest.shape[-2] if len(largest.shape) > 1 else 1, 1) / 1e6:,.3f} MB a layer)."
    )


class DeviceLost(Exception):  # noqa: N818
    """The device does nothing any more in this process; another process can use it."""


def device_lost() -> bool:
    """Whether the device's context is broken: after a failed assertion in a kernel every call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Worker:
    """Runs jobs on a model.

    Args:
        model: The model.
        pipe: The way to the front.
        limit: The most bytes of tensors that one request may take.
        tokens: The most tokens of a prompt; 0 for the model's context alone.
        cells: The most cells of a patch sweep.
    """

    def __init__(self, model: HookedVLM, pipe: Pipe, limit: int, tokens: int, cells: int) -> None:
        self.model, self.pipe, self.limit, self.tokens, self.cells = model, pipe, limit, tokens, cells
        self.prepared: OrderedDict[bytes, HookedInputs] = OrderedDict()
        self.calls = {
            "Prepare": self.prepare,
            "Estimate": self.estimate,
            "Generate": self.generate,
            "Forward": self.forward,
            "RunWithCache": self.run_with_cache,
            "LogitLens": self.lens,
            "Attribute": self.attribute,
            "PatchSweep": self.patch_sweep,
            "GetUnembedding": self.unembedding,
            "Vocabulary": self.vocabulary,
        }

    def run(self, job: Job) -> None:
        """Carry out a job and say how it ended."""
        cuda = self.model.reading.device.type == "cuda"
        delivery = SharedDelivery(self.pipe, job, self.limit, cuda, self.cells)
        self.begun = begun = time.perf_counter()
        self.prepare_seconds = 0.0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            delivery.check()
            self.pipe.send({"kind": "started", "job": job.id})
            try:
                result = self.calls[job.method](job, delivery)
            finally:
                delivery.finish()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._fail(
                job,
                OutOfDeviceMemoryError(
                    "the device's memory did not suffice for this request; a shorter "
                    "prompt, a smaller batch or fewer captures may fit."
                ),
            )
        except Postponed as wait:
            self.pipe.send({"kind": "later", "job": job.id, "size": wait.size})
        except SpectraError as error:
            self._fail(job, error)
        except Exception as error:
            log.exception("job %d (%s) failed", job.id, job.method)
            if cuda and device_lost():
                self._fail(
                    job,
                    UnavailableError(
                        f"this request broke the device's context ({type(error).__name__}); its worker is replaced.",
                        retry_after=5.0,
                    ),
                )
                raise DeviceLost from error
            self._fail(job, InternalError(f"the model failed on this request: {type(error).__name__}: {error}"))
        else:
            if isinstance(result, bytes):
                self.pipe.send({"kind": "done", "job": job.id, "cost": self._cost()}, result)
                return
            summary = stream_pb2.Summary(revision=self.model.info.revision)
            summary.timings.prepare = self.prepare_seconds
            summary.timings.compute = time.perf_counter() - begun - self.prepare_seconds
            if isinstance(result, Run):
                summary.layers_run = result.layers_run
            if cuda:
                summary.peak_memory = torch.cuda.max_memory_allocated()
            self.pipe.send({"kind": "done", "job": job.id, "cost": self._cost()}, summary.SerializeToString())

    def _cost(self) -> dict[str, float]:
        """What the running job has taken."""
        compute = time.perf_counter() - self.begun - self.prepare_seconds
        cost = {"prepare_seconds": self.prepare_seconds, "compute_seconds": compute}
        if self.model.reading.device.type == "cuda":
            cost["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        return cost

    def _fail(self, job: Job, error: SpectraError) -> None:
        self.pipe.send({"kind": "error", "job": job.id, "cost": self._cost()}, to_status(error).SerializeToString())

    def inputs(self, job: Job, prompts: Sequence[inputs_pb2.Prompt]) -> HookedInputs:
        """The prompts, prepared; the last few are kept."""
        begun = time.perf_counter()
        if not prompts:
            raise InvalidInputError("a request needs at least one prompt.", field="prompts")
        key = spb.PrepareRequest(prompts=prompts).SerializeToString(deterministic=True)
        if key not in self.prepared:
            made = tuple(
                Prompt(p.task, tuple(Picture.of(job.images[i]) for i in p.images), p.assistant_prefill, p.system)
                for p in prompts
            )
            self.prepared[key] = self.model._prepare(made)
            longest = int(self.prepared[key].attention_mask.sum(1).max())
            if self.tokens and longest > self.tokens:
                del self.prepared[key]
                raise over(
                    PromptTooLongError, "prompt_tokens", self.tokens, longest, "the tokens of the prompt are", "task"
                )
            while len(self.prepared) > PREPARED:
                self.prepared.popitem(last=False)
        self.prepared.move_to_end(key)
        self.prepare_seconds = time.perf_counter() - begun
        return self.prepared[key]

    def interventions(self, messages: Any) -> Any:
        """The interventions, checked against the catalogue."""
        return tuple(self.model.check_intervention(wire.intervention_from_wire(message)) for message in messages)

    def prepare(self, job: Job, delivery: SharedDelivery) -> bytes:
        request = spb.PrepareRequest.FromString(job.request)
        inputs = self.inputs(job, request.prompts)
        response = spb.PrepareResponse(images=[wire.layout_to_wire(image) for image in inputs.images])
        for row, text in enumerate(inputs.text):
            response.rows.add(
                input_ids=inputs.input_ids[row].tolist(),
                attention_mask=inputs.attention_mask[row].tolist(),
                token_labels=inputs.token_labels[row],
                text=text,
            )
        return response.SerializeToString()

    def estimate(self, job: Job, delivery: SharedDelivery) -> bytes:
        run = spb.EstimateRequest.FromString(job.request).run
        specs, seconds = self.model.plan(self.inputs(job, run.prompts), self.capture(run))
        response = spb.EstimateResponse(compute_seconds=seconds)
        for index, spec in enumerate(specs):
            response.tensors.add(
                index=index,
                name=spec.name,
                dtype=dtypes.to_wire(spec.dtype),
                shape=spec.shape,
                byte_count=spec.nbytes,
            )
        response.byte_count = sum(tensor.byte_count for tensor in response.tensors)
        return response.SerializeToString()

    def generate(self, job: Job, delivery: SharedDelivery) -> Run:
        request = spb.GenerateRequest.FromString(job.request)
        return self.model.generate_into(
            delivery,
            self.inputs(job, request.prompts),
            wire.generate_from_wire(request.options),
            self.interventions(request.interventions),
        )

    def forward(self, job: Job, delivery: SharedDelivery) -> Run:
        request = spb.ForwardRequest.FromString(job.request)
        return self.model.forward_into(
            delivery,
            self.inputs(job, request.prompts),
            wire.forward_from_wire(request.options),
            self.interventions(request.interventions),
        )

    def run_with_cache(self, job: Job, delivery: SharedDelivery) -> Run:
        request = spb.RunWithCacheRequest.FromString(job.request).run
        capture = self.capture(request)
        inputs, interventions = self.inputs(job, request.prompts), self.interventions(request.interventions)
        if request.WhichOneof("call") == "generate":
            options = wire.generate_from_wire(request.generate)
            return self.model.generate_into(delivery, inputs, options, interventions, capture)
        return self.model.forward_into(
            delivery, inputs, wire.forward_from_wire(request.forward), interventions, capture
        )

    def capture(self, run: spb.CaptureRun) -> CaptureOptions:
        """What a run captures, checked against the catalogue."""
        target = wire.target_from_wire(run.backward_from) if run.HasField("backward_from") else None
        return CaptureOptions.checked(
            self.model.catalogue, **wire.selection_from_wire(run.selection), backward_from=target
        )

    def lens(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.LogitLensRequest.FromString(job.request)
        options = self.model.lens_options(**wire.lens_from_wire(request))
        self.model.lens_into(
            delivery, self.inputs(job, request.prompts), options, self.interventions(request.interventions)
        )

    def attribute(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.AttributeRequest.FromString(job.request)
        against = self.inputs(job, request.corrupted) if request.corrupted else None
        options = self.model.attribution_options(**wire.attribution_from_wire(request), against=against)
        self.model.attribute_into(
            delivery, self.inputs(job, request.prompts), options, self.interventions(request.interventions)
        )

    def patch_sweep(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.PatchSweepRequest.FromString(job.request)
        options = self.model.sweep_options(**wire.sweep_from_wire(request))
        clean, corrupted = self.inputs(job, request.prompts), self.inputs(job, request.corrupted)
        self.model.sweep_into(delivery, clean, corrupted, options, self.interventions(request.interventions))

    def unembedding(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.GetUnembeddingRequest.FromString(job.request)
        ids = self.model.token_ids([wire.token_from_wire(token) for token in request.tokens])
        if not ids:
            raise InvalidInputError("an unembedding needs at least one token.", field="tokens")
        tensors = {"token_ids": torch.tensor(ids), "directions": self.model.directions(ids)}
        delivery.announce([TensorSpec(n, dtypes.name_of(t.dtype), tuple(t.shape)) for n, t in tensors.items()])
        for name, tensor in tensors.items():
            delivery.deliver(name, tensor)

    def vocabulary(self, job: Job, delivery: SharedDelivery) -> bytes:
        texts = self.model._texts(range(self.model.info.vocab))
        return model_service_pb2.GetModelResponse(vocabulary=texts).SerializeToString()


def main() -> None:
    """Load the model, say so, then run jobs until the front is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=0)
    parser.add_argument("--sweep-cells", type=int, default=1 << 62)
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--attention")
    parser.add_argument("--revision")
    options = parser.parse_args()
    logs.begin(os.environ.get(logs.FORMAT_VARIABLE, "text"), "worker: ")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the front's to handle
    pipe = Pipe(socket.socket(fileno=options.fd))
    try:
        model = HookedVLM.from_pretrained(
            options.model,
            dtype=options.dtype or None,
            device=options.device or None,
            attn_implementation=options.attention or None,
            revision=options.revision or None,
        )
        log.info("%s holds what it must (checked in %.1f s)", options.model, refuse_if_broken(model))
    except Exception as error:
        known = (
            error
            if isinstance(error, SpectraError)
            else InternalError(f"the model {options.model!r} cannot be loaded: {type(error).__name__}: {error}")
        )
        pipe.send({"kind": "failed"}, to_status(known).SerializeToString())
        return
    description = model_service_pb2.Model(
        name=options.model,
        state=model_service_pb2.MODEL_STATE_READY,
        info=wire.info_to_wire(model.info),
        hooks=[wire.hook_to_wire(spec) for spec in model.hooks()],
        progress=1.0,
    )
    pipe.send({"kind": "ready"}, description.SerializeToString())
    jobs: queue.Queue[Job] = queue.Queue()
    running: dict[int, Job] = {}
    threading.Thread(target=_listen, args=(pipe, jobs, running), daemon=True).start()
    worker = Worker(model, pipe, options.limit, options.prompt_tokens, options.sweep_cells)
    while True:
        job = jobs.get()
        try:
            worker.run(job)
        except (OSError, DeviceLost):
            return
        finally:
            running.pop(job.id, None)


def _listen(pipe: Pipe, jobs: queue.Queue[Job], running: dict[int, Job]) -> None:
    """Take jobs and cancellations; end the process when the front is gone."""
    while True:
        try:
            message, blobs, _ = pipe.receive()
        except EOFError:
            os._exit(0)
        if message["kind"] == "job":
            job = Job(message, blobs)
            running[job.id] = job
            jobs.put(job)
        elif message["kind"] == "cancel" and message["job"] in running:
            running[message["job"]].cancelled.set()
        elif message["kind"] in ("granted", "later") and message["job"] in running:
            running[message["job"]].grants.put(message["kind"] == "granted")


if __name__ == "__main__":
    main()
