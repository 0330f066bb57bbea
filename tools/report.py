"""`onlooker report`: the JSON of a run as a page for people.

    onlooker qa --model builtin --json > qa.json
    onlooker report qa.json                                    qa.html, beside it
    onlooker verify --json | onlooker report - verify.html     without the JSON in between

It knows the reports of qa, capacity, bench and verify, also those that another machine has made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ..protocol.errors import OnlookerError
from .bench_page import BenchReport, bench_page
from .capacity_page import capacity_page
from .capacity_report import CapacityReport
from .exam import Report
from .exam_page import exam_page
from .plot import check_plot
from .report_page import Page
from .verify_page import VerifyReport, verify_page

STDIN = "-"


class ReportError(OnlookerError):
    """What was given is no report, or its page cannot be written."""


def report(
    source: Annotated[str, typer.Argument(metavar="JSON", help="A file, or - for standard input.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="HTML", help="Without it, beside the JSON, with .html at its end.")
    ] = None,
) -> None:
    """Make a page of the JSON of qa, capacity, bench or verify: one file, with its plots."""
    if target is None:
        if source == STDIN:
            raise typer.BadParameter("standard input has no name: say where the page goes", param_hint="HTML")
        target = Path(source).with_suffix(".html")
    check_plot(target)
    page = page_of(_read(source), "standard input" if source == STDIN else source)
    try:
        target.write_text(page.html(), "utf-8")
    except OSError as error:
        raise ReportError(f"{target}: {error.strerror}") from error
    typer.echo(f"{target}: {page.verdict.text}")


def page_of(document: Any, source: str) -> Page:
    """The page of a report, by what only a report of its kind has. Raises ReportError."""
    for name, make in _KINDS.items():
        if isinstance(document, dict) and name in document:
            try:
                return make(document)
            except msgspec.ValidationError as error:
                raise ReportError(f"{source}: it lacks something of a report: {error}") from error
    raise ReportError(f"{source}: no report of qa, capacity, bench or verify (made with --json)")


def _read(source: str) -> Any:
    try:
        content = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
        return msgspec.json.decode(content)
    except OSError as error:
        raise ReportError(f"{source}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{source}: no JSON: {error}") from error


def _exam(document: dict[str, Any]) -> Page:
    return exam_page(msgspec.convert(_with_unknown_times(document), Report), _machine(document))


def _with_unknown_times(document: dict[str, Any]) -> dict[str, Any]:
    """A time that a node did not tell is no number, for which JSON has null."""
    rows = document.get("comparison")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return document  # which is refused as no report
    known = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    return document | {"comparison": known}


def _capacity(document: dict[str, Any]) -> Page:
    return capacity_page(msgspec.convert(document, CapacityReport), _machine(document))


def _machine(document: dict[str, Any]) -> dict[str, str]:
    return msgspec.convert(document.get("machine", {}), dict[str, str])


_KINDS: dict[str, Callable[[dict[str, Any]], Page]] = {
    "showings": _exam,
    "footprint": _capacity,
    "ceilings": lambda document: bench_page(msgspec.convert(document, BenchReport)),
    "checks": lambda document: verify_page(msgspec.convert(document, VerifyReport)),
}
