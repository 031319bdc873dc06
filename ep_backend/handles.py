"""What operations return: results, the handle that ties a combine to its dispatch, receive hooks.

R ranks, M num_max_tokens_per_rank, L local experts, S = R * M, H hidden, K top_k,
C outcome columns: min(K, R), or K with reduction "source"; N scales a row: one for 128 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ep_backend import _native
from ep_backend.checks import note_overwritten
from ep_backend.errors import OrderError

if TYPE_CHECKING:
    from ep_backend.low_latency import LowLatencyBuffer


SENDING_OPS = ("dispatch_send", "normal_dispatch")
"""Kinds of operations that are given a batch of tokens."""


def address_of(tensor: torch.Tensor | None) -> int:
    """For a kernel; 0 is none."""
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class OpCounters:
    """What one kind of operation has done on a buffer since its creation."""

    num_ops: int
    num_rows: int
    """Tokens read by a dispatch send, messages by its hook and by a combine."""
    total_ns: int
    wait_ns: int
    """Part of `total_ns` spent waiting for peers."""


@dataclass(frozen=True)
class KernelStatistics:
    """What a rank's kernels have counted since its buffer's creation. Dicts are by the kind of
    operation: "dispatch_send", "dispatch_recv", "combine_send", "combine_recv"; of normal kernels
    "normal_counts", "normal_dispatch", "normal_combine"."""

    num_ops: dict[str, int]
    """Operations completed. Replays of a captured graph are counted, too."""
    wait_ns: dict[str, list[int]]
    """Nanoseconds that signals and credits of each rank were waited for. On CUDA, waits for tagged
    words are not among them, nor those of normal kernels."""
    num_expert_rows: list[int]
    """Rows that each local expert has received. Not counted: on CUDA, those that came to rank-major
    workspaces; by normal kernels, those of a cached routing."""
    counters: dict[str, OpCounters]
    """On CUDA only of "normal_counts": there the host's wait for the sizes of a dispatch."""
    sent_bytes: dict[str, list[int]]
    """Of rows and their scales that went to each rank. Empty on CUDA, low latency."""
    num_in_bucket: dict[str, list[int]]
    """Operations by duration: up to `_native.BUCKET_LIMITS_NS`, each without those before it, then
    longer ones."""
    num_tokens: int | None = None
    """That dispatches were given; None: nobody counts them."""

    @classmethod
    def of_cpu(cls, names: Sequence[str], counted: _native.RankStatistics) -> KernelStatistics:
        """Args:
        names: of the kinds, as the native kernels number them.
        """
        ops = dict(zip(names, counted["ops"], strict=True))
        in_bucket = {name: op.pop("num_in_bucket") for name, op in ops.items()}
        return cls(
            num_ops={name: op["num_ops"] for name, op in ops.items()},
            wait_ns=dict(zip(names, counted["wait_ns"], strict=True)),
            num_expert_rows=counted["num_expert_rows"],
            counters={name: OpCounters(**op) for name, op in ops.items()},
            sent_bytes=dict(zip(names, counted["sent_bytes"], strict=True)),
            num_in_bucket=in_bucket,
            num_tokens=sum(ops[name]["num_rows"] for name in names if name in SENDING_OPS),
        )


class DispatchHandle:
    """Where every received row came from; what `combine` needs. Filled by the dispatch hook.

    It owns its memory: it may be kept, and used for more than one combine.

    Attributes:
        epoch: number of the dispatch on its buffer.
        num_tokens: T of this dispatch on this rank.
        workspace: the workspace that it went to, -1: the buffer has none.
        num_slots: rows of each source there.
        is_received: the dispatch hook has returned.
    """

    def __init__(
        self, buffer: LowLatencyBuffer, num_tokens: int, workspace: int, num_slots: int
    ) -> None:
        self.buffer = buffer
        self.num_tokens = num_tokens
        self.workspace = workspace
        self.num_slots = num_slots
        self.epoch = 0  # until the send has succeeded
        self.is_received = False
        num_ranks = buffer.group.num_ranks
        num_slots = num_ranks * buffer.num_max_tokens_per_rank if workspace < 0 else 0
        # Hierarchical: what is forwarded here, so that what comes back finds its way.
        num_remote = buffer.num_nodes - 1 if buffer.hierarchical else 0
        # One allocation: this runs in every layer of every step.
        self._sizes = (
            num_tokens,
            num_tokens * buffer.num_answer_words,
            num_ranks,
            4 * num_slots,
            2 * num_slots * buffer.top_k,
            num_remote,
            2 * num_remote * buffer.num_max_tokens_per_rank,
        )
        self._is_networked = buffer.is_multi_node
        self.storage = torch.empty(sum(self._sizes), dtype=torch.int32, device=buffer.device)
        self._pointers = self._addresses()

    @property
    def num_partials(self) -> torch.Tensor:
        """`[T]` int32: how many rows come home for each of this rank's tokens: one from each rank
        that answers; with reduction "source", one for each expert listed."""
        return self.storage[: self.num_tokens]

    @property
    def num_messages(self) -> torch.Tensor:
        """`[R]` int32: messages received from each rank."""
        # The bit above the count says how they came; only kernels want to know.
        return self.storage.split(self._sizes)[2] & _native.MAX_TOKENS_PER_RANK

    @property
    def messages(self) -> torch.Tensor:
        """`[R * M, 4]` int32, source by source: token, outcome slot, first entry, entries. Empty
        where there are workspaces, and so are `entries`: nobody needs them there."""
        return self.storage.split(self._sizes)[3].view(-1, 4)

    @property
    def entries(self) -> torch.Tensor:
        """`[R * M * K, 2]` int32: row of `expert_out` as `[rows, H]`, bits of a float32 weight;
        with reduction "source", instead of the weight the k that the row is of."""
        return self.storage.split(self._sizes)[4].view(-1, 2)

    def pointers(self) -> tuple[int, ...]:
        """Addresses of `num_partials`, the kernels' `answers`, `num_messages`, `messages` and
        `entries`; between nodes also of what is forwarded: how many messages, and which."""
        return self._pointers

    def _addresses(self) -> tuple[int, ...]:
        num_partials = self.storage.data_ptr()
        answers = num_partials + 4 * self._sizes[0]
        num_messages = answers + 4 * self._sizes[1]
        messages = num_messages + 4 * self._sizes[2]
        entries = messages + 4 * self._sizes[3]
        addresses = (num_partials, answers, num_messages, messages, entries)
        if not self._is_networked:
            return addresses
        num_forwarded = entries + 4 * self._sizes[4]
        return (*addresses, num_forwarded, num_forwarded + 4 * self._sizes[5])


@dataclass(eq=False)
class DispatchResult:
    """What a dispatch brings; contents are valid once its hook has returned.

    The tensors named `recv_*` are a bank of the buffer: they are overwritten by the hook of the
    dispatch `num_banks` later; on CUDA, where a rank has no peers, by its send. Or they are a
    workspace: peers may overwrite them once combine has been called. Copy them to keep them
    longer.
    """

    handle: DispatchHandle
    recv_x: torch.Tensor
    """Of the dispatch dtype. Expert-major `[L, S, H]`: expert `e`'s tokens in rows
    `0 .. num_recv_tokens_per_expert[e] - 1`, ordered by source rank, then token. Rank-major
    `[R, M, H]`: source `r`'s messages in rows `0 .. num_recv_tokens_per_rank[r] - 1`, ordered by
    token. Rows behind them hold anything."""
    recv_scales: torch.Tensor | None
    """Of float8 rows, else None; a value is `float8 * scale`. Expert-major `[L, S, N]` float32, of
    which the rows of one channel group lie side by side (strides `N * S, 1, S`); rank-major
    `[R, M, N]`, contiguous. With "ue8m0" int32, `ceil(N / 4)` instead of N: four exponent bytes a
    word, the lowest first."""
    recv_topk_idx: torch.Tensor | None
    """Rank-major `[R, M, K]` int32, else None: the row's local experts, in the order of its
    source's `topk_idx`, then -1. Rows that hold no message are -1 throughout. An expert that the
    source listed twice is here twice. With `expert_ids="global"` experts have their global number,
    and in place of -1 is an expert of another rank (-1 where there is none)."""
    recv_topk_weights: torch.Tensor | None
    """Rank-major `[R, M, K]` float32, else None: the weights of those experts, then 0. Rows that
    hold no message hold anything."""
    _num_rows_per_expert: torch.Tensor | None
    """As the kernels have counted them; None: they have not."""

    @classmethod
    def over(
        cls,
        handle: DispatchHandle,
        recv_x: torch.Tensor,
        recv_scales: torch.Tensor | None,
        recv_topk_idx: torch.Tensor | None,
        recv_topk_weights: torch.Tensor | None,
        num_rows_per_expert: torch.Tensor | None,
    ) -> DispatchResult:
        """Over tensors that later dispatches fill, too. The result has tensors of its own on their
        memory: whoever is done with them may take that away (`recv_x.set_(torch.empty(0))`, as
        SGLang does to free memory)."""
        note_overwritten(recv_x, recv_scales, recv_topk_idx, recv_topk_weights)
        return cls(
            handle,
            recv_x.detach(),
            None if recv_scales is None else recv_scales.detach(),
            None if recv_topk_idx is None else recv_topk_idx.detach(),
            None if recv_topk_weights is None else recv_topk_weights.detach(),
            num_rows_per_expert,
        )

    @property
    def num_recv_tokens_per_expert(self) -> torch.Tensor:
        """`[L]` int32. In both layouts; rank-major, the rows that each expert has to compute. Of a
        workspace it is counted when it is asked for, by some kernels of PyTorch."""
        if self._num_rows_per_expert is not None:
            return self._num_rows_per_expert
        assert self.recv_topk_idx is not None
        buffer = self.handle.buffer
        first_expert = buffer.first_expert if buffer.expert_ids == "global" else 0
        return count_rows_per_expert(self.recv_topk_idx - first_expert, buffer.num_local_experts)

    @property
    def num_recv_tokens_per_rank(self) -> torch.Tensor:
        """`[R]` int32: messages of each source."""
        return self.handle.num_messages


def count_rows_per_expert(recv_topk_idx: torch.Tensor, num_local_experts: int) -> torch.Tensor:
    """`[L]` int32: rows of `recv_topk_idx`, `[R, M, K]` local experts, that list each of them."""
    idx = recv_topk_idx.flatten(0, 1)
    is_repeated = (idx[:, :, None] == idx[:, None, :]).tril(-1).any(2)
    is_counted = (idx >= 0) & (idx < num_local_experts) & ~is_repeated
    bins = torch.where(is_counted, idx, num_local_experts).flatten().long()
    counts = torch.zeros(num_local_experts + 1, dtype=torch.int32, device=idx.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.int32))[:-1]


class RecvHook:
    """Receives what the matching send started. Call it once; any thread may.

    Raises (when called):
        OrderError: called twice, or before the hook of an earlier operation of the same phase.
        PeerTimeout: a peer's data did not come in time.
    """

    def __init__(self, name: str, receive: Callable[[], None]) -> None:
        self._name = name
        self._receive = receive
        self._is_done = False

    def __call__(self) -> None:
        if self._is_done:
            raise OrderError(f"the hook of {self._name} was called twice. Call each hook once.")
        self._receive()
        self._is_done = True

    def __repr__(self) -> str:
        return f"<RecvHook of {self._name}, {'done' if self._is_done else 'pending'}>"
