"""`vlm-spectra serve`: a server with one model, until a signal ends it."""

from __future__ import annotations

import logging
import os
import resource
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

FILES = 65_536
"""Connections and captures that may be open, if the system allows so many; often it gives 1,024 unless asked."""


def command(options: Any) -> int:
    """Serve; the exit status."""
    settings = options.settings
    few_arenas()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if most == resource.RLIM_INFINITY else min(most, FILES), most))
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
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # else it is nohup's
    for number in (signal.SIGINT, signal.SIGTERM, *hang_up):
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
        _say(f"serving {settings.model} on {server.address}")
        stop.wait()
        server.refuse()
        waits = "; ".join(server.guard.at_work())
        _say(f"stopping; waiting up to {settings.grace:g} s for: {waits or 'nothing'}")
    finally:
        server.stop(settings.grace, hurry)
    return 0


def _say(text: str) -> None:
    """A line on standard output; where nobody reads it or its disk is full, the server goes on without."""
    try:
        print(f"vlm-spectra: {text}", flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends, which would write the rest again
