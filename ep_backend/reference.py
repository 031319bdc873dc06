"""What dispatch and combine mean, in plain PyTorch over all ranks at once. Slow and obvious.

Every kernel must equal these functions bit for bit: rows are ordered by source rank, then token;
a row times its weight is added with one rounding to float32 (`multiply_add`); a rank adds its
experts in k order and its partial sum is rounded to the payload's dtype; a token adds its ranks in
rank order, or, where all rows come home, those in k order. Hierarchical, a node adds its ranks in
rank order and rounds, and a token adds its nodes in node order. Where rows of dispatch travel as
float8, `quantize` says what becomes of them; `dispatch` then takes its result as `x`. Rows of
combine that do are quantised from float32.

R ranks, T_r tokens of rank r, H hidden, K top_k, N = ceil(H / 128) scales a float8 row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch


def experts_of_rank(num_experts: int, num_ranks: int, rank: int) -> range:
    """The contiguous block of experts that `rank` owns; the first E mod R ranks own one more."""
    base, num_larger = divmod(num_experts, num_ranks)
    first = rank * base + min(rank, num_larger)
    return range(first, first + base + (rank < num_larger))


CHANNELS_PER_SCALE = 128
MAX_E4M3 = 448.0


def quantize(x: torch.Tensor, scale_format: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as float8 and their scales, one for 128 channels; a value is `float8 * scale`.

    Args:
        x: `[T, H]` float32 or bfloat16. NaN counts for no scale and becomes NaN.
        scale_format: "float32": amax / 448; "power_of_two" and "ue8m0": the smallest power of two
            that is not below it.

    Returns:
        `[T, H]` float8_e4m3fn and `[T, N]` float32.
    """
    hidden = x.shape[1]
    num_scales = -(-hidden // CHANNELS_PER_SCALE)
    padding = num_scales * CHANNELS_PER_SCALE - hidden
    padded = torch.nn.functional.pad(x.float(), (0, padding))
    groups = padded.view(-1, num_scales, CHANNELS_PER_SCALE)
    magnitude = groups.abs()
    amax = magnitude.masked_fill(magnitude.isnan(), 0).amax(-1, keepdim=True).clamp(min=1e-4)
    # A tensor: with a number torch may multiply by a reciprocal, which rounds twice.
    maximum = torch.full_like(amax, MAX_E4M3)
    if scale_format == "float32":
        scale, inverse = amax / maximum, maximum / amax
    else:
        # An infinite amax has no power of two: it gets the largest whose inverse is one too.
        mantissa, exponent = torch.frexp((amax / maximum).clamp(max=2.0**126))
        scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
        inverse = 1 / scale
    values = (groups * inverse).clamp(-MAX_E4M3, MAX_E4M3)
    # One NaN, 0x7f, whatever its sign: also the NaN of infinity * 0.
    rows = values.masked_fill(values.isnan(), float("nan")).to(torch.float8_e4m3fn)
    return rows.view(-1, num_scales * CHANNELS_PER_SCALE)[:, :hidden].contiguous(), scale[..., 0]


def dequantize(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`[..., H]` float32 of float8 rows `[..., H]` and their float32 scales `[..., N]`."""
    return rows.float() * scales.repeat_interleave(CHANNELS_PER_SCALE, -1)[..., : rows.shape[-1]]


def travelled(rows: torch.Tensor, combine_dtype: torch.dtype) -> torch.Tensor:
    """`[n, H]` float32: what arrives of rows of combine, float32 before they are sent."""
    if combine_dtype == torch.float8_e4m3fn:
        return dequantize(*quantize(rows))
    return rows.to(combine_dtype).float()


def unpack_ue8m0(words: torch.Tensor, num_scales: int) -> torch.Tensor:
    """Scales `[..., N]` float32 of int32 words `[..., ceil(N / 4)]`: four exponent bytes a word,
    the lowest first."""
    exponents = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], -1)
    return (exponents.flatten(-2)[..., :num_scales] << 23).view(torch.float32)


@dataclass
class ExpertRows:
    """What one expert received."""

    rows: torch.Tensor
    """`[n, H]`."""
    scales: torch.Tensor | None
    """`[n, N]` of float8 rows."""
    origins: list[tuple[int, int]]
    """(source rank, token) of each row."""


def dispatch(
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    num_experts: int,
    x_scales: list[torch.Tensor] | None = None,
) -> list[ExpertRows]:
    """What every expert receives.

    Args:
        x: of each rank, `[T_r, H]`.
        topk_idx: of each rank, `[T_r, K]`, -1 = not routed.
        x_scales: of each rank, `[T_r, N]`, of float8 rows.

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
        scales = None if x_scales is None else _rows_at(x_scales, origins)
        received.append(ExpertRows(_rows_at(x, origins), scales, origins))
    return received


def _rows_at(x: list[torch.Tensor], origins: list[tuple[int, int]]) -> torch.Tensor:
    rows = [x[src_rank][token] for src_rank, token in origins]
    return torch.stack(rows) if rows else x[0].new_empty((0, x[0].shape[1]))


@dataclass
class SourceRows:
    """What one rank received from one source: a row a message."""

    rows: torch.Tensor
    """`[n, H]`, ordered by token."""
    scales: torch.Tensor | None
    """`[n, N]` of float8 rows."""
    tokens: list[int]
    topk_idx: torch.Tensor
    """`[n, K]` int32: the receiving rank's local experts, in k order, then -1."""
    topk_weights: torch.Tensor
    """`[n, K]` float32: theirs, then 0."""


def dispatch_rank_major(
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    num_experts: int,
    x_scales: list[torch.Tensor] | None = None,
) -> list[list[SourceRows]]:
    """What every rank receives from every rank in the rank-major layout: `[dst_rank][src_rank]`.

    Args:
        x, topk_idx, x_scales: as in `dispatch`.
        topk_weights: of each rank, `[T_r, K]` float32.
    """
    num_ranks = len(x)
    owned = [experts_of_rank(num_experts, num_ranks, rank) for rank in range(num_ranks)]
    return [
        [
            _rows_of_source(
                experts,
                x[src_rank],
                topk_idx[src_rank],
                topk_weights[src_rank],
                None if x_scales is None else x_scales[src_rank],
            )
            for src_rank in range(num_ranks)
        ]
        for experts in owned
    ]


def _rows_of_source(
    experts: range,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    x_scales: torch.Tensor | None,
) -> SourceRows:
    top_k = topk_idx.shape[1]
    tokens = [t for t, idx in enumerate(topk_idx.tolist()) if any(e in experts for e in idx)]
    local_idx = torch.full((len(tokens), top_k), -1, dtype=torch.int32)
    local_weights = torch.zeros((len(tokens), top_k), dtype=torch.float32)
    for row, token in enumerate(tokens):
        ks = [k for k, e in enumerate(topk_idx[token].tolist()) if e in experts]
        local_idx[row, : len(ks)] = (topk_idx[token, ks] - experts.start).int()
        local_weights[row, : len(ks)] = topk_weights[token, ks]
    scales = None if x_scales is None else x_scales[tokens]
    return SourceRows(x[tokens], scales, tokens, local_idx, local_weights)


def combine(
    expert_out: list[torch.Tensor],
    received: list[ExpertRows],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    dtype: torch.dtype,
    combine_dtype: torch.dtype | None = None,
    ranks_per_node: int | None = None,
) -> list[torch.Tensor]:
    """What every rank gets back.

    Args:
        expert_out: of each expert, `[n, H]` in the order of `received`.
        received: what `dispatch` returned.
        topk_weights: of each rank, `[T_r, K]` float32.
        combine_dtype: of the rows that travel; default: `dtype`.
        ranks_per_node: where a hierarchical combine adds up each node's rows before they go home.

    Returns:
        Of each rank, `[T_r, H]` of `dtype`.
    """
    num_experts, num_ranks = len(expert_out), len(topk_idx)
    owned = [experts_of_rank(num_experts, num_ranks, rank) for rank in range(num_ranks)]

    def add_up(terms: dict[int, _Term], experts: list[int]) -> torch.Tensor:
        """The partial sum of each rank, then their sum."""
        partials = {}
        for rank, of_rank in enumerate(owned):
            of_rank_terms = [term for k, term in terms.items() if experts[k] in of_rank]
            if of_rank_terms:
                partial = _weighted_sum(of_rank_terms)
                partials[rank] = travelled(partial[None], combine_dtype or dtype)[0]
        return _sum_of_ranks(partials, combine_dtype or dtype, ranks_per_node)

    return _combine_tokens(expert_out, received, topk_idx, topk_weights, dtype, add_up)


def combine_source(
    expert_out: list[torch.Tensor],
    received: list[ExpertRows],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    dtype: torch.dtype,
    combine_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """What every rank gets back with reduction "source": all rows go home, where a token adds them
    in k order, each times its weight, whichever ranks they come from.

    Args, Returns: as `combine`.
    """
    return _combine_tokens(
        [travelled(rows.float(), combine_dtype or dtype) for rows in expert_out],
        received,
        topk_idx,
        topk_weights,
        dtype,
        lambda terms, _: _weighted_sum(list(terms.values())),
    )


def _combine_tokens(
    expert_out: list[torch.Tensor],
    received: list[ExpertRows],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    dtype: torch.dtype,
    add_up: Callable[[dict[int, _Term], list[int]], torch.Tensor],
) -> list[torch.Tensor]:
    """As `combine`, with `add_up(terms, experts)`: of a token, its weights and rows by k, in order
    of k, and its experts, to the sum of rows times weights in float32."""
    row_of = [{origin: i for i, origin in enumerate(e.origins)} for e in received]
    outs = []
    for src_rank, (idx, weights) in enumerate(zip(topk_idx, topk_weights, strict=True)):
        out = torch.zeros((idx.shape[0], expert_out[0].shape[1]), dtype=dtype)
        for token, experts in enumerate(idx.tolist()):
            terms = {
                k: (weights[token, k], expert_out[e][row_of[e][src_rank, token]].float())
                for k, e in enumerate(experts)
                if e >= 0
            }
            if terms:
                out[token] = add_up(terms, experts).to(dtype)
        outs.append(out)
    return outs


def combine_rank_major(
    expert_out: list[list[torch.Tensor]],
    received: list[list[SourceRows]],
    num_tokens: list[int],
    dtype: torch.dtype,
    combine_dtype: torch.dtype | None = None,
    ranks_per_node: int | None = None,
) -> list[torch.Tensor]:
    """What every rank gets back in the rank-major layout.

    Args:
        expert_out: `[rank][src_rank]`, `[n, H]` of `dtype` in the order of `received`: what that
            rank's experts make of each message, weighted and summed.
        received: what `dispatch_rank_major` returned.
        num_tokens: T_r of each rank.
        combine_dtype, ranks_per_node: as in `combine`.

    Returns:
        Of each rank, `[T_r, H]` of `dtype`.
    """
    arrived = [
        [travelled(rows.float(), combine_dtype or dtype) for rows in of_rank]
        for of_rank in expert_out
    ]
    outs = []
    for src_rank, n in enumerate(num_tokens):
        out = torch.zeros((n, expert_out[0][0].shape[1]), dtype=dtype)
        for token in range(n):
            partials = {
                rank: rows[src_rank][sources[src_rank].tokens.index(token)]
                for rank, (rows, sources) in enumerate(zip(arrived, received, strict=True))
                if token in sources[src_rank].tokens
            }
            if partials:
                total = _sum_of_ranks(partials, combine_dtype or dtype, ranks_per_node)
                out[token] = total.to(dtype)
        outs.append(out)
    return outs


def _sum_of_ranks(
    partials: dict[int, torch.Tensor], combine_dtype: torch.dtype, ranks_per_node: int | None
) -> torch.Tensor:
    """Of a token's partial rows by rank, as they arrive, in rank order; hierarchical, of its nodes'
    sums, each as it arrives."""
    if ranks_per_node is None:
        return _ordered_sum(list(partials.values()))
    by_node: dict[int, list[torch.Tensor]] = {}
    for rank, partial in partials.items():
        by_node.setdefault(rank // ranks_per_node, []).append(partial)
    sums = torch.stack([_ordered_sum(of_node) for of_node in by_node.values()])
    return _ordered_sum(list(travelled(sums, combine_dtype)))


_Term: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A weight and a row, float32."""


def _weighted_sum(terms: list[_Term]) -> torch.Tensor:
    weight, row = terms[0]
    total = weight * row
    for weight, row in terms[1:]:
        total = multiply_add(weight, row, total)
    return total


def multiply_add(weight: torch.Tensor, row: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`weight * row + total` of float32, rounded once.

    A product of float32 is exact in float64. The sum is rounded there to odd, not to even, after
    which a second rounding to half as many bits is that of the exact sum (Boldo and Melquiond,
    "Emulation of a FMA and correctly rounded sums", 2008).
    """
    product, addend = weight.double() * row.double(), total.double()
    rounded = product + addend
    of_addend = rounded - product
    error = (product - (rounded - of_addend)) + (addend - of_addend)
    is_even = (rounded.view(torch.int64) & 1) == 0
    is_inexact = rounded.isfinite() & (error != 0)
    towards = torch.copysign(torch.full_like(rounded, torch.inf), error)
    to_odd = torch.nextafter(rounded, towards)
    return torch.where(is_inexact & is_even, to_odd, rounded).float()


def _ordered_sum(terms: list[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
