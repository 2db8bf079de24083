"""Errors as problem details (RFC 9457): one sentence in `detail`, the stable name of `docs/errors.md` in `reason`."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from vlm_spectra.errors import CaptureTooLargeError, InternalError, SpectraError

from ..sentences import FULL

log = logging.getLogger("vlm_spectra.web")

MEDIA = "application/problem+json"

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 409,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "DEADLINE_EXCEEDED": 504,
    "CANCELLED": 409,
    "UNAVAILABLE": 503,
    "UNIMPLEMENTED": 501,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "INTERNAL": 502,
}
"""HTTP statuses by gRPC's. A fault of the model's server is a bad gateway: the web app itself is well."""

TITLES = {
    400: "That is not possible as it stands",
    401: "Not signed in",
    403: "Not allowed",
    404: "Not found",
    405: "Not a method of this address",
    408: "Too slow",
    409: "Ended",
    413: "Too large",
    415: "Not a kind of file that is taken",
    422: "The request is not understood",
    429: "Too much at once",
    501: "Not supported",
    502: "The model's server failed",
    503: "The model is not there",
    504: "Out of time",
    507: "No room",
}


class WebError(SpectraError):
    """A refusal of the web app's own.

    Args:
        message: One sentence.
        status: The HTTP status.
        name: The stable name of the reason.
        field: The field that was refused.
        metadata: Details, strings by name.
    """

    def __init__(
        self, message: str, status: int, name: str, field: str = "", metadata: dict[str, str] | None = None
    ) -> None:
        super().__init__(message, field=field, metadata=metadata)
        self.status, self.name = status, name


def problem(error: Exception) -> dict[str, Any]:
    """An error as problem details."""
    if isinstance(error, OSError) and error.errno in FULL:
        log.error("a file has no room: %s", error)
        error = WebError("there is no room for files on the machine of this app; try again later.", 507, "NO_ROOM")
    if not isinstance(error, SpectraError):
        log.error("an analysis failed", exc_info=error)
        error = InternalError(f"the web app failed on this: {type(error).__name__}.")
    status, reason = STATUSES.get(error.code, 502), error.reason
    if isinstance(error, CaptureTooLargeError):
        status = 413
    if isinstance(error, WebError):
        status, reason = error.status, error.name
    details = _details(status, str(error), reason, error.field, error.retry_after, error.request_id)
    return details | {name: error.metadata[name] for name in ("limit", "value", "asked") if name in error.metadata}


def _details(
    status: int, detail: str, reason: str, field: str = "", retry_after: float | None = None, request_id: str = ""
) -> dict[str, Any]:
    extra = {"field": field, "retry_after": retry_after, "request_id": request_id}
    return {
        "type": f"urn:vlm-spectra:problem:{reason.lower().replace('_', '-')}",
        "title": TITLES.get(status, "Refused"),
        "status": status,
        "detail": _clean(detail),
        "reason": reason,
        **{name: value for name, value in extra.items() if value},
    }


def _clean(text: str) -> str:
    """Text that UTF-8 can carry."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def response(details: dict[str, Any]) -> JSONResponse:
    """Problem details as an HTTP response."""
    headers = {"Retry-After": str(math.ceil(details["retry_after"]))} if "retry_after" in details else {}
    if details["status"] == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(details, details["status"], headers, MEDIA)


def install(app: FastAPI) -> None:
    """Make every error of an app problem details."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return response(problem(error))

    async def not_understood(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        said = f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}."
        if first["type"] == "json_invalid":  # its place is a number of letters
            where, said = "the request", f"the request is no JSON: {first['ctx']['error']}."
        return response(_details(422, said, "INVALID_REQUEST", where))

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, OSError):  # a body was to be kept in a file
            return response(problem(error.__cause__))
        detail = {404: "there is nothing at this address."}.get(error.status_code, f"{error.detail}".rstrip(".") + ".")
        made = response(_details(error.status_code, detail, "HTTP"))
        made.headers.update(error.headers or {})
        return made

    app.add_exception_handler(SpectraError, refused)
    app.add_exception_handler(OSError, refused)
    app.add_exception_handler(RequestValidationError, not_understood)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, refused)
