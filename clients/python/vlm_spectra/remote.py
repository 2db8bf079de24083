"""RemoteVLM: the interface of `vlm_spectra.VLM` over the network. Needs neither PyTorch nor transformers."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import grpc
import numpy as np

from . import arrays, scalars, tracing
from .analyses import AttributionOptions, LensOptions, SweepOptions
from .arrays import Array
from .arrays import choose as choose_arrays
from .base import BaseVLM, Hooked
from .cache import ActivationCache
from .calls import CaptureOptions, ForwardOptions, GenerateOptions, TokenLike
from .context import CacheContext
from .cost import Cost
from .errors import (
    BusyError,
    DeadlineError,
    ImageNotFoundError,
    InternalError,
    InvalidInputError,
    SpectraError,
    UnavailableError,
    shown,
)
from .estimate import Estimate
from .hooks import Catalogue
from .info import ModelInfo
from .inputs import Inputs, Prompt
from .network import compression, wire
from .network.checksum import Checksum, Damaged, opened
from .network.local import LocalMemory
from .network.retries import Retries
from .network.secure import TOKEN_VARIABLE, TLSLike, bearer, channel
from .network.status import from_rpc_error
from .network.streams import CapturedTensors, Rest, StreamedTensors, TensorStream, WholeTensors, show
from .progress import Bar
from .results import Answer, ForwardOutput, Generation, Token
from .v1 import inputs_pb2, model_service_pb2, tensor_pb2
from .v1 import spectra_service_pb2 as spb

T = TypeVar("T")

CONNECT_SECONDS = 10.0
"""How long `connect` waits for an address to answer."""
LINGER_SECONDS = 30
"""How long the server goes on with a capture after the connection was lost, for the stream to come back to."""
KEEPALIVE_SECONDS = 20.0
"""After so long without a byte a running call asks whether the connection still is one, and waits as long again."""
MESSAGE_BYTES = 256 << 20
"""The largest message that is taken in; tensors come in chunks far below it."""


class RemoteVLM(BaseVLM):
    """A model behind a server; `vlm_spectra.base.BaseVLM` describes the methods.

    Args:
        address: host:port.
        model: The model's name; the only one where empty.
        arrays: "torch" or "numpy"; by default PyTorch where it is installed.
        timeout: Seconds that any one call may take, at most a day; None for no limit.
        load_timeout: Seconds to wait for a model that is still being loaded.
        shared_memory: Whether captures may be read from the server's memory where it is on this host and allows it.
        token: The token that the server wants; that of the environment's `VLM_SPECTRA_TOKEN` where None.
        tls: True for TLS with the public authorities, a path for those in a PEM file, a `vs.TLS` for a certificate of
            one's own; False sends a token in plain text even over a network.
        retries: How often a call is tried again that the server refused for now, being busy or replacing a worker. A
            generation that has begun to answer never is.

    Raises:
        UnauthenticatedError: The server wants a token, or another one.
        UnavailableError: No server answers there, or the model could not be loaded.
        UnknownModelError: The server holds no such model.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        arrays: str | None = None,
        timeout: float | None = None,
        load_timeout: float = 600.0,
        shared_memory: bool = True,
        token: str | None = None,
        tls: TLSLike = None,
        retries: int = 4,
    ) -> None:
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        named = host and port.isdecimal() and 0 < int(port) < 65536 and not re.search(r"\s|//", host)
        if not named and host != "unix":  # a socket of this machine: unix:PATH
            raise InvalidInputError(f"an address is host:port, not {shown(address)}.", field="address")
        limit, patience, attempts = scalars.real(timeout), scalars.real(load_timeout), scalars.whole(retries)
        if timeout is not None and not 0 < (limit or 0) <= scalars.DAY:
            raise InvalidInputError(
                f"timeout is {shown(timeout)}; possible are seconds above 0 and at most {scalars.DAY}, or None.",
                field="timeout",
            )
        if patience is None or not patience >= 0:
            raise InvalidInputError(
                f"load_timeout is {shown(load_timeout)}; possible are seconds from 0.", field="load_timeout"
            )
        if attempts is None or attempts < 0:
            raise InvalidInputError(f"retries is {shown(retries)}; possible are whole numbers from 0.", field="retries")
        self.address = address
        self._arrays = choose_arrays(arrays)
        self._timeout = limit
        self._retries = attempts
        token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        self._metadata = (("x-vlm-spectra-client", uuid.uuid4().hex), *bearer(token))
        self._own_channel = channel(
            address,
            tls,
            token,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", -1),  # what is too large the server says
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", int(CONNECT_SECONDS * 1000)),  # that one attempt to connect may take
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
                ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_SECONDS * 1000)),
            ],
        )
        tracing.begin("vlm-spectra-client")
        self._process = os.getpid()
        self._sealed = False
        """Whether the last answer had a checksum: the server is one that sends them."""
        self._vocabulary: list[str] | None = None
        self._speed: float | None = None
        self._memory: LocalMemory | None = None
        try:
            found, socket = self._describe(scalars.text(model, "model"), patience)
        except BaseException:
            self._own_channel.close()
            raise
        if shared_memory:
            self._memory = LocalMemory.at(socket)
        self._info = wire.info_from_wire(found.name, found.info)
        self._catalogue = Catalogue([wire.hook_from_wire(hook) for hook in found.hooks], found.info.family)

    def _describe(self, name: str, load_timeout: float) -> tuple[model_service_pb2.Model, str]:
        end = time.monotonic() + load_timeout
        request = model_service_pb2.GetModelRequest(name=name)
        while True:
            try:
                response = self._unary(
                    "ModelService/GetModel", request, model_service_pb2.GetModelResponse, CONNECT_SECONDS
                )
            except DeadlineError as error:
                raise UnavailableError(
                    f"no server answers at {self.address} within {CONNECT_SECONDS:.0f} s; is the address right?"
                ) from error
            model = response.model
            if model.state == model_service_pb2.MODEL_STATE_READY:
                return model, response.local_socket
            if model.state == model_service_pb2.MODEL_STATE_FAILED:
                raise UnavailableError(f"the model {model.name!r} could not be loaded: {model.error}")
            if time.monotonic() > end:
                raise UnavailableError(
                    f"the model {model.name!r} is still being loaded after {load_timeout:.0f} s.", retry_after=10.0
                )
            time.sleep(0.2)

    def close(self) -> None:
        """Close the connection; running calls end."""
        self._own_channel.close()

    @property
    def _channel(self) -> grpc.Channel:
        if os.getpid() != self._process:
            raise UnavailableError(
                f"this connection to {self.address} is another process's, and a fork cannot share it; connect in each "
                "process (in a data loader, in its worker_init_fn)."
            )
        return self._own_channel

    def __repr__(self) -> str:
        return f"RemoteVLM({self._info.name!r} at {self.address})"

    @property
    def info(self) -> ModelInfo:
        """The model's sizes and names."""
        return self._info

    @property
    def catalogue(self) -> Catalogue:
        """The model's hooks."""
        return self._catalogue

    def _unary(self, method: str, request: Any, response: type[T], timeout: float | None = None) -> T:
        call: Any = self._channel.unary_unary(
            f"/vlm_spectra.v1.{method}",
            request_serializer=lambda message: message.SerializeToString(),
        )
        retries = Retries(self._retries, timeout or self._timeout)
        with self._span(method).whole() as span:
            while True:
                try:
                    data = call(request, timeout=retries.left, metadata=(*self._metadata, *span.headers))
                    message: Any = opened(response, data, self._sealed)
                    self._sealed = message.HasField("crc32c")
                    answer: T = message
                    return answer
                except Damaged as damage:
                    raise InternalError(str(damage)) from None
                except grpc.RpcError as rpc_error:
                    error = from_rpc_error(rpc_error, self.address)
                    if not retries.wait(error):
                        raise error from None
                    span.event("retry", {"error.type": error.reason})
                except ValueError as closed:
                    raise UnavailableError(f"the connection to {self.address} is closed.") from closed

    def _span(self, method: str) -> tracing.Span:
        """A call in a trace, whatever it takes to carry it out."""
        service, name = method.split("/")
        host, port = self.address.rsplit(":", 1)
        called = {"rpc.system": "grpc", "rpc.service": f"vlm_spectra.v1.{service}", "rpc.method": name}
        return tracing.start(
            f"vlm_spectra.v1.{method}", "client", {**called, "server.address": host, "server.port": port}
        )

    def _call(
        self, method: str, request: Any, span: tracing.Span = tracing.NONE, attempts: Retries | None = None
    ) -> Any:
        """A streaming call; its responses come encoded, and have the same numbers of fields for every method.

        It has what is left of the timeout of all its attempts, where there are others.
        """
        call: Any = self._channel.unary_stream(
            f"/vlm_spectra.v1.SpectraService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
        )
        try:
            timeout = self._timeout if attempts is None else attempts.left
            return call(request, timeout=timeout, metadata=(*self._metadata, *span.headers))
        except ValueError as error:
            raise UnavailableError(f"the connection to {self.address} is closed.") from error

    def _open(
        self,
        method: str,
        request: Any,
        prompts: Sequence[Prompt],
        on_token: Callable[[Token], None] = lambda token: None,
        title: str = "",
    ) -> TensorStream:
        """A stream whose tensors are announced. Images that the server no longer has are sent again."""
        span, retries, rest = self._span(f"SpectraService/{method}"), Retries(self._retries, self._timeout), None
        if method == "RunWithCache":
            resume = partial(self._resume, span=span, attempts=retries)
            rest = Rest(resume, partial(self._release, span=span), self._memory)
        try:
            with span.active():
                stream = self._opened(
                    method,
                    request,
                    prompts,
                    span,
                    retries,
                    partial(
                        TensorStream,
                        address=self.address,
                        kind=self._arrays,
                        on_token=on_token,
                        title=title,
                        rest=rest,
                        report=self._frame().report,
                    ),
                )
        except BaseException as error:
            span.end(error)
            raise
        stream.when_ended(span.end)
        return stream

    def _opened(
        self,
        method: str,
        request: Any,
        prompts: Sequence[Prompt],
        span: tracing.Span,
        retries: Retries,
        read: Callable[[Any], TensorStream],
    ) -> TensorStream:
        sent = False
        while True:
            stream = read(self._call(method, request, span, retries))
            try:
                stream.wait_until_announced()
                return stream
            except ImageNotFoundError:
                if sent:
                    raise
                self._send_prompts(prompts, retries.left)
                sent = True
            except BaseException as error:
                stream.cancel()
                if not isinstance(error, SpectraError) or stream.answering or not retries.wait(error):
                    raise
                span.event("retry", {"error.type": error.reason})

    def _resume(
        self,
        capture_id: str,
        offsets: dict[int, int],
        span: tracing.Span = tracing.NONE,
        attempts: Retries | None = None,
    ) -> Any:
        have = [spb.TensorOffset(index=index, offset=offset) for index, offset in offsets.items()]
        resume = spb.CaptureResume(capture_id=capture_id, offsets=have, shared_memory=self._memory is not None)
        span.event("resume")
        return self._call("RunWithCache", spb.RunWithCacheRequest(resume=resume), span, attempts)

    def _release(self, capture_id: str, span: tracing.Span = tracing.NONE) -> None:
        """Tell the server, without waiting for its answer."""
        with contextlib.suppress(ValueError, UnavailableError):  # the channel is closed, or another process's
            call: Any = self._channel.unary_unary(
                "/vlm_spectra.v1.SpectraService/ReleaseCapture",
                request_serializer=lambda message: message.SerializeToString(),
            )
            request = spb.ReleaseCaptureRequest(capture_id=capture_id)
            answer = call.future(request, timeout=5.0, metadata=(*self._metadata, *span.headers))
            answer.add_done_callback(lambda _: None)  # keeps the call alive: one that nobody holds is cancelled

    def _send_prompts(self, prompts: Sequence[Prompt], timeout: float | None = None) -> spb.PrepareResponse:
        """Prepare prompts on the server; each image crosses the wire only if the server asks for it."""
        pictures = {picture.sha256: picture for prompt in prompts for picture in prompt.images}
        request = spb.PrepareRequest(model=self._model, prompts=wire.prompts_to_wire(prompts))
        response = self._unary("SpectraService/Prepare", request, spb.PrepareResponse, timeout)
        sends = 3 * len(pictures)  # other clients' images may push one out again before the last is there
        while response.missing_images:
            sends -= 1
            if sends < 0:
                raise BusyError("the server's room for images is contended (kept_images_mb); try again.", retry_after=1)
            sha256 = response.missing_images[0]
            del request.images[:]
            request.images.append(inputs_pb2.Image(sha256=sha256, data=pictures[sha256].data))
            response = self._unary("SpectraService/Prepare", request, spb.PrepareResponse, timeout)
        return response

    @property
    def _model(self) -> str:
        return self._info.name

    def _prepare(self, prompts: tuple[Prompt, ...]) -> Inputs:
        response = self._send_prompts(prompts)
        ids = np.array([list(row.input_ids) for row in response.rows], dtype=np.int64)
        mask = np.array([list(row.attention_mask) for row in response.rows], dtype=np.int64)
        return Inputs(
            prompts=prompts,
            input_ids=arrays.convert(ids, self._arrays),
            attention_mask=arrays.convert(mask, self._arrays),
            token_labels=[list(row.token_labels) for row in response.rows],
            images=tuple(wire.layout_from_wire(image) for image in response.images),
            text=[row.text for row in response.rows],
        )

    def _asked(self, inputs: Inputs, interventions: Hooked) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompts": wire.prompts_to_wire(inputs.prompts),
            "interventions": wire.interventions_to_wire(interventions),
        }

    def _forward(
        self,
        inputs: Inputs,
        options: ForwardOptions,
        interventions: Hooked,
        capture: CaptureOptions | None,
        cache: ActivationCache | None,
    ) -> ForwardOutput:
        asked = self._asked(inputs, interventions)
        if capture is None or cache is None:
            if options == ForwardOptions(logits_to_keep=None):
                return ForwardOutput({}, self._texts)
            request: Any = spb.ForwardRequest(options=wire.forward_to_wire(options), **asked)
            stream = self._open("Forward", request, inputs.prompts, title="forward")
            return ForwardOutput(StreamedTensors(stream, lambda name: True), self._texts)
        request = self._capturing(capture, forward=wire.forward_to_wire(options), **asked)
        stream = self._open("RunWithCache", request, inputs.prompts, title="forward")
        hooks = self._fill(cache, stream, inputs, capture, inputs.token_labels)
        return ForwardOutput(StreamedTensors(stream, lambda name: name not in hooks), self._texts)

    def _capturing(self, capture: CaptureOptions, **asked: Any) -> spb.RunWithCacheRequest:
        if (memory := self._memory) is not None and not memory.answers():  # the server was started anew
            self._memory = LocalMemory.at(self._describe(self._model, CONNECT_SECONDS)[1])
        selection = wire.selection_to_wire(capture)
        if compression.worthwhile(capture.compression, self._speed) and self._memory is None:
            selection.compression = tensor_pb2.COMPRESSION_ZSTD
        target = capture.backward_from
        run = spb.CaptureRun(
            selection=selection,
            backward_from=None if target is None else wire.target_to_wire(target),
            linger_seconds=LINGER_SECONDS,
            shared_memory=self._memory is not None,
            **asked,
        )
        return spb.RunWithCacheRequest(run=run)

    def _fill(
        self,
        cache: ActivationCache,
        stream: TensorStream,
        inputs: Inputs,
        capture: CaptureOptions,
        labels: list[list[str]],
    ) -> set[str]:
        hooks = self.catalogue.expand(capture.hooks, capture=True)
        context = CacheContext.of(inputs, labels, capture, self, stream.header.capture_id)
        cache._fill(CapturedTensors(stream, hooks, self._measured), context)
        return set(hooks)

    def _estimate(self, inputs: Inputs, capture: CaptureOptions) -> Estimate:
        run = spb.CaptureRun(
            selection=wire.selection_to_wire(capture), forward=spb.ForwardOptions(), **self._asked(inputs, ())
        )
        for last in (False, True):
            try:
                found = self._unary("SpectraService/Estimate", spb.EstimateRequest(run=run), spb.EstimateResponse)
                break
            except ImageNotFoundError:
                if last:
                    raise
                self._send_prompts(inputs.prompts)
        seconds = found.compute_seconds if found.HasField("compute_seconds") else None
        shapes = {tensor.name: tuple(tensor.shape) for tensor in found.tensors}
        if self._memory is not None:
            transfer: float | None = 0.0
        else:
            transfer = None if self._speed is None else found.byte_count / self._speed
        return Estimate(shapes, found.byte_count, seconds, transfer)

    def _generate(
        self,
        inputs: Inputs,
        options: GenerateOptions,
        interventions: Hooked,
        capture: CaptureOptions | None,
        cache: ActivationCache | None,
    ) -> Generation:
        asked, wanted = self._asked(inputs, interventions), wire.generate_to_wire(options)
        answer = Answer(len(inputs))
        if capture is None or cache is None:
            request: Any = spb.GenerateRequest(options=wanted, **asked)
            stream = self._open("Generate", request, inputs.prompts, answer.add, "generate")
            tensors: Mapping[str, Array] = StreamedTensors(stream, lambda name: True)
        else:
            request = self._capturing(capture, generate=wanted, **asked)
            stream = self._open("RunWithCache", request, inputs.prompts, answer.add, "generate")
            hooks = self._fill(cache, stream, inputs, capture, answer.labels(inputs))
            tensors = StreamedTensors(stream, lambda name: name not in hooks)
        return answer.generation(inputs, tensors, self._info.coordinates)

    def _stream(self, inputs: Inputs, options: GenerateOptions, interventions: Hooked) -> Iterator[Token]:
        request = spb.GenerateRequest(options=wire.generate_to_wire(options), **self._asked(inputs, interventions))
        span, failed = self._span("SpectraService/Generate"), None
        try:
            yield from self._tokens(request, inputs.prompts, span)
        except Exception as error:
            failed = error
            raise
        finally:
            span.end(failed)

    def _tokens(self, request: spb.GenerateRequest, prompts: Sequence[Prompt], span: tracing.Span) -> Iterator[Token]:
        retries, sent, answering = Retries(self._retries, self._timeout), False, False
        bar = Bar("", self._frame().report)
        while True:
            call, checksum, request_id = self._call("Generate", request, span, retries), Checksum(), ""
            try:
                for encoded in call:
                    kind, message = checksum.event(spb.GenerateResponse, encoded)
                    if kind == "header":
                        request_id = message.header.request_id
                    elif kind == "progress":
                        show(bar, message.progress)
                    elif kind == "token":
                        token, answering = message.token, True
                        yield Token(token.row, token.index, token.id, token.text, token.logprob)
                    elif kind == "summary":
                        return
                cut = f"the server at {self.address} ended the stream before its end."
                raise UnavailableError(cut, request_id=request_id)
            except Damaged as damage:
                raise InternalError(str(damage), request_id=request_id) from None
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, self.address)
                error.request_id = error.request_id or request_id
                if isinstance(error, ImageNotFoundError) and not sent:
                    with span.active():
                        self._send_prompts(prompts, retries.left)
                    sent = True
                elif answering or not retries.wait(error):
                    raise error from None
                else:
                    span.event("retry", {"error.type": error.reason})
            finally:
                call.cancel()

    def _measured(self, stream: TensorStream) -> None:
        self._speed = stream.speed or self._speed

    def _all(
        self,
        method: str,
        request: Any,
        prompts: Sequence[Prompt],
        title: str = "",
        on_tensor: Callable[[str, Array], None] = lambda name, tensor: None,
    ) -> WholeTensors:
        """All tensors of a call; each is handed over as it comes, in the order of the header."""
        stream, found = self._open(method, request, prompts, title=title), WholeTensors()
        try:
            for name in stream.names:
                found[name] = stream.get(name)
                on_tensor(name, found[name])
            found.cost = stream.cost
        except BaseException:
            stream.cancel()
            raise
        return found

    def _analysis(
        self,
        method: str,
        request: Any,
        prompts: Sequence[Prompt],
        title: str,
        on_tensor: Callable[[str, Array], None] = lambda name, tensor: None,
    ) -> WholeTensors:
        """All tensors of an analysis. It is told in tokens, and their texts are there before it begins: a server that
        is stopping lets it end, but takes no call after it.
        """
        self._texts(())
        return self._all(method, request, prompts, title, on_tensor)

    def _lens(self, inputs: Inputs, options: LensOptions, interventions: Hooked) -> Mapping[str, Array]:
        request = spb.LogitLensRequest(**self._asked(inputs, interventions), **wire.lens_to_wire(options))
        return self._analysis("LogitLens", request, inputs.prompts, "logit lens")

    def _attribute(self, inputs: Inputs, options: AttributionOptions, interventions: Hooked) -> Mapping[str, Array]:
        request = spb.AttributeRequest(**self._asked(inputs, interventions), **wire.attribution_to_wire(options))
        second = () if options.against is None else options.against.prompts
        return self._analysis("Attribute", request, (*inputs.prompts, *second), "attribution")

    def _sweep(
        self,
        clean: Inputs,
        corrupted: Inputs,
        options: SweepOptions,
        interventions: Hooked,
        on_tensor: Callable[[str, Array], None],
    ) -> Cost | None:
        second = wire.prompts_to_wire(corrupted.prompts)
        fields = self._asked(clean, interventions) | wire.sweep_to_wire(options)
        request = spb.PatchSweepRequest(corrupted=second, **fields)
        prompts = (*clean.prompts, *corrupted.prompts)
        return self._analysis("PatchSweep", request, prompts, "patch sweep", on_tensor).cost

    def _unembed(self, tokens: tuple[TokenLike, ...]) -> Array:
        request = spb.GetUnembeddingRequest(model=self._model, tokens=[wire.token_to_wire(token) for token in tokens])
        return self._all("GetUnembedding", request, ())["directions"]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        if self._vocabulary is None:
            request = model_service_pb2.GetModelRequest(name=self._model, include_vocabulary=True)
            response = self._unary("ModelService/GetModel", request, model_service_pb2.GetModelResponse)
            self._vocabulary = list(response.vocabulary)
        return [self._vocabulary[int(token)] for token in ids]


connect = RemoteVLM
"""Connect to a server's model."""
