"""`ep-backend top`: who waits for whom, and which experts are hot, in a terminal.

Numbers are of the time between two looks; with `--once` of all time since the ranks started.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ep_backend.observe.scrape import Look, look

NUM_HOT_EXPERTS = 8
SHADES = ("", "yellow", "bold yellow", "bold red")


def show(
    urls: Sequence[str], *, once: bool, interval: float, console: Console | None = None
) -> None:
    """Prints one table, or refreshes it until Ctrl-C.

    Raises:
        ScrapeFailed: an endpoint does not answer.
    """
    console = console or Console()
    if once:
        console.print(tables(look(urls)))
        return
    before, before_secs = look(urls), time.monotonic()
    with Live(Text("..."), console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(interval)
            now, now_secs = look(urls), time.monotonic()
            live.update(tables(now.since(before, now_secs - before_secs)), refresh=True)
            before, before_secs = now, now_secs


def tables(seen: Look) -> Group:
    """Ranks, straggler map, experts."""
    period = f"{seen.seconds:.1f} s" if seen.seconds else "since the ranks started"
    unit = "ms a second" if seen.seconds else "ms"
    return Group(
        Text(f"Ranks, {period}"),
        _ranks(seen),
        Text(f"\nStraggler map: {unit} that a row's rank waited for a column's"),
        _stragglers(seen),
        Text(f"\nExperts: {_unevenness(seen)}"),
        _experts(seen),
    )


def imbalance(rows: Sequence[float]) -> float | None:
    """The largest over the mean: 1 is even. None where nothing came."""
    total = sum(rows)
    return max(rows) * len(rows) / total if total > 0 else None


def _ranks(seen: Look) -> Table:
    """One line a rank; what its endpoint does not export is "-"."""
    table = Table()
    columns = ("rank", "dispatches", "tokens", "MB sent", "us an exchange", "share of step")
    for column in (*columns, "waited, s", "expert rows", "timeouts"):
        table.add_column(column, justify="right")
    per = (lambda x: f"{x / seen.seconds:,.0f}/s") if seen.seconds else (lambda x: f"{x:,.0f}")
    for rank in seen.ranks:
        num_ops, inside = seen.operations[rank], seen.op_seconds.get(rank)
        forward = seen.forward_seconds.get(rank)
        rows = sum(n for e, n in seen.expert_rows.items() if seen.expert_rank[e] == rank)
        sent = seen.sent_bytes.get(rank)
        table.add_row(
            str(rank),
            per(num_ops),
            per(seen.tokens[rank]) if rank in seen.tokens else "-",
            "-" if sent is None else f"{sent / 1e6:,.1f}",
            "-" if inside is None or num_ops == 0 else f"{inside / num_ops * 1e6:,.0f}",
            "-" if inside is None or not forward else f"{inside / forward:.0%}",
            f"{sum(s for (r, _), s in seen.wait_seconds.items() if r == rank):,.3f}",
            per(rows),
            f"{seen.timeouts.get(rank, 0):.0f}",
        )
    return table


def _stragglers(seen: Look) -> Table:
    """Milliseconds waited for each peer a second, or, since the start, in all."""
    table = Table()
    peers = sorted({peer for _, peer in seen.wait_seconds})
    for column in ("", *map(str, peers)):
        table.add_column(column, justify="right")
    per_second = 1e3 / (seen.seconds or 1.0)
    largest = max(seen.wait_seconds.values(), default=0.0)
    for rank in seen.ranks:
        cells: list[str | Text] = [str(rank)]
        for peer in peers:
            waited = seen.wait_seconds.get((rank, peer), 0.0)
            shade = int(waited / largest * (len(SHADES) - 1)) if largest > 0 else 0
            cells.append(Text(f"{waited * per_second:,.1f}", style=SHADES[shade]))
        table.add_row(*cells)
    return table


def _unevenness(seen: Look) -> str:
    rows = seen.expert_rows
    of_ranks = [
        sum(n for e, n in rows.items() if seen.expert_rank[e] == rank) for rank in seen.ranks
    ]
    uneven = (imbalance(list(rows.values())), imbalance(of_ranks))
    experts, ranks = ("-" if value is None else f"{value:.2f}" for value in uneven)
    return f"largest over mean {experts}, of ranks {ranks}"


def _experts(seen: Look) -> Table:
    """Those with the most rows."""
    rows = seen.expert_rows
    table = Table()
    for column in ("hottest", "rank", "rows", "over mean"):
        table.add_column(column, justify="right")
    mean = sum(rows.values()) / max(1, len(rows))
    for expert, num_rows in sorted(rows.items(), key=lambda item: -item[1])[:NUM_HOT_EXPERTS]:
        over = f"{num_rows / mean:.2f}" if mean > 0 else "-"
        table.add_row(str(expert), str(seen.expert_rank[expert]), f"{num_rows:,.0f}", over)
    return table
