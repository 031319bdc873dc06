"""What the normal kernels' dispatch and combine mean, in plain PyTorch over all ranks at once.

The kernels must equal these functions bit for bit, whatever the budget: rows are ordered by source
rank, then token; a token adds its rows in rank order in float32 and rounds once.

R ranks, T_r tokens of rank r, N_r rows that it receives, H hidden, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_backend.reference import experts_of_rank


@dataclass
class ReceivedRows:
    """What one rank received: a row for each (token, source) that lists one of its experts."""

    rows: torch.Tensor
    """`[N_r, H]`."""
    origins: list[tuple[int, int]]
    """(source rank, token) of each row."""
    topk_idx: torch.Tensor
    """`[N_r, K]` int32: its own experts by their local number, -1 in place of others."""
    topk_weights: torch.Tensor
    """`[N_r, K]` float32: their weights, 0 in place of others."""
    num_tokens_per_expert: list[int]
    """Rows that list each local expert."""


def dispatch(
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    num_experts: int,
) -> list[ReceivedRows]:
    """What every rank receives.

    Args:
        x: of each rank, `[T_r, H]`.
        topk_idx: of each rank, `[T_r, K]`, -1 = not routed.
        topk_weights: of each rank, `[T_r, K]` float32.
    """
    all_idx = torch.cat([idx.long() for idx in topk_idx])
    all_weights = torch.cat(topk_weights)
    all_origins = [(rank, token) for rank, rows in enumerate(x) for token in range(len(rows))]
    received = []
    for rank in range(len(x)):
        experts = experts_of_rank(num_experts, len(x), rank)
        is_own = (all_idx >= experts.start) & (all_idx < experts.stop)
        is_received = is_own.any(1)
        idx = torch.where(is_own, all_idx - experts.start, -1)[is_received]
        received.append(
            ReceivedRows(
                rows=torch.cat(x)[is_received],
                origins=[o for o, i in zip(all_origins, is_received.tolist(), strict=True) if i],
                topk_idx=idx.int(),
                topk_weights=torch.where(is_own, all_weights, 0.0)[is_received],
                num_tokens_per_expert=[int((idx == e).any(1).sum()) for e in range(len(experts))],
            )
        )
    return received


def combine(
    x: list[torch.Tensor],
    received: list[ReceivedRows],
    num_tokens: list[int],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """What every rank gets back.

    Args:
        x: of each rank, `[N_r, H]` of `dtype` in the order of `received`: what its experts make of
            each row, weighted and summed.
        received: what `dispatch` returned.
        num_tokens: T_r of each rank.

    Returns:
        Of each rank, `[T_r, H]` of `dtype`; 0 for tokens that went nowhere.
    """
    sums: dict[tuple[int, int], torch.Tensor] = {}
    for rows, of_rank in zip(x, received, strict=True):
        for row, origin in zip(rows.float(), of_rank.origins, strict=True):
            sums[origin] = sums[origin] + row if origin in sums else row
    outs = [torch.zeros((n, x[0].shape[1]), dtype=dtype) for n in num_tokens]
    for (src_rank, token), total in sums.items():
        outs[src_rank][token] = total.to(dtype)
    return outs
