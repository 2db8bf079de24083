"""`vlm-spectra web`: the web app over a server, and the same beside a server in one process."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.secure import TLSLike

from .app import create_app

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def command(options: Any) -> int:
    """Serve the app; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if ":" not in options.server:
        raise InvalidInputError(f"an address is host:port, not {options.server!r}.", field="server")
    listening = _listen(options.host, options.port)
    server = _server(options.server, options.host, options.tls == "yes" or options.tls or None)
    print(f"vlm-spectra: the page is at {_url(listening)}", flush=True)
    server.run(sockets=[listening])
    return 0


@contextmanager
def beside(options: Any) -> Iterator[None]:
    """Serve the app on a thread while the block runs a server of the same process.

    Args:
        options: Those of `serve`. A port of 0 is replaced by a free one, so that both sides know it.
    """
    if options.port == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options.port = free.getsockname()[1]
    listening = _listen(options.web_host, options.web_port)
    everywhere = options.host in ("0.0.0.0", "::", "[::]")
    server = _server(f"{'127.0.0.1' if everywhere else options.host}:{options.port}", options.web_host)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="web", daemon=True)
    thread.start()
    print(f"vlm-spectra: the page is at {_url(listening)}", flush=True)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(5)


def _server(address: str, host: str, tls: TLSLike = None) -> uvicorn.Server:
    if host not in LOOPBACK:
        logging.warning("whoever reaches %s can use this page: it has neither TLS nor passwords", host)
    app = create_app(address, hosts=LOOPBACK if host in LOOPBACK else (), tls=tls)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # from here on nobody is refused, however long the rest takes
    except (OSError, OverflowError) as error:
        listening.close()
        raise InvalidInputError(
            f"the page cannot be served on {host}:{port}: the port is taken or the address is not this machine's.",
            field="port",
        ) from error
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
