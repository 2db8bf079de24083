"""Fuzzing: any bytes at any call get an answer in time, never INTERNAL or UNKNOWN, and the server is well afterwards.

`SPECTRA_FUZZ=100000` asks so many requests (`make fuzz`), in blocks of fixed seeds. Blocks that went well stand in
`build/fuzz.jsonl` and are not done again; blocks with findings are.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import fuzzing
import grpc
import numpy as np
import pytest
import vlm_spectra as vs
from conftest import start_server, stop_server
from crc32c import crc32c
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from http_calls import KINDS, Channel
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from vlm_spectra import errors
from vlm_spectra.images import Picture
from vlm_spectra.network import chunks
from vlm_spectra.network.checksum import Checksum
from vlm_spectra.v1 import model_service_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb
from webapp import start_web

REQUESTS = int(os.environ.get("SPECTRA_FUZZ", "700"))
LONG = REQUESTS > 5000
CLIENTS = 3
BLOCK = 400 if LONG else 56
REPORT = Path(__file__).parents[1] / "build" / "fuzz.jsonl"
SECONDS = 4.0
"""What each request is given: those that ask for much are ended then, and say so."""
PATIENCE = 120.0
"""Seconds in which a server that has not been stopped answers a plain request, however slow the machine."""
NEAR = 7
"""Requests that are asked beside each that hypothesis makes, with one value changed."""
CHECK_EVERY = 25
SERVICES = (model_service_pb2.DESCRIPTOR, spb.DESCRIPTOR)
CALLS = {
    f"{service.name}/{method.name}": method
    for file in SERVICES
    for service in file.services_by_name.values()
    for method in service.methods
}
LIMITS = {
    "max-new-tokens": 8,
    "max-batch": 6,
    "max-prompt-tokens": 400,
    "max-sweep-cells": 256,
    "max-capture-gb": 0.05,
    "max-message-mb": 2,
    "max-image-megapixels": 1,
    "kept-captures-gb": 1,
    "kept-seconds": 1_000_000,
}
"""Small enough that no request takes long, and large enough for all that is of interest."""
GRPCS = {
    f"/{service.full_name}/{method.name}": method
    for file in (health_pb2, reflection_pb2, channelz_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""The calls of gRPC's own services."""
TEXTS_OF_GRPC = ("service", "list_services", "file_by_filename", "file_containing_symbol", "containing_type")
"""Their fields that name something."""
FINE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}
FINE |= {"PERMISSION_DENIED", "DEADLINE_EXCEEDED"}


@dataclass
class Figures:
    """What came of some requests.

    Attributes:
        codes: How often each status.
        worked: How many got as far as the model's process.
        longest: Seconds of the slowest.
    """

    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    worked: int = 0
    longest: float = 0.0


class Fuzzed:
    """A server, and what is sent to it and thought of the answers."""

    def __init__(self, process: Any, address: str) -> None:
        self.process, self.address = process, address
        self.model = vs.connect(address, arrays="numpy", shared_memory=False, retries=8, timeout=PATIENCE)
        self.channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        self.plain = self.model.prepare_messages("Say hello")
        self.right = self.model.forward(self.plain, 1).logits
        pictures = [Picture.of(_png(size)) for size in ((64, 48), (40, 90))]
        for picture in pictures:
            self.model.prepare_messages("Hi", picture.data)
        with self.model.run_with_cache("lm.blocks.*.hook_resid_post") as cache:
            self.model.forward(self.plain, 1)
        captured = cache.context.capture_id
        names = [*self.model.catalogue.by_name, "lm.blocks.*.hook_resid_post", "lm.blocks.*.attn.*"]
        self.pools = fuzzing.Pools(names, [*(p.sha256 for p in pictures), "0" * 64], [captured, "0" * 32])
        self.bases = fuzzing.bases(self.pools, self.model.info.hidden)
        self.worker = worker_of(process)

    def close(self) -> None:
        self.channel.close()
        self.model.close()

    def still_right(self) -> None:
        """A plain request is answered, and right."""
        assert self.process.poll() is None, "the server is gone"
        assert np.array_equal(self.model.forward(self.plain, 1).logits, self.right)

    def near(self, method: str, payload: bytes, chance: int) -> Iterator[bytes]:
        """Requests that differ from this one in one value each; none where it cannot be read."""
        try:
            message = GetMessageClass(CALLS[method].input_type).FromString(payload)
        except DecodeError:
            return iter(())
        return fuzzing.neighbours(message, self.pools, Random(chance), NEAR)

    def spared(self, method: str, payload: bytes) -> bool:
        """Whether a request would take away what the others need, or load a model, which takes long."""
        try:
            message = GetMessageClass(CALLS[method].input_type).FromString(payload)
        except DecodeError:
            return False
        if method == "SpectraService/ReleaseCapture":
            return message.capture_id == self.pools.captures[0]
        if method == "ModelService/UnloadModel":
            return message.name == "spectra-tiny"
        return False

    def ask(self, method: str, payload: bytes, figures: Figures, over: Any = None) -> None:
        """Send bytes as a request, and judge the answer.

        Args:
            method: The call.
            payload: The bytes.
            figures: What came of it is added to these.
            over: The channel; gRPC's where None.
        """
        what, channel = CALLS[method], over or self.channel
        path = f"/{what.containing_service.full_name}/{what.name}"
        begun = time.monotonic()
        messages: list[bytes] = []
        try:
            if what.server_streaming:
                messages.extend(channel.unary_stream(path, bytes, bytes)(payload, timeout=SECONDS))
            else:
                messages.append(channel.unary_unary(path, bytes, bytes)(payload, timeout=SECONDS))
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
            reason = refusal(error, time.monotonic() - begun, len(payload), numbered=over is None)
        seconds = time.monotonic() - begun
        figures.codes[code] += 1
        figures.longest = max(figures.longest, seconds)
        assert seconds < PATIENCE, f"an answer after {seconds:.0f} s"
        if code == "OK":
            self.check_answer(what, messages, GetMessageClass(what.input_type).FromString(payload))
        figures.worked += bool(messages and what.server_streaming) or (code != "OK" and "compute_seconds" in reason)

    def check_answer(self, what: Any, messages: list[bytes], request: Any) -> None:
        """Every message can be read and is as it was sent; a stream has all that it announced, and its summary last.

        Args:
            what: The call.
            messages: The answer.
            request: What was asked.
        """
        parsed = [GetMessageClass(what.output_type).FromString(message) for message in messages]
        checksum = Checksum(sealed=True)
        for message, data in zip(parsed, messages, strict=True):
            if not (what.server_streaming and message.HasField("chunk")):  # those have one of their own
                checksum.check(message, data)
        if not what.server_streaming:
            return
        assert parsed[0].WhichOneof("event") == "header"
        assert parsed[-1].WhichOneof("event") == "summary"
        assert all(message.WhichOneof("event") != "summary" for message in parsed[:-1])
        announced = [tensor for message in parsed if message.HasField("header") for tensor in message.header.tensors]
        ends = {tensor.index: 0 for tensor in announced}
        plain = {tensor.index for tensor in announced if tensor.compression != tensor_pb2.COMPRESSION_ZSTD}
        for message in parsed:
            if message.HasField("chunk"):
                part = message.chunk
                assert crc32c(part.data) == part.crc32c
                assert part.offset == ends[part.index] or not ends[part.index] or part.index not in plain
                ends[part.index] = part.offset + len(part.data)
        for tensor in announced:
            rest = what.name == "RunWithCache" and request.HasField("resume")  # perhaps nothing of this one
            if tensor.index in plain and not tensor.HasField("shared") and (ends[tensor.index] or not rest):
                assert ends[tensor.index] == tensor.byte_count


def refusal(error: Any, seconds: float, size: int, numbered: bool) -> dict[str, str]:
    """What a refusal says in its metadata; it is one of ours, and one sentence.

    Args:
        error: The refusal.
        seconds: How long it took.
        size: Bytes of the request.
        numbered: Whether the server had the request, and gave it an id.
    """
    code = error.code().name
    assert code in FINE, f"{code}: {error.details()}"
    status = rpc_status.from_call(error)
    if status is None and code == "RESOURCE_EXHAUSTED":  # gRPC itself takes no more in
        assert size > 2e6 * LIMITS["max-message-mb"], f"{code} without details: {error.details()}"
        return {}
    if status is None:
        assert code == "DEADLINE_EXCEEDED", f"{code} without details: {error.details()}"
        assert seconds >= SECONDS * 0.9, f"{code} after {seconds:.1f} s: {error.details()}"
        return {}
    assert status.message
    assert "\n" not in status.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert errors.BY_REASON[info.reason].code == code
    assert info.metadata["request_id"] or not numbered
    return dict(info.metadata)


def worker_of(process: Any) -> str:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()


def _png(size: tuple[int, int]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    process, address = start_server(
        "--model", "spectra-tiny", "--device", "cpu", *(f"--{n}={v}" for n, v in LIMITS.items())
    )
    found = Fuzzed(process, address)
    yield found
    found.close()
    stop_server(process)


def run_block(fuzzed: Fuzzed, method: str, number: int, size: int) -> tuple[Figures, str]:
    """So many requests of one call; what came of them, and what was wrong with the first that was not answered well."""
    figures, asked = Figures(), [0]

    @seed(number)
    @settings(
        max_examples=size // (1 + NEAR),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(fuzzing.requests(fuzzed.bases[method], fuzzed.pools), st.integers(0, 2**32))
    def ask(first: bytes, chance: int) -> None:
        for payload in [first, *fuzzed.near(method, first, chance)]:
            if fuzzed.spared(method, payload):
                continue
            try:
                fuzzed.ask(method, payload, figures)
                asked[0] += 1
                if asked[0] % CHECK_EVERY == 0:
                    fuzzed.still_right()
            except BaseException as error:
                raise AssertionError(f"{type(error).__name__}: {error}\n{shown(method, payload)}") from error

    try:
        ask()
        fuzzed.still_right()
    except BaseException as error:
        return figures, f"{method}, block {number}: {error}"
    return figures, ""


def shown(method: str, payload: bytes) -> str:
    """A request, to be read and to be sent again."""
    try:
        text = text_format.MessageToString(GetMessageClass(CALLS[method].input_type).FromString(payload))
    except DecodeError as error:
        text = str(error)
    return f"{text[:2000]}\n{payload.hex()[:4000]}"


def test_every_call_of_the_contract_is_fuzzed(fuzzed: Fuzzed) -> None:
    assert set(fuzzed.bases) == set(CALLS)
    assert {type(base).DESCRIPTOR for method in CALLS for base in fuzzed.bases[method]} == {
        method.input_type for method in CALLS.values()
    }
    kinds = {field.name for base in fuzzed.bases["SpectraService/Forward"] for each in base.interventions
             for field, _ in each.ListFields()}  # fmt: skip
    from vlm_spectra.v1 import intervention_pb2

    assert {field.name for field in intervention_pb2.Intervention.DESCRIPTOR.fields} <= kinds


def test_the_valid_requests_are_answered(fuzzed: Fuzzed) -> None:
    """What the others are made from gets far: else they would test the first check alone."""
    for method, bases in fuzzed.bases.items():
        for base in bases:
            figures = Figures()
            fuzzed.ask(method, base.SerializeToString(), figures)
            refused = method == "ModelService/UnloadModel"
            assert set(figures.codes) <= ({"NOT_FOUND"} if refused else {"OK", "DEADLINE_EXCEEDED"}), (base, figures)


@pytest.mark.timeout(0 if LONG else 300)
def test_whatever_is_sent(fuzzed: Fuzzed, capsys: pytest.CaptureFixture[str]) -> None:
    """Several clients at once, each call in blocks of fixed seeds."""
    each = math.ceil(REQUESTS * 1.4 / (BLOCK * len(CALLS)))  # what cannot be read has no neighbours
    blocks = [(method, number) for number in range(each) for method in CALLS]
    done = []
    if LONG and REPORT.exists():
        done = [json.loads(line) for line in REPORT.read_text().splitlines()]
    known = {(row["call"], row["block"], row["size"]) for row in done}
    blocks = [block for block in blocks if (*block, BLOCK) not in known]
    lock, findings, began = threading.Lock(), [], time.monotonic()

    def work(block: tuple[str, int]) -> None:
        if LONG and sum(sum(row["codes"].values()) for row in done) >= REQUESTS:
            return
        figures, finding = run_block(fuzzed, *block, BLOCK)
        row = {"call": block[0], "block": block[1], "size": BLOCK, "codes": dict(figures.codes)}
        row |= {"worked": figures.worked, "longest": round(figures.longest, 2)}
        with lock:
            if finding:
                findings.append(finding)
            else:
                done.append(row)
            if LONG:
                REPORT.parent.mkdir(exist_ok=True)
                with (REPORT if not finding else REPORT.with_suffix(".findings")).open("a") as file:
                    file.write(json.dumps(row) + "\n" if not finding else finding + "\n\n")

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(work, blocks))
    codes: collections.Counter[str] = collections.Counter()
    for row in done:
        codes.update(row["codes"])
    if LONG:
        with capsys.disabled():
            print(f"\n{codes.total()} requests, {sum(row['worked'] for row in done)} of them reached the model: "
                  f"{dict(codes)}; slowest {max(row['longest'] for row in done)} s; "
                  f"{len(blocks)} blocks in {time.monotonic() - began:.0f} s")  # fmt: skip
    assert not findings, f"{len(findings)} findings:\n" + "\n\n".join(findings[:5])
    assert codes["OK"] > codes.total() / 10
    assert codes.total() >= (REQUESTS if LONG else REQUESTS / 2)
    assert worker_of(fuzzed.process) == fuzzed.worker, "the worker was replaced"
    fuzzed.still_right()


@settings(
    max_examples=max(60, REQUESTS // 100),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(raw=st.binary(max_size=40), kind=st.sampled_from(["whole", "bytes"]), text=st.text(max_size=20), data=st.data())
def test_grpcs_own_services(fuzzed: Fuzzed, raw: bytes, kind: str, text: str, data: st.DataObject) -> None:
    """Health, reflection and channelz, which are not ours, say neither INTERNAL nor UNKNOWN."""
    names = [*(file.name for file in SERVICES), "vlm_spectra.v1.SpectraService", text]
    pools = fuzzing.Pools([], [], [], dict.fromkeys(TEXTS_OF_GRPC, names))
    for path, method in GRPCS.items():
        request = data.draw(fuzzing.messages(method.input_type, pools)).SerializeToString()
        payload = request if kind == "whole" else raw
        answers = fuzzed.channel.stream_stream(path)(iter([payload]), timeout=PATIENCE)
        try:
            for answer in answers:
                GetMessageClass(method.output_type).FromString(answer)
                if path.endswith("/Watch"):  # it lasts
                    break
        except grpc.RpcError as error:
            assert error.code().name in FINE - {"DEADLINE_EXCEEDED"}, f"{path}: {error.code()}: {error.details()}"
        finally:
            answers.cancel()


# What browsers send.


@pytest.fixture(scope="module")
def page(fuzzed: Fuzzed) -> Iterator[str]:
    """The address of a page's app over the server."""
    process, address = start_web("--server", fuzzed.address)
    yield address
    stop_server(process)


@settings(
    max_examples=max(150, REQUESTS // 20),
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_whatever_is_sent_by_http(fuzzed: Fuzzed, page: str, data: st.DataObject) -> None:
    """The same requests in each of the dialects, and bodies of which some bytes are lost, changed or put in."""
    method, kind = data.draw(st.sampled_from(sorted(CALLS))), data.draw(st.sampled_from(KINDS))
    payload, channel = data.draw(fuzzing.requests(fuzzed.bases[method], fuzzed.pools)), Channel(page, kind)
    if data.draw(st.booleans()):
        payload = data.draw(st.sampled_from(fuzzed.bases[method])).SerializeToString()
        channel.spoil = lambda body: data.draw(fuzzing.broken(body))
    try:
        GetMessageClass(CALLS[method].input_type).FromString(payload)
    except DecodeError:
        if kind.endswith("json"):
            return
    if not fuzzed.spared(method, payload):
        fuzzed.ask(method, payload, Figures(), channel)


def test_the_page_is_well_afterwards(fuzzed: Fuzzed, page: str) -> None:
    """Each dialect gives what gRPC gives."""
    for kind in KINDS:
        for method in ("SpectraService/Forward", "SpectraService/Prepare"):
            fuzzed.ask(method, fuzzed.bases[method][0].SerializeToString(), found := Figures(), Channel(page, kind))
            assert set(found.codes) == {"OK"}
    fuzzed.still_right()


# The parser that is written by hand.


@settings(max_examples=max(1500, REQUESTS // 5), deadline=None, database=None, derandomize=True)
@given(st.data())
def test_the_hand_written_parser_is_the_generated_one(data: st.DataObject) -> None:
    """Bytes that it takes mean what they mean to the generated classes; it takes none that those refuse."""
    number = st.integers(0, 2**32 - 1)
    fields = data.draw(st.tuples(number, st.integers(0, 2**64 - 1), number, st.binary(max_size=40)))
    good = chunks.pack(*fields)
    choice = data.draw(st.sampled_from(["broken", "any", "cut", "twice", "long numbers"]))
    raw = bytearray(good)
    if choice == "broken":
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(raw)))
            raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    elif choice == "any":
        body = data.draw(st.binary(max_size=60))
        raw = bytearray(data.draw(st.sampled_from([b"", bytes((0x7A, len(body)))])) + body)
    elif choice == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    elif choice == "twice":
        raw += chunks.pack(*fields[:3], b"x")
    else:  # numbers with more bytes than they need
        padded = bytes((0x08, *(b | 0x80 for b in data.draw(st.binary(max_size=11))), data.draw(st.integers(0, 127))))
        raw = bytearray((0x7A, len(padded))) + padded
    message = bytes(raw)
    taken = chunks.parse(message)
    try:
        event = spb.RunWithCacheResponse.FromString(message)
    except DecodeError:
        assert taken is None
        return
    if taken is None:
        return
    part = event.chunk
    assert event.WhichOneof("event") == "chunk"
    assert (taken.tensor, taken.offset, taken.crc32c, bytes(taken.data)) == (
        part.index, part.offset, part.crc32c, part.data,
    )  # fmt: skip
