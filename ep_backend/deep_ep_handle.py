"""Handles of `deep_ep.Buffer`: what combine needs, and what DeepEP's handles would say.

M num_max_dispatch_tokens_per_rank, H hidden, K top_k, E experts, R ranks, L experts of this rank,
S = R * M rows an expert can receive; of the normal half T tokens of this rank, N rows received, I
rounds of the largest batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ep_backend.errors import OrderError
from ep_backend.handles import DispatchHandle
from ep_backend.normal_handles import NormalDispatchHandle

if TYPE_CHECKING:
    from ep_backend.deep_ep_base import BufferBase
    from ep_backend.normal import NormalBuffer


class TupleHandle(Sequence[Any]):
    """To index and to unpack it is DeepEP's tuple; what combine does not read is made when it is
    asked for."""

    _FIELDS: tuple[str, ...]

    def __len__(self) -> int:
        return len(self._FIELDS)

    def __getitem__(self, index: Any) -> Any:
        names = self._FIELDS[index]
        if isinstance(names, tuple):
            return tuple(getattr(self, name) for name in names)
        return getattr(self, names)


class LowLatencyHandle(TupleHandle):
    """What combine needs of a dispatch. DeepEP's tuple `(src_info, layout_range, M, H, E)`.

    Attributes:
        dispatch_handle: ours.
        topk_weights: those that dispatch was given, or None.
    """

    _FIELDS = ("src_info", "layout_range", "num_max_tokens_per_rank", "hidden", "num_experts")

    def __init__(
        self, owner: BufferBase, dispatch_handle: DispatchHandle, topk_weights: torch.Tensor | None
    ) -> None:
        self.owner = owner
        self.dispatch_handle = dispatch_handle
        self.topk_weights = topk_weights

    @property
    def num_max_tokens_per_rank(self) -> int:
        return self.dispatch_handle.buffer.num_max_tokens_per_rank

    @property
    def hidden(self) -> int:
        return self.dispatch_handle.buffer.hidden

    @property
    def num_experts(self) -> int:
        return self.dispatch_handle.buffer.num_experts

    @property
    def src_info(self) -> torch.Tensor:
        """`[L, S]` int32: the token, on its source rank, that each row is of; -1 behind the counts.

        Raises:
            OrderError: the dispatch hook has not been called.
        """
        return self._origins[0]

    @property
    def layout_range(self) -> torch.Tensor:
        """`[L, R]` int64: first row << 32 | number of rows that an expert got from a rank.

        Raises:
            OrderError: the dispatch hook has not been called.
        """
        return self._origins[1]

    @cached_property
    def _origins(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.dispatch_handle.is_received:
            raise OrderError(
                "src_info and layout_range were read before the dispatch hook was called. Call "
                "that hook first."
            )
        return _origins_of(self.dispatch_handle)


def _origins_of(handle: DispatchHandle) -> tuple[torch.Tensor, torch.Tensor]:
    """`src_info` and `layout_range` of a received dispatch. Does not wait for a GPU."""
    buffer = handle.buffer
    num_local, capacity = buffer.num_local_experts, buffer.expert_capacity
    num_ranks, device = buffer.group.num_ranks, buffer.device
    num_rows = num_local * capacity
    ends = handle.num_messages.cumsum(0)
    idx = torch.arange(capacity, device=device)
    src_ranks = torch.searchsorted(ends, idx, right=True)  # R behind the last message
    tokens, _, first_entries, num_entries = handle.messages.long().unbind(1)

    # [S, K]: the row of each message's k-th entry; rows that do not exist share one at the end.
    k = torch.arange(buffer.top_k, device=device)
    is_entry = (k < num_entries[:, None]) & (src_ranks < num_ranks)[:, None]
    entries = torch.where(is_entry, first_entries[:, None] + k, 0)
    rows = torch.where(is_entry, handle.entries[:, 0].long()[entries], num_rows)

    def by_row(values: torch.Tensor, nothing: int) -> torch.Tensor:
        out = torch.full((num_rows + 1,), nothing, device=device)
        # An expert that a token lists twice has one row: both entries write the same there.
        out[rows] = values[:, None].expand(rows.shape)
        return out[:-1].view(num_local, capacity)

    # Counted by row, not by entry, for the same reason.
    of_rank = by_row(src_ranks, num_ranks)
    counts = torch.zeros((num_local, num_ranks + 1), dtype=torch.int64, device=device)
    counts = counts.scatter_add_(1, of_rank, torch.ones_like(of_rank))[:, :num_ranks]
    begins = counts.cumsum(1) - counts
    return by_row(tokens, -1).int(), begins << 32 | counts


class NormalHandle(TupleHandle):
    """What a combine or a later dispatch needs of a normal dispatch. DeepEP's tuple
    `(rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx,
    is_token_in_rank, send_head)`; what DeepEP calls a channel is a round here.

    Attributes:
        num_worst_tokens: that dispatch was given.
        topk_idx: where its tokens went, a copy.
    """

    _FIELDS = (
        "rank_prefix_matrix",
        "channel_prefix_matrix",
        "recv_channel_prefix_matrix",
        "recv_src_idx",
        "is_token_in_rank",
        "send_head",
    )

    def __init__(
        self,
        owner: BufferBase,
        dispatch_handle: NormalDispatchHandle,
        topk_idx: torch.Tensor,
        num_worst_tokens: int,
    ) -> None:
        self.owner = owner
        self.num_worst_tokens = num_worst_tokens
        self.topk_idx = topk_idx
        self._first = dispatch_handle
        self._by_buffer = {dispatch_handle.buffer: dispatch_handle}

    def of_buffer(self, buffer: NormalBuffer) -> NormalDispatchHandle | None:
        """The handle for this buffer; None: rows have not been dispatched with it yet."""
        return self._by_buffer.get(buffer)

    def add(self, dispatch_handle: NormalDispatchHandle) -> None:
        """Of a dispatch of the same routing with another buffer."""
        self._by_buffer[dispatch_handle.buffer] = dispatch_handle

    def of_dtype(self, dtype: torch.dtype) -> NormalDispatchHandle:
        """For a combine of rows of this dtype.

        Raises:
            ValueError: the dispatched rows were of another.
        """
        for buffer, dispatch_handle in self._by_buffer.items():
            if buffer.dtype == dtype:
                return dispatch_handle
        expected = " or ".join(str(buffer.dtype) for buffer in self._by_buffer)
        raise ValueError(
            f"x has dtype {dtype}, expected {expected}: the dtype that was dispatched, or bfloat16 "
            "where that was float8."
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that a later call reads on a GPU."""
        handles = self._by_buffer.values()
        return (self.topk_idx, *(tensor for handle in handles for tensor in handle.tensors()))

    @property
    def num_experts(self) -> int:
        return self._first.buffer.num_experts

    @cached_property
    def rank_prefix_matrix(self) -> torch.Tensor:
        """`[R, R]` int32. In this rank's column, where the rows of each rank end in `recv_x`; this
        rank does not know the others, which are -1."""
        num_ranks = self._first.buffer.group.num_ranks
        matrix = torch.full((num_ranks, num_ranks), -1, dtype=torch.int32, device="cpu")
        matrix[:, self._first.buffer.group.self_rank] = self._first.num_recv_tokens_per_rank.cumsum(
            0
        )
        return matrix

    @cached_property
    def channel_prefix_matrix(self) -> torch.Tensor:
        """`[R, I]` int32: rows sent to each rank until the end of each round."""
        num_per_round = self._first.buffer.num_tokens_per_round
        sums = torch.nn.functional.pad(self.is_token_in_rank.cumsum(0), (0, 0, 1, 0))
        ends = (torch.arange(self._first.num_rounds, device="cpu") + 1) * num_per_round
        return sums[ends.clamp(max=self._first.num_tokens)].t().int().contiguous()

    @cached_property
    def recv_channel_prefix_matrix(self) -> torch.Tensor:
        """`[R, I]` int32: rows that came from each rank before each round."""
        per_round = self._first.per_round.t()
        return (per_round.cumsum(1) - per_round).int().contiguous()

    @property
    def recv_src_idx(self) -> torch.Tensor:
        """`[N]` int32: the token, on its source rank, that each row is of. Rows behind N: -1."""
        return self._first.recv_src_tokens

    @cached_property
    def is_token_in_rank(self) -> torch.Tensor:
        """`[T, R]` bool."""
        return self.send_head >= 0

    @cached_property
    def send_head(self) -> torch.Tensor:
        """`[T, R]` int32: the place of a token's row among those to that rank in its round; -1:
        none went there."""
        handle, num_ranks = self._first, self._first.buffer.group.num_ranks
        is_message = (
            torch.arange(handle.messages.shape[1], device="cpu") < handle.num_messages[:, None]
        )
        # Messages that do not exist share a column behind the last rank.
        ranks = torch.where(is_message, handle.messages >> 16, num_ranks).long()
        shape = (handle.num_tokens, num_ranks + 1)
        places = torch.full(shape, -1, dtype=torch.int32, device="cpu")
        places.scatter_(1, ranks, handle.messages & 0xFFFF)
        return places[:, :num_ranks].contiguous()
