"""Calls of the contract as a client in any language makes them, and workers with faults."""

from __future__ import annotations

import os
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from vlm_spectra.v1 import inputs_pb2, model_service_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb

WAIT = 120.0
"""Seconds until something that must happen has happened, however slow the machine."""


@dataclass(frozen=True)
class Refusal:
    """An error as it crosses the network.

    Attributes:
        code: The gRPC status.
        message: The sentence.
        reason: Of `ErrorInfo`.
        domain: Of `ErrorInfo`.
        metadata: Of `ErrorInfo`.
        fields: Of `BadRequest`.
        retry_after: Of `RetryInfo`, in seconds; None where there is none.
    """

    code: str
    message: str
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    retry_after: float | None = None

    @classmethod
    def of(cls, error: Any) -> Refusal:
        """The refusal in a failed call."""
        status, found = rpc_status.from_call(error), {}
        for detail in [] if status is None else status.details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                found |= {"reason": info.reason, "domain": info.domain, "metadata": dict(info.metadata)}
            elif detail.Unpack(bad):
                found["fields"] = tuple(violation.field for violation in bad.field_violations)
            elif detail.Unpack(retry):
                found["retry_after"] = retry.retry_delay.ToNanoseconds() / 1e9
        return cls(error.code().name, error.details(), **found)


class Raw:
    """A client without the library.

    Args:
        address: The server's.
        name: How it names itself.
        token: Its token.
    """

    def __init__(self, address: str, name: str = "raw", token: str = "") -> None:
        self.channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self.metadata = [("x-vlm-spectra-client", name)]
        if token:
            self.metadata.append(("authorization", f"Bearer {token}"))

    def begin(self, call: str, request: Message | bytes, timeout: float | None = WAIT) -> Any:
        """Begin a call of either service; iterating over it gives messages, still encoded."""
        model = call in ("ListModels", "GetModel", "LoadModel", "UnloadModel")
        data = request if isinstance(request, bytes) else request.SerializeToString()
        open_call = self.channel.unary_stream(f"/vlm_spectra.v1.{'Model' if model else 'Spectra'}Service/{call}")
        return open_call(data, timeout=timeout, metadata=self.metadata)

    def ask(self, call: str, request: Message | bytes, timeout: float | None = WAIT) -> list[bytes] | Refusal:
        """Make a call: its messages, or the refusal."""
        try:
            return list(self.begin(call, request, timeout))
        except grpc.RpcError as error:
            return Refusal.of(error)

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()


def unload(address: str, model: str) -> None:
    """Take a model from a server, as if it had never been there."""
    client = Raw(address)
    answer = client.ask("UnloadModel", model_service_pb2.UnloadModelRequest(name=model))
    client.close()
    assert isinstance(answer, list), answer


def prompts(*tasks: str, images: tuple[str, ...] = ()) -> list[inputs_pb2.Prompt]:
    return [inputs_pb2.Prompt(task=task, images=images) for task in tasks]


def run(task: str, *hooks: str, **fields: Any) -> spb.RunWithCacheRequest:
    """A capture of a forward pass."""
    selection = spb.CaptureSelection(hooks=hooks or ["lm.blocks.0.hook_resid_post"])
    return spb.RunWithCacheRequest(
        run=spb.CaptureRun(prompts=prompts(task), selection=selection, forward=spb.ForwardOptions(), **fields)
    )


T = TypeVar("T")


def until(found: Callable[[], T], seconds: float = WAIT) -> T:
    """Wait until something holds; what `found` then returns."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, "it has not come so far"
        time.sleep(0.02)
    return result


def metric(port: int, name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def states(channel: grpc.Channel, service: str) -> list[int]:
    """What the health of a service is, one after the other: a list that grows as long as the channel is open."""
    stub, seen = health_pb2_grpc.HealthStub(channel), []

    def follow() -> None:
        while True:
            try:
                for response in stub.Watch(health_pb2.HealthCheckRequest(service=service)):
                    if seen[-1:] != [response.status]:  # the same is told twice now and then
                        seen.append(response.status)
            except grpc.RpcError:
                time.sleep(0.05)  # the connection broke: look again
            except ValueError:
                return  # the channel is closed

    threading.Thread(target=follow, daemon=True).start()
    return seen


FAULTS = """
import sys
if "vlm_spectra_server.serving.worker" in sys.orig_argv:
    import os, time, torch
    from vlm_spectra_server.hooked_vlm import HookedVLM
    forward_into = HookedVLM.forward_into

    def out_of_memory(delivery):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def assertion(delivery):
        raise AssertionError("device-side assert triggered")

    def wait(delivery):
        while True:
            delivery.check()
            time.sleep(0.01)

    def halfway(delivery):
        progress = delivery.progress

        def stopped(phase, done, total):
            progress(phase, done, total)
            if done == 2:
                wait(delivery)

        delivery.progress = stopped

    def broken(self, delivery, inputs, *rest):
        for fault in (out_of_memory, assertion, wait, halfway):
            if inputs.prompts[0].task == fault.__name__:
                fault(delivery)
        if inputs.prompts[0].task == "die":
            os._exit(3)
        if inputs.prompts[0].task == "slow":
            time.sleep(3)
        return forward_into(self, delivery, inputs, *rest)

    HookedVLM.forward_into = broken
"""
"""A worker's startup file: prompts that make its model fail, wait (before it or after two layers), be slow, or end the
process."""


@contextmanager
def faulty(directory: Path) -> Iterator[None]:
    """Servers that are started inside have workers with faults; their fronts are as they are."""
    (directory / "sitecustomize.py").write_text(textwrap.dedent(FAULTS))
    with pytest.MonkeyPatch.context() as patch:
        path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        yield


class WorkerPipe:
    """A worker's way to a front that gives memory as it is told to.

    Args:
        grants: The answers to requests for memory, in order; the last one for all that follow.

    Attributes:
        sent: What the worker has said.
        blobs: Of the last message.
        job: The job at work.
    """

    def __init__(self, *grants: bool) -> None:
        self.sent: list[dict[str, Any]] = []
        self.blobs: tuple[bytes, ...] = ()
        self.grants = list(grants)
        self.job: Any = None

    def send(self, message: dict[str, Any], *blobs: bytes, fd: int | None = None) -> None:
        """The worker's side of `Pipe.send`."""
        self.sent.append(message)
        self.blobs = blobs
        if message["kind"] == "reserve":
            self.job.grants.put(self.grants[0] if len(self.grants) == 1 else self.grants.pop(0))
