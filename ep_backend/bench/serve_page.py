"""The serving benchmark's report: charts against concurrency, the table, commands, environment."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ep_backend.bench import serve_profile
from ep_backend.bench.charts import Chart, Point, Series, write_png
from ep_backend.bench.page import Section, Table, page
from ep_backend.bench.serve_engine import PERCENTILES
from ep_backend.bench.serve_engines import ENGINES
from ep_backend.bench.serve_report import (
    CAPTION,
    HEADS,
    failures,
    gate_line,
    summarise,
    table_cells,
    title,
)

Document = dict[str, Any]
Lines = list[tuple[str, str, int, int]]
"""Of a chart: name, metric, index of the backend, dash."""
LATENCIES = {"tpot": "TPOT", "itl": "Inter-token latency", "ttft": "Time to the first token"}
X_LABEL = "requests in flight"
NOTES = (
    "TPOT: mean time between a request's tokens after its first; inter-token latency: every such "
    "time by itself. Points are medians over runs, bars span the smallest to the largest run.",
)
SHARE_NOTE = (
    "Share of a forward pass: the time from call to result of both halves of the exchange, waiting "
    "for the other ranks and Python included, over all ranks, idle ones too."
)


def charts_of(document: Document) -> dict[str, Chart]:
    """By a short name; only those of which something was measured."""
    rows = summarise(document)
    backends = document["settings"]["backends"]
    charts: dict[str, Chart] = {}

    def add(name: str, title: str, y_label: str, lines: Lines, is_linear: bool = False) -> None:
        series = [
            Series(line, points, colour, dash)
            for line, metric, colour, dash in lines
            if (points := _points(rows, backends[colour], metric))
        ]
        if series:
            charts[name] = Chart(title, X_LABEL, y_label, tuple(series), is_linear=is_linear)

    for name, label in LATENCIES.items():
        lines = [
            (f"{backend}, p{percentile}", f"{name}_p{percentile}_ms", colour, dash)
            for colour, backend in enumerate(backends)
            for dash, percentile in enumerate(PERCENTILES)
        ]
        add(name, f"{label}, percentiles", "ms", lines)
    rates = [(backend, "output_tokens_per_sec", i, 0) for i, backend in enumerate(backends)]
    add("throughput", "Throughput", "output tokens a second", rates)
    shares = [(backend, "exchange_share_of_forward", i, 0) for i, backend in enumerate(backends)]
    add("share", "Exchange in a step", "share of a forward pass", shares, is_linear=True)
    return charts


def _points(rows: list[dict[str, Any]], backend: str, metric: str) -> tuple[Point, ...]:
    found = [row for row in rows if row["backend"] == backend and metric in row]
    return tuple(
        Point(row["concurrency"], *(row[metric][key] for key in ("median", "min", "max")))
        for row in sorted(found, key=lambda row: row["concurrency"])
    )


def section_of(document: Document, name: str = "") -> Section:
    """One sweep. `name`: of its file."""
    settings = document["settings"]
    charts = charts_of(document)
    notes = list(NOTES)
    if settings["device"] == "cpu" and "default" in settings["backends"]:
        notes.append(ENGINES[settings["engine"]].cpu_default_note)
    if "share" in charts:
        notes.append(SHARE_NOTE)
    notes += [gate_line(gate) for gate in document["gates"]]
    return Section(
        title="Served: " + title(document),
        facts=facts_of(document, name),
        charts=list(charts.values()),
        tables=[
            Table(HEADS, table_cells(document), CAPTION),
            *_profiles(document),
            _servers(document),
            _cells(document),
        ],
        notes=notes,
        problems=failures(document),
    )


def facts_of(document: Document, name: str = "") -> list[tuple[str, str]]:
    facts = {
        "file": name,
        "command": document["command"],
        "date": ", resumed ".join([document["date"], *document.get("resumed", [])]),
        "commit": document.get("commit") or "not recorded",
        "machine": _pairs({k: v for k, v in document["machine"].items() if v}),
        "versions": _pairs(document["versions"]),
        "load before": str(document.get("load_average_before", "")),
        "environment": _pairs(document["inherited_environment"]),
    }
    return [(fact, value) for fact, value in facts.items() if value]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _profiles(document: Document) -> list[Table]:
    rows = serve_profile.table_cells(document.get("profiles", []))
    return [Table(serve_profile.HEADS, rows, serve_profile.CAPTION)] if rows else []


def _servers(document: Document) -> Table:
    rows = [
        (
            server["name"],
            str(server.get("start_secs", "")),
            server.get("url") or shlex.join(server.get("command", [])),
            _pairs(server.get("environment", {})),
        )
        for server in document["servers"]
    ]
    return Table(("server", "up after, s", "command", "environment"), rows, "Servers", True)


def _cells(document: Document) -> Table:
    cells = [cell for cell in document["cells"] if "metrics" in cell]
    names = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    rows = [
        [
            *(str(cell[key]) for key in ("server", "concurrency", "repeat")),
            *(str(cell["metrics"].get(name, "")) for name in names),
            cell.get("client", ""),
        ]
        for cell in cells
    ]
    return Table(("server", X_LABEL, "repeat", *names, "client"), rows, "All runs", True)


def write_report(document: Document, output: Path) -> list[Path]:
    """The page beside `output`, and a PNG of every chart where matplotlib is installed. Returns
    what it has written."""
    path = output.with_suffix(".html")
    section = section_of(document, output.name)
    path.write_text(page(section.title, [section]))
    pngs = {
        output.with_name(f"{output.stem}-{name}.png"): chart
        for name, chart in charts_of(document).items()
    }
    return [path, *(png for png, chart in pngs.items() if write_png(chart, png))]
