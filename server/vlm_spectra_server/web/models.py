"""The server's models as the web app sees them, and connections to them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import grpc
import vlm_spectra as vs
from vlm_spectra.errors import DeadlineError, UnavailableError
from vlm_spectra.secure import TOKEN_VARIABLE, TLSLike, bearer, channel
from vlm_spectra.status import from_rpc_error
from vlm_spectra.v1 import model_service_pb2 as pb
from vlm_spectra.wire import info_from_wire

from ..known_checkpoints import KNOWN

STATES = {
    pb.MODEL_STATE_LOADING: "loading",
    pb.MODEL_STATE_READY: "ready",
    pb.MODEL_STATE_FAILED: "failed",
    pb.MODEL_STATE_RESTARTING: "restarting",
}
SPARE = 4
"""Connections that are kept for the next request."""


class Models:
    """A server's models.

    Args:
        address: The server's, host:port.
        tls: As for `vlm_spectra.connect`, which also takes the token of the environment.
    """

    def __init__(self, address: str, tls: TLSLike = None) -> None:
        self.address, self._tls = address, tls
        options = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
        token = os.environ.get(TOKEN_VARIABLE, "")
        self._channel, self._metadata = channel(address, tls, token, options), bearer(token)
        self._spare: list[tuple[str, vs.RemoteVLM]] = []
        self._lock = threading.Lock()

    def status(self, name: str = "") -> dict[str, Any]:
        """What a model is doing; the first the server holds where the name is empty. Never raises for the server."""
        try:
            model = self._model(name)
        except vs.SpectraError as error:
            state = "unavailable" if isinstance(error, UnavailableError | DeadlineError) else "unknown"
            return {"state": state, "name": name, "progress": 0.0, "error": str(error), "info": None, "hooks": []}
        ready = model.state == pb.MODEL_STATE_READY
        info = asdict(info_from_wire(model.name, model.info)) if ready else None
        return {
            "state": STATES.get(model.state, "unknown"),
            "name": model.name,
            "progress": 1.0 if info else round(float(model.progress), 3),
            "error": model.error,
            "info": info,
            "hooks": _streams(model),
        }

    def held(self) -> list[pb.Model]:
        """All models the server holds."""
        return list(self._call("ListModels", pb.ListModelsRequest(), pb.ListModelsResponse).models)

    def options(self) -> list[dict[str, str]]:
        """What can be chosen: the server's models, spectra-tiny, and the checkpoints that are known by name."""
        known = ["spectra-tiny", *(each.repository for each in KNOWN)]
        held = {model.name: STATES.get(model.state, "unknown") for model in self.held()}
        names = {**held, **{name: "" for name in known if name not in held}}
        return [{"name": name, "state": state} for name, state in names.items()]

    def select(self, name: str) -> dict[str, Any]:
        """Have the server load a model, in the background; what the model is doing.

        Raises:
            SpectraError: The server refuses.
        """
        self._call("LoadModel", pb.LoadModelRequest(name=name), pb.LoadModelResponse)
        return self.status(name)

    @contextmanager
    def lease(self, name: str, opened: Callable[[vs.RemoteVLM], None]) -> Iterator[vs.RemoteVLM]:
        """A connection of its own for one analysis; closing it from another thread ends what runs on it.

        Args:
            name: The model; the first the server holds where empty.
            opened: Called with the connection before it is used.

        Raises:
            UnavailableError: No server answers, or the model is not ready.
        """
        name = self._ready(name)
        with self._lock:
            found = next((pair for pair in self._spare if pair[0] == name), None)
            if found:
                self._spare.remove(found)
        model = (
            found[1] if found else vs.connect(self.address, model=name, arrays="numpy", load_timeout=0, tls=self._tls)
        )
        healthy = False
        try:
            opened(model)
            yield model
            healthy = True
        finally:
            with self._lock:
                keep = healthy and len(self._spare) < SPARE
                if keep:
                    self._spare.append((name, model))
            if not keep:
                model.close()

    def close(self) -> None:
        """Close all connections."""
        self._channel.close()
        self._drop()

    def _drop(self) -> None:
        """Close the spare connections."""
        with self._lock:
            for _, model in self._spare:
                model.close()
            self._spare.clear()

    def _ready(self, name: str) -> str:
        model = self._model(name)
        if model.state == pb.MODEL_STATE_FAILED:
            raise UnavailableError(f"the model {model.name!r} could not be loaded: {model.error}")
        if model.state != pb.MODEL_STATE_READY:
            raise UnavailableError(f"the model {model.name!r} is still being loaded; try again soon.", retry_after=2.0)
        return model.name

    def _model(self, name: str) -> pb.Model:
        if not name:
            held = self.held()
            if not held:
                raise UnavailableError("the server holds no model yet: choose one.")
            name = held[0].name
        return self._call("GetModel", pb.GetModelRequest(name=name), pb.GetModelResponse).model

    def _call(self, method: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(
            f"/vlm_spectra.v1.ModelService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        try:
            return call(request, timeout=5.0, metadata=self._metadata)
        except grpc.RpcError as error:
            self._drop()  # the server may have been replaced by another
            raise from_rpc_error(error, self.address) from None
        except ValueError as error:
            raise UnavailableError(f"the connection to {self.address} is closed.") from error


def _streams(model: pb.Model) -> list[str]:
    """The hooks of a decoder block that a lens or a sweep over positions can name."""
    block = "lm.blocks.{layer}."
    streams = (hook for hook in model.hooks if hook.name.startswith(block) and not hook.intervene_only)
    return [hook.name.removeprefix(block) for hook in streams if list(hook.shape) == ["batch", "seq", "hidden"]]
