"""Structured logging: one line an event, as ``key=value`` text or JSON.

Libraries log with ``logging.getLogger(__name__).info("bundle.activated", extra={...})``:
the message is the event's name, ``extra`` holds its fields. Only commands call :func:`configure`.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from typing import Any, Literal

PACKAGES = ("edge_ll", "edge_ll_device", "edge_ll_export")
LEVELS = ("debug", "info", "warning", "error")
_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """One record as one line; ``style`` is ``"text"`` or ``"json"``."""

    def __init__(self, style: Literal["text", "json"]) -> None:
        super().__init__()
        self._line_style = style

    def format(self, record: logging.LogRecord) -> str:
        """The record's time (UTC), level, logger, event and fields."""
        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        fields: dict[str, Any] = {
            "at": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        fields |= {key: value for key, value in vars(record).items() if key not in _RESERVED}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        if self._line_style == "json":
            return json.dumps(fields, default=str)
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not any(c in text for c in ' "=')
    return text if text and plain else json.dumps(text)


def configure(*, level: str = "info", style: Literal["text", "json"] = "text") -> None:
    """Send records to standard error, one line each.

    Our own from ``level`` on; of other packages, warnings and errors only.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(style))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level.upper())
