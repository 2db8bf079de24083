"""What came of a run, as a page and as JSON; and the verdict."""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any

from .run import ONE_CAPTURE, Outcome, Plan

GROWTH = 0.05
"""How much more memory than after the warm-up either process may have in the end."""
MORE_FILES, MORE_THREADS = 4, 8
"""Files and threads that may come besides: connections that are just ending, threads of a pool that is bounded."""


def leaks(outcome: Outcome, growth: float = GROWTH) -> list[str]:
    """What is held in the end and was not before."""
    found = []
    for process, looks in outcome.held.items():
        if len(looks) != 2:
            found.append(f"the {process} was seen {len(looks)} times, not before and after")
            continue
        before, after = looks
        if after.memory > before.memory * (1 + growth):
            found.append(f"the {process}'s memory grew from {before.memory / 1e6:.1f} to {after.memory / 1e6:.1f} MB")
        if after.files > before.files + MORE_FILES:
            found.append(f"the {process}'s open files grew from {before.files} to {after.files}")
        if after.threads > before.threads + MORE_THREADS:
            found.append(f"the {process}'s threads grew from {before.threads} to {after.threads}")
        if after.segments > (ONE_CAPTURE if process == "front" else 0):
            found.append(f"the {process} holds captures by {after.segments} file descriptors")
    if any(outcome.folder):
        found.append(f"files in the server's temporary folder: {outcome.folder}")
    return found


def summary(plan: Plan, outcome: Outcome, growth: float = GROWTH) -> dict[str, Any]:
    """The run as JSON."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, list[float]] = defaultdict(list)
    refusals: Counter[str] = Counter()
    for what, result, detail, took in outcome.notes:
        kind = what.partition(":")[0]
        kinds[kind][result] += 1
        seconds[kind].append(took)
        if result == "refused":
            refusals[detail] += 1
    return {
        "date": date.today().isoformat(),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": version("torch"),
            "grpcio": version("grpcio"),
        },
        "plan": asdict(plan),
        "calls": len(outcome.notes),
        "kinds": {
            kind: {**counts, "median seconds": statistics.median(seconds[kind])}
            for kind, counts in sorted(kinds.items())
        },
        "refusals": dict(refusals.most_common()),
        "killed with their client": len(outcome.killed),
        "client kills": outcome.client_kills,
        "worker kills": outcome.worker_kills,
        "held": {process: [asdict(look) for look in looks] for process, looks in outcome.held.items()},
        "temporary files": outcome.folder,
        "memory": outcome.memory,
        "server calls": outcome.server_calls,
        "faults": [*outcome.faults, *leaks(outcome, growth)],
    }


def page(found: dict[str, Any]) -> str:
    """The run as Markdown."""
    plan, machine = found["plan"], found["machine"]
    verdict = "Nothing wrong, nothing lost, nothing left." if not found["faults"] else "**Faults were found.**"
    lines = [
        "# Fifty clients for ten minutes" if plan["clients"] == 50 and plan["seconds"] == 600 else "# A run",
        "",
        f"Written by `make soak` on {found['date']}: {plan['clients']} clients in {plan['processes']} processes for "
        f"{plan['seconds']:.0f} s after a warm-up of {plan['warm_up']:.0f} s and {plan['warm_calls']:,} calls, "
        f"spectra-tiny on {machine['cores']} CPU cores that the clients use too (Python {machine['python']}, "
        f"torch {machine['torch']}, grpcio {machine['grpcio']}). "
        "[tests/soak](../tests/soak) is the whole of it.",
        "",
        verdict,
        "",
        f"- {found['calls']:,} calls ended. Every answer was compared, to the last bit, with one computed in process "
        "beforehand: none was wrong. Every other call ended in an error with a reason, or its client left it.",
        f"- {found['client kills']} times a process of clients was killed (`kill -9`), and "
        f"{found['killed with their client']} calls with it; {found['worker kills']} times the model's worker was.",
        "- Connections were cut, truncated and stalled in mid-capture, streams and captures were left, deadlines were "
        "too short, a second model was loaded and unloaded all the while.",
        "",
        "| calls | right | left by the client | refused for now | wrong | median seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, counts in found["kinds"].items():
        wrong = counts.get("WRONG", 0) + counts.get("UNEXPECTED", 0)
        numbers = [counts.get("right", 0), counts.get("left", 0), counts.get("refused", 0), wrong]
        lines.append(f"| {kind} | {' | '.join(map(str, numbers))} | {counts['median seconds']:.2f} |")
    lines += ["", "`right` for bad input is the refusal it must get.", "", "| refused with | times |", "| --- | ---: |"]
    lines += [f"| `{reason}` | {times} |" for reason, times in found["refusals"].items()]
    lines += [
        "",
        "| held | front, after the warm-up | front, in the end | worker, after the warm-up | worker, in the end |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    looks = [*found["held"]["front"], *found["held"]["worker"]]
    for name in ("memory", "threads", "files", "segments"):
        values = [f"{look[name] / 1e6:.1f} MB" if name == "memory" else str(look[name]) for look in looks]
        lines.append(f"| {LABELS[name]} | {' | '.join(values)} |")
    growths = [
        f"{process} {looks[1]['memory'] / looks[0]['memory'] - 1:+.1%}"
        for process, looks in found["held"].items()
        if len(looks) == 2
    ]
    lines += [
        "",
        f"Growth of memory: {', '.join(growths)} (at most {GROWTH:+.0%} is allowed). Files in the server's temporary "
        f"folder after the warm-up, in the end, once it had stopped: {', '.join(map(str, found['temporary files']))}. "
        f"Up to {MORE_FILES} files and {MORE_THREADS} threads more are allowed: connections that are just ending, "
        "threads of pools that are bounded. "
        "The one capture that is held, by two files, is that of the call before the counting. After SIGTERM the server "
        "ended with 0, and no process was left.",
    ]
    if minutes := _by_minute(found["memory"]):
        lines += ["", f"The front's memory at each minute of the warm-up and of the run, MB: {minutes}."]
    if found["faults"]:
        lines += ["", "## Faults", "", *(f"- `{fault[:400]}`" for fault in found["faults"][:50])]
    return "\n".join(lines) + "\n"


LABELS = {
    "memory": "memory of its own",
    "threads": "threads",
    "files": "open files",
    "segments": "files of captures (shared memory)",
}


def _by_minute(memory: list[tuple[float, int, int]]) -> str:
    """The front's memory at each full minute; the time begins anew after the warm-up."""
    found, before = "", -1.0
    for seconds, front, _ in memory:
        if seconds < before:
            found, before = f"{found.rstrip()}; ", -1.0
        if int(seconds // 60) > int(before // 60) or before < 0:
            found += f"{front / 1e6:.0f} "
        before = seconds
    return found.rstrip()
