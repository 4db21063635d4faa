"""The text of an HTML fragment, such as a forum post: paragraphs separated, tags removed, entities decoded."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = frozenset({"p", "div", "br", "li", "ul", "ol", "pre", "blockquote", "hr", "tr", "h1", "h2", "h3", "h4"})


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, [])


def html_text(fragment: str) -> str:
    """Return the visible text of a fragment; a text without tags and entities is returned unchanged."""
    if "<" not in fragment and "&" not in fragment:
        return fragment
    reader = _Reader()
    reader.feed(fragment)
    reader.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(reader.parts)).strip()
