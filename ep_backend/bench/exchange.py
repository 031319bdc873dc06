"""What traces of a served run say: the exchange's time per layer, and whether every layer of every
step went through it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ep_backend.bench.client import Completion
from ep_backend.observe.trace import read_trace

PERCENTILES = (50, 95, 99)
# In the order of a layer. The adapter's two spans contain the buffer's: of low latency, or normal.
LOW_LATENCY_SPANS = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
NORMAL_SPANS = ("normal_counts", "normal_dispatch", "normal_combine")
ADAPTER_SPANS = ("prepare", "finalize")
DECODE_MAX_TOKENS = 1
"""With one request at a time, a decode step has one token on every rank; more is a prefill."""


@dataclass
class RankExchange:
    """One rank's share. Times are medians of decode steps within the window, in microseconds; NaN
    where there were none."""

    name: str
    num_forwards: int
    num_dispatches: int
    num_normal_dispatches: int
    """Of those, the ones by normal kernels."""
    num_low_latency_prefills: int
    """Dispatches within the window, by low-latency kernels, of more tokens than a decode step."""
    span_us: dict[str, float]
    wait_us: dict[str, float]
    """Of the buffer's spans."""
    forward_us: float

    @property
    def exchange_us(self) -> float:
        """Dispatch and combine of one layer as the engine sees them: from the call to the result,
        waiting for the other ranks and the adapter's Python included."""
        return sum(self.span_us[name] for name in ADAPTER_SPANS)


@dataclass
class ExchangeReport:
    num_layers: int
    ranks: list[RankExchange]

    @property
    def all_steps_dispatched(self) -> bool:
        """On every rank: dispatches = layers x forward passes, over the server's whole life."""
        return all(
            0 < rank.num_dispatches == self.num_layers * rank.num_forwards for rank in self.ranks
        )

    @property
    def exchange_ms(self) -> float:
        """Per layer, on the slowest rank."""
        return max(rank.exchange_us for rank in self.ranks) / 1e3

    @property
    def share_of_forward(self) -> float:
        """Part of a decode step's forward pass that the exchange takes, on the slowest rank."""
        return max(self.num_layers * r.exchange_us / r.forward_us for r in self.ranks)

    def as_json(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "dispatches_equal_layers_times_steps": self.all_steps_dispatched,
            "exchange_ms_per_layer": self.exchange_ms,
            "share_of_forward": self.share_of_forward,
            "ranks": [
                dataclasses.asdict(rank) | {"exchange_us": rank.exchange_us} for rank in self.ranks
            ],
        }


def read_exchange(
    trace_dir: Path, *, num_layers: int, num_ranks: int, window_ns: tuple[int, int]
) -> ExchangeReport:
    """Reads the traces of one server's workers.

    Args:
        window_ns: the timed part, on CLOCK_MONOTONIC; counts are of the whole trace.

    Raises:
        RuntimeError: there is not one trace for every rank.
    """
    paths = sorted(trace_dir.glob("rank*.trace"))
    if len(paths) != num_ranks:
        found = ", ".join(path.name for path in paths) or "none"
        raise RuntimeError(
            f"{trace_dir} holds the traces of {len(paths)} ranks ({found}), expected {num_ranks}: "
            "the engine did not use ep_backend on every rank."
        )
    return ExchangeReport(num_layers, [_read_rank(path, window_ns) for path in paths])


def _read_rank(path: Path, window_ns: tuple[int, int]) -> RankExchange:
    spans = read_trace(path)
    kinds = spans["kind"]
    in_window = (spans["begin_ns"] >= window_ns[0]) & (spans["begin_ns"] < window_ns[1])
    is_decode = in_window & (spans["num_tokens"] <= DECODE_MAX_TOKENS)

    def num_dispatches(buffer_spans: tuple[str, ...], among: Any = True) -> int:
        return int(np.count_nonzero(among & (kinds == buffer_spans[0].encode())))

    # An engine may prefill with one kind and decode with the other.
    buffer_spans: tuple[str, ...] = max(
        LOW_LATENCY_SPANS, NORMAL_SPANS, key=lambda spans: num_dispatches(spans, is_decode)
    )
    num_normal = num_dispatches(NORMAL_SPANS)

    def median_us(kind: str, column: str) -> float:
        of_kind = spans[column][is_decode & (kinds == kind.encode())]
        return float(np.median(of_kind)) / 1e3 if len(of_kind) > 0 else math.nan

    return RankExchange(
        name=path.name.split("-")[0],
        num_forwards=int(np.count_nonzero(kinds == b"forward")),
        num_dispatches=num_dispatches(LOW_LATENCY_SPANS) + num_normal,
        num_normal_dispatches=num_normal,
        num_low_latency_prefills=num_dispatches(LOW_LATENCY_SPANS, in_window & ~is_decode),
        span_us={kind: median_us(kind, "duration_ns") for kind in ADAPTER_SPANS + buffer_spans},
        wait_us={kind: median_us(kind, "wait_ns") for kind in buffer_spans},
        forward_us=median_us("forward", "duration_ns"),
    )


def wait_until_quiet(trace_dir: Path, quiet_secs: float = 1.0, limit_secs: float = 30.0) -> None:
    """Returns when no worker has recorded anything for `quiet_secs`."""
    deadline = time.monotonic() + limit_secs
    before: list[int] = []
    while time.monotonic() < deadline:
        now = [len(read_trace(path)) for path in sorted(trace_dir.glob("*.trace"))]
        if now == before:
            return
        before = now
        time.sleep(quiet_secs)
    raise RuntimeError(f"the engine was still stepping {limit_secs:.0f} s after the last request")


def latency_summary(completions: Sequence[Completion]) -> dict[str, dict[str, float]]:
    """TTFT, inter-token latency and TPOT in ms: p50, p95 and p99."""
    samples = {
        "ttft": [c.ttft_ms for c in completions],
        "itl": [gap for c in completions for gap in c.itl_ms],
        "tpot": [c.tpot_ms for c in completions],
    }
    return {
        name: {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
        for name, values in samples.items()
    }
