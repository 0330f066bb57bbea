"""What an exam found out, as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .ask import visible
from .check import checks_table
from .exam import Report
from .quantity import bytes_text, ms_text, seconds_text
from .score import ChoiceScore, Count, RecallScore, Score, SettingScore
from .showing import Asked

MAX_LISTED = 60
MAX_MISTAKES = 10
MAX_ANSWER_CHARS = 120


def print_report(report: Report) -> None:
    """Print the questions one by one where they are few, else the scores and some of the mistakes."""
    console = Console()
    asked = report.asked
    if report.recall:
        for table in recall_tables(report.recall):
            console.print(table)
    elif len(asked) <= MAX_LISTED and report.scenario == "rounds":
        console.print(questions_table("Questions and answers", asked))
    elif mistakes := [each for each in asked if not each.right]:
        title = f"Mistakes, the first {MAX_MISTAKES} of {len(mistakes)}"
        console.print(questions_table(title if len(mistakes) > MAX_MISTAKES else "Mistakes", mistakes[:MAX_MISTAKES]))
    if report.comparison:
        console.print(comparison_table(report.comparison))
    if report.scenario != "rounds" and not report.recall:
        console.print(kinds_table(report.score, report.storm and report.storm.score))
        if not report.comparison:  # chunks of several sizes have no common length
            console.print(lengths_table(report.score))
    if report.choices:
        for table in choice_tables(report.choices):
            console.print(table)
        console.print(places_text(report.choices))
    console.print(f"{report.model} on {report.device}: {report.score.all} answers are right")
    console.print(checks_table(report.checks))
    if report.notice:
        console.print(Text(report.notice, style="yellow"))
    console.print(f"{'All of it held' if report.held else 'NOT all of it held'}, in {seconds_text(report.seconds)}.")


def questions_table(title: str, asked: Sequence[Asked]) -> Table:
    table = _table(title, "question", "wanted", "answer", "")
    table.show_edge = table.pad_edge = False  # 80 columns hold its words then
    for column in ("frames", "tokens", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    for each in asked:
        cache = each.before
        table.add_row(
            Text(each.question),
            Text(each.wanted),
            Text(_answer_text(each)),
            Text("right", style="green") if each.right else Text("WRONG", style="bold red"),
            str(cache.num_frames),
            str(cache.num_tokens),
            bytes_text(cache.logical_bytes),
            "unchanged" if each.is_traceless else Text("CHANGED", style="bold red"),
        )
    return table


def _answer_text(asked: Asked) -> str:
    text = visible(" ".join(asked.answer.text.split())) or "(blank)"
    return text if len(text) <= MAX_ANSWER_CHARS else text[: MAX_ANSWER_CHARS - 4] + " ..."


def kinds_table(score: Score, in_storm: Score | None) -> Table:
    layouts = list(score.by_layout)
    table = _table("Right answers by kind", "kind", *layouts, "all")
    stormy = {row.kind: row.all for row in in_storm.kinds} if in_storm else {}
    if in_storm:
        table.add_column("in the storm")
    for row in score.kinds:
        again = [_share_text(stormy[row.kind])] if stormy else []
        table.add_row(row.kind, *_cells(row.by_layout, layouts), _share_text(row.all), *again)
    table.add_section()
    again = [_share_text(in_storm.all)] if in_storm else []
    table.add_row("all", *_cells(score.by_layout, layouts), _share_text(score.all), *again)
    return table


def lengths_table(score: Score) -> Table:
    layouts = list(score.by_layout)
    table = _table("Right answers by length of the memory", "chunks", *layouts, "all")
    for row in score.lengths:
        table.add_row(_span_text(row.first, row.last), *_cells(row.by_layout, layouts), _share_text(row.all))
    return table


def _span_text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _cells(by_layout: dict[str, Count], layouts: Sequence[str]) -> list[str]:
    return [_share_text(by_layout.get(layout, Count(0, 0))) for layout in layouts]


def _share_text(count: Count) -> str:
    return f"{count.share:6.1%}  {count.num}/{count.of}" if count.of else "-"


def comparison_table(rows: Sequence[SettingScore]) -> Table:
    table = _table("The same stories in every setting, frames a chunk", "layout", "chunk", "right")
    for column in ("frames", "tokens", "memory", "encode a frame", "first token", "answer"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.layout,
            str(row.chunk_frames),
            _share_text(row.right),
            f"{row.frames:.0f}",
            f"{row.tokens:.0f}",
            bytes_text(round(row.logical_bytes)),
            _ms_text(row.encode_ms),
            _ms_text(row.first_token_ms),
            _ms_text(row.answer_ms),
        )
    return table


def recall_tables(rows: Sequence[RecallScore]) -> list[Table]:
    """Right answers by how long ago the thing that was asked for was seen last, by layout, and what that took."""
    layouts = list(dict.fromkeys(row.layout for row in rows))
    ages = [_ages_table(layout, [row for row in rows if row.layout == layout]) for layout in layouts]
    return [*ages, _keepings_table(rows)]


def _ages_table(layout: str, rows: Sequence[RecallScore]) -> Table:
    table = _table(f"Right answers by age, {layout}: chunks since the thing was seen last", "kept")
    for name in (*(_span_text(age.first, age.last) for age in rows[0].ages), "all"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        counts = [*(age.right for age in row.ages), row.right]
        table.add_row(row.keeping.name, *(f"{count.share:.0%}" if count.of else "-" for count in counts))
    table.add_section()
    table.add_row("questions", *(str(age.right.of) for age in rows[0].ages), str(rows[0].right.of))
    return table


def _keepings_table(rows: Sequence[RecallScore]) -> Table:
    table = _table("Their memories at the end, in the mean", "layout", "kept")
    for column in ("memory", "reaches back", "frames gated", "tokens dropped"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.layout,
            row.keeping.name,
            bytes_text(round(row.logical_bytes)),
            seconds_text(row.seconds),
            f"{row.gated_frames:.1f}",
            f"{row.dropped_tokens:.1f}",
        )
    return table


def _ms_text(milliseconds: float) -> str:
    return "-" if math.isnan(milliseconds) else ms_text(milliseconds)


def choice_tables(choices: ChoiceScore) -> list[Table]:
    """How often the choices were right, by the way to rank; and whether they lean to a length or to a place."""
    ranked = _table("Choices, by the way to rank", "rank by", "right", "as the free answer")
    leans = _table(
        "Wrong choices beside the right option's length in tokens, and as many as a blind pick would make",
        "rank by",
        "shorter, blindly",
        "longer, blindly",
        "",
    )
    for row in choices.leans:
        name = f"{row.rank_by}{' (asked)' if row.rank_by == choices.rank_by else ''}"
        ranked.add_row(name, _share_text(row.right), _share_text(row.agreeing))
        leans.add_row(
            name,
            f"{row.num_shorter}, {row.shorter_expected:.1f} (p = {row.shorter_p:.2g})",
            f"{row.num_longer}, {row.longer_expected:.1f} (p = {row.longer_p:.2g})",
            row.statement,
        )
    places = _table("Choices by place in the list", "place")
    for column in ("chosen", "right one there", "by chance"):
        places.add_column(column, justify="right")
    for place in choices.places:
        places.add_row(str(place.index + 1), str(place.chosen), str(place.right), f"p = {place.p:.2g}")
    return [ranked, leans, places]


def places_text(choices: ChoiceScore) -> str:
    """Whether the choices lean to a place, in words."""
    return "no place is preferred beyond chance" if choices.is_place_neutral else "A PLACE IS PREFERRED"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
