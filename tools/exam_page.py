"""The page of `onlooker qa`: how many answers are right, what was held, and what was answered wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import rich.table
from rich.text import Text

from .exam import Report
from .exam_tables import (
    choice_tables,
    comparison_table,
    kinds_table,
    lengths_table,
    places_text,
    questions_table,
    recall_tables,
)
from .plot import kinds_panel, lengths_panel, recall_panels, settings_panels
from .quantity import bytes_text, ms_text, seconds_text
from .report_page import Cell, Column, Fact, Page, Plots, Sentences, Table, Tile, Tone, Verdict, machine_facts

MAX_ROUNDS_LISTED = 60
MAX_MISTAKES = 40
_TONES: dict[str, Tone] = {"green": "good", "bold red": "bad"}


def exam_page(report: Report, machine: Mapping[str, str]) -> Page:
    """Needs matplotlib."""
    return Page(
        title="qa",
        subject=f"{report.model} on {report.device}",
        verdict=_verdict(report),
        facts=[
            Fact("scenario", report.scenario),
            Fact("model", report.model),
            Fact("device", report.device),
            Fact("took", seconds_text(report.seconds)),
            *machine_facts({name: value for name, value in machine.items() if name != "device"}),
        ],
        tiles=_tiles(report),
        parts=list(_parts(report)),
    )


def _verdict(report: Report) -> Verdict:
    right = report.score.all
    text = f"{right.share:.1%} of the answers are right, {right.num} of {right.of}" if right.of else "Nothing was asked"
    failed = [check.promise for check in report.checks if not check.held]
    if failed:
        return Verdict(False, f"NOT held: {'; '.join(failed)}. {text}")
    return Verdict(True, f"All {len(report.checks)} checks held. {text}")


def _tiles(report: Report) -> list[Tile]:
    tiles = [
        Tile(f"right, {layout}", f"{count.share:.1%}", str(count).partition(" (")[0])
        for layout, count in report.score.by_layout.items()
        if count.of
    ]
    caches = [each.before for each in report.asked]
    if caches:
        largest = max(caches, key=lambda cache: cache.num_tokens)
        note = f"{largest.num_frames} frames, {largest.num_tokens} tokens"
        tiles.append(Tile("largest memory asked", bytes_text(largest.logical_bytes), note))
        times_ms = sorted(each.answer.timing.first_token_ms for each in report.asked)
        tiles.append(Tile("first token, median", ms_text(times_ms[len(times_ms) // 2]), "on the node"))
    return tiles


def _parts(report: Report) -> Iterator[Table | Plots | Sentences]:
    yield _checks_table(report)
    yield Sentences("Notice", [report.notice] if report.notice else [])
    if report.recall:
        yield Plots("What is still known, by how long ago it was seen", recall_panels(report.recall))
        yield from map(table_of, recall_tables(report.recall))
        return
    if report.comparison:
        yield Plots("Settings against each other", settings_panels(report.comparison))
        yield table_of(comparison_table(report.comparison))
    elif report.scenario != "rounds":  # else the rounds are as long as each other
        yield Plots("Accuracy", [lengths_panel(report.score), kinds_panel(report.score)])
    yield table_of(kinds_table(report.score, report.storm and report.storm.score), num_last=1)
    if not report.comparison:  # chunks of several sizes have no common length
        yield table_of(lengths_table(report.score))
    if report.choices:
        *others, places = choice_tables(report.choices)
        yield from map(table_of, others)
        yield table_of(places, note=places_text(report.choices))
    yield from _questions(report)


def _checks_table(report: Report) -> Table:
    rows = [
        [Cell("held", "good") if check.held else Cell("FAILED", "bad"), Cell(check.promise), Cell(check.figures)]
        for check in report.checks
    ]
    return Table("Checks", [Column(""), Column("promise"), Column("figures")], rows)


def _questions(report: Report) -> Iterator[Table]:
    """All questions where they are few, else some that were answered wrongly."""
    asked = report.asked
    if report.scenario == "rounds" and len(asked) <= MAX_ROUNDS_LISTED:
        yield table_of(questions_table("Questions and answers", asked))
    elif mistakes := [each for each in asked if not each.right]:
        title = f"Mistakes, the first {MAX_MISTAKES} of {len(mistakes)}"
        yield table_of(questions_table(title if len(mistakes) > MAX_MISTAKES else "Mistakes", mistakes[:MAX_MISTAKES]))


def table_of(table: rich.table.Table, *, note: str = "", num_last: int = 0) -> Table:
    """A terminal's table for a page. What stands two spaces behind a figure becomes its note."""
    texts = [[_cell(cell) for cell in column.cells] for column in table.columns]
    columns = [
        Column(str(column.header), column.justify == "right" or any(cell.note for cell in cells))
        for column, cells in zip(table.columns, texts, strict=True)
    ]
    return Table(str(table.title), columns, list(zip(*texts, strict=True)), note, num_last)


def _cell(cell: object) -> Cell:
    if isinstance(cell, Text):
        return Cell(cell.plain, _TONES.get(str(cell.style), ""))
    text, _, note = str(cell).strip().partition("  ")
    return Cell(text, "", note.strip())
