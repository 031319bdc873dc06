"""A ring of timed spans in a file that other processes may read while it is written.

With `EP_BACKEND_TRACE_DIR` set, every process of an engine writes one file there: the buffer
records its sends and hooks, an engine's adapter its own spans. Without it nothing is recorded.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

TRACE_DIR_VARIABLE = "EP_BACKEND_TRACE_DIR"
CAPACITY = 1 << 16
"""Spans kept; older ones are overwritten."""

RECORD = np.dtype(
    [
        ("kind", "S24"),
        ("num_tokens", "<u8"),
        ("begin_ns", "<u8"),  # CLOCK_MONOTONIC, the same for all processes of a host
        ("duration_ns", "<u8"),
        ("wait_ns", "<u8"),
    ]
)


@dataclass
class Span:
    """A span being recorded; whoever measures the wait for peers fills it in."""

    wait_ns: int = 0


class TraceWriter:
    """Writes spans of one process. Threads may share it."""

    _writers: ClassVar[dict[Path, TraceWriter]] = {}
    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        """Creates `path`, which must not exist."""
        with path.open("xb") as file:
            file.truncate(8 + CAPACITY * RECORD.itemsize)
        self._num_written = np.memmap(path, dtype="<u8", mode="r+", shape=(1,))
        self._ring = np.memmap(path, dtype=RECORD, mode="r+", offset=8, shape=(CAPACITY,))

    @classmethod
    def from_env(cls, name: str) -> TraceWriter | None:
        """The process's writer, or None where no trace is asked for.

        Args:
            name: of the file, beside the process id; the first caller's counts.
        """
        directory = os.environ.get(TRACE_DIR_VARIABLE)
        if not directory:
            return None
        with cls._lock:
            key = Path(directory, str(os.getpid()))
            if key not in cls._writers:
                cls._writers[key] = cls(Path(directory, f"{name}-{os.getpid()}.trace"))
            return cls._writers[key]

    @contextmanager
    def span(self, kind: str, num_tokens: int) -> Iterator[Span]:
        """Records the time its body takes; nothing when the body raises."""
        span = Span()
        begin_ns = time.monotonic_ns()
        yield span
        self.add(kind, num_tokens, begin_ns, time.monotonic_ns() - begin_ns, span.wait_ns)

    def add(
        self, kind: str, num_tokens: int, begin_ns: int, duration_ns: int, wait_ns: int = 0
    ) -> None:
        """Records a span that the caller has timed."""
        with self._lock:
            written = int(self._num_written[0])
            self._ring[written % CAPACITY] = (kind, num_tokens, begin_ns, duration_ns, wait_ns)
            self._num_written[0] = written + 1


def read_trace(path: Path) -> np.ndarray:
    """The spans in a file, oldest first, as a structured array of `RECORD`."""
    num_written = int(np.fromfile(path, dtype="<u8", count=1)[0])
    ring = np.fromfile(path, dtype=RECORD, offset=8)
    if num_written <= CAPACITY:
        return ring[:num_written]
    return np.roll(ring, -(num_written % CAPACITY))
