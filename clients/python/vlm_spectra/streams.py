"""Reading a streaming response: chunks go straight into their arrays while the caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import grpc

from . import arrays, dtypes
from .arrays import Array
from .errors import InternalError, SpectraError, UnavailableError
from .progress import Bar
from .results import Token
from .status import from_rpc_error
from .v1 import stream_pb2, tensor_pb2


@dataclass
class _Incoming:
    """A tensor on its way."""

    array: Array
    view: memoryview
    got: int = 0

    @property
    def complete(self) -> bool:
        return self.got == len(self.view)


class TensorStream:
    """A streaming response, read by a thread of its own. `ActivationCache` takes one as its source.

    Args:
        call: The gRPC call.
        address: The server's, for messages.
        kind: "torch" or "numpy".
        on_token: Called with each token, on the reading thread.
        title: What a progress bar is called; it appears after a second.
    """

    def __init__(
        self,
        call: Any,
        address: str,
        kind: str,
        on_token: Callable[[Token], None] = lambda token: None,
        title: str = "",
    ) -> None:
        self._call, self._address, self._kind = call, address, kind
        self._on_token, self._title = on_token, title
        self._changed = threading.Condition()
        self._by_index: dict[int, _Incoming] = {}
        self._by_name: dict[str, _Incoming] = {}
        self._error: SpectraError | None = None
        self._finished = False
        self._announced = False
        self.header = stream_pb2.Header()
        self.summary = stream_pb2.Summary()
        self._thread = threading.Thread(target=self._read, name="vlm-spectra-stream", daemon=True)
        self._thread.start()

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
                    raise KeyError(name)
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

    def cancel(self) -> None:
        """Give up what has not come yet; the server ends the run."""
        self._call.cancel()

    def _read(self) -> None:
        error: SpectraError | None = None
        bar = Bar(self._title)
        try:
            ended = False
            for message in self._call:
                ended = self._take(message, bar) or ended
            if not ended:
                error = UnavailableError(f"the server at {self._address} ended the stream before its end.")
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error, self._address)
        except SpectraError as own:
            error = own
            self._call.cancel()
        except Exception as other:
            error = InternalError(f"reading the stream failed: {type(other).__name__}: {other}")
            self._call.cancel()
        finally:
            bar.close()
            with self._changed:
                missing = [name for name, tensor in self._by_name.items() if not tensor.complete]
                if error is None and missing:
                    error = UnavailableError(f"the stream ended before {missing[0]} was complete.")
                self._error, self._finished = error, True
                self._changed.notify_all()

    def _take(self, message: Any, bar: Bar) -> bool:
        """One message; whether it was the last."""
        kind = message.WhichOneof("event")
        if kind == "chunk":
            self._put(message.chunk)
        elif kind == "header":
            self._announce(message.header)
        elif kind == "token":
            token = message.token
            self._on_token(Token(token.row, token.index, token.id, token.text, token.logprob))
        elif kind == "progress":
            bar.show(message.progress.done, message.progress.total)
        elif kind == "summary":
            self.summary = message.summary
            return True
        return False

    def _announce(self, header: stream_pb2.Header) -> None:
        with self._changed:
            if not self.header.request_id:
                self.header.CopyFrom(header)
            for tensor in header.tensors:
                array, view = arrays.empty(tuple(tensor.shape), dtypes.from_wire(tensor.dtype), self._kind)
                if len(view) != tensor.byte_count:
                    raise InternalError(
                        f"the server announced {tensor.name} with {tensor.byte_count} bytes, not {len(view)}."
                    )
                self._by_index[tensor.index] = self._by_name[tensor.name] = _Incoming(array, view)
            self._announced = self._announced or bool(header.tensors)
            self._changed.notify_all()

    def _put(self, chunk: tensor_pb2.TensorChunk) -> None:
        tensor, data = self._by_index.get(chunk.index), chunk.data
        if tensor is None or chunk.offset != tensor.got or tensor.got + len(data) > len(tensor.view):
            raise InternalError(
                f"a chunk of tensor {chunk.index} at {chunk.offset} does not go on where the last ended."
            )
        if google_crc32c.value(data) != chunk.crc32c:
            raise InternalError(f"a chunk of tensor {chunk.index} at {chunk.offset} was damaged on its way.")
        tensor.view[tensor.got : tensor.got + len(data)] = data
        with self._changed:
            tensor.got += len(data)
            if tensor.complete:
                self._changed.notify_all()


class StreamedTensors(Mapping[str, Array]):
    """Some of a stream's tensors as a mapping; reading one waits for it.

    Args:
        stream: The stream.
        wanted: Which names belong to it.
    """

    def __init__(self, stream: TensorStream, wanted: Callable[[str], bool]) -> None:
        self._stream, self._wanted = stream, wanted

    def __getitem__(self, name: str) -> Array:
        if not self._wanted(name):
            raise KeyError(name)
        return self._stream.get(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stream.names if self._wanted(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class CapturedTensors:
    """The captures of a stream, as the source of a cache: its outputs are left out.

    Args:
        stream: The stream.
        hooks: The captured hooks, in execution order.
    """

    def __init__(self, stream: TensorStream, hooks: list[str]) -> None:
        self._stream, self.names = stream, hooks

    def arrived(self, name: str) -> bool:
        """Whether a tensor is complete."""
        return self._stream.arrived(name)

    def get(self, name: str) -> Array:
        """A tensor, as soon as it is complete."""
        return self._stream.get(name)

    def wait(self) -> None:
        """Wait for all of them."""
        self._stream.wait()

    def cancel(self) -> None:
        """Give up what has not come yet."""
        self._stream.cancel()
