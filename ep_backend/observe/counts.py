"""What this process's buffers have counted, under the names that Prometheus gets.

Nothing is counted here while operations run: native kernels keep the numbers, and a scrape asks for
them. Names, labels and meanings are in `METRICS`.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ep_backend import _native
from ep_backend.errors import PeerTimeout
from ep_backend.handles import KernelStatistics

NS = 1e-9
BUCKET_LIMITS_SECS = tuple(limit * NS for limit in _native.BUCKET_LIMITS_NS)


@dataclass(frozen=True)
class Metric:
    """One metric; its name as Prometheus shows it, without `_total`, `_bucket`, .."""

    name: str
    labels: tuple[str, ...]
    help: str
    is_histogram: bool = False

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of its time series."""
        if self.is_histogram:
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (f"{self.name}_total",)


OPERATIONS = Metric(
    "ep_backend_operations",
    ("rank", "op"),
    "Operations completed; on CUDA, replays of a captured graph are counted, too.",
)
TOKENS = Metric(
    "ep_backend_tokens",
    ("rank",),
    "Tokens that this rank gave to dispatch. CPU; on CUDA, normal kernels.",
)
OP_SECONDS = Metric(
    "ep_backend_op_seconds",
    ("rank", "op"),
    "Time inside a send or a hook, waits for peers included. CPU; on CUDA, normal_counts: how long "
    "the host waited for the sizes of a dispatch.",
    is_histogram=True,
)
WAIT_SECONDS = Metric(
    "ep_backend_wait_seconds",
    ("rank", "op", "peer"),
    "Time that this rank waited for a peer: for its credit before a send, for its data in a hook.",
)
SENT_BYTES = Metric(
    "ep_backend_sent_bytes",
    ("rank", "op", "peer", "link"),
    "Bytes of rows and their scales that went to a peer, by the link that joins the two. CPU; on "
    "CUDA, normal kernels.",
)
EXPERT_ROWS = Metric(
    "ep_backend_expert_rows",
    ("rank", "expert"),
    "Rows received for an expert, by its global number. Those in rank-major workspaces on CUDA are "
    "not counted.",
)
TIMEOUTS = Metric(
    "ep_backend_timeouts", ("rank", "op", "peer"), "Waits for a peer that were given up."
)
FORWARDS = Metric("ep_backend_forwards", ("rank",), "The engine's forward passes. vLLM on a CPU.")
FORWARD_SECONDS = Metric(
    "ep_backend_forward_seconds", ("rank",), "Time in the engine's forward passes. vLLM on a CPU."
)
METRICS = (
    OPERATIONS,
    TOKENS,
    OP_SECONDS,
    WAIT_SECONDS,
    SENT_BYTES,
    EXPERT_ROWS,
    TIMEOUTS,
    FORWARDS,
    FORWARD_SECONDS,
)

LabelValues = tuple[str, ...]


@dataclass
class Counts:
    """Values of all metrics at one moment; they only grow."""

    counters: dict[Metric, dict[LabelValues, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    sums: dict[Metric, dict[LabelValues, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    """Of histograms."""
    buckets: dict[Metric, dict[LabelValues, list[int]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """Of histograms: observations up to each limit without those before it, then larger ones."""

    def add(self, metric: Metric, labels: LabelValues, value: float) -> None:
        self.counters[metric][labels] += value

    def add_histogram(
        self, metric: Metric, labels: LabelValues, total: float, buckets: list[int]
    ) -> None:
        self.sums[metric][labels] += total
        before = self.buckets[metric].get(labels)
        if before is not None:
            buckets = [a + b for a, b in zip(before, buckets, strict=True)]
        self.buckets[metric][labels] = buckets

    def merge(self, other: Counts) -> None:
        """Adds the other's values to these."""
        for metric, by_labels in other.counters.items():
            for labels, value in by_labels.items():
                self.add(metric, labels, value)
        for metric, buckets_by_labels in other.buckets.items():
            for labels, buckets in buckets_by_labels.items():
                self.add_histogram(metric, labels, other.sums[metric][labels], buckets)


@dataclass(eq=False)
class Source:
    """One buffer.

    Attributes:
        rank: whose numbers they are.
        link: how this rank is joined to others of its node: "shm" or "p2p".
        first_expert: the global number of this rank's first expert.
        statistics: reads the native kernels' counters.
    """

    rank: int
    link: str
    first_expert: int
    statistics: Callable[[], KernelStatistics]
    ranks_of_node: range | None = None
    """With which it shares memory; to others the link is "rdma". None: all."""

    def link_to(self, peer: int) -> str:
        if peer == self.rank:
            return "self"
        if self.ranks_of_node is not None and peer not in self.ranks_of_node:
            return "rdma"
        return self.link

    def counts(self) -> Counts:
        counted = self.statistics()
        counts = Counts()
        rank = str(self.rank)
        for op, num_ops in counted.num_ops.items():
            counts.add(OPERATIONS, (rank, op), num_ops)
        for op, of_peers in counted.wait_ns.items():
            for peer, wait_ns in enumerate(of_peers):
                counts.add(WAIT_SECONDS, (rank, op, str(peer)), wait_ns * NS)
        for op, of_peers in counted.sent_bytes.items():
            for peer, num_bytes in enumerate(of_peers):
                if num_bytes > 0:  # hooks send nothing, but for those that forward
                    labels = (rank, op, str(peer), self.link_to(peer))
                    counts.add(SENT_BYTES, labels, num_bytes)
        for expert, num_rows in enumerate(counted.num_expert_rows, self.first_expert):
            counts.add(EXPERT_ROWS, (rank, str(expert)), num_rows)
        if counted.num_tokens is not None:
            counts.add(TOKENS, (rank,), counted.num_tokens)
        for op, counters in counted.counters.items():
            counts.add_histogram(
                OP_SECONDS, (rank, op), counters.total_ns * NS, counted.num_in_bucket[op]
            )
        return counts


class ProcessCounts:
    """All that this process has counted, buffers that are closed by now included. Thread-safe."""

    _instance: ClassVar[ProcessCounts | None] = None
    _instance_lock = threading.Lock()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: list[Source] = []
        self._closed = Counts()
        self._rank = ""

    @classmethod
    def get(cls) -> ProcessCounts:
        with cls._instance_lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def add(self, source: Source) -> None:
        with self._lock:
            self._sources.append(source)
            self._rank = self._rank or str(source.rank)

    def close(self, source: Source) -> None:
        """Reads it for the last time."""
        with self._lock:
            self._sources.remove(source)
            self._closed.merge(source.counts())

    def count_timeout(self, error: PeerTimeout) -> None:
        record = error.record
        labels = (
            str(record["self_rank"]),
            f"{record['phase']}_{record['half']}",
            str(record["peer_rank"]),
        )
        with self._lock:
            self._closed.add(TIMEOUTS, labels, 1)

    def count_forward(self, duration_ns: int) -> None:
        """A forward pass of the engine; its rank is that of the process's first buffer."""
        with self._lock:
            if self._rank:  # before that it is no step of a model of ours
                self._closed.add(FORWARDS, (self._rank,), 1)
                self._closed.add(FORWARD_SECONDS, (self._rank,), duration_ns * NS)

    def read(self) -> Counts:
        counts = Counts()
        with self._lock:
            counts.merge(self._closed)
            for source in self._sources:
                counts.merge(source.counts())
        return counts


def cumulative(buckets: list[int]) -> Iterator[int]:
    """As Prometheus wants them: each with those before it."""
    total = 0
    for count in buckets:
        total += count
        yield total
