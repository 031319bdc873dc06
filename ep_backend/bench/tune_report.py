"""What `ep-backend tune` prints: what was found for a shape, and the table."""

from __future__ import annotations

import sys
from pathlib import Path

from ep_backend.bench.op_cuda_report import print_table
from ep_backend.bench.tune_rank import ShapeResult, told
from ep_backend.bench.tune_search import Settings, Times
from ep_backend.tuning import Table, TableUnreadable


def print_found(result: ShapeResult) -> None:
    """Every candidate as a line, those of a sweep below each other: a curve."""
    found = result.found
    tokens = list(found.default_us)
    names = list(found.settings)
    cells = [
        [m.step, *(_cell(m.settings, name) for name in names), *_microseconds(m.times_us)]
        for m in found.measured
    ]
    heads = ["sought", *names, *(f"{n} tokens, us" for n in tokens)]
    title = f"{result.shape} | {result.site.device}, {result.site.link}"
    caption = f"A pair, dispatch and combine. Chosen: {told(found.settings)}; defaults / chosen: "
    print_table(title, heads, cells, f"{caption}{found.gain:.2f} in time.")


def _cell(settings: Settings, name: str) -> str:
    return str(settings.get(name, ""))


def _microseconds(times_us: Times) -> list[str]:
    return [f"{us:.1f}" for us in times_us.values()]


def print_table_file(path: Path) -> int:
    """Returns the exit status, 1 where the file is no table."""
    print(f"table: {path}")
    try:
        table = Table.read(path)
    except TableUnreadable as e:
        print(f"not used: {e}", file=sys.stderr)
        return 1
    for entry in table.entries:
        site = entry.site
        print(f"{entry.shape}\n  {site.device}, {site.link}, protocol {site.protocol}")
        print(f"  {told(entry.settings)}; found {entry.found.get('date', 'some time')}")
    if not table.entries:
        print("no entries")
    return 0
