"""The node's log: one line an entry on standard error, for people or for programs.

Facts that belong to an entry travel as `logger.info("…", extra={"facts": {…}})`.
"""

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO

PACKAGE = "onlooker"


def configure(
    level: str, line_format: Literal["text", "json"] = "text", stream: TextIO | None = None
) -> logging.Handler:
    """Send the log of this package, and warnings of all others, to `stream`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if line_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(level.upper())
    logging.captureWarnings(True)
    return handler


def take_over(*names: str) -> None:
    """Have libraries with handlers of their own write into this log, and nowhere else."""
    for name in names:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


class TextFormatter(logging.Formatter):
    """`2025-01-31T12:00:00 warning server: what happened key=value`."""

    def __init__(self) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        source = record.name.rpartition(".")[2] if record.name.startswith(PACKAGE) else record.name
        line = f"{self.formatTime(record, self.datefmt)} {record.levelname.lower()} {source}: {record.getMessage()}"
        line += "".join(f" {key}={_quoted(value)}" for key, value in _facts(record).items())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts: Mapping[str, Any] = getattr(record, "facts", {})
    return {key: value for key, value in facts.items() if value is not None}


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text
