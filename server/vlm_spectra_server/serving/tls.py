"""TLS of the server. Certificates are read again when their files change; connections that exist stay."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
from vlm_spectra.errors import InvalidInputError

log = logging.getLogger("vlm_spectra.server")


@dataclass(frozen=True)
class Certificates:
    """The files.

    Attributes:
        certificate: The server's certificate chain, PEM.
        key: Its key, PEM.
        client_ca: The authorities of clients' certificates, PEM; no client has to show one where empty.
    """

    certificate: str
    key: str
    client_ca: str = ""

    @property
    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes with the files."""
        states = [Path(path).stat() for path in (self.certificate, self.key, self.client_ca) if path]
        return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What is in the files now.

        Raises:
            InvalidInputError: They cannot be read, or do not belong together.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
            pair = (Path(self.key).read_bytes(), Path(self.certificate).read_bytes())
            authorities = Path(self.client_ca).read_bytes() if self.client_ca else None
            if authorities is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self.client_ca)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            names = ", ".join(filter(None, (self.certificate, self.key, self.client_ca)))
            raise InvalidInputError(f"no TLS with {names}: {error}.", field="tls_certificate") from None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)


def credentials(files: Certificates) -> grpc.ServerCredentials:
    """Credentials of a server that follow their files.

    Raises:
        InvalidInputError: The files cannot be read, or do not belong together.
    """
    stamp, lock = files.stamp if _exist(files) else (), threading.Lock()
    first = files.read()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Asked at every handshake; None for what was."""
        nonlocal stamp
        with lock:
            try:
                now = files.stamp
                if now == stamp:
                    return None
                found = files.read()
            except (OSError, InvalidInputError) as error:
                log.error("the TLS certificates have changed and cannot be used: %s The last ones stay.", error)
                return None
            stamp = now
            log.info("the TLS certificates have changed and are in use")
            return found

    return grpc.dynamic_ssl_server_credentials(first, changed, require_client_authentication=bool(files.client_ca))


def _exist(files: Certificates) -> bool:
    return all(Path(path).exists() for path in (files.certificate, files.key, files.client_ca) if path)


def client_name(context: grpc.ServicerContext) -> str:
    """The name in a client's certificate; empty where it showed none."""
    found = context.auth_context()
    names = found.get("x509_common_name") or found.get("x509_subject_alternative_name") or []
    return next(iter(names), b"").decode("utf-8", "replace")
