"""The exchange's share of a step, from traces of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ep_backend.bench.serve_share import exchange_share
from ep_backend.observe.trace import TraceWriter


def test_the_share_is_of_all_passes_in_the_window(tmp_path: Path) -> None:
    for rank, exchange_ns in ((0, 100), (1, 300)):
        trace = TraceWriter(tmp_path / f"rank{rank}-1.trace")
        for begin_ns in (0, 10_000, 20_000):  # the first is before the window
            trace.add("forward", 1, begin_ns, 2_000)
            for kind, ns in (("prepare", exchange_ns), ("dispatch_send", 7), ("finalize", 100)):
                trace.add(kind, 1, begin_ns + 50, ns)
    share = exchange_share(tmp_path, (5_000, 30_000))
    assert share["exchange_share_of_forward"] == pytest.approx(600 / 4_000)
    assert share["exchange_ms_per_step"] == pytest.approx(300e-6, abs=1e-4)


def test_without_spans_of_an_exchange_nothing_is_claimed(tmp_path: Path) -> None:
    assert exchange_share(tmp_path, (0, 10)) == {}
    TraceWriter(tmp_path / "engine-1.trace").add("forward", 1, 5, 100)
    assert exchange_share(tmp_path, (0, 10)) == {}
