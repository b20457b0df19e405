"""HTML pages as tests read them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}</style><b>"""
_HARMLESS_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "br", "div", "span", "small", "code"),
    *("figure", "img", "figcaption", "table", "tr", "th", "td", "details", "summary"),
    *("svg", "g", "line", "path", "polyline", "text"),
}
_OUTSIDE = {"href", "xlink:href", "action", "data", "srcset", "background", "http-equiv"}


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._inside: list[str] = []
        self.style = ""
        self.raw = page
        self.feed(page)
        self.close()

    @classmethod
    def of(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._inside.append(tag)

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["style"] and not self.style:
            self.style = data
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all_of(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]


def assert_harmless(page: Page) -> None:
    """It loads nothing and runs nothing."""
    assert {tag for tag, _ in page.tags} <= _HARMLESS_TAGS
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in _OUTSIDE, tag
            if name == "src":
                assert re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", value)
            if name == "style":
                assert re.fullmatch(r"width: \d+\.\d%", value)
    assert not re.search(r"url\(|@import|expression\(", page.style)
    assert not re.search(r"https?:|//[a-z]", page.raw)
    assert "<script" not in page.raw
