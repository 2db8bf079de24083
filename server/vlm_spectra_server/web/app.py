"""The web app: the page, its files, and the REST interface that the page itself uses."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import vlm_spectra as vs
from fastapi import FastAPI, Query, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from vlm_spectra.colours import SCALES
from vlm_spectra.lens_page import lens_page
from vlm_spectra.secure import TLSLike

from . import analyses, problems
from . import questions as ask
from .guard import Guard
from .models import Models
from .problems import WebError
from .runs import Runs
from .uploads import UploadLimits, Uploads

STATIC = Path(__file__).parent / "static"
LENS_POLICY = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; " \
    "img-src data:; frame-ancestors 'self'"  # fmt: skip
"""A lens page is a document of its own, with its script in it: it runs apart from the app, and reaches nothing."""
LINES = "application/x-ndjson"

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": problems.TITLES[status], "content": {problems.MEDIA: {"schema": {"type": "object"}}}}
    for status in (400, 404, 409, 413, 422, 429, 501, 502, 503, 504)
}
EITHER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The result; with `stream`, lines of JSON: progress, then the result or a problem",
          "content": {"application/json": {}, LINES: {"schema": {"type": "string"}}}},
    **REFUSALS,
}  # fmt: skip


class Pages:
    """Pages that were made, for a while: at most `most`, the oldest go first."""

    def __init__(self, most: int = 24, seconds: float = 1800.0) -> None:
        self._pages: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._most, self._seconds = most, seconds
        self._lock = threading.Lock()

    def keep(self, lens: vs.LogitLens) -> str:
        """Keep a lens's page; its address."""
        page, name = lens_page(lens), secrets.token_urlsafe(12)
        with self._lock:
            self._pages[name] = (time.monotonic(), page)
            while len(self._pages) > self._most:
                self._pages.popitem(last=False)
        return f"/api/pages/{name}"

    def get(self, name: str) -> str:
        """A page.

        Raises:
            WebError: There is none, or no longer.
        """
        with self._lock:
            made, page = self._pages.get(name, (0.0, ""))
        if not page or time.monotonic() - made > self._seconds:
            raise WebError("that page is not here, or no longer: run the analysis again.", 404, "NO_SUCH_PAGE")
        return page


def create_app(
    address: str, *, hosts: Iterable[str] = (), limits: UploadLimits | None = None, tls: TLSLike = None
) -> FastAPI:
    """The app over one server.

    Args:
        address: The server's, host:port.
        hosts: The names under which the app may be called; empty for any.
        limits: What uploads may take.
        tls: As for `vlm_spectra.connect`.
    """
    limits = limits or UploadLimits()
    gallery = {path.name: path for path in sorted((STATIC / "gallery").glob("*.png"))}
    models, uploads, pages = Models(address, tls), Uploads(gallery, limits), Pages()
    runs = Runs(models)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        uploads.close()
        models.close()

    app = FastAPI(
        title="VLM Spectra",
        description="Look inside a vision-language model. Errors are problem details (RFC 9457).",
        version=vs.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, hosts=hosts, body_bytes=limits.file_bytes + (1 << 20))
    problems.install(app)

    async def answer(question: ask.Question, work: Callable[[vs.RemoteVLM], Iterator[dict[str, Any]]]) -> Response:
        events = runs.events(question.model, work)
        if question.stream:
            return StreamingResponse(_lines(events), media_type=LINES, headers={"Cache-Control": "no-store"})
        return _Patient(events)

    @app.post("/api/upload", responses=REFUSALS | {415: REFUSALS[422]}, tags=["images"])
    async def upload(file: UploadFile) -> dict[str, Any]:
        """Upload an image: PNG, JPEG, WebP, GIF or BMP, by what is in it. Its own name is not used."""
        data = await file.read(limits.file_bytes + 1)
        name, size = await run_in_threadpool(uploads.add, data)
        return {"filename": name, "width": size[0], "height": size[1]}

    @app.get("/api/images/{filename}", responses=REFUSALS, response_class=FileResponse, tags=["images"])
    def image(filename: str) -> Response:
        """An uploaded image, or an example."""
        return Response(uploads.read(filename), media_type="image/png", headers={"Cache-Control": "private"})

    @app.get("/api/gallery", tags=["images"])
    def examples() -> list[dict[str, str]]:
        """The example screens, with a task for each."""
        return json.loads((STATIC / "gallery" / "gallery.json").read_text("utf-8"))  # type: ignore[no-any-return]

    @app.get("/api/model/status", responses=REFUSALS, tags=["models"])
    def status(model: Annotated[str, Query(max_length=300)] = "") -> dict[str, Any]:
        """What a model is doing: loading, ready, failed, restarting, unavailable (no server), unknown."""
        return {**models.status(model), "server": address}

    @app.get("/api/model/options", responses=REFUSALS, tags=["models"])
    def options() -> dict[str, Any]:
        """The models that can be chosen; `state` is empty for those the server does not hold."""
        return {"models": models.options()}

    @app.post("/api/model/select", responses=REFUSALS, tags=["models"])
    def select(question: ask.Select) -> dict[str, Any]:
        """Have the server load a model, in the background; `status` says how far it is."""
        return models.select(question.name)

    @app.post("/api/model/patch-info", responses=EITHER, tags=["models"])
    async def patch_info(question: ask.Question) -> Response:
        """The tokens of a prompt, and which part of the image each image token looks at."""
        return await answer(question, lambda model: analyses.patch_info(model, question, uploads.read))

    @app.post("/api/predict", responses=EITHER, tags=["analyses"])
    async def predict(question: ask.Predict) -> Response:
        """An answer, its click in pixels of the image, the probability of each token."""
        return await answer(question, lambda model: analyses.predict(model, question, uploads.read))

    @app.post("/api/forward", responses=EITHER, tags=["analyses"])
    async def forward(question: ask.Forward) -> Response:
        """The most probable next tokens at every position, and the entropy there."""
        return await answer(question, lambda model: analyses.forward(model, question, uploads.read))

    @app.post("/api/attention", responses=EITHER, tags=["analyses"])
    async def attention(question: ask.Attention) -> Response:
        """What one token reads: with a layer and a head, over the image; without, all of them packed."""
        return await answer(question, lambda model: analyses.attention(model, question, uploads.read))

    @app.post("/api/attribution", responses=EITHER, tags=["analyses"])
    async def attribution(question: ask.Attribution) -> Response:
        """Which parts of the image and of the model made a token."""
        return await answer(question, lambda model: analyses.attribution(model, question, uploads.read))

    @app.post("/api/logit-lens", responses=EITHER, tags=["analyses"])
    async def logit_lens(question: ask.Lens) -> Response:
        """What each layer would answer at every position, and the address of a page that shows it."""
        return await answer(question, lambda model: analyses.logit_lens(model, question, uploads.read, pages.keep))

    @app.post("/api/patching", responses=EITHER, tags=["analyses"])
    async def patching(question: ask.Patching) -> Response:
        """Activation patching between two prompts, layers by positions or heads."""
        return await answer(question, lambda model: analyses.patching(model, question, uploads.read))

    @app.get("/api/pages/{name}", responses=REFUSALS, response_class=HTMLResponse, tags=["analyses"])
    def page(name: str) -> Response:
        """A page that an analysis made."""
        headers = {"Content-Security-Policy": LENS_POLICY, "Cache-Control": "private"}
        return HTMLResponse(pages.get(name), headers=headers)

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


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for event in events:
        yield (json.dumps(event, separators=(",", ":")) + "\n").encode("ascii")


class _Patient(Response):
    """The result of a run as one JSON document; the run ends when the caller leaves."""

    def __init__(self, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__()
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        async for event in self._events:
            if event["type"] == "result":
                await JSONResponse(event["data"])(scope, receive, send)
            elif event["type"] == "error":
                await problems.response(event["problem"])(scope, receive, send)
            elif await request.is_disconnected():
                await self._events.aclose()  # type: ignore[attr-defined]
                return
