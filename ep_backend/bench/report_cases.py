"""Sections for benchmarks whose JSON is a list of cases: settings and times, side by side.

Nothing is known here about a particular benchmark: what differs between cases names the lines of a
chart, times are told by their unit, and everything is in the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ep_backend.bench.charts import Chart, Point, Series, number
from ep_backend.bench.page import Section, Table

Document = dict[str, Any]
Row = dict[str, Any]
"""A case with the names of nested values joined by dots."""

# Along the horizontal axis: the first of these that differs between cases.
X_NAMES = (
    "num_tokens",
    "batch",
    "batch_size",
    "num_tokens_per_rank",
    "concurrency",
    "num_sms",
    "num_ranks",
)
STATISTICS = ("median", "mean", "p50")
# Statistics that a table has and a chart does not, beside what they belong to.
SPREADS = ("p10", "p90", "p95", "p99", "min", "max", "std")
UNITS = ("us", "ms")
NO_TIMES = ("difference", "error")
NUM_MAX_CHARTS = 6
NUM_MAX_LINES = 8
TITLES = {
    ("op", "cpu", "low_latency"): "Dispatch and combine between processes on a CPU",
    ("op", "cpu", "normal"): "Dispatch and combine by normal kernels, processes on a CPU",
    ("op", "cuda", "low_latency"): "Dispatch and combine, all ranks on one GPU",
    ("op", "cuda", "normal"): "Dispatch and combine by normal kernels, all ranks on one GPU",
    ("multi_gpu", "cpu", "normal"): "Dispatch and combine by normal kernels, between GPUs",
    ("precision", "cpu", "low_latency"): "Errors of combine by the type of its rows",
    ("observe", "cpu", "low_latency"): "What metrics cost an operation",
    ("multi_gpu", "cpu", "low_latency"): "Dispatch and combine between GPUs",
    ("tune", "cpu", "low_latency"): "Settings tried by tune, processes on a CPU",
    ("tune", "cuda", "low_latency"): "Settings tried by tune, on GPUs",
    ("decode", "cpu", "low_latency"): "A decode loop without an engine",
    ("wire", "cpu", "low_latency"): "What crosses the network between nodes",
}


def has_cases(document: Document) -> bool:
    cases = _with_cases(document).get("cases")
    return isinstance(cases, list) and bool(cases) and all(isinstance(c, dict) for c in cases)


def section_of(document: Document, name: str) -> Section:
    """Of a document with `cases`. Cases with an `error` are told, not drawn."""
    document = _with_cases(document)
    rows = [flat(case) for case in document["cases"] if "error" not in case]
    varying = varying_names(rows, document.get("settings") or {})
    peers = _peer_rows(document)
    told_apart = dict.fromkeys([*varying, *(("output_layout",) if peers else ())])
    return Section(
        title=_title(document),
        facts=_facts(document, name, rows, varying),
        charts=charts_of(rows + peers, list(told_apart)),
        tables=_tables(document, rows),
        problems=[
            f"failed: {', '.join(_setting_text(k, v) for k, v in case.items() if k != 'error')}: "
            f"{case['error']}"
            for case in document["cases"]
            if "error" in case
        ],
    )


def _with_cases(document: Document) -> Document:
    """Where other kernels were left out, the cases of the normal ones are those of the document."""
    normal = document.get("normal")
    if document.get("cases") or not isinstance(normal, dict):
        return document
    own = {name: normal[name] for name in ("cases", "settings") if name in normal}
    rest = {name: value for name, value in normal.items() if name not in own}
    return document | own | {"kind": "normal", "normal": rest}


def flat(case: dict[str, Any], prefix: str = "") -> Row:
    row: Row = {}
    for name, value in case.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            row[prefix + name] = value
    return row


def is_measured(name: str, value: Any) -> bool:
    """Floats are measured, and what has a unit of time; the rest was set."""
    return isinstance(value, float) or _unit(name) is not None


def _unit(name: str) -> str | None:
    """Of a time: the word for it, as in `pair.median_us`, `ms_per_layer.step`, `ms_per_token`."""
    words = name.replace(".", "_").split("_")
    return next((word for word in words if word in UNITS), None)


def varying_names(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Settings that differ between cases. A number is one if `settings` lists its values, under its
    name or the plural, or if it counts something else than bytes, which are found, not asked for.
    """

    def is_swept(name: str) -> bool:
        return isinstance(settings.get(name, settings.get(f"{name}s")), (list, tuple))

    names = dict.fromkeys(name for row in rows for name in row)
    return [
        name
        for name in names
        if len({str(row.get(name)) for row in rows}) > 1
        and not any(is_measured(name, row[name]) for row in rows if name in row)
        and (is_swept(name) or not _was_found(rows, name))
    ]


def _was_found(rows: Sequence[Row], name: str) -> bool:
    is_count = name.startswith("num_") and "bytes" not in name
    return not is_count and any(type(row.get(name)) in (int, float) for row in rows)


def time_names(rows: Sequence[Row]) -> list[str]:
    """Times to draw: medians, and what has no statistics."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return [
        name
        for name in names
        if _unit(name)
        and not name.rsplit(".", 1)[-1].startswith(tuple(f"{s}_" for s in SPREADS))
        and not any(word in name for word in NO_TIMES)
    ]


def charts_of(rows: Sequence[Row], varying: Sequence[str]) -> list[Chart]:
    """Times along the first of `X_NAMES` that varies. Where nothing else does, all of a
    unit are in one chart. Else there is a chart for each time, and a line for each combination of
    what else varies; if those are too many lines, the first such setting gets a chart for each of
    its values."""
    x_name = next((name for name in X_NAMES if name in varying), None)
    times = time_names(rows)
    if x_name is None or not times:
        return []
    labels = [name for name in varying if name != x_name]
    if not labels:
        found = [
            _chart("Times", x_name, {_short(t): (rows, t) for t in times if _unit(t) == unit})
            for unit in UNITS
        ]
        return [chart for chart in found if chart]
    split, labels = _split(rows, labels)
    charts = []
    for time in times:
        for part in dict.fromkeys(str(row.get(split)) for row in rows) if split else [""]:
            chosen = [row for row in rows if not split or str(row.get(split)) == part]
            # Of what a peer's rows lack, only what differs between ours.
            shown = [n for n in labels if len({str(row[n]) for row in chosen if n in row}) > 1]
            lines: dict[str, tuple[list[Row], str]] = {}
            for row in chosen:
                label = ", ".join(_label(n, row[n]) for n in shown if n in row)
                lines.setdefault(label, ([], time))[0].append(row)
            where = f", {_setting_text(split, part)}" if split else ""
            chart = _chart(_short(time) + where, x_name, lines)
            if chart:
                charts.append(chart)
    return charts[:NUM_MAX_CHARTS]


def _split(rows: Sequence[Row], labels: list[str]) -> tuple[str | None, list[str]]:
    num_lines = len({tuple(str(row.get(name)) for name in labels) for row in rows})
    if num_lines <= NUM_MAX_LINES or len(labels) < 2:
        return None, labels
    return labels[0], labels[1:]


def _chart(title: str, x_name: str, lines: Mapping[str, tuple[Sequence[Row], str]]) -> Chart | None:
    series: list[Series] = []
    for label, (rows, time) in lines.items():
        points = [
            Point(row[x_name], row[time], _end(row, time, "p10"), _end(row, time, "p90"))
            for row in sorted(rows, key=lambda row: row.get(x_name) or 0)
            if row.get(time) is not None and row.get(x_name) is not None
        ]
        if points:
            series.append(Series(label, tuple(points), len(series), len(series) // 8))
    units = {_unit(time) for _, time in lines.values()}
    y_label = ", ".join(sorted(unit for unit in units if unit))
    return Chart(title, _words(x_name), y_label, tuple(series)) if series else None


def _end(row: Row, time: str, percentile: str) -> float | None:
    parent, dot, last = time.rpartition(".")
    return row.get(f"{parent}{dot}{percentile}_{last.rsplit('_', 1)[-1]}")


def _peer_rows(document: Document) -> list[Row]:
    """What was measured beside our cases, as cases of another layout; of FlashInfer's block sizes
    the fastest in each."""
    pairs = (document.get("nccl") or {}).get("pairs", [])
    rows = [{"output_layout": "NCCL"} | flat(pair) for pair in pairs if "error" not in pair]
    fastest: dict[tuple[Any, ...], Row] = {}
    for case in document.get("flashinfer") or []:
        if "error" in case:
            continue
        row = flat(case)
        key = (row["num_ranks"], row["num_tokens"], row["dispatch_dtype"])
        if key not in fastest or row["pair.median_us"] < fastest[key]["pair.median_us"]:
            fastest[key] = {"output_layout": "FlashInfer"} | row
    return rows + list(fastest.values())


def _tables(document: Document, rows: Sequence[Row]) -> list[Table]:
    """The cases, and every other list of things that were measured."""
    tables = [_table("Cases", rows)] if rows else []
    for name, value in document.items():
        nested = value.items() if isinstance(value, dict) else ()
        for inner, found in ((name, value), *((f"{name}: {k}", v) for k, v in nested)):
            is_list = isinstance(found, list) and found and isinstance(found[0], dict)
            if is_list and name not in ("cases", "settings"):
                tables.append(_table(_words(inner), [flat(entry) for entry in found]))
    return tables


def _table(caption: str, rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if len(rows) > 1:  # what is the same in all rows is among the facts
        names = [n for n in names if len({str(row.get(n)) for row in rows}) > 1]
    cells = [[_text(row.get(name)) for name in names] for row in rows]
    return Table([_words(name) for name in names], cells, caption)


def _title(document: Document) -> str:
    bench, device = str(document.get("bench", "benchmark")), document.get("device", "cpu")
    kind = str(document.get("kind", "low_latency")).replace("-", "_")
    title = TITLES.get((bench, str(device), kind), f"Benchmark {_words(bench)}")
    machine = document.get("machine", {})
    card = machine.get("gpu") or machine.get("cpu") or ""
    settings = document.get("settings") or {}
    num_ranks = settings.get("num_ranks")
    num_cards = len(document.get("cards") or [])
    if settings.get("gpu_per_rank"):
        num_cards = max(settings["num_ranks"])
    where = f"{num_cards} x {card}" if num_cards > 1 else str(card)
    ranks = "" if num_ranks is None else _setting_text("num_ranks", num_ranks)
    date = str(document.get("date", ""))[:10]
    return " | ".join(part for part in (title, ranks, where, date) if part)


def _facts(
    document: Document, name: str, rows: Sequence[Row], varying: Sequence[str]
) -> list[tuple[str, str]]:
    constant = {
        k: v
        for k, v in (rows[0] if rows else {}).items()
        if k not in varying and not is_measured(k, v)
    }
    facts = {
        "file": name,
        "command": str(document.get("command") or "not recorded"),
        "date": str(document.get("date") or "not recorded"),
        "commit": str(document.get("commit") or "not recorded"),
        "machine": _pairs(document.get("machine", {})),
        "versions": _pairs(document.get("versions", {})),
        "settings": _pairs(document.get("settings", {})),
        "same in all": _pairs(constant),
    }
    if document.get("running"):
        facts["ended in"] = str(document["running"])
    return [(fact, value) for fact, value in facts.items() if value]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{_words(name)}: ({_pairs(value)})"
        if isinstance(value, dict)
        else _setting_text(name, value)
        for name, value in values.items()
    )


def _setting_text(name: str, value: Any) -> str:
    return f"{_words(name)} {'default' if value is None else _text(value)}"


def _label(name: str, value: Any) -> str:
    """A word speaks for itself; a number does not."""
    if isinstance(value, str):
        return _words(value)
    return _setting_text(name, value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "/".join("default" if v is None else _text(v) for v in value)
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


def _short(time: str) -> str:
    """A time's name without its statistic, which the table has."""
    parent, _, last = time.rpartition(".")
    unit = _unit(time)
    words = last.removesuffix(f"_{unit}").split("_")
    if words[0] in STATISTICS:
        words = words[1:]
    return " ".join([*filter(None, [_words(parent)]), *words]) or _words(last)


def _words(name: str) -> str:
    return name.removeprefix("num_").replace("_", " ")
