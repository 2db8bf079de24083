"""The sockets that processes listen on, as the kernel says."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

_LISTENING, _UNCONNECTED = "0A", "07"


def _table() -> Iterator[tuple[int, str, str, int]]:
    """Of every socket that takes what comes: inode, protocol, address, port."""
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        path = Path("/proc/net") / protocol
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == (_LISTENING if protocol.startswith("tcp") else _UNCONNECTED):
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                found = ipaddress.ip_address(b"".join(words))
                found = getattr(found, "ipv4_mapped", None) or found  # an IPv6 socket with an IPv4 address
                yield int(fields[9]), protocol.removesuffix("6"), str(found), int(port, 16)


def _inodes(pid: int) -> set[int]:
    found = set()
    for link in (Path("/proc") / str(pid) / "fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue  # closed since
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found


def descendants(pid: int) -> set[int]:
    """A process, its children and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended since
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """At the end of the block a process is dead, with all below it: also what stands still and would not hear of it."""
    try:
        yield
    finally:
        for pid in descendants(process.pid) - {process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def listened(pid: int) -> set[tuple[str, str, int]]:
    """What a process and all below it listen on: protocol, address, port."""
    mine = set().union(*(_inodes(each) for each in descendants(pid)))
    return {(protocol, address, port) for inode, protocol, address, port in _table() if inode in mine}


def owner(port: int) -> int:
    """The process that listens on a port of this machine."""
    inodes = {inode for inode, _, _, each in _table() if each == port}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if inodes & _inodes(int(path.name)):
                return int(path.name)
        except OSError:
            continue
    raise LookupError(port)
