"""`vlm-spectra web`: the web app over a server, and the same beside a server in one process."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.files import contents
from vlm_spectra.network.secure import TLS, TOKEN_VARIABLE, TLSLike, is_loopback, joined

from ..serving import logs
from ..serving.auth import TOKENS_VARIABLE, Tokens
from ..serving.config import Config
from ..serving.limits import LIMITS
from ..serving.memory import keep_room
from ..serving.tls import Certificates, Following
from . import rpc
from .app import create_app
from .patience import connections
from .uploads import UploadLimits
from .upstream import Upstream

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_OWN_LIMITS = (
    "max_image_mb", "max_image_megapixels", "kept_images_mb", "max_message_mb", "max_client_requests", "max_calls",
    "max_stall_seconds",
)  # fmt: skip
"""What the page itself holds or takes."""
_HOSTING = (
    "model", "dtype", "device", "device_map", "attn_implementation", "revision", "grace", "allow_model", "metrics_port",
    "metrics_host", *(limit.setting for limit in LIMITS if limit.setting not in _OWN_LIMITS),
)  # fmt: skip
"""Settings without a meaning for a page over a server elsewhere; a file or an environment may have them for both."""

log = logging.getLogger("vlm_spectra.web")


def command(options: Any) -> int:
    """Serve the app over a server elsewhere; the exit status."""
    settings: Config = options.settings
    logs.begin(settings.log_format)
    if ":" not in settings.server:
        raise InvalidInputError(f"an address is host:port, not {settings.server!r}.", field="server")
    if settings.token_file or os.environ.get(TOKENS_VARIABLE):
        raise InvalidInputError(
            f"who may use this page is told by the tokens of the server at {settings.server}; --token-file goes with "
            "a model that is hosted here.",
            field="token_file",
        )
    for name in _HOSTING:
        if settings.sources[name].startswith("--"):
            raise InvalidInputError(
                f"{settings.sources[name]} goes with a model that is hosted here, and this page is over the server at "
                f"{settings.server}.",
                field=name,
            )
    settings.check_exposure(tokens=True)
    for name in settings.ignored:
        log.warning("%s is no setting and has no effect", name)
    upstream = Upstream(settings.server, _tls(settings), own_token=_lent(settings), exposed=_exposed(settings))
    listening = _listen(settings.web_host, settings.web_port)
    server = _server(settings, upstream)
    print(f"vlm-spectra: the page is at {_url(listening, settings)}", flush=True)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else it is nohup's
        signal.signal(signal.SIGHUP, server.handle_exit)
    server.run(sockets=[listening])
    return 0


@contextmanager
def beside(options: Any) -> Iterator[None]:
    """Serve the app on a thread while the block runs a server of the same process.

    Args:
        options: Those of `serve`. A port of 0 is replaced by a free one, so that both sides know it, and `private`
            becomes the server's address for the app: a socket that this machine's user alone can reach.
    """
    settings: Config = options.settings
    logs.begin(settings.log_format)
    settings.check_exposure(Tokens(settings.token_file, os.environ.get(TOKENS_VARIABLE, "")).required)
    if options.port == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options.port = free.getsockname()[1]
    listening = _listen(settings.web_host, settings.web_port)
    folder = tempfile.mkdtemp(prefix="vlm-spectra-")
    options.private = f"unix:{folder}/server"
    host = socket.gethostname() if settings.host in ("0.0.0.0", "::", "[::]") else settings.host
    shown, secure = joined(host, options.port), bool(settings.tls_certificate)
    upstream = Upstream(
        options.private, shown=shown, secure=secure, own_token=_lent(settings), exposed=_exposed(settings)
    )
    server = _server(settings, upstream)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="web", daemon=True)
    thread.start()
    print(f"vlm-spectra: the page is at {_url(listening, settings)}", flush=True)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(5)
        shutil.rmtree(folder, ignore_errors=True)


def _exposed(settings: Config) -> bool:
    """Whether callers come from other machines, and nothing about the page itself tells who they are."""
    if settings.public_url:  # what reaches the page is the proxy's
        return not settings.insecure
    return not (is_loopback(settings.web_host) or settings.tls_client_ca or settings.insecure)


def _public(settings: Config) -> str:
    """The origin of the page for browsers, where that is a proxy's.

    Raises:
        InvalidInputError: It is none, or tokens would go to it in plain text.
    """
    if not settings.public_url:
        return ""
    (origin,) = rpc.named([settings.public_url], "public_url")
    if not (origin.startswith("https:") or settings.insecure):
        raise InvalidInputError(
            f"tokens would go to {origin} in plain text: serve the page over https, or add --insecure.",
            field="public_url",
        )
    return origin


def _lent(settings: Config) -> str:
    """The app's own token, for callers without one; empty where such callers could be anybody."""
    if settings.public_url or _exposed(settings):
        return ""
    if not settings.server_token_file:
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        return contents(settings.server_token_file).decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"the token file {settings.server_token_file} cannot be read: {why}.", field="server_token_file"
        ) from None


def _tls(settings: Config) -> TLSLike:
    """TLS to the server, as for `vlm_spectra.connect`."""
    ca = "" if settings.server_ca == "yes" else settings.server_ca
    if settings.server_certificate or settings.server_key:
        return TLS(ca=ca, certificate=settings.server_certificate, key=settings.server_key)
    return ca or (True if settings.server_ca else None)


def _server(settings: Config, upstream: Upstream) -> uvicorn.Server:
    keep_room()
    if settings.insecure and (settings.public_url or not is_loopback(settings.web_host)):
        log.warning("INSECURE: whoever reaches %s can use this page", settings.public_url or settings.web_host)
    app = create_app(
        upstream,
        hosts=(*LOOPBACK, settings.web_host) if is_loopback(settings.web_host) or settings.public_url else (),
        public=_public(settings),
        limits=UploadLimits.of(settings.limits),
        origins=settings.cors_origin,
        taken=settings.limits,
    )
    config = uvicorn.Config(
        app,
        http=connections(settings.limits.stall_seconds),
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    config.load()
    if settings.tls_certificate:
        config.ssl = _context(Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca))
    return uvicorn.Server(config)


def _context(files: Certificates) -> ssl.SSLContext:
    """TLS of the page, which follows its files: each connection gets what is in them when it begins."""
    following = Following(files, files.context)
    first, _ = following.current()

    def begin(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        connection.context = following.current()[0]

    first.sni_callback = begin
    return first


def _listen(host: str, port: int) -> socket.socket:
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # from here on nobody is refused, however long the rest takes
    except (OSError, OverflowError) as error:
        listening.close()
        raise InvalidInputError(
            f"the page cannot be served on {joined(host, port)}: the port is taken or the address is not this "
            "machine's.",
            field="web_port",
        ) from error
    return listening


def _url(listening: socket.socket, settings: Config) -> str:
    scheme = "https" if settings.tls_certificate else "http"
    return f"{scheme}://{joined(*listening.getsockname()[:2])}"
