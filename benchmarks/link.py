"""A slower network on loopback: a proxy with a rate and a delay, where the kernel's own shaping is not to be had."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

PIECE = 1 << 15
"""Bytes that are forwarded at once: 2.6 ms of 100 Mbit/s."""
BUFFER = 1 << 18
"""Bytes that the link's sender side holds beyond what is on its way, as a router does."""


class Link:
    """Forwards connections on loopback to an address, each direction at a rate and with a delay.

    Args:
        target: host:port of the server.
        rate: Bytes a second, in each direction, all connections together.
        delay: Seconds that a byte is under way, in each direction.

    Attributes:
        address: Where clients connect.
        carried: Bytes from the server so far.
    """

    def __init__(self, target: str, rate: float, delay: float = 0.0) -> None:
        host, port = target.rsplit(":", 1)
        self._target, self.rate, self.delay = (host, int(port)), rate, delay
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.carried = 0
        self._free = {False: 0.0, True: 0.0}
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._target)
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                for source, sink, down in ((near, far, False), (far, near, True)):
                    room = int((self.rate * self.delay + BUFFER) / PIECE) + 1
                    line: queue.Queue[tuple[float, bytes]] = queue.Queue(room)
                    threading.Thread(target=self._enter, args=(source, line, down), daemon=True).start()
                    threading.Thread(target=self._leave, args=(line, sink), daemon=True).start()

    def _enter(self, source: socket.socket, line: queue.Queue[tuple[float, bytes]], down: bool) -> None:
        """Bytes onto the link: each piece is through when the pieces before it are, and its own time has passed."""
        data = b"-"
        while data:
            try:
                data = source.recv(PIECE)
            except OSError:
                data = b""
            with self._lock:
                through = max(self._free[down], time.monotonic()) + len(data) / self.rate
                self._free[down] = through
                self.carried += len(data) if down else 0
            line.put((through + self.delay, data))

    def _leave(self, line: queue.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        data = b"-"
        while data:
            due, data = line.get()
            time.sleep(max(due - time.monotonic(), 0.0))
            with contextlib.suppress(OSError):
                if data:
                    sink.sendall(data)
                else:
                    sink.shutdown(socket.SHUT_WR)
