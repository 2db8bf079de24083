"""Who may do what: bearer tokens with scopes, or certificates.

A token file has one token a line: a name, its scopes separated by commas (`*` for all), and the token, or `sha256:` and
its SHA-256 in hexadecimal, so that the file need not hold the token itself. `vlm-spectra token` makes such lines. The
file is read again when it changes. Only SHA-256 digests are kept in memory, each is compared in constant time, and
nothing of a token stands in a log or an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_status import rpc_status
from vlm_spectra.errors import InvalidInputError, PermissionDeniedError, SpectraError, UnauthenticatedError
from vlm_spectra.files import contents
from vlm_spectra.network.status import to_status

log = logging.getLogger("vlm_spectra.server")

SCOPES = {
    "infer": "generate and forward",
    "inspect": "captures, hidden states, logit lens, attribution",
    "interventions": "changes inside the model, patch sweeps",
    "weights": "directions of the unembedding",
    "admin": "load and unload models, channelz",
}
"""What a token may allow."""

SHORTEST = 16
"""Characters that a token has at least; a shorter one can be guessed."""

TOKENS_VARIABLE = "VLM_SPECTRA_TOKENS"
"""The environment variable with lines like those of a token file."""

CHANNELZ = "grpc.channelz.v1.Channelz"
"""gRPC's own statistics of connections. They tell who is connected from where, so they want the scope `admin`."""

WANTED = ("www-authenticate", "Bearer")
"""Metadata by which a server that wants tokens tells so who asks for its health without one."""

_LOOK_AGAIN = 1.0
"""Seconds between two looks at the token file."""

_SAY_AGAIN = 10.0
"""Seconds between two lines in the log about callers without a token."""

_CALLS = {
    "Prepare": (),
    "Estimate": (),
    "ListModels": (),
    "GetModel": (),
    "Generate": ("infer",),
    "Forward": ("infer",),
    "RunWithCache": ("inspect",),
    "ReleaseCapture": ("inspect",),
    "LogitLens": ("inspect",),
    "Attribute": ("inspect",),
    "PatchSweep": ("inspect", "interventions"),
    "GetUnembedding": ("weights",),
    "LoadModel": ("admin",),
    "UnloadModel": ("admin",),
}
"""The scopes of each call; any token may make those without one."""


def needed(method: str, request: Any) -> tuple[str, ...]:
    """The scopes that a request needs: those of its call, and of what is in it."""
    scopes = _CALLS[method]
    body = request.run if method in ("RunWithCache", "Estimate") else request  # a capture of this run
    if getattr(body, "interventions", ()):
        scopes += ("interventions",)
    if body is not request and body.WhichOneof("call") == "generate":
        scopes += ("infer",)
    options = getattr(body, "options", None)
    if getattr(options, "output_hidden_states", False) or getattr(options, "output_attentions", False):
        scopes += ("inspect",)
    return scopes


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        name: The token's or the certificate's name; empty on a server that asks for neither.
        scopes: What it may do.
    """

    name: str
    scopes: frozenset[str]

    def check(self, scopes: tuple[str, ...]) -> None:
        """Refuse what is not allowed.

        Raises:
            PermissionDeniedError: A scope is missing.
        """
        missing = [scope for scope in scopes if scope not in self.scopes]
        if missing:
            raise PermissionDeniedError(
                f"this needs the scope {missing[0]!r} ({SCOPES[missing[0]]}), and the token of {self.name!r} has "
                f"{', '.join(sorted(self.scopes)) or 'none'}.",
                metadata={"scope": missing[0]},
            )


ANYONE = Caller("", frozenset(SCOPES))
"""The caller of a server without tokens."""


class Tokens:
    """The tokens that a server takes. Without any, everybody may do everything.

    Args:
        file: A token file; none where empty.
        text: Lines like those of a file.

    Raises:
        InvalidInputError: A line is not one of a token file, or the file cannot be read.
    """

    def __init__(self, file: str = "", text: str = "") -> None:
        self._file = Path(file) if file else None
        self._fixed = _parse(text, TOKENS_VARIABLE)
        self._callers = dict(self._fixed)
        self._stamp: tuple[int, ...] = ()
        self._looked = 0.0
        self._lock = threading.Lock()
        if self._file is not None:
            self._read()
            if self._file.stat().st_mode & 0o077:
                log.warning("%s can be read by other users of this machine: chmod 600 it", self._file)
        self.required = bool(self._callers) or self._file is not None

    def _read(self) -> None:
        assert self._file is not None
        try:
            state = self._file.stat()
            stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
            if stamp == self._stamp:
                return
            text = contents(self._file).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidInputError(f"the token file {self._file} cannot be read: {why}.", field="token_file") from None
        self._callers = {**self._fixed, **_parse(text, str(self._file))}
        if self._stamp:
            log.info("%s has changed: it has %d tokens now", self._file, len(self._callers) - len(self._fixed))
        self._stamp = stamp

    def _current(self) -> dict[bytes, Caller]:
        """The tokens of now; a file that has become unreadable leaves the last ones in force."""
        with self._lock:
            if self._file is not None and time.monotonic() - self._looked > _LOOK_AGAIN:
                self._looked = time.monotonic()
                try:
                    self._read()
                except InvalidInputError as error:
                    log.error("%s The tokens stay as they were.", error)
            return self._callers

    def caller(self, authorization: str | bytes) -> Caller:
        """Who comes with this `authorization`, a header's value: `Bearer` and the token.

        Raises:
            UnauthenticatedError: Nobody known.
        """
        if not self.required:
            return ANYONE
        if isinstance(authorization, str):
            authorization = authorization.encode("utf-8", "replace")
        kind, _, token = authorization.partition(b" ")
        if kind.lower() != b"bearer" or not token:
            raise UnauthenticatedError("this server wants a token: connect(..., token=...).")
        digest, found = hashlib.sha256(token.strip()).digest(), None
        for known, caller in self._current().items():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise UnauthenticatedError("the token is not one of this server's.")
        return found

    def knows(self, name: str) -> bool:
        """Whether a caller of this name still has a token."""
        return not self.required or any(caller.name == name for caller in self._current().values())


def _parse(text: str, source: str) -> dict[bytes, Caller]:
    found: dict[bytes, Caller] = {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        where = f"line {number} of {source}"
        if len(parts) != 3:
            raise InvalidInputError(f"{where} is not `name scopes token`.", field="token_file")
        name, listed, token = parts
        scopes = frozenset(SCOPES if listed == "*" else listed.split(","))
        unknown = scopes - set(SCOPES)
        if unknown:
            raise InvalidInputError(
                f"{where} has an unknown scope{_harmless(sorted(unknown)[0])}; there are {', '.join(SCOPES)} and *.",
                field="token_file",
            )
        if token.startswith("sha256:"):
            if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", token):
                raise InvalidInputError(f"{where} has a SHA-256 that is not 64 hexadecimal digits.", field="token_file")
            digest = bytes.fromhex(token[7:])
        elif len(token) < SHORTEST:
            raise InvalidInputError(
                f"{where} has a token of {len(token)} characters; it can be guessed, {SHORTEST} are the least.",
                field="token_file",
            )
        elif not token.isascii() or not token.isprintable():
            raise InvalidInputError(f"{where} has a token that is not printable ASCII.", field="token_file")
        else:
            digest = hashlib.sha256(token.encode()).digest()
        if digest in found:
            raise InvalidInputError(f"{where} has the token of a line before it.", field="token_file")
        found[digest] = Caller(name, scopes)
    return found


def _harmless(text: str) -> str:
    """What may stand in a message: nothing as long as a token, which may have been put in the wrong place."""
    return f" {text!r}" if len(text) < SHORTEST else ""


def caller_of(tokens: Tokens, metadata: Any, certificate: str = "") -> Caller:
    """Who makes a gRPC call: by token where the server has tokens, else by certificate, else anyone."""
    if tokens.required:
        return tokens.caller(_authorization(metadata))
    return Caller(certificate, ANYONE.scopes) if certificate else ANYONE


class Authenticator(grpc.ServerInterceptor):
    """Refuses who has no token before anything of a call is read, on every service.

    Only `Check` of `grpc.health.v1` for the server as a whole is open: probes of orchestrators cannot send tokens.

    Args:
        tokens: The server's tokens.
        refused: Called for each who has none.
    """

    def __init__(self, tokens: Tokens, refused: Callable[[], None]) -> None:
        self._tokens, self._refused, self._said = tokens, refused, -math.inf

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The handler, or one that refuses."""
        try:
            caller = self._tokens.caller(_authorization(handler_call_details.invocation_metadata))
            if handler_call_details.method.startswith(f"/{CHANNELZ}/"):
                caller.check(("admin",))
        except PermissionDeniedError as error:
            return _refusing(error)
        except UnauthenticatedError as error:
            if handler_call_details.method == "/grpc.health.v1.Health/Check":
                return _overall_health(continuation(handler_call_details), error, self._count)
            return _refusing(error, self._count)
        return _watched(continuation(handler_call_details), lambda: self._tokens.knows(caller.name))

    def _count(self, context: grpc.ServicerContext) -> None:
        """Count a caller without a token, and now and then say so."""
        self._refused()
        if time.monotonic() - self._said > _SAY_AGAIN:
            self._said = time.monotonic()
            log.warning("%s has shown no token of this server's", context.peer())


def _authorization(metadata: Any) -> str | bytes:
    """The one header that shows a token; nothing where there are several."""
    found = [value for name, value in metadata or () if name == "authorization"]
    return found[0] if len(found) == 1 else ""


def _refusing(
    error: SpectraError, tell: Callable[[grpc.ServicerContext], None] = lambda context: None
) -> grpc.RpcMethodHandler:
    def refuse(requests: Any, context: grpc.ServicerContext) -> Any:
        tell(context)
        context.abort_with_status(rpc_status.to_status(to_status(error)))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _watched(handler: Any, known: Callable[[], bool]) -> grpc.RpcMethodHandler | None:
    """The handler; where it is that of a `Watch`, which may last for weeks, one that tells a known caller alone."""
    behaviour = None if handler is None else handler.unary_stream
    if not getattr(behaviour, "experimental_non_blocking", False):
        return handler  # type: ignore[no-any-return]

    def watch(request: Any, context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
        behaviour(request, context, lambda message: send(message) if known() else context.cancel())

    watch.experimental_non_blocking = True  # type: ignore[attr-defined]
    return grpc.unary_stream_rpc_method_handler(watch, handler.request_deserializer, handler.response_serializer)


def _overall_health(
    handler: Any, error: SpectraError, tell: Callable[[grpc.ServicerContext], None]
) -> grpc.RpcMethodHandler:
    def check(request: Any, context: grpc.ServicerContext) -> Any:
        if request.service:
            tell(context)
            context.abort_with_status(rpc_status.to_status(to_status(error)))
        context.set_trailing_metadata((WANTED,))
        return handler.unary_unary(request, context)

    return grpc.unary_unary_rpc_method_handler(check, handler.request_deserializer, handler.response_serializer)


def command(options: Any) -> int:
    """`vlm-spectra token`: a fresh token, and the line of it for the token file."""
    token = secrets.token_urlsafe(32)
    line = f"{options.name} {options.scopes} sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    named = [caller.name for caller in _parse(line, "the command line").values()]
    if named != [options.name] or not options.name.isprintable():
        raise InvalidInputError(
            f"{options.name!r} is no token's name: a name is a printable word that does not begin with #.", field="name"
        )

    def tell() -> None:
        print(f"for {options.name}, to keep: {token}", file=sys.stderr, flush=True)

    if options.file:
        _append(options.file, line, tell)
    else:
        print(line, flush=True)
        tell()
    return 0


def _append(path: str, line: str, tell: Callable[[], None]) -> None:
    """Add a line to a token file, and tell of it; where either fails, the file is as it was, or empty if new.

    Raises:
        InvalidInputError: It is no token file, or cannot be written.
    """
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "ab+", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidInputError(f"{path} is no file but a device or a pipe.", field="file")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = file.read()
            _parse(before.decode("utf-8-sig"), path)
            rest = b"\n" * (before[-1:] not in (b"", b"\n")) + line.encode() + b"\n"
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                tell()
            except BaseException:
                file.truncate(len(before))
                raise
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path} is no token file: it is not UTF-8.", field="file") from None
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}.", field="file") from None
