"""What metrics cost an operation on this CPU: `ep-backend bench observe`.

Three parts, because the whole is too small to be seen beside the noise of a machine:
- *counting*: native counters, always on: their time in a loop, over that of an operation;
- *reading*: the time of a scrape; there is one a second;
- *pairs*: dispatch + combine of one rank, seconds with and without the thread that copies counters
  to an engine's registry, by turns. A check: their medians differ by less than the noise.
One rank with one token: the shortest operation there is. Others wait for peers and copy more.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ep_backend import LowLatencyBuffer, _native, virtual_world
from ep_backend.bench.provenance import command, commit, installed_versions, this_machine
from ep_backend.group import Group
from ep_backend.observe.counts import ProcessCounts, Source
from ep_backend.observe.metrics import Collector, Publisher

NUM_EXPERTS = 64
NUM_RANKS_COUNTED = 8
"""Counting grows with ranks and local experts: as on a rank of eight."""
OPS_A_PAIR = 4
BLOCK_SECS = 1.0


@dataclass(frozen=True)
class Cost:
    counting_ns: float
    """Of an operation that all counters are of; most have fewer."""
    reading_us: float
    """One scrape."""
    pair_us: float
    """Without reading; median of blocks."""
    pair_read_us: float
    """With the thread."""
    num_blocks: int

    @property
    def share(self) -> float:
        """Of an operation's time that counting and reading take."""
        return self.counting_ns * 1e-3 / (self.pair_us / OPS_A_PAIR) + self.reading_us * 1e-6

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": "observe",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "command": command(),
            "machine": this_machine(),
            "versions": installed_versions(),
            "cases": [dataclasses.asdict(self) | {"share": self.share}],
        }


def measure(seconds: float) -> Cost:
    """Args:
    seconds: of pairs, of each kind.
    """
    (cost,) = virtual_world(1).run(lambda group: _measure(group, seconds))
    return cost


def _measure(group: Group, seconds: float) -> Cost:
    buffer = LowLatencyBuffer(
        group,
        num_max_tokens_per_rank=1,
        hidden=2048,
        num_experts=NUM_EXPERTS,
        top_k=8,
        dtype=torch.float32,
    )
    counts = ProcessCounts()
    counts.add(Source(0, "shm", 0, buffer.statistics))
    collector = Collector(counts)
    x = torch.ones(1, 2048)
    topk_idx = torch.arange(8)[None]
    topk_weights = torch.ones(1, 8)

    def pair() -> None:
        result = buffer.dispatch_and_receive(x, topk_idx, topk_weights)
        buffer.combine_and_receive(result.recv_x, result.handle)

    def block() -> float:
        """Seconds of a pair."""
        num_pairs, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < BLOCK_SECS:
            pair()
            num_pairs += 1
        return elapsed / num_pairs

    def published_block(directory: Path) -> float:
        publisher = Publisher(counts, directory)
        publisher.start()
        try:
            return block()
        finally:
            publisher.stop()

    with buffer, tempfile.TemporaryDirectory() as directory:
        block()
        num_blocks = max(2, round(seconds / BLOCK_SECS))
        blocks = [(block(), published_block(Path(directory))) for _ in range(num_blocks)]
        reading = []
        for _ in range(20):
            begin = time.perf_counter()
            list(collector.collect())
            reading.append(time.perf_counter() - begin)
    return Cost(
        counting_ns=_native.counting_ns(
            NUM_RANKS_COUNTED, NUM_EXPERTS // NUM_RANKS_COUNTED, 1_000_000
        ),
        reading_us=statistics.median(reading) * 1e6,
        pair_us=statistics.median(off for off, _ in blocks) * 1e6,
        pair_read_us=statistics.median(on for _, on in blocks) * 1e6,
        num_blocks=num_blocks,
    )


def print_cost(cost: Cost, console: Console) -> None:
    table = Table(title="what metrics cost")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("an operation: 1 rank, 1 token", f"{cost.pair_us / OPS_A_PAIR:.2f} us")
    table.add_row("counting it", f"{cost.counting_ns:.1f} ns")
    table.add_row("a scrape, once a second", f"{cost.reading_us:.0f} us")
    table.add_row("share of an operation", f"{cost.share:.3%}")
    table.add_row(
        f"check: pairs without and with, median of {cost.num_blocks} blocks",
        f"{cost.pair_us:.2f} us, {cost.pair_read_us:.2f} us",
    )
    console.print(table)
