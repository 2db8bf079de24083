"""`vlm-spectra serve`: a server with one model, until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

from vlm_spectra import tracing

from . import logs
from .auth import TOKENS_VARIABLE, Tokens
from .host import Loading
from .memory import few_arenas
from .server import Server
from .tls import Certificates

log = logging.getLogger("vlm_spectra.server")


def command(options: Any) -> int:
    """Serve; the exit status."""
    settings = options.settings
    few_arenas()
    logs.begin(settings.log_format)
    os.environ[logs.FORMAT_VARIABLE] = settings.log_format
    tracing.begin("vlm-spectra-server")
    tokens = Tokens(settings.token_file, os.environ.get(TOKENS_VARIABLE, ""))
    settings.check_exposure(tokens.required)
    for missing in settings.exposure(tokens.required):
        reachable = " and ".join(settings.exposed)
        log.warning("INSECURE: %s can be reached from other machines, without %s", reachable, missing)
    for name in settings.ignored:
        log.warning("%s is no setting and has no effect", name)
    certificates = None
    if settings.tls_certificate:
        certificates = Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    server = Server(
        settings.host,
        options.port,
        settings.limits,
        tokens=tokens,
        certificates=certificates,
        private=getattr(options, "private", ""),
        allow_models=settings.allow_model,
    )
    if settings.metrics_port:
        where = (settings.metrics_host, settings.metrics_port)
        log.info("metrics are at %s", server.metrics.listen(*where, tokens, certificates))
    stop, hurry = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: (hurry if stop.is_set() else stop).set())
    device = settings.device_map or settings.device
    server.start(Loading(settings.model, settings.dtype, device, settings.attn_implementation, settings.revision))
    try:
        while not server.first.settled.wait(0.2):
            if stop.is_set():
                return 0
        if not server.first.ready:
            print(f"vlm-spectra: {server.first.model.error}", file=sys.stderr)
            return 1
        print(f"vlm-spectra: serving {settings.model} on {server.address}", flush=True)
        stop.wait()
        waits = "; ".join(server.guard.at_work())
        print(f"vlm-spectra: stopping; waiting up to {settings.grace:g} s for: {waits or 'nothing'}", flush=True)
    finally:
        server.stop(settings.grace, hurry)
    return 0
