"""What the demo concludes from traces, on traces made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ep_backend.bench.client import Completion
from ep_backend.bench.exchange import latency_summary, read_exchange
from ep_backend.observe.trace import TraceWriter, read_trace

WINDOW_NS = (1_000_000, 2_000_000)
NUM_LAYERS = 2
SPAN_NS = {
    "prepare": 90_000,
    "finalize": 60_000,
    "dispatch_send": 10_000,
    "dispatch_recv": 20_000,
    "combine_send": 5_000,
    "combine_recv": 15_000,
}


def write_steps(path: Path, num_steps: int, *, skip_layer: bool = False) -> None:
    """A trace of decode steps inside the window, and one long prefill step before it."""
    trace = TraceWriter(path)
    for step in range(num_steps + 1):
        is_prefill = step == 0
        num_tokens = 30 if is_prefill else 1
        begin_ns = 0 if is_prefill else WINDOW_NS[0] + step
        factor = 100 if is_prefill else 1
        for layer in range(NUM_LAYERS):
            if skip_layer and step == num_steps and layer == 1:
                continue
            for kind, duration_ns in SPAN_NS.items():
                trace.add(kind, num_tokens, begin_ns, duration_ns * factor, 1_000)
        trace.add("forward", num_tokens, begin_ns, 1_000_000 * factor)


def test_medians_are_of_decode_steps_in_the_window(tmp_path: Path) -> None:
    for rank in range(2):
        write_steps(tmp_path / f"rank{rank}-1.trace", num_steps=3)
    report = read_exchange(tmp_path, num_layers=NUM_LAYERS, num_ranks=2, window_ns=WINDOW_NS)
    assert report.exchange_ms == pytest.approx(0.150)
    assert report.share_of_forward == pytest.approx(2 * 0.150)
    assert report.ranks[0].wait_us["dispatch_recv"] == pytest.approx(1.0)
    assert report.ranks[0].num_forwards == 4, "counts are of the whole trace"
    assert report.ranks[0].num_normal_dispatches == 0
    assert report.all_steps_dispatched


def test_a_layer_that_went_round_us_is_noticed(tmp_path: Path) -> None:
    write_steps(tmp_path / "rank0-1.trace", num_steps=3)
    write_steps(tmp_path / "rank1-2.trace", num_steps=3, skip_layer=True)
    report = read_exchange(tmp_path, num_layers=NUM_LAYERS, num_ranks=2, window_ns=WINDOW_NS)
    assert not report.all_steps_dispatched


def test_prefill_may_use_other_kernels_than_decode(tmp_path: Path) -> None:
    path = tmp_path / "rank0-1.trace"
    write_steps(path, num_steps=3)
    trace = TraceWriter(tmp_path / "rank1-2.trace")
    for span in read_trace(path):
        kind = span["kind"].decode()
        if span["num_tokens"] > 1 and kind == "dispatch_send":
            kind = "normal_counts"
        trace.add(kind, *(int(span[name]) for name in span.dtype.names[1:5]))
    report = read_exchange(tmp_path, num_layers=NUM_LAYERS, num_ranks=2, window_ns=WINDOW_NS)
    assert report.all_steps_dispatched
    assert [rank.num_normal_dispatches for rank in report.ranks] == [0, NUM_LAYERS]
    assert "dispatch_send" in report.ranks[1].span_us


def test_a_rank_without_a_trace_is_an_error(tmp_path: Path) -> None:
    write_steps(tmp_path / "rank0-1.trace", num_steps=1)
    with pytest.raises(RuntimeError, match=r"traces of 1 ranks .* expected 2"):
        read_exchange(tmp_path, num_layers=NUM_LAYERS, num_ranks=2, window_ns=WINDOW_NS)


def test_latencies_follow_their_definitions() -> None:
    completion = Completion("p", token_ids=[1, 2, 3], ttft_ms=10.0, itl_ms=[2.0, 4.0])
    summary = latency_summary([completion])
    assert summary["ttft"]["p50"] == 10.0
    assert summary["itl"]["p50"] == 3.0
    assert summary["tpot"]["p99"] == 3.0
