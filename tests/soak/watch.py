"""What processes hold: memory, threads, files, shared memory, files in their temporary folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """What one process holds.

    Attributes:
        memory: Bytes of its own, not shared.
        shared: Bytes that are mapped and shared.
        threads: Threads.
        files: Open file descriptors.
        segments: Captures among them.
    """

    memory: int
    shared: int
    threads: int
    files: int
    segments: int

    @classmethod
    def by(cls, pid: int) -> Held:
        """What a process holds now."""
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        size = {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")}
        files, segments = 0, 0
        for link in (Path("/proc") / str(pid) / "fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue  # closed since
            files += 1
            segments += "vlm-spectra-capture" in target
        return cls(size["RssAnon"], size["RssShmem"], int(fields["Threads"]), files, segments)


def children(pid: int) -> dict[str, list[int]]:
    """A process's children: those that run, and those that have ended and were not waited for."""
    found: dict[str, list[int]] = {"running": [], "ended": []}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid:
            found["ended" if state == "Z" else "running"].append(int(path.parent.name))
    return {kind: sorted(pids) for kind, pids in found.items()}


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty once it has ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().split("\0")
    except OSError:
        return []
