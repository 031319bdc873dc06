"""Normal dispatch and combine over torch.distributed (gloo): what `bench op --kind normal` compares
with.

Both classes keep the contract of `NormalBuffer`: after dispatch there is a row for each (token,
source) that lists an expert of this rank, ordered by source rank, then token, in tensors that are
the caller's; combine adds a token's rows.

They are written to be fast, as those of op_gloo.py: buffers that are not handed out are made once,
a token goes once to a rank, metadata shares a collective, rows travel while their metadata is made.
And they know beforehand what ours does not assume: that every rank has T tokens.

R ranks, T tokens of every rank, N rows received, H hidden, K top_k.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import embedding_bag

from ep_backend.bench.op_gloo import all_gather_single
from ep_backend.bench.op_measure import BenchSettings
from ep_backend.bench.routing import Inputs
from ep_backend.reference import experts_of_rank

Received = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""`recv_x` `[N, H]`, `recv_topk_idx` `[N, K]` int32 and `recv_topk_weights` `[N, K]` float32."""


class _Local:
    """The experts of this rank."""

    def __init__(self, settings: BenchSettings, self_rank: int) -> None:
        own = experts_of_rank(settings.num_experts, settings.num_ranks, self_rank)
        self._first, self._num = own.start, len(own)

    def of(
        self, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N, K]` each: local numbers, -1 in place of other ranks' experts, and their weights."""
        local = topk_idx - self._first
        is_local = self.are(topk_idx)
        return torch.where(is_local, local, -1).int(), torch.where(is_local, topk_weights, 0.0)

    def are(self, topk_idx: torch.Tensor) -> torch.Tensor:
        local = topk_idx - self._first
        return (local >= 0) & (local < self._num)


class NormalAllToAll:
    """Each rank sends what the other needs: all-gather of the metadata, from which everyone knows
    every size; all-to-all of rows, both ways."""

    def __init__(self, settings: BenchSettings, self_rank: int, num_tokens: int) -> None:
        num_ranks, top_k = settings.num_ranks, settings.top_k
        self._num_ranks, self._num_tokens, self._self_rank = num_ranks, num_tokens, self_rank
        self._local = _Local(settings, self_rank)
        self._owner = torch.tensor(
            [
                rank
                for rank in range(num_ranks)
                for _ in experts_of_rank(settings.num_experts, num_ranks, rank)
            ]
        )
        # Experts and weights of a token in one row, bits of both as int32.
        self._own_meta = torch.empty(num_tokens, 2, top_k, dtype=torch.int32)
        self._meta = torch.empty(num_ranks * num_tokens, 2, top_k, dtype=torch.int32)
        self._send, self._home = (
            torch.empty(num_ranks * num_tokens, settings.hidden, dtype=settings.dtype)
            for _ in range(2)
        )

    def dispatch(self, inputs: Inputs) -> Received:
        self._own_meta[:, 0] = inputs.topk_idx
        self._own_meta[:, 1] = inputs.topk_weights.view(torch.int32)
        all_gather_single(self._meta, self._own_meta)
        topk_idx = self._meta[:, 0].long()
        is_sent = torch.zeros(self._num_ranks, len(topk_idx), dtype=torch.bool)
        is_sent.scatter_(0, self._owner[topk_idx].t(), True)
        # [dst rank, src rank, token]
        is_sent = is_sent.view(self._num_ranks, self._num_ranks, self._num_tokens)

        mine = is_sent[:, self._self_rank]
        tokens = mine.nonzero()[:, 1]
        self._send_splits: list[int] = mine.sum(1).tolist()
        self._recv_splits: list[int] = is_sent[self._self_rank].sum(1).tolist()
        send = torch.index_select(inputs.x, 0, tokens, out=self._send[: len(tokens)])
        recv_x = inputs.x.new_empty(sum(self._recv_splits), inputs.x.shape[1])
        work = dist.all_to_all_single(
            recv_x, send, self._recv_splits, self._send_splits, async_op=True
        )
        received = is_sent[self._self_rank].flatten().nonzero()[:, 0]
        weights = self._meta[:, 1].view(torch.float32)
        recv_idx, recv_weights = self._local.of(topk_idx[received], weights[received])
        # For combine: rows come home in the order of `send`; bag them by token.
        self._home_order = torch.argsort(tokens, stable=True)
        num_rows = mine.sum(0)
        self._first_row = num_rows.cumsum(0) - num_rows
        work.wait()
        return recv_x, recv_idx, recv_weights

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """`[T, H]`, of the dispatch before."""
        home = self._home[: len(self._home_order)]
        dist.all_to_all_single(home, rows, self._send_splits, self._recv_splits)
        return embedding_bag(self._home_order, home, self._first_row, mode="sum")


class NormalAllGather:
    """Everyone gets everything, and keeps what it has experts for; rows of all tokens go home,
    zeros for those that did not come, in an all-to-all and a local sum (op_gloo.py says why)."""

    def __init__(self, settings: BenchSettings, self_rank: int, num_tokens: int) -> None:
        num_all, hidden, dtype = settings.num_ranks * num_tokens, settings.hidden, settings.dtype
        self._local = _Local(settings, self_rank)
        self._own_meta = torch.empty(num_tokens, 2, settings.top_k, dtype=torch.int32)
        self._meta = torch.empty(num_all, 2, settings.top_k, dtype=torch.int32)
        self._all = torch.empty(num_all, hidden, dtype=dtype)
        self._sent = torch.empty(num_all, hidden, dtype=dtype)
        self._home = torch.empty(settings.num_ranks, num_tokens, hidden, dtype=dtype)

    def dispatch(self, inputs: Inputs) -> Received:
        self._own_meta[:, 0] = inputs.topk_idx
        self._own_meta[:, 1] = inputs.topk_weights.view(torch.int32)
        all_gather_single(self._meta, self._own_meta)
        work = all_gather_single(self._all, inputs.x, async_op=True)
        topk_idx = self._meta[:, 0].long()
        self._received = self._local.are(topk_idx).any(1).nonzero()[:, 0]
        weights = self._meta[:, 1].view(torch.float32)
        recv_idx, recv_weights = self._local.of(topk_idx[self._received], weights[self._received])
        assert work is not None
        work.wait()
        return self._all.index_select(0, self._received), recv_idx, recv_weights

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """`[T, H]`, of the dispatch before."""
        if len(rows) < len(self._sent):
            self._sent.zero_()
        self._sent.index_copy_(0, self._received, rows)
        dist.all_to_all_single(self._home.view(-1, rows.shape[1]), self._sent)
        return torch.sum(self._home, 0)
