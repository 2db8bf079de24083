"""`vlm-spectra serve`: a server with one model, until a signal ends it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import Any

from .host import Loading
from .server import Limits, Server


def command(options: Any) -> int:
    """Serve; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        logging.warning("whoever reaches %s can use this server: it has neither TLS nor tokens yet", options.host)
    server = Server(options.host, options.port, Limits(capture_bytes=int(options.max_capture_gb * 1e9)))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    device = options.device_map or options.device
    server.start(Loading(options.model, options.dtype, device, options.attn_implementation, options.revision))
    try:
        while not server.first.settled.wait(0.2):
            if stop.is_set():
                return 0
        if not server.first.ready:
            print(f"vlm-spectra: {server.first.model.error}", file=sys.stderr)
            return 1
        print(f"vlm-spectra: serving {options.model} on {server.address}", flush=True)
        stop.wait()
        print("vlm-spectra: stopping, running requests may finish", flush=True)
    finally:
        server.stop(options.grace)
    return 0
