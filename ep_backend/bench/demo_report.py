"""The demo's tables and its plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ep_backend.bench.demo import DemoResult, Run
from ep_backend.bench.exchange import PERCENTILES, latency_summary

ROW_NAMES = {
    "ttft": "TTFT",
    "itl": "inter-token latency",
    "tpot": "TPOT",
    "dispatch_send": "dispatch, send",
    "dispatch_recv": "dispatch, hook",
    "combine_send": "combine, send",
    "combine_recv": "combine, hook",
    "normal_counts": "dispatch, counts",
    "normal_dispatch": "dispatch, rows",
    "normal_combine": "combine",
}


def print_report(result: DemoResult, console: Console) -> None:
    """Latencies of both servers, the exchange inside a decode step, and the verdict."""
    console.print(_latency_table(result.reference, result.ours))
    console.print(_exchange_table(result))
    num_tokens = sum(len(c.token_ids) for c in result.ours.sequential + result.ours.concurrent)
    equal = result.tokens_equal("sequential") and result.tokens_equal("concurrent")
    console.print(
        f"[bold green]all {num_tokens} tokens equal[/] to the one-rank server's"
        if equal
        else "[bold red]tokens differ[/] from the one-rank server's"
    )


def _latency_table(*runs: Run) -> Table:
    table = Table(title="Latency seen by a streaming client, one request at a time (ms)")
    table.add_column("")
    table.add_column("served by")
    for p in PERCENTILES:
        table.add_column(f"p{p}", justify="right")
    summaries = [latency_summary(run.sequential) for run in runs]
    for metric in ("ttft", "itl", "tpot"):
        for run, summary in zip(runs, summaries, strict=True):
            is_first, is_last = run is runs[0], run is runs[-1]
            values = (f"{summary[metric][f'p{p}']:.2f}" for p in PERCENTILES)
            table.add_row(
                ROW_NAMES[metric] if is_first else "", run.name, *values, end_section=is_last
            )
    return table


def _exchange_table(result: DemoResult) -> Table:
    report = result.ours.exchange
    assert report is not None
    # Not of an inter-token latency, which is next to nothing where a busy server sends in bursts.
    tpot_ms = latency_summary(result.ours.sequential)["tpot"]["p50"]
    table = Table(title="The exchange in a decode step (us, medians; of which waiting for peers)")
    table.add_column("one layer")
    for rank in report.ranks:
        table.add_column(rank.name, justify="right")
    for name in report.ranks[0].wait_us:
        cells = (f"{r.span_us[name]:.0f} ({r.wait_us[name]:.0f})" for r in report.ranks)
        table.add_row(ROW_NAMES[name], *cells)
    table.add_row(
        "exchange as the engine sees it",
        *(f"[bold]{r.exchange_us:.0f}[/]" for r in report.ranks),
        end_section=True,
    )
    table.add_row("forward pass of a step", *(f"{r.forward_us:.0f}" for r in report.ranks))
    table.add_row(
        "exchange, share of the forward pass",
        *(f"{report.num_layers * r.exchange_us / r.forward_us:.0%}" for r in report.ranks),
    )
    table.add_row(
        "exchange, share of TPOT",
        *(f"{report.num_layers * r.exchange_us / (tpot_ms * 1e3):.0%}" for r in report.ranks),
        end_section=True,
    )
    table.add_row(
        f"dispatches = {report.num_layers} layers x steps",
        *(f"{r.num_dispatches} = {report.num_layers} x {r.num_forwards}" for r in report.ranks),
    )
    return table


def plot_latencies(result: DemoResult, path: Path) -> None:
    """Writes a PNG: the share of inter-token latencies below a given time, for both servers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for run in (result.reference, result.ours):
        gaps = np.sort([gap for c in run.sequential for gap in c.itl_ms])
        share = np.arange(1, len(gaps) + 1) / len(gaps)
        axes.step(gaps, share, where="post", label=f"{run.name} (p50 {np.median(gaps):.1f} ms)")
    axes.set_xscale("log")
    axes.set_xlabel("inter-token latency (ms)")
    axes.set_ylabel("share of tokens")
    axes.set_title(f"{result.settings.engine.title} on CPU, one request at a time")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
