"""Certificates for TLS, as openssl makes them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates, and is missing")


def certificate(directory: Path, name: str, ca: Path | None = None, days: int = 30) -> Path:
    """A certificate for localhost and its key, signed by `ca` or by itself: where they lie, less the ending."""
    made = directory / name
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make = ["openssl", "req", "-x509", *curve, "-days", str(days), "-subj", f"/CN={name}", "-keyout", key(made)]
    make += ["-out", pem(made), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    if ca is not None:
        make += ["-CA", pem(ca), "-CAkey", key(ca), "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(make, check=True, capture_output=True)
    return made


def pem(path: Path) -> str:
    """The file of a certificate."""
    return str(path.with_suffix(".pem"))


def key(path: Path) -> str:
    """The file of its key."""
    return str(path.with_suffix(".key"))
