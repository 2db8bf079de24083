"""The contract's services: requests to jobs, jobs to streams of messages."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import google_crc32c
import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status
from vlm_spectra import dtypes
from vlm_spectra.errors import DeadlineError, InternalError, InvalidInputError, SpectraError, UnknownModelError
from vlm_spectra.status import to_status
from vlm_spectra.v1 import model_service_pb2, stream_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb

from .host import Job, Loading, ModelHost
from .stores import CaptureStore, ImageStore, StoredCapture

log = logging.getLogger("vlm_spectra.server")

CHUNK = 1 << 20
"""Bytes of a chunk: the fastest size for one stream of grpcio's."""
CLIENT_HEADER = "x-vlm-spectra-client"
"""Metadata by which a client names itself, for fair turns."""


class Models:
    """The models a server holds, by name.

    Args:
        limit: The most bytes of tensors that one request may take.
        queue_bound: The most requests that may wait for one model.
    """

    def __init__(self, limit: int, queue_bound: int) -> None:
        self.limit, self.queue_bound = limit, queue_bound
        self.hosts: dict[str, ModelHost] = {}
        self._lock = threading.Lock()

    def load(self, loading: Loading) -> ModelHost:
        """Start loading a model; one that is loaded or loading stays as it is."""
        with self._lock:
            host = self.hosts.get(loading.name)
            if host is None or host.model.state == model_service_pb2.MODEL_STATE_FAILED:
                host = self.hosts[loading.name] = ModelHost(loading, self.limit, self.queue_bound)
            return host

    def get(self, name: str) -> ModelHost:
        """A model by name; the only one where the name is empty.

        Raises:
            UnknownModelError: There is none of that name, or a name is needed.
        """
        if not name and len(self.hosts) == 1:
            return next(iter(self.hosts.values()))
        if name not in self.hosts:
            held = ", ".join(map(repr, self.hosts)) or "none"
            asked = f"no model {name!r}" if name else "several models, and the request names none"
            raise UnknownModelError(f"this server has {asked}; it holds {held}.", field="model")
        return self.hosts[name]

    def unload(self, name: str) -> None:
        """Drop a model."""
        if not name:
            raise InvalidInputError("name the model to unload.", field="name")
        host = self.get(name)
        with self._lock:
            self.hosts.pop(name, None)
        host.close()

    def close(self) -> None:
        """Drop all models."""
        for host in list(self.hosts.values()):
            host.close()


class Spectra:
    """The seven calls of `SpectraService`."""

    def __init__(self, models: Models, images: ImageStore, captures: CaptureStore) -> None:
        self.models, self.images, self.captures = models, images, captures
        self._numbers = itertools.count(1)
        self._prefix = uuid.uuid4().hex[:6]

    def handlers(self) -> grpc.GenericRpcHandler:
        """The calls as gRPC wants them; responses are bytes already."""
        streams = {
            "Generate": spb.GenerateRequest,
            "Forward": spb.ForwardRequest,
            "RunWithCache": spb.RunWithCacheRequest,
            "LogitLens": spb.LogitLensRequest,
            "Attribute": spb.AttributeRequest,
            "GetUnembedding": spb.GetUnembeddingRequest,
        }
        methods = {name: _streaming(self._stream(name), request) for name, request in streams.items()}
        methods["Prepare"] = _single(self.prepare, spb.PrepareRequest)
        return grpc.method_handlers_generic_handler("vlm_spectra.v1.SpectraService", methods)

    def prepare(self, request: spb.PrepareRequest, context: grpc.ServicerContext) -> bytes:
        """`Prepare`: takes images, asks for those that are missing, and lets the worker format and tokenize."""
        for image in request.images:
            self.images.add(image)
        hashes = [image for prompt in request.prompts for image in prompt.images]
        missing = self.images.missing(hashes)
        if missing:
            return spb.PrepareResponse(missing_images=missing).SerializeToString()
        del request.images[:]
        job = self._submit("Prepare", request, request.model, hashes, context)
        for kind, content in self._events(self.models.get(request.model), job, context):
            if kind == "done":
                return content  # type: ignore[no-any-return]
        raise InternalError("the worker gave no answer.")

    def _submit(self, method: str, request: Any, model: str, hashes: list[str], context: grpc.ServicerContext) -> Job:
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineError("the time given was over before the request began.")
        deadline = None if remaining is None or remaining > 1e8 else time.time() + remaining
        client = dict(context.invocation_metadata()).get(CLIENT_HEADER) or context.peer()
        host = self.models.get(model)
        job = host.submit(str(client), method, request.SerializeToString(), self.images.get(hashes), deadline)
        if not context.add_callback(lambda: host.cancel(job)):
            host.cancel(job)
        return job

    def _events(self, host: ModelHost, job: Job, context: grpc.ServicerContext) -> Iterator[tuple[str, Any]]:
        """What happens to a job, to its end; ends the job when the reader leaves."""
        try:
            while True:
                try:
                    kind, content = job.events.get(timeout=1.0)
                except queue.Empty:
                    if not context.is_active():
                        return
                    continue
                if kind == "error":
                    raise content
                yield kind, content
                if kind == "done":
                    return
        finally:
            host.cancel(job)

    def _stream(self, method: str) -> Callable[[Any, grpc.ServicerContext], Iterator[bytes]]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            if method == "RunWithCache":
                kind = request.WhichOneof("start")
                if kind == "resume":
                    yield from self._resume(request.resume)
                    return
                if kind is None:
                    raise InvalidInputError("the request has neither a run nor a capture to resume.", field="start")
            yield from self._run(method, request, request.run if method == "RunWithCache" else request, context)

        return call

    def _run(self, method: str, request: Any, body: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        arrived = time.perf_counter()
        for intervention in getattr(body, "interventions", ()):
            self._inline(intervention)
        host = self.models.get(body.model)
        request_id = f"{self._prefix}-{next(self._numbers)}"
        context.request_id = request_id  # type: ignore[attr-defined]
        hashes = [image for prompt in getattr(body, "prompts", ()) for image in prompt.images]
        job = self._submit(method, request, body.model, hashes, context)
        capture_id = uuid.uuid4().hex if method == "RunWithCache" else ""
        base = {"request_id": request_id, "model": host.loading.name, "revision": host.model.info.revision}
        sent, first_chunk = 0, 0.0
        for kind, content in self._events(host, job, context):
            if kind == "started":
                yield _event(header=stream_pb2.Header(capture_id=capture_id, **base))
            elif kind == "event":
                yield content
            elif kind == "tensors":
                yield _event(header=stream_pb2.Header(capture_id=capture_id, tensors=content, **base))
            elif kind == "tensor":
                for chunk in _chunks(content, job.tensors[content][1], 0):
                    first_chunk = first_chunk or time.perf_counter()
                    yield chunk
                sent += 1
            elif kind == "done":
                summary = stream_pb2.Summary.FromString(content)
                summary.tensor_count, summary.capture_id = sent, capture_id
                summary.byte_count = sum(header.byte_count for header, _ in job.tensors.values())
                summary.timings.queue = job.started - job.submitted
                summary.timings.first_chunk = first_chunk - job.started if first_chunk else 0.0
                summary.timings.total = time.perf_counter() - arrived
                message = _event(summary=summary)
                if capture_id:
                    self.captures.add(capture_id, StoredCapture(job.tensors, message))
                log.info(
                    "%s %s: %d tensors, %.1f MB, waited %.2f s, computed %.2f s, %.2f s in all",
                    request_id,
                    method,
                    sent,
                    summary.byte_count / 1e6,
                    summary.timings.queue,
                    summary.timings.compute,
                    summary.timings.total,
                )
                yield message

    def _resume(self, request: spb.CaptureResume) -> Iterator[bytes]:
        capture = self.captures.get(request.capture_id)
        offsets = {item.index: item.offset for item in request.offsets} or dict.fromkeys(capture.tensors, 0)
        unknown = [index for index in offsets if index not in capture.tensors]
        if unknown:
            raise InvalidInputError(f"the capture has no tensor {unknown[0]}.", field="offsets")
        headers = [capture.tensors[index][0] for index in offsets]
        yield _event(header=stream_pb2.Header(capture_id=request.capture_id, tensors=headers))
        for index, offset in offsets.items():
            yield from _chunks(index, capture.tensors[index][1], offset)
        yield capture.summary

    def _inline(self, intervention: Any) -> None:
        """Put the values of a capture's activation in the place of a reference to it."""
        kind = intervention.WhichOneof("kind")
        part = getattr(intervention, kind) if kind else None
        for name in ("value", "direction", "mask"):
            if part is not None and name in part.DESCRIPTOR.fields_by_name and part.HasField(name):
                value = getattr(part, name)
                if value.WhichOneof("source") == "reference":
                    value.inline.CopyFrom(self.captures.tensor(value.reference))


class ModelCalls:
    """The four calls of `ModelService`."""

    def __init__(self, models: Models, client: Spectra) -> None:
        self.models, self.spectra = models, client

    def handlers(self) -> grpc.GenericRpcHandler:
        """The calls as gRPC wants them."""
        methods = {
            "ListModels": _single(self.list_models, model_service_pb2.ListModelsRequest),
            "GetModel": _single(self.get_model, model_service_pb2.GetModelRequest),
            "LoadModel": _single(self.load_model, model_service_pb2.LoadModelRequest),
            "UnloadModel": _single(self.unload_model, model_service_pb2.UnloadModelRequest),
        }
        return grpc.method_handlers_generic_handler("vlm_spectra.v1.ModelService", methods)

    def list_models(self, request: Any, context: grpc.ServicerContext) -> bytes:
        """All models, without their hooks."""
        response = model_service_pb2.ListModelsResponse()
        for host in list(self.models.hosts.values()):
            response.models.add().CopyFrom(host.model)
            del response.models[-1].hooks[:]
        return response.SerializeToString()

    def get_model(self, request: model_service_pb2.GetModelRequest, context: grpc.ServicerContext) -> bytes:
        """One model with its hooks."""
        host = self.models.get(request.name)
        response = model_service_pb2.GetModelResponse(model=host.model)
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
        dtype = "" if request.dtype == tensor_pb2.DTYPE_UNSPECIFIED else dtypes.from_wire(request.dtype)
        host = self.models.load(Loading(request.name, dtype, request.device, request.attention))
        return model_service_pb2.LoadModelResponse(model=host.model).SerializeToString()

    def unload_model(self, request: model_service_pb2.UnloadModelRequest, context: grpc.ServicerContext) -> bytes:
        """Drop a model."""
        self.models.unload(request.name)
        return model_service_pb2.UnloadModelResponse().SerializeToString()


def _event(**event: Any) -> bytes:
    """A response message; its fields have the same numbers in every streaming response of the contract."""
    return spb.RunWithCacheResponse(**event).SerializeToString()


def _chunks(index: int, memory: memoryview, offset: int) -> Iterator[bytes]:
    for start in range(offset, len(memory), CHUNK):
        data = bytes(memory[start : start + CHUNK])
        crc = google_crc32c.value(data)
        yield _event(chunk=tensor_pb2.TensorChunk(index=index, offset=start, crc32c=crc, data=data))


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    request_id = getattr(context, "request_id", "")
    if not isinstance(error, SpectraError):
        log.exception("%s failed", request_id or "a request")
        error = InternalError(f"the server failed on this request: {type(error).__name__}: {error}")
    else:
        log.info("%s refused: %s", request_id or "request", error)
    context.abort_with_status(rpc_status.to_status(to_status(error, request_id)))


def _single(call: Callable[..., bytes], request: type[Message]) -> grpc.RpcMethodHandler:
    def guarded(message: Any, context: grpc.ServicerContext) -> bytes:
        try:
            return call(message, context)
        except Exception as error:
            _abort(context, error)
            raise AssertionError from error

    return grpc.unary_unary_rpc_method_handler(guarded, request_deserializer=request.FromString)


def _streaming(call: Callable[..., Iterator[bytes]], request: type[Message]) -> grpc.RpcMethodHandler:
    def guarded(message: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from call(message, context)
        except Exception as error:
            _abort(context, error)

    return grpc.unary_stream_rpc_method_handler(guarded, request_deserializer=request.FromString)
