"""The models of a server: loaded and unloaded while others serve, and rid of idle ones when their memory is wanted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from vlm_spectra.errors import BusyError, InvalidInputError, UnknownModelError
from vlm_spectra.v1 import model_service_pb2

from .budget import Budget
from .host import GRANTED, WAIT, Loading, Memory, ModelHost
from .limits import Limits, over, setting

log = logging.getLogger("vlm_spectra.server")

_NOT_LOADED = (model_service_pb2.MODEL_STATE_LOADING, model_service_pb2.MODEL_STATE_FAILED)
_COMING = (model_service_pb2.MODEL_STATE_LOADING, model_service_pb2.MODEL_STATE_RESTARTING)


class Models:
    """The models a server holds, by name.

    Args:
        limits: What each takes at most, and all together.
        budget: The host's memory for captures.
        changed: Called with a model's name whenever its state has changed, or it has gone.
    """

    def __init__(self, limits: Limits, budget: Budget, changed: Callable[[str, int | None], None]) -> None:
        self.limits, self.budget, self.changed = limits, budget, changed
        self.hosts: dict[str, ModelHost] = {}
        self.device = ""
        """Where a model goes that is loaded without a device of its own; the first GPU, else the CPU, where empty."""
        self._lock = threading.Lock()
        self._left: dict[str, str] = {}

    def load(self, loading: Loading) -> ModelHost:
        """Start loading a model; one that is loaded or loading stays as it is.

        Where there are as many as there may be, another leaves when the new one's checkpoint has been found sound.

        Raises:
            BusyError: There are as many as there may be, and all are at work.
        """
        with self._lock:
            host = self.hosts.get(loading.name)
            if host is not None and not _failed(host):
                return host
            self._check_place(loading.name)
            new = ModelHost(loading, self.limits, self.budget, self.changed, self.room)
            if host is not None:
                host.close()
            host = self.hosts[loading.name] = new
            self._left.pop(loading.name, None)
        self.changed(loading.name, host.model.state)
        return host

    def _check_place(self, name: str) -> None:
        """Refuse one more model where those that would have to leave for it are at work; the failed ones leave now."""
        most = self.limits.models
        while len(others := self._others(name)) >= most and self._dismiss(filter(_failed, others), name):
            pass
        asked = len(others) + 1
        if asked - most > sum(not host.busy for host in others):
            error = over(BusyError, "models", most, asked, "with one more the models would be", "")
            error.retry_after = 5.0
            raise error

    def _others(self, name: str) -> list[ModelHost]:
        return [host for host in self.hosts.values() if host.loading.name != name]

    def _dismiss(self, among: Iterable[ModelHost], name: str) -> bool:
        """Let the least recently used idle model go for another, those that could not be loaded first; whether one did.

        One that is at work never goes.
        """
        for host in sorted(among, key=lambda host: (not _failed(host), host.used)):
            if host.leave():
                self.hosts.pop(host.loading.name, None)
                self._left[host.loading.name] = name
                log.info("%s leaves to make room for %s", host.loading.name, name)
                host.close()
                self.changed(host.loading.name, None)
                return True
        return False

    def room(self, host: ModelHost, size: int, memory: Memory) -> str:
        """Whether there is room for a model; where there could be, the least recently used idle one leaves for it.

        Args:
            host: The model that is loading.
            size: What its weights take, in bytes.
            memory: What its worker holds, and what is free, by device.

        Returns:
            `GRANTED`, `WAIT`, or a sentence that refuses.
        """
        with self._lock:
            others = self._others(host.loading.name)
            # One that holds nothing yet waits itself, perhaps for this one: nothing comes free with it.
            loading = [other for other in others if other.held and other.model.state in _COMING]
            bound, own = self.limits.models_bytes, sum(held for held, _, _ in memory.values())
            free = sum(free for _, free, _ in memory.values()) - _held(loading, memory)
            total = sum(total for _, _, total in memory.values())
            here, over_bound = size - free, own + size + _held(others) - bound if bound else 0
            crowded = not host.placed and sum(other.placed for other in others) >= self.limits.models
            if here <= 0 and over_bound <= 0 and not crowded:
                host.placed = True
                return GRANTED
            where, weights = " and ".join(memory), f"{host.loading.name!r} takes {(own + size) / 1e9:.2f} GB"
            if size > total:
                return f"{weights}, and {where} has {total / 1e9:.2f} GB in all."
            if bound and own + size > bound:
                return f"{weights}, and models may take {bound / 1e9:.2f} GB ({setting('models_bytes')})."
            idle = [other for other in others if not other.busy]
            if _held(idle, memory) >= here and _held(idle) >= over_bound and (idle or not crowded):
                helpful = [other for other in idle if here <= 0 or _held([other], memory)]
                self._dismiss(helpful, host.loading.name)
                return WAIT
            if loading:
                return WAIT
            if here <= 0 and over_bound <= 0:
                at_work = ", ".join(repr(other.loading.name) for other in others if other.busy)
                most = self.limits.models
                return f"there are {most} models ({setting('models')}), all at work: {at_work}. Try again soon."
            at_work = ", ".join(f"{o.loading.name!r} {_held([o]) / 1e9:.2f} GB" for o in others if o.busy) or "none"
            left = f"{max(free, 0) / 1e9:.2f} GB are free on {where}"
            if over_bound > 0:
                left = f"{max(bound - _held(others), 0) / 1e9:.2f} GB are left of {bound / 1e9:.2f} GB for models"
                left += f" ({setting('models_bytes')})"
            return (
                f"{weights}, {left}, and the idle models hold {_held(idle) / 1e9:.2f} GB; those at work stay: "
                f"{at_work}. Try again when they are idle."
            )

    def get(self, name: str) -> ModelHost:
        """A model by name; where the name is empty, the only loaded one.

        Raises:
            UnknownModelError: There is none of that name, or a name is needed.
        """
        hosts = dict(self.hosts)  # others come and go meanwhile
        loaded = [host for host in hosts.values() if host.model.state not in _NOT_LOADED] or list(hosts.values())
        if not name and len(loaded) == 1:
            return loaded[0]
        host = hosts.get(name)
        if host is None:
            held = ", ".join(map(repr, list(hosts))) or "none"
            asked = f"no model {name!r}" if name else "several models, and the request names none"
            if name in self._left:
                asked += f" any more (it left to make room for {self._left[name]!r}; load it again)"
            raise UnknownModelError(f"this server has {asked}; it holds {held}.", field="model")
        return host

    def unload(self, name: str, waiting: Callable[[], bool] = lambda: True) -> None:
        """Drop a model: it takes no more requests, those that wait are refused, and the one at work ends first.

        Args:
            name: The model.
            waiting: Whether the caller still waits for the end; the model leaves all the same.
        """
        if not name:
            raise InvalidInputError("name the model to unload.", field="name")
        host = self.get(name)
        with self._lock:
            if self.hosts.get(name) is host:  # one that could not be loaded may have been replaced meanwhile
                del self.hosts[name]
        self.changed(name, None)

        def leave() -> None:
            host.drain()
            host.close()

        thread = threading.Thread(target=leave, name="unload", daemon=True)
        thread.start()
        while thread.is_alive() and waiting():
            thread.join(0.05)

    def close(self) -> None:
        """Drop all models."""
        for host in list(self.hosts.values()):
            host.close()


def _failed(host: ModelHost) -> bool:
    return host.model.state == model_service_pb2.MODEL_STATE_FAILED


def _held(hosts: Iterable[ModelHost], devices: Iterable[str] | None = None) -> int:
    """Bytes that models hold, on some devices or on all."""
    names = None if devices is None else set(devices)
    return sum(held for host in hosts for name, held in host.held.items() if names is None or name in names)
