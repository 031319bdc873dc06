"""What dispatch and combine mean, in plain PyTorch over all ranks at once. Slow and obvious.

Every kernel must equal these functions bit for bit: rows are ordered by source rank, then token;
each product and each sum is rounded to float32; a rank adds its experts in k order and its partial
sum is rounded to the payload's dtype; a token adds its ranks in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def experts_of_rank(num_experts: int, num_ranks: int, rank: int) -> range:
    """The contiguous block of experts that `rank` owns; the first E mod R ranks own one more."""
    base, num_larger = divmod(num_experts, num_ranks)
    first = rank * base + min(rank, num_larger)
    return range(first, first + base + (rank < num_larger))


@dataclass
class ExpertRows:
    """What one expert received."""

    rows: torch.Tensor
    """`[N, H]`."""
    origins: list[tuple[int, int]]
    """(source rank, token) of each row."""


def dispatch(
    x: list[torch.Tensor], topk_idx: list[torch.Tensor], num_experts: int
) -> list[ExpertRows]:
    """What every expert receives.

    Args:
        x: of each rank, `[T_r, H]`.
        topk_idx: of each rank, `[T_r, K]`, -1 = not routed.

    Returns:
        One entry for each of the `num_experts` experts.
    """
    received = []
    for expert in range(num_experts):
        origins = [
            (src_rank, token)
            for src_rank, idx in enumerate(topk_idx)
            for token in range(idx.shape[0])
            if expert in idx[token].tolist()
        ]
        rows = [x[src_rank][token] for src_rank, token in origins]
        stacked = torch.stack(rows) if rows else x[0].new_empty((0, x[0].shape[1]))
        received.append(ExpertRows(stacked, origins))
    return received


def combine(
    expert_out: list[torch.Tensor],
    received: list[ExpertRows],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """What every rank gets back.

    Args:
        expert_out: of each expert, `[N, H]` in the order of `received`.
        received: what `dispatch` returned.
        topk_weights: of each rank, `[T_r, K]` float32.

    Returns:
        Of each rank, `[T_r, H]` of `dtype`.
    """
    num_experts, num_ranks = len(expert_out), len(topk_idx)
    hidden = expert_out[0].shape[1]
    row_of = [{origin: i for i, origin in enumerate(e.origins)} for e in received]
    outs = []
    for src_rank, (idx, weights) in enumerate(zip(topk_idx, topk_weights, strict=True)):
        out = torch.zeros((idx.shape[0], hidden), dtype=dtype)
        for token in range(idx.shape[0]):
            partials = []
            for rank in range(num_ranks):
                owned = experts_of_rank(num_experts, num_ranks, rank)
                terms = [
                    weights[token, k] * expert_out[e][row_of[e][src_rank, token]].float()
                    for k, e in enumerate(idx[token].tolist())
                    if e in owned
                ]
                if terms:
                    partials.append(_ordered_sum(terms).to(dtype))
            if partials:
                out[token] = _ordered_sum([p.float() for p in partials]).to(dtype)
        outs.append(out)
    return outs


def _ordered_sum(terms: list[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
