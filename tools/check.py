"""A promise that a command checked, and its line in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.table import Table
from rich.text import Text


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A promise, whether it held, and the figures that say so."""

    promise: str
    held: bool
    figures: str


def checks_table(checks: Sequence[Check]) -> Table:
    """One line for each."""
    table = Table.grid(padding=(0, 2))
    for check in checks:
        verdict = Text("held", style="green") if check.held else Text("FAILED", style="bold red")
        table.add_row(verdict, check.promise, Text(check.figures))
    return table
