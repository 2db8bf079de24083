"""`vlm-spectra top`: a server's metrics in a terminal, read again every second or so."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from vlm_spectra.errors import InvalidInputError, UnauthenticatedError, UnavailableError
from vlm_spectra.network.secure import TOKEN_VARIABLE, is_loopback

from .metrics import PHASES

Samples = dict[tuple[str, ...], float]
"""Values by the metric's name and its labels' values, in the order of the labels' names."""


def read(url: str) -> Samples:
    """A server's metrics.

    Raises:
        UnavailableError: Nobody answers there.
        UnauthenticatedError: The server wants a token, that of `VLM_SPECTRA_TOKEN`.
        InvalidInputError: The token would cross a network in plain text.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    try:
        where = urlsplit(url)
        if token and where.scheme != "https" and not is_loopback(where.hostname or ""):
            raise InvalidInputError(
                f"the token of {TOKEN_VARIABLE} would go to {where.netloc} in plain text: give https://{where.netloc}"
                "/metrics, or unset it.",
                field="url",
            )
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        with urllib.request.urlopen(asked, timeout=5) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UnauthenticatedError(f"{url} wants a token of the server's: set {TOKEN_VARIABLE}.") from None
        raise UnavailableError(f"no metrics at {url}: {error}.") from None
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

    def value(*key: str) -> float:
        return now.get(key, 0.0)

    def rate(*key: str) -> float:
        return (value(*key) - before.get(key, 0.0)) / seconds if before and seconds else 0.0

    def mean(method: str, phase: str) -> str:
        count = value("seconds_count", method, phase)
        return f"{value('seconds_sum', method, phase) / count:.3f}" if count else "-"

    sent = [key for key in now if key[0] == "sent_bytes_total"]
    lines = [
        f"captures hold {value('capture_bytes') / 1e9:.2f} of {value('capture_bytes_bound') / 1e9:.1f} GB; "
        f"{rate('tokens_total'):.1f} tokens/s, {sum(rate(*key) for key in sent) / 1e6:.1f} MB/s of tensors"
    ]
    lines += [
        f"{device}: {value('device_free_bytes', device) / 1e9:.1f} of {value('device_bytes', device) / 1e9:.1f} GB free"
        for device in labels("device_bytes")
    ]
    models = [
        (
            name,
            "ready" if value("model_ready", name) else "not ready",
            f"{sum(now[key] for key in now if key[0] == 'model_bytes' and key[2] == name) / 1e9:.2f} GB",
            f"{value('queue', name):.0f}",
            f"{value('worker_deaths_total', name):.0f}",
        )
        for name in labels("model_ready")
    ]
    lines += ["", *_columns([("model", "state", "memory", "waiting", "deaths"), *models], texts=2)]
    calls = []
    for method in labels("calls_at_work"):
        keys = [key for key in now if key[0] == "requests_total" and key[2] == method]
        codes = {key[1]: now[key] for key in keys}
        ended = sum(codes.values())
        cancelled = codes.get("CANCELLED", 0)
        calls.append(
            (
                method,
                f"{value('calls_at_work', method):.0f}",
                f"{sum(rate(*key) for key in keys):.1f}",
                f"{ended:.0f}",
                f"{ended - codes.get('OK', 0) - cancelled:.0f}",
                f"{cancelled:.0f}",
                *(mean(method, phase) for phase in ("all", *PHASES)),
            )
        )
    heads = ("call", "at work", "per s", "ended", "failed", "cancelled", "mean s", *PHASES)
    lines += ["", *_columns([heads, *calls])]
    return "\n".join(lines)


def _columns(rows: Iterable[tuple[str, ...]], texts: int = 1) -> list[str]:
    """Rows in columns; the first ones are text, which begins at the left, the others numbers."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at < texts else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class _Screen:
    """A terminal's other screen, on which a page is drawn over the last one; what was on the first comes back."""

    def __enter__(self) -> _Screen:
        self._write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *error: object) -> None:
        self._write("\x1b[?25h\x1b[?1049l")

    def show(self, text: str) -> None:
        """Draw a page, cut to the terminal's size."""
        size = shutil.get_terminal_size()
        lines = text.splitlines()
        if len(lines) > size.lines:
            lines = [*lines[: size.lines - 1], f"... and {len(lines) - size.lines + 1} lines more"]
        self._write("\x1b[H" + "\n".join(f"{line[: size.columns]}\x1b[K" for line in lines) + "\x1b[J")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def command(options: Any) -> int:
    """Show it until interrupted, or once where it was asked for or nobody looks at a terminal; the exit status."""
    url = options.url if "://" in options.url else f"http://{options.url}/metrics"
    now, then = read(url), time.monotonic()
    text = view(now, {}, 0.0)
    if options.once or not sys.stdout.isatty():
        print(text)
        return 0
    with _Screen() as screen, contextlib.suppress(KeyboardInterrupt):
        while True:
            screen.show(f"{url}  {datetime.now():%H:%M:%S}  (Ctrl-C ends)\n{text}")
            time.sleep(options.every)
            try:
                found = read(url)
            except UnavailableError as error:  # it may come back
                text = f"{error}\n"
                continue
            text = view(found, now, time.monotonic() - then)
            now, then = found, time.monotonic()
    return 0
