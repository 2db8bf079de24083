"""The web app, put together: the page and its files, the REST interface, the calls for browsers, signing in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import vlm_spectra as vs
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from vlm_spectra.pictures.colours import SCALES

from ..serving.limits import Limits
from . import problems, rest, rpc
from .guard import Guard
from .models import Models
from .pages import Pages
from .patience import Patience
from .problems import WebError
from .sessions import Door, Sessions
from .uploads import UploadLimits, Uploads, too_large
from .upstream import Upstream

STATIC = Path(__file__).parent / "static"
UPLOAD, SIGN_IN = "/api/upload", "/api/session"
QUESTION_BYTES, SIGN_IN_BYTES = 1 << 20, 1 << 14
"""The largest body of a question: its texts are bounded, each letter may be written in twelve; and that of a token."""
TIDY_SECONDS = 60.0
"""Between two looks for what has not been used for long."""


def create_app(
    server: str | Upstream,
    *,
    hosts: Iterable[str] = (),
    public: str = "",
    limits: UploadLimits | None = None,
    origins: Iterable[str] = (),
    taken: Limits | None = None,
) -> FastAPI:
    """The app over one server.

    Args:
        server: The server, or its address: host:port.
        hosts: The names under which the app may be called; empty for any.
        public: The origin that browsers see, where a reverse proxy stands before the app; its name is one of the names.
        limits: What uploads may take.
        origins: Other sites whose pages may make the calls of the contract; see `rpc`.
        taken: What those calls may take; the defaults where None.
    """
    upstream = Upstream(server) if isinstance(server, str) else server
    hosts = {*hosts, urlsplit(public).hostname or ""} if public and hosts else hosts
    mine = (public,) if public else ()
    gallery = {path.name: path for path in sorted((STATIC / "gallery").glob("*.png"))}
    models, sessions, calls = Models(upstream), Sessions(upstream), rpc.Calls(upstream, taken or Limits())
    uploads, pages = Uploads(gallery, limits or UploadLimits()), Pages()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidy(uploads, pages))
        yield
        tidying.cancel()
        await calls.close()
        uploads.close()
        models.close()
        upstream.close()

    app = FastAPI(
        title="VLM Spectra",
        description="Look inside a vision-language model. Errors are problem details (RFC 9457).",
        version=vs.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Door, sessions=sessions, examples=gallery)
    app.add_middleware(
        Guard, hosts=hosts, origins=mine, too_large=_bounds(uploads.limits), seconds=calls.limits.stall_seconds
    )
    app.add_middleware(rpc.Beside, door=rpc.door(calls, hosts, origins, mine))
    app.add_middleware(Patience, seconds=calls.limits.stall_seconds)
    problems.install(app)
    app.include_router(sessions.routes())
    app.include_router(rest.routes(models, uploads, pages, STATIC / "gallery" / "gallery.json"))

    @app.get("/scales.json", include_in_schema=False)
    def scales() -> Response:
        return JSONResponse(SCALES, headers={"Cache-Control": "max-age=3600"})

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return FileResponse(STATIC / "docs.html")

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _bounds(limits: UploadLimits) -> Callable[[str, int], WebError | None]:
    """The refusals of bodies that are too large, by path."""

    def refusal(path: str, size: int) -> WebError | None:
        if path == UPLOAD:
            file = limits.file_bytes  # what stands around it in the body is not much
            return too_large("the request has", "one_image_bytes", file, size) if size > file + (1 << 20) else None
        most = SIGN_IN_BYTES if path == SIGN_IN else QUESTION_BYTES
        if size <= most:
            return None
        details = {"limit": "body_bytes", "value": f"{most}", "asked": f"{size}"}
        what = f"the request has {size:,} bytes or more; at most {most:,} are taken here."
        return WebError(what, 413, "TOO_LARGE", metadata=details)

    return refusal


async def _tidy(*kept: Uploads | Pages) -> None:
    """Let go, as long as the app runs, what nobody has used for long."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        for each in kept:
            await asyncio.to_thread(each.forget)
