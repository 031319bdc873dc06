"""A page that needs nothing but itself: sections with facts, charts, tables and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from ep_backend.bench.charts import Chart, as_html


@dataclass(frozen=True)
class Table:
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    is_folded: bool = False
    """Shown when its caption is clicked on."""


@dataclass(frozen=True)
class Section:
    """One measurement."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()
    """What failed or was not measured: told first."""


def page(title: str, sections: Sequence[Section]) -> str:
    """HTML, in one piece."""
    numbered = [(f"section-{i}", section) for i, section in enumerate(sections, 1)]
    contents = ""
    if len(numbered) > 1:
        items = "".join(_link(anchor, section) for anchor, section in numbered)
        contents = f"<nav><ol>{items}</ol></nav>"
    style = (resources.files("ep_backend.bench") / "page.css").read_text()
    return "\n".join(
        [
            "<!doctype html>",
            "<html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            # Otherwise a browser asks a server for one.
            "<link rel='icon' href='data:,'>",
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            contents,
            *(_section(anchor, section) for anchor, section in numbered),
            "</body></html>\n",
        ]
    )


def _link(anchor: str, section: Section) -> str:
    failed = " (with failures)" if section.problems else ""
    return f"<li><a href='#{anchor}'>{escape(section.title)}</a>{failed}</li>"


def _section(anchor: str, section: Section) -> str:
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.facts
    )
    charts = "\n".join(as_html(chart) for chart in section.charts)
    return "\n".join(
        [
            f"<section id='{anchor}'><h2>{escape(section.title)}</h2>",
            *(f"<p class='problem'>{escape(problem)}</p>" for problem in section.problems),
            f"<dl>{facts}</dl>" if facts else "",
            f"<div class='charts'>{charts}</div>" if charts else "",
            *(f"<p>{escape(note)}</p>" for note in section.notes),
            *(_table(table) for table in section.tables),
            "</section>",
        ]
    )


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    body = f"<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    caption = escape(table.caption)
    if table.is_folded:
        return f"<details><summary>{caption}</summary><div class='wide'>{body}</div></details>"
    return f"<div class='wide'>{f'<h3>{caption}</h3>' if caption else ''}{body}</div>"
