"""Prometheus metrics of this process's ranks: where they are exported, and when they are read.

    EP_BACKEND_METRICS_PORT=9400     rank r answers http://HOST:(9400 + r)/metrics; every scrape
                                     reads the native counters
    PROMETHEUS_MULTIPROC_DIR=DIR     (set by an engine with several processes, or by its user)
                                     counters are copied there once a second, and the engine's own
                                     /metrics shows them beside its metrics

Neither set: nothing runs, and prometheus_client is not imported. `counts.METRICS` lists the
metrics.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ep_backend.observe.counts import (
    BUCKET_LIMITS_SECS,
    METRICS,
    Counts,
    Metric,
    ProcessCounts,
    cumulative,
)

PORT_VARIABLE = "EP_BACKEND_METRICS_PORT"
DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
INTERVAL_SECS = 1.0
"""Between two copies to the engine's registry."""


def are_wanted() -> bool:
    """The environment asks for metrics."""
    return bool(os.environ.get(PORT_VARIABLE) or os.environ.get(DIRECTORY_VARIABLE))


class Exporter:
    """Shows the process's counts wherever the environment asks for them."""

    _instance: ClassVar[Exporter | None] = None
    _lock = threading.Lock()

    def __init__(self, port: int | None, directory: str | None) -> None:
        """Raises:
        OSError: the port cannot be listened on.
        """
        self.counts = ProcessCounts.get()
        self.port = port
        self._server: Any = None
        self._publisher: Publisher | None = None
        if port is not None:
            from prometheus_client import CollectorRegistry, start_http_server

            registry = CollectorRegistry()
            registry.register(Collector(self.counts))
            self._server, _ = start_http_server(port, registry=registry)
        if directory:
            self._publisher = Publisher(self.counts, Path(directory))
            self._publisher.start()

    @classmethod
    def from_env(cls, rank: int) -> Exporter | None:
        """The process's exporter, started at the first call; None where no metrics are asked for.

        Args:
            rank: of the process; the first caller's counts.

        Raises:
            ValueError: the port is no number, something else listens there, or prometheus_client
                is not installed.
        """
        if not are_wanted():
            return None
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls._start(rank)
            return cls._instance

    @classmethod
    def _start(cls, rank: int) -> Exporter | None:
        text, directory = os.environ.get(PORT_VARIABLE), os.environ.get(DIRECTORY_VARIABLE)
        if importlib.util.find_spec("prometheus_client") is None:
            if not text:
                return None  # the directory is another program's: no engine here could read it
            raise ValueError(
                f"{PORT_VARIABLE} is {text}, but prometheus_client is not installed. Install "
                "ep_backend[metrics], or unset the variable."
            )
        port = None
        if text:
            if not text.isdigit() or not 1 <= int(text) + rank <= 65535:
                raise ValueError(
                    f"{PORT_VARIABLE} is {text!r}, expected a port: rank r listens on that + r, "
                    f"at most 65535; this is rank {rank}."
                )
            port = int(text) + rank
        try:
            return cls(port, directory)
        except OSError as e:
            raise ValueError(
                f"{PORT_VARIABLE} is {text}: rank {rank} cannot listen on port {port} ({e}). Every "
                "rank of the host needs that + its rank; choose ports that are free."
            ) from e

    def stop(self) -> None:
        """For tests: a process starts one and keeps it."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._publisher is not None:
            self._publisher.stop()
        with Exporter._lock:
            if Exporter._instance is self:
                Exporter._instance = None


class Collector:
    """Of prometheus_client's kind: reads the counters when it is asked."""

    def __init__(self, counts: ProcessCounts) -> None:
        self._counts = counts

    def describe(self) -> list[Any]:
        return []  # so that nothing is read at registration

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        counts = self._counts.read()
        for metric in METRICS:
            if metric.is_histogram:
                histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, buckets in counts.buckets[metric].items():
                    limits = (*map(repr, BUCKET_LIMITS_SECS), "+Inf")
                    pairs = list(zip(limits, cumulative(buckets), strict=True))
                    histogram.add_metric(labels, pairs, counts.sums[metric][labels])
                yield histogram
            else:
                counter = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, value in counts.counters[metric].items():
                    counter.add_metric(labels, value)
                yield counter


class Publisher:
    """Copies the counters to the files that prometheus_client's multi-process registry reads.

    Its own counters write there on every increment, under a lock; these are written by a thread,
    so that an operation costs nothing.
    """

    def __init__(self, counts: ProcessCounts, directory: Path) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        self._counts = counts
        directory.mkdir(parents=True, exist_ok=True)
        # The registry takes the type of the values from the name up to the first "_".
        name = f"ep-backend-{os.getpid()}.db"
        self._files = {
            is_histogram: MmapedDict(str(directory / f"{kind}_{name}"))
            for is_histogram, kind in ((False, "counter"), (True, "histogram"))
        }
        self._keys: dict[tuple[Metric, str, tuple[str, ...], str], str] = {}
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ep_backend metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Copies once more."""
        self._is_stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopping.wait(INTERVAL_SECS):
            self.publish(self._counts.read())
        self.publish(self._counts.read())

    def publish(self, counts: Counts) -> None:
        for metric, by_labels in counts.counters.items():
            for labels, value in by_labels.items():
                self._write(metric, f"{metric.name}_total", labels, value)
        limits = (*map(repr, BUCKET_LIMITS_SECS), "+Inf")
        for metric, buckets_by_labels in counts.buckets.items():
            for labels, buckets in buckets_by_labels.items():
                self._write(metric, f"{metric.name}_sum", labels, counts.sums[metric][labels])
                for limit, count in zip(limits, buckets, strict=True):
                    self._write(metric, f"{metric.name}_bucket", labels, count, limit)

    def _write(
        self, metric: Metric, name: str, labels: tuple[str, ...], value: float, limit: str = ""
    ) -> None:
        place = (metric, name, labels, limit)
        key = self._keys.get(place)
        if key is None:
            from prometheus_client.mmap_dict import mmap_key

            names, values = list(metric.labels), list(labels)
            if limit:
                names, values = [*names, "le"], [*values, limit]
            key = self._keys[place] = mmap_key(metric.name, name, names, values, metric.help)
        self._files[metric.is_histogram].write_value(key, float(value), 0.0)
