"""Callers that let the app wait: who asks nothing on a connection, and who reads nothing of an answer, is cut off.

Who reads slowly is not. Who sends nothing of a body the guard refuses, which can still be said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

SILENCE = 15.0
"""Seconds that a connection may be open without a request, where it may stand no shorter; up to twice as many pass."""
PIECE = 1 << 19
"""Bytes of an answer that are handed on at once: the next ones wait until the reader has these."""


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

        async def timed(message: Message) -> None:
            for piece in _pieces(message):
                end = loop.call_later(self._seconds, transport.abort)  # from then on the caller has gone
                try:
                    await send(piece)
                finally:
                    end.cancel()

        await self._app(scope, receive, timed)
        end, before = loop.time() + self._seconds, transport.get_write_buffer_size()
        while unread := transport.get_write_buffer_size():  # closing the connection would wait for ever
            if unread > before:
                return  # of the next answer on this connection, so this one has been read
            if loop.time() > end:
                transport.abort()
                return
            before = unread
            await asyncio.sleep(min(0.5, self._seconds / 4))


def _pieces(message: Message) -> Iterator[Message]:
    """A message as several with a part of its body each, where that is large."""
    body = message.get("body", b"")
    last = max(0, (len(body) - 1) // PIECE * PIECE)
    for start in range(0, last, PIECE):
        yield {**message, "body": body[start : start + PIECE], "more_body": True}
    yield {**message, "body": body[last:]} if last else message


def connections(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's, which by themselves stay open without a whole request for ever.

    Its parser in Python, whatever else is installed: that one refuses headers of more than 64 KiB, where the one in C
    keeps all that come.

    Args:
        seconds: How long a caller may let the app wait.
    """
    silence = min(SILENCE, seconds)

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle = False
            self._look = self.loop.call_later(silence, self._at_work)

        def connection_lost(self, error: Exception | None) -> None:
            self._look.cancel()
            super().connection_lost(error)

        def _at_work(self) -> None:
            """Close the connection where there was no request, and no answer to be read, at two looks in a row."""
            over = self.cycle is None or self.cycle.response_complete
            idle = over and not self.transport.get_write_buffer_size()
            if idle and self._idle:
                self.transport.abort()
                return
            self._idle = idle
            self._look = self.loop.call_later(silence, self._at_work)

    return Connection
