"""The conformance corpus (`protos/conformance`), read by the Python client: by hand and by the generated classes."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from vlm_spectra import dtypes, errors
from vlm_spectra.network import chunks, streams
from vlm_spectra.v1 import spectra_service_pb2 as spb

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "protos" / "conformance"
CASES = json.loads((CORPUS / "streams.json").read_text())
MESSAGES = json.loads((CORPUS / "messages.json").read_text())


class Ended(grpc.RpcError):
    """How a call ends that does not end well."""

    def __init__(self, ends):
        self._ends = ends

    def code(self):
        return grpc.StatusCode[self._ends["code"]]

    def details(self):
        return self._ends["message"]

    def trailing_metadata(self):
        details = bytes.fromhex(self._ends.get("details", ""))
        return (("grpc-status-details-bin", details),) if details else ()


class Played:
    """A call that plays a file of the corpus."""

    def __init__(self, call):
        self._call = call

    def __iter__(self):
        data, at = (CORPUS / self._call["file"]).read_bytes(), 0
        while at < len(data):
            _, size = struct.unpack_from(">BI", data, at)
            yield data[at + 5 : at + 5 + size]
            at += 5 + size
        if self._call["ends"]["code"] != "OK":
            raise Ended(self._call["ends"])

    def cancel(self):
        pass


def values(array):
    def number(value):
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return value if abs(value) < 1 << 53 else str(value)
        value = float(value)
        named = {float("inf"): "Infinity", float("-inf"): "-Infinity"}
        return "NaN" if value != value else named.get(value, value)

    return [number(value) for value in array.reshape(-1).tolist()]


@pytest.mark.parametrize("parser", ["by hand", "generated"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_streams(case, parser, monkeypatch):
    if parser == "generated":
        monkeypatch.setattr(chunks, "parse", lambda message: None)
    asked, tokens = [], []

    def resume(capture_id, offsets):
        asked.append((capture_id, {str(index): offset for index, offset in offsets.items() if offset}))
        return Played(case["calls"][len(asked)])

    rest = streams.Rest(resume, lambda capture_id: None)
    stream = streams.TensorStream(Played(case["calls"][0]), "server:1", "numpy", tokens.append, rest=rest)
    if case["error"] is None:
        stream.wait()
    else:
        with pytest.raises(errors.SpectraError) as caught:
            stream.wait()
        wanted = case["error"]
        assert {name: getattr(caught.value, name) for name in wanted} == wanted
    assert asked == [(call["resume"]["capture_id"], call["resume"]["offsets"]) for call in case["calls"][1:]]
    assert [[token.row, token.index, token.id, token.text] for token in tokens] == case["tokens"]
    complete = [name for name in stream.names if stream.arrived(name)]
    assert complete == [tensor["name"] for tensor in case["tensors"]]
    for tensor in case["tensors"]:
        array = stream.get(tensor["name"])
        assert dtypes.name_of(array.dtype) == tensor["dtype"]
        assert list(array.shape) == tensor["shape"]
        assert hashlib.sha256(array.tobytes()).hexdigest() == tensor["sha256"]
        if "values" in tensor:
            assert json.dumps(values(array)) == json.dumps(tensor["values"])  # as text, -0.0 is not 0.0


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["name"])
def test_messages(message):
    data = bytes.fromhex(message["hex"])
    by_hand = chunks.parse(data)
    if message["json"] is None:
        assert by_hand is None
        with pytest.raises(DecodeError):
            spb.RunWithCacheResponse.FromString(data)
        return
    event = spb.RunWithCacheResponse.FromString(data)
    assert MessageToDict(event) == message["json"]
    if by_hand is not None:
        chunk = event.chunk
        assert tuple(by_hand) == (chunk.index, chunk.offset, chunk.crc32c, chunk.data)


def test_the_corpus_is_what_its_script_makes(tmp_path):
    """But for compressed bytes, which another version of Zstandard may choose otherwise."""
    subprocess.run([sys.executable, CORPUS / "make.py", tmp_path], check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    kept = sorted(path.relative_to(CORPUS) for path in CORPUS.rglob("*") if path.suffix in (".bin", ".json"))
    assert made == kept
    for path in made:
        if not path.name.startswith("zstd-"):
            assert (tmp_path / path).read_bytes() == (CORPUS / path).read_bytes(), path


def test_every_element_type_has_a_case():
    named = {tensor["dtype"] for case in CASES for tensor in case["tensors"]}
    assert named == set(dtypes._NUMPY)
