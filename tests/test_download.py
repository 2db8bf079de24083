"""`vlm-spectra download`, against a hub of our own on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from vlm_spectra.errors import UnknownModelError
from vlm_spectra_server import cli
from vlm_spectra_server.downloads import repository
from vlm_spectra_server.known_checkpoints import KNOWN

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "qwen2_5_vl"}', "model.safetensors": b"\0" * 5000, "model.gguf": b"not read"}


class Hub(BaseHTTPRequestHandler):
    """One repository of three files, `owner/model`, in the hub's own manner."""

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/model/revision/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            self.answer(json.dumps({"id": "owner/model", "sha": SHA, "siblings": siblings}).encode(), body)
        elif path.startswith("/api/models/owner/model/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in FILES.items()]
            self.answer(json.dumps(tree).encode(), body)
        elif path.startswith("/owner/model/resolve/") and path.split("/")[-1] in FILES:
            name = path.split("/")[-1]
            self.answer(FILES[name], body, {"ETag": f'"{name}"', "X-Repo-Commit": SHA})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def answer(self, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def download(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which also says whether a model was near."""
    script = (
        "import sys\nfrom vlm_spectra_server import cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'vlm_spectra_server.hooked_vlm'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, "download", *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_list_begins_with_ui_tars(hub, tmp_path):
    found = download(hub, tmp_path, "--list-models")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[1].split()[:3] == ["UI-TARS-1.5-7B", "qwen2_5_vl", "8.29B"]
    assert len(lines) == 1 + len(KNOWN)
    assert len({each.name.lower() for each in KNOWN}) == len(KNOWN)


def test_a_checkpoint_comes_into_the_cache_once(hub, tmp_path):
    found = download(hub, tmp_path, "--model", "owner/model", "--model", "owner/model")
    assert found.returncode == 0, found.stderr
    (line,) = found.stdout.splitlines()
    name, directory = line.split(" -> ")
    assert name == "owner/model"
    assert Path(directory).name == SHA
    there = {file.name: file.read_bytes() for file in Path(directory).iterdir()}
    assert there == {name: data for name, data in FILES.items() if name != "model.gguf"}


def test_what_cannot_be_fetched_is_one_sentence(hub, tmp_path):
    unknown = download(hub, tmp_path, "--model", "owner/other")
    unreachable = download("http://127.0.0.1:9", tmp_path / "empty", "--model", "UI-TARS-1.5-7B")
    nothing = download(hub, tmp_path)
    for found, words in (
        (unknown, "has no model 'owner/other'"),
        (unreachable, "cannot be reached"),
        (nothing, "--list-models"),
    ):
        assert found.returncode == 1, found.stderr
        assert words in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1


def test_names():
    assert repository("ui-tars-1.5-7b") == "ByteDance-Seed/UI-TARS-1.5-7B"
    assert repository("somebody/else") == "somebody/else"
    with pytest.raises(UnknownModelError, match=r"UI-TARS-1\.5-7B"):
        repository("ui-tars")


def test_all_models_are_all_of_the_list(monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(
        "vlm_spectra_server.downloads.snapshot_download", lambda name, **rest: fetched.append((name, rest)) or "here"
    )
    assert cli.main(["download", "--all-models", "--revision", "v1"]) == 0
    assert [name for name, _ in fetched] == [each.repository for each in KNOWN]
    assert all(rest["revision"] == "v1" for _, rest in fetched)
    assert capsys.readouterr().out.count(" -> here") == len(KNOWN)
