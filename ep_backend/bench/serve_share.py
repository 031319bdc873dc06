"""The share of a step that is exchange, as the traces of a server's workers tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ep_backend.bench.exchange import ADAPTER_SPANS
from ep_backend.observe.trace import read_trace


def exchange_share(trace_dir: Path, window_ns: tuple[int, int]) -> dict[str, Any]:
    """Of all ranks' forward passes that began in the window, those of idle ranks included, which
    step along and wait: the share of their time in an exchange's calls, and the exchange of a pass
    in the mean. Empty where no worker recorded both, as one rank alone does not.

    Args:
        window_ns: on CLOCK_MONOTONIC.
    """
    forward_ns = exchange_ns = num_forwards = 0
    for path in sorted(trace_dir.glob("*.trace")):
        spans = read_trace(path)
        is_within = (spans["begin_ns"] >= window_ns[0]) & (spans["begin_ns"] < window_ns[1])
        is_forward = is_within & (spans["kind"] == b"forward")
        is_exchange = is_within & np.isin(spans["kind"], [s.encode() for s in ADAPTER_SPANS])
        forward_ns += int(spans["duration_ns"][is_forward].sum())
        exchange_ns += int(spans["duration_ns"][is_exchange].sum())
        num_forwards += int(is_forward.sum())
    if not (num_forwards and exchange_ns):
        return {}
    return {
        "exchange_share_of_forward": round(exchange_ns / forward_ns, 4),
        "exchange_ms_per_step": round(exchange_ns / num_forwards / 1e6, 4),
    }
