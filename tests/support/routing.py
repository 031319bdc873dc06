"""Named ways a router may choose experts. Same arguments, same routing."""

from __future__ import annotations

import torch

from ep_backend.reference import experts_of_rank
from tests.support.shapes import Shape

ROUTINGS = ("uniform", "skewed", "one_hot_expert", "empty_rank", "masked", "all_masked", "repeated")


def make_routing(
    name: str, shape: Shape, num_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """`[T, K]` int64.

    uniform: every expert as likely; distinct while K <= E.
    skewed: expert e with a chance that falls as 1 / (e + 1)^2; distinct while K <= E.
    one_hot_expert: every token goes to the last expert and to nothing else.
    empty_rank: uniform, but nothing for the last rank's experts (while other ranks own some).
    masked: uniform, then every other entry -1; the first token has no expert at all.
    all_masked: only -1.
    repeated: K draws from two experts, so that tokens list an expert several times.
    """
    num_experts, top_k = shape.num_experts, shape.top_k
    if name == "uniform":
        return _draw(torch.ones(num_experts), num_tokens, top_k, generator)
    if name == "skewed":
        chance = 1.0 / torch.arange(1, num_experts + 1) ** 2
        return _draw(chance, num_tokens, top_k, generator)
    if name == "one_hot_expert":
        idx = torch.full((num_tokens, top_k), -1)
        idx[:, top_k // 2] = num_experts - 1
        return idx
    if name == "empty_rank":
        chance = torch.ones(num_experts)
        avoided = experts_of_rank(num_experts, shape.num_ranks, shape.num_ranks - 1)
        if len(avoided) < num_experts:
            chance[list(avoided)] = 0
        return _draw(chance, num_tokens, top_k, generator)
    if name == "masked":
        idx = _draw(torch.ones(num_experts), num_tokens, top_k, generator)
        idx[torch.rand(idx.shape, generator=generator) < 0.5] = -1
        idx[:1] = -1
        return idx
    if name == "all_masked":
        return torch.full((num_tokens, top_k), -1)
    if name == "repeated":
        pair = torch.randint(num_experts, (2,), generator=generator)
        return pair[torch.randint(2, (num_tokens, top_k), generator=generator)]
    raise ValueError(f"routing is {name!r}, expected one of {ROUTINGS}")


def _draw(
    chance: torch.Tensor, num_tokens: int, top_k: int, generator: torch.Generator
) -> torch.Tensor:
    """`[num_tokens, top_k]` experts with these chances, distinct in a token where that can be."""
    if num_tokens == 0:
        return torch.empty((0, top_k), dtype=torch.int64)
    may_be_distinct = top_k <= int((chance > 0).sum())
    return torch.multinomial(
        chance.expand(num_tokens, -1), top_k, replacement=not may_be_distinct, generator=generator
    )
