"""The server's log: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

FORMAT_VARIABLE = "VLM_SPECTRA_LOG_FORMAT"
"""The setting as workers get it."""

_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Against progress bars, here and in workers."""

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
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
