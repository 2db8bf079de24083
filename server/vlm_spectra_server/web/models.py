"""The server's models as the web app sees them, and connections to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import vlm_spectra as vs
from vlm_spectra.errors import DeadlineError, UnavailableError, UnknownModelError
from vlm_spectra.network.wire import info_from_wire
from vlm_spectra.v1 import model_service_pb2 as pb

from .upstream import Upstream

STATES = {
    pb.MODEL_STATE_LOADING: "loading",
    pb.MODEL_STATE_READY: "ready",
    pb.MODEL_STATE_FAILED: "failed",
    pb.MODEL_STATE_RESTARTING: "restarting",
}
SPARE = 4
"""Connections that are kept for the next request."""


class Models:
    """A server's models. Every call is made with its caller's token.

    Args:
        upstream: The server.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self._spare: list[tuple[str, str, vs.RemoteVLM]] = []
        self._lock = threading.Lock()

    def status(self, name: str, token: str) -> dict[str, Any]:
        """What a model is doing; the first the server holds where the name is empty.

        Raises:
            SpectraError: The caller is refused. A server that does not answer, or has no such model, is a state.
        """
        try:
            model = self._model(name, token)
        except (UnavailableError, DeadlineError, UnknownModelError) as error:
            state = "unknown" if isinstance(error, UnknownModelError) else "unavailable"
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

    def options(self, token: str) -> list[dict[str, str]]:
        """What can be chosen: the server's models, and those that it would load."""
        answer = self._ask("ListModels", pb.ListModelsRequest(), pb.ListModelsResponse, token)
        held = {model.name: STATES.get(model.state, "unknown") for model in answer.models}
        names = {**held, **{name: "" for name in answer.loadable if name not in held and not set(name) & set("*?[")}}
        return [{"name": name, "state": state} for name, state in names.items()]

    def select(self, name: str, token: str) -> dict[str, Any]:
        """Have the server load a model, in the background; what the model is doing.

        Raises:
            SpectraError: The server refuses.
        """
        self._ask("LoadModel", pb.LoadModelRequest(name=name), pb.LoadModelResponse, token)
        return self.status(name, token)

    @contextmanager
    def lease(self, name: str, token: str, opened: Callable[[vs.RemoteVLM], None]) -> Iterator[vs.RemoteVLM]:
        """A connection of its own for one analysis; closing it from another thread ends what runs on it.

        Args:
            name: The model; the first the server holds where empty.
            token: The caller's; no connection is ever another caller's.
            opened: Called with the connection before it is used.

        Raises:
            UnavailableError: No server answers, or the model is not ready.
        """
        name = self._ready(name, token)
        with self._lock:
            found = next((each for each in self._spare if each[:2] == (name, token)), None)
            if found:
                self._spare.remove(found)
        address, tls = self.upstream.address, self.upstream.tls
        model = (
            found[2] if found else vs.connect(address, model=name, arrays="numpy", load_timeout=0, token=token, tls=tls)
        )
        healthy = False
        try:
            opened(model)
            yield model
            healthy = True
        finally:
            with self._lock:
                if healthy:
                    self._spare.append((name, token, model))
                leaving = self._spare[:-SPARE] if healthy else []
                self._spare = self._spare[-SPARE:]
            for _, _, spare in leaving:
                spare.close()
            if not healthy:
                model.close()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            leaving, self._spare = self._spare, []
        for _, _, model in leaving:
            model.close()

    def _ready(self, name: str, token: str) -> str:
        model = self._model(name, token)
        if model.state == pb.MODEL_STATE_FAILED:
            raise UnavailableError(f"the model {model.name!r} could not be loaded: {model.error}")
        if model.state != pb.MODEL_STATE_READY:
            raise UnavailableError(f"the model {model.name!r} is still being loaded; try again soon.", retry_after=2.0)
        return model.name

    def _model(self, name: str, token: str) -> pb.Model:
        if not name:
            held = self._ask("ListModels", pb.ListModelsRequest(), pb.ListModelsResponse, token).models
            if not held:
                raise UnavailableError("the server holds no model yet: choose one.")
            name = held[0].name
        return self._ask("GetModel", pb.GetModelRequest(name=name), pb.GetModelResponse, token).model

    def _ask(self, method: str, request: Any, response: Any, token: str) -> Any:
        try:
            return self.upstream.ask(method, request, response, token)
        except (UnavailableError, DeadlineError):
            self.close()  # the server may be replaced by another
            raise


def _streams(model: pb.Model) -> list[str]:
    """The hooks of a decoder block that a lens or a sweep over positions can name."""
    block = "lm.blocks.{layer}."
    streams = (hook for hook in model.hooks if hook.name.startswith(block) and not hook.intervene_only)
    return [hook.name.removeprefix(block) for hook in streams if list(hook.shape) == ["batch", "seq", "hidden"]]
