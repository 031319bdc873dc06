"""What the normal kernels of one rank have done on a GPU: operations, and, where metrics are asked
for, tokens, rows and bytes.

R ranks, L experts of this rank. Kernels leave the counts of all ranks in a dispatch's handle; an
addition behind each operation, a microsecond or two of the GPU, keeps their sums there. It is
captured with the operation, so replays are counted, too.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ep_backend import _native
from ep_backend.handles import KernelStatistics, OpCounters
from ep_backend.observe import metrics

if TYPE_CHECKING:
    from ep_backend.normal_cuda import CudaNormalBuffer
    from ep_backend.normal_cuda_handles import CudaNormalDispatchHandle


class CudaNormalCounters:
    """
    Args:
        epochs: address of how many dispatches, and combines, the kernels have completed.
        dispatch_row_bytes: of a row and its scales.
        has_all_counts: a dispatch's handle has the counts of all ranks; else only operations are
            counted.
    """

    def __init__(
        self,
        buffer: CudaNormalBuffer,
        epochs: int,
        dispatch_row_bytes: int,
        has_all_counts: bool = True,
    ) -> None:
        num_ranks = buffer.group.num_ranks
        self._rank = buffer.group.self_rank
        self._shape = (num_ranks, 1 + num_ranks)
        self._num_local_experts = buffer.num_local_experts
        self._row_bytes = (dispatch_row_bytes, buffer.hidden * buffer.dtype.itemsize)
        self._epochs = epochs
        self._device = buffer.device
        with torch.cuda.device(buffer.device):
            self._reader = _native.CudaCounterReader()
        self._dispatched: torch.Tensor | None = None
        self._combined: torch.Tensor | None = None
        if metrics.are_wanted() and has_all_counts:
            num_counts = num_ranks * (1 + num_ranks)
            size = num_counts + buffer.num_local_experts
            self._dispatched = torch.zeros(size, dtype=torch.int64, device=buffer.device)
            self._combined = torch.zeros(num_counts, dtype=torch.int64, device=buffer.device)
            torch.cuda.synchronize(buffer.device)  # operations may come on any stream
        self._waited = OpCounters(0, 0, 0, 0)
        self._num_in_bucket = [0] * (len(_native.BUCKET_LIMITS_NS) + 1)

    @property
    def are_rows_counted(self) -> bool:
        return self._dispatched is not None

    def dispatched(self, handle: CudaNormalDispatchHandle, is_cached: bool) -> None:
        """Behind a dispatch, on its stream."""
        if self._dispatched is None:
            return
        if is_cached:
            counts = handle.batch.flatten()
            self._dispatched[: len(counts)].add_(counts)
        else:
            self._dispatched.add_(handle.counts)

    def combined(self, handle: CudaNormalDispatchHandle) -> None:
        """Behind a combine, on its stream."""
        if self._combined is not None:
            self._combined.add_(handle.batch.flatten())

    @contextmanager
    def waiting(self, num_tokens: int) -> Iterator[None]:
        """Its body waits for the sizes of a dispatch of so many tokens."""
        begin_ns = time.monotonic_ns()
        yield
        ns = time.monotonic_ns() - begin_ns
        before = self._waited
        self._waited = OpCounters(
            before.num_ops + 1,
            before.num_rows + num_tokens,
            before.total_ns + ns,
            before.wait_ns + ns,
        )
        self._num_in_bucket[bisect.bisect_left(_native.BUCKET_LIMITS_NS, ns)] += 1

    def statistics(self) -> KernelStatistics:
        """As counted so far; waits for no kernel."""
        # The thread that exports metrics has another current device, where CUDA would take memory.
        with torch.cuda.device(self._device):
            dispatches, combines = self._reader.read(self._epochs, 2)
            tokens, expert_rows, sent_bytes = self._rows()
        waited = self._waited
        return KernelStatistics(
            num_ops={
                "normal_counts": waited.num_ops,
                "normal_dispatch": dispatches,
                "normal_combine": combines,
            },
            wait_ns={},
            num_expert_rows=expert_rows,
            counters={"normal_counts": waited},
            sent_bytes=sent_bytes,
            num_in_bucket={"normal_counts": list(self._num_in_bucket)},
            num_tokens=tokens,
        )

    def _rows(self) -> tuple[int | None, list[int], dict[str, list[int]]]:
        """Tokens dispatched, rows of each local expert, and bytes sent to each rank by operation;
        nothing where they are not counted."""
        if self._dispatched is None or self._combined is None:
            return None, [], {}
        num_ranks, num_columns = self._shape
        counts = self._reader.read(self._dispatched.data_ptr(), self._dispatched.numel())
        rows = [counts[r * num_columns :][:num_columns] for r in range(num_ranks)]
        home = self._reader.read(self._combined.data_ptr(), self._combined.numel())
        of_dispatch, of_combine = self._row_bytes
        sent_bytes = {
            "normal_dispatch": [n * of_dispatch for n in rows[self._rank][1:]],
            "normal_combine": [n * of_combine for n in home[1 + self._rank :: num_columns]],
        }
        return rows[self._rank][0], counts[num_ranks * num_columns :], sent_bytes
