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
    """What dispatch is given: of the buffer's dtype, or quantised already."""
    x_scales: list[torch.Tensor] | None
    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    received: list[reference.ExpertRows]
    by_source: list[list[reference.SourceRows]]
    """The same in the rank-major layout, where the shape asks for it: [rank][src rank]."""
    combined: list[torch.Tensor]

    def inputs(self, rank: int) -> tuple[torch.Tensor, ...]:
        """Arguments of `dispatch`."""
        inputs = (self.x[rank], self.topk_idx[rank], self.topk_weights[rank])
        return inputs if self.x_scales is None else (*inputs, self.x_scales[rank])


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
        is_quantized: bool = False,
    ) -> Scenario:
        """Appends an operation to which rank r contributes `num_tokens[r]` tokens.

        Args:
            is_quantized: the caller of dispatch has quantised them.
        """
        generator = torch.Generator().manual_seed(seed)
        shape, variant_idx = self.shape, len(self.variants)
        x, topk_idx, topk_weights = [], [], []
        for rank, n in enumerate(num_tokens):
            x.append(payload(shape, rank, n, variant_idx))
            idx = make_routing(routing, shape, n, generator)
            topk_idx.append(idx.to(idx_dtype))
            topk_weights.append(torch.randn((n, shape.top_k), generator=generator))
        self.variants.append(
            variant_of(shape, x, topk_idx, topk_weights, is_quantized=is_quantized)
        )
        return self

    def variant(self, op: int) -> Variant:
        return self.variants[op % len(self.variants)]


Expert = Callable[[int, torch.Tensor], torch.Tensor]


def apply_expert(expert: int, rows: torch.Tensor) -> torch.Tensor:
    """An 'expert': a scale of its own, so that rows of different experts differ."""
    return (rows.float() * (1 + expert / 7) - 0.5).to(rows.dtype)


def values_of(rows: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What experts compute with: received rows as `dtype`."""
    return rows if scales is None else reference.dequantize(rows, scales).to(dtype)


def sum_of_experts(
    rows: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: range,
    expert: Expert = apply_expert,
) -> torch.Tensor:
    """What the caller does in the rank-major layout: `[n, H]`, for each row the weighted sum of its
    local experts `[n, K]`, added in that order in float32."""
    outputs = torch.stack([expert(e, rows) for e in experts]).float()
    row_idx = torch.arange(len(rows), device=rows.device)
    total = torch.zeros(rows.shape, device=rows.device)
    for k in range(topk_idx.shape[1]):
        is_listed = topk_idx[:, k, None] >= 0
        term = topk_weights[:, k, None] * outputs[topk_idx[:, k].clamp(min=0), row_idx]
        # Not 0 + term: that would turn -0 into 0.
        total = torch.where(is_listed, total + term if k > 0 else term, total)
    return total.to(rows.dtype)


def variant_of(
    shape: Shape,
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    expert: Expert = apply_expert,
    is_quantized: bool = False,
) -> Variant:
    """These inputs, and what the reference makes of them."""
    rows, scales = x, None
    if shape.is_float8:
        quantized = [reference.quantize(t, shape.scale_format) for t in x]
        rows, scales = [list(t) for t in zip(*quantized, strict=True)]
    received = reference.dispatch(rows, topk_idx, shape.num_experts, scales)
    by_source: list[list[reference.SourceRows]] = []
    if shape.is_rank_major:
        by_source = reference.dispatch_rank_major(
            rows, topk_idx, topk_weights, shape.num_experts, scales
        )
        sums = [
            [
                sum_of_experts(
                    values_of(r.rows, r.scales, shape.dtype),
                    r.topk_idx,
                    r.topk_weights,
                    reference.experts_of_rank(shape.num_experts, shape.num_ranks, rank),
                    expert,
                )
                if r.tokens
                else torch.empty((0, shape.hidden), dtype=shape.dtype)
                for r in sources
            ]
            for rank, sources in enumerate(by_source)
        ]
        num_tokens = [len(t) for t in x]
        combined = reference.combine_rank_major(
            sums, by_source, num_tokens, shape.dtype, shape.combine_dtype, shape.ranks_added_up
        )
    else:
        outputs = [
            expert(e, values_of(r.rows, r.scales, shape.dtype)) for e, r in enumerate(received)
        ]
        inputs = (outputs, received, topk_idx, topk_weights, shape.dtype, shape.combine_dtype)
        if shape.is_reduced_at_source:
            combined = reference.combine_source(*inputs)
        else:
            combined = reference.combine(*inputs, shape.ranks_added_up)
    sent, sent_scales = (rows, scales) if is_quantized else (x, None)
    return Variant(sent, sent_scales, topk_idx, topk_weights, received, by_source, combined)


def mixed_scenario(shape: Shape, seed: int = 0, num_variants: int = 17) -> Scenario:
    """Batch sizes and routings that change from one operation to the next. 17 is prime: no bank
    sees the same data twice in a row."""
    routings = ("uniform", "skewed", "masked", "one_hot_expert", "empty_rank", "repeated")
    generator = torch.Generator().manual_seed(seed)
    scenario = Scenario(shape)
    for i in range(num_variants):
        high = shape.num_max_tokens_per_rank + 1
        num_tokens = torch.randint(high, (shape.num_ranks,), generator=generator).tolist()
        is_quantized = shape.is_float8 and i % 3 == 1
        routing = routings[i % len(routings)]
        scenario.add(routing, num_tokens, seed * 1000 + i, is_quantized=is_quantized)
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


def origin_of(row: torch.Tensor, scales: torch.Tensor | None) -> str:
    values = row if scales is None else reference.dequantize(row, scales).round()
    fields = zip(("src rank", "token", "variant"), values.tolist(), strict=False)  # may be short
    return ", ".join(f"{name} {value:g}" for name, value in fields)


def scales_of(result: DispatchResult, shape: Shape) -> torch.Tensor | None:
    """`recv_scales` as float32 `[.., .., N]`."""
    if result.recv_scales is None or shape.scale_format != "ue8m0":
        return result.recv_scales
    return reference.unpack_ue8m0(result.recv_scales, shape.layout().num_scales)


def run_experts(result: DispatchResult, shape: Shape, rank: int) -> torch.Tensor:
    """The experts of one rank over what it received. Rows behind the counts are NaN: whoever reads
    one spoils a sum."""
    experts = reference.experts_of_rank(shape.num_experts, shape.num_ranks, rank)
    scales = scales_of(result, shape)
    out = torch.full_like(result.recv_x, float("nan"), dtype=shape.dtype)

    def values(first: int, num_rows: int) -> torch.Tensor:
        some = None if scales is None else scales[first, :num_rows]
        return values_of(result.recv_x[first, :num_rows], some, shape.dtype)

    if not shape.is_rank_major:
        for local, num_rows in enumerate(result.num_recv_tokens_per_expert.tolist()):
            out[local, :num_rows] = apply_expert(experts[local], values(local, num_rows))
        return out
    idx, weights = local_experts_of(result, shape, rank), result.recv_topk_weights
    assert weights is not None
    for src_rank, num_rows in enumerate(result.num_recv_tokens_per_rank.tolist()):
        if num_rows > 0:
            out[src_rank, :num_rows] = sum_of_experts(
                values(src_rank, num_rows),
                idx[src_rank, :num_rows],
                weights[src_rank, :num_rows],
                experts,
            )
    return out


def local_experts_of(result: DispatchResult, shape: Shape, rank: int) -> torch.Tensor:
    """`recv_topk_idx` as if experts had local numbers. Raises AssertionError where a place without
    an expert does not hold another rank's."""
    idx = result.recv_topk_idx
    assert idx is not None
    if shape.expert_ids == "local":
        return idx
    experts = reference.experts_of_rank(shape.num_experts, shape.num_ranks, rank)
    is_own = (idx >= experts.start) & (idx < experts.stop)
    if len(experts) < shape.num_experts:
        assert ((idx >= 0) & (idx < shape.num_experts)).all(), f"rank {rank}: not an expert"
    else:
        assert (is_own | (idx == -1)).all(), f"rank {rank}: neither own nor none"
    return torch.where(is_own, idx - experts.start, -1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Stricter than torch.equal: tells -0 from 0."""
    as_int = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


def check_received(result: DispatchResult, variant: Variant, shape: Shape, rank: int) -> None:
    """Every received row, in order. Raises AssertionError that says whose row is wrong."""
    experts = reference.experts_of_rank(shape.num_experts, shape.num_ranks, rank)
    counts = result.num_recv_tokens_per_expert.tolist()
    expected_counts = [len(variant.received[e].origins) for e in experts]
    assert counts == expected_counts, f"rank {rank}: counts {counts}, expected {expected_counts}"
    if shape.is_rank_major:
        _check_sources(result, variant.by_source[rank], shape, rank)
        return
    for local, expert in enumerate(experts):
        expected = variant.received[expert]
        _check_rows(f"rank {rank}, expert {expert}", result, shape, local, expected)


def _check_sources(
    result: DispatchResult, expected: list[reference.SourceRows], shape: Shape, rank: int
) -> None:
    num_messages = result.num_recv_tokens_per_rank.tolist()
    assert num_messages == [len(source.tokens) for source in expected]
    idx, weights = local_experts_of(result, shape, rank), result.recv_topk_weights
    assert weights is not None
    for src_rank, source in enumerate(expected):
        where, n = f"rank {rank}, source {src_rank}", len(source.tokens)
        _check_rows(where, result, shape, src_rank, source)
        assert torch.equal(idx[src_rank, :n].cpu(), source.topk_idx), where
        assert same_bits(weights[src_rank, :n].cpu(), source.topk_weights), where
        assert (idx[src_rank, n:] == -1).all(), f"{where}: unused slots list experts"


def _check_rows(
    where: str,
    result: DispatchResult,
    shape: Shape,
    first: int,
    expected: reference.ExpertRows | reference.SourceRows,
) -> None:
    """Rows `[first, :n]` of the result, and their scales."""
    n = len(expected.rows)
    got, scales = result.recv_x[first, :n].cpu(), scales_of(result, shape)
    got_scales = None if scales is None else scales[first, :n].cpu().contiguous()
    if not same_bits(got, expected.rows):
        row = next(i for i in range(n) if not same_bits(got[i], expected.rows[i]))
        of_got = None if got_scales is None else got_scales[row]
        of_expected = None if expected.scales is None else expected.scales[row]
        raise AssertionError(
            f"{where}, row {row}: expected ({origin_of(expected.rows[row], of_expected)}), "
            f"got ({origin_of(got[row], of_got)})"
        )
    if expected.scales is None:
        assert got_scales is None
        return
    assert got_scales is not None
    if not same_bits(got_scales, expected.scales):
        row = next(i for i in range(n) if not same_bits(got_scales[i], expected.scales[i]))
        raise AssertionError(
            f"{where}, row {row}: scales {got_scales[row]}, expected {expected.scales[row]}"
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
