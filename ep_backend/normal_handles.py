"""What a dispatch of the normal kernels returns.

T tokens of this rank, N rows received, H hidden, K top_k, R ranks, L experts of this rank, D =
min(K, R), the ranks that a token can go to, I rounds of the largest batch, S = ceil(H / 128) scales
of a float8 row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ep_backend.events import EventOverlap

if TYPE_CHECKING:
    from ep_backend.normal import NormalBuffer


class NormalDispatchHandle:
    """Where every token went and every row came from; what `combine` needs, and a later `dispatch`
    of as many tokens with the same routing.

    It owns its memory: it may be kept, and used for any number of either.

    Attributes:
        num_tokens: T.
        num_rows: rows of `recv_x`: N, or `num_worst_tokens`.
        num_rounds: I.
        recv_topk_idx, recv_topk_weights: see `NormalDispatchResult`.
        recv_src_tokens: `[N]` int32: the token, on its source rank, that each row is of. Behind N:
            -1.
    """

    def __init__(self, buffer: NormalBuffer, num_tokens: int) -> None:
        self.buffer = buffer
        self.num_tokens = num_tokens
        device = buffer.device
        self.num_messages = torch.empty(num_tokens, dtype=torch.int32, device=device)
        """`[T]`: how many ranks each token went to."""
        self.messages = torch.empty(
            (num_tokens, buffer.num_columns), dtype=torch.int32, device=device
        )
        """`[T, D]`: which, ascending, as `rank << 16 | slot`; the slot is the message's number
        among those to that rank in its round. Behind the first `num_messages` is anything."""
        self.num_recv_tokens_per_rank = torch.empty(
            buffer.group.num_ranks, dtype=torch.int64, device=device
        )
        """`[R]`: rows from each rank; N is their sum."""
        self.expert_counts = torch.empty(buffer.num_local_experts, dtype=torch.int64, device=device)
        """`[L]`: rows that list each local expert."""
        self._num_rounds = torch.empty(1, dtype=torch.int64, device=device)

    def counts_arguments(self) -> tuple[int, ...]:
        """What the kernel that exchanges counts fills."""
        return (
            *self.routes(),
            self._num_rounds.data_ptr(),
            self.num_recv_tokens_per_rank.data_ptr(),
            self.expert_counts.data_ptr(),
        )

    def allocate(self, num_worst_tokens: int) -> None:
        """Takes memory for the rows, once the counts are known.

        Raises:
            ValueError: more rows come than `num_worst_tokens`, which is not 0.
        """
        num_received = int(self.num_recv_tokens_per_rank.sum())
        if 0 < num_worst_tokens < num_received:
            raise ValueError(
                f"num_worst_tokens is {num_worst_tokens}, but rank {self.buffer.group.self_rank} "
                f"receives {num_received} rows. Pass at least that: the sum of all ranks' tokens "
                "is always enough. This buffer stays failed: create a new one."
            )
        self.num_rows = num_worst_tokens or num_received
        self.num_rounds = int(self._num_rounds)
        num_rows, device = self.num_rows, self.buffer.device
        self.per_round = torch.empty(
            (self.num_rounds, self.buffer.group.num_ranks), dtype=torch.int32, device=device
        )
        """`[I, R]`: rows from each rank in each round."""
        listed = (num_rows, self.buffer.top_k)
        self.recv_topk_idx = torch.empty(listed, dtype=torch.int32, device=device)
        self.recv_topk_weights = torch.empty(listed, dtype=torch.float32, device=device)
        self.recv_src_tokens = torch.empty(num_rows, dtype=torch.int32, device=device)
        self.recv_topk_idx[num_received:] = -1
        self.recv_src_tokens[num_received:] = -1
        self.recv_topk_weights[num_received:] = 0

    def new_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`recv_x` and `recv_scales`, to be filled."""
        buffer = self.buffer
        num_rows, device = self.num_rows, buffer.device
        rows = torch.empty((num_rows, buffer.hidden), dtype=buffer.dispatch_dtype, device=device)
        if buffer.num_scales == 0:
            return rows, None
        if buffer.scale_format == "ue8m0":
            num_words = -(-buffer.num_scales // 4)
            return rows, torch.empty((num_rows, num_words), dtype=torch.int32, device=device)
        shape = (num_rows, buffer.num_scales)
        return rows, torch.empty(shape, dtype=torch.float32, device=device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is on a GPU."""
        return ()

    def routes(self) -> tuple[int, int, int]:
        """T, and addresses of `num_messages` and `messages`."""
        return self.num_tokens, self.num_messages.data_ptr(), self.messages.data_ptr()

    def rows(self) -> tuple[int, int, int]:
        """I, and addresses of `num_recv_tokens_per_rank` and `per_round`."""
        per_rank = self.num_recv_tokens_per_rank
        return self.num_rounds, per_rank.data_ptr(), self.per_round.data_ptr()


@dataclass(eq=False)
class NormalDispatchResult:
    """What a dispatch has brought. All tensors are the caller's: no later call writes to them."""

    recv_x: torch.Tensor
    """`[N, H]` of the dispatch dtype: a row for each (token, source) that lists an expert of this
    rank, ordered by source rank, then token. With `num_worst_tokens` that many rows, of which those
    behind N hold anything."""
    recv_scales: torch.Tensor | None
    """Of float8 rows, else None; a value is `float8 * scale`. `[N, S]` float32; with "ue8m0" int32,
    `ceil(S / 4)` instead of S: four exponent bytes a word, the lowest first."""
    recv_topk_idx: torch.Tensor
    """`[N, K]` int32: the local experts of each row, at the k of its source's `topk_idx`, and -1
    where that lists another rank's expert or none. Rows behind N: -1. With a handle, that
    dispatch's tensor."""
    recv_topk_weights: torch.Tensor
    """`[N, K]` float32: their weights, 0 where there is no expert. With a handle, that dispatch's
    tensor."""
    num_recv_tokens_per_expert: list[int] | torch.Tensor
    """Rows that list each local expert, rounded up to a multiple of `expert_alignment`: a list of L
    integers; with `num_worst_tokens` a tensor `[L]` int32."""
    handle: NormalDispatchHandle
    event: EventOverlap = field(default_factory=EventOverlap)
    """When all of it is there; with `async_finish` nothing may read it before."""
