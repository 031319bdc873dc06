"""Reads pages as a browser does, as far as tests ask: their parts, and what they would fetch."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}
FETCHING = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}


@dataclass
class Page(HTMLParser):
    """Counts what is drawn in every figure. A page whose tags do not match is refused."""

    figures: list[dict[str, int]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in FETCHING]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag == "figure":
            self.figures.append({"lines": 0, "points": 0})
        if tag == "polyline":
            self.figures[-1]["lines"] += 1
            self.figures[-1]["points"] += len((values["points"] or "").split())
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> opens nowhere"
        assert self._open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def read_page(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert not page._open, f"not closed: {page._open}"
    return page


def check_self_contained(html: str) -> Page:
    """Nothing is fetched or run, and every chart has lines with points."""
    page = read_page(html)
    outside = [a for a in page.addresses if not a.startswith("#") and a != "data:,"]
    assert outside == []
    assert {a.removeprefix("#") for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert not {"script", "iframe", "img", "object", "embed"} & set(page.tags)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for figure in page.figures:
        assert figure["lines"] > 0
        assert figure["points"] >= figure["lines"]
    return page
