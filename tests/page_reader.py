"""A page as a reader finds it: its text, its tables, and what it would fetch."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
FETCHING = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"}


class PageReader(HTMLParser):
    """Reads a page to its end. Raises AssertionError where an element is not closed as it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}  # by the title above
        self.words: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.num_folded = 0
        self.addresses: list[str] = []
        self.plot_words: list[list[str]] = []
        self._open: list[str] = []
        self._title = ""
        self.feed(page)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def row(self, title: str, *first: str) -> list[str]:
        """The row of a table that begins like this."""
        (row,) = [row for row in self.tables[title] if tuple(row[: len(first)]) == first]
        return row

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.num_folded += tag == "details" and "open" not in dict(attrs)
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.addresses += [value or ""] if name in FETCHING else []
            self.addresses += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self._open.append(tag)
        if tag == "h2":
            self._title = ""
        elif tag == "table":
            self.tables[self._title] = []
        elif tag == "tr":
            self.tables[self._title].append([])
        elif tag in ("td", "th"):
            self.tables[self._title][-1].append("")
        elif tag == "svg" and "figure" in self._open:
            self.plot_words.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.addresses += re.findall(r"url\(([^)]*)\)|@import[^;]*", data)
            return
        self.words += data.split()
        if "h2" in self._open:
            self._title += data
        elif {"td", "th"} & set(self._open):
            cell = self.tables[self._title][-1]
            cell[-1] = f"{cell[-1]} {data}".strip()
        elif "svg" in self._open and "figure" in self._open and data.strip():
            self.plot_words[-1].append(data.strip())
