"""`vlm-spectra top`: a server's metrics in a terminal, read again every second or so."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from vlm_spectra.errors import UnavailableError

Samples = dict[tuple[str, ...], float]
"""Values by the metric's name and its labels' values, in the order of the labels' names."""


def read(url: str) -> Samples:
    """A server's metrics.

    Raises:
        UnavailableError: Nobody answers there.
    """
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
    except (OSError, ValueError) as error:
        raise UnavailableError(f"no metrics at {url}: {error}; was the server started with --metrics-port?") from None
    return {
        (sample.name.removeprefix("vlm_spectra_"), *(sample.labels[n] for n in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def view(now: Samples, before: Samples, seconds: float) -> str:
    """The metrics as a page of text.

    Args:
        now: The values.
        before: Those of a while ago; empty at first.
        seconds: How long ago.
    """

    def labels(name: str, at: int = 1) -> list[str]:
        return sorted({key[at] for key in now if key[0] == name})

    def rate(*key: str) -> float:
        return (now.get(key, 0.0) - before.get(key, 0.0)) / seconds if before and seconds else 0.0

    lines = [
        f"captures {now.get(('capture_bytes',), 0) / 1e9:.2f} of {now.get(('capture_bytes_bound',), 0) / 1e9:.1f} GB, "
        f"device peak {now.get(('device_peak_bytes',), 0) / 1e9:.2f} GB, {rate('tokens_total'):.1f} tokens/s",
        "",
    ]
    models = [
        (
            name,
            "ready" if now["model_ready", name] else "not ready",
            f"{now.get(('queue', name), 0):.0f}",
            f"{now.get(('worker_deaths_total', name), 0):.0f}",
        )
        for name in labels("model_ready")
    ]
    lines += _columns([("model", "state", "waiting", "deaths"), *models])
    calls = []
    for method in labels("calls_at_work"):
        keys = [key for key in now if key[0] == "requests_total" and key[2] == method]
        codes = {key[1]: now[key] for key in keys}
        count, spent = now.get(("seconds_count", method, "all"), 0.0), now.get(("seconds_sum", method, "all"), 0.0)
        calls.append(
            (
                method,
                f"{now['calls_at_work', method]:.0f}",
                f"{sum(rate(*key) for key in keys):.1f}",
                f"{sum(codes.values()):.0f}",
                f"{sum(codes.values()) - codes.get('OK', 0):.0f}",
                f"{spent / count:.3f} s" if count else "-",
            )
        )
    lines += ["", *_columns([("call", "at work", "per s", "ended", "not OK", "mean"), *calls])]
    return "\n".join(lines)


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def command(options: Any) -> int:
    """Show it until interrupted, or once; the exit status."""
    url = options.url if "://" in options.url else f"http://{options.url}/metrics"
    before: Samples = {}
    then = time.monotonic()
    try:
        while True:
            now = read(url)
            text = view(now, before, time.monotonic() - then)
            if options.once:
                print(text)
                return 0
            sys.stdout.write(f"\x1b[H\x1b[2J{text}\n")
            sys.stdout.flush()
            before, then = now, time.monotonic()
            time.sleep(options.every)
    except KeyboardInterrupt:
        return 0
