"""Where tokens go, in DeepEP's words and in ours.

T tokens of this rank, K top_k, E experts, R ranks, L experts of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_backend import _native
from ep_backend.checks import check_int, check_tensor
from ep_backend.group import Group
from ep_backend.kernels import check_current
from ep_backend.low_latency import INDEX_DTYPES


@dataclass(frozen=True)
class Layout:
    """What `get_dispatch_layout` returns of a batch, all of this rank's tokens."""

    num_tokens_per_rank: torch.Tensor
    """`[R]` int32."""
    num_tokens_per_expert: torch.Tensor
    """`[E]` int32. A token that lists an expert twice counts once."""
    is_token_in_rank: torch.Tensor
    """`[T, R]` bool."""


def layout_of(topk_idx: torch.Tensor, num_experts: int, num_ranks: int, stream: int = 0) -> Layout:
    """
    Args:
        topk_idx: `[T, K]` int64 or int32, global expert, -1 = not routed.
        stream: of a GPU, where one kernel counts.

    Raises:
        ValueError: wrong shape or dtype; on a CPU also a wrong expert. On a GPU, where looking for
            one would wait, it counts as the nearest: dispatch will say.
        EPBackendError: `topk_idx` is on another GPU than the thread's current one.
    """
    check_int("num_experts", num_experts, 1, _native.MAX_EXPERTS)
    check_topk_idx(topk_idx)
    if topk_idx.device.type != "cpu":
        return _layout_on_gpu(topk_idx, num_experts, num_ranks, stream)
    _check_experts(topk_idx, num_experts)
    of_expert = _experts_listed(topk_idx, num_experts)
    is_token_in_rank = _ranks_listed(of_expert, num_ranks)
    return Layout(
        is_token_in_rank.sum(0, dtype=torch.int32),
        of_expert.sum(0, dtype=torch.int32),
        is_token_in_rank,
    )


def _layout_on_gpu(topk_idx: torch.Tensor, num_experts: int, num_ranks: int, stream: int) -> Layout:
    device, (num_tokens, top_k) = topk_idx.device, topk_idx.shape
    check_current(device)
    layout = Layout(
        torch.empty(num_ranks, dtype=torch.int32, device=device),
        torch.empty(num_experts, dtype=torch.int32, device=device),
        torch.empty((num_tokens, num_ranks), dtype=torch.bool, device=device),
    )
    _native.cuda_dispatch_layout(
        topk_idx.data_ptr(),
        topk_idx.dtype == torch.int64,
        num_tokens,
        top_k,
        _native.ExpertPartition(num_experts, num_ranks),
        layout.num_tokens_per_rank.data_ptr(),
        layout.num_tokens_per_expert.data_ptr(),
        layout.is_token_in_rank.data_ptr(),
        stream,
    )
    return layout


def _check_experts(topk_idx: torch.Tensor, num_experts: int) -> None:
    is_wrong = (topk_idx < -1) | (topk_idx >= num_experts)
    if is_wrong.any():
        token, k = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            f"topk_idx[{token}, {k}] is {topk_idx[token, k]}, expected -1 (not routed) or an "
            f"expert in 0..{num_experts - 1}."
        )


def check_topk_idx(topk_idx: torch.Tensor) -> None:
    if topk_idx.dim() != 2:
        raise ValueError(f"topk_idx has shape {list(topk_idx.shape)}, expected [T, top_k].")
    check_tensor("topk_idx", topk_idx, tuple(topk_idx.shape), INDEX_DTYPES, topk_idx.device)


def ranks_of(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> torch.Tensor:
    """`[T, R]` bool: the ranks that own some of a token's experts."""
    return _ranks_listed(_experts_listed(topk_idx, num_experts), num_ranks)


def _experts_listed(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`[T, E]` bool: which experts a token lists."""
    columns = topk_idx.long() + 1  # the first is for -1
    shape = (len(topk_idx), 1 + num_experts)
    is_listed = torch.zeros(shape, dtype=torch.bool, device=topk_idx.device)
    return is_listed.scatter_(1, columns, True)[:, 1:]


def _ranks_listed(of_expert: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """`[T, R]` bool: the ranks that own some of the experts listed in `[T, E]`."""
    num_experts = of_expert.shape[1]
    if num_experts % num_ranks == 0:
        return of_expert.unflatten(1, (num_ranks, -1)).any(2)
    partition = _native.ExpertPartition(num_experts, num_ranks)
    sizes = [partition.num_local_experts(rank) for rank in range(num_ranks)]
    return torch.stack([own.any(1) for own in of_expert.split(sizes, 1)], 1)


@dataclass(frozen=True)
class Routing:
    """What `NormalBuffer` is told of a batch."""

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_experts: int


def routing_of_experts(
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    is_token_in_rank: torch.Tensor | None,
    num_ranks: int,
) -> Routing:
    """
    Raises:
        ValueError: on a CPU, `is_token_in_rank` says something else than `topk_idx`. On a GPU it is
            not looked at: that would wait.
    """
    check_topk_idx(topk_idx)
    if is_token_in_rank is not None and topk_idx.device.type == "cpu":
        # Experts that do not exist are refused by the kernels.
        ranks = ranks_of(topk_idx.clamp(-1, num_experts - 1), num_experts, num_ranks)
        is_wrong = (ranks != is_token_in_rank).any(1)
        if is_wrong.any():
            token = int(is_wrong.nonzero()[0])
            raise ValueError(
                f"is_token_in_rank[{token}] is {is_token_in_rank[token].tolist()}, but the experts "
                f"{topk_idx[token].tolist()} of that token are those of {ranks[token].tolist()}. "
                "Pass what get_dispatch_layout returns for this topk_idx."
            )
    return Routing(topk_idx, topk_weights, num_experts)


def routing_of_ranks(is_token_in_rank: torch.Tensor) -> Routing:
    """Of a batch whose experts are not told: as if each rank had one.

    Raises:
        ValueError: more ranks than a token can list.
    """
    num_tokens, num_ranks = is_token_in_rank.shape
    why = "A dispatch without topk_idx lists the ranks of a token. Pass topk_idx and topk_weights."
    check_int("the number of ranks", num_ranks, 1, _native.MAX_TOP_K, why)
    device = is_token_in_rank.device
    ranks = torch.arange(num_ranks, dtype=torch.int32, device=device)
    topk_idx = torch.where(is_token_in_rank, ranks, -1)
    weights = torch.zeros((num_tokens, num_ranks), dtype=torch.float32, device=device)
    return Routing(topk_idx, weights, num_ranks)


def expert_counts_of_all(
    group: Group, num_tokens_per_expert: torch.Tensor, alignment: int
) -> list[int]:
    """Of each local expert the tokens of all ranks, rounded up. Collective; on a GPU, waits for
    what counts them."""
    partition = _native.ExpertPartition(len(num_tokens_per_expert), group.num_ranks)
    first = partition.first_expert(group.self_rank)
    own = slice(first, first + partition.num_local_experts(group.self_rank))
    counts = torch.tensor(group.all_gather(num_tokens_per_expert.tolist()), device="cpu").sum(0)[
        own
    ]
    return (-(-counts // alignment) * alignment).tolist()
