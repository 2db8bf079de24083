"""Analyses at work: each on a thread of its own, its events handed to whoever waits, ended when nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import vlm_spectra as vs
from vlm_spectra.errors import BusyError, CancelledError, ClientBusyError

from .models import Models
from .problems import problem

Event = dict[str, Any]
Tell = Callable[[Event], None]
"""Takes what an analysis says while it works."""
Work = Callable[[vs.RemoteVLM, Tell], Any]
"""An analysis; it returns its result."""

BEAT = 0.5
"""Seconds after which a run that says nothing says that it goes on."""
PACE = 0.05
"""Seconds between two events that say how far a run is."""


class Runs:
    """Runs at work, a bounded number.

    Args:
        models: Where they run.
        most: How many at once. One caller who shows a token may have half of them; the others cannot be told apart.
    """

    def __init__(self, models: Models, most: int = 16) -> None:
        self.models = models
        self._most = most
        self._at_work = Counter[str]()
        self._lock = threading.Lock()

    async def events(self, name: str, token: str, work: Work) -> AsyncIterator[Event]:
        """Run an analysis; its events, the last of type "result" or "error". Leaving early ends it.

        Args:
            name: The model.
            token: The caller's.
            work: The analysis.
        """
        try:
            self._enter(token)
        except BusyError as error:
            yield _error(error)
            return
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        run = _Run(self.models, name, token, work, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        thread = threading.Thread(target=run.go, args=(lambda: self._leave(token),), name="analysis", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no thread is left
            self._leave(token)
            yield _error(BusyError(f"the app cannot begin another analysis: {error}.", retry_after=2.0))
            return
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

    def _enter(self, token: str) -> None:
        with self._lock:
            if token and self._at_work[token] >= max(1, self._most // 2):
                mine = f"{self._at_work[token]} analyses of yours run already"
                raise ClientBusyError(f"{mine}, half of what is possible at once; try again soon.", retry_after=2.0)
            if self._at_work.total() >= self._most:
                raise BusyError(f"{self._most} analyses run already; try again soon.", retry_after=2.0)
            self._at_work[token] += 1

    def _leave(self, token: str) -> None:
        with self._lock:
            self._at_work[token] -= 1
            self._at_work = +self._at_work  # without callers who have none


class _Run:
    def __init__(self, models: Models, name: str, token: str, work: Work, emit: Callable[[Event], Any]) -> None:
        self.models, self.name, self.token, self.work, self.emit = models, name, token, work, emit
        self.cancelled = False
        self.finished = False
        self._model: vs.RemoteVLM | None = None
        self._said = ("", 0.0)
        self._lock = threading.Lock()

    def go(self, done: Callable[[], None]) -> None:
        """Run to the end, on this thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            try:
                with self.models.lease(self.name, self.token, self._opened) as model:
                    with model.run_with_progress(self._progress):
                        data = self.work(model, self._tell)
                    with self._lock:
                        self._check()
                        self.finished = True  # from here on nobody closes the connection
                self.emit({"type": "result", "data": data})
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

    def _tell(self, event: Event) -> None:
        self._check()
        self.emit(event)

    def _progress(self, phase: str, done: int, total: int) -> None:
        """So far the run's present call has come; not every step is worth an event."""
        now, (last, then) = time.monotonic(), self._said
        if phase != last or done == total or now - then >= PACE:
            self._said = phase, now
            self._tell({"type": "progress", "phase": phase, "done": done, "total": total})

    def _check(self) -> None:
        if self.cancelled:
            raise CancelledError("the analysis was cancelled.")


def _error(error: Exception) -> Event:
    return {"type": "error", "problem": problem(error)}
