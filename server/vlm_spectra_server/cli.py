"""The command line: `vlm-spectra serve`, `web`, `check`, `download`, ... Each is a function of its own module."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import Any

from vlm_spectra.errors import MissingExtraError, SpectraError

from .sentences import FULL, printable
from .serving import config

_SERVER = ("torch", "transformers", "grpc_channelz", "grpc_health", "grpc_reflection", "prometheus_client")
_WEB = ("fastapi", "uvicorn", "multipart", "grpc_health")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="vlm-spectra", description="Look inside a vision-language model that runs on somebody else's GPU."
    )
    parser.add_argument("--version", action="version", version=f"vlm-spectra {metadata.version('vlm-spectra')}")
    commands = parser.add_subparsers(dest="command", required=True)
    _serve(commands.add_parser("serve", help="host a model"))
    _web(commands.add_parser("web", help="serve the page that looks inside a model"))
    _check(commands.add_parser("check", help="measure what must hold between a model's hooks"))
    _download(commands.add_parser("download", help="fetch known checkpoints into the Hugging Face cache"))
    _config(commands.add_parser("config", help="the settings of a server, and where each comes from"))
    _top(commands.add_parser("top", help="what a server is doing, in the terminal"))
    _token(commands.add_parser("token", help="make a token for a server"))
    _sizes(commands.add_parser("sizes", help="shapes and bytes of captures of a real model, without its weights"))
    options = parser.parse_args(arguments)
    try:
        if options.command in ("serve", "web"):
            config.settle(options)
        if options.command == "web" and not options.server:
            _serve_here(options)
        for needed in (*options.needs, *(_WEB if getattr(options, "web", False) else ())):
            if importlib.util.find_spec(needed) is None:
                extras = "server,web" if needed in _WEB else "server"
                extras = "web" if options.command == "web" else extras  # a page over a server that runs elsewhere
                raise MissingExtraError(
                    f"`vlm-spectra {options.command}` needs {needed!r}, which is not installed: "
                    f"pip install 'vlm-spectra[{extras}]'."
                )
        if options.command in ("serve", "check"):
            names = importlib.import_module(".model_names", __package__)
            names.check_name(options.model, options.revision or None)
        with _page(options):
            status = int(importlib.import_module(options.module, __package__).command(options))
        print(end="", flush=True)
        return status
    except SpectraError as error:
        print(f"vlm-spectra: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output has seen enough
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in FULL:
            raise
        _drop_output()
        print(f"vlm-spectra: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """Let what is left of the output go nowhere, now and at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _placement(parser: argparse.ArgumentParser) -> None:
    """Where and how a model is loaded."""
    parser.add_argument("--dtype", default="", help="float32, bfloat16, float16; the checkpoint's own where empty")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", default="", help="cpu, cuda, cuda:1; the first GPU, else the CPU, where empty")
    where.add_argument(
        "--device-map", default="", help="spread over all GPUs: auto, balanced, balanced_low_0, sequential"
    )
    parser.add_argument("--attn-implementation", default="", help="sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--revision", default="", help="a revision of the hub; the newest where empty")


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".serving.command", needs=_SERVER)
    config.add_flags(parser, "serve")
    _placement(parser)


def _web(parser: argparse.ArgumentParser) -> None:
    flags = {"web_host": "--host", "web_port": "--port"}
    parser.set_defaults(module=".web.command", needs=_WEB, flags=flags)
    parser.add_argument("--host", dest="web_host", default="", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", dest="web_port", default="", help="the port; 0 for any free one (default: 55556)")
    config.add_flags(parser, "web", without=("host", "port", *flags))
    _placement(parser)


def _serve_here(options: argparse.Namespace) -> None:
    """`web` without a server is `serve --web` on this machine and any free port."""
    options.command, options.web, options.host, options.port = "serve", True, "127.0.0.1", "0"
    options.module, options.needs = ".serving.command", _SERVER
    config.settle(options)


def _page(options: Any) -> AbstractContextManager[Any]:
    """The page beside a server, where it was asked for."""
    if not getattr(options, "web", False):
        return nullcontext()
    return importlib.import_module(".web.command", __package__).beside(options)  # type: ignore[no-any-return]


def _check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".check", needs=("torch", "transformers"))
    parser.add_argument("model", help="spectra-tiny, a directory, or a Hugging Face hub name")
    parser.add_argument("--image", help="the picture to look at; a drawn one where none is given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _placement(parser)


def _download(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".downloads", needs=("huggingface_hub", "psutil"))
    parser.add_argument(
        "--model", action="append", default=[], help="a name of the list, or any Hugging Face hub name; repeatable"
    )
    parser.add_argument("--all-models", action="store_true", help="every checkpoint of the list")
    parser.add_argument("--list-models", action="store_true", help="show the list and end")
    parser.add_argument("--revision", default="", help="a revision of the hub; the newest where empty")


def _config(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".serving.config", needs=())
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    config.add_flags(parser)
    _placement(parser)


def _top(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".serving.top", needs=("prometheus_client",))
    parser.add_argument("url", help="host:port of a server's metrics, or their URL; VLM_SPECTRA_TOKEN has the token")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="look once and end")


def _token(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".serving.auth", needs=())
    parser.add_argument("name", help="whose it is")
    scopes = "infer,inspect,interventions,weights"
    parser.add_argument("--scopes", default=scopes, help=f"what it allows; * for all, admin too (default: {scopes})")
    parser.add_argument("--file", default="", help="the token file to add it to; the line is printed where empty")


def _sizes(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".sizes", needs=("torch", "transformers"))
    parser.add_argument("model", nargs="?", default="", help="a model; without one, the models that are known")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of the prompt, image tokens included")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--patches", type=int, default=1024, help="patches of the picture, for the vision tower")
    parser.add_argument("--hooks", nargs="*", default=[], help="names or wildcards; all hooks, one line each, if empty")
    parser.add_argument("--positions", type=int, default=0, help="positions kept of each row; 0 for all")
    parser.add_argument("--heads", type=int, default=0, help="heads kept; 0 for all")
    parser.add_argument("--dtype", default="", help="the type to cast to; the model's own where empty")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


if __name__ == "__main__":
    sys.exit(main())
