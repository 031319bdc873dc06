"""What the normal kernels' dispatch and combine mean, in plain PyTorch over all ranks at once.

The kernels must equal these functions bit for bit, whatever the budget: rows are ordered by source
rank, then token; a token adds its rows in rank order in float32, then its biases, and rounds once.
On several nodes a node adds its rows in rank order and rounds; a token adds its nodes in order.

R ranks, T_r tokens of rank r, N_r rows that it receives, H hidden, K top_k, S = ceil(H / 128)
scales of a float8 row.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    scales: torch.Tensor | None
    """`[N_r, S]` of float8 rows."""
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
    x_scales: list[torch.Tensor] | None = None,
) -> list[ReceivedRows]:
    """What every rank receives.

    Args:
        x: of each rank, `[T_r, H]`.
        topk_idx: of each rank, `[T_r, K]`, -1 = not routed.
        topk_weights: of each rank, `[T_r, K]` float32.
        x_scales: of each rank, `[T_r, S]` float32, of float8 rows, as `reference.quantize` makes
            them.
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
                scales=None if x_scales is None else torch.cat(x_scales)[is_received],
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
    biases: list[tuple[torch.Tensor, ...]] | None = None,
    ranks_per_node: int | None = None,
) -> list[torch.Tensor]:
    """What every rank gets back.

    Args:
        x: of each rank, `[N_r, H]` of `dtype` in the order of `received`: what its experts make of
            each row, weighted and summed.
        received: what `dispatch` returned.
        num_tokens: T_r of each rank.
        biases: of each rank, tensors `[T_r, H]`, added behind the rows in this order.
        ranks_per_node: where ranks are on several nodes.

    Returns:
        Of each rank, `[T_r, H]` of `dtype`; 0, or the biases, for tokens that went nowhere.
    """
    terms = list(_rows_with_origins(x, received, ranks_per_node))
    for src_rank, of_rank in enumerate(biases or []):
        for bias in of_rank:
            terms += [((src_rank, token), row) for token, row in enumerate(bias)]
    return [total.to(dtype) for total in _sums(terms, num_tokens, x[0].shape[1])]


def combine_weights(
    topk_weights: list[torch.Tensor],
    received: list[ReceivedRows],
    num_tokens: list[int],
    ranks_per_node: int | None = None,
) -> list[torch.Tensor]:
    """What becomes of weights that go home with the rows.

    Args:
        topk_weights: of each rank, `[N_r, K]` float32.
        received, num_tokens, ranks_per_node: as in `combine`.

    Returns:
        Of each rank, `[T_r, K]` float32: the sum over a token's rows, 0 where there is none.
    """
    terms = list(_rows_with_origins(topk_weights, received, ranks_per_node))
    return _sums(terms, num_tokens, topk_weights[0].shape[1])


Term = tuple[tuple[int, int], torch.Tensor]
"""(source rank, token), and something of it to add."""


def _rows_with_origins(
    rows: list[torch.Tensor], received: list[ReceivedRows], ranks_per_node: int | None
) -> Iterator[Term]:
    """In rank order; on several nodes the sums of each node, in node order."""
    for first in range(0, len(rows), ranks_per_node or 1):
        of_node: list[Term] = []
        for rank in range(first, first + (ranks_per_node or 1)):
            of_node += zip(received[rank].origins, rows[rank], strict=True)
        for origin, total in _sums_by_origin(of_node).items():
            yield origin, total.to(rows[0].dtype)


def _sums_by_origin(terms: list[Term]) -> dict[tuple[int, int], torch.Tensor]:
    """In float32, terms added in the order given."""
    sums: dict[tuple[int, int], torch.Tensor] = {}
    for origin, term in terms:
        sums[origin] = sums[origin] + term.float() if origin in sums else term.float()
    return sums


def _sums(terms: list[Term], num_tokens: list[int], width: int) -> list[torch.Tensor]:
    """Of each rank, `[T_r, width]` float32: terms added in the order given."""
    outs = [torch.zeros((n, width), dtype=torch.float32) for n in num_tokens]
    for (src_rank, token), total in _sums_by_origin(terms).items():
        outs[src_rank][token] = total
    return outs
