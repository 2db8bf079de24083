"""Shared memory for clients on this host: a socket that hands out file descriptors.

The socket has an abstract name (unix(7)), random and told to clients by `GetModel`: there is no file to be left behind,
and a client that can connect to it is on this very host. Only processes of the same user get an answer. A client sends
`capture_id segment` and a newline, and gets one byte with the segment's file descriptor, open for reading alone; or a
byte without one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

log = logging.getLogger("vlm_spectra.server")

_LONGEST = 256
"""Bytes of a request."""
_AGAIN = 0.1
"""Seconds until the next try after a connection could not be taken: no file is left, most likely."""


class LocalDoor:
    """The socket. Where the system has no abstract sockets, or it is not allowed, `name` is empty.

    Args:
        segment: Gives a file descriptor of a capture's segment, closed once it has been sent; raises `KeyError` where
            there is none.
        allowed: Whether to open it at all.
    """

    def __init__(self, segment: Callable[[str, int], int], allowed: bool = True) -> None:
        self.name = ""
        self._segment = segment
        self._socket: socket.socket | None = None
        if allowed and hasattr(socket, "AF_UNIX") and hasattr(socket, "SO_PEERCRED"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.name = f"vlm-spectra-{secrets.token_hex(16)}"
            self._socket.bind(f"\0{self.name}")
            self._socket.listen(16)
            threading.Thread(target=self._accept, args=(self._socket,), name="local-door", daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                if listening.fileno() < 0:  # it is closed
                    return
                time.sleep(_AGAIN)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="local-client", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the client has gone, or no file is left
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():
                log.warning("a process of user %d was refused shared memory", user)
                return
            rest = b""
            while True:
                part = connection.recv(_LONGEST)
                rest += part
                if not part or (len(rest) > _LONGEST and b"\n" not in rest):
                    return
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    self._answer(connection, line)

    def _answer(self, connection: socket.socket, line: bytes) -> None:
        try:
            capture_id, number = line.decode("ascii").split(" ")
            fd = self._segment(capture_id, int(number))
        except (KeyError, ValueError):
            connection.sendall(b"0")
        else:
            try:
                socket.send_fds(connection, [b"1"], [fd])
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close it; who is connected is let go."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # who waits for a connection wakes up
            self._socket.close()
