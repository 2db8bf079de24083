"""The server's log: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from typing import IO, Any

FORMAT_VARIABLE = "VLM_SPECTRA_LOG_FORMAT"
"""The setting as workers get it."""

_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Against progress bars, here and in workers."""

_BARE = logging.getLogger("vlm_spectra.stderr")
"""Of lines that a worker's libraries have written themselves."""

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time, level, logger, message, and whatever it has besides (`request_id`, ...)."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def begin(kind: str, who: str = "") -> None:
    """Log to standard error, as `text` or as `json`, with whatever Python and the libraries have to say."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter(f"%(asctime)s %(levelname)s {who}%(message)s")
    handler.setFormatter(JsonFormatter() if kind == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    if kind == "json":
        sys.excepthook = _uncaught
        threading.excepthook = sys.unraisablehook = lambda failed: _uncaught(
            failed.exc_type, failed.exc_value, failed.exc_traceback
        )
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)


def structured() -> bool:
    """Whether this process logs JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def pass_on(lines: IO[bytes]) -> None:
    """Write a worker's lines to this process's log as they come; what is no JSON becomes a record of its own."""
    with lines:
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            try:
                whole = isinstance(json.loads(text), dict)
            except ValueError:
                whole = False
            if whole:
                with contextlib.suppress(OSError):
                    sys.stderr.write(f"{text}\n")
                    sys.stderr.flush()
            elif text:
                _BARE.warning("%s", text)


def _uncaught(kind: Any, error: Any, traceback: Any) -> None:
    """What nobody has caught, as a record like any other."""
    if kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit)):
        return
    logging.getLogger("vlm_spectra").critical("uncaught: %s", kind.__name__, exc_info=(kind, error, traceback))
