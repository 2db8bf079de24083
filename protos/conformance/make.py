"""Makes the conformance corpus: `python protos/conformance/make.py` writes it anew beside this file.

The streams are put together from the generated classes and, where a message must be unusual, byte by byte. What a
client must come to is written down here by hand or computed by numpy, never read back through a client.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import crc32c
import ml_dtypes
import numpy as np
import zstandard
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.json_format import MessageToDict
from google.rpc import code_pb2, error_details_pb2, status_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra.v1 import stream_pb2, tensor_pb2

Response = spb.RunWithCacheResponse

DTYPES = {
    "bool": np.dtype(np.bool_),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
CAPTURE = "c0ffee" * 5 + "00"


# ---- parts of streams


def every_bit(dtype: str) -> np.ndarray[Any, Any]:
    """An array with the values at which decoders go wrong: extremes, subnormals, zeros of both signs, infinities."""
    element = DTYPES[dtype]
    if dtype == "bool":
        return np.array([[True, False, True], [False, False, True]])
    if element.kind in "iu":
        low, high = np.iinfo(element).min, np.iinfo(element).max
        return np.array([[low, high, 0], [1, low + 1, high - 1]], dtype=element)
    if element.itemsize == 1:
        return np.arange(256, dtype=np.uint8).view(element).reshape(16, 16)
    info = ml_dtypes.finfo(element)
    special = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")]
    extreme = [info.max, info.min, info.tiny, info.smallest_subnormal, info.eps]
    exact = np.concatenate([np.array(special, dtype=element), np.array(extreme, dtype=element)])
    return exact.reshape(3, 4)


def header(*arrays: tuple[str, np.ndarray[Any, Any]], first: int = 0, capture: str = "", zstd: bool = False) -> bytes:
    """A header that announces arrays."""
    tensors = [
        tensor_pb2.TensorHeader(
            index=first + number,
            name=name,
            dtype=f"DTYPE_{dtype_of(array).upper()}",
            shape=array.shape,
            byte_count=array.nbytes,
            compression="COMPRESSION_ZSTD" if zstd else "COMPRESSION_UNSPECIFIED",
        )
        for number, (name, array) in enumerate(arrays)
    ]
    head = stream_pb2.Header(request_id="r1", model="m", revision="v1", capture_id=capture, tensors=tensors)
    return Response(header=head).SerializeToString()


def dtype_of(array: np.ndarray[Any, Any]) -> str:
    return next(name for name, element in DTYPES.items() if element == array.dtype)


def chunk(index: int, offset: int, data: bytes, crc: int | None = None) -> bytes:
    """A chunk; its checksum is right unless given."""
    checksum = crc32c.crc32c(data) if crc is None else crc
    part = tensor_pb2.TensorChunk(index=index, offset=offset, crc32c=checksum, data=data)
    return Response(chunk=part).SerializeToString()


def whole(index: int, array: np.ndarray[Any, Any]) -> list[bytes]:
    """An array in one chunk; none where it is empty."""
    return [chunk(index, 0, array.tobytes())] if array.nbytes else []


def packed(data: bytes, item: int) -> bytes:
    """Bytes regrouped by their place in the element, then Zstandard with the size in the frame."""
    if item > 1 and len(data) % item == 0:
        data = np.frombuffer(data, np.uint8).reshape(-1, item).T.tobytes()
    return zstandard.ZstdCompressor(level=1).compress(data)


def summary(count: int = 1, size: int = 0) -> bytes:
    return Response(summary=stream_pb2.Summary(tensor_count=count, byte_count=size)).SerializeToString()


def token(row: int, index: int, number: int, text: str) -> bytes:
    return Response(token=spb.Token(row=row, index=index, id=number, text=text, logprob=-0.5)).SerializeToString()


def sealed(*messages: bytes) -> list[bytes]:
    """Messages of one call with the running checksum behind each that is no chunk: field 14, a fixed32."""
    found, crc = [], 0
    for message in messages:
        if message[0] != Response.CHUNK_FIELD_NUMBER << 3 | 2:
            crc = crc32c.crc32c(message, crc)
            message += bytes((14 << 3 | 5,)) + struct.pack("<I", crc)
        found.append(message)
    return found


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def refusal(code: str, message: str, reason: str, **rest: Any) -> dict[str, str]:
    """The end of a call that the server refused, with the details of `google.rpc`."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="vlm-spectra", metadata=rest.get("metadata", {}))
    parts: list[Any] = [info]
    if "field" in rest:
        violation = error_details_pb2.BadRequest.FieldViolation(field=rest["field"], description=message)
        parts.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if "retry_after" in rest:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(rest["retry_after"] * 1e9))
        parts.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details = []
    for part in parts:
        details.append(any_pb2.Any())
        details[-1].Pack(part, deterministic=True)
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message, details=details)
    return {"code": code, "message": message, "details": status.SerializeToString(deterministic=True).hex()}


OK = {"code": "OK"}
LOST = {"code": "UNAVAILABLE", "message": "Socket closed"}


# ---- what a client must come to


def number(value: Any) -> Any:
    """An element as JSON: integers beyond 2^53 as text, and what JSON has no number for by name."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value) if abs(int(value)) < 1 << 53 else str(int(value))
    value = float(value)
    if value != value:
        return "NaN"
    return {float("inf"): "Infinity", float("-inf"): "-Infinity"}.get(value, value)


def expected(name: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array as the corpus states it; the values of a small one too."""
    found = {
        "name": name,
        "dtype": dtype_of(array),
        "shape": list(array.shape),
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }
    if array.size <= 256:
        found["values"] = [number(value) for value in array.reshape(-1).tolist()]
    return found


CASES: list[tuple[dict[str, Any], list[bytes]]] = []


def case(
    name: str,
    about: str,
    *calls: tuple[list[bytes], dict[str, str]],
    tensors: Iterable[tuple[str, np.ndarray[Any, Any]]] = (),
    tokens: Iterable[list[Any]] = (),
    error: dict[str, Any] | None = None,
    resumes: Iterable[dict[str, int]] = (),
) -> None:
    """A case: the calls a client makes one after the other, and what it must have in the end."""
    files, described = [], []
    for position, (messages, ends) in enumerate(calls):
        file = f"streams/{name}{f'-{position + 1}' if len(calls) > 1 else ''}.bin"
        files.append(b"".join(b"\0" + struct.pack(">I", len(message)) + message for message in messages))
        described.append({"file": file, "ends": ends})
    for have, call in zip(resumes, described[1:], strict=True):
        call["resume"] = {"capture_id": CAPTURE, "offsets": have}
    entry = {
        "name": name,
        "about": about,
        "calls": described,
        "tensors": [expected(*each) for each in tensors],
        "tokens": list(tokens),
        "error": error,
    }
    CASES.append((entry, files))


def reason(name: str, **rest: Any) -> dict[str, Any]:
    return {"reason": name, **rest}


def streams() -> None:
    """All cases."""
    x = np.arange(24, dtype="<f4").reshape(2, 3, 4)
    y = np.arange(10, dtype="<i8") - 5
    raw = x.tobytes()

    for dtype in DTYPES:
        array = every_bit(dtype)
        case(
            f"dtype-{dtype}",
            f"A tensor of {dtype} with the values at which decoders go wrong.",
            ([header(("t", array)), *whole(0, array), summary()], OK),
            tensors=[("t", array)],
        )

    scalar, empty = np.array(2.5, dtype="<f4"), np.zeros((3, 0, 2), dtype="<f2")
    case(
        "no-axes",
        "A tensor without axes has one element.",
        ([header(("t", scalar)), *whole(0, scalar), summary()], OK),
        tensors=[("t", scalar)],
    )
    case(
        "no-elements",
        "A tensor of size 0 has no chunks and is complete at once.",
        ([header(("none", empty), ("some", y)), *whole(1, y), summary(2)], OK),
        tensors=[("none", empty), ("some", y)],
    )
    case("no-tensors", "A stream without any tensor.", ([header(), summary(0)], OK))
    case(
        "summary-alone",
        "A stream that is nothing but its summary.",
        ([summary(0)], OK),
    )

    case(
        "every-boundary",
        "Chunks of one byte each: a boundary in every place, also inside of elements.",
        ([header(("t", x)), *(chunk(0, at, raw[at : at + 1]) for at in range(len(raw))), summary()], OK),
        tensors=[("t", x)],
    )
    for at in (1, 3, 4, 47, 95):
        case(
            f"boundary-{at}",
            f"Two chunks, the second from byte {at}.",
            ([header(("t", x)), chunk(0, 0, raw[:at]), chunk(0, at, raw[at:]), summary()], OK),
            tensors=[("t", x)],
        )
    case(
        "empty-chunks",
        "Chunks without bytes, where the last one ended, change nothing.",
        ([header(("t", x)), chunk(0, 0, b""), *whole(0, x), chunk(0, 96, b""), summary()], OK),
        tensors=[("t", x)],
    )
    alternating = [
        part
        for at in range(0, 80, 8)
        for part in (chunk(1, at, y.tobytes()[at : at + 8]), chunk(0, at, raw[at : at + 8]))
    ]
    case(
        "alternating",
        "Chunks of two tensors alternate.",
        ([header(("a", x), ("b", y)), *alternating, chunk(0, 80, raw[80:]), summary(2)], OK),
        tensors=[("a", x), ("b", y)],
    )
    case(
        "sparse-indices",
        "The index is a name of the stream's, not a place in a list.",
        ([header(("a", x), first=4_000_000_000), chunk(4_000_000_000, 0, raw), summary()], OK),
        tensors=[("a", x)],
    )
    case(
        "two-headers",
        "A second header announces more tensors; one that is announced again stays as it is.",
        ([header(("a", x)), *whole(0, x), header(("a", x), ("b", y)), *whole(1, y), summary(2)], OK),
        tensors=[("a", x), ("b", y)],
    )
    progress = Response(progress=stream_pb2.Progress(phase="PHASE_FORWARD", done=1, total=2)).SerializeToString()
    case(
        "tokens",
        "Tokens and progress between the chunks; a token that comes twice counts once.",
        (
            [
                header(),
                progress,
                token(0, 0, 7, "Hé"),
                token(1, 0, 8, ""),
                token(0, 0, 7, "Hé"),
                token(0, 1, 9, "llo"),
                header(("sequences", y)),
                *whole(0, y),
                summary(),
            ],
            OK,
        ),
        tensors=[("sequences", y)],
        tokens=[[0, 0, 7, "Hé"], [1, 0, 8, ""], [0, 1, 9, "llo"]],
    )
    case(
        "after-the-summary",
        "What comes behind the summary is not read.",
        ([header(("t", x)), *whole(0, x), summary(), chunk(0, 7, b"???", 1)], OK),
        tensors=[("t", x)],
    )

    for item, array in ((4, np.linspace(-1, 1, 5000, dtype="<f4")), (2, np.arange(300).astype(ml_dtypes.bfloat16))):
        data, half = array.tobytes(), array.nbytes // 2 // item * item
        case(
            f"zstd-{item}",
            f"Chunks of {item}-byte elements regrouped and compressed; offsets count the bytes before compression.",
            (
                [
                    header(("t", array), zstd=True),
                    chunk(0, 0, packed(data[:half], item)),
                    chunk(0, half, packed(data[half:], item)),
                    summary(),
                ],
                OK,
            ),
            tensors=[("t", array)],
        )
    case(
        "zstd-odd",
        "A compressed chunk whose bytes are no multiple of the element's is not regrouped.",
        (
            [
                header(("t", x), zstd=True),
                chunk(0, 0, packed(raw[:41], 4)),
                chunk(0, 41, packed(raw[41:], 4)),
                summary(),
            ],
            OK,
        ),
        tensors=[("t", x)],
    )
    case(
        "zstd-bool",
        "Elements of one byte have nothing to regroup.",
        ([header(("t", np.ones(500, bool)), zstd=True), chunk(0, 0, packed(b"\1" * 500, 1)), summary()], OK),
        tensors=[("t", np.ones(500, bool))],
    )
    case(
        "zstd-too-large",
        "A compressed chunk that says it holds more than the tensor lacks is refused before it is unpacked.",
        ([header(("t", x), zstd=True), chunk(0, 0, packed(bytes(1 << 20), 1)), summary()], OK),
        error=reason("INTERNAL"),
    )
    case(
        "zstd-damaged",
        "A compressed chunk that is none, under a right checksum.",
        ([header(("t", x), zstd=True), chunk(0, 0, b"not zstd at all"), summary()], OK),
        error=reason("INTERNAL"),
    )

    wrong = crc32c.crc32c(raw) ^ 1
    case(
        "wrong-checksum",
        "A chunk whose checksum is wrong, in a stream that cannot go on; the tensor before it can be read.",
        ([header(("b", y), ("t", x)), *whole(0, y), chunk(1, 0, raw, wrong), summary(2)], OK),
        tensors=[("b", y)],
        error=reason("INTERNAL"),
    )
    case(
        "no-checksum",
        "An absent checksum is 0, and wrong.",
        ([header(("t", x)), chunk(0, 0, raw, 0), summary()], OK),
        error=reason("INTERNAL"),
    )
    answer = header(), progress, token(0, 0, 7, "Hé"), token(0, 1, 9, "llo"), header(("t", x)), *whole(0, x), summary()
    whole_answer, said = sealed(*answer), [[0, 0, 7, "Hé"], [0, 1, 9, "llo"]]
    case(
        "sealed",
        "Each message that is no chunk ends with the checksum of all of them so far.",
        (whole_answer, OK),
        tensors=[("t", x)],
        tokens=said,
    )
    case(
        "sealed-token-changed",
        "A token that is another than was sent: it counts for nothing, and the stream is damaged.",
        ([*whole_answer[:3], token(0, 1, 11, "llo") + whole_answer[3][-5:], *whole_answer[4:]], OK),
        tokens=said[:1],
        error=reason("INTERNAL"),
    )
    case(
        "sealed-message-lost",
        "A token that never came shows at the next message.",
        ([*whole_answer[:2], *whole_answer[3:]], OK),
        error=reason("INTERNAL"),
    )
    case(
        "sealed-no-longer",
        "Once messages have had a checksum, one without is damaged.",
        ([*whole_answer[:-1], answer[-1]], OK),
        tensors=[("t", x)],
        tokens=said,
        error=reason("INTERNAL"),
    )
    case(
        "out-of-order",
        "A chunk that leaves a gap.",
        ([header(("t", x)), chunk(0, 48, raw[48:]), chunk(0, 0, raw[:48]), summary()], OK),
        error=reason("INTERNAL"),
    )
    case(
        "twice",
        "A chunk that comes twice.",
        ([header(("t", x)), chunk(0, 0, raw[:48]), chunk(0, 0, raw[:48]), chunk(0, 48, raw[48:]), summary()], OK),
        error=reason("INTERNAL"),
    )
    case(
        "unannounced",
        "A chunk of a tensor that no header has.",
        ([header(("t", x)), chunk(3, 0, raw), summary()], OK),
        error=reason("INTERNAL"),
    )
    case(
        "beyond-the-end",
        "A chunk that goes beyond the end of its tensor.",
        ([header(("t", x)), chunk(0, 0, raw + b"\0"), summary()], OK),
        error=reason("INTERNAL"),
    )
    for name, about, change, why in (
        ("wrong-size", "A header whose byte count is not that of shape and type.", {"byte_count": 95}, "INTERNAL"),
        ("unknown-dtype", "An element type of a later version.", {"dtype": 99}, "INVALID_INPUT"),
        ("no-dtype", "A header without an element type.", {"dtype": 0}, "INVALID_INPUT"),
    ):
        bad = Response.FromString(header(("t", x)))
        for key, value in change.items():
            setattr(bad.header.tensors[0], key, value)
        case(name, about, ([bad.SerializeToString(), *whole(0, x), summary()], OK), error=reason(why))
    case(
        "truncated",
        "A stream that ends well, but without its summary.",
        ([header(("t", x)), chunk(0, 0, raw[:50])], OK),
        error=reason("UNAVAILABLE"),
    )
    case(
        "summary-too-early",
        "A summary before a tensor is complete.",
        ([header(("b", y), ("t", x)), *whole(0, y), chunk(1, 0, raw[:50]), summary(2)], OK),
        tensors=[("b", y)],
        error=reason("UNAVAILABLE"),
    )
    case(
        "truncated-message",
        "A message that is no protobuf: cut in the middle of a field.",
        ([header(("t", x)), chunk(0, 0, raw)[:-5], summary()], OK),
        error=reason("INTERNAL"),
    )

    body = chunk(0, 0, raw)
    inner = body[2:]
    crc = inner[:5]
    assert body[:1] == b"\x7a"
    assert crc[:1] == b"\x1d"
    unknown = field(12, b"a later field") + varint(13 << 3) + varint(7)
    head = header(("t", x))
    later = head[2:]
    case(
        "unknown-fields",
        "Fields and events of a later version are passed over.",
        (
            [
                field(1, later + unknown) + unknown,
                unknown,
                field(15, crc + unknown + inner[5:]) + unknown,
                field(11, b"an event of a later version"),
                summary(),
            ],
            OK,
        ),
        tensors=[("t", x)],
    )
    case(
        "unusual-order",
        "The fields of a chunk in another order than usual, and one that stands there twice: the last one counts.",
        ([head, field(15, inner[5:] + varint(2 << 3) + b"\x05" + varint(2 << 3) + b"\0" + crc), summary()], OK),
        tensors=[("t", x)],
    )
    case(
        "split-submessage",
        "A chunk in two parts of one message, which protobuf puts together.",
        ([head, field(15, crc) + field(15, inner[5:]), summary()], OK),
        tensors=[("t", x)],
    )
    case(
        "long-varints",
        "Numbers in more bytes than they need.",
        ([head, field(15, b"\x08\x80\x80\x00" + b"\x10\x80\x00" + inner), summary()], OK),
        tensors=[("t", x)],
    )
    case(
        "last-event-counts",
        "Two events in one message: the last one counts.",
        ([head, token(0, 0, 3, "not me") + chunk(0, 0, raw), summary()], OK),
        tensors=[("t", x)],
    )

    held = header(("a", x), ("b", y), ("c", y), capture=CAPTURE)
    case(
        "resume",
        "The connection is lost inside a capture; the client asks for the rest, and the offsets go on.",
        ([held, *whole(0, x), chunk(1, 0, y.tobytes()[:33])], LOST),
        ([held, chunk(1, 33, y.tobytes()[33:]), *whole(2, y), summary(3)], OK),
        tensors=[("a", x), ("b", y), ("c", y)],
        resumes=[{"0": 96, "1": 33}],
    )
    case(
        "resume-without-status",
        "The same where the stream ends as if well, but without a summary.",
        ([held, *whole(0, x)], OK),
        ([held, *whole(1, y), *whole(2, y), summary(3)], OK),
        tensors=[("a", x), ("b", y), ("c", y)],
        resumes=[{"0": 96}],
    )
    case(
        "resume-after-damage",
        "A wrong checksum inside a capture: the client asks for the rest from before the damaged chunk.",
        ([held, chunk(0, 0, raw[:20]), chunk(0, 20, raw[20:], 1)], OK),
        ([held, chunk(0, 20, raw[20:]), *whole(1, y), *whole(2, y), summary(3)], OK),
        tensors=[("a", x), ("b", y), ("c", y)],
        resumes=[{"0": 20}],
    )
    kept = header(("a", x), ("b", y), capture=CAPTURE)
    changed = header(("a", x.view("<i4")), ("b", y), capture=CAPTURE)
    case(
        "sealed-header-changed",
        "A capture's header with another type of the same size is not taken; each call has a checksum of its own.",
        ([*sealed(header(capture=CAPTURE)), changed + sealed(header(capture=CAPTURE), kept)[1][-5:]], OK),
        (sealed(kept, *whole(0, x), *whole(1, y), summary(2)), OK),
        tensors=[("a", x), ("b", y)],
        resumes=[{}],
    )
    case(
        "resume-after-gap",
        "A gap inside a capture, and the new connection is lost too before it brought anything.",
        ([held, chunk(0, 8, raw[8:])], OK),
        ([], LOST),
        ([held, *whole(0, x), *whole(1, y), *whole(2, y), summary(3)], OK),
        tensors=[("a", x), ("b", y), ("c", y)],
        resumes=[{}, {}],
    )
    case(
        "resume-tokens",
        "After a cut the server sends all tokens again; each counts once.",
        ([header(capture=CAPTURE), token(0, 0, 5, "a"), token(0, 1, 6, "b")], LOST),
        (
            [
                header(capture=CAPTURE),
                token(0, 0, 5, "a"),
                token(0, 1, 6, "b"),
                token(0, 2, 7, "c"),
                header(("a", x), capture=CAPTURE),
                *whole(0, x),
                summary(),
            ],
            OK,
        ),
        tensors=[("a", x)],
        tokens=[[0, 0, 5, "a"], [0, 1, 6, "b"], [0, 2, 7, "c"]],
        resumes=[{}],
    )
    gone = refusal("NOT_FOUND", "the server holds no capture of that name.", "CAPTURE_NOT_FOUND")
    case(
        "resume-refused",
        "The server no longer holds the capture: no more attempts; what is complete can be read.",
        ([held, *whole(0, x)], LOST),
        ([], gone),
        tensors=[("a", x)],
        error=reason("CAPTURE_NOT_FOUND", message="the server holds no capture of that name."),
        resumes=[{"0": 96}],
    )

    hook = "no such hook; nearest: 'lm.blocks.0.hook_resid_post'."
    case(
        "refused",
        "A refusal with its reason, the field it is about, and the server's name for the request.",
        (
            [],
            refusal("INVALID_ARGUMENT", hook, "UNKNOWN_HOOK", field="hooks", metadata={"request_id": "r7"}),
        ),
        error=reason("UNKNOWN_HOOK", message=hook, field="hooks", request_id="r7"),
    )
    case(
        "busy",
        "A refusal that says when to try again.",
        ([], refusal("RESOURCE_EXHAUSTED", "the queue is full.", "QUEUE_FULL", retry_after=1.5)),
        error=reason("QUEUE_FULL", message="the queue is full.", retry_after=1.5),
    )
    case(
        "image-not-found",
        "The server lacks the bytes of images; their hashes stand in the metadata.",
        (
            [],
            refusal(
                "FAILED_PRECONDITION", "send them.", "IMAGE_NOT_FOUND", metadata={"sha256": f"{'0' * 64},{'1' * 64}"}
            ),
        ),
        error=reason("IMAGE_NOT_FOUND", message="send them.", metadata={"sha256": f"{'0' * 64},{'1' * 64}"}),
    )
    case(
        "reason-of-a-later-version",
        "A reason this version does not know: the status code decides on the kind of error.",
        ([], refusal("INVALID_ARGUMENT", "the phase of the moon is wrong.", "MOON")),
        error=reason("INVALID_INPUT", message="the phase of the moon is wrong."),
    )
    case(
        "refused-in-mid-stream",
        "The server itself ends a capture: the client does not ask for the rest.",
        (
            [held, *whole(0, x)],
            refusal("RESOURCE_EXHAUSTED", "out of memory.", "OUT_OF_DEVICE_MEMORY"),
        ),
        tensors=[("a", x)],
        error=reason("OUT_OF_DEVICE_MEMORY", message="out of memory."),
    )
    for code, why in (("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"), ("UNIMPLEMENTED", "NOT_SUPPORTED")):
        case(
            f"bare-{code.lower().replace('_', '-')}",
            "A status without details, from a proxy or from gRPC itself.",
            ([], {"code": code, "message": "bare"}),
            error=reason(why),
        )


# ---- single messages


def messages() -> list[dict[str, Any]]:
    """Encoded messages and their meaning in protobuf's own JSON; null for what must be refused."""
    found: list[dict[str, Any]] = []

    def add(name: str, about: str, data: bytes, readable: bool = True) -> None:
        meaning = MessageToDict(Response.FromString(data)) if readable else None
        found.append({"name": name, "about": about, "hex": data.hex(), "json": meaning})

    for offset in (0, 127, 128, 2**31, 3 << 30, 2**32, 2**53 + 1, 2**64 - 1):
        part = tensor_pb2.TensorChunk(index=1, offset=offset, crc32c=0xFFFFFFFF, data=b"\1\2\3")
        about = f"A chunk at byte {offset}; no client needs the memory to read this."
        add(f"offset-{offset}", about, Response(chunk=part).SerializeToString())
    big = tensor_pb2.TensorHeader(
        index=2**32 - 1,
        name="big",
        dtype="DTYPE_FLOAT32",
        shape=[3, 1 << 28],
        byte_count=3 << 30,
        shared=tensor_pb2.SharedPlace(segment=1, offset=5 << 30),
    )
    about = "A tensor of 3 GB, announced at a place beyond 4 GB of shared memory."
    add("header-3-gb", about, Response(header=stream_pb2.Header(tensors=[big])).SerializeToString())
    # An index of 0, and shape [2, 3] not packed.
    loose = field(2, b"t") + b"\x18\x09" + b"\x20\x02" + b"\x20\x03" + b"\x28\x18"
    add("shape-not-packed", "Extents one by one, not packed.", field(1, field(5, loose)))
    later = b"\x18" + varint(99) + b"\x30" + varint(7)
    add("enums-of-a-later-version", "Numbers no name is known for stay numbers.", field(1, field(5, later)))
    add(
        "ready",
        "A tensor is complete in shared memory.",
        Response(ready=tensor_pb2.TensorReady(index=3)).SerializeToString(),
    )
    add("ready-0", "The same of tensor 0: an event without content is an event.", b"\x2a\x00")
    add("empty", "No event at all.", b"")
    add("unknown-event", "An event of a later version.", field(11, b"later"))
    add("token", "Text beyond ASCII.", token(2, 300, 151_643, "日本 \U0001f600"))
    add("truncated-length", "Cut inside of a length.", b"\x7a\x80", False)
    add("truncated-field", "Shorter than it says.", b"\x7a\x05\x08\x01", False)
    add("truncated-fixed32", "A checksum of three bytes.", field(15, b"\x1d\1\2\3"), False)
    add("varint-of-eleven-bytes", "A number that does not end.", field(15, b"\x10" + b"\x80" * 10 + b"\1"), False)
    add("field-0", "Field numbers begin at 1.", b"\x02\x00", False)
    return found


def make(folder: Path) -> None:
    """Write the corpus into a folder."""
    CASES.clear()
    streams()
    (folder / "streams").mkdir(parents=True, exist_ok=True)
    for entry, files in CASES:
        for call, data in zip(entry["calls"], files, strict=True):
            (folder / call["file"]).write_bytes(data)
    for name, content in (("streams.json", [entry for entry, _ in CASES]), ("messages.json", messages())):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
