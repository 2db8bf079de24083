"""A server's settings: one list, from which come the flags, the environment's names, the TOML file's keys, the docs.

A setting's value is the flag's, else the environment's (`VLM_SPECTRA_` and its name in capitals), else the TOML file's,
else the default. `vlm-spectra config` shows each and where it came from.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_spectra.errors import InvalidInputError, shown
from vlm_spectra.files import contents
from vlm_spectra.network.secure import is_loopback

from ..sentences import printable
from .limits import LIMITS, Limits

PREFIX = "VLM_SPECTRA_"

_NOT_SETTINGS = {"VLM_SPECTRA_TOKEN", "VLM_SPECTRA_TOKENS", "VLM_SPECTRA_CONFIG"}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: As in the TOML file; the flag has dashes.
        default: The value where none is given; its type is the setting's. Of a list (of texts) it is a tuple: its flag
            can be given several times, in the environment commas separate, in TOML it is an array.
        help: What it is.
        least: The least value of a number.
        most: The most.
        choices: The values there are, where they can be counted.
        own_flag: Whether the flag is made elsewhere.
        only: The one command that it is of; all where empty.
    """

    name: str
    default: Any
    help: str
    least: float = 0
    most: float = math.inf
    choices: tuple[str, ...] = ()
    own_flag: bool = False
    only: str = ""

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.name.upper()

    def read(self, value: Any, source: str) -> Any:
        """A value of the setting's type, from text or TOML.

        Raises:
            InvalidInputError: It is not one.
        """
        kind = type(self.default)
        if kind is tuple:
            return self._read_list(value, source)
        try:
            if kind is bool and isinstance(value, str):
                value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
            elif kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
                given, value = value, kind(value)
                if not math.isfinite(value) or (isinstance(given, float) and value != given):
                    raise ValueError
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise ValueError
        except (KeyError, ValueError, OverflowError):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            raise InvalidInputError(
                f"{source}: {self.name} is {names[kind]}, not {shown(value)}.", field=self.name
            ) from None
        if kind in (int, float) and value < self.least:
            raise InvalidInputError(
                f"{source}: {self.name} is at least {self.least:g}, not {shown(value)}.", field=self.name
            )
        if kind in (int, float) and value > self.most:
            raise InvalidInputError(
                f"{source}: {self.name} is at most {self.most:.10g}, not {shown(value)}.", field=self.name
            )
        if self.choices and value not in self.choices:
            raise InvalidInputError(
                f"{source}: {self.name} is {' or '.join(self.choices)}, not {shown(value)}.", field=self.name
            )
        return value

    def _read_list(self, value: Any, source: str) -> tuple[str, ...]:
        texts = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise InvalidInputError(f"{source}: {self.name} is a list of texts, not {shown(value)}.", field=self.name)
        return tuple(text.strip() for text in texts if text.strip())


SETTINGS = (
    Setting("model", "spectra-tiny", "spectra-tiny, a directory, or a Hugging Face hub name"),
    Setting("host", "127.0.0.1", "the address to listen on"),
    Setting("port", 50051, "the port; 0 for any free one", most=65535),
    Setting("dtype", "", "the type of the weights; the checkpoint's own where empty", own_flag=True),
    Setting("device", "", "cpu, cuda, cuda:1; the first GPU, else the CPU, where empty", own_flag=True),
    Setting("device_map", "", "spread over all GPUs: auto, balanced, ...", own_flag=True),
    Setting("attn_implementation", "", "sdpa, eager, ...; transformers' choice where empty", own_flag=True),
    Setting("revision", "", "a revision of the hub; the newest where empty", own_flag=True),
    Setting("grace", 5.0, "seconds that running requests get when it stops"),
    Setting("tls_certificate", "", "the server's certificate chain, a PEM file"),
    Setting("tls_key", "", "its key, a PEM file"),
    Setting("tls_client_ca", "", "authorities of clients' certificates, a PEM file: each client must show one"),
    Setting("token_file", "", "tokens, one a line: name, scopes, token (see `vlm-spectra token`)"),
    Setting("insecure", False, "listen beyond this machine although there is no TLS or no token"),
    Setting("allow_model", (), "a name, or a pattern, of models that clients may load; the known checkpoints if none"),
    Setting("web", False, "also serve the page that looks inside the model", only="serve"),
    Setting("web_host", "127.0.0.1", "the address of the page"),
    Setting("web_port", 55556, "the port of the page; 0 for any free one", most=65535),
    Setting("public_url", "", "the page's address for browsers, where a reverse proxy stands before it"),
    Setting("cors_origin", (), "another site whose pages may make calls, as https://host or https://host:port"),
    Setting("server", "", "host:port of a server elsewhere; without one, a model is hosted here", only="web"),
    Setting("server_ca", "", "TLS to it: its certificate's authorities, a PEM file; yes: public ones", only="web"),
    Setting("server_certificate", "", "the page's own certificate, where that server wants one", only="web"),
    Setting("server_key", "", "its key, a PEM file", only="web"),
    Setting("server_token_file", "", "a file with the page's own token; VLM_SPECTRA_TOKEN where empty", only="web"),
    Setting("metrics_port", 0, "where Prometheus reads metrics; 0 for nowhere", most=65535),
    Setting("metrics_host", "127.0.0.1", "the address of the metrics"),
    Setting("log_format", "text", "text, or json: one object a line", choices=("text", "json")),
    *(Setting(limit.setting, limit.default, limit.help, limit.least, limit.most) for limit in LIMITS),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Config:
    """The settings in force.

    Attributes:
        values: By name.
        sources: Where each came from.
        ignored: Environment variables that begin like settings and are none.
    """

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def limits(self) -> Limits:
        """The limits among them."""
        return Limits.of(self.values)

    def check_exposure(self, tokens: bool) -> None:
        """Refuse to listen beyond this machine without TLS and a way to tell who calls.

        Args:
            tokens: Whether there are tokens.

        Raises:
            InvalidInputError: What is missing, and what to add.
        """
        if bool(self.tls_certificate) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_key):
            raise InvalidInputError("TLS needs both --tls-certificate and --tls-key.", field="tls_certificate")
        missing = self.exposure(tokens)
        if missing and not self.insecure:
            raise InvalidInputError(
                f"{' and '.join(self.exposed)} can be reached from other machines: add {' and '.join(missing)}, or "
                "--insecure if whoever reaches it may use it and read what is sent.",
                field="host",
            )

    @property
    def exposed(self) -> list[str]:
        """The addresses to listen on that other machines can reach."""
        listened = [] if self.server else [self.host, *([self.metrics_host] if self.metrics_port else [])]
        listened += [self.web_host] if self.web or self.server else []
        return [host for host in dict.fromkeys(listened) if not is_loopback(host)]

    def exposure(self, tokens: bool) -> list[str]:
        """The flags that are missing for an address beyond this machine."""
        if not self.exposed:
            return []
        missing = [] if self.tls_certificate else ["--tls-certificate with --tls-key"]
        return missing if tokens or self.tls_client_ca else [*missing, "--token-file (or --tls-client-ca)"]


def add_flags(parser: argparse.ArgumentParser, command: str = "", without: Sequence[str] = ()) -> None:
    """The flags of a command's settings; one that is not given is None or empty.

    Args:
        parser: The command's.
        command: The command; empty for the settings of all.
        without: Settings whose flags it has not.
    """
    parser.add_argument("--config", default="", metavar="FILE", help="a TOML file of settings")
    for setting in SETTINGS:
        if setting.own_flag or setting.name in without or (command and setting.only not in ("", command)):
            continue
        if setting.default is False:
            parser.add_argument(setting.flag, action="store_true", default=None, help=setting.help)
        elif setting.default == ():
            metavar = setting.name.split("_")[-1].upper()
            parser.add_argument(setting.flag, action="append", metavar=metavar, help=f"{setting.help}; repeatable")
        else:
            shown = f" (default: {setting.default})" if setting.default != "" else ""
            parser.add_argument(setting.flag, metavar=setting.name.split("_")[-1].upper(), help=setting.help + shown)


def resolve(options: Any, environment: Mapping[str, str] | None = None) -> Config:
    """The settings in force.

    Args:
        options: The parsed command line.
        environment: The process's own where None.

    Raises:
        InvalidInputError: A value is not possible, a key of the file is unknown, or two settings exclude each other.
    """
    environment = os.environ if environment is None else environment
    path = getattr(options, "config", "") or environment.get("VLM_SPECTRA_CONFIG", "")
    file = _file(path) if path else {}
    values, sources, command = {}, {}, getattr(options, "command", "config")
    for setting in SETTINGS:
        given = getattr(options, setting.name, None)
        if command != "config" and setting.only not in ("", command):
            raw, source = setting.default, "default"
        elif given not in (None, "", []):
            raw, source = given, getattr(options, "flags", {}).get(setting.name, setting.flag)
        elif setting.variable in environment:
            raw, source = environment[setting.variable], setting.variable
        elif setting.name in file:
            raw, source = file[setting.name], path
        else:
            raw, source = setting.default, "default"
        values[setting.name], sources[setting.name] = setting.read(raw, source), source
    _choose_place(values, sources)
    known = {setting.variable for setting in SETTINGS} | _NOT_SETTINGS
    ignored = tuple(sorted(name for name in environment if name.startswith(PREFIX) and name not in known))
    return Config(values, sources, ignored)


def _choose_place(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Of `device` and `device_map` keep the one from the stronger source; the other is as if it were not given."""
    both = [_BY_NAME[name] for name in ("device", "device_map")]
    if not all(values[each.name] for each in both):
        return
    strength = {each.name: (sources[each.name] == each.flag, sources[each.name] == each.variable) for each in both}
    if strength["device"] == strength["device_map"]:
        where = " and ".join(dict.fromkeys(sources[each.name] for each in both))
        raise InvalidInputError(f"{where}: a model is placed by device or by device_map, not by both.", field="device")
    weaker = min(strength, key=lambda name: strength[name])
    values[weaker], sources[weaker] = "", "default"


def settle(options: Any) -> None:
    """Put the settings in force into the parsed command line, as `options.settings` and one by one."""
    options.settings = resolve(options)
    vars(options).update(options.settings.values)


def _file(path: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(contents(path).decode("utf-8-sig"))
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}.", field="config") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of too many digits, too deep
        raise InvalidInputError(f"{path} is not TOML: {error}.", field="config") from None
    for name in found:
        if name not in _BY_NAME:
            near = difflib.get_close_matches(name, _BY_NAME, 1)
            hint = f"did you mean {near[0]!r}?" if near else "`vlm-spectra config` lists the settings."
            raise InvalidInputError(f"{path}: there is no setting {name!r}; {hint}", field="config")
    return found


def command(options: Any) -> int:
    """`vlm-spectra config`: what is in force, and where it came from."""
    config = resolve(options)
    if options.json:
        rows = {name: {"value": value, "from": config.sources[name]} for name, value in config.values.items()}
        print(json.dumps(rows, indent=1))
        return 0
    shown = [(name, printable(_shown(value)), printable(config.sources[name])) for name, value in config.values.items()]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    for name, value, source in shown:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}")
    for name in config.ignored:
        print(f"{printable(name)} is no setting and has no effect")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "-"
    return "true" if value is True else "false" if value is False else str(value) if value != "" else "-"
