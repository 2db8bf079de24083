"""A model's worker process: it alone holds PyTorch and the device, and runs one request at a time.

Results go into shared memory as they are made; short messages tell the front what is there. When the pipe closes, the
front is gone, and so is the worker.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging
from vlm_spectra import dtypes, tracing
from vlm_spectra.analyses import AttributionOptions, LensOptions, SweepOptions
from vlm_spectra.calls import CaptureOptions, GenerateOptions
from vlm_spectra.errors import (
    InternalError,
    InvalidInputError,
    OutOfDeviceMemoryError,
    OverLimitError,
    PromptTooLongError,
    SpectraError,
    WorkerDiedError,
)
from vlm_spectra.images import Picture
from vlm_spectra.inputs import Prompt
from vlm_spectra.interventions import check_intervention
from vlm_spectra.network import wire
from vlm_spectra.network.status import to_status
from vlm_spectra.v1 import inputs_pb2, model_service_pb2, stream_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb

from ..check import refuse_if_broken
from ..checkpoints import Placement, load
from ..hooked.delivery import TensorSpec
from ..hooked.inputs import HookedInputs
from ..hooked.run import Run
from ..hooked_vlm import HookedVLM
from . import logs
from .devices import Devices, device_lost, out_of_memory
from .limits import Limits, over
from .pipe import Pipe
from .starting import find_room, telling, warm_up
from .work import ALIGNMENT, Job, Postponed, SharedDelivery

log = logging.getLogger("vlm_spectra.worker")

PREPARED = 8
"""Prepared prompts kept: a script asks the same thing several times."""
LOOK_AGAIN = 1.0
"""Seconds between two looks at the memory of the devices."""


class DeviceLost(Exception):  # noqa: N818
    """The device does nothing any more in this process; another process can use it."""


class Worker:
    """Runs jobs on a model.

    Args:
        model: The model.
        pipe: The way to the front.
        limits: What one request may take.
    """

    def __init__(self, model: HookedVLM, pipe: Pipe, limits: Limits) -> None:
        self.model, self.pipe, self.limits = model, pipe, limits
        self.devices = Devices.of(model.model)
        self.looked = 0.0
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
        span, self.failure = tracing.start(f"run {job.method}", "internal", headers=job.trace), None
        try:
            with span.active():
                self._run(job)
        finally:
            if span is not tracing.NONE:
                span.part("prepare", self.begun, self.begun + self.prepare_seconds)
                span.set({f"vlm_spectra.{name}": value for name, value in self._cost().items()})
                span.end(self.failure)
            self.failure = None  # its traceback holds all that the call held

    def _run(self, job: Job) -> None:
        cuda = self.model.reading.device.type == "cuda"
        self.delivery = delivery = SharedDelivery(self.pipe, job, self.limits, cuda)
        self.begun = time.perf_counter()
        self.prepare_seconds = 0.0
        self.devices.forget_peak()
        short = False
        try:
            delivery.check()
            self.pipe.send({"kind": "started", "job": job.id})
            try:
                result = self.calls[job.method](job, delivery)
            finally:
                delivery.finish()
        except Postponed as wait:
            self.pipe.send({"kind": "later", "job": job.id, "size": wait.size})
        except SpectraError as error:
            self._fail(job, error)
        except Exception as error:
            if short := out_of_memory(error):
                self._fail(
                    job,
                    OutOfDeviceMemoryError(
                        "the device's memory did not suffice for this request; a shorter "
                        "prompt, a smaller batch or fewer captures may fit."
                    ),
                )
            else:
                self._broke(job, error, cuda)
        else:
            cost = self._cost()
            if not isinstance(result, bytes):
                summary = stream_pb2.Summary(revision=self.model.info.revision, peak_memory=cost["peak_memory_bytes"])
                for phase in ("prepare", "compute", "copy"):
                    setattr(summary.timings, phase, cost[f"{phase}_seconds"])
                if isinstance(result, Run):
                    summary.layers_run = result.layers_run
                result = summary.SerializeToString()
            self.pipe.send({"kind": "done", "job": job.id, "cost": cost, **self._memory()}, result)
        if short:  # now that the error is gone, and with it what its traceback held: other models want the memory
            torch.cuda.empty_cache()

    def _broke(self, job: Job, error: Exception, cuda: bool) -> None:
        """A job failed as none should.

        Raises:
            DeviceLost: The device with it.
        """
        log.exception("%s %s failed", job.request_id, job.method, extra={"request_id": job.request_id})
        kind = type(error).__name__
        if not (cuda and device_lost(self.devices)):
            self._fail(job, InternalError(f"the model failed on this request: {kind}: {error}"))
            return
        broken = f"this request broke the device's context ({kind}); its worker is replaced."
        self._fail(job, WorkerDiedError(broken, retry_after=5.0), lost=True)
        raise DeviceLost from error

    def _cost(self) -> dict[str, Any]:
        """What the running job has taken, in seconds and bytes."""
        elapsed, delivery = time.perf_counter() - self.begun, self.delivery
        return {
            "prepare_seconds": self.prepare_seconds,
            "compute_seconds": max(elapsed - self.prepare_seconds - delivery.waited, 0.0),
            "copy_seconds": delivery.copies.seconds,
            "peak_memory_bytes": self.devices.peak(),
        }

    def _memory(self) -> dict[str, Any]:
        """What the devices hold, for a message; not at each."""
        if time.monotonic() - self.looked < LOOK_AGAIN:
            return {}
        self.looked = time.monotonic()
        return {"memory": self.devices.memory()}

    def _fail(self, job: Job, error: SpectraError, lost: bool = False) -> None:
        self.failure = error
        message = {"kind": "error", "job": job.id, "cost": self._cost(), "lost": lost}
        self.pipe.send(message, to_status(error).SerializeToString())

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
            most = self.limits.prompt_tokens
            if most and longest > most:
                del self.prepared[key]
                raise over(PromptTooLongError, "prompt_tokens", most, longest, "the tokens of the prompt are", "task")
            while len(self.prepared) > PREPARED:
                self.prepared.popitem(last=False)
        self.prepared.move_to_end(key)
        self.prepare_seconds += time.perf_counter() - begun
        return self.prepared[key]

    def interventions(self, messages: Any) -> Any:
        """The interventions, checked against the catalogue; each counts as often as there are hooks of its name."""
        pairs, changes, most = [], 0, self.limits.items
        for pair in map(wire.intervention_from_wire, messages):
            pairs.append(check_intervention(pair, self.model.catalogue))
            changes += len(self.model.catalogue.expand(pair[0], capture=False))
            if changes > most:
                what = "the number of hooks that are changed is, each as often as it is,"
                raise over(OverLimitError, "items", most, changes, what, "interventions")
        return tuple(pairs)

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
        inputs, options = self.inputs(job, request.prompts), wire.generate_from_wire(request.options)
        interventions = self.interventions(request.interventions)
        delivery.expect(self._answer_bytes(inputs, options))
        return self.model.generate_into(delivery, inputs, options, interventions)

    def _captured_bytes(self, inputs: HookedInputs, capture: CaptureOptions) -> int:
        """Bytes of a capture of the prompt; of all of it where the positions are some of the answer."""
        try:
            specs, _ = self.model.plan(inputs, capture)
        except InvalidInputError:
            specs, _ = self.model.plan(inputs, replace(capture, positions=None))
        return sum(spec.nbytes for spec in specs)

    def _answer_bytes(self, inputs: HookedInputs, options: GenerateOptions) -> int:
        """Bytes of the tokens and log-probabilities of an answer, at most."""
        rows, length = inputs.input_ids.shape
        new = min(options.max_new_tokens, self.model.info.context)
        return int(rows * (8 * (length + new) + 4 * new)) + 4 * ALIGNMENT

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
            delivery.expect(self._answer_bytes(inputs, options) + self._captured_bytes(inputs, capture))
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
        options = LensOptions.checked(self.model.catalogue, self.model.info, **wire.lens_from_wire(request))
        self.model.lens_into(
            delivery, self.inputs(job, request.prompts), options, self.interventions(request.interventions)
        )

    def attribute(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.AttributeRequest.FromString(job.request)
        against = self.inputs(job, request.corrupted) if request.corrupted else None
        options = AttributionOptions.checked(**wire.attribution_from_wire(request), against=against)
        self.model.attribute_into(
            delivery, self.inputs(job, request.prompts), options, self.interventions(request.interventions)
        )

    def patch_sweep(self, job: Job, delivery: SharedDelivery) -> None:
        request = spb.PatchSweepRequest.FromString(job.request)
        options = SweepOptions.checked(self.model.catalogue, self.model.info, **wire.sweep_from_wire(request))
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
    parser.add_argument("--limits", type=json.loads, required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--attention")
    parser.add_argument("--revision")
    options = parser.parse_args()
    logs.begin(os.environ.get(logs.FORMAT_VARIABLE, "text"), "worker: ")
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # told to all processes of a terminal or a job
        signal.signal(number, signal.SIG_IGN)  # the front lets requests end, and this process ends when the front has
    tracing.begin("vlm-spectra-worker")
    pipe = Pipe(socket.socket(fileno=options.fd))
    begun = time.perf_counter()
    jobs: queue.Queue[Job] = queue.Queue()
    running: list[Job] = []
    try:
        dtype = options.dtype and dtypes.name_of(options.dtype)

        def before_weights() -> None:
            find_room(pipe, options.model, dtype or "", options.device or "", options.revision or "")
            # From here on it hears when the front ends, while it reads the weights too.
            threading.Thread(target=_listen, args=(pipe, jobs, running), daemon=True).start()

        with telling(lambda share: pipe.send({"kind": "loading", "share": share})):
            placement = Placement(dtype, options.device, options.attention, options.revision)
            found, processor, revision = load(options.model, placement, before_weights)
            model = HookedVLM(found, processor, options.model, revision)
        loaded = time.perf_counter()
        log.info(
            "%s: loaded in %.1f s; it holds what it must (checked in %.1f s); warmed up in %.1f s",
            options.model,
            loaded - begun,
            refuse_if_broken(model),
            warm_up(model),
        )
    except (EOFError, BrokenPipeError):  # the front has gone
        return
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
    memory = Devices.of(model.model).memory()
    pipe.send({"kind": "ready", "memory": memory}, description.SerializeToString())
    worker = Worker(model, pipe, Limits(**options.limits))
    while True:
        job = jobs.get()
        try:
            worker.run(job)
        except (OSError, DeviceLost):
            return
        finally:
            running.remove(job)


def _listen(pipe: Pipe, jobs: queue.Queue[Job], running: list[Job]) -> None:
    """Take jobs and what is said of them; end the process when the front is gone.

    Of two jobs with one number the front means the later: it sends one that has to wait again, perhaps before this
    process is done with the first.
    """
    while True:
        try:
            message, blobs, _ = pipe.receive()
        except EOFError:
            tracing.close()
            os._exit(0)
        if message["kind"] == "job":
            job = Job(message, blobs)
            running.append(job)
            jobs.put(job)
            continue
        for job in [each for each in running.copy() if each.id == message.get("job")][-1:]:
            if message["kind"] == "cancel":
                job.cancelled.set()
            elif message["kind"] in ("granted", "later"):
                job.grants.put(message["kind"] == "granted")


if __name__ == "__main__":
    main()
