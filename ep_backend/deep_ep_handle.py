"""The handle of `deep_ep.Buffer`: what combine needs, and what DeepEP's handle would say.

M num_max_dispatch_tokens_per_rank, H hidden, K top_k, E experts, R ranks, L experts of this rank,
S = R * M rows an expert can receive.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ep_backend.errors import OrderError
from ep_backend.handles import DispatchHandle

if TYPE_CHECKING:
    from ep_backend.deep_ep import Buffer


class LowLatencyHandle(Sequence[Any]):
    """What combine needs of a dispatch. To index and to unpack it is DeepEP's tuple `(src_info,
    layout_range, M, H, E)`; the first two are made when they are asked for, since combine does not
    read them.

    Attributes:
        dispatch_handle: ours.
        topk_weights: those that dispatch was given, or None.
    """

    _FIELDS = ("src_info", "layout_range", "num_max_tokens_per_rank", "hidden", "num_experts")

    def __init__(
        self, owner: Buffer, dispatch_handle: DispatchHandle, topk_weights: torch.Tensor | None
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

    def __len__(self) -> int:
        return len(self._FIELDS)

    def __getitem__(self, index: Any) -> Any:
        names = self._FIELDS[index]
        if isinstance(index, slice):
            return tuple(getattr(self, name) for name in names)
        return getattr(self, names)


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
