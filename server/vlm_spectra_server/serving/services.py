"""The contract's services: requests to jobs, jobs to streams of messages."""

from __future__ import annotations

import copy
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
from vlm_spectra import dtypes
from vlm_spectra.errors import DeadlineError, InternalError, InvalidInputError
from vlm_spectra.v1 import model_service_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb

from .guard import Guard
from .host import Loading, ModelHost
from .loadable import Loadable
from .local import LocalDoor
from .models import Models
from .sending import Packing, Sending
from .stores import CaptureStore, ImageStore, StoredCapture
from .turns import Job

LONGEST_LINGER = 120
"""Seconds that a run may go on without a reader."""
LONGEST_NAME = 1024
"""Characters of what a worker is started with."""


class Spectra:
    """The calls of `SpectraService`."""

    def __init__(
        self, models: Models, images: ImageStore, captures: CaptureStore, guard: Guard, shared_memory: bool = True
    ) -> None:
        self.models, self.images, self.captures, self.guard = models, images, captures, guard
        self.door = LocalDoor(self._segment, shared_memory)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The calls as gRPC wants them; responses are bytes already."""
        streams = {
            "Generate": spb.GenerateRequest,
            "Forward": spb.ForwardRequest,
            "RunWithCache": spb.RunWithCacheRequest,
            "LogitLens": spb.LogitLensRequest,
            "Attribute": spb.AttributeRequest,
            "PatchSweep": spb.PatchSweepRequest,
            "GetUnembedding": spb.GetUnembeddingRequest,
        }
        methods = {name: self.guard.streaming(name, self._stream(name), request) for name, request in streams.items()}
        methods["Prepare"] = self.guard.single("Prepare", self.prepare, spb.PrepareRequest)
        methods["ReleaseCapture"] = self.guard.single("ReleaseCapture", self.release, spb.ReleaseCaptureRequest)
        methods["Estimate"] = self.guard.single("Estimate", self.estimate, spb.EstimateRequest)
        return grpc.method_handlers_generic_handler("vlm_spectra.v1.SpectraService", methods)

    def prepare(self, request: spb.PrepareRequest, context: grpc.ServicerContext) -> bytes:
        """`Prepare`: takes images, asks for those that are missing, and lets the worker format and tokenize."""
        hashes = [image for prompt in request.prompts for image in prompt.images]
        for image in request.images:
            self.images.add(image, hashes)
        missing = self.images.missing(hashes)
        if missing:
            return spb.PrepareResponse(missing_images=missing).SerializeToString()
        del request.images[:]
        return self._answer("Prepare", request, request.model, hashes, context)

    def estimate(self, request: spb.EstimateRequest, context: grpc.ServicerContext) -> bytes:
        """`Estimate`: the worker knows the shapes."""
        hashes = [image for prompt in request.run.prompts for image in prompt.images]
        return self._answer("Estimate", request, request.run.model, hashes, context)

    def _answer(self, method: str, request: Any, model: str, hashes: list[str], context: grpc.ServicerContext) -> bytes:
        """The worker's answer to a call that has one message."""
        job = self._submit(method, request, model, hashes, context)
        for kind, content in self._events(self.models.get(model), job, context):
            if kind == "done":
                return content  # type: ignore[no-any-return]
        raise InternalError("the worker gave no answer.")

    def release(self, request: spb.ReleaseCaptureRequest, context: grpc.ServicerContext) -> bytes:
        """`ReleaseCapture`: forgets a capture and ends its run; one that is gone already is no error."""
        capture = self.captures.pop(request.capture_id, context.call.caller.name)  # type: ignore[attr-defined]
        if capture is not None:
            capture.host.cancel(capture.job)
        return spb.ReleaseCaptureResponse().SerializeToString()

    def _submit(
        self,
        method: str,
        request: Any,
        model: str,
        hashes: list[str],
        context: grpc.ServicerContext,
        linger: int = 0,
    ) -> Job:
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineError("the time given was over before the request began.")
        deadline = None if remaining is None or remaining > 1e8 else time.monotonic() + remaining
        host, call = self.models.get(model), context.call  # type: ignore[attr-defined]
        call.model = host.loading.name
        images, trace = self.images.get(hashes), dict(call.span.headers)
        job = host.submit(call.client, method, request.SerializeToString(), images, deadline, call.id, trace)
        call.job = job
        self._attach(host, job, context, linger)
        return job

    def _attach(self, host: ModelHost, job: Job, context: grpc.ServicerContext, linger: int) -> None:
        """A reader has come. When the last one leaves, the job ends, or does so after `linger` seconds."""
        with job.lock:
            job.stop_timer()
            job.readers += 1

        def alone() -> None:
            if job.readers == 0:
                host.cancel(job)

        def leave() -> None:
            with job.lock:
                job.readers -= 1
                wait = linger and job.readers == 0 and not job.feed.ended and not job.cancelled
                if wait:
                    job.timer = threading.Timer(linger, alone)
                    job.timer.daemon = True
                    job.timer.start()
            if not wait:
                alone()

        if not context.add_callback(leave):
            leave()

    def _events(self, host: ModelHost, job: Job, context: grpc.ServicerContext) -> Iterator[tuple[str, Any]]:
        """What happens to a job, from its beginning to its end, and its place in the queue while it waits."""
        for number in itertools.count():
            while (found := job.feed.get(number, 1.0)) is None:
                if not context.is_active():
                    return
                if (place := host.place(job)) is not None:
                    yield "queued", place
            kind, content = found
            if kind == "error":
                raise copy.copy(content)  # one that was raised holds, by its traceback, the job that holds it
            yield kind, content
            if kind == "done":
                return

    def _stream(self, method: str) -> Callable[[Any, grpc.ServicerContext], Iterator[bytes]]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            if method == "RunWithCache":
                kind = request.WhichOneof("start")
                if kind == "resume":
                    yield from self._resume(request.resume, context)
                    return
                if kind is None:
                    raise InvalidInputError("the request has neither a run nor a capture to resume.", field="start")
            yield from self._run(method, request, request.run if method == "RunWithCache" else request, context)

        return call

    def _run(self, method: str, request: Any, body: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        call = context.call  # type: ignore[attr-defined]
        room = self.guard.limits.message_bytes
        for intervention in getattr(body, "interventions", ()):
            room -= self._inline(intervention, call.caller.name, room)
        host = self.models.get(body.model)
        prompts = [*getattr(body, "prompts", ()), *getattr(body, "corrupted", ())]
        hashes = [image for prompt in prompts for image in prompt.images]
        base = {"request_id": call.id, "model": host.loading.name, "revision": host.model.info.revision}
        linger, packing = 0, Packing()
        if method == "RunWithCache":
            base["capture_id"] = uuid.uuid4().hex
            linger = min(body.linger_seconds, LONGEST_LINGER)
            packing = Packing(
                zstd=body.selection.compression == tensor_pb2.COMPRESSION_ZSTD,
                shared=body.shared_memory and bool(self.door.name),
            )
        job = self._submit(method, request, body.model, hashes, context, linger)
        sending = call.sending = Sending(job, base, packing, arrived=call.begun)
        if method == "RunWithCache":
            self.captures.add(base["capture_id"], StoredCapture(job, host, sending, linger, call.caller.name))
        yield from sending.messages(self._events(host, job, context))

    def _resume(self, request: spb.CaptureResume, context: grpc.ServicerContext) -> Iterator[bytes]:
        call = context.call  # type: ignore[attr-defined]
        capture = self.captures.get(request.capture_id, call.caller.name)
        offsets = {item.index: item.offset for item in request.offsets}
        unknown = [index for index in offsets if index not in capture.job.tensors]
        if unknown:
            raise InvalidInputError(f"the capture has no tensor {unknown[0]}.", field="offsets")
        self._attach(capture.host, capture.job, context, capture.linger)
        packing = replace(capture.sending.packing, shared=request.shared_memory and bool(self.door.name))
        sending = call.sending = Sending(capture.job, capture.sending.base, packing, offsets, call.begun)
        call.job, call.model = capture.job, capture.host.loading.name
        yield from sending.messages(self._events(capture.host, capture.job, context))

    def _segment(self, capture_id: str, number: int) -> int:
        """A file descriptor of a capture's segment, for clients on this host; theirs to close.

        Its id was told to nobody but the caller that made it, and opens nothing once that caller's token is gone.
        """
        capture = self.captures.find(capture_id)
        if capture is None or not self.guard.tokens.knows(capture.owner) or not 0 <= number < len(capture.job.segments):
            raise KeyError(capture_id)
        return os.dup(capture.job.segments[number])  # as long as the capture is held here, it is no other file's

    def _inline(self, intervention: Any, owner: str, room: int) -> int:
        """Put the values of a capture's activation in the place of a reference to it; their bytes, at most `room`."""
        kind = intervention.WhichOneof("kind")
        part = getattr(intervention, kind) if kind else None
        for name in ("value", "direction", "mask"):
            if part is not None and name in part.DESCRIPTOR.fields_by_name and part.HasField(name):
                value = getattr(part, name)
                if value.WhichOneof("source") == "reference":
                    most = self.guard.limits.message_bytes
                    value.inline.CopyFrom(self.captures.tensor(value.reference, owner, room, most))
                    return len(value.inline.data)
        return 0


class ModelCalls:
    """The four calls of `ModelService`."""

    def __init__(self, models: Models, client: Spectra, loadable: Loadable) -> None:
        self.models, self.spectra, self.loadable = models, client, loadable

    def handlers(self) -> grpc.GenericRpcHandler:
        """The calls as gRPC wants them."""
        calls = {
            "ListModels": (self.list_models, model_service_pb2.ListModelsRequest),
            "GetModel": (self.get_model, model_service_pb2.GetModelRequest),
            "LoadModel": (self.load_model, model_service_pb2.LoadModelRequest),
            "UnloadModel": (self.unload_model, model_service_pb2.UnloadModelRequest),
        }
        guard = self.spectra.guard
        methods = {name: guard.single(name, *each) for name, each in calls.items()}
        return grpc.method_handlers_generic_handler("vlm_spectra.v1.ModelService", methods)

    def list_models(self, request: Any, context: grpc.ServicerContext) -> bytes:
        """All models, without their hooks."""
        response = model_service_pb2.ListModelsResponse(loadable=self.loadable.names)
        for host in list(self.models.hosts.values()):
            response.models.add().CopyFrom(host.model)
            del response.models[-1].hooks[:]
        return response.SerializeToString()

    def get_model(self, request: model_service_pb2.GetModelRequest, context: grpc.ServicerContext) -> bytes:
        """One model with its hooks."""
        host = self.models.get(request.name)
        response = model_service_pb2.GetModelResponse(model=host.model, local_socket=self.spectra.door.name)
        if request.include_vocabulary:
            if host.vocabulary is None:
                job = self.spectra._submit("Vocabulary", model_service_pb2.GetModelRequest(), request.name, [], context)
                for kind, content in self.spectra._events(host, job, context):
                    if kind == "done":
                        found = model_service_pb2.GetModelResponse.FromString(content)
                        host.vocabulary = list(found.vocabulary)
            response.vocabulary.extend(host.vocabulary or [])
        return response.SerializeToString()

    def load_model(self, request: model_service_pb2.LoadModelRequest, context: grpc.ServicerContext) -> bytes:
        """Start loading a model."""
        if not request.name:
            raise InvalidInputError("name the model to load.", field="name")
        for name in ("name", "device", "attention"):
            if "\0" in getattr(request, name) or len(getattr(request, name)) > LONGEST_NAME:
                raise InvalidInputError(f"{name} is no name: it is too long or has odd characters.", field=name)
        self.loadable.check(request.name)
        if "/" in request.attention:  # to transformers that is a repository, whose code it would fetch and run
            raise InvalidInputError(
                "attention is a name such as sdpa or flash_attention_2; code of the hub is fetched for no client.",
                field="attention",
            )
        context.call.model = request.name  # type: ignore[attr-defined]
        dtype = "" if request.dtype == tensor_pb2.DTYPE_UNSPECIFIED else dtypes.from_wire(request.dtype)
        device = request.device or self.models.device
        host = self.models.load(Loading(request.name, dtype, device, request.attention))
        return model_service_pb2.LoadModelResponse(model=host.model).SerializeToString()

    def unload_model(self, request: model_service_pb2.UnloadModelRequest, context: grpc.ServicerContext) -> bytes:
        """Drop a model."""
        if request.name in self.models.hosts:
            context.call.model = request.name  # type: ignore[attr-defined]
        self.models.unload(request.name, context.is_active)
        return model_service_pb2.UnloadModelResponse().SerializeToString()
