"""The client's side of shared memory with a server on the same host.

Captures are then neither copied nor sent: their arrays are views of the very memory that the model wrote to, private to
this process (a change stays here). Whether the server is on this host is found out by trying: its socket has a random
name that only this host knows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading

from ..errors import UnavailableError


class LocalMemory:
    """A connection to a server's socket.

    Args:
        name: The socket's abstract name.

    Raises:
        OSError: There is no such socket on this host, or the server does not want this user.
    """

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        try:
            self._socket.settimeout(5.0)
            self._socket.connect(f"\0{name}")
            self._ask("0", 0)  # refused by its sense, but answered
        except OSError:
            self._socket.close()
            raise

    @classmethod
    def at(cls, name: str) -> LocalMemory | None:
        """The connection, or None where the server is elsewhere or does not offer it."""
        if not name or not hasattr(socket, "AF_UNIX"):
            return None
        with contextlib.suppress(OSError):
            return cls(name)
        return None

    def _ask(self, capture_id: str, segment: int) -> int | None:
        with self._lock:
            self._socket.sendall(f"{capture_id} {segment}\n".encode())
            answer, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
        if not answer:
            raise OSError("the server closed its socket")
        return fds[0] if fds else None

    def answers(self) -> bool:
        """Whether the server is still there; one that was started anew has another socket."""
        with contextlib.suppress(OSError):
            self._ask("0", 0)
            return True
        return False

    def segment(self, capture_id: str, number: int) -> mmap.mmap:
        """A segment of a capture, mapped privately.

        Raises:
            UnavailableError: The server no longer has it.
        """
        try:
            fd = self._ask(capture_id, number)
        except OSError as error:
            raise UnavailableError(f"the server's shared memory cannot be reached: {error}.") from error
        if fd is None:
            raise UnavailableError(f"the server has no shared memory of the capture {capture_id!r} any more.")
        try:
            return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the connection; memory that is mapped stays."""
        self._socket.close()
