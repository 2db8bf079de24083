"""A process of clients, each a thread with a connection of its own: they call, leave, hurry, are cut off, ask badly.

Every call is noted before it is made and after it has ended: a line each, `[client, number, what]` and
`[client, number, what, outcome, detail, seconds]`. Outcomes: `right`, `left` (the client went), `refused` (the server
said why; the detail is the reason), and `WRONG` or `UNEXPECTED`, which must not be.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import grpc
import numpy as np
import vlm_spectra as vs
from grpc_health.v1 import health_pb2, health_pb2_grpc
from proxy import Proxy
from vlm_spectra import errors, remote
from vlm_spectra.v1 import model_service_pb2 as mpb
from vlm_spectra.v1 import spectra_service_pb2 as spb

from .cases import CASES, POST, SECOND, STREAM, digest, picture, prepared, streamed

PATIENCE = 300.0
"""Seconds that any one call may take: an answer that comes later counts as none."""
FOR_NOW = (errors.UnavailableError, errors.BusyError)
"""What any call may be answered while a worker is replaced and all queues are full."""


@dataclass(frozen=True)
class Orders:
    """What a process of clients is to do.

    Attributes:
        address: The server's.
        tokens: A token for each client.
        narrow: A token that allows `infer` alone.
        operator: A token that allows everything, for the one client that loads and unloads; empty for none.
        second: The name of the model that comes and goes.
        expected: The file with what must come out.
        notes: Where the notes go.
        seed: Of all that is random.
        keepalive: Seconds after which a connection that stands still is asked whether it still is one.
    """

    address: str
    tokens: list[str]
    narrow: str
    operator: str
    second: str
    expected: str
    notes: str
    seed: int
    keepalive: float

    def command(self) -> list[str]:
        """The command that starts the process."""
        return [sys.executable, "-m", "soak.client", json.dumps(asdict(self))]


class WrongError(AssertionError):
    """Something came out that must not."""


class Client:
    """One client.

    Args:
        orders: The process's orders.
        number: Which of its clients it is.
        expected: What must come out.
        note: Takes notes.
        stop: Set when it is to end.
    """

    def __init__(
        self,
        orders: Orders,
        number: int,
        expected: dict[str, Any],
        note: Callable[[list[Any]], None],
        stop: threading.Event,
    ) -> None:
        self.orders, self.number, self.expected, self.note, self.stop = orders, number, expected, note, stop
        self.chance = random.Random(f"{orders.seed} {number}")
        self.token = orders.tokens[number]
        self.model: vs.RemoteVLM | None = None
        self.count = 0
        self.deeds: list[tuple[float, str, Callable[[], str]]] = [
            (30.0, "", self.case),
            (3.0, "leave a stream", self.leave_stream),
            (2.0, "leave a capture", self.leave_capture),
            (1.0, "close in mid-call", self.close_in_mid_call),
            (2.0, "hurry", self.hurry),
            (2.0, "cut connection", self.cut),
            (2.0, "second model", self.second),
            (2.0, "look", self.look),
            *((0.5, f"bad input: {name}", deed) for name, deed in self.bad_input().items()),
        ]

    def run(self) -> None:
        """Until it is to stop."""
        while not self.stop.is_set():
            if self.orders.operator and self.number == 0 and self.chance.random() < 0.1:
                self.noted("load and unload", self.load_and_unload)
                continue
            weights = [weight for weight, _, _ in self.deeds]
            _, what, deed = self.chance.choices(self.deeds, weights)[0]
            if what:
                self.noted(what, deed)
            else:
                name = self.chance.choices(list(CASES), [case.weight for case in CASES.values()])[0]
                self.noted(name, lambda name=name: self.case(name))
            if self.chance.random() < 0.05:
                self.reconnect()
        self.reconnect()

    def noted(self, what: str, deed: Callable[[], str]) -> None:
        """Do it, and take notes."""
        self.count += 1
        self.note([self.number, self.count, what])
        begun, detail = time.monotonic(), ""
        try:
            outcome = deed()
            outcome, _, detail = outcome.partition(" ")
        except FOR_NOW as error:
            outcome, detail = "refused", sound(error)
        except errors.SpectraError as error:
            outcome, detail = "UNEXPECTED", f"{type(error).__name__} {error.reason}: {error} [{error.request_id}]"
        except WrongError as error:
            outcome, detail = "WRONG", str(error)
        except BaseException:
            outcome, detail = "UNEXPECTED", traceback.format_exc()[-2500:]
        self.note([self.number, self.count, what, outcome, detail, round(time.monotonic() - begun, 3)])
        if outcome == "refused":
            self.stop.wait(self.chance.uniform(0.1, 1.0))

    def connected(self) -> vs.RemoteVLM:
        """The client's connection."""
        if self.model is None:
            self.model = self.connect()
        return self.model

    def connect(self, address: str = "", **options: Any) -> vs.RemoteVLM:
        """A new connection."""
        options = {"timeout": PATIENCE, "token": self.token, "retries": 4, "model": "spectra-tiny", **options}
        options.setdefault("shared_memory", self.chance.random() < 0.5)
        return vs.connect(address or self.orders.address, arrays="numpy", **options)

    def reconnect(self) -> None:
        """Let the connection go; the next call makes another."""
        if self.model is not None:
            self.model.close()
            self.model = None

    def picture(self, name: str) -> bytes:
        """A picture that the server may know, or one that nobody has ever sent."""
        return picture(name, f"{self.chance.random()}" if self.chance.random() < 0.3 else "")

    def compare(self, name: str, found: Any) -> str:
        if digest(found) != self.expected["digests"][name]:
            raise WrongError(f"{name} is not what it is in process")
        return "right"

    def case(self, name: str, model: vs.RemoteVLM | None = None) -> str:
        """A call with a known answer."""
        try:
            return self.compare(name, CASES[name].ask(model or self.connected(), self.picture))
        except errors.CaptureNotFoundError as error:
            if CASES[name].kind != "reference":
                raise
            return f"refused {sound(error)}"  # dropped meanwhile, to make room

    def leave_stream(self) -> str:
        """The loop is left early: what came is a beginning of what must come."""
        most = self.chance.randint(1, 30)
        found = streamed(self.connected(), self.picture, most)
        if found != self.expected["tokens"][: len(found)] or len(found) < min(most, len(self.expected["tokens"])):
            raise WrongError("the stream's beginning is another")
        return "left"

    def leave_capture(self) -> str:
        """The block is left by an exception while activations are on their way."""
        model = self.connected()
        inputs = prepared(model, "both", self.picture)
        try:
            with model.run_with_cache(POST):
                model.forward(inputs, logits_to_keep=None)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            return "left"

    def close_in_mid_call(self) -> str:
        """The connection is closed under a running stream."""
        with self.connect() as model:
            tokens = model.stream(prepared(model, "screen", self.picture), **STREAM)
            next(tokens)
        return "left"

    def hurry(self) -> str:
        """So little time that it does not always suffice."""
        name = self.chance.choice(["forward: last", "capture: stream", "generate: greedy"])
        with self.connect() as model:
            model._timeout = self.chance.uniform(0.02, 1.5)
            try:
                return self.case(name, model)
            except errors.DeadlineError as error:
                return f"refused {sound(error)}"

    def cut(self) -> str:
        """The connection breaks once or twice, or stands still: a capture comes whole all the same."""
        name = self.chance.choice(["capture: stream", "capture: both", "capture: answer", "capture: packed"])
        kind = self.chance.choice(["cuts", "cuts", "truncations", "truncations", "stalls"])
        places = [self.chance.randrange(60_000) for _ in range(self.chance.randint(1, 2) if kind != "stalls" else 1)]
        with Proxy(self.orders.address, **{kind: places}) as proxy:
            try:
                with self.connect(proxy.address, shared_memory=False) as model:
                    return self.case(name, model)
            except errors.CaptureNotFoundError as error:
                return f"refused {sound(error)}"  # its worker died while the connection was down

    def second(self) -> str:
        """A model that is there, or not, or only just."""
        name = self.chance.choice(list(SECOND))
        try:
            with self.connect(model=self.orders.second, load_timeout=1.0) as model:
                return self.compare(name, SECOND[name].ask(model, self.picture))
        except errors.UnknownModelError as error:
            return f"refused {sound(error)}"

    def look(self) -> str:
        """The list of models, one of them, health."""
        model = self.connected()
        listed = model._unary("ModelService/ListModels", mpb.ListModelsRequest(), mpb.ListModelsResponse).models
        if not {"spectra-tiny"} <= {each.name for each in listed} <= {"spectra-tiny", self.orders.second}:
            raise WrongError(f"listed are {[each.name for each in listed]}")
        found = model._unary("ModelService/GetModel", mpb.GetModelRequest(name="spectra-tiny"), mpb.GetModelResponse)
        if len(found.model.hooks) != len(model.hooks()):
            raise WrongError(f"{len(found.model.hooks)} hooks")
        with grpc.insecure_channel(self.orders.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            status = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status
        if status not in (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING):
            raise WrongError(f"health is {status}")
        return "right"

    def load_and_unload(self) -> str:
        """The operator's work: the second model comes, answers, and goes."""
        with self.connect(token=self.orders.operator) as model:
            request = mpb.LoadModelRequest(name=self.orders.second, device="cpu")
            model._unary("ModelService/LoadModel", request, mpb.LoadModelResponse)
            try:
                with self.connect(model=self.orders.second, load_timeout=PATIENCE) as second:
                    for name, case in SECOND.items():
                        self.compare(name, case.ask(second, self.picture))
                    self.stop.wait(self.chance.uniform(0.0, 5.0))
            finally:
                gone = mpb.UnloadModelRequest(name=self.orders.second)
                model._unary("ModelService/UnloadModel", gone, mpb.UnloadModelResponse)
        return "right"

    def bad_input(self) -> dict[str, Callable[[], str]]:
        """What must be refused, each with its error."""
        zeros = spb.RunWithCacheRequest(resume=spb.CaptureResume(capture_id="0" * 32))
        nothing = spb.RunWithCacheRequest(run=spb.CaptureRun(model="spectra-tiny", forward=spb.ForwardOptions()))
        ill = [("lm.blocks.1.hook_resid_post", vs.PatchActivation(np.zeros((3, 7), np.float32)))]
        everything = ["lm.blocks.*.attn.*", "lm.blocks.*.mlp.*", "lm.blocks.*.hook_*"]

        def patched(model: vs.RemoteVLM) -> Any:
            with model.run_with_hooks(ill):
                return model.forward(prepared(model, "text", self.picture))

        def captured(model: vs.RemoteVLM) -> Any:
            with model.run_with_cache(everything):
                return model.forward(prepared(model, "both", self.picture))

        def cold(model: vs.RemoteVLM) -> Any:
            return model.generate(model.prepare_messages("Hi"), 2, temperature=-1.0, do_sample=True)

        def unembedded(model: vs.RemoteVLM) -> Any:
            return model._all("GetUnembedding", bare(spb.GetUnembeddingRequest), ())

        def bare(kind: Any) -> Any:
            return kind(model="spectra-tiny")

        def unload(model: vs.RemoteVLM) -> Any:
            request = mpb.UnloadModelRequest(name=self.chance.choice(["spectra-tiny", "none"]))
            return model._unary("ModelService/UnloadModel", request, mpb.UnloadModelResponse)

        deeds: dict[str, tuple[type[errors.SpectraError], Callable[[vs.RemoteVLM], Any]]] = {
            "no prompt": (errors.InvalidInputError, lambda m: m._all("Forward", bare(spb.ForwardRequest), ())),
            "no hook": (errors.InvalidInputError, lambda m: m._all("RunWithCache", nothing, ())),
            "no tokens": (errors.InvalidInputError, unembedded),
            "no image": (errors.InvalidImageError, lambda m: m.prepare_messages("Hi", self.chance.randbytes(999))),
            "too long": (errors.PromptTooLongError, lambda m: m.prepare_messages("word " * 3000)),
            "wrong shape": (errors.ShapeMismatchError, patched),
            "too much": (errors.CaptureTooLargeError, captured),
            "too many": (errors.OverLimitError, lambda m: m.prepare_messages_batch(["Hi"] * 65, [None] * 65)),
            "temperature": (errors.InvalidInputError, cold),
            "unknown model": (errors.UnknownModelError, lambda m: self.connect(model="none")),
            "unknown capture": (errors.CaptureNotFoundError, lambda m: m._all("RunWithCache", zeros, ())),
            "wrong token": (errors.UnauthenticatedError, lambda m: self.connect(token="wrong-" + "x" * 30)),
            "no token": (errors.UnauthenticatedError, lambda m: self.connect(token="")),
            "no scope": (errors.PermissionDeniedError, self.beyond_its_scope),
            "not the operator": (errors.PermissionDeniedError, unload),
        }  # fmt: skip

        def deed(kind: type[errors.SpectraError], call: Callable[[vs.RemoteVLM], Any]) -> Callable[[], str]:
            def refused() -> str:
                try:
                    call(self.connected())
                except kind as error:
                    sound(error)
                    return "right"
                raise WrongError(f"it was not refused with {kind.__name__}")

            return refused

        return {name: deed(*each) for name, each in deeds.items()} | {"no gRPC": self.bytes_that_are_none}

    def beyond_its_scope(self, model: vs.RemoteVLM) -> None:
        """What a token of another scope may not."""
        inputs = model.prepare_messages("Hi")
        with self.connect(token=self.orders.narrow) as narrow:
            narrow.logit_lens(inputs)

    def bytes_that_are_none(self) -> str:
        """Bytes that are no HTTP, on the server's own port."""
        host, port = self.orders.address.split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.sendall(self.chance.randbytes(self.chance.choice([0, 1, 24, 5000])))
        return "left"


def sound(error: errors.SpectraError) -> str:
    """The reason of an error that is one sentence."""
    if not str(error) or "\n" in str(error) or error.reason not in errors.BY_REASON:
        raise WrongError(f"an error that says nothing: {error!r}")
    return error.reason


def main() -> None:
    """Make calls until SIGTERM comes, then end the running ones. SIGUSR1 prints where each thread is."""
    faulthandler.register(signal.SIGUSR1)
    orders = Orders(**json.loads(sys.argv[1]))
    remote.KEEPALIVE_SECONDS = orders.keepalive
    expected, stop = json.loads(Path(orders.expected).read_text()), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    notes = os.open(orders.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(line: list[Any]) -> None:
        os.write(notes, (json.dumps(line) + "\n").encode())

    clients = [Client(orders, number, expected, note, stop) for number in range(len(orders.tokens))]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.2) if threads[0].is_alive() else time.sleep(0.2)


if __name__ == "__main__":
    main()
