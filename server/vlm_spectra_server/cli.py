"""The command line: `vlm-spectra serve`, `web`, `check`, `download`, ... Each is a function of its own module."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vlm_spectra.errors import MissingExtraError, SpectraError

from .serving import config

_DEFAULTS = argparse.ArgumentDefaultsHelpFormatter
_WEB = ("fastapi", "uvicorn", "multipart")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="vlm-spectra", description="Look inside a vision-language model that runs on somebody else's GPU."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _serve(commands.add_parser("serve", help="host a model"))
    _web(commands.add_parser("web", help="serve the page that looks inside a model", formatter_class=_DEFAULTS))
    _check(commands.add_parser("check", help="measure what must hold between a model's hooks"))
    _download(commands.add_parser("download", help="fetch known checkpoints into the Hugging Face cache"))
    _config(commands.add_parser("config", help="the settings of a server, and where each comes from"))
    _top(commands.add_parser("top", help="what a server is doing, in the terminal", formatter_class=_DEFAULTS))
    _token(commands.add_parser("token", help="make a token for a server", formatter_class=_DEFAULTS))
    _sizes(commands.add_parser("sizes", help="shapes and bytes of captures of a real model, without its weights"))
    options = parser.parse_args(arguments)
    if options.command == "web" and not options.server:
        return main(_serving(options))
    try:
        for needed in (*options.needs, *(_WEB if getattr(options, "web", False) else ())):
            if importlib.util.find_spec(needed) is None:
                raise MissingExtraError(
                    f"`vlm-spectra {options.command}` needs {needed!r}, which is not installed: "
                    f"pip install 'vlm-spectra[{'server,web' if needed in _WEB else 'server'}]'."
                )
        if options.command == "serve":
            config.settle(options)
        with _page(options):
            return int(importlib.import_module(options.module, __package__).command(options))
    except SpectraError as error:
        print(f"vlm-spectra: {error}", file=sys.stderr)
        return 1


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
    needs = ("torch", "transformers", "grpc_health", "grpc_reflection", "prometheus_client")
    parser.set_defaults(module=".serving.command", needs=needs)
    config.add_flags(parser)
    _placement(parser)
    parser.add_argument("--web", action="store_true", help="also serve the page that looks inside the model")
    parser.add_argument("--web-host", default="127.0.0.1", help="the address of the page")
    parser.add_argument("--web-port", type=int, default=55556, help="the port of the page; 0 for any free one")


def _web(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".web.command", needs=_WEB)
    parser.add_argument("--server", default="", help="host:port of a server; without one, a model is hosted here")
    parser.add_argument("--tls", default="", help="to that server: a PEM file of authorities, or yes for public ones")
    parser.add_argument("--model", default="spectra-tiny", help="the model to host where no server is given")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=55556, help="the port; 0 for any free one")
    _placement(parser)


def _serving(options: argparse.Namespace) -> list[str]:
    """`web` without a server is `serve --web` on any free port."""
    named = ("model", "dtype", "device", "device_map", "attn_implementation", "revision")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in named if getattr(options, name)]
    return ["serve", "--port=0", "--web", f"--web-host={options.host}", f"--web-port={options.port}", *given]


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
    parser.set_defaults(module=".downloads", needs=("huggingface_hub",))
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
    parser.add_argument("url", help="host:port of a server's metrics, or their URL")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="look once and end")


def _token(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(module=".serving.auth", needs=())
    parser.add_argument("name", help="whose it is")
    parser.add_argument("--scopes", default="infer,inspect,interventions,weights", help="what it allows; * for all")
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
