"""Where Prometheus reads the metrics: one page over HTTP, for who has a token where the server has tokens."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from vlm_spectra.errors import InvalidInputError, UnauthenticatedError
from vlm_spectra.network.secure import is_loopback, joined

from .auth import Tokens
from .tls import Certificates, Following

log = logging.getLogger("vlm_spectra.server")

_PATIENCE = 10.0
"""Seconds that a connection may stand still."""
_MOST = 32
"""Connections at a time; for another the oldest is cut off."""


class Scrape:
    """Answers at `url`: on this machine in plain text, beyond it over TLS with the server's certificate.

    Args:
        registry: The metrics.
        host: The address to listen on.
        port: The port; 0 for any free one.
        tokens: Who may read; any token of theirs will do.
        certificates: For TLS, where the address can be reached from other machines.

    Raises:
        InvalidInputError: It cannot listen there.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        tokens: Tokens | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        host = host.strip("[]")
        secure = certificates is not None and not is_loopback(host)
        following = Following(certificates, certificates.context) if certificates is not None and secure else None
        server_class = type("Server", (_Server,), {"following": following, "address_family": _family(host)})
        try:
            self._server = make_server(host, port, _guarded(make_wsgi_app(registry), tokens), server_class, _Handler)
        except (OSError, OverflowError) as error:
            raise InvalidInputError(
                f"metrics cannot be served on {joined(host, port)}: {error}.", field="metrics_port"
            ) from None
        self.url = f"{'https' if secure else 'http'}://{joined(host, self._server.server_port)}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _guarded(app: Callable[..., Iterable[bytes]], tokens: Tokens | None) -> Callable[..., Iterable[bytes]]:
    """The page, for who may read it."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            if tokens is not None:
                tokens.caller(environ.get("HTTP_AUTHORIZATION", ""))
        except UnauthenticatedError as error:
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
            return [f"{error}\n".encode()]
        return app(environ, start_response)

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection; a handshake is the thread's own matter too."""

    daemon_threads = True
    request_queue_size = 64
    following: Following[ssl.SSLContext] | None = None

    def __init__(self, *arguments: Any) -> None:
        self._open: deque[Any] = deque()
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def get_request(self) -> Any:
        connection, address = super().get_request()
        if self.following is not None:
            context, _ = self.following.current()
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in the place of the oldest one where there are too many."""
        with self._lock:
            self._open.append(request)
            oldest = self._open.popleft() if len(self._open) > _MOST else None
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection for metrics failed", exc_info=True)

    def shutdown_request(self, request: Any) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._open.remove(request)
        try:
            super().shutdown_request(request)
        except (OSError, ssl.SSLError):
            request.close()


class _Handler(WSGIRequestHandler):
    """Says nothing of each request, and waits for none for ever."""

    timeout = _PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
