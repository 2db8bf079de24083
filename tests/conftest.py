"""Fixtures: the embedded model in process, the same behind a server in another process, and a screen to look at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import calls
import pytest
from PIL import Image, ImageDraw

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import vlm_spectra as vs
from browser import launched
from papers import certificate
from vlm_spectra_server.serving.host import Loading
from vlm_spectra_server.serving.server import Limits, Server
from webapp import free_port, start_web

if TYPE_CHECKING:
    from same_calls import Expected


def pytest_configure() -> None:
    """Let the processes to come hear signals that are ignored here, as below `nohup`: a handler is not inherited.

    No test sets them by `preexec_fn`: for that the whole process is forked, and gRPC's threads with it, which may write
    to the standard error that a test reads.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


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
    process.wait(calls.WAIT)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server with spectra-tiny."""
    process, address = start_server("--model", "spectra-tiny", "--device", "cpu", "--allow-model", "*")
    yield address
    stop_server(process)


@dataclass(frozen=True)
class Busy:
    """A server that little is too much for, with a worker that can be made to wait or to fail (`calls.FAULTS`).

    Attributes:
        address: The server's.
        port: Of its metrics.
    """

    LIMITS: ClassVar[dict[str, float]] = {
        "host_memory_gb": 0.001,
        "kept_seconds": 2,
        "max_client_requests": 2,
        "max_calls": 4,
        "max_queue": 1,
        "max_models": 1,
        "max_characters": 120_000,
    }

    address: str
    port: int

    def client(self, name: str) -> calls.Raw:
        """A client without the library, of this name."""
        return calls.Raw(self.address, name)

    def at_work(self, number: int) -> None:
        """Wait until so many calls are at work."""
        calls.until(lambda: calls.metric(self.port, "vlm_spectra_calls_at_work") == number)

    def queued(self, number: int) -> None:
        """Wait until so many requests wait."""
        calls.until(lambda: calls.metric(self.port, "vlm_spectra_queue") == number)

    def idle(self) -> None:
        """Wait until nothing is at work, and the model answers."""
        self.at_work(0)
        calls.until(lambda: calls.metric(self.port, "vlm_spectra_model_ready") == 1)


@contextmanager
def busy_server(directory: Path) -> Iterator[Busy]:
    """A server that nobody has asked anything; its worker's startup file is in the directory."""
    port = free_port()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in Busy.LIMITS.items()]
    with calls.faulty(directory):
        process, address = start_server(
            "--model", "spectra-tiny", "--device", "cpu", f"--metrics-port={port}", "--allow-model=/*", *flags
        )
    try:
        yield Busy(address, port)
    finally:
        stop_server(process)


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    with busy_server(tmp_path_factory.mktemp("faults")) as server:
        yield server


@contextmanager
def front_here(model: str, limits: Limits | None = None) -> Iterator[Server]:
    """A server with a model, its front in this process, so that its parts can be watched and changed."""
    server = Server(limits=limits)
    try:
        server.start(Loading(model, device="cpu"))
        assert server.first.settled.wait(2 * calls.WAIT)
        yield server
    finally:
        server.stop(0)


@contextmanager
def another_door(front: Server, **options: Any) -> Iterator[Server]:
    """A server in this process with tokens, certificates or limits of its own, over the models of another."""
    server = Server(**options)
    server.first = front.first
    server.models.hosts.update(front.models.hosts)
    for name in front.models.hosts:
        server.loadable.add(name)
        server._changed(name, None)
    server._grpc.start()
    try:
        yield server
    finally:
        server.models.hosts.clear()  # they stay
        server.stop(0)


@pytest.fixture(scope="session")
def front() -> Iterator[Server]:
    with front_here("spectra-tiny") as server:
        yield server


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates: of a `ca`, for servers and a client that it knows, and of somebody else."""
    directory = tmp_path_factory.mktemp("papers")
    ca = certificate(directory, "ca")
    known = {name: certificate(directory, name, ca) for name in ("server", "second", "bob")}
    return {"ca": ca, "other": certificate(directory, "other"), **known}


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a model whose captures are some 20 MB, and whose answers take minutes."""
    from vlm_spectra_server.spectra_tiny.parts import write_random

    shape = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8}
    return str(write_random(tmp_path_factory.mktemp("wide") / "model", text=shape))


@pytest.fixture(scope="session")
def wide_front(wide: str) -> Iterator[Server]:
    with front_here(wide, Limits(host_bytes=120 << 20, capture_bytes=100 << 20)) as server:
        yield server


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
def same_calls(
    remote_numpy: vs.RemoteVLM, screenshot: Image.Image, photo: Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> Expected:
    """What a client in another language has to get from `server`, and the two pictures it asks about."""
    from same_calls import Expected

    folder = tmp_path_factory.mktemp("pictures")
    screenshot.save(folder / "first.png")
    photo.save(folder / "second.png")
    return Expected(remote_numpy, folder / "first.png", folder / "second.png")


@pytest.fixture(scope="session")
def inputs(hooked: vs.HookedVLM, screenshot: Image.Image) -> vs.Inputs:
    return hooked.prepare_messages("Click on the red circle", screenshot)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. For a module at a time: while it is there, the main thread has an event loop that runs."""
    with launched() as browser:
        yield browser


@pytest.fixture(scope="session")
def web(server: str) -> Iterator[str]:
    """The address of the web app over that server."""
    process, address = start_web("--server", server)
    yield address
    stop_server(process)
