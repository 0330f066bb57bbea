"""The page of a report: one HTML file with everything in it, to be sent around, read on a phone and printed.

    page = Page(title="qa", subject="a model", verdict=Verdict(True, "every promise held"), parts=[Table(...)])
    page.html()

It holds its style and its plots, has no script, and forbids the browser to fetch anything. All text is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Literal, NamedTuple

from .ask import visible
from .panel import Panel, panel_svg

Tone = Literal["", "good", "bad", "quiet"]
Fold = Literal["", "open", "closed"]  # whether a reader can fold a part away, and how it is at first

UNKNOWN = "\N{EN DASH}"
NOTHING_FROM_OUTSIDE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Cell(NamedTuple):
    """What a table says in one place; the note stands small behind it."""

    text: str
    tone: Tone = ""
    note: str = ""


class Column(NamedTuple):
    """A table's column; figures stand to the right, so that their digits can be compared."""

    name: str
    is_figure: bool = False


class Tile(NamedTuple):
    """One figure that matters, large."""

    name: str
    value: str
    note: str = ""


class Fact(NamedTuple):
    """What the figures hold for; code is shown as it was typed."""

    name: str
    value: str
    is_code: bool = False


class Verdict(NamedTuple):
    """What came out, in one sentence; None where nothing was promised."""

    held: bool | None
    text: str


def machine_facts(machine: Mapping[str, str]) -> list[Fact]:
    """The `machine` of a report's JSON; whatever a report does not have is left out."""
    return [
        Fact(name, _date_text(value) if name == "date" else value, name == "command") for name, value in machine.items()
    ]


def _date_text(date: str) -> str:
    """`2026-11-23 20:08:53 UTC`; as it is, if it is none."""
    return date.replace("T", " ").replace("+00:00", " UTC")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many cells as there are columns. `num_last` rows at the end sum up those above."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    num_last: int = 0
    fold: Fold = ""

    def html(self) -> str:
        head = "".join(f"<th{_class(column)}>{_text(column.name)}</th>" for column in self.columns)
        first_last = len(self.rows) - self.num_last
        body = "".join(
            f"<tr{' class=sum' if i >= first_last else ''}>{self._row(row)}</tr>" for i, row in enumerate(self.rows)
        )
        table = (
            f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        return _section(self.title, table + _note(self.note), self.fold)

    def _row(self, row: Sequence[Cell]) -> str:
        return "".join(
            f"<td{_class(column, cell.tone)}>{_text(cell.text)}{_small(cell.note)}</td>"
            for column, cell in zip(self.columns, row, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Plots:
    """Panels side by side where there is room, below each other where there is not."""

    title: str
    panels: Sequence[Panel]
    note: str = ""

    def html(self, name: str) -> str:
        figures = "".join(
            f'<figure role="group"><figcaption>{_text(panel.caption)}</figcaption>'
            f"{panel_svg(panel, f'{name}-{i}')}</figure>"
            for i, panel in enumerate(self.panels)
        )
        return _section(self.title, f'<div class="plots">{figures}</div>{_note(self.note)}')


@dataclass(frozen=True, slots=True)
class Sentences:
    """Findings in words."""

    title: str
    lines: Sequence[str]

    def html(self) -> str:
        return _section(self.title, "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in self.lines) + "</ul>")


@dataclass(frozen=True, slots=True)
class Page:
    """One report. Parts without rows, panels or lines are left out."""

    title: str
    subject: str
    verdict: Verdict
    facts: Sequence[Fact]
    tiles: Sequence[Tile] = ()
    parts: Sequence[Table | Plots | Sentences] = field(default_factory=list)

    def html(self) -> str:
        """All of it as one document."""
        parts = [_part(part, f"plot-{i}") for i, part in enumerate(self.parts) if not _is_empty(part)]
        body = [self._head(), _verdict(self.verdict), _tiles(self.tiles), *parts, _facts(self.facts)]
        return _DOCUMENT.format(
            policy=NOTHING_FROM_OUTSIDE,
            title=_text(f"onlooker {self.title}: {self.subject}"),
            style=_file("report_page.css"),
            body="\n".join(part for part in body if part),
        )

    def _head(self) -> str:
        eye = _file("web.svg").replace(' xmlns="http://www.w3.org/2000/svg"', ' aria-hidden="true"').strip()
        dates = "".join(f"<time>{_text(fact.value)}</time>" for fact in self.facts if fact.name == "date")
        return (
            f'<header><span class="brand">{eye}onlooker {_text(self.title)}</span>'
            f'<span class="subject">{_text(self.subject)}</span>{dates}</header>'
        )


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _verdict(verdict: Verdict) -> str:
    kinds = {True: ("good", "\N{CHECK MARK}"), False: ("bad", "\N{MULTIPLICATION X}"), None: ("plain", "")}
    kind, mark = kinds[verdict.held]
    sign = f'<span class="sign" aria-hidden="true">{mark}</span>' if mark else ""
    return f'<h1 class="verdict {kind}">{sign}<span>{_text(verdict.text)}</span></h1>'


def _tiles(tiles: Iterable[Tile]) -> str:
    items = "".join(
        f'<div class="tile"><span>{_text(tile.name)}</span><b>{_text(tile.value)}</b>'
        f"<small>{_text(tile.note)}</small></div>"
        for tile in tiles
    )
    return f'<div class="tiles">{items}</div>' if items else ""


def _facts(facts: Iterable[Fact]) -> str:
    items = "".join(
        f"<div><dt>{_text(fact.name)}</dt><dd>{_code(fact.value) if fact.is_code else _text(fact.value)}</dd></div>"
        for fact in facts
    )
    return _section("What was run", f"<dl>{items}</dl>") if items else ""


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _part(part: Table | Plots | Sentences, name: str) -> str:
    return part.html(name) if isinstance(part, Plots) else part.html()


def _is_empty(part: Table | Plots | Sentences) -> bool:
    match part:
        case Table():
            return not part.rows
        case Plots():
            return not part.panels
        case Sentences():
            return not part.lines


def _section(title: str, content: str, fold: Fold = "") -> str:
    heading = f"<h2>{_text(title)}</h2>"
    if not fold:
        return f"<section>{heading}{content}</section>"
    is_open = " open" if fold == "open" else ""
    return f"<section><details{is_open}><summary>{heading}</summary>{content}</details></section>"


def _small(text: str) -> str:
    return f"<small>{_text(text)}</small>" if text else ""


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _class(column: Column, tone: Tone = "") -> str:
    names = " ".join(name for name in ("figure" if column.is_figure else "", tone) if name)
    return f' class="{names}"' if names else ""


def _text(text: str) -> str:
    """Text from anywhere: what a browser would take for its own is escaped, what would steer it made visible."""
    return escape(visible(text))


def _file(name: str) -> str:
    return resources.files("onlooker.tools").joinpath(name).read_text("utf-8")
