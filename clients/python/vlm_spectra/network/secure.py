"""TLS and tokens on the client's side."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Any, Union

import grpc

from .. import scalars
from ..errors import InvalidInputError, shown
from ..files import contents

TOKEN_VARIABLE = "VLM_SPECTRA_TOKEN"
"""The environment variable that `connect` takes a token from where none is given."""


@dataclass(frozen=True)
class TLS:
    """How a client checks a server, and shows who it is.

    Attributes:
        ca: A PEM file of the authorities to trust; the usual public ones where empty.
        certificate: A PEM file of this client's own certificate, for servers with mutual TLS.
        key: A PEM file of its key.
        server_name: The name that the server's certificate must hold, where the address is another (behind a tunnel).
    """

    ca: str | os.PathLike[str] = ""
    certificate: str | os.PathLike[str] = ""
    key: str | os.PathLike[str] = field(default="", repr=False)
    server_name: str = ""


TLSLike = Union[bool, str, "os.PathLike[str]", TLS, None]
"""True: with the public authorities. A path: with the authorities in that file. False: plain text, wherever it goes."""


def channel(address: str, tls: TLSLike, token: str, options: list[tuple[str, Any]]) -> grpc.Channel:
    """A channel to a server.

    Raises:
        InvalidInputError: A file cannot be read, or a token would cross a network in plain text.
    """
    if token:
        refuse_plain_text(address, tls)
    made, more = credentials(address, tls)
    if made is None:
        return grpc.insecure_channel(address, options=[*options, *more])
    return grpc.secure_channel(address, made, options=[*options, *more])


def credentials(address: str, tls: TLSLike) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, Any]]]:
    """What a channel to a server needs for TLS, None without it, and the options for what lies on the way there.

    Raises:
        InvalidInputError: It is nothing of the kind, or a file cannot be read.
    """
    # gRPC goes through the proxy of `http_proxy` to this very machine too, and a token would go there in plain text.
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)] if _here(address) else []
    if tls is None or tls is False:
        return None, options
    if not isinstance(tls, bool | str | os.PathLike | TLS):
        raise InvalidInputError(
            f"tls is {shown(tls)}; possible are True, False, the path of a PEM file and a vs.TLS.", field="tls"
        )
    if not isinstance(tls, TLS):
        tls = TLS() if isinstance(tls, bool) else TLS(ca=tls)
    if bool(tls.certificate) != bool(tls.key):
        raise InvalidInputError("a client's certificate needs its key, and the key its certificate.", field="tls")
    options += [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.ssl_channel_credentials(_read(tls.ca), _read(tls.key), _read(tls.certificate)), options


def refuse_plain_text(address: str, tls: TLSLike) -> None:
    """Keep a token from going over a network in plain text.

    Raises:
        InvalidInputError: It would.
    """
    if tls is None and not _here(address):
        raise InvalidInputError(
            f"the token would go to {address} in plain text; pass tls=True, tls='ca.pem' or, if the network is "
            "trusted, tls=False.",
            field="tls",
        )


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a token.

    Raises:
        InvalidInputError: It is no text, or has characters that no token has.
    """
    if not scalars.text(token, "token", "a token"):
        return ()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidInputError("a token is printable ASCII without spaces.", field="token")
    return (("authorization", f"Bearer {token}"),)


def is_loopback(host: str) -> bool:
    """Whether what goes to a host stays on this machine; that of `unix:PATH`, a socket, is `unix`."""
    host = host.strip("[]")
    if host in ("localhost", "unix"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def joined(host: str, port: int) -> str:
    """A host and a port as an address; one of IPv6 stands in brackets, as without them its end would be the port."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _here(address: str) -> bool:
    """Whether a server is on this machine."""
    return is_loopback(address.rsplit(":", 1)[0])


def _read(path: str | os.PathLike[str]) -> bytes | None:
    if "-----BEGIN" in str(path):  # a key, perhaps, which no message should show
        raise InvalidInputError("PEM files are given by their paths, not by what stands in them.", field="tls")
    try:
        return contents(path) if os.fspath(path) else None
    except (OSError, TypeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"{shown(path)} cannot be read: {why}.", field="tls") from error
