"""`vlm-spectra download`, against a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from calls import until
from vlm_spectra.errors import UnknownModelError
from vlm_spectra_server import cli
from vlm_spectra_server.downloads import repository
from vlm_spectra_server.known_checkpoints import KNOWN

SHA = "0123456789abcdef0123456789abcdef01234567"
LARGE = "model.safetensors"
FILES = {"config.json": b'{"model_type": "qwen2_5_vl"}', LARGE: b"\0" * 5000, "model.gguf": b"not read"}


class Hub(BaseHTTPRequestHandler):
    """`owner/model`, a repository of three files in the hub's own manner, and others where something goes wrong."""

    asked, go_on = threading.Event(), threading.Event()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        found = re.fullmatch(r"(/api/models)?/owner/(\w+)/(revision|tree|resolve)/\w+/?(.*)", path)
        api, repository, what, file = found.groups() if found else ("", "other", "", "")
        files = {**FILES, "../../evil.txt": b"evil"} if repository == "hostile" else FILES
        if repository == "other":
            self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif api and repository == "page":
            self.answer(b"<html>please sign in</html>")
        elif api and repository == "busy":
            self.answer(b"", 429)
        elif api and repository == "silent":
            self.close_connection = True
        elif what == "revision":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.answer(json.dumps({"id": f"owner/{repository}", "sha": SHA, "siblings": siblings}).encode())
        elif what == "tree":
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
            self.answer(json.dumps(tree).encode())
        else:
            data, large = files[file], file == LARGE
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest() if large else file}"', "X-Repo-Commit": SHA}
            if large and self.command == "GET" and repository == "stalled":
                self.asked.set()
                self.go_on.wait()
                return
            self.answer(b"\1" * len(data) if large and repository == "damaged" else data, 200, headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def process(endpoint: str, home: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own, which also says whether a model was near."""
    script = (
        "import sys\nfrom vlm_spectra_server import cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'vlm_spectra_server.hooked_vlm'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, "download", *arguments],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def download(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    running = process(endpoint, home, *arguments)
    try:
        output, errors = running.communicate(timeout=120)
    finally:
        running.kill()
    return subprocess.CompletedProcess(running.args, running.returncode, output, errors)


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
    odd = [download(hub, tmp_path, "--model", f"owner/{name}") for name in ("page", "busy", "silent", "hostile")]
    for found, words in (
        (unknown, "has no model 'owner/other'"),
        (unreachable, "cannot be reached"),
        (nothing, "--list-models"),
        *zip(odd, ("sign-in page", "answers 429 Too Many", "RemoteProtocolError", "'../../evil.txt'"), strict=True),
    ):
        assert found.returncode == 1, found.stderr
        assert words in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1


def test_a_damaged_file_is_removed(hub, tmp_path):
    """Of the right size, so that nobody else would see it."""
    found = download(hub, tmp_path, "--model", "owner/damaged")
    assert found.returncode == 1
    (said,) = found.stderr.splitlines()
    assert said == f"vlm-spectra: owner/damaged came with damaged files, which are removed: {LARGE}; fetch it again."
    left = {file.name for file in (tmp_path / "hub" / "models--owner--damaged").rglob("*") if file.is_file()}
    assert "config.json" in left
    assert not left & {LARGE, hashlib.sha256(FILES[LARGE]).hexdigest()}


def test_ctrl_c_waits_for_no_hub(hub, tmp_path):
    running = process(hub, tmp_path, "--model", "owner/stalled")
    try:
        assert Hub.asked.wait(60)
        until(lambda: list(tmp_path.rglob("blobs/config.json")))  # the whole file is kept, whose part was closed before
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=60)
    finally:
        Hub.go_on.set()
        running.kill()
    assert (running.returncode, output) == (130, "")
    assert errors.strip().startswith("vlm-spectra: stopped; whole files are kept")
    assert len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.incomplete"))


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


def test_a_model_that_cannot_be_fetched_is_in_no_other_s_way(monkeypatch, capsys):
    def fetched(name, **rest):
        if name == KNOWN[0].repository:
            raise KeyError("siblings")
        return "here"

    monkeypatch.setattr("vlm_spectra_server.downloads.snapshot_download", fetched)
    assert cli.main(["download", "--all-models"]) == 1
    said = capsys.readouterr()
    assert said.err == f"vlm-spectra: {KNOWN[0].repository} could not be fetched: KeyError: 'siblings'\n"
    assert said.out.count(" -> here") == len(KNOWN) - 1
