"""TLS of the server. Certificates are read again when their files change; connections that exist stay."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Generic, TypeVar

import grpc
from cryptography import x509
from vlm_spectra.errors import InvalidInputError

log = logging.getLogger("vlm_spectra.server")

T = TypeVar("T")

_NOTICE = timedelta(days=14)
"""How long before a certificate expires the log begins to say so."""


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

    def expires(self) -> datetime | None:
        """When the first of the server's chain does (RFC 5280, notAfter), in UTC; None where it cannot be read."""
        try:
            chain = x509.load_pem_x509_certificates(Path(self.certificate).read_bytes())
        except (OSError, ValueError):
            return None
        return min(each.not_valid_after_utc for each in chain)

    def context(self) -> ssl.SSLContext:
        """What is in the files now, for Python's own servers.

        Raises:
            InvalidInputError: They cannot be read, or do not belong together.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            made.load_cert_chain(self.certificate, self.key, password="")
            if self.client_ca:
                made.load_verify_locations(self.client_ca)
                made.verify_mode = ssl.CERT_REQUIRED
                # A connection that resumes an earlier one's session shows no certificate: none does.
                made.minimum_version, made.num_tickets = ssl.TLSVersion.TLSv1_3, 0
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise self._unusable(error) from None
        return made

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What is in the files now, for gRPC.

        Raises:
            InvalidInputError: They cannot be read, or do not belong together.
        """
        self.context()
        try:
            pair = (Path(self.key).read_bytes(), Path(self.certificate).read_bytes())
            authorities = Path(self.client_ca).read_bytes() if self.client_ca else None
        except OSError as error:
            raise self._unusable(error) from None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)

    def _unusable(self, error: Exception) -> InvalidInputError:
        names = ", ".join(filter(None, (self.certificate, self.key, self.client_ca)))
        return InvalidInputError(f"no TLS with {names}: {error}.", field="tls_certificate")


class Following(Generic[T]):
    """What is made from the files, made again when they change; files that cannot be used leave it as it was.

    From two weeks before the server's certificate expires, the log says so once a day.

    Args:
        files: The files.
        make: Makes it from what is in them now.

    Raises:
        InvalidInputError: They cannot be used at the beginning.
    """

    def __init__(self, files: Certificates, make: Callable[[], T]) -> None:
        self._files, self._make, self._lock = files, make, threading.Lock()
        self._stamp = files.stamp if _exist(files) else ()
        self._made = make()
        self._remind_at = datetime.now(UTC)
        self._remind()

    def current(self) -> tuple[T, bool]:
        """What is in force, and whether it has changed since the last time."""
        with self._lock:
            try:
                now = self._files.stamp
                if now == self._stamp:
                    self._remind()
                    return self._made, False
                self._made = self._make()
            except (OSError, InvalidInputError) as error:
                log.error("the TLS certificates have changed and cannot be used: %s The last ones stay.", error)
                return self._made, False
            self._stamp = now
            log.info("the TLS certificates have changed and are in use")
            self._remind_at = datetime.now(UTC)
            self._remind()
            return self._made, True

    def _remind(self) -> None:
        now = datetime.now(UTC)
        if now < self._remind_at:
            return
        self._remind_at = now + timedelta(days=1)
        end = self._files.expires()
        if end is not None and end < now + _NOTICE:
            name, when = self._files.certificate, f"{end:%Y-%m-%d %H:%M} UTC"
            if end <= now:
                log.error("the certificate %s has expired (%s): clients refuse it", name, when)
            else:
                log.warning("the certificate %s expires soon (%s): clients will refuse it", name, when)


def credentials(files: Certificates) -> grpc.ServerCredentials:
    """Credentials of a server that follow their files.

    Raises:
        InvalidInputError: The files cannot be read, or do not belong together.
    """
    following = Following(files, files.read)
    first, _ = following.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Asked at every handshake; None for what was."""
        found, new = following.current()
        return found if new else None

    return grpc.dynamic_ssl_server_credentials(first, changed, require_client_authentication=bool(files.client_ca))


def _exist(files: Certificates) -> bool:
    return all(Path(path).exists() for path in (files.certificate, files.key, files.client_ca) if path)


def client_name(context: grpc.ServicerContext) -> str:
    """The name in a client's certificate; empty where it showed none."""
    found = context.auth_context()
    names = found.get("x509_common_name") or found.get("x509_subject_alternative_name") or []
    return next(iter(names), b"").decode("utf-8", "replace")
