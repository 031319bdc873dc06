"""Dispatch and combine over torch.distributed (gloo): what `ep-backend bench op` compares with.

Both classes keep the contract of `LowLatencyBuffer`: after dispatch, rows lie in `[L, S, H]`,
expert by expert, ordered by source rank, then token; combine returns `[T, H]`, weighted and summed.

They are written to be fast. Buffers are made once; a token goes once to a rank, not once to an
expert; partial sums are made on the expert's rank; metadata shares a collective where that pays;
the plan of the rows is made while they travel. And they know beforehand what ours does not assume:
that every rank has T tokens, which saves an exchange of sizes.

R ranks, T tokens of every rank, K top_k, H hidden, E experts, L experts of this rank, S = R * M
rows an expert has room for, N rows ("messages") that a rank looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import embedding_bag

from ep_backend.bench.routing import Inputs
from ep_backend.reference import experts_of_rank

# From this many bytes of rows, one `index_select` an expert, straight into its place, beats one for
# all and a second copy: 16 tokens (1 MiB) 123 against 187 us, 64 tokens (4 MiB) 438 against 262 us
# (2 ranks, H 2048 float32, 32 local experts, EPYC 9004, torch 2.13).
_NUM_BYTES_FOR_COPY_BY_EXPERT = 2 << 20

# Its name until torch 2.12.
all_gather_single: Callable[..., dist.Work | None] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)


@dataclass(frozen=True)
class Shape:
    """Sizes that all ranks share."""

    num_ranks: int
    num_tokens: int
    num_max_tokens_per_rank: int
    hidden: int
    num_experts: int
    top_k: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class _Plan:
    """Where rows go and come from on an expert's rank."""

    counts: torch.Tensor
    """`[L]`."""
    rows: torch.Tensor
    """The rows of `[L * S, H]` in use, in order."""
    message_of_row: torch.Tensor
    """The message in each of them."""
    entry_rows: torch.Tensor
    """The rows of a message, in k order, message by message."""
    entry_weights: torch.Tensor
    """Of the payload's dtype, as `embedding_bag` wants it."""
    first_entry: torch.Tensor
    """`[N]`, of each message."""


class _ExpertMajor:
    """The work on an expert's rank, the same for both ways."""

    def __init__(self, shape: Shape, self_rank: int) -> None:
        own = experts_of_rank(shape.num_experts, shape.num_ranks, self_rank)
        self._shape = shape
        self._first_expert, self._num_local_experts = own.start, len(own)
        capacity = shape.num_ranks * shape.num_max_tokens_per_rank
        # One less than the first row of each expert; the last is for experts of other ranks.
        self._row_before = (torch.arange(len(own) + 1) * capacity - 1)[:, None]
        self.recv_x = torch.empty(len(own), capacity, shape.hidden, dtype=shape.dtype)
        self._flat_recv_x = self.recv_x.view(-1, shape.hidden)

    def plan(self, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> _Plan:
        """Of N messages in the order of (source rank, token), `[N, K]` each."""
        num_local = self._num_local_experts
        local = topk_idx - self._first_expert
        is_local = (local >= 0) & (local < num_local)
        local = torch.where(is_local, local, num_local)  # the last column collects the others
        is_routed = torch.zeros(num_local + 1, len(local), dtype=torch.bool)
        is_routed.scatter_(0, local.t(), True)
        row_at = is_routed.cumsum(1).add_(self._row_before)
        entry_rows = row_at.gather(0, local.t()).t()[is_local]
        num_entries = is_local.sum(1)
        is_routed = is_routed[:num_local]
        return _Plan(
            counts=is_routed.sum(1),
            rows=row_at[:num_local][is_routed],
            message_of_row=is_routed.nonzero()[:, 1],
            entry_rows=entry_rows,
            entry_weights=topk_weights[is_local].to(self._shape.dtype),
            first_entry=num_entries.cumsum(0) - num_entries,
        )

    def unpack(self, plan: _Plan, messages: torch.Tensor, message_of_row: torch.Tensor) -> None:
        """Copies `messages[message_of_row]` to `plan.rows`."""
        if len(plan.rows) * self._shape.row_bytes < _NUM_BYTES_FOR_COPY_BY_EXPERT:
            self._flat_recv_x.index_copy_(0, plan.rows, messages.index_select(0, message_of_row))
            return
        by_expert = message_of_row.split(plan.counts.tolist())
        for expert_rows, wanted in zip(self.recv_x, by_expert, strict=True):
            torch.index_select(messages, 0, wanted, out=expert_rows[: len(wanted)])

    def partials(self, plan: _Plan, expert_out: torch.Tensor) -> torch.Tensor:
        """`[N, H]`: the weighted sum over each message's experts; 0 where it has none.

        `embedding_bag` gathers, weights and adds in one pass; it has no `out=`.
        """
        return embedding_bag(
            plan.entry_rows,
            expert_out.view(-1, self._shape.hidden),
            plan.first_entry,
            mode="sum",
            per_sample_weights=plan.entry_weights,
        )


class GlooAllToAll:
    """Each rank sends what the other needs: all-gather of the metadata, from which everyone knows
    every size; all-to-all of rows; all-to-all of partial rows."""

    def __init__(self, shape: Shape, self_rank: int) -> None:
        num_ranks, num_tokens, top_k = shape.num_ranks, shape.num_tokens, shape.top_k
        self._shape, self._self_rank = shape, self_rank
        self._experts = _ExpertMajor(shape, self_rank)
        owners = [
            rank
            for rank in range(num_ranks)
            for _ in experts_of_rank(shape.num_experts, num_ranks, rank)
        ]
        self._owner = torch.tensor([*owners, num_ranks])  # -1 takes the last: nobody
        # Experts and weights of a token in one row, bits of both as int32.
        self._own_meta = torch.empty(num_tokens, 2, top_k, dtype=torch.int32)
        self._meta = torch.empty(num_ranks * num_tokens, 2, top_k, dtype=torch.int32)
        self._send, self._recv, self._home = (
            torch.empty(num_ranks * num_tokens, shape.hidden, dtype=shape.dtype) for _ in range(3)
        )

    def dispatch(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """`recv_x` `[L, S, H]` and `[L]` counts."""
        shape = self._shape
        self._own_meta[:, 0] = inputs.topk_idx
        self._own_meta[:, 1] = inputs.topk_weights.view(torch.int32)
        all_gather_single(self._meta, self._own_meta)
        topk_idx = self._meta[:, 0].long()
        is_sent = torch.zeros(shape.num_ranks + 1, len(topk_idx), dtype=torch.bool)
        is_sent.scatter_(0, self._owner[topk_idx].t(), True)
        # [dst rank, src rank, token]
        is_sent = is_sent[:-1].view(shape.num_ranks, shape.num_ranks, shape.num_tokens)

        mine = is_sent[:, self._self_rank]
        self._tokens = mine.nonzero()[:, 1]
        self._send_splits: list[int] = mine.sum(1).tolist()
        self._recv_splits: list[int] = is_sent[self._self_rank].sum(1).tolist()
        send = torch.index_select(inputs.x, 0, self._tokens, out=self._send[: len(self._tokens)])
        recv = self._recv[: sum(self._recv_splits)]
        rows_work = dist.all_to_all_single(
            recv, send, self._recv_splits, self._send_splits, async_op=True
        )
        received = is_sent[self._self_rank].flatten().nonzero()[:, 0]
        weights = self._meta[:, 1].view(torch.float32)
        self._plan = self._experts.plan(topk_idx[received], weights[received])
        # For combine: partial rows come home in the order of `send`; bag them by token.
        self._home_order = torch.argsort(self._tokens, stable=True)
        num_partials = mine.sum(0)
        self._first_partial = num_partials.cumsum(0) - num_partials
        rows_work.wait()
        self._experts.unpack(self._plan, recv, self._plan.message_of_row)
        return self._experts.recv_x, self._plan.counts

    def combine(self, expert_out: torch.Tensor) -> torch.Tensor:
        """`[T, H]`."""
        home = self._home[: len(self._tokens)]
        partials = self._experts.partials(self._plan, expert_out)
        dist.all_to_all_single(home, partials, self._send_splits, self._recv_splits)
        return embedding_bag(self._home_order, home, self._first_partial, mode="sum")


class GlooAllGather:
    """Everyone gets everything: all-gather of rows and metadata in one buffer, and a reduce-scatter
    of partial rows of all tokens. What engines do by default.

    The reduce-scatter is an all-to-all and a local sum: gloo's own took 518, 2646, 2334 and
    10792 us for 1, 16, 64 and 512 tokens where this took 316, 523, 849 and 4208 us (2 ranks, H 2048
    float32, EPYC 9004, torch 2.13).
    """

    def __init__(self, shape: Shape, self_rank: int) -> None:
        num_ranks, num_tokens = shape.num_ranks, shape.num_tokens
        self._shape = shape
        self._experts = _ExpertMajor(shape, self_rank)
        meta_bytes = num_tokens * 2 * shape.top_k * 4
        # Metadata lies behind the rows, padded to whole rows, so that what arrives is one table.
        self._num_meta_rows = -(-meta_bytes // shape.row_bytes)
        num_own_rows = num_tokens + self._num_meta_rows
        self._own = torch.empty(num_own_rows, shape.hidden, dtype=shape.dtype)
        self._own_meta = self._meta_of(self._own)
        self._all = torch.empty(num_ranks * num_own_rows, shape.hidden, dtype=shape.dtype)
        self._meta = [self._meta_of(part) for part in self._all.split(num_own_rows)]
        self._home = torch.empty(num_ranks, num_tokens, shape.hidden, dtype=shape.dtype)
        self._out = torch.empty(num_tokens, shape.hidden, dtype=shape.dtype)

    def _meta_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The `[T, 2, K]` int32 behind T rows."""
        shape = self._shape
        words = rows[shape.num_tokens :].flatten().view(torch.int32)
        meta = words[: shape.num_tokens * 2 * shape.top_k]
        return meta.view(shape.num_tokens, 2, shape.top_k)

    def dispatch(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """`recv_x` `[L, S, H]` and `[L]` counts."""
        num_tokens = self._shape.num_tokens
        self._own[:num_tokens] = inputs.x
        self._own_meta[:, 0] = inputs.topk_idx
        self._own_meta[:, 1] = inputs.topk_weights.view(torch.int32)
        all_gather_single(self._all, self._own)
        meta = torch.cat(self._meta)
        self._plan = self._experts.plan(meta[:, 0].long(), meta[:, 1].view(torch.float32))
        message = self._plan.message_of_row
        src_rank = message.div(num_tokens, rounding_mode="floor")
        self._experts.unpack(self._plan, self._all, message + src_rank * self._num_meta_rows)
        return self._experts.recv_x, self._plan.counts

    def combine(self, expert_out: torch.Tensor) -> torch.Tensor:
        """`[T, H]`."""
        partials = self._experts.partials(self._plan, expert_out)
        dist.all_to_all_single(self._home.view(-1, self._shape.hidden), partials)
        return torch.sum(self._home, 0, out=self._out)
