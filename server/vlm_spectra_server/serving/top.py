"""`vlm-spectra top`: a server's metrics in a terminal, read again every second or so."""

from __future__ import annotations

import contextlib
import http.client
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
from vlm_spectra import scalars
from vlm_spectra.errors import InvalidInputError, UnauthenticatedError, UnavailableError
from vlm_spectra.network.secure import TOKEN_VARIABLE, bearer, is_loopback

from ..sentences import printable, reason
from .metrics import PHASES

_PREFIX = "vlm_spectra_"

Samples = dict[tuple[str, ...], float]
"""Values by the metric's name and its labels' values, in the order of the labels' names."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else, and so does a token."""

    def redirect_request(self, *asked: Any) -> None:
        """No request; the answer counts as an error."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


def read(url: str) -> Samples:
    """A server's metrics.

    Raises:
        UnavailableError: Nobody answers there, or not with a server's metrics.
        UnauthenticatedError: The server wants a token, that of `VLM_SPECTRA_TOKEN`.
        InvalidInputError: It is no URL of metrics, or the token would cross a network in plain text.
    """
    asked = _asked(url)
    try:
        with _OPENER.open(asked, timeout=5) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UnauthenticatedError(f"{url} wants a token of the server's: set {TOKEN_VARIABLE}.") from None
        if elsewhere := error.headers.get("Location"):
            raise UnavailableError(f"{url} sends on to {elsewhere}: give that, if it is the server's.") from None
        raise UnavailableError(f"no metrics at {url}: {error}.") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnavailableError(
            f"no metrics at {url}: {reason(error)}; was the server started with --metrics-port?"
        ) from None
    found = {
        (
            sample.name.removeprefix(_PREFIX),
            *(printable(sample.labels[name]) for name in sorted(sample.labels)),
        ): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith(_PREFIX)
    }
    if not found:
        raise UnavailableError(f"what answers at {url} is no server of VLM Spectra: it has none of its metrics.")
    return found


def _asked(url: str) -> urllib.request.Request:
    """The request, with the token where there is one."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    try:
        where = urlsplit(url)
    except ValueError as error:
        raise InvalidInputError(f"{url} is no URL: {error}.", field="url") from None
    if where.scheme not in ("http", "https"):
        raise InvalidInputError(f"metrics are read over http or https, not from {url}.", field="url")
    if token and where.scheme != "https" and not is_loopback(where.hostname or ""):
        raise InvalidInputError(
            f"the token of {TOKEN_VARIABLE} would go to {where.netloc} in plain text: give https://{where.netloc}"
            "/metrics, or unset it.",
            field="url",
        )
    return urllib.request.Request(url, headers=dict(bearer(token)))


def view(now: Samples, before: Samples, seconds: float) -> str:
    """The metrics as a page of text.

    Args:
        now: The values.
        before: Those of a while ago; empty at first.
        seconds: How long ago.
    """

    def labels(name: str) -> list[str]:
        return sorted({label for metric, *rest in now if metric == name for label in rest[:1]})

    def value(*key: str) -> float:
        return now.get(key, 0.0)

    def rate(*key: str) -> float:
        found, then = value(*key), before.get(key, 0.0)
        grown = found - then if found >= then else found  # a count that is less began anew, with its server
        return grown / seconds if before and seconds else 0.0

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
            f"{sum(now[key] for key in now if key[::2] == ('model_bytes', name)) / 1e9:.2f} GB",
            f"{value('queue', name):.0f}",
            f"{value('worker_deaths_total', name):.0f}",
        )
        for name in labels("model_ready")
    ]
    lines += ["", *_columns([("model", "state", "memory", "waiting", "deaths"), *models], texts=2)]
    calls = []
    for method in labels("calls_at_work"):
        keys = [key for key in now if key[::2] == ("requests_total", method)]
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
        """Draw a page, cut to the terminal's size; as in `less -S`, a line that goes on beyond it ends with a `>`."""
        size = shutil.get_terminal_size()
        lines = [line if len(line) <= size.columns else f"{line[: size.columns - 1]}>" for line in text.splitlines()]
        if len(lines) > size.lines:
            lines = [*lines[: size.lines - 1], f"... and {len(lines) - size.lines + 1} lines more"]
        self._write("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def command(options: Any) -> int:
    """Show it until interrupted, or once where it was asked for or nobody looks at a terminal; the exit status."""
    if not 0 < options.every <= scalars.DAY:
        raise InvalidInputError(
            f"--every is a number of seconds, more than 0 and a day at most, not {options.every:g}.", field="every"
        )
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
                text = f"{printable(str(error))}\n"
                continue
            text = view(found, now, time.monotonic() - then)
            now, then = found, time.monotonic()
    return 0
