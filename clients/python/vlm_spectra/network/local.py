"""The client's side of shared memory with a server on the same host.

Captures are then neither copied nor sent: their arrays are views of the very memory that the model wrote to, private to
this process (a change stays here). Whether the server is on this host is found out by trying: its socket has a random
name that only this host knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import weakref

from ..errors import UnavailableError

_SECONDS = 5.0
"""How long the server may take to answer."""


class LocalMemory:
    """A server's socket. Each question has a connection of its own: an interrupt, a fork or another thread never leaves
    one's answer for the next.

    Args:
        name: The socket's abstract name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @classmethod
    def at(cls, name: str) -> LocalMemory | None:
        """The socket, or None where the server is elsewhere, does not offer it, or does not want this user."""
        if not name or not hasattr(socket, "AF_UNIX"):
            return None
        memory = cls(name)
        return memory if memory.answers() else None

    def _ask(self, capture_id: str, segment: int) -> int | None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
            asked.settimeout(_SECONDS)
            asked.connect(f"\0{self._name}")
            asked.sendall(f"{capture_id} {segment}\n".encode())
            answer, fds, _, _ = socket.recv_fds(asked, 1, 1)
        if not answer:
            raise OSError("the server closed its socket")
        return fds[0] if fds else None

    def answers(self) -> bool:
        """Whether the server is still there; one that was started anew has another socket."""
        with contextlib.suppress(OSError):
            self._ask("0", 0)  # refused by its sense, but answered
            return True
        return False

    def segment(self, capture_id: str, number: int) -> memoryview:
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
            return _mapped(fd)
        except OSError as error:
            raise UnavailableError(f"the capture's shared memory cannot be mapped: {error}.") from error
        finally:
            os.close(fd)


def _mapped(fd: int) -> memoryview:
    """A file as memory of this process's own, until nothing looks at it any more.

    Without `mmap.mmap`, which keeps a copy of the file descriptor: whoever keeps an array of each of a thousand
    captures would have no files left.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = os.fstat(fd).st_size
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, libc.munmap, address, size).atexit = False  # arrays may be looked at until the very end
    return memoryview(memory).cast("B")
