"""Callers that let the app wait: who asks nothing on a connection, and who reads nothing of an answer, is cut off.

Who sends nothing of a body the guard refuses, which can still be said.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

SILENCE = 15.0
"""Seconds that a connection may be open without a request, where it may stand no shorter; up to twice as many pass."""


class Patience:
    """An ASGI middleware that cuts off who reads nothing of an answer.

    Args:
        app: What it stands before.
        seconds: How long a caller may leave something unread.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as long as somebody reads."""
        transport = getattr(getattr(receive, "__self__", None), "transport", None)  # uvicorn's: ASGI cannot cut off
        if transport is None:
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()

        async def timed(message: Any) -> None:
            end = loop.call_later(self._seconds, transport.abort)  # from then on the caller has gone
            try:
                await send(message)
            finally:
                end.cancel()

        await self._app(scope, receive, timed)
        end = loop.time() + self._seconds
        while transport.get_write_buffer_size():  # closing the connection would wait for ever
            if loop.time() > end:
                transport.abort()
                return
            await asyncio.sleep(min(0.5, self._seconds / 4))


def connections(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's, which by themselves stay open without a whole request for ever.

    Args:
        seconds: How long a caller may let the app wait.
    """
    silence = min(SILENCE, seconds)

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle = False
            self._look = self.loop.call_later(silence, self._at_work)

        def connection_lost(self, error: Exception | None) -> None:
            self._look.cancel()
            super().connection_lost(error)

        def _at_work(self) -> None:
            """Close the connection where there was no request at two looks in a row."""
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._idle:
                self.transport.abort()
                return
            self._idle = idle
            self._look = self.loop.call_later(silence, self._at_work)

    return Connection
