"""The web app, put together: the page and its files, the REST interface, the calls for browsers, signing in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
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
from .sessions import Door, Sessions
from .uploads import UploadLimits, Uploads, too_large
from .upstream import Upstream

STATIC = Path(__file__).parent / "static"


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
        yield
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
    bound = uploads.limits.file_bytes
    app.add_middleware(
        Guard,
        hosts=hosts,
        body_bytes=bound + (1 << 20),
        origins=mine,
        too_large=lambda size: too_large("the request has", "one_image_bytes", bound, size),
    )
    app.add_middleware(rpc.Beside, door=rpc.door(calls, hosts, origins, mine))
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
