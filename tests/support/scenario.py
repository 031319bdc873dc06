"""Inputs of every rank for a few operations, with what must come out of them.

Payloads name their origin: column j of a row holds, by turns, its source rank, its token, its
variant and j // 4. All are small integers, exact in bfloat16, so a mismatch can say what it got.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ep_backend import DispatchResult, reference
from tests.support.routing import make_routing
from tests.support.shapes import Shape


@dataclass
class Variant:
    """One dispatch and its combine, on all ranks."""

    x: list[torch.Tensor]
    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    received: list[reference.ExpertRows]
    combined: list[torch.Tensor]


@dataclass
class Scenario:
    shape: Shape
    variants: list[Variant] = field(default_factory=list)

    def add(
        self,
        routing: str,
        num_tokens: list[int],
        seed: int,
        idx_dtype: torch.dtype = torch.int64,
    ) -> Scenario:
        """Appends an operation to which rank r contributes `num_tokens[r]` tokens."""
        generator = torch.Generator().manual_seed(seed)
        shape, variant_idx = self.shape, len(self.variants)
        x, topk_idx, topk_weights = [], [], []
        for rank, n in enumerate(num_tokens):
            x.append(payload(shape, rank, n, variant_idx))
            idx = make_routing(routing, shape, n, generator)
            topk_idx.append(idx.to(idx_dtype))
            topk_weights.append(torch.randn((n, shape.top_k), generator=generator))
        self.variants.append(variant_of(shape, x, topk_idx, topk_weights))
        return self

    def variant(self, op: int) -> Variant:
        return self.variants[op % len(self.variants)]


def apply_expert(expert: int, rows: torch.Tensor) -> torch.Tensor:
    """An 'expert': a scale of its own, so that rows of different experts differ."""
    return (rows.float() * (1 + expert / 7) - 0.5).to(rows.dtype)


def variant_of(
    shape: Shape,
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    expert: Callable[[int, torch.Tensor], torch.Tensor] = apply_expert,
) -> Variant:
    """These inputs, and what the reference makes of them."""
    received = reference.dispatch(x, topk_idx, shape.num_experts)
    outputs = [expert(e, r.rows) for e, r in enumerate(received)]
    combined = reference.combine(outputs, received, topk_idx, topk_weights, shape.dtype)
    return Variant(x, topk_idx, topk_weights, received, combined)


def mixed_scenario(shape: Shape, seed: int = 0, num_variants: int = 17) -> Scenario:
    """Batch sizes and routings that change from one operation to the next. 17 is prime: no bank
    sees the same data twice in a row."""
    routings = ("uniform", "skewed", "masked", "one_hot_expert", "empty_rank", "repeated")
    generator = torch.Generator().manual_seed(seed)
    scenario = Scenario(shape)
    for i in range(num_variants):
        high = shape.num_max_tokens_per_rank + 1
        num_tokens = torch.randint(high, (shape.num_ranks,), generator=generator).tolist()
        scenario.add(routings[i % len(routings)], num_tokens, seed * 1000 + i)
    return scenario


def payload(shape: Shape, rank: int, num_tokens: int, variant_idx: int) -> torch.Tensor:
    column = torch.arange(shape.hidden)
    token = torch.arange(num_tokens)[:, None]
    fields = torch.stack(
        [
            torch.full((num_tokens, shape.hidden), rank),
            (token % 256).expand(-1, shape.hidden),
            torch.full((num_tokens, shape.hidden), variant_idx % 256),
            (column // 4 % 256).expand(num_tokens, -1),
        ]
    )
    x = torch.gather(fields, 0, (column % 4).expand(1, num_tokens, -1))[0]
    return x.to(shape.dtype)


def origin_of(row: torch.Tensor) -> str:
    fields = zip(("src rank", "token", "variant"), row.tolist(), strict=False)  # a row may be short
    return ", ".join(f"{name} {value:g}" for name, value in fields)


def run_experts(result: DispatchResult, first_expert: int) -> torch.Tensor:
    """The experts of one rank over what it received. Rows behind the counts are NaN: whoever reads
    one spoils a sum."""
    out = torch.full_like(result.recv_x, float("nan"))
    for local, num_rows in enumerate(result.num_recv_tokens_per_expert.tolist()):
        out[local, :num_rows] = apply_expert(first_expert + local, result.recv_x[local, :num_rows])
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Stricter than torch.equal: tells -0 from 0."""
    as_int = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


def check_received(result: DispatchResult, variant: Variant, shape: Shape, rank: int) -> None:
    """Every received row, in order. Raises AssertionError that says whose row is wrong."""
    experts = reference.experts_of_rank(shape.num_experts, shape.num_ranks, rank)
    for local, num_rows in enumerate(result.num_recv_tokens_per_expert.tolist()):
        expected = variant.received[experts[local]]
        got = result.recv_x[local, :num_rows].cpu()
        where = f"rank {rank}, expert {experts[local]}"
        assert num_rows == len(expected.origins), (
            f"{where}: {num_rows} rows, expected {len(expected.origins)}"
        )
        if not same_bits(got, expected.rows):
            row = next(i for i in range(num_rows) if not same_bits(got[i], expected.rows[i]))
            raise AssertionError(
                f"{where}, row {row}: expected ({origin_of(expected.rows[row])}), "
                f"got ({origin_of(got[row])})"
            )


def check_combined(out: torch.Tensor, variant: Variant, rank: int) -> None:
    expected, out = variant.combined[rank], out.cpu()
    assert out.shape == expected.shape
    if not same_bits(out, expected):
        token = next(t for t in range(out.shape[0]) if not same_bits(out[t], expected[t]))
        column = int((out[token] != expected[token]).nonzero()[0])
        raise AssertionError(
            f"rank {rank}, token {token} of experts {variant.topk_idx[rank][token].tolist()}: "
            f"column {column} is {out[token, column]}, expected {expected[token, column]}"
        )
