"""The demo's section: what a client saw of both servers, and the exchange inside."""

from __future__ import annotations

from typing import Any

from ep_backend.bench.charts import Chart, Point, Series
from ep_backend.bench.demo_report import ROW_NAMES
from ep_backend.bench.page import Section, Table

Document = dict[str, Any]
# Of thousands of gaps, a line needs no more.
NUM_MAX_STEPS = 200


def section_of(document: Document, name: str) -> Section:
    settings, exchange = document["settings"], document["exchange"]
    facts = {
        "file": name,
        "command": _command(document),
        "date": document.get("date") or "not recorded",
        "commit": document.get("commit") or "not recorded",
        "machine": _machine(document.get("machine") or {}),
        "model": ", ".join(f"{k} {v}" for k, v in settings["shape"].items()),
        "tokens equal to one rank's": "yes" if document["runs"][-1]["tokens_equal"] else "no",
        "dispatches = layers x steps": str(exchange["dispatches_equal_layers_times_steps"]),
        "exchange, share of a forward pass": f"{exchange['share_of_forward']:.0%}",
    }
    return Section(
        title=f"Demo: {document['engine']}, {settings['ranks']} ranks, {settings['mode']}",
        facts=list(facts.items()),
        charts=[_gaps(document)],
        tables=[_latencies(document), _exchange(exchange)],
        problems=[] if document["good"] else ["the demo failed: see the facts below"],
    )


def _machine(machine: Document) -> str:
    return (
        ", ".join(f"{name} {value}" for name, value in machine.items() if value) or "not recorded"
    )


def _command(document: Document) -> str:
    """Which the demo does not write down, as its settings are all there is to it."""
    settings = document["settings"]
    options = {
        "engine": document["engine"],
        **{name: settings[name] for name in ("mode", "ranks")},
        "prompts": settings["num_prompts"],
        "tokens": settings["num_tokens"],
        "layers": settings["shape"]["num_layers"],
        "experts": settings["shape"]["num_experts"],
        **{name.replace("_", "-"): settings["shape"][name] for name in ("top_k", "hidden", "seed")},
    }
    if settings["fault"]:
        options["fault"] = settings["fault"]
    return " ".join(["ep-backend demo", *(f"--{name} {value}" for name, value in options.items())])


def _gaps(document: Document) -> Chart:
    """The share of inter-token latencies below a time."""
    series = []
    for i, run in enumerate(document["runs"]):
        gaps = sorted(gap for c in run["completions"] for gap in c["itl_ms"])
        step = max(1, len(gaps) // NUM_MAX_STEPS)
        points = [Point(gaps[k], (k + 1) / len(gaps)) for k in range(0, len(gaps), step)]
        series.append(Series(run["name"], tuple(points), i))
    title = "Inter-token latency, one request at a time"
    x_label = "ms between two tokens"
    return Chart(title, x_label, "share of tokens", tuple(series), has_marks=False, is_linear=True)


def _latencies(document: Document) -> Table:
    percentiles = list(next(iter(document["runs"][0]["latency_ms"].values())))
    rows = [
        [ROW_NAMES[metric], run["name"], *(f"{values[p]:.2f}" for p in percentiles)]
        for metric in document["runs"][0]["latency_ms"]
        for run in document["runs"]
        for values in [run["latency_ms"][metric]]
    ]
    return Table(["ms", "served by", *percentiles], rows, "Latency seen by a streaming client")


def _exchange(exchange: Document) -> Table:
    ranks = exchange["ranks"]
    rows = [
        [
            ROW_NAMES.get(span, span),
            *(f"{r['span_us'][span]:.0f} ({r['wait_us'][span]:.0f})" for r in ranks),
        ]
        for span in ranks[0]["wait_us"]
    ]
    rows.append(["exchange as the engine sees it", *(f"{r['exchange_us']:.0f}" for r in ranks)])
    rows.append(["forward pass of a step", *(f"{r['forward_us']:.0f}" for r in ranks)])
    heads = ["one layer, us", *(r["name"] for r in ranks)]
    return Table(heads, rows, "The exchange in a decode step: medians (of which waiting)")
