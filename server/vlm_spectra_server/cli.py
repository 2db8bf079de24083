"""The command line: `vlm-spectra serve`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from vlm_spectra.errors import MissingExtraError, SpectraError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="vlm-spectra", description="Look inside a vision-language model that runs on somebody else's GPU."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="host a model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    serve.add_argument("--model", default="spectra-tiny", help="spectra-tiny, a directory, or a Hugging Face hub name")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    serve.add_argument("--port", type=int, default=50051, help="the port; 0 for any free one")
    serve.add_argument("--dtype", default="", help="float32, bfloat16, float16; the checkpoint's own where empty")
    serve.add_argument("--device", default="", help="cpu, cuda, cuda:1, auto; the first GPU, else the CPU, where empty")
    serve.add_argument("--attn-implementation", default="", help="sdpa, eager, flash_attention_2, ...")
    serve.add_argument("--max-capture-gb", type=float, default=4.0, help="the largest capture of one request")
    serve.add_argument("--grace", type=float, default=5.0, help="seconds that running requests get when it stops")
    options = parser.parse_args(arguments)
    try:
        return _serve(options)
    except SpectraError as error:
        print(f"vlm-spectra: {error}", file=sys.stderr)
        return 1


def _serve(options: Any) -> int:
    # Only the worker imports PyTorch, but better to know now that it can.
    for name in ("torch", "transformers", "grpc_health", "grpc_reflection"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"serving needs {name!r}, which is not installed: pip install 'vlm-spectra[server]'."
            )
    from .serving.host import Loading
    from .serving.server import Limits, Server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        logging.warning("whoever reaches %s can use this server: it has neither TLS nor tokens yet", options.host)
    server = Server(options.host, options.port, Limits(capture_bytes=int(options.max_capture_gb * 1e9)))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server.start(Loading(options.model, options.dtype, options.device, options.attn_implementation))
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


if __name__ == "__main__":
    sys.exit(main())
