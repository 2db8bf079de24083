"""Reading a streaming response: chunks go straight into their arrays while the caller goes on.

A capture outlives its connection: where that is lost, the stream asks the server for the rest from the offsets it has,
by itself and without running the model again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import crc32c
import grpc

from .. import arrays, dtypes
from ..arrays import Array
from ..cost import Cost
from ..errors import InternalError, SpectraError, UnavailableError
from ..progress import Bar, Report
from ..results import Token
from ..v1 import spectra_service_pb2 as spb
from ..v1 import stream_pb2, tensor_pb2
from . import chunks, compression
from .checksum import Checksum, Damaged
from .local import LocalMemory
from .status import from_rpc_error, from_server

_PHASES = {
    stream_pb2.PHASE_QUEUED: "queued",
    stream_pb2.PHASE_PREPARING: "preparing",
    stream_pb2.PHASE_FORWARD: "forward",
    stream_pb2.PHASE_GENERATING: "generating",
    stream_pb2.PHASE_ANALYSING: "analysing",
}


def show(bar: Bar, progress: stream_pb2.Progress) -> None:
    """Draw and tell how far a call has come."""
    bar.show(_PHASES.get(progress.phase, ""), progress.done, progress.total)


ATTEMPTS = 8
"""How often in a row a stream asks for the rest without getting any, before it gives up."""


@dataclass
class _Incoming:
    """A tensor on its way."""

    array: Array
    view: memoryview
    item: int
    zstd: bool
    shared: bool
    got: int = 0

    @property
    def complete(self) -> bool:
        return self.got == len(self.view)


class _Absent(InternalError, KeyError):  # noqa: N818
    """No tensor of this name was announced: what may be absent is looked for, and what must be there was damaged."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the server's answer has no {name}: it was damaged on its way, or is another version's.")


class _Interrupted(Exception):  # noqa: N818
    """The caller's own function, which is told how far it is, has raised."""


@dataclass(frozen=True)
class Rest:
    """How a stream gets the rest of a capture.

    Attributes:
        resume: Opens a call from a capture's id and the bytes it has of each tensor, by index.
        release: Tells the server that no more is wanted of a capture.
        memory: Shared memory with the server, or None.
    """

    resume: Callable[[str, dict[int, int]], Any]
    release: Callable[[str], None]
    memory: LocalMemory | None = None


class TensorStream:
    """A streaming response, read by a thread of its own. `ActivationCache` takes one as its source.

    Args:
        call: The gRPC call, its responses still encoded.
        address: The server's, for messages.
        kind: "torch" or "numpy".
        on_token: Called with each token, on the reading thread.
        title: What a progress bar is called; it appears after a second.
        rest: For captures: how to go on after the connection was lost.
        report: Told how far the call is, on the reading thread; what it raises ends the call.

    Attributes:
        speed: Bytes a second that the connection carried; None where too few came to tell.
    """

    def __init__(
        self,
        call: Any,
        address: str,
        kind: str,
        on_token: Callable[[Token], None] = lambda token: None,
        title: str = "",
        rest: Rest | None = None,
        report: Report | None = None,
    ) -> None:
        self._call, self._address, self._kind = call, address, kind
        self._on_token, self._title, self._rest, self._report = on_token, title, rest, report
        self._changed = threading.Condition()
        self._by_index: dict[int, _Incoming] = {}
        self._by_name: dict[str, _Incoming] = {}
        self._segments: dict[int, memoryview] = {}
        self._tokens: set[tuple[int, int]] = set()
        self._error: BaseException | None = None
        self._finished = False
        self._announced = False
        self._cancelled = threading.Event()
        self._when_ended: Callable[[BaseException | None], None] = lambda error: None
        self._received = 0
        self._checksum = Checksum()
        self._clock: tuple[int, float] = (-1, 0.0)
        self._timed_bytes, self._timed_seconds = 0, 0.0
        self.header = stream_pb2.Header()
        self.summary = stream_pb2.Summary()
        self._thread = threading.Thread(target=self._read, name="vlm-spectra-stream", daemon=True)
        self._thread.start()

    @property
    def speed(self) -> float | None:
        """Bytes a second, from the times between chunks of one tensor."""
        return self._timed_bytes / self._timed_seconds if self._timed_bytes >= 4 << 20 else None

    @property
    def answering(self) -> bool:
        """Whether tokens have come."""
        return bool(self._tokens)

    @property
    def names(self) -> list[str]:
        """The tensors announced so far."""
        with self._changed:
            return list(self._by_name)

    def arrived(self, name: str) -> bool:
        """Whether a tensor is complete."""
        with self._changed:
            return name in self._by_name and self._by_name[name].complete

    def get(self, name: str) -> Array:
        """A tensor, as soon as it is complete.

        Raises:
            KeyError: The server sends none of that name.
            SpectraError: The stream broke before it was complete.
        """
        with self._changed:
            while True:
                if name in self._by_name and self._by_name[name].complete:
                    return self._by_name[name].array
                if self._error is not None:
                    raise self._error
                if self._finished or (self._announced and name not in self._by_name):
                    raise _Absent(name)
                self._changed.wait()

    def wait_until_announced(self) -> None:
        """Wait until the server has said what will come, or has refused.

        Raises:
            SpectraError: It has refused.
        """
        with self._changed:
            while not (self._announced or self._finished):
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            SpectraError: The stream broke.
        """
        with self._changed:
            while not self._finished:
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def when_ended(self, call: Callable[[BaseException | None], None]) -> None:
        """Have this called once the stream has ended, with what it failed with; at once where it has."""
        with self._changed:
            if not self._finished:
                self._when_ended = call
                return
        call(self._error)

    @property
    def cost(self) -> Cost:
        """What the call took; waits for its end.

        Raises:
            SpectraError: The stream broke.
        """
        self.wait()
        return Cost.of(self.header.request_id, self.summary)

    def cancel(self) -> None:
        """Give up what has not come yet; the server ends the run."""
        self._cancelled.set()
        self._call.cancel()
        if self._rest is not None and self.header.capture_id and not self._finished:
            self._rest.release(self.header.capture_id)

    def _read(self) -> None:
        error: BaseException | None = None
        bar = Bar(self._title, self._report)
        try:
            error = self._read_to_the_end(bar)
        except SpectraError as own:
            error = own
            self._call.cancel()
        except _Interrupted as interrupted:
            error = interrupted.args[0]
            self.cancel()
        except Exception as other:
            error = InternalError(f"reading the stream failed: {type(other).__name__}: {other}")
            self._call.cancel()
        finally:
            bar.close()
            with self._changed:
                missing = [name for name, tensor in self._by_name.items() if not tensor.complete]
                if error is None and missing:
                    error = UnavailableError(f"the stream ended before {missing[0]} was complete.")
                if isinstance(error, SpectraError) and not error.request_id:  # it failed here, or on the way
                    error.request_id = self.header.request_id
                self._error, self._finished = error, True
                self._changed.notify_all()
            self._when_ended(error)

    def _read_to_the_end(self, bar: Bar) -> SpectraError | None:
        """Read, and read on after a cut; the error that ends it, if one does."""
        failures = 0
        while True:
            before, self._checksum = self._received, Checksum()
            try:
                for message in self._call:
                    if self._take(message, bar):
                        return None
                error: SpectraError = UnavailableError(
                    f"the server at {self._address} ended the stream before its end."
                )
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, self._address)
                if not _lost(rpc_error):
                    return error
            except Damaged as damage:
                self._call.cancel()
                error = InternalError(str(damage))
            if self._rest is None or not self.header.capture_id or self._cancelled.is_set():
                return error
            failures = 1 if self._received > before else failures + 1
            if failures > ATTEMPTS:
                return error
            self._cancelled.wait(min(0.05 * 2**failures, 2.0) * random.uniform(0.5, 1.0))
            offsets = {index: tensor.got for index, tensor in self._by_index.items()}
            self._call = self._rest.resume(self.header.capture_id, offsets)

    def _take(self, message: bytes, bar: Bar) -> bool:
        """One message; whether it was the last."""
        chunk = chunks.parse(message)
        if chunk is not None:
            self._put(chunk)
            return False
        kind, event = self._checksum.event(spb.RunWithCacheResponse, message)
        if kind == "chunk":
            part = event.chunk
            self._put(chunks.Chunk(part.index, part.offset, part.crc32c, memoryview(part.data)))
        elif kind == "ready":
            self._complete(event.ready.index)
        elif kind == "header":
            self._announce(event.header)
        elif kind == "token":
            token = event.token
            if (token.row, token.index) not in self._tokens:
                self._tokens.add((token.row, token.index))
                self._on_token(Token(token.row, token.index, token.id, token.text, token.logprob))
        elif kind == "progress":
            try:
                show(bar, event.progress)
            except BaseException as raised:
                raise _Interrupted(raised) from raised
        elif kind == "summary":
            self.summary = event.summary
            return True
        return False

    def _announce(self, header: stream_pb2.Header) -> None:
        made = {}
        for tensor in header.tensors:
            if tensor.index not in self._by_index:
                made[tensor.index] = tensor.name, self._place(header.capture_id, tensor)
        with self._changed:
            if not self.header.request_id:
                self.header.CopyFrom(header)
            for index, (name, incoming) in made.items():
                self._by_index[index] = self._by_name[name] = incoming
            self._announced = self._announced or bool(header.tensors)
            self._changed.notify_all()

    def _place(self, capture_id: str, tensor: tensor_pb2.TensorHeader) -> _Incoming:
        """Where a tensor will be: new memory, or its place in the server's."""
        shape, dtype = tuple(tensor.shape), dtypes.from_wire(tensor.dtype)
        size = dtypes.size_of(shape, dtype)
        if size != tensor.byte_count:
            raise InternalError(f"the server announced {tensor.name} with {tensor.byte_count} bytes, not {size}.")
        view = memoryview(bytearray(0))
        shared = tensor.HasField("shared")
        if shared and size and self._rest is not None and self._rest.memory is not None:
            number, start = tensor.shared.segment, tensor.shared.offset
            if number not in self._segments:
                self._segments[number] = self._rest.memory.segment(capture_id, number)
            view = self._segments[number][start : start + size]
        if shared and len(view) != size:
            raise InternalError(f"the server announced {tensor.name} in shared memory, where it is not.")
        array, view = arrays.over(view if len(view) == size and size else None, shape, dtype, self._kind)
        item = dtypes.to_numpy(dtype).itemsize
        zstd = tensor.compression == tensor_pb2.COMPRESSION_ZSTD
        return _Incoming(array, view, item, zstd, shared)

    def _complete(self, index: int) -> None:
        tensor = self._by_index.get(index)
        if tensor is None:
            raise InternalError(f"the server says that tensor {index} is ready, but has not announced it.")
        if not tensor.shared and not tensor.complete:
            raise InternalError(f"the server says that tensor {index} is ready, but has not sent it.")
        with self._changed:
            tensor.got = len(tensor.view)
            self._received += 1
            self._changed.notify_all()

    def _put(self, chunk: chunks.Chunk) -> None:
        tensor = self._by_index.get(chunk.tensor)
        if tensor is None or chunk.offset != tensor.got:
            raise Damaged(f"a chunk of tensor {chunk.tensor} at {chunk.offset} does not go on where the last ended.")
        if crc32c.crc32c(chunk.data) != chunk.crc32c:
            raise Damaged(f"a chunk of tensor {chunk.tensor} at {chunk.offset} was damaged on its way.")
        data: bytes | memoryview = chunk.data
        if tensor.zstd:
            data = compression.decompress(data, tensor.item, len(tensor.view) - tensor.got)
        if tensor.got + len(data) > len(tensor.view):
            raise InternalError(f"a chunk of tensor {chunk.tensor} at {chunk.offset} goes beyond the tensor's end.")
        tensor.view[tensor.got : tensor.got + len(data)] = data
        self._time(chunk.tensor, len(chunk.data))
        with self._changed:
            tensor.got += len(data)
            self._received += len(data)
            if tensor.complete:
                self._changed.notify_all()

    def _time(self, index: int, size: int) -> None:
        """The link's speed shows between chunks of one tensor: those leave the server one after the other."""
        now = time.monotonic()
        last, then = self._clock
        if last == index:
            self._timed_bytes += size
            self._timed_seconds += now - then
        self._clock = index, now


def _lost(rpc_error: Any) -> bool:
    """Whether a call failed on its way, and not by the server's will or the caller's."""
    codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return hasattr(rpc_error, "code") and rpc_error.code() in codes and not from_server(rpc_error)


class StreamedTensors(Mapping[str, Array]):
    """Some of a stream's tensors as a mapping; reading one waits for it.

    Args:
        stream: The stream.
        wanted: Which names belong to it.
    """

    def __init__(self, stream: TensorStream, wanted: Callable[[str], bool]) -> None:
        self._stream, self._wanted = stream, wanted

    @property
    def cost(self) -> Cost:
        """What the call took; waits for its end."""
        return self._stream.cost

    def __getitem__(self, name: str) -> Array:
        if not self._wanted(name):
            raise KeyError(name)
        return self._stream.get(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stream.names if self._wanted(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class WholeTensors(dict[str, Array]):
    """All tensors of a call that has ended, and what it took."""

    cost: Cost | None = None

    def __missing__(self, name: str) -> Array:
        raise _Absent(name)


class CapturedTensors:
    """The captures of a stream, as the source of a cache: its outputs are left out.

    Args:
        stream: The stream.
        hooks: The captured hooks, in execution order.
        on_end: Called with the stream once it has ended well.
    """

    def __init__(
        self,
        stream: TensorStream,
        hooks: list[str],
        on_end: Callable[[TensorStream], None] = lambda stream: None,
    ) -> None:
        self._stream, self.names, self._on_end = stream, hooks, on_end

    def arrived(self, name: str) -> bool:
        """Whether a tensor is complete."""
        return self._stream.arrived(name)

    def get(self, name: str) -> Array:
        """A tensor, as soon as it is complete."""
        return self._stream.get(name)

    @property
    def cost(self) -> Cost:
        """What the call took; waits for its end."""
        return self._stream.cost

    def wait(self) -> None:
        """Wait for all of them."""
        self._stream.wait()
        self._on_end(self._stream)

    def cancel(self) -> None:
        """Give up what has not come yet."""
        self._stream.cancel()
