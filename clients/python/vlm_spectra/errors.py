"""Everything that can go wrong, the same in process and across the network.

    SpectraError
    ├── InvalidInputError (ValueError)     what was asked is not possible as it stands
    │   ├── UnknownHookError (KeyError)    no such hook, or its layer is out of range
    │   ├── InvalidImageError              not an image, damaged, or too large
    │   ├── PromptTooLongError             more tokens than the model's context
    │   ├── ShapeMismatchError             a tensor does not fit the activation it is meant for
    │   ├── UnsupportedInterventionError   code where only data can go
    │   └── OverLimitError                 more than this server takes in one request
    ├── UnauthenticatedError               the server wants a token, and the one given is not among its own
    ├── PermissionDeniedError              the token lacks a scope
    │   └── ModelNotAllowedError           a model that this server does not load for clients
    ├── UnknownModelError                  the server holds no such model
    ├── CaptureNotFoundError               expired, or never existed
    ├── ImageNotFoundError                 the server wants the image's bytes (clients send them and try again)
    ├── CaptureTooLargeError               a narrower selection would fit
    ├── BusyError                          the queue is full; try again after `retry_after` seconds
    │   └── ClientBusyError                this client has as many requests at work as one client may have
    ├── OutOfDeviceMemoryError             the device's memory did not suffice
    ├── DeadlineError                      the time given was not enough
    ├── CancelledError                     the caller, or a server that stops, ended the call
    ├── UnavailableError                   no server there, it went away, or a model that is not ready
    │   └── WorkerDiedError                the model's worker died while it ran this request
    ├── NotSupportedError                  this server or family does not do that
    ├── InternalError                      a fault of the server's
    └── MissingExtraError (ImportError)    a part of the library that is not installed

Each class has a `reason`, the stable name that crosses the network in `google.rpc.ErrorInfo`, and the gRPC status
`code` it travels under. A server raises these; a client raises the same ones again, with the server's sentence.
"""

from __future__ import annotations

from typing import ClassVar


def shown(value: object) -> str:
    """A value as a message names it: on one line, and not long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of more digits than Python writes, or an object of the caller's own
        text = f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= 120 else f"{text[:90]} ... {text[-20:]}"


class SpectraError(Exception):
    """The root of all errors of this library.

    Attributes:
        message: One sentence: what was wrong and what is possible.
        field: The argument that was refused, where one was.
        metadata: Machine-readable details, strings by name.
        retry_after: Seconds after which trying again makes sense, or None.
        request_id: The server's name for the request, where there was one.
    """

    reason: ClassVar[str] = "UNKNOWN"
    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        metadata: dict[str, str] | None = None,
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message


class InvalidInputError(SpectraError, ValueError):
    """What was asked is not possible as it stands."""

    reason = "INVALID_INPUT"
    code = "INVALID_ARGUMENT"


class UnknownHookError(InvalidInputError, KeyError):
    """No such hook, or its layer is out of range; the message names the nearest valid ones."""

    reason = "UNKNOWN_HOOK"


class InvalidImageError(InvalidInputError):
    """Not an image, damaged, or too large."""

    reason = "INVALID_IMAGE"


class PromptTooLongError(InvalidInputError):
    """More tokens than the model's context holds, or than this server takes."""

    reason = "PROMPT_TOO_LONG"


class ShapeMismatchError(InvalidInputError):
    """A tensor does not fit the activation it is meant for."""

    reason = "SHAPE_MISMATCH"


class UnsupportedInterventionError(InvalidInputError):
    """Code where only data can go: an intervention that cannot cross the network."""

    reason = "UNSUPPORTED_INTERVENTION"


class OverLimitError(InvalidInputError):
    """More than this server takes in one request; `metadata` has the limit's name, its value and what was asked."""

    reason = "OVER_LIMIT"


class UnauthenticatedError(SpectraError):
    """The server wants a bearer token, and there was none or not one of its own."""

    reason = "UNAUTHENTICATED"
    code = "UNAUTHENTICATED"


class PermissionDeniedError(SpectraError):
    """The token lacks a scope that the call needs; the message names it."""

    reason = "MISSING_SCOPE"
    code = "PERMISSION_DENIED"


class ModelNotAllowedError(PermissionDeniedError):
    """The server does not load this model for its clients; the message names what it loads."""

    reason = "MODEL_NOT_ALLOWED"


class UnknownModelError(SpectraError):
    """The server holds no such model."""

    reason = "UNKNOWN_MODEL"
    code = "NOT_FOUND"


class CaptureNotFoundError(SpectraError):
    """The capture has expired, or never existed."""

    reason = "CAPTURE_NOT_FOUND"
    code = "NOT_FOUND"


class ImageNotFoundError(SpectraError):
    """The server wants the bytes of the images whose hashes stand in `metadata["sha256"]`, comma-separated."""

    reason = "IMAGE_NOT_FOUND"
    code = "FAILED_PRECONDITION"


class CaptureTooLargeError(SpectraError):
    """The capture is over the server's limit; the message names a narrower selection that fits."""

    reason = "CAPTURE_TOO_LARGE"
    code = "RESOURCE_EXHAUSTED"


class BusyError(SpectraError):
    """The server is busy: as many requests wait, calls are at work, models are loaded, or as much memory is taken, as
    there may be; trying again after `retry_after` seconds makes sense."""

    reason = "QUEUE_FULL"
    code = "RESOURCE_EXHAUSTED"


class ClientBusyError(BusyError):
    """This client has as many requests at work as one client may have; one of them has to end first."""

    reason = "CLIENT_BUSY"


class OutOfDeviceMemoryError(SpectraError):
    """The device's memory did not suffice; the next request works."""

    reason = "OUT_OF_DEVICE_MEMORY"
    code = "RESOURCE_EXHAUSTED"


class DeadlineError(SpectraError):
    """The time given was not enough."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class CancelledError(SpectraError):
    """The caller, or a server that stops, ended the call."""

    reason = "CANCELLED"
    code = "CANCELLED"


class UnavailableError(SpectraError):
    """No server there, it went away in mid-stream or stops, or the model is not ready, leaves or comes back."""

    reason = "UNAVAILABLE"
    code = "UNAVAILABLE"


class WorkerDiedError(UnavailableError):
    """The model's worker died while it ran this request, perhaps because of it, and is being replaced; it may be tried
    again once."""

    reason = "WORKER_DIED"


class NotSupportedError(SpectraError):
    """This server, or this model's family, does not do that."""

    reason = "NOT_SUPPORTED"
    code = "UNIMPLEMENTED"


class InternalError(SpectraError):
    """A fault of the server's; its log has the details under `request_id`."""

    reason = "INTERNAL"
    code = "INTERNAL"


class MissingExtraError(SpectraError, ImportError):
    """A part of the library that is not installed; the message says what to install."""

    reason = "MISSING_EXTRA"
    code = "FAILED_PRECONDITION"


def _descendants(cls: type[SpectraError]) -> list[type[SpectraError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _descendants(child))]


BY_REASON: dict[str, type[SpectraError]] = {cls.reason: cls for cls in _descendants(SpectraError)}
"""Every error class by its stable reason."""

BY_CODE: dict[str, type[SpectraError]] = {
    "CANCELLED": CancelledError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "INVALID_ARGUMENT": InvalidInputError,
    "UNAVAILABLE": UnavailableError,
    "UNIMPLEMENTED": NotSupportedError,
    "INTERNAL": InternalError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
}
"""What a bare gRPC status (from a proxy, or from gRPC itself) becomes."""
