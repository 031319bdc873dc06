"""The handle of a normal dispatch of `deep_ep.Buffer` on CUDA tensors.

T tokens of this rank, R ranks, C tokens of a round, I rounds of the largest batch.
"""

from __future__ import annotations

from functools import cached_property

import torch

from ep_backend.deep_ep_base import BufferBase
from ep_backend.deep_ep_handle import NormalHandle
from ep_backend.normal_cuda_handles import CudaNormalDispatchHandle
from ep_backend.normal_handles import NormalDispatchHandle
from ep_backend.normal_network import NetworkNormalDispatchHandle


class CudaNormalHandle(NormalHandle):
    """Matrices are made on the GPU, on the stream that is current when they are asked for; nothing
    waits. Where all rows travelled at once, or the host does not know in how many rounds, there is
    one channel: I is 1."""

    _first: CudaNormalDispatchHandle

    @cached_property
    def rank_prefix_matrix(self) -> torch.Tensor:
        """`[R, R]` int32: in a rank's column, where the rows of each rank end in its `recv_x`."""
        return self._first.batch[:, 1:].cumsum(0, dtype=torch.int32)

    @cached_property
    def channel_prefix_matrix(self) -> torch.Tensor:
        num_own = len(self._first.round_begins) - 1
        num_rounds = self._first.num_rounds or 0
        ends = [min(i + 1, num_own) for i in range(num_rounds)] or [num_own]
        return torch.stack([self._first.round_begins[end] for end in ends], 1)

    @cached_property
    def recv_channel_prefix_matrix(self) -> torch.Tensor:
        num_ranks = self._first.buffer.group.num_ranks
        num_channels = max(1, self._first.num_rounds or 0)
        tokens = self._first.recv_src_tokens.long()
        counts = torch.zeros(num_ranks * num_channels, dtype=torch.int32, device=tokens.device)
        if num_channels > 1:
            ends = self.rank_prefix_matrix[:, self._first.buffer.group.self_rank].contiguous()
            rows = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
            src_ranks = torch.searchsorted(ends, rows, right=True)
            places = src_ranks * num_channels + tokens // self._num_per_channel
            counts.scatter_add_(0, places, torch.ones_like(rows))
        counts = counts.view(num_ranks, num_channels)
        return counts.cumsum(1, dtype=torch.int32) - counts if num_channels > 1 else counts

    @cached_property
    def send_head(self) -> torch.Tensor:
        handle, num_ranks = self._first, self._first.buffer.group.num_ranks
        device = handle.messages.device
        is_message = handle.messages >= 0
        # Messages that do not exist share a column behind the last rank.
        ranks = torch.where(is_message, handle.messages >> 32, num_ranks)
        places = (handle.messages & 0xFFFFFFFF).int()
        if handle.num_rounds:
            rounds = torch.arange(handle.num_tokens, device=device) // self._num_per_channel
            begins = torch.nn.functional.pad(handle.round_begins, (0, 1))
            places -= begins[rounds[:, None], ranks]
        shape = (handle.num_tokens, num_ranks + 1)
        heads = torch.full(shape, -1, dtype=torch.int32, device=device)
        return heads.scatter_(1, ranks, places)[:, :num_ranks].contiguous()

    @property
    def _num_per_channel(self) -> int:
        """C."""
        return self._first.buffer.num_tokens_per_round


class NetworkNormalHandle(CudaNormalHandle):
    """Of ranks on several nodes, who do not know each other's counts: in `rank_prefix_matrix` the
    columns of other ranks are -1."""

    _first: NetworkNormalDispatchHandle

    @cached_property
    def rank_prefix_matrix(self) -> torch.Tensor:
        counts, group = self._first.num_recv_tokens_per_rank, self._first.buffer.group
        matrix = counts.new_full((group.num_ranks, group.num_ranks), -1)
        matrix[:, group.self_rank] = counts.cumsum(0)
        return matrix

    @cached_property
    def channel_prefix_matrix(self) -> torch.Tensor:
        num_ranks = self._first.buffer.group.num_ranks
        sums = self._first.round_counts[:, :num_ranks].cumsum(0, dtype=torch.int32)
        sums = torch.nn.functional.pad(sums, (0, 0, 1, 0))
        num_own = len(sums) - 1
        ends = [min(i + 1, num_own) for i in range(self._first.num_rounds or 0)] or [num_own]
        return sums[ends].t().contiguous()

    @cached_property
    def is_token_in_rank(self) -> torch.Tensor:
        ranks = torch.arange(self._first.buffer.group.num_ranks, device=self._first.ranks.device)
        return (self._first.ranks[:, None] >> ranks & 1).bool()

    @cached_property
    def send_head(self) -> torch.Tensor:
        is_sent = self.is_token_in_rank
        columns = (is_sent.cumsum(1) - 1).clamp(min=0)
        slots = self._first.messages.gather(1, columns) & 0xFFFF
        return torch.where(is_sent, slots, -1)


def handle_of(
    owner: BufferBase,
    dispatch_handle: NormalDispatchHandle,
    topk_idx: torch.Tensor,
    num_worst_tokens: int,
) -> NormalHandle:
    """Of a dispatch on any device."""
    kind: type[NormalHandle] = NormalHandle
    if isinstance(dispatch_handle, NetworkNormalDispatchHandle):
        kind = NetworkNormalHandle
    elif isinstance(dispatch_handle, CudaNormalDispatchHandle):
        kind = CudaNormalHandle
    return kind(owner, dispatch_handle, topk_idx, num_worst_tokens)
