"""Settings: where a value comes from, what is refused, what the documents say of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from documents import table
from vlm_spectra import errors
from vlm_spectra.images import MAX_PIXELS
from vlm_spectra.network.status import TRANSPORT
from vlm_spectra_server import cli
from vlm_spectra_server.serving import config
from vlm_spectra_server.serving.config import SETTINGS, resolve
from vlm_spectra_server.serving.limits import LIMITS, Limits

DOCUMENT = Path(__file__).parents[1] / "docs" / "server.md"


def options(**values):
    return type("Options", (), values)


# Settings.


def test_precedence(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("max_batch = 3\nmax_queue = 4\nmax_capture_gb = 1\nport = 6000\n")
    environment = {"VLM_SPECTRA_MAX_BATCH": "5", "VLM_SPECTRA_PORT": "6001", "VLM_SPECTRA_MAX_BACH": "1"}
    config = resolve(options(config=str(file), port="6002"), environment)
    assert (config.port, config.sources["port"]) == (6002, "--port")
    assert (config.max_batch, config.sources["max_batch"]) == (5, "VLM_SPECTRA_MAX_BATCH")
    assert (config.max_queue, config.sources["max_queue"]) == (4, str(file))
    assert (config.host, config.sources["host"]) == ("127.0.0.1", "default")
    assert config.limits.capture_bytes == 10**9
    assert config.ignored == ("VLM_SPECTRA_MAX_BACH",)
    again = resolve(options(), {"VLM_SPECTRA_CONFIG": str(file)})
    assert again.max_batch == 3


@pytest.mark.parametrize(
    ("flags", "environment", "file", "device", "device_map"),
    [
        ({"device": "cpu"}, {"DEVICE_MAP": "auto"}, "", "cpu", ""),
        ({"device": "cpu"}, {}, "device_map = 'auto'", "cpu", ""),
        ({"device_map": "auto"}, {"DEVICE": "cpu"}, "device = 'cpu'", "", "auto"),
        ({}, {"DEVICE": "cpu"}, "device_map = 'auto'", "cpu", ""),
        ({}, {"DEVICE": ""}, "device_map = 'auto'", "", "auto"),
        ({"device": "cpu"}, {}, "device = 'cuda'\ndevice_map = 'auto'", "cpu", ""),
    ],
)
def test_of_device_and_device_map_the_stronger_source_counts(tmp_path, flags, environment, file, device, device_map):
    path = tmp_path / "server.toml"
    path.write_text(file)
    environment = {f"VLM_SPECTRA_{name}": value for name, value in environment.items()}
    found = resolve(options(config=str(path), **flags), environment)
    assert (found.device, found.device_map) == (device, device_map)
    assert found.sources["device_map" if device else "device"] in ("default", "VLM_SPECTRA_DEVICE")


def test_device_and_device_map_of_one_source_are_refused(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("device = 'cpu'\ndevice_map = 'auto'\n")
    with pytest.raises(errors.InvalidInputError, match=r"server\.toml: .* not by both"):
        resolve(options(config=str(file)), {})
    with pytest.raises(errors.InvalidInputError, match="VLM_SPECTRA_DEVICE and VLM_SPECTRA_DEVICE_MAP: "):
        resolve(options(), {"VLM_SPECTRA_DEVICE": "cpu", "VLM_SPECTRA_DEVICE_MAP": "auto"})


def test_a_list(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("allow_model = ['/models/*', 'a/b']\n")
    values = {"/models/*", "a/b"}
    assert set(resolve(options(allow_model=["/models/*", "a/b"]), {}).allow_model) == values
    assert set(resolve(options(allow_model=[]), {"VLM_SPECTRA_ALLOW_MODEL": "/models/*, a/b"}).allow_model) == values
    assert set(resolve(options(config=str(file)), {}).allow_model) == values
    assert resolve(options(), {}).allow_model == ()
    for wrong in ("allow_model = 3", "allow_model = ['a', 3]"):
        file.write_text(wrong)
        with pytest.raises(errors.InvalidInputError, match="allow_model is a list of texts"):
            resolve(options(config=str(file)), {})


def test_each_command_has_settings_of_its_own():
    """`VLM_SPECTRA_SERVER` is the page's: a server does not look elsewhere; `web` has no other page beside it."""
    environment = {"VLM_SPECTRA_SERVER": "gpu-box:50051", "VLM_SPECTRA_WEB": "yes", "VLM_SPECTRA_WEB_PORT": "7000"}
    for command, server, web in (
        ("serve", "", True),
        ("web", "gpu-box:50051", False),
        ("config", "gpu-box:50051", True),
    ):
        found = resolve(options(command=command), environment)
        assert (found.server, found.web, found.web_port, found.ignored) == (server, web, 7000, ())


def test_what_the_library_itself_bounds_cannot_be_raised():
    """An image of more pixels is never decoded, so a server does not say that it takes one."""
    assert resolve(options(max_image_megapixels="64"), {}).limits.image_pixels == MAX_PIXELS
    with pytest.raises(errors.InvalidInputError, match="max_image_megapixels is at most 64"):
        resolve(options(max_image_megapixels="64.1"), {})

    assert resolve(options(max_message_mb="1000"), {}).limits.message_bytes * TRANSPORT < 2**31
    with pytest.raises(errors.InvalidInputError, match="max_message_mb is at most 1000, not 1001"):
        resolve(options(max_message_mb="1001"), {})


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.setting)
def test_no_limit_is_larger_than_what_it_is_given_to_can_take(limit):
    """The largest values there are make limits that times, threads and sizes can be reckoned with."""
    most = resolve(options(**{limit.setting: f"{limit.most:.0f}"}), {})
    assert most.limits
    assert 2 * most.values[limit.setting] < 2**31
    assert most.values[limit.setting] < threading.TIMEOUT_MAX
    for more in (f"{limit.most + 1:.0f}", "9" * 30, "1" + "0" * 308):
        with pytest.raises(errors.InvalidInputError, match=f"{limit.setting} is at most") as caught:
            resolve(options(**{limit.setting: more}), {})
        assert len(str(caught.value)) < 300


def test_defaults_are_those_of_the_limits():
    assert resolve(options(), {}).limits == Limits()
    assert {limit.setting for limit in LIMITS} <= {setting.name for setting in SETTINGS}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_bach = 3", "did you mean 'max_batch'"),
        ("max_batch = 'many'", "a whole number, not 'many'"),
        ("max_batch = 2.5", "a whole number"),
        ("max_batch = true", "a whole number"),
        ("max_batch = 0", "at least 1"),
        ("max_capture_gb = nan", "a number"),
        ("max_capture_gb = inf", "a number"),
        ("port = 70000", "at most 65535"),
        ("metrics_port = 65536", "at most 65535"),
        ("insecure = 'maybe'", "true or false"),
        ("log_format = 'xml'", "text or json"),
        ("host = 7", "host is text"),
        ("[limits]\nmax_batch = 3", "no setting 'limits'"),
        ("max_batch =", "is not TOML"),
        ("max_batch = " + "9" * 5000, "is not TOML"),
        ("allow_model = " + "[" * 5000 + "]" * 5000, "is not TOML"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, words):
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(errors.InvalidInputError, match=words) as caught:
        resolve(options(config=str(file)), {})
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_a_mark_at_its_beginning(tmp_path):
    file = tmp_path / "server.toml"
    file.write_bytes("\ufeffmax_batch = 3\r\n".encode())
    assert resolve(options(config=str(file)), {}).max_batch == 3


def test_the_command_shows_what_is_in_force():
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "config", "--max-batch", "7"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} >= {setting.name for setting in SETTINGS}
    assert "--max-batch" in shown
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert rows["max_batch"] == {"value": 7, "from": "--max-batch"}
    assert rows["max_capture_gb"] == {"value": 4.0, "from": "default"}
    refused = subprocess.run([*command, "--max-queue", "no"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "max_queue is a whole number" in refused.stderr


def test_what_is_shown_is_printable(capsys):
    assert cli.main(["config", "--model", "a\x1b]0;mine\x07\udcff"]) == 0
    shown = capsys.readouterr().out
    assert r"a\x1b]0;mine\x07\udcff  --model" in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_a_file_of_settings_without_an_end(capsys):
    assert cli.main(["config", "--config", "/dev/zero"]) == 1
    said = capsys.readouterr().err
    assert said == "vlm-spectra: /dev/zero cannot be read: it has more than 16,777,216 bytes.\n"


def test_a_page_s_flag_is_named_as_it_was_given(capsys):
    assert cli.main(["web", "--port", "abc"]) == 1
    assert capsys.readouterr().err.startswith("vlm-spectra: --port: web_port is a whole number")


def test_ctrl_c_and_a_full_disk_are_no_faults(monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "command", interrupted)
    assert cli.main(["config"]) == 130
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "config"]
    for unbuffered in ("", "1"):
        with open("/dev/full", "w") as full:
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
        assert found.returncode == 1
        assert found.stderr == "vlm-spectra: the output cannot be written: No space left on device.\n"


@pytest.mark.parametrize("command", ["", "serve", "web", "check", "download", "config", "top", "token", "sizes"])
def test_help_names_the_defaults_that_there_are(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: vlm-spectra" in said
    for nothing in ("(default: )", "(default: None)", "(default: False)"):
        assert nothing not in said


def test_the_release_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"vlm-spectra \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_limits_are_documented():
    """`SPECTRA_WRITE_DOCS=1` writes the table."""
    rows = [[f"`{limit.setting}`", f"{limit.default:,}", limit.help] for limit in LIMITS]
    begin, end = "<!-- limits -->\n", "<!-- end of limits -->"
    before, rest = DOCUMENT.read_text().split(begin)
    written, after = rest.split(end)
    text = table(["setting", "default", ""], rows) + "\n"
    if os.environ.get("SPECTRA_WRITE_DOCS"):
        DOCUMENT.write_text(before + begin + text + end + after)
    else:
        assert written == text
