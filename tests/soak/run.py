"""The server, the processes of clients, what is killed and when, and what is held before and after."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vlm_spectra as vs
from vlm_spectra import errors
from vlm_spectra.v1 import model_service_pb2 as mpb
from webapp import free_port

from . import watch
from .client import PATIENCE, Orders

TESTS = Path(__file__).parents[1]
ONE_CAPTURE = 2
"""File descriptors by which the front holds a capture: one to read it itself, one to hand out."""
SCOPES = "infer,inspect,interventions,weights"


@dataclass(frozen=True)
class Plan:
    """How much.

    Attributes:
        seconds: How long, after the warm-up.
        warm_up: Seconds before anything is counted, as many as threads and stores take to be all there; a client and
            the worker are killed in it too.
        warm_calls: Calls that the warm-up has at least, in up to two minutes more: memory is allocated by calls, and
            a slow machine has made few of them by then.
        clients: How many at once.
        processes: In how many processes.
        least: How many calls have to end, on a slow machine in up to two minutes more.
        worker_kills: How often the model's worker is killed; the last quarter of the time is left alone.
        client_kills: How often a process of clients is.
        kept_seconds: How long the server keeps finished captures; before anything is counted they have gone.
        keepalive: Seconds after which a client asks whether a connection that stands still is one.
        seed: Of all that is random.
    """

    seconds: float = 600.0
    warm_up: float = 120.0
    warm_calls: int = 3500
    clients: int = 50
    processes: int = 5
    least: int = 0
    worker_kills: int = 3
    client_kills: int = 12
    kept_seconds: int = 10
    keepalive: float = 5.0
    seed: int = 0


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        notes: Every call: what, outcome, detail, seconds; from after the warm-up.
        killed: Calls that ended with their process, by what they were.
        faults: What must not be.
        held: By "front" and "worker": before and after.
        folder: Files in the server's temporary folder, before and after.
        memory: Seconds, bytes of the front, bytes of the worker; every few seconds.
        worker_kills: Workers that were killed.
        client_kills: Client processes that were.
        server_calls: Calls by their codes in the server's own log.
    """

    notes: list[tuple[str, str, str, float]] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    held: dict[str, list[watch.Held]] = field(default_factory=lambda: {"front": [], "worker": []})
    folder: list[int] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    worker_kills: int = 0
    client_kills: int = 0
    server_calls: dict[str, int] = field(default_factory=dict)


class Server:
    """A server in a process of its own, with tokens, small limits and a temporary folder that is looked into.

    Args:
        plan: How many clients' tokens it knows, and how long it keeps captures.
        folder: Where its files go.
        second: The model that may be loaded besides.
    """

    def __init__(self, plan: Plan, folder: Path, second: str) -> None:
        self.plan, self.second, self.log, self.temporary = plan, second, folder / "server.log", folder / "temporary"
        self.temporary.mkdir()
        self.tokens = [f"client-{number}-{'t' * 20}" for number in range(plan.clients)]
        self.narrow, self.operator = f"narrow-{'n' * 20}", f"operator-{'o' * 20}"
        lines = [f"client{number} {SCOPES} {token}" for number, token in enumerate(self.tokens)]
        lines += [f"narrow infer {self.narrow}", f"operator * {self.operator}"]
        (folder / "tokens").write_text("\n".join(lines) + "\n")
        (folder / "tokens").chmod(0o600)
        self.metrics = free_port()
        command = [sys.executable, "-m", "vlm_spectra_server.cli", "serve", "--port=0", "--device=cpu"]
        command += ["--log-format=json", f"--token-file={folder / 'tokens'}", f"--metrics-port={self.metrics}"]
        command += [f"--kept-seconds={plan.kept_seconds}", "--kept-captures-gb=0.1", "--host-memory-gb=0.3"]
        command += ["--max-capture-gb=0.012", "--kept-images-mb=1", "--max-calls=48", "--max-queue=40", "--grace=20"]
        command += [f"--allow-model={second}"]
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " on " in line, f"the server said {line!r}: {self.log.read_text()[-2000:]}"
        self.address = line.strip().rsplit(" ", 1)[1]

    @property
    def workers(self) -> list[int]:
        """The processes of the first model."""
        running = watch.children(self.process.pid)["running"]
        return [pid for pid in running if "--model=spectra-tiny" in watch.arguments(pid)]

    def rest(self) -> list[str]:
        """Wait until nothing runs and no other capture is held; what is still at work after two minutes."""
        end = time.monotonic() + 120
        with vs.connect(self.address, token=self.operator, model="spectra-tiny", arrays="numpy") as model:
            with contextlib.suppress(errors.UnknownModelError):  # the operator may have been killed at its work
                gone = mpb.UnloadModelRequest(name=self.second)
                model._unary("ModelService/UnloadModel", gone, mpb.UnloadModelResponse)
        while True:
            time.sleep(self.plan.kept_seconds + 1)
            with vs.connect(self.address, token=self.tokens[0], model="spectra-tiny", arrays="numpy") as model:
                inputs = model.prepare_messages("Say hello")
                with model.run_with_cache("lm.hook_embed"):  # finished captures are looked through when one is made
                    model.forward(inputs, logits_to_keep=None)
            busy, held = self._at_work(), watch.Held.by(self.process.pid).segments
            alone = watch.children(self.process.pid)["running"] == self.workers
            if (not busy and held <= ONE_CAPTURE and alone) or time.monotonic() > end:
                time.sleep(1.0)
                return busy

    def _at_work(self) -> list[str]:
        headers = {"Authorization": f"Bearer {self.narrow}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.metrics}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            lines = response.read().decode().splitlines()
        names = ("vlm_spectra_calls_at_work{", "vlm_spectra_queue{")
        return [line for line in lines if line.startswith(names) and float(line.split()[-1]) > 0]

    def stop(self) -> list[str]:
        """End it as an operator would; what was wrong about that."""
        children = [pid for pids in watch.children(self.process.pid).values() for pid in pids]
        self.process.terminate()
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return ["the server did not end within a minute after SIGTERM"]
        left = [pid for pid in children if watch.arguments(pid)]
        found = [f"process {pid} outlived the server" for pid in left]
        return found if code == 0 else [*found, f"the server ended with {code}"]


class Processes:
    """The processes of clients.

    Args:
        server: The server.
        plan: How many.
        folder: Where their notes go.
    """

    def __init__(self, server: Server, plan: Plan, folder: Path) -> None:
        self.server, self.plan, self.folder = server, plan, folder
        self.running: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
        self.ended: list[tuple[Path, bool]] = []
        self.faults: list[str] = []
        self._made = 0

    def start(self, part: int) -> None:
        """Start one; its clients have its part of the tokens."""
        tokens = self.server.tokens[part :: self.plan.processes]
        notes = self.folder / f"notes-{self._made}.jsonl"
        operator = self.server.operator if part == 0 else ""
        expected, seed = str(self.folder / "expected.json"), self.plan.seed * 1000 + self._made
        server = self.server
        orders = Orders(
            address=server.address,
            tokens=tokens,
            narrow=server.narrow,
            operator=operator,
            second=server.second,
            expected=expected,
            notes=str(notes),
            seed=seed,
            keepalive=self.plan.keepalive,
        )
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with (self.folder / f"client-{self._made}.log").open("w") as log:
            process = subprocess.Popen(orders.command(), stderr=log, env=environment)
        self.running[part] = process, notes
        self._made += 1

    def start_all(self) -> None:
        """Start all."""
        for part in range(self.plan.processes):
            self.start(part)

    def kill(self, part: int) -> None:
        """Kill one, and start another in its place."""
        process, notes = self.running.pop(part)
        process.kill()
        process.wait()
        self.ended.append((notes, True))
        self.start(part)

    def stop_all(self) -> None:
        """Let all end what they are at."""
        for process, _ in self.running.values():
            process.terminate()
        end = time.monotonic() + PATIENCE + 60
        for part, (process, notes) in self.running.items():
            try:
                code = process.wait(max(end - time.monotonic(), 1.0))
                if code not in (0, -signal.SIGTERM):  # the latter where it had not begun yet
                    self.faults.append(f"client process {part} ended with {code}")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGUSR1)
                time.sleep(1.0)
                process.kill()
                process.wait()
                self.faults.append(f"clients of process {part} were still waiting; see its log")
            self.ended.append((notes, False))
        self.running = {}

    def ended_calls(self) -> int:
        """How many calls have ended, or nearly so: each has two lines."""
        paths = [path for _, path in self.running.values()] + [path for path, _ in self.ended]
        return sum(path.read_bytes().count(b"\n") for path in paths if path.exists()) // 2

    def notes(self, outcome: Outcome) -> None:
        """Put what was noted into the outcome."""
        outcome.faults += self.faults
        for path, killed in self.ended:
            begun: dict[tuple[int, int], str] = {}
            for line in path.read_text().splitlines() if path.exists() else ():
                try:
                    client, number, what, *rest = json.loads(line)
                except ValueError:
                    continue  # the process was killed in the middle of the line
                if not rest:
                    begun[client, number] = what
                    continue
                begun.pop((client, number), None)
                result, detail, seconds = rest
                outcome.notes.append((what, result, detail, seconds))
                if result in ("WRONG", "UNEXPECTED"):
                    outcome.faults.append(f"{what}: {result}: {detail}")
            if killed:
                outcome.killed += begun.values()
            else:
                outcome.faults += [f"{what}: no answer and no error" for what in begun.values()]


def soak(
    plan: Plan, folder: Path, expected: dict[str, Any], second: str, say: Callable[[str], None] = print
) -> Outcome:
    """Carry the plan out.

    Args:
        plan: How much.
        folder: An empty folder for everything that is written.
        expected: What must come out (`cases.expected`).
        second: The directory of the model that comes and goes.
        say: Is told what happens.
    """
    outcome, chance = Outcome(), random.Random(plan.seed)
    (folder / "expected.json").write_text(json.dumps(expected))
    server = Server(plan, folder, second)
    try:
        if plan.warm_up:
            say(f"warming up for {plan.warm_up:.0f} s")
            kills = [(plan.warm_up / 2, "client"), (plan.warm_up * 0.6, "worker")]
            _phase(server, plan, folder / "warm", plan.warm_up, plan.warm_calls, kills, outcome, say)
            outcome.notes, outcome.killed, outcome.client_kills, outcome.worker_kills = [], [], 0, 0
        outcome.faults += server.rest()
        _look(server, outcome)
        events: list[tuple[float, str]] = [
            *((plan.seconds * 0.75 * (n + 1) / (plan.worker_kills + 1), "worker") for n in range(plan.worker_kills)),
            *((chance.uniform(0.05, 0.95) * plan.seconds, "client") for _ in range(plan.client_kills)),
        ]
        _phase(server, plan, folder / "main", plan.seconds, plan.least, sorted(events), outcome, say)
        outcome.faults += server.rest()
        _look(server, outcome)
    finally:
        outcome.faults += server.stop()
    outcome.folder.append(len(list(server.temporary.rglob("*"))))
    _read_log(server.log, outcome)
    return outcome


def _phase(
    server: Server,
    plan: Plan,
    folder: Path,
    seconds: float,
    least: int,
    events: list[tuple[float, str]],
    outcome: Outcome,
    say: Callable[[str], None],
) -> None:
    """Let the clients call for a while, and kill what is to be killed."""
    folder.mkdir()
    (folder / "expected.json").symlink_to(folder.parent / "expected.json")
    processes, chance, begun = Processes(server, plan, folder), random.Random(f"{plan.seed} kills"), time.monotonic()
    processes.start_all()
    looked = 0.0
    while (now := time.monotonic() - begun) < seconds or (processes.ended_calls() < least and now < seconds + 120):
        while events and events[0][0] <= now:
            _, what = events.pop(0)
            if what == "client":
                processes.kill(chance.randrange(plan.processes))
                outcome.client_kills += 1
            elif workers := server.workers:
                os.kill(workers[0], signal.SIGKILL)
                outcome.worker_kills += 1
            say(f"{now:.0f} s: a {what} was killed")
        if now >= looked and (workers := server.workers):
            looked = now + 5.0
            with contextlib.suppress(OSError):  # the worker has just ended
                sizes = [watch.Held.by(pid).memory for pid in (server.process.pid, workers[0])]
                outcome.memory.append((now, sizes[0], sizes[1]))
        time.sleep(0.1)
    processes.stop_all()
    processes.notes(outcome)
    say(f"{time.monotonic() - begun:.0f} s: {len(outcome.notes)} calls have ended, {len(outcome.faults)} faults")


def _look(server: Server, outcome: Outcome) -> None:
    """Count what is held."""
    workers = watch.children(server.process.pid)
    if len(server.workers) != 1 or len(workers["running"]) != 1 or workers["ended"]:
        outcome.faults.append(f"the front has the children {workers}")
    outcome.held["front"].append(watch.Held.by(server.process.pid))
    if server.workers:
        outcome.held["worker"].append(watch.Held.by(server.workers[0]))
    outcome.folder.append(len(list(server.temporary.rglob("*"))))


def _read_log(path: Path, outcome: Outcome) -> None:
    """Calls by code as the server saw them; what it calls its own fault is one."""
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            outcome.faults.append(f"the server's log has a line that is no JSON: {line[:300]}")
            continue
        code = entry.get("code", "")
        if code:
            outcome.server_calls[code] = outcome.server_calls.get(code, 0) + 1
        if code in ("INTERNAL", "UNKNOWN") or "exception" in entry:
            outcome.faults.append(f"the server's log: {entry.get('message')} {entry.get('exception', '')[-1500:]}")
