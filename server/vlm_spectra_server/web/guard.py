"""What stands before every request: the size of its body, where it comes from, and the headers of every answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
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


class _CutError(Exception):
    """A body is not read on."""


class Guard:
    """An ASGI middleware.

    Args:
        app: What it stands before.
        hosts: The names under which the app may be called; empty for any. Another name is a page elsewhere whose
            address was made to point here.
        origins: Origins whose pages may use the app too, besides its own.
        too_large: The refusal of a body of so many bytes at a path, None where that many are taken. Not given where the
            app looks at bodies itself.
        seconds: How long a body may take; as long as it likes where 0.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str],
        origins: Iterable[str] = (),
        too_large: Callable[[str, int], WebError | None] = lambda path, size: None,
        seconds: float = 0,
    ) -> None:
        self.app, self.hosts, self.origins = app, frozenset(hosts), frozenset(origins)
        self.too_large, self.seconds = too_large, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal, begun, read = self._refusal(Headers(scope=scope), scope), False, 0
        end: float | None = asyncio.get_running_loop().time() + self.seconds if self.seconds else None
        cut: WebError | None = None

        async def counted() -> Message:
            nonlocal read, cut, end
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                cut = _too_slow(self.seconds)
                raise _CutError from None
            read += len(message.get("body", b""))
            cut = self.too_large(scope["path"], read)
            if cut is not None:
                raise _CutError
            if not message.get("more_body", False):
                end = None  # it is all there; what comes now is the end of the connection
            return message

        async def headed(message: Message) -> None:
            nonlocal begun
            if cut is not None and not begun:
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
            with contextlib.suppress(_CutError):
                await self.app(scope, counted, headed)
            if begun or cut is None:
                return
            refusal, cut = cut, None
        await response(problem(refusal))(scope, receive, headed)

    def _refusal(self, headers: Headers, scope: Scope) -> WebError | None:
        host = headers.get("host", "")
        if self.hosts and (urlsplit(f"//{host}").hostname if _plain(host) else None) not in self.hosts:
            return WebError("this app is not served under that name.", 403, "WRONG_HOST")
        origin = headers.get("origin")
        own = not origin or origin.split("://")[-1] == host
        if not own and origin not in self.origins and scope["method"] not in ("GET", "HEAD"):
            return WebError("a page of another site may not use this app.", 403, "WRONG_ORIGIN")
        length = headers.get("content-length", "")
        return self.too_large(scope["path"], int(length[:20])) if length.isdecimal() else None


def _too_slow(seconds: float) -> WebError:
    metadata = {"limit": "max_stall_seconds", "value": f"{seconds:g}"}
    what = f"the request was not all there after {seconds:g} s (max_stall_seconds)."
    return WebError(what, 408, "TOO_SLOW", metadata=metadata)


def _plain(host: str) -> bool:
    """Whether a host header can be read as one."""
    return (bool(host) and not set(host) & set("/?#@\\ [")) or re.fullmatch(r"\[::1\](:[0-9]*)?", host) is not None
