"""The gRPC server behind the app: how it is reached, and with whose token.

Who may do what is that server's business. A caller's own token goes along with what it asks, so scopes hold for each;
the app's token, where it has one, is lent to callers who show none only where they are known to be its owner: on this
machine, or by a certificate.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from vlm_spectra.errors import NotSupportedError
from vlm_spectra.network.secure import TLS, TLSLike, bearer, channel, credentials, refuse_plain_text
from vlm_spectra.network.status import from_rpc_error
from vlm_spectra.remote import KEEPALIVE_SECONDS, MESSAGE_BYTES
from vlm_spectra.v1 import model_service_pb2 as pb

from ..serving.auth import WANTED
from .problems import WebError

LOOK_AGAIN = 15.0
"""Seconds that an answer to "does it want tokens?" and "is this token one of its own?" holds."""
SECONDS = 5.0
"""How long the app waits for a short answer."""


@dataclass
class Upstream:
    """A server as the app reaches it.

    Attributes:
        address: host:port, or `unix:PATH` of the same process's server.
        tls: As for `vlm_spectra.connect`.
        shown: The address that other clients use; `address` where empty.
        secure: Whether those need TLS.
        own_token: The app's own; lent to callers who show none.
        exposed: Whether callers can come from other machines and nothing but the server's tokens tells who they are.
    """

    address: str
    tls: TLSLike = None
    shown: str = ""
    secure: bool = False
    own_token: str = field(default="", repr=False)
    exposed: bool = False

    def __post_init__(self) -> None:
        self.shown = self.shown or self.address
        self.secure = self.secure or self.tls not in (None, False)
        options = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
        self.channel: grpc.Channel = channel(self.address, self.tls, "", options)
        self._accepted: dict[str, float] = {}
        self._demanding: tuple[bool, float] = (False, -LOOK_AGAIN)
        self._lock = threading.Lock()

    def metadata(self, token: str) -> tuple[tuple[str, str], ...]:
        """What goes along with a call that has no connection of its own.

        Raises:
            InvalidInputError: The token has characters that no token has, or would go over a network in plain text.
        """
        if token:
            refuse_plain_text(self.address, self.tls)
        return bearer(token)

    @property
    def certified(self) -> bool:
        """Whether the app shows a certificate of its own."""
        return isinstance(self.tls, TLS) and bool(self.tls.certificate)

    def aio_channel(self) -> grpc.aio.Channel:
        """A connection for callers who may be anybody, each with a token of theirs; see `refuse_if_lent`.

        Raises:
            InvalidInputError: A file of the TLS cannot be read.
        """
        made, options = credentials(self.address, self.tls)
        options += [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
        ]
        if made is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        return grpc.aio.secure_channel(self.address, made, options=options)

    def ask(self, method: str, request: Any, response: Any, token: str) -> Any:
        """The answer of `ModelService`.

        Raises:
            SpectraError: The server refuses, or does not answer.
        """
        path = f"/vlm_spectra.v1.ModelService/{method}"
        return self._call(path, request, response, self.metadata(token))[0]

    def _call(self, path: str, request: Any, response: Any, metadata: Any = ()) -> tuple[Any, grpc.Call]:
        """A call's answer, and the call itself."""
        start = self.channel.unary_unary(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        try:
            return start.with_call(request, timeout=SECONDS, metadata=metadata)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.shown) from None
        except ValueError as error:
            raise WebError("the app is being closed.", 503, "UNAVAILABLE") from error

    def wants_tokens(self) -> bool:
        """Whether the server refuses who shows no token; it says so to who asks for its health.

        Raises:
            SpectraError: It does not answer.
        """
        with self._lock:
            demanding, since = self._demanding
        if time.monotonic() - since < LOOK_AGAIN:
            return demanding
        asked = health_pb2.HealthCheckRequest()
        _, call = self._call("/grpc.health.v1.Health/Check", asked, health_pb2.HealthCheckResponse)
        demanding = WANTED in (call.trailing_metadata() or ())
        with self._lock:
            self._demanding = demanding, time.monotonic()
        return demanding

    def check(self, token: str) -> None:
        """Refuse a caller whose token is not one of the server's; asked of the server, and remembered for a while.

        Raises:
            UnauthenticatedError: It is not.
            SpectraError: The server does not answer.
        """
        self.refuse_if_open()
        now = time.monotonic()
        with self._lock:
            self._accepted = {each: then for each, then in self._accepted.items() if now - then < LOOK_AGAIN}
            if token in self._accepted:
                return
        self.ask("ListModels", pb.ListModelsRequest(), pb.ListModelsResponse, token)
        with self._lock:
            self._accepted[token] = now

    def refuse_if_open(self) -> None:
        """Serve nobody where everybody could come: the app is open to other machines, the server to everybody.

        Raises:
            WebError: It is so.
            SpectraError: The server does not answer.
        """
        if self.exposed and not self.wants_tokens():
            raise WebError(
                f"this page can be reached from other machines, and the server at {self.shown} asks nobody for a "
                "token: start that with --token-file, or this with --insecure.",
                503,
                "OPEN_SERVER",
            )

    def refuse_if_lent(self) -> None:
        """Keep the app's certificate from standing for a caller who may be anybody.

        Where the server wants a token besides, the certificate opens the line and the token says who calls.

        Raises:
            NotSupportedError: The certificate is all that the server asks for.
            SpectraError: The server does not answer.
        """
        if self.certified and not self.wants_tokens():
            raise NotSupportedError(
                f"the server at {self.shown} knows callers by certificate alone, and this app lends its own to nobody: "
                "call the server itself, or start it with --token-file."
            )

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()
