"""A picture of a benchmark: time and limit over the length of the history.

python -m onlooker.node.bench_plot bench.json bench.png
"""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

_PANELS = (("chunk", "a chunk"), ("decoded token", "a decoded token"))
_LINES = (("onlooker", "ms", "-", "o"), ("onlooker", "limit_ms", "--", ""), ("naive", "ms", ":", "x"))
_NAMES = {("onlooker", "ms"): "", ("onlooker", "limit_ms"): ", limit", ("naive", "ms"): ", naive"}


def require_matplotlib() -> None:
    """Raise ImportError, with a word on what to install, before minutes are spent on figures that cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a plot needs matplotlib; install it with: pip install 'onlooker[plot]'")


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw a benchmark's JSON document as a PNG: a row of panels for each model."""
    models = list(document["ceilings"])
    measured = {row["stage"] for row in document["rows"] if row["way"] == "onlooker" and row["ms"] is not None}
    stages = [panel for panel in _PANELS if panel[0] in measured] or _PANELS[:1]
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(6.4 * len(stages), 4.2 * max(1, len(models))), layout="constrained"
    )
    panels = figure.subplots(max(1, len(models)), len(stages), squeeze=False)
    for model, row in zip(models, panels, strict=False):
        for (stage, title), panel in zip(stages, row, strict=True):
            _draw(panel, [r for r in document["rows"] if (r["model"], r["stage"]) == (model, stage)])
            panel.set_title(f"{model}: {title}", fontsize=10)
    facts = document["machine"]
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, {facts['date'][:10]}", fontsize=9)
    figure.savefig(path, format="png", dpi=120)


def _draw(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    """A colour for each setting; a style for what was measured, its limit, and the naive way."""
    for i, (name, case) in enumerate(_cases(rows)):
        for way, field, style, marker in _LINES:
            points = [(row["history"], row[field]) for row in case if row["way"] == way and row[field] is not None]
            if points:
                x, y = zip(*sorted(points), strict=True)
                label = name + _NAMES[way, field]
                panel.plot(x, y, style, marker=marker, color=f"C{i % 10}", label=label)
    panel.set_xlabel("history, tokens")
    panel.set_ylabel("milliseconds")
    if panel.lines:
        panel.set_yscale("log")
        panel.yaxis.set_minor_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(2, 5)))
        for axis_part in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis_part("{x:g}")
        panel.legend(fontsize=7)
    panel.grid(alpha=0.3)


def _cases(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for (encoded, chunk_frames, num), case in groupby(sorted(rows, key=_setting), key=_setting):
        name = f"{encoded}, {chunk_frames} frames" if encoded else f"{num} at once"
        yield name, list(case)


def _setting(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["encoded"], row["chunk_frames"], row["num_answers"]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the JSON of a benchmark that was run elsewhere."""
    parser = argparse.ArgumentParser(description="Draw the JSON of a benchmark.")
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args(argv)
    require_matplotlib()
    plot(json.loads(args.json.read_text()), args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
