"""What one buffer shows of itself, where it is asked to: its trace, and its counters as metrics."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from ep_backend import _native
from ep_backend.errors import PeerTimeout
from ep_backend.group import Group
from ep_backend.handles import KernelStatistics
from ep_backend.observe.counts import ProcessCounts, Source
from ep_backend.observe.gpu_stamps import GpuStamps
from ep_backend.observe.metrics import Exporter
from ep_backend.observe.trace import Operation, TraceWriter


class BufferObserver:
    """Of one buffer, which tells it what it does.

    Args:
        first_expert: the global number of the rank's first expert.
        statistics: reads the native kernels' counters, waiting for nothing; None: they have none.

    Attributes:
        trace: where spans go; None: nowhere.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        first_expert: int,
        statistics: Callable[[], KernelStatistics] | None,
    ) -> None:
        self.trace = TraceWriter.from_env(f"rank{group.self_rank}")
        self._rank = group.self_rank
        self._source: Source | None = None
        if statistics is not None and Exporter.from_env(_process_rank(group)) is not None:
            link = "p2p" if device.type == "cuda" else "shm"
            self._source = Source(
                group.self_rank, link, first_expert, statistics, group.ranks_of_node
            )
            ProcessCounts.get().add(self._source)
        self._gpu: GpuStamps | None = None
        if self.trace is not None:
            self._buffer = self.trace.open_buffer(group.self_rank)
            if device.type == "cuda":
                self._gpu = GpuStamps(self.trace, device)
        self._num_ops: dict[str, int] = defaultdict(int)

    def traced(
        self, kind: str, num_tokens: int, run: Callable[[], _native.OpResult]
    ) -> _native.OpResult:
        """Runs a kernel and records it: the time of the call, and on a GPU, where nothing is being
        captured, also that of the kernel. One that has failed, and so has had no effect, is not an
        operation."""
        assert self.trace is not None
        # Operations of a kind follow each other, on every rank in the same order.
        operation = Operation(self._rank, self._buffer, self._num_ops[kind] + 1)
        begin_ns = time.monotonic_ns()
        if self._gpu is None:
            result = run()
        else:
            with self._gpu.stamped(kind, num_tokens, operation):
                result = run()
        duration_ns = time.monotonic_ns() - begin_ns
        if result.ok:
            self._num_ops[kind] += 1
            self.trace.add(kind, num_tokens, begin_ns, duration_ns, result.wait_ns, operation)
        return result

    def failed(self, error: Exception) -> None:
        """The buffer has just failed, once and for all."""
        if self._source is not None and isinstance(error, PeerTimeout):
            ProcessCounts.get().count_timeout(error)

    def close(self) -> None:
        """The buffer is being closed."""
        # A GPU that has failed has nothing to tell; the buffer is closed all the same.
        with contextlib.suppress(RuntimeError):
            if self._source is not None:
                ProcessCounts.get().close(self._source)
            if self._gpu is not None:
                self._gpu.close()
        if self.trace is not None:
            self.trace.close_buffer()


def start_exporter(group: Group) -> None:
    """Before anything is set up, so that what is wrong with it is found early. Raises
    `ValueError`, see `Exporter.from_env`."""
    Exporter.from_env(_process_rank(group))


def _process_rank(group: Group) -> int:
    """Virtual ranks share a process."""
    return 0 if group.is_virtual else group.self_rank
