"""A panel of a plot: its caption, and how it is drawn into axes, for a picture of several or for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (5.0, 3.4)  # so that its letters can still be read where it is as narrow as a phone

# Letters stay letters: they can be searched for and read out. Names from outside are not formulas.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onlooker",  # the same plot is the same text
    "text.parse_math": False,
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.framealpha": 0.6,
    "legend.edgecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_PROLOG = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_NAMESPACES = re.compile(r' xmlns(?::\w+)?="[^"]*"')
_SIZE = re.compile(r' (?:width|height)="[\d.]+pt"')
_IDS = re.compile(r'(\bid="|href="#|url\(#)')


class Panel(NamedTuple):
    """One plot. `draw` names its axes with their units and explains its lines."""

    caption: str
    draw: Callable[[Axes], None]


def panel_svg(panel: Panel, name: str) -> str:
    """Draw a panel as an element for a page; `name` keeps its parts apart from those of the page's other plots."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        panel.draw(figure.subplots())
        figure.savefig(text, format="svg", transparent=True)
    return _element(text.getvalue(), name)


def _element(document: str, name: str) -> str:
    """An SVG file as an element of HTML: without what a file has around it, as wide as its place."""
    element = _PROLOG.sub("", document, count=1)
    head, rest = element.split(">", 1)
    head = _SIZE.sub("", _NAMESPACES.sub("", head))
    return _IDS.sub(rf"\g<1>{name}-", f"{head}>{_METADATA.sub('', rest)}").strip()
