"""Inputs of the benchmarks: made from a seed, so that every rank can also make the others'."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Inputs:
    """What one rank dispatches. T tokens, H hidden, K top_k."""

    x: torch.Tensor
    """`[T, H]` of the payload's dtype, standard normal."""
    topk_idx: torch.Tensor
    """`[T, K]` int64, distinct experts, uniform over all of them."""
    topk_weights: torch.Tensor
    """`[T, K]` float32, positive, 1 in sum."""


def make_inputs(
    seed: int,
    rank: int,
    *,
    num_tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
) -> Inputs:
    """The inputs of `rank`. The same arguments give the same tensors in every process."""
    # Ranks must differ, and seeds 0 and 1 must not share streams.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    top_scores, topk_idx = scores.topk(top_k, dim=1)
    return Inputs(x, topk_idx, torch.softmax(top_scores, dim=1))
