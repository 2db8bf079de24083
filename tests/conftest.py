"""Fixtures: the embedded model in process, the same behind a server in another process, and a screen to look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from PIL import Image, ImageDraw

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import vlm_spectra as vs


def start_server(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address once it is ready."""
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert " on " in line, f"the server said {line!r}"
    return process, line.strip().rsplit(" ", 1)[1]


def stop_server(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server with spectra-tiny."""
    process, address = start_server("--model", "spectra-tiny", "--device", "cpu")
    yield address
    stop_server(process)


@pytest.fixture(scope="session")
def hooked() -> vs.HookedVLM:
    return vs.HookedVLM.from_pretrained("spectra-tiny", device="cpu")


@pytest.fixture(scope="session")
def remote(server: str) -> Iterator[vs.RemoteVLM]:
    with vs.connect(server) as model:
        yield model


@pytest.fixture(scope="session")
def remote_numpy(server: str) -> Iterator[vs.RemoteVLM]:
    with vs.connect(server, arrays="numpy") as model:
        yield model


@pytest.fixture(scope="session")
def screenshot() -> Image.Image:
    """A window with a title bar, a red circle and a blue button."""
    image = Image.new("RGB", (640, 400), (40, 70, 120))
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 40, 580, 360), fill=(235, 235, 238))
    draw.rectangle((60, 40, 580, 70), fill=(70, 80, 100))
    draw.ellipse((130, 130, 230, 230), fill=(215, 40, 40))
    draw.rectangle((340, 200, 500, 260), fill=(40, 90, 215))
    draw.text((395, 222), "Login", fill="white")
    return image


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A second picture of another shape."""
    image = Image.radial_gradient("L").resize((300, 420))
    return Image.merge("RGB", (image, image.rotate(90), image.rotate(180)))


@pytest.fixture(scope="session")
def inputs(hooked: vs.HookedVLM, screenshot: Image.Image) -> vs.Inputs:
    return hooked.prepare_messages("Click on the red circle", screenshot)
