"""A TCP proxy between a client and a server that makes trouble when told to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Forwards connections on loopback to an address.

    Args:
        target: host:port of the server.
        cuts: After so many bytes from the server to a client, counted over all connections, a connection is cut.
        damage: The byte of such numbers is changed on its way.
        rate: Bytes a second from the server to a client, if limited.
        truncations: Like cuts, but what comes before that byte is delivered, and the connection closed in good order.
        latency: Seconds that the first bytes of each connection take from the server.
        stalls: After so many bytes a connection stays open, and nothing of the server's comes through any more.

    Attributes:
        address: Where clients connect.
        carried: Bytes from the server so far.
    """

    def __init__(
        self,
        target: str,
        cuts: list[int] = (),
        damage: list[int] = (),
        rate: float = 0.0,
        truncations: list[int] = (),
        stalls: list[int] = (),
        latency: float = 0.0,
    ) -> None:
        self.target = target
        self.truncations, self.stalls = sorted(truncations), sorted(stalls)
        self.cuts, self.damage, self.rate, self.latency = sorted(cuts), sorted(damage), rate, latency
        self.carried = self.connections = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                host, port = self.target.split(":")
                far = socket.create_connection((host, int(port)))
                if self.rate:
                    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                self.connections += 1
                self._open += [near, far]
                threading.Thread(target=self._carry, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, watched: bool) -> None:
        late = self.latency if watched else 0.0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14 if self.rate else 1 << 16):
                whole = len(data)
                time.sleep(late)
                late = 0.0
                if watched:
                    data = self._trouble(data)
                sink.sendall(data)
                if len(data) < whole:
                    break
                if watched and self.rate:
                    time.sleep(len(data) / self.rate)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _trouble(self, data: bytes) -> bytes:
        start, self.carried = self.carried, self.carried + len(data)
        while self.damage and self.damage[0] < self.carried:
            at = max(self.damage.pop(0) - start, 0)
            data = data[:at] + bytes((data[at] ^ 0x55,)) + data[at + 1 :]
        if self.stalls and self.stalls[0] < self.carried:
            self.stalls.pop(0)
            while self._listening.fileno() >= 0:
                time.sleep(0.05)
        if self.truncations and self.truncations[0] < self.carried:
            return data[: max(self.truncations.pop(0) - start, 0)]
        if self.cuts and self.cuts[0] < self.carried:
            self.cuts.pop(0)
            raise ConnectionResetError
        return data

    def cut(self) -> None:
        """Cut the connections there are; new ones are taken."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open = []

    def close(self) -> None:
        """Cut everything and take no more."""
        self._listening.close()
        self.cut()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
