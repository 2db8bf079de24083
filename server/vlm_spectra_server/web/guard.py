"""What stands before every request: the size of its body, where it comes from, and the headers of every answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import WebError, problem, response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "frame-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""The page's content security policy: nothing but the page's own files, no script in markup."""


class _TooLargeError(Exception):
    """More of a body came than may."""


class Guard:
    """An ASGI middleware.

    Args:
        app: What it stands before.
        hosts: The names under which the app may be called; empty for any. Another name is a page elsewhere whose
            address was made to point here.
        body_bytes: The largest body; None where the app looks at that itself.
        origins: Origins whose pages may use the app too, besides its own.
        too_large: The refusal of a body of so many bytes.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str],
        body_bytes: int | None,
        origins: Iterable[str] = (),
        too_large: Callable[[int], WebError] = lambda size: WebError("the body is too large.", 413, "TOO_LARGE"),
    ) -> None:
        self.app, self.hosts, self.origins = app, frozenset(hosts), frozenset(origins)
        self.body_bytes = sys.maxsize if body_bytes is None else body_bytes
        self._too_large = too_large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal, begun, read = self._refusal(Headers(scope=scope), scope["method"]), False, 0
        too_large = False

        async def counted() -> Message:
            nonlocal read, too_large
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                too_large = True
                raise _TooLargeError
            return message

        async def headed(message: Message) -> None:
            nonlocal begun
            if too_large and not begun:
                return  # what the app makes of a body that broke off
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", POLICY)
                headers.setdefault("Cache-Control", "no-cache")
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
            await send(message)

        if refusal is None:
            with contextlib.suppress(_TooLargeError):
                await self.app(scope, counted, headed)
            if begun or not too_large:
                return
            refusal, too_large = self._too_large(read), False
        await response(problem(refusal))(scope, receive, headed)

    def _refusal(self, headers: Headers, method: str) -> WebError | None:
        host = headers.get("host", "")
        if self.hosts and (urlsplit(f"//{host}").hostname if _plain(host) else None) not in self.hosts:
            return WebError("this app is not served under that name.", 403, "WRONG_HOST")
        origin = headers.get("origin")
        own = not origin or origin.split("://")[-1] == host
        if not own and origin not in self.origins and method not in ("GET", "HEAD"):
            return WebError("a page of another site may not use this app.", 403, "WRONG_ORIGIN")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.body_bytes:
            return self._too_large(int(length[:20]))
        return None


def _plain(host: str) -> bool:
    """Whether a host header can be read as one."""
    return (bool(host) and not set(host) & set("/?#@\\ [")) or host.startswith("[::1]")
