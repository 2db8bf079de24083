"""Errors as gRPC statuses with `google.rpc` details, and back."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from ..errors import BY_CODE, BY_REASON, InternalError, OverLimitError, SpectraError, UnavailableError

DOMAIN = "vlm-spectra"

LONGEST = 1000
"""Bytes of a sentence on the wire. A status travels in HTTP/2 headers of 8 KB, the sentence in it up to five times, and
what a caller wrote may stand there."""


TRANSPORT = 2
"""So many times `max_message_mb` is the most that gRPC itself takes in: up to there a refusal names the limit."""


def to_status(error: SpectraError, request_id: str = "") -> status_pb2.Status:
    """An error as a status: `ErrorInfo` always, `BadRequest` for a refused argument, `RetryInfo` where it helps."""
    message = sentence(error.message)
    metadata = {name: value[:LONGEST] for name, value in error.metadata.items()}
    metadata["request_id"] = request_id or error.request_id
    details: list[any_pb2.Any] = [
        _packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message, details=details)


def from_status(status: status_pb2.Status) -> SpectraError:
    """The error in a status that a server of ours sent."""
    cls: type[SpectraError] | None = None
    metadata: dict[str, str] = {}
    field, retry_after = "", None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            cls, metadata = BY_REASON.get(info.reason), dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest()
            detail.Unpack(request)
            field = request.field_violations[0].field if request.field_violations else ""
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    cls = cls or BY_CODE.get(code_pb2.Code.Name(status.code), InternalError)
    request_id = metadata.pop("request_id", "")
    return cls(status.message, field=field, metadata=metadata, retry_after=retry_after, request_id=request_id)


def from_rpc_error(error: Any, address: str) -> SpectraError:
    """The error behind a failed call, ours or gRPC's own."""
    status = _sent(error)
    if status is not None:
        return from_status(status)
    code = error.code().name if hasattr(error, "code") and error.code() is not None else "UNKNOWN"
    details = str(error.details()) if hasattr(error, "details") else str(error)
    if code == "UNAVAILABLE" and ("handshake" in details.lower() or "certificate" in details.lower()):
        return UnavailableError(f"the TLS connection to {address} failed; is tls= what the server wants? ({details})")
    if code == "UNAVAILABLE":
        return UnavailableError(
            f"the server at {address} cannot be reached or went away ({details}); is `vlm-spectra serve` running "
            "there, and is tls= what the server wants?"
        )
    too_large = re.search(r"SERVER: Received .* \((\d+) vs\.? (\d+)", details)
    if code == "RESOURCE_EXHAUSTED" and too_large is not None:
        asked, most = f"{int(too_large[1]) / 1e6:.12g}", f"{int(too_large[2]) / TRANSPORT / 1e6:.12g}"
        return OverLimitError(
            f"the request has {asked} MB; {address} takes at most {most} MB (max_message_mb).",
            field="request",
            metadata={"limit": "max_message_mb", "asked": asked, "value": most},
        )
    if code == "INTERNAL" and details == "Exception serializing request!":
        return OverLimitError("the request has more than the 2 GB that one message can have.", field="request")
    return BY_CODE.get(code, InternalError)(f"the call to {address} failed with {code}: {details}")


def from_server(error: Any) -> bool:
    """Whether a failed call has a status that a server of ours sent, and did not fail on the way."""
    return _sent(error) is not None


def _sent(error: Any) -> status_pb2.Status | None:
    """The status in a failed call's metadata; None where there is none, or none that is whole."""
    if not hasattr(error, "trailing_metadata"):
        return None
    try:
        status: status_pb2.Status | None = rpc_status.from_call(error)
        if status is not None:
            from_status(status)
    except (DecodeError, ValueError):  # damaged on its way, it does not fit the call's own status or its parts
        return None
    return status


def sentence(text: str) -> str:
    """A message as one line of bounded length."""
    line = " ".join(text.split("\n")).strip().encode("utf-8", "replace")
    return line.decode() if len(line) <= LONGEST else f"{line[: LONGEST - 4].decode('utf-8', 'ignore')} ..."


def _packed(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
