"""A job's feed as a stream of response messages, from any offsets, packed as its reader wants them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import crc32c
from vlm_spectra import dtypes
from vlm_spectra.network import chunks, compression
from vlm_spectra.network.checksum import Checksum
from vlm_spectra.v1 import spectra_service_pb2 as spb
from vlm_spectra.v1 import stream_pb2, tensor_pb2

from .turns import Job

CHUNK = 1 << 20
"""Bytes of a chunk: the fastest size for one stream of grpcio's."""

_TOKEN = bytes(((spb.RunWithCacheResponse.TOKEN_FIELD_NUMBER << 3) | 2,))
_CHUNK = bytes(((spb.RunWithCacheResponse.CHUNK_FIELD_NUMBER << 3) | 2,))


@dataclass(frozen=True)
class Packing:
    """How a reader wants its tensors.

    Attributes:
        zstd: Compressed.
        shared: Not at all, but told where they lie in shared memory.
    """

    zstd: bool = False
    shared: bool = False


@dataclass
class Sending:
    """One reader's stream of a job.

    Attributes:
        job: The job.
        base: Fields of every header: the request's id, the model, the capture's id.
        packing: How the reader wants the tensors.
        offsets: What it has of each tensor already, by index.
        arrived: When the reader's request came, by `time.perf_counter()`.
        sent: Bytes of each tensor that has been handed over, by name.
        tokens: How many have been sent.
        left: Bytes that have been announced and not been handed over yet; None before the announcement.
        begun: When the first message was handed to the connection, by `time.perf_counter()`; 0 before.
        ended: When the connection took the last one so far.
        wire: Seconds that handing messages over took: the connection takes the next when it has room for it.
    """

    job: Job
    base: Mapping[str, Any]
    packing: Packing = Packing()
    offsets: Mapping[int, int] = field(default_factory=dict)
    arrived: float = field(default_factory=time.perf_counter)
    sent: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    left: int | None = None
    begun: float = 0.0
    ended: float = 0.0
    wire: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether all that was announced has been handed over: a client need not read on."""
        return self.left == 0

    def messages(self, events: Iterable[tuple[str, Any]]) -> Iterator[bytes]:
        """The messages for a job's events, to its end."""
        checksum = Checksum()
        for message in self._messages(events):
            if message[:1] != _CHUNK:
                message = checksum.seal(message)
            handed = time.perf_counter()
            self.begun = self.begun or handed
            try:
                yield message
            finally:
                self.ended = time.perf_counter()
                self.wire += self.ended - handed

    def _messages(self, events: Iterable[tuple[str, Any]]) -> Iterator[bytes]:
        sent, first, headed = 0, 0.0, False
        for kind, content in events:
            if kind in ("queued", "started") and not headed:
                headed = True
                yield event(header=stream_pb2.Header(**self.base))
            if kind == "queued":
                place, waiting = content
                yield event(progress=stream_pb2.Progress(phase=stream_pb2.PHASE_QUEUED, done=place, total=waiting))
            elif kind == "event":
                self.tokens += content[:1] == _TOKEN
                yield content
            elif kind == "tensors":
                self.left = self.left or 0
                self.left += sum(header.byte_count - self.offsets.get(header.index, 0) for header in content)
                yield event(header=stream_pb2.Header(tensors=map(self._header, content), **self.base))
            elif kind == "tensor":
                for message in self._tensor(content):
                    first = first or time.perf_counter()
                    yield message
                sent += 1
            elif kind == "done":
                summary = stream_pb2.Summary.FromString(content)
                summary.tensor_count, summary.capture_id = sent, self.base.get("capture_id", "")
                summary.byte_count = sum(header.byte_count for header, _ in self.job.tensors.values())
                summary.timings.queue = self.job.started - self.job.submitted
                summary.timings.first_chunk = max(first - self.job.started, 0.0) if first else 0.0
                summary.timings.wire = self.wire
                summary.timings.total = time.perf_counter() - self.arrived
                self.left = 0
                yield event(summary=summary)

    def _header(self, header: tensor_pb2.TensorHeader) -> tensor_pb2.TensorHeader:
        mine = tensor_pb2.TensorHeader()
        mine.CopyFrom(header)
        if self.packing.zstd:
            mine.compression = tensor_pb2.COMPRESSION_ZSTD
        if not self.packing.shared:
            mine.ClearField("shared")
        return mine

    def _hand(self, name: str, size: int) -> None:
        """So many bytes of a tensor are handed over."""
        self.left = (self.left or 0) - size
        self.sent[name] = self.sent.get(name, 0) + size

    def _tensor(self, index: int) -> Iterator[bytes]:
        header, memory = self.job.tensors[index]
        if self.packing.shared:
            self._hand(header.name, header.byte_count - self.offsets.get(index, 0))
            yield event(ready=tensor_pb2.TensorReady(index=index))
            return
        item = dtypes.to_numpy(dtypes.from_wire(header.dtype)).itemsize
        for start in range(self.offsets.get(index, 0), len(memory), CHUNK):
            data: bytes | memoryview = memory[start : start + CHUNK]
            self._hand(header.name, len(data))
            if self.packing.zstd:
                data = compression.compress(data, item)
            yield chunks.pack(index, start, crc32c.crc32c(data), data)


def event(**content: Any) -> bytes:
    """A response message; its fields have the same numbers in every streaming response of the contract."""
    return spb.RunWithCacheResponse(**content).SerializeToString()
