"""RemoteVLM: the interface of `vlm_spectra.VLM` over the network. Needs neither PyTorch nor transformers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np

from . import arrays, wire
from .arrays import Array
from .arrays import choose as choose_arrays
from .base import AttributionOptions, BaseVLM, Hooked, LensOptions
from .cache import ActivationCache, CacheContext
from .calls import CaptureOptions, ForwardOptions, GenerateOptions, TokenLike
from .errors import DeadlineError, ImageNotFoundError, InvalidInputError, UnavailableError
from .hooks import Catalogue
from .info import ModelInfo
from .inputs import Inputs, Prompt
from .results import Answer, ForwardOutput, Generation, Token
from .status import from_rpc_error
from .streams import CapturedTensors, StreamedTensors, TensorStream
from .v1 import inputs_pb2, model_service_pb2
from .v1 import spectra_service_pb2 as spb

T = TypeVar("T")

CONNECT_SECONDS = 10.0
"""How long `connect` waits for an address to answer."""
MESSAGE_BYTES = 256 << 20
"""The largest message either side takes; tensors come in chunks far below it."""


def connect(
    address: str,
    *,
    model: str = "",
    arrays: str | None = None,
    timeout: float | None = None,
    load_timeout: float = 600.0,
) -> RemoteVLM:
    """Connect to a server's model.

    Args:
        address: host:port.
        model: The model's name; the only one where empty.
        arrays: "torch" or "numpy"; by default PyTorch where it is installed.
        timeout: Seconds that any one call may take; None for no limit.
        load_timeout: Seconds to wait for a model that is still being loaded.

    Raises:
        UnavailableError: No server answers there, or the model could not be loaded.
        UnknownModelError: The server holds no such model.
    """
    return RemoteVLM(address, model=model, arrays=arrays, timeout=timeout, load_timeout=load_timeout)


class RemoteVLM(BaseVLM):
    """A model behind a server; `vlm_spectra.base.BaseVLM` describes the methods, `connect` the arguments."""

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        arrays: str | None = None,
        timeout: float | None = None,
        load_timeout: float = 600.0,
    ) -> None:
        if not isinstance(address, str) or ":" not in address:
            raise InvalidInputError(f"an address is host:port, not {address!r}.", field="address")
        self.address = address
        self._arrays = choose_arrays(arrays)
        self._timeout = timeout
        self._metadata = (("x-vlm-spectra-client", uuid.uuid4().hex),)
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", MESSAGE_BYTES),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._vocabulary: list[str] | None = None
        try:
            found = self._describe(model, load_timeout)
        except BaseException:
            self._channel.close()
            raise
        self._info = wire.info_from_wire(found.name, found.info)
        self._catalogue = Catalogue([wire.hook_from_wire(hook) for hook in found.hooks], found.info.family)

    def _describe(self, name: str, load_timeout: float) -> model_service_pb2.Model:
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
                return model
            if model.state == model_service_pb2.MODEL_STATE_FAILED:
                raise UnavailableError(f"the model {model.name!r} could not be loaded: {model.error}")
            if time.monotonic() > end:
                raise UnavailableError(
                    f"the model {model.name!r} is still being loaded after {load_timeout:.0f} s.", retry_after=10.0
                )
            time.sleep(0.2)

    def close(self) -> None:
        """Close the connection; running calls end."""
        self._channel.close()

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
            response_deserializer=response.FromString,  # type: ignore[attr-defined]
        )
        try:
            result: T = call(request, timeout=timeout or self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from None
        except ValueError as error:
            raise UnavailableError(f"the connection to {self.address} is closed.") from error
        return result

    def _call(self, method: str, request: Any, response: Any) -> Any:
        call: Any = self._channel.unary_stream(
            f"/vlm_spectra.v1.SpectraService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        try:
            return call(request, timeout=self._timeout, metadata=self._metadata)
        except ValueError as error:
            raise UnavailableError(f"the connection to {self.address} is closed.") from error

    def _open(
        self,
        method: str,
        request: Any,
        response: Any,
        prompts: Sequence[Prompt],
        on_token: Callable[[Token], None] = lambda token: None,
        title: str = "",
    ) -> TensorStream:
        """A stream whose tensors are announced. Images that the server no longer has are sent again."""
        for last in (False, True):
            stream = TensorStream(self._call(method, request, response), self.address, self._arrays, on_token, title)
            try:
                stream.wait_until_announced()
            except ImageNotFoundError:
                if last:
                    raise
                self._send_prompts(prompts)
            except BaseException:
                stream.cancel()
                raise
            else:
                return stream
        raise AssertionError

    def _send_prompts(self, prompts: Sequence[Prompt]) -> spb.PrepareResponse:
        """Prepare prompts on the server; each image crosses the wire only if the server asks for it."""
        pictures = {picture.sha256: picture for prompt in prompts for picture in prompt.images}
        request = spb.PrepareRequest(model=self._model, prompts=wire.prompts_to_wire(prompts))
        response = self._unary("SpectraService/Prepare", request, spb.PrepareResponse)
        while response.missing_images:
            sha256 = response.missing_images[0]
            del request.images[:]
            request.images.append(inputs_pb2.Image(sha256=sha256, data=pictures[sha256].data))
            response = self._unary("SpectraService/Prepare", request, spb.PrepareResponse)
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
            stream = self._open("Forward", request, spb.ForwardResponse, inputs.prompts, title="forward")
            return ForwardOutput(StreamedTensors(stream, lambda name: True), self._texts)
        run = spb.CaptureRun(selection=wire.selection_to_wire(capture), forward=wire.forward_to_wire(options), **asked)
        request = spb.RunWithCacheRequest(run=run)
        stream = self._open("RunWithCache", request, spb.RunWithCacheResponse, inputs.prompts, title="forward")
        hooks = self._fill(cache, stream, inputs, capture, inputs.token_labels)
        return ForwardOutput(StreamedTensors(stream, lambda name: name not in hooks), self._texts)

    def _fill(
        self,
        cache: ActivationCache,
        stream: TensorStream,
        inputs: Inputs,
        capture: CaptureOptions,
        labels: list[list[str]],
    ) -> set[str]:
        hooks = self.catalogue.expand(capture.hooks, capture=True)
        model = f"{self._info.name}@{self._info.revision}"
        context = CacheContext.of(inputs, labels, capture, model, stream.header.capture_id)
        cache._fill(CapturedTensors(stream, hooks), context)
        return set(hooks)

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
            stream = self._open("Generate", request, spb.GenerateResponse, inputs.prompts, answer.add, "generate")
            tensors: Mapping[str, Array] = StreamedTensors(stream, lambda name: True)
        else:
            run = spb.CaptureRun(selection=wire.selection_to_wire(capture), generate=wanted, **asked)
            request = spb.RunWithCacheRequest(run=run)
            stream = self._open(
                "RunWithCache", request, spb.RunWithCacheResponse, inputs.prompts, answer.add, "generate"
            )
            hooks = self._fill(cache, stream, inputs, capture, answer.labels(inputs))
            tensors = StreamedTensors(stream, lambda name: name not in hooks)
        return answer.generation(inputs, tensors, self._info.coordinates)

    def _stream(self, inputs: Inputs, options: GenerateOptions, interventions: Hooked) -> Iterator[Token]:
        request = spb.GenerateRequest(options=wire.generate_to_wire(options), **self._asked(inputs, interventions))
        for last in (False, True):
            call = self._call("Generate", request, spb.GenerateResponse)
            try:
                for message in call:
                    if message.WhichOneof("event") == "token":
                        token = message.token
                        yield Token(token.row, token.index, token.id, token.text, token.logprob)
                return
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, self.address)
                if last or not isinstance(error, ImageNotFoundError):
                    raise error from None
                self._send_prompts(inputs.prompts)
            finally:
                call.cancel()

    def _all(self, method: str, request: Any, response: Any, prompts: Sequence[Prompt]) -> dict[str, Array]:
        stream = self._open(method, request, response, prompts, title=method)
        try:
            stream.wait()
        except BaseException:
            stream.cancel()
            raise
        return {name: stream.get(name) for name in stream.names}

    def _lens(self, inputs: Inputs, options: LensOptions, interventions: Hooked) -> Mapping[str, Array]:
        request = spb.LogitLensRequest(**self._asked(inputs, interventions), **wire.lens_to_wire(options))
        return self._all("LogitLens", request, spb.LogitLensResponse, inputs.prompts)

    def _attribute(self, inputs: Inputs, options: AttributionOptions, interventions: Hooked) -> Mapping[str, Array]:
        request = spb.AttributeRequest(**self._asked(inputs, interventions), **wire.attribution_to_wire(options))
        return self._all("Attribute", request, spb.AttributeResponse, inputs.prompts)

    def _unembed(self, tokens: tuple[TokenLike, ...]) -> Array:
        request = spb.GetUnembeddingRequest(model=self._model, tokens=[wire.token_to_wire(token) for token in tokens])
        return self._all("GetUnembedding", request, spb.GetUnembeddingResponse, ())["directions"]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        if self._vocabulary is None:
            request = model_service_pb2.GetModelRequest(name=self._model, include_vocabulary=True)
            response = self._unary("ModelService/GetModel", request, model_service_pb2.GetModelResponse)
            self._vocabulary = list(response.vocabulary)
        return [self._vocabulary[int(token)] for token in ids]
