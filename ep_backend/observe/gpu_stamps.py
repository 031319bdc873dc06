"""When kernels ran on a GPU, by CUDA events, on the clock of the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ep_backend.observe.trace import Operation, TraceWriter

RESOLUTION_NS = 1000
"""Of an event, about half of that."""
NUM_PENDING = 64
"""Kernels whose events may be outstanding before the oldest are looked at."""


class GpuStamps:
    """Two events around each kernel; a few microseconds of the host. Captured kernels have none.

    An event knows its distance to another, in float32 milliseconds, not its time. So each is
    measured from the one before it, and the first from a moment at which the GPU was idle. Times
    are as exact as that moment: tens of microseconds.
    """

    def __init__(self, trace: TraceWriter, device: torch.device) -> None:
        self._trace = trace
        self._device = device
        self._pending: deque[tuple[str, int, Operation, torch.cuda.Event, torch.cuda.Event]] = (
            deque()
        )
        torch.cuda.synchronize(device)
        self._last = torch.cuda.Event(enable_timing=True)
        self._last.record(torch.cuda.current_stream(device))
        self._last.synchronize()
        self._last_ns = float(time.monotonic_ns())
        self._end_ns = 0

    @contextmanager
    def stamped(self, kind: str, num_tokens: int, operation: Operation) -> Iterator[None]:
        """Its body launches a kernel on the current stream."""
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pending.append((kind, num_tokens, operation, begin, end))
        while len(self._pending) > NUM_PENDING and self._pending[0][4].query():
            self._write_oldest()

    def close(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self._device)
        while self._pending:
            self._write_oldest()

    def _write_oldest(self) -> None:
        kind, num_tokens, operation, begin, end = self._pending.popleft()
        self._last_ns += self._last.elapsed_time(begin) * 1e6
        self._last = begin
        begin_ns = int(self._last_ns)
        end_ns = int(self._last_ns + begin.elapsed_time(end) * 1e6)
        if 0 < self._end_ns - begin_ns < RESOLUTION_NS:
            begin_ns = self._end_ns  # kernels of a stream follow each other
        self._end_ns = end_ns = max(begin_ns, end_ns)
        duration_ns = end_ns - begin_ns
        self._trace.add(kind, num_tokens, begin_ns, duration_ns, operation=operation, on_gpu=True)
