"""Where the rows of a dispatch of the normal CUDA kernels are.

T tokens of this rank, N rows received, H hidden, K top_k, R ranks, L experts of this rank, D =
min(K, R), the ranks that a token can go to, C tokens of a rank in a round, P rows that a rank has
room for.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ep_backend import _native
from ep_backend.checks import note_overwritten
from ep_backend.memory.cuda import tensor_at
from ep_backend.normal_handles import NormalDispatchHandle

if TYPE_CHECKING:
    from ep_backend.normal_cuda import CudaNormalBuffer

Rows = tuple[torch.Tensor, torch.Tensor | None]
"""`recv_x` and, of float8 rows, `recv_scales`."""


class SymmetricRows:
    """This rank's own rows in symmetric memory, as tensors; until the memory is given back."""

    def __init__(
        self, buffer: CudaNormalBuffer, layout: _native.NormalDeviceLayout, base: int
    ) -> None:
        num_rows, device = buffer.num_rows, buffer.device
        shape = (num_rows, buffer.hidden)
        self.received = tensor_at(base + layout.row(0), shape, buffer.dispatch_dtype, device)
        """`[P, H]`."""
        self.scales: torch.Tensor | None = None
        """`[P, W]`, see `NormalDispatchResult.recv_scales`."""
        if layout.num_scales > 0:
            dtype = torch.int32 if buffer.scale_format == "ue8m0" else torch.float32
            scales_shape = (num_rows, layout.num_scale_words)
            self.scales = tensor_at(base + layout.scales(0), scales_shape, dtype, device)
        self.combined = tensor_at(base + layout.combine_row(0), shape, buffer.dtype, device)
        """`[P, H]`: what combine takes."""
        self._begin, self._end = base, base + layout.num_bytes

    def input_of(self, x: torch.Tensor) -> _native.CombineInput:
        """Where combine finds `x`."""
        if x.data_ptr() == self.combined.data_ptr():
            return _native.CombineInput.COMBINE_ROWS
        if x.data_ptr() == self.received.data_ptr():
            return _native.CombineInput.RECEIVED_ROWS
        return _native.CombineInput.ELSEWHERE

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is in this memory, anywhere."""
        return self._begin <= tensor.data_ptr() < self._end

    def first(self, num_rows: int) -> Rows:
        """Views of the first received rows, which a dispatch has just been told to write."""
        note_overwritten(self.received, self.scales)
        return self.received[:num_rows], None if self.scales is None else self.scales[:num_rows]

    def like(self, num_rows: int) -> Rows:
        """New tensors for as many."""
        scales = None
        if self.scales is not None:
            scales = self.scales.new_empty((num_rows, self.scales.shape[1]))
        return self.received.new_empty((num_rows, self.received.shape[1])), scales


class CudaNormalDispatchHandle(NormalDispatchHandle):
    """As `NormalDispatchHandle`, but all of it is on the GPU: a captured dispatch fills it when it
    is replayed. `num_rounds` is 0 where every row has room, and unknown, None, where the host has
    not waited for counts.

    Attributes:
        expert_counts: `[L]` int32, rows that list each local expert.
        host_expert_counts: the same, where the host has waited for it, and for N and I; else None.
    """

    buffer: CudaNormalBuffer

    def __init__(self, buffer: CudaNormalBuffer, num_tokens: int) -> None:
        num_ranks, device = buffer.group.num_ranks, buffer.device
        self.buffer = buffer
        self.num_tokens = num_tokens
        self.host_expert_counts: list[int] | None = None
        self.num_rounds: int | None = None  # type: ignore[assignment]
        # All that routes a batch is one tensor: each takes the host ten microseconds.
        num_rounds = -(-num_tokens // buffer.num_tokens_per_round)
        self._batch_size = num_ranks * (1 + num_ranks)
        self._begins = 2 * num_tokens * buffer.num_columns
        self._counts_begin = self._begins + (num_rounds + 1) * num_ranks
        size = self._counts_begin + self._batch_size + buffer.num_local_experts
        # Zeros, where they are added up: a kernel that fails leaves them as they are.
        new = torch.zeros if buffer.counters.are_rows_counted else torch.empty
        self._words = new(size, dtype=torch.int32, device=device)
        base = self._words.data_ptr()
        self._routes = (num_tokens, base, base + 4 * self._begins, base + 4 * self._counts_begin)
        self.expert_counts = self._words[self._counts_begin + self._batch_size :]

    @cached_property
    def messages(self) -> torch.Tensor:  # type: ignore[override]
        """`[T, D]`: where each token went, ranks ascending, as `rank << 32 | number`, the number
        among this rank's rows for that one; -1 behind them."""
        words = self._words[: self._begins]
        return words.view(torch.int64).view(self.num_tokens, self.buffer.num_columns)

    @cached_property
    def round_begins(self) -> torch.Tensor:
        """`[ceil(T / C) + 1, R]`: of those numbers, where each round begins."""
        num_ranks = self.buffer.group.num_ranks
        return self._words[self._begins : self._counts_begin].view(-1, num_ranks)

    @cached_property
    def counts(self) -> torch.Tensor:
        """`[R * (1 + R) + L]`: `batch`, and rows that list each local expert."""
        return self._words[self._counts_begin :]

    @cached_property
    def batch(self) -> torch.Tensor:
        """`[R, 1 + R]`: of each source, its tokens, and its rows for each rank."""
        return self.counts[: self._batch_size].view(-1, 1 + self.buffer.group.num_ranks)

    @property
    def num_recv_tokens_per_rank(self) -> torch.Tensor:  # type: ignore[override]
        """`[R]` int32 on the GPU: rows from each rank; N is their sum."""
        return self.batch[:, 1 + self.buffer.group.self_rank]

    def take_counts(self, num_rows: int, num_rounds: int, expert_counts: list[int]) -> None:
        """What the host has waited for."""
        self.num_rows = num_rows
        self.num_rounds = num_rounds
        self.host_expert_counts = expert_counts

    def allocate(self, num_rows: int) -> None:
        """Takes memory for what comes with the rows."""
        buffer = self.buffer
        self.num_rows = num_rows
        shape = (num_rows, buffer.top_k)
        self.recv_topk_idx = torch.empty(shape, dtype=torch.int32, device=buffer.device)
        self.recv_topk_weights = torch.empty(shape, dtype=torch.float32, device=buffer.device)
        self.recv_src_tokens = torch.empty(num_rows, dtype=torch.int32, device=buffer.device)

    def may_need_rounds(self, num_rows_with_room: int) -> bool:
        """Whether this routing's rows may have no room; if they have none, they travel in rounds.

        Args:
            num_rows_with_room: P.
        """
        if self.num_rounds is not None:
            return self.num_rounds > 0
        return self.num_rows > num_rows_with_room

    def routes(self) -> tuple[int, ...]:  # type: ignore[override]
        """T, and addresses of `messages`, where rounds begin, and the counts of all ranks."""
        return self._routes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is on the GPU."""
        return (
            self._words,
            self.recv_topk_idx,
            self.recv_topk_weights,
            self.recv_src_tokens,
        )

    def beside_rows(self) -> tuple[int, int, int]:
        """Addresses of what `allocate` has taken."""
        return (
            self.recv_topk_idx.data_ptr(),
            self.recv_topk_weights.data_ptr(),
            self.recv_src_tokens.data_ptr(),
        )
