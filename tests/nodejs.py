"""The TypeScript client as its tests use it: compiled, where Node is."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CLIENT = Path(__file__).parent.parent / "clients" / "typescript"

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="node and npm are not installed"
)


def run(*command: Any, cwd: Path = CLIENT, **options: Any) -> str:
    """What a command prints; its complaint is in the error where it fails."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, **options)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stdout + done.stderr)
    return done.stdout


@cache
def compiled() -> Path:
    """The folder of the compiled client; skips where its packages cannot be had."""
    if not all((CLIENT / "node_modules" / ".bin" / tool).exists() for tool in ("tsc", "esbuild", "eslint")):
        try:
            run("npm", "ci", "--no-audit", "--no-fund", timeout=180)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm cannot install the client's packages: {str(error.stderr or error)[-200:]}")
    made = subprocess.run(["npx", "tsc"], cwd=CLIENT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
    return CLIENT / "build"
