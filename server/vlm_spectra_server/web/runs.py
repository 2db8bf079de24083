"""Analyses at work: each on a thread of its own, its events handed to whoever waits, ended when nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import vlm_spectra as vs
from vlm_spectra.errors import BusyError, CancelledError

from .models import Models
from .problems import problem

Event = dict[str, Any]
Work = Callable[[vs.RemoteVLM], Iterator[Event]]
"""An analysis: what it says while it works; its last event has the type "result"."""

BEAT = 0.5
"""Seconds after which a run that says nothing says that it goes on."""


class Runs:
    """Runs at work, a bounded number.

    Args:
        models: Where they run.
        most: How many at once.
    """

    def __init__(self, models: Models, most: int = 16) -> None:
        self.models = models
        self._places = threading.Semaphore(most)
        self._most = most

    async def events(self, name: str, work: Work) -> AsyncIterator[Event]:
        """Run an analysis; its events, the last of type "result" or "error". Leaving early ends it.

        Args:
            name: The model.
            work: The analysis.
        """
        if not self._places.acquire(blocking=False):
            yield _error(BusyError(f"{self._most} analyses run already; try again soon.", retry_after=2.0))
            return
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        run = _Run(self.models, name, work, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        thread = threading.Thread(target=run.go, args=(self._places.release,), name="analysis", daemon=True)
        thread.start()
        began = loop.time()
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), BEAT)
                except TimeoutError:
                    event = {"type": "waiting", "seconds": round(loop.time() - began, 1)}
                yield event
                if event["type"] in ("result", "error"):
                    return
        finally:
            run.cancel()


class _Run:
    def __init__(self, models: Models, name: str, work: Work, emit: Callable[[Event], None]) -> None:
        self.models, self.name, self.work, self.emit = models, name, work, emit
        self.cancelled = False
        self.finished = False
        self._model: vs.RemoteVLM | None = None
        self._lock = threading.Lock()

    def go(self, done: Callable[[], None]) -> None:
        """Run to the end, on this thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            try:
                with self.models.lease(self.name, self._opened) as model:
                    last = None
                    for event in self.work(model):
                        self._check()
                        if event["type"] == "result":
                            last = event
                        else:
                            self.emit(event)
                    with self._lock:
                        self._check()
                        self.finished = True  # from here on nobody closes the connection
                self.emit(last or {"type": "result"})
            except Exception as error:
                self.emit(_error(CancelledError("the analysis was cancelled.") if self.cancelled else error))
            finally:
                done()

    def cancel(self) -> None:
        """End it, from any thread: what runs on the server ends before its next layer."""
        with self._lock:
            if self.finished or self.cancelled:
                return
            self.cancelled = True
            if self._model is not None:
                self._model.close()

    def _opened(self, model: vs.RemoteVLM) -> None:
        with self._lock:
            self._model = model
            self._check()

    def _check(self) -> None:
        if self.cancelled:
            raise CancelledError("the analysis was cancelled.")


def _error(error: Exception) -> Event:
    return {"type": "error", "problem": problem(error)}
