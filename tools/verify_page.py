"""The page of `onlooker verify`: every promise, how far it was missed at most, and all checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from .ask import visible
from .panel import Panel
from .report_page import Cell, Column, Fact, Fold, Page, Plots, Table, Verdict, machine_facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NAME_CHARS = 48  # in a plot; the end of a path says more than its beginning


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One promise, measured. A bound of 0 is bit for bit; a value that is no number came as none."""

    promise: str
    model: str
    case: str
    value: float | None
    bound: float
    passed: bool

    @property
    def is_drawn(self) -> bool:
        """Whether it has a place on a logarithmic scale."""
        return self.value is not None and 0 < self.value < math.inf


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `onlooker verify --json` prints."""

    checks: list[Check]
    machine: dict[str, str] = {}


def verify_page(report: VerifyReport) -> Page:
    """Raises PlotError without matplotlib."""
    missed = [check for check in report.checks if not check.passed]
    num = len(report.checks)
    held = bool(report.checks) and not missed
    models = list(dict.fromkeys(check.model for check in report.checks))
    text = f"All {num} checks hold" if held else f"{len(missed)} of {num} checks are missed"
    return Page(
        title="verify",
        subject=", ".join(models),
        verdict=Verdict(held, text),
        facts=[Fact("models", ", ".join(models)), *machine_facts(report.machine)],
        parts=[
            _checks_table("Missed", missed),
            Plots("Differences", _panels(report.checks, models)),
            _promises_table(report.checks),
            *_folded_tables(report.checks),
        ],
    )


def _promises_table(checks: Sequence[Check]) -> Table:
    columns = [
        Column("promise"),
        Column("model"),
        Column("held", True),
        Column("largest", True),
        Column("bound", True),
    ]
    return Table("Promises", columns, [_promise_row(its) for its in _by_promise(checks)])


def _by_promise(checks: Sequence[Check]) -> Iterator[list[Check]]:
    for promise in dict.fromkeys(check.promise for check in checks):
        for model in dict.fromkeys(check.model for check in checks if check.promise == promise):
            yield [check for check in checks if (check.promise, check.model) == (promise, model)]


def _promise_row(its: Sequence[Check]) -> list[Cell]:
    num_held = sum(check.passed for check in its)
    worst = max(its, key=lambda check: math.inf if check.value is None else check.value)
    return [
        Cell(worst.promise),
        Cell(worst.model),
        Cell(f"{num_held} of {len(its)}", "good" if num_held == len(its) else "bad"),
        Cell(value_text(worst.value)),
        Cell(_bound_text(worst.bound)),
    ]


def _folded_tables(checks: Sequence[Check]) -> Iterator[Table]:
    """All checks, folded away promise by promise where it holds."""
    for promise in dict.fromkeys(check.promise for check in checks):
        its = [check for check in checks if check.promise == promise]
        num_missed = sum(not check.passed for check in its)
        text = f"{num_missed} of {len(its)} missed" if num_missed else f"all {len(its)} held"
        yield _checks_table(f"{promise}: {text}", its, "open" if num_missed else "closed")


def _checks_table(title: str, checks: Sequence[Check], fold: Fold = "") -> Table:
    columns = [Column("promise"), Column("model"), Column("case"), *(Column(n, True) for n in ("value", "bound", ""))]
    return Table(title, columns, [_check_row(check) for check in checks], fold=fold)


def _check_row(check: Check) -> list[Cell]:
    return [
        Cell(check.promise),
        Cell(check.model),
        Cell(check.case),
        Cell(value_text(check.value)),
        Cell(_bound_text(check.bound)),
        Cell("held", "good") if check.passed else Cell("MISSED", "bad"),
    ]


def value_text(value: float | None) -> str:
    """`2.5e-06`, `0`, or that it is no number."""
    return "no number" if value is None else f"{value:.2g}"


def _bound_text(bound: float) -> str:
    return "bit for bit" if bound == 0 else f"\N{LESS-THAN OR EQUAL TO} {bound:.0e}"


def _panels(checks: Sequence[Check], models: Sequence[str]) -> list[Panel]:
    """A panel for each promise with a bound to stay under, where there are differences enough to be drawn."""
    return [
        Panel(promise, partial(_draw, its, models))
        for promise in dict.fromkeys(check.promise for check in checks if check.bound)
        if len(its := [check for check in checks if check.promise == promise and check.is_drawn]) > len(models)
    ]


def _draw(checks: Sequence[Check], models: Sequence[str], axes: Axes) -> None:
    """A line of points for each model."""
    from matplotlib.ticker import LogLocator

    for place, model in enumerate(models):
        values = [check.value or 0.0 for check in checks if check.model == model]
        axes.plot(values, [place] * len(values), "o", color="#0b6bb3", alpha=0.45, markeredgewidth=0)
        axes.text(0.0, place - 0.22, visible(model[-MAX_NAME_CHARS:]), transform=axes.get_yaxis_transform(), fontsize=9)
    for bound in {check.bound for check in checks}:
        axes.axvline(bound, color="#b42318", linestyle="--", label=f"bound, {bound:.0e}")
    axes.set_xscale("log")
    axes.set_xlabel("difference in a check, the largest of its figures")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.0e}")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(models) - 0.5, -0.7)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
