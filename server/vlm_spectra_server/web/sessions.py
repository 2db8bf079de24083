"""Signing in: a browser shows a token once and gets a cookie for it; other callers show it with every request.

The token itself stays here. A cookie is a random name, out of reach of scripts and of other sites' pages, over TLS
alone where there is TLS, and forgotten after a while without use.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Receive, Scope, Send
from vlm_spectra.errors import DeadlineError, SpectraError, UnauthenticatedError, UnavailableError

from . import problems
from .upstream import Upstream

IDLE = 12 * 3600.0
"""Seconds after which a cookie that was not used is forgotten."""
MOST, OWN = 1000, 20
"""Cookies that are remembered, and those of one token; the least recently used go first."""

OPEN = ("/api/session", "/api/gallery")
"""What answers to everybody, as the page and its examples do; all else under `/api/` wants to know who calls."""
BEARER = HTTPBearer(auto_error=False, description="A token of the server's, where it wants one")
"""For the description of the interface; `Door` reads the header."""


class SignIn(BaseModel):
    """A token to sign in with."""

    model_config = ConfigDict(strict=True)
    token: Annotated[str, Field(min_length=1, max_length=1000, description="As `vlm-spectra token` made it")]


class Sessions:
    """Who is signed in.

    Args:
        upstream: The server whose tokens count.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self._tokens: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, request: Request) -> str:
        """The token of a request: its own, its cookie's, or the one that the app lends; empty for none.

        The server has accepted it. Where the server does not answer, callers of this machine are let in all the same:
        they find out by what they ask.

        Raises:
            UnauthenticatedError: It is not one of the server's.
            SpectraError: Nobody is served at all; see `Upstream.refuse_if_open`.
        """
        shown = request.headers.get("authorization")
        if shown is not None:
            kind, _, token = shown.partition(" ")
            token = token.strip()
            if kind.lower() != "bearer" or not token:
                raise UnauthenticatedError("a token is shown as `Authorization: Bearer TOKEN`.")
        else:
            token = self._of_cookie(request) or self.upstream.own_token
        try:
            self.upstream.check(token)
        except (UnavailableError, DeadlineError):
            if self.upstream.exposed:
                raise
        return token

    def state(self, request: Request) -> dict[str, Any]:
        """Whether signing in is needed, and done."""
        signed_in = bool(self._of_cookie(request))
        try:
            required = not self.upstream.own_token and self.upstream.wants_tokens()
        except (UnavailableError, DeadlineError):
            required = False
        return {"required": required, "signed_in": signed_in, "name": ""}

    def sign_in(self, request: Request, response: Response, token: str) -> dict[str, Any]:
        """Take a token, if it is one of the server's, and give a cookie for it."""
        self.upstream.check(token)
        name, now = secrets.token_urlsafe(32), time.monotonic()
        with self._lock:
            self._tokens[name] = (now, token)
            mine = [each for each, (_, whose) in self._tokens.items() if whose == token]
            for each in mine[:-OWN]:
                del self._tokens[each]
            while len(self._tokens) > MOST:
                self._tokens.popitem(last=False)
        secure = "https" in (request.url.scheme, request.headers.get("origin", "").partition(":")[0])
        response.set_cookie(_cookie(request), name, httponly=True, samesite="strict", secure=secure, path="/")
        return {**self.state(request), "signed_in": True}

    def sign_out(self, request: Request, response: Response) -> dict[str, Any]:
        """Forget a cookie."""
        with self._lock:
            self._tokens.pop(request.cookies.get(_cookie(request), ""), None)
        response.delete_cookie(_cookie(request), httponly=True, samesite="strict", path="/")
        return {**self.state(request), "signed_in": False}

    def _of_cookie(self, request: Request) -> str:
        name, now = request.cookies.get(_cookie(request), ""), time.monotonic()
        with self._lock:
            used, token = self._tokens.get(name, (now, ""))
            if not token or now - used > IDLE:
                self._tokens.pop(name, None)
                return ""
            self._tokens[name] = (now, token)
            self._tokens.move_to_end(name)
            return token

    def routes(self) -> APIRouter:
        """The addresses of signing in."""
        router = APIRouter(prefix="/api/session", tags=["session"])

        @router.get("")
        def state(request: Request) -> dict[str, Any]:
            """Whether a token is required here, and whether this browser has shown one."""
            return self.state(request)

        @router.post("")
        def sign_in(request: Request, response: Response, asked: SignIn) -> dict[str, Any]:
            """Sign in with a token of the server's; the answer sets a cookie."""
            return self.sign_in(request, response, asked.token)

        @router.delete("")
        def sign_out(request: Request, response: Response) -> dict[str, Any]:
            """Sign out."""
            return self.sign_out(request, response)

        return router


class Door:
    """An ASGI middleware: refuses who may not come in before anything of a body is read.

    Args:
        app: What it stands before; it finds the caller's token by `caller`.
        sessions: Who is signed in.
        examples: The names of the images that everybody may see.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, examples: Iterable[str] = ()) -> None:
        self._app, self._sessions = app, sessions
        self._open = frozenset((*OPEN, *(f"/api/images/{name}" for name in examples)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] == "http" and scope["path"].startswith("/api/") and scope["path"] not in self._open:
            request = Request(scope)
            try:
                request.state.token = await run_in_threadpool(self._sessions.admit, request)
            except SpectraError as error:
                await problems.response(problems.problem(error))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def caller(request: Request) -> str:
    """The token of a request that was let in; empty for none."""
    return str(request.state.token)


def _cookie(request: Request) -> str:
    """A cookie's name: browsers keep those of one host's ports together."""
    return f"vlm_spectra_{(request.scope.get('server') or ('', 0))[1]}"
