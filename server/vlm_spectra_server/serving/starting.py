"""How a worker comes to its model: room for it, its weights, and a first run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging
from vlm_spectra.errors import OutOfDeviceMemoryError

from ..check import TASK, drawn
from ..hooked_vlm import HookedVLM
from .devices import Devices, weights
from .host import GRANTED, WAIT
from .pipe import Pipe

ROOM_AGAIN = 0.5
"""Seconds after which a model that waits for room asks again."""


def find_room(pipe: Pipe, name: str, dtype: str, device: str, revision: str) -> None:
    """Tell the front how large a model will be, and wait until there is room for it.

    Raises:
        OutOfDeviceMemoryError: There is none, and will be none.
    """
    devices, size = Devices.planned(device), weights(name, dtype, revision)
    while True:
        pipe.send({"kind": "room", "size": size, "memory": devices.memory()})
        answer = pipe.receive()[0]["answer"]
        if answer == GRANTED:
            return
        if answer != WAIT:
            raise OutOfDeviceMemoryError(f"there is no room for it: {answer}")
        time.sleep(ROOM_AGAIN)


@contextmanager
def telling(tell: Callable[[float], None]) -> Iterator[None]:
    """While the block loads a model, have the share of its weights that has been read told, 0 to 1, at each percent."""

    def watched(factory: Callable[..., Any], arguments: Any, options: Any) -> Any:
        bar = factory(*arguments, **options)
        return _Reading(bar, len(arguments[0]), tell) if options.get("desc") == _READING and arguments else bar

    before = transformers_logging.set_tqdm_hook(watched)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


_READING = "Loading weights"
"""What transformers calls its progress bar over a model's weights."""


class _Reading:
    """A progress bar over `total` weights, which also tells how far it is."""

    def __init__(self, bar: Any, total: int, tell: Callable[[float], None]) -> None:
        self._bar, self._total, self._tell = bar, max(total, 1), tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __iter__(self) -> Iterator[Any]:
        told = 0
        for number, weight in enumerate(self._bar, 1):
            yield weight
            if (percent := 100 * number // self._total) > told:
                told = percent
                self._tell(number / self._total)


def warm_up(model: HookedVLM) -> float:
    """Run what requests run, once, so that the first of them does not pay for it; the seconds it took."""
    begun = time.perf_counter()
    inputs = model.prepare_messages(TASK, drawn(112, 112) if model.reading.image_token_id >= 0 else None)
    model.forward(inputs, logits_to_keep=1)
    model.generate(inputs, max_new_tokens=2)
    return time.perf_counter() - begun
