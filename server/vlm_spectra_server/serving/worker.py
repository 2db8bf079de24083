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
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from vlm_spectra import dtypes, wire
from vlm_spectra.calls import CaptureOptions
from vlm_spectra.errors import (
    CancelledError,
    CaptureTooLargeError,
    DeadlineError,
    InternalError,
    InvalidInputError,
    NotSupportedError,
    OutOfDeviceMemoryError,
    SpectraError,
)
from vlm_spectra.images import Picture
from vlm_spectra.inputs import Prompt
from vlm_spectra.results import Token
from vlm_spectra.status import to_status
from vlm_spectra.v1 import inputs_pb2, model_service_pb2, stream_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb

from ..hooked.delivery import Delivery, TensorSpec
from ..hooked.inputs import HookedInputs
from ..hooked.run import Run
from ..hooked_vlm import HookedVLM
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


class SharedDelivery(Delivery):
    """Delivers into shared memory that the front reads.

    Args:
        pipe: The way to the front.
        job: The request.
        limit: The most bytes that one request may take.
    """

    def __init__(self, pipe: Pipe, job: Job, limit: int) -> None:
        super().__init__()
        self.pipe, self.job, self.limit = pipe, job, limit
        self.slots: dict[str, tuple[int, TensorSpec, torch.Tensor]] = {}
        self.total = 0

    def announce(self, specs: Sequence[TensorSpec]) -> None:
        """Make room for the tensors and tell the front; refused over the limit, before anything runs."""
        offsets, size = [], 0
        for spec in specs:
            offsets.append(size)
            size += -(-_bytes(spec) // ALIGNMENT) * ALIGNMENT
        if self.total + size > self.limit:
            raise CaptureTooLargeError(_too_large(specs, self.total + size, self.limit), field="hooks")
        if not specs:
            return
        fd = shared_memory(size)
        try:
            memory = mmap.mmap(fd, max(size, 1))
            header = stream_pb2.Header()
            for spec, offset in zip(specs, offsets, strict=True):
                index = len(self.slots)
                count = _bytes(spec)
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

    def deliver(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor to its place and say that it is there."""
        index, spec, view = self.slots[name]
        if tuple(tensor.shape) != spec.shape:
            raise InternalError(f"{name} has shape {list(tensor.shape)}, but {list(spec.shape)} was announced.")
        if view.numel():
            view.view(getattr(torch, spec.dtype)).view(spec.shape).copy_(tensor)
        self.pipe.send({"kind": "tensor", "job": self.job.id, "index": index})

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
        if self.job.deadline is not None and time.time() > self.job.deadline:
            raise DeadlineError("the time given was over before the run was; it was ended between two layers.")


def _bytes(spec: TensorSpec) -> int:
    count = dtypes.to_numpy(spec.dtype).itemsize
    for extent in spec.shape:
        count *= extent
    return count


def _too_large(specs: Sequence[TensorSpec], size: int, limit: int) -> str:
    largest = max(specs, key=_bytes)
    same = [spec for spec in specs if spec.name.split(".")[-1] == largest.name.split(".")[-1]]
    fitting = max(limit * len(same) // max(size, 1), 0)
    hint = f"{fitting} of its {len(same)} layers would fit" if fitting else "a few positions of it would fit"
    return (
        f"this would take {size / 1e6:,.1f} MB, and at most {limit / 1e6:,.1f} MB are possible; the largest part is "
        f"{largest.name} {list(largest.shape)}: {hint}, or positions='last' "
        f"({_bytes(largest) // max(largest.shape[-2] if len(largest.shape) > 1 else 1, 1) / 1e6:,.3f} MB a layer)."
    )


class Worker:
    """Runs jobs on a model.

    Args:
        model: The model.
        pipe: The way to the front.
        limit: The most bytes of tensors that one request may take.
    """

    def __init__(self, model: HookedVLM, pipe: Pipe, limit: int) -> None:
        self.model, self.pipe, self.limit = model, pipe, limit
        self.prepared: OrderedDict[bytes, HookedInputs] = OrderedDict()
        self.calls = {
            "Prepare": self.prepare,
            "Generate": self.generate,
            "Forward": self.forward,
            "RunWithCache": self.run_with_cache,
            "LogitLens": self.lens,
            "Attribute": self.attribute,
            "GetUnembedding": self.unembedding,
            "Vocabulary": self.vocabulary,
        }

    def run(self, job: Job) -> None:
        """Carry out a job and say how it ended."""
        delivery = SharedDelivery(self.pipe, job, self.limit)
        begun = time.perf_counter()
        self.prepare_seconds = 0.0
        if self.model.reading.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            delivery.check()
            self.pipe.send({"kind": "started", "job": job.id})
            result = self.calls[job.method](job, delivery)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._fail(
                job,
                OutOfDeviceMemoryError(
                    "the device's memory did not suffice for this request; a shorter "
                    "prompt, a smaller batch or fewer captures may fit."
                ),
            )
        except SpectraError as error:
            self._fail(job, error)
        except Exception as error:
            log.exception("job %d (%s) failed", job.id, job.method)
            self._fail(job, InternalError(f"the model failed on this request: {type(error).__name__}: {error}"))
        else:
            if isinstance(result, bytes):
                self.pipe.send({"kind": "done", "job": job.id}, result)
                return
            summary = stream_pb2.Summary(revision=self.model.info.revision)
            summary.timings.prepare = self.prepare_seconds
            summary.timings.compute = time.perf_counter() - begun - self.prepare_seconds
            if isinstance(result, Run):
                summary.layers_run = result.layers_run
            if self.model.reading.device.type == "cuda":
                summary.peak_memory = torch.cuda.max_memory_allocated()
            self.pipe.send({"kind": "done", "job": job.id}, summary.SerializeToString())

    def _fail(self, job: Job, error: SpectraError) -> None:
        self.pipe.send({"kind": "error", "job": job.id}, to_status(error).SerializeToString())

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
        if request.HasField("backward_from"):
            raise NotSupportedError("gradient hooks are not there yet.", field="backward_from")
        if request.selection.reduction or request.selection.compression > tensor_pb2.COMPRESSION_NONE:
            raise NotSupportedError("reductions and compression are not there yet.", field="selection")
        capture = CaptureOptions.checked(self.model.catalogue, **wire.selection_from_wire(request.selection))
        inputs, interventions = self.inputs(job, request.prompts), self.interventions(request.interventions)
        if request.WhichOneof("call") == "generate":
            options = wire.generate_from_wire(request.generate)
            return self.model.generate_into(delivery, inputs, options, interventions, capture)
        return self.model.forward_into(
            delivery, inputs, wire.forward_from_wire(request.forward), interventions, capture
        )

    def lens(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.LogitLensRequest.FromString(job.request)
        options = self.model.lens_options(**wire.lens_from_wire(request))
        self.model.lens_into(
            delivery, self.inputs(job, request.prompts), options, self.interventions(request.interventions)
        )

    def attribute(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.AttributeRequest.FromString(job.request)
        options = self.model.attribution_options(**wire.attribution_from_wire(request))
        self.model.attribute_into(
            delivery, self.inputs(job, request.prompts), options, self.interventions(request.interventions)
        )

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
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--attention")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s worker: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the front's to handle
    pipe = Pipe(socket.socket(fileno=options.fd))
    try:
        model = HookedVLM.from_pretrained(
            options.model,
            dtype=options.dtype or None,
            device=options.device or None,
            attn_implementation=options.attention or None,
        )
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
    worker = Worker(model, pipe, options.limit)
    while True:
        job = jobs.get()
        try:
            worker.run(job)
        except OSError:
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


if __name__ == "__main__":
    main()
