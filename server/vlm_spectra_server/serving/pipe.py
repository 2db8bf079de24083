"""The pipe between front and worker: short messages, and file descriptors of shared memory. Nothing is pickled.

A message is a JSON object and blobs of bytes. A message with `fd` is followed by one file descriptor.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import struct
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

_PREFIX = struct.Struct("<II")


class Pipe:
    """One end of the pipe. Sending is safe from several threads; one thread receives.

    Whoever must not wait until the other end reads posts a message, and a thread of its own delivers what is posted.

    Args:
        connection: A connected Unix stream socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._posted: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, message: dict[str, Any], *blobs: bytes, fd: int | None = None) -> None:
        """Send a message.

        Raises:
            OSError: The other end is gone.
        """
        data = _packed(message, blobs, fd is not None)
        with self._lock:
            self._socket.sendall(data)
            if fd is not None:
                socket.send_fds(self._socket, [b"F"], [fd])

    def post(self, message: dict[str, Any], *blobs: bytes) -> None:
        """Have a message sent by `deliver`; nothing is waited for, and nobody is told that the other end is gone."""
        self._posted.put(_packed(message, blobs, False))

    def deliver(self) -> None:
        """Send what is posted, in this order, until this end is closed.

        Raises:
            OSError: The other end is gone.
        """
        while self._deliver_next():
            pass

    def _deliver_next(self) -> bool:
        data = self._posted.get()  # gone with this frame: the next one may be long in coming
        if data is None:
            return False
        with self._lock:
            self._socket.sendall(data)
        return True

    def receive(self) -> tuple[dict[str, Any], list[bytes], int | None]:
        """The next message, its blobs and its file descriptor.

        Raises:
            EOFError: The other end is gone.
        """
        head_size, blob_size = _PREFIX.unpack(self._exactly(_PREFIX.size))
        message = json.loads(self._exactly(head_size))
        rest, blobs = memoryview(self._exactly(blob_size)), []
        for size in message.pop("blobs"):
            blobs.append(bytes(rest[:size]))
            rest = rest[size:]
        fd = None
        if message.pop("fd"):
            _, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
            if not fds:
                raise EOFError
            fd = fds[0]
        return message, blobs, fd

    def _exactly(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            try:
                part = self._socket.recv(min(missing, 1 << 20))
            except OSError as error:
                raise EOFError from error
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close this end; the other sees the end of the stream."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._posted.put(None)
        self._socket.close()


def _packed(message: dict[str, Any], blobs: Sequence[bytes], fd: bool) -> bytes:
    head = json.dumps({**message, "blobs": [len(blob) for blob in blobs], "fd": fd}).encode()
    return _PREFIX.pack(len(head), sum(map(len, blobs))) + head + b"".join(blobs)


def shared_memory(size: int) -> int:
    """A file descriptor of anonymous memory: it has no name, so nothing is left behind however a process ends."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("vlm-spectra-capture", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, max(size, 1))
    return fd


def read_only(fd: int) -> int:
    """A file descriptor of the same memory that can only be read; the given one is closed."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)
    finally:
        os.close(fd)
