"""The byte fixtures of PROTOCOL.md: messages in hexadecimal, and what a receiver makes of them."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "fixtures" / "protocol"
NAMES = ("frames", "requests", "replies", "telemetry")

Row = dict[str, Any]


def rows(name: str, outcome: str | None = None) -> list[Row]:
    """The fixtures of a file, all of them or those that are to be `accept`ed, `reject`ed or have an `error`."""
    found: list[Row] = json.loads((FOLDER / f"{name}.json").read_text())
    return [row for row in found if outcome is None or outcome in row]


def parts_of(row: Row) -> list[bytes]:
    return [bytes.fromhex(part) for part in row["parts"]]


def body_of(row: Row) -> bytes:
    return bytes.fromhex(row["body"])


def name_of(row: Row) -> str:
    return row["name"].replace(" ", "-")
