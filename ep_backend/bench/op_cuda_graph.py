"""CUDA graphs of all virtual ranks at once, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

NUM_WARMUP_REPLAYS = 10
# More than an SM ever runs at: a gate closes for at least as long as was asked.
_MAX_CYCLES_PER_SEC = 2.0e9
# PyTorch hands streams out of pools of this many, in turns.
_NUM_POOL_STREAMS = 32


@dataclass(frozen=True)
class Spread:
    """Of the replays, microseconds of one operation."""

    median_us: float
    p10_us: float
    p90_us: float

    @classmethod
    def of(cls, replay_us: list[float], num_ops: int = 1) -> Spread:
        """From replays of `num_ops` operations each."""
        ordered = sorted(us / num_ops for us in replay_us)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        )


def capture(branches: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph in which every branch runs beside the others, ordered in itself.

    Branches may wait for each other on the GPU: all are forked before any is captured, and nothing
    orders one before another. What they allocate lives in the graph's pool.
    """
    streams = _distinct_streams(len(branches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        fork = main.record_event()
        for stream in streams:
            stream.wait_event(fork)
        for branch, stream in zip(branches, streams, strict=True):
            with torch.cuda.stream(stream):
                branch()
        for stream in streams:
            main.wait_event(stream.record_event())
    return graph


def time_replays(
    graph: torch.cuda.CUDAGraph, num_repeats: int, prepare: Callable[[], object] | None = None
) -> list[float]:
    """Microseconds of each replay, by events before and behind it on the current stream.

    Args:
        prepare: queued before each replay, outside its events.
    """
    launch_secs = _warm_up(graph)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(num_repeats)
    ]
    for begin, end in events:
        close_gate(launch_secs)
        if prepare is not None:
            prepare()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in events]


def close_gate(launch_secs: float) -> None:
    """Holds the current stream up while the host queues what takes it `launch_secs` to launch. A
    graph of many nodes takes the host longer to launch than the GPU to run: behind a closed gate
    all is queued, events included, before the first of it happens."""
    torch.cuda._sleep(int((2 * launch_secs + 20e-6) * _MAX_CYCLES_PER_SEC))


def _warm_up(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds the host takes to launch the graph."""
    launch_secs = []
    for _ in range(NUM_WARMUP_REPLAYS):
        begin = time.perf_counter()
        graph.replay()
        launch_secs.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    return statistics.median(launch_secs)


def _distinct_streams(num_streams: int) -> list[torch.cuda.Stream]:
    """Two ranks on one stream would wait for each other for ever. A pool too small is followed by
    that of the next priority: kernels that are all resident at once do not compete."""
    streams: dict[int, torch.cuda.Stream] = {}
    for priority in (0, -1, -2):
        for _ in range(min(_NUM_POOL_STREAMS, num_streams - len(streams))):
            stream = torch.cuda.Stream(priority=priority)
            streams[stream.cuda_stream] = stream
    if len(streams) < num_streams:
        raise ValueError(f"{num_streams} ranks, expected at most {len(streams)}: a stream each")
    return list(streams.values())
