"""The contract: clean by its linter, and the checked-in Python is what it generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def test_buf_lint_finds_nothing():
    subprocess.run([BIN / "buf", "lint", "protos"], cwd=ROOT, check=True)


def test_generated_code_is_current(tmp_path):
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ROOT / "protos"]
    subprocess.run([*command, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *protos], check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2.py*"))
    assert len(made) == 2 * len(protos)
    for path in made:
        kept = ROOT / "clients" / "python" / path
        assert kept.read_text() == (tmp_path / path).read_text(), f"{path} is not current: run `make protos`"
