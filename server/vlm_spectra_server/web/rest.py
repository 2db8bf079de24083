"""The REST interface: images, models, analyses. The page itself uses nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse

from . import analyses, problems
from . import questions as ask
from .models import Models
from .pages import MEDIA, Kind, Pages
from .runs import Runs, Work
from .sessions import BEARER, caller
from .uploads import Uploads

LENS_POLICY = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; " \
    "img-src data:; frame-ancestors 'self'"  # fmt: skip
"""A lens page is a document of its own, with its script in it: it runs apart from the app, and reaches nothing."""
DECODED_AT_ONCE = 2
"""Images: each takes a few bytes of memory a pixel."""
LINES = "application/x-ndjson"
AT_ONCE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""An answer in lines is neither kept nor, by a reverse proxy that knows the second, gathered first."""

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": problems.TITLES[status], "content": {problems.MEDIA: {"schema": {"type": "object"}}}}
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 501, 502, 503, 504)
}
UPLOADING = REFUSALS | {
    status: {**REFUSALS[422], "description": problems.TITLES[status]} for status in (415, 507)
}  # fmt: skip
EITHER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The result; with `stream`, lines of JSON: progress, then the result or a problem",
          "content": {"application/json": {}, LINES: {"schema": {"type": "string"}}}},
    **REFUSALS,
}  # fmt: skip


def routes(models: Models, uploads: Uploads, pages: Pages, examples: Path) -> APIRouter:
    """The interface.

    Args:
        models: The server's models.
        uploads: The images.
        pages: Pages that analyses made.
        examples: A JSON file: the example screens, with a task for each.
    """
    router, runs, by = APIRouter(dependencies=[Depends(BEARER)]), Runs(models), Depends(caller)
    decoding = asyncio.Semaphore(DECODED_AT_ONCE)  # not in a thread: those are few, and everybody's

    async def answer(question: ask.Question, token: str, work: Work) -> Response:
        events = runs.events(question.model, token, work)
        if question.stream:
            return StreamingResponse(_lines(events), media_type=LINES, headers=AT_ONCE)
        return _Patient(events)

    @router.post("/api/upload", responses=UPLOADING, tags=["images"])
    async def upload(file: UploadFile) -> dict[str, Any]:
        """Upload an image: PNG, JPEG, WebP, GIF or BMP, by what is in it. Its own name is not used."""
        async with decoding:
            data = await file.read(uploads.limits.file_bytes + 1)
            name, size = await run_in_threadpool(uploads.add, data)
        return {"filename": name, "width": size[0], "height": size[1]}

    @router.get("/api/images/{filename}", responses=REFUSALS, response_class=FileResponse, tags=["images"])
    def image(filename: str) -> Response:
        """An uploaded image, or an example."""
        size, pieces = uploads.pieces(filename)
        headers = {"Cache-Control": "private", "Content-Length": f"{size}"}
        return StreamingResponse(pieces, media_type="image/png", headers=headers)

    @router.get("/api/gallery", tags=["images"])
    def gallery() -> list[dict[str, str]]:
        """The example screens, with a task for each."""
        return json.loads(examples.read_text("utf-8"))  # type: ignore[no-any-return]

    @router.get("/api/model/status", responses=REFUSALS, tags=["models"])
    def status(model: Annotated[str, Query(max_length=300)] = "", token: str = by) -> dict[str, Any]:
        """What a model is doing: loading, ready, failed, restarting, unavailable (no server), unknown."""
        upstream = models.upstream
        where = {"server": upstream.shown, "tls": upstream.secure, "token": bool(token)}
        return {**models.status(model, token), **where}

    @router.get("/api/model/options", responses=REFUSALS, tags=["models"])
    def options(token: str = by) -> dict[str, Any]:
        """The models that can be chosen; `state` is empty for those the server does not hold."""
        return {"models": models.options(token)}

    @router.post("/api/model/select", responses=REFUSALS, tags=["models"])
    def select(question: ask.Select, token: str = by) -> dict[str, Any]:
        """Have the server load a model, in the background; `status` says how far it is."""
        return models.select(question.name, token)

    @router.post("/api/model/patch-info", responses=EITHER, tags=["models"])
    async def patch_info(question: ask.Question, token: str = by) -> Response:
        """The tokens of a prompt, and which part of the image each image token looks at."""
        return await answer(question, token, lambda *on: analyses.patch_info(*on, question, uploads.read))

    @router.post("/api/predict", responses=EITHER, tags=["analyses"])
    async def predict(question: ask.Predict, token: str = by) -> Response:
        """An answer, its click in pixels of the image, the probability of each token."""
        return await answer(question, token, lambda *on: analyses.predict(*on, question, uploads.read))

    @router.post("/api/forward", responses=EITHER, tags=["analyses"])
    async def forward(question: ask.Forward, token: str = by) -> Response:
        """The most probable next tokens at every position, and the entropy there."""
        return await answer(question, token, lambda *on: analyses.forward(*on, question, uploads.read))

    @router.post("/api/attention", responses=EITHER, tags=["analyses"])
    async def attention(question: ask.Attention, token: str = by) -> Response:
        """What one token reads: with a layer and a head, over the image; without, all of them packed."""
        return await answer(question, token, lambda *on: analyses.attention(*on, question, uploads.read))

    @router.post("/api/attribution", responses=EITHER, tags=["analyses"])
    async def attribution(question: ask.Attribution, token: str = by) -> Response:
        """Which parts of the image and of the model made a token."""
        return await answer(question, token, lambda *on: analyses.attribution(*on, question, uploads.read))

    @router.post("/api/logit-lens", responses=EITHER, tags=["analyses"])
    async def logit_lens(question: ask.Lens, token: str = by) -> Response:
        """What each layer would answer at every position, and the address of a page that shows it."""
        keep = partial(pages.keep, token=token)
        return await answer(question, token, lambda *on: analyses.logit_lens(*on, question, uploads.read, keep))

    @router.post("/api/patching", responses=EITHER, tags=["analyses"])
    async def patching(question: ask.Patching, token: str = by) -> Response:
        """Activation patching between two prompts, layers by positions or heads."""
        return await answer(question, token, lambda *on: analyses.patching(*on, question, uploads.read))

    @router.get("/api/pages/{name}", responses=REFUSALS, response_class=HTMLResponse, tags=["analyses"])
    def page(name: str) -> Response:
        """A page that an analysis made."""
        headers = {"Content-Security-Policy": LENS_POLICY, "Cache-Control": "private"}
        try:
            return HTMLResponse(pages.get(name), headers=headers)
        except problems.WebError as gone:  # in a frame it is read too
            refusal = problems.response(problems.problem(gone))
            refusal.headers.update(headers)
            return refusal

    @router.get("/api/pages/{name}/lens.{kind}", responses=REFUSALS, response_class=Response, tags=["analyses"])
    def page_file(name: str, kind: Kind) -> Response:
        """A lens as a file: its page, its readings as JSON or CSV, or a picture of its last positions."""
        headers = {"Content-Disposition": f'attachment; filename="lens.{kind}"', "Cache-Control": "private"}
        return Response(pages.file(name, kind), media_type=MEDIA[kind], headers=headers)

    return router


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
