"""Shapes and operations of the normal kernels, with what must come out of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ep_backend import (
    Group,
    NormalBuffer,
    NormalDispatchHandle,
    NormalDispatchResult,
    VirtualWorld,
    _native,
    reference,
    reference_normal,
    virtual_world,
)
from ep_backend.normal_settings import NormalSettings, node_config
from tests.support.routing import make_routing
from tests.support.scenario import origin_of, payload, same_bits, values_of
from tests.support.shapes import Shape


@dataclass(frozen=True)
class NormalShape:
    """Arguments of a `NormalBuffer`, and how many ranks have one."""

    num_ranks: int
    hidden: int = 20
    num_experts: int = 8
    top_k: int = 3
    dtype: torch.dtype = torch.bfloat16
    num_tokens_per_round: int = 4
    """Decides on `num_bytes`: the least that gives so many."""
    dispatch_dtype: torch.dtype | None = None
    scale_format: str = "float32"
    ranks_per_node: int | None = None

    @property
    def is_float8(self) -> bool:
        return self.dispatch_dtype == torch.float8_e4m3fn

    def arguments(self, num_bytes: int) -> dict[str, Any]:
        """Of a buffer."""
        return dict(
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
            dispatch_dtype=self.dispatch_dtype,
            scale_format=self.scale_format,
            num_bytes=num_bytes,
        )

    def settings_arguments(self, num_bytes: int) -> dict[str, Any]:
        """As a buffer makes them of its own."""
        return self.arguments(num_bytes) | {"dispatch_dtype": self.dispatch_dtype or self.dtype}

    def settings(self, num_bytes: int) -> NormalSettings:
        return NormalSettings(**self.settings_arguments(num_bytes))

    @property
    def ranks_added_up(self) -> int | None:
        """On each node, before rows go home: `ranks_per_node` of `reference_normal.combine`."""
        is_several = self.ranks_per_node is not None and self.ranks_per_node < self.num_ranks
        return self.ranks_per_node if is_several else None

    def _config(self) -> _native.NormalConfig:
        config = self.settings(1 << 40).config(self.num_ranks)
        config.num_tokens_per_round = self.num_tokens_per_round
        return config

    def layout(self) -> _native.NormalLayout:
        return _native.NormalLayout(self._config())

    def node_config(self) -> _native.NormalNodeConfig:
        assert self.ranks_per_node is not None
        return node_config(self._config(), self.ranks_per_node)

    def node_layout(self) -> _native.NormalNodeLayout:
        return _native.NormalNodeLayout(self.node_config())

    def world(self, network_seed: int = 0) -> VirtualWorld:
        return virtual_world(
            self.num_ranks, ranks_per_node=self.ranks_per_node, network_seed=network_seed
        )

    def buffer(
        self, group: Group, timeout_secs: float = 30.0, spin_us: float | None = None
    ) -> NormalBuffer:
        layout = self.layout() if self.ranks_added_up is None else self.node_layout()
        buffer = NormalBuffer(
            group, **self.arguments(layout.num_bytes), timeout_secs=timeout_secs, spin_us=spin_us
        )
        assert buffer.num_tokens_per_round == self.num_tokens_per_round
        return buffer

    def as_low_latency(self) -> Shape:
        """For what the two families' tests share: routings and payloads."""
        return Shape(
            self.num_ranks,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
        )


@dataclass
class NormalCase:
    """One dispatch and its combine, on all ranks."""

    shape: NormalShape
    x: list[torch.Tensor]
    """What dispatch is given: of the buffer's dtype, or quantised already."""
    x_scales: list[torch.Tensor] | None
    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    biases: list[tuple[torch.Tensor, ...]]
    """Of each rank, none to two."""
    with_weights: bool
    """Combine takes weights home too."""
    received: list[reference_normal.ReceivedRows]
    combined: list[torch.Tensor]
    combined_weights: list[torch.Tensor]

    def inputs(self, rank: int) -> tuple[torch.Tensor, ...]:
        """Arguments of `dispatch`."""
        inputs = (self.x[rank], self.topk_idx[rank], self.topk_weights[rank])
        return inputs if self.x_scales is None else (*inputs, self.x_scales[rank])

    def rows(self, rank: int) -> dict[str, torch.Tensor]:
        """Arguments of a dispatch with a handle."""
        rows = dict(x=self.x[rank])
        return rows if self.x_scales is None else rows | dict(x_scales=self.x_scales[rank])

    def combine(self, buffer: NormalBuffer, result: NormalDispatchResult) -> None:
        """Of a dispatch of these inputs on one rank, checked."""
        rank = buffer.group.self_rank
        n = len(self.received[rank].rows)
        x = torch.full((len(result.recv_x), self.shape.hidden), float("nan"), dtype=buffer.dtype)
        x[:n] = rows_for_home(received_values(result, self.shape)[:n], rank)
        bias: torch.Tensor | tuple[torch.Tensor, ...] | None = self.biases[rank]
        if len(self.biases[rank]) < 2:
            bias = next(iter(self.biases[rank]), None)
        if not self.with_weights:
            check_combined(buffer.combine(x, result.handle, bias=bias), self, rank)
            return
        weights = torch.full((len(x), self.shape.top_k), float("nan"))
        weights[:n] = weights_for_home(result.recv_topk_weights[:n], rank)
        out, sums = buffer.combine(x, result.handle, topk_weights=weights, bias=bias)
        check_combined(out, self, rank)
        assert same_bits(sums, self.combined_weights[rank]), f"rank {rank}"

    def run(self, buffer: NormalBuffer) -> NormalDispatchHandle:
        """The operation on one rank, every result checked."""
        rank = buffer.group.self_rank
        result = buffer.dispatch(*self.inputs(rank))
        check_received(result, self, rank)
        assert result.num_recv_tokens_per_expert == self.received[rank].num_tokens_per_expert
        self.combine(buffer, result)
        return result.handle


def case_of(
    shape: NormalShape,
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    num_biases: int = 0,
    with_weights: bool = False,
    is_quantized: bool = False,
) -> NormalCase:
    """These inputs, and what the reference makes of them.

    Args:
        x: of the buffer's dtype.
        num_biases: that combine adds, none to two.
        is_quantized: the caller of dispatch has quantised `x`.
    """
    rows, scales = x, None
    if shape.is_float8:
        quantized = [reference.quantize(t, shape.scale_format) for t in x]
        rows, scales = [list(t) for t in zip(*quantized, strict=True)]
    received = reference_normal.dispatch(rows, topk_idx, topk_weights, shape.num_experts, scales)
    home = [
        rows_for_home(values_of(r.rows, r.scales, shape.dtype), rank)
        for rank, r in enumerate(received)
    ]
    num_tokens = [len(t) for t in x]
    biases = [
        tuple(bias_of(shape, rank, n, i) for i in range(num_biases))
        for rank, n in enumerate(num_tokens)
    ]
    weights = [weights_for_home(r.topk_weights, rank) for rank, r in enumerate(received)]
    sent, sent_scales = (rows, scales) if is_quantized else (x, None)
    return NormalCase(
        shape,
        sent,
        sent_scales,
        topk_idx,
        topk_weights,
        biases,
        with_weights,
        received,
        combined=reference_normal.combine(
            home, received, num_tokens, shape.dtype, biases, shape.ranks_added_up
        ),
        combined_weights=reference_normal.combine_weights(
            weights, received, num_tokens, shape.ranks_added_up
        ),
    )


def make_case(
    shape: NormalShape,
    routing: str,
    num_tokens: list[int],
    seed: int,
    idx_dtype: torch.dtype = torch.int64,
    **options: Any,
) -> NormalCase:
    """An operation to which rank r contributes `num_tokens[r]` tokens.

    Args:
        options: of `case_of`.
    """
    generator = torch.Generator().manual_seed(seed)
    like = shape.as_low_latency()
    x = [payload(like, rank, n, seed) for rank, n in enumerate(num_tokens)]
    idx = [make_routing(routing, like, n, generator).to(idx_dtype) for n in num_tokens]
    weights = [torch.randn((n, shape.top_k), generator=generator) for n in num_tokens]
    return case_of(shape, x, idx, weights, **options)


def rows_for_home(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """What a rank makes of its rows. Of three ranks' results, the order in which they are added
    shows: the terms are of very different sizes."""
    scale = (1 / 3, 1e3, -1e3, 7 / 3)[rank % 4]
    return (rows.float() * scale + rank / 7).to(rows.dtype)


def weights_for_home(topk_weights: torch.Tensor, rank: int) -> torch.Tensor:
    """What a rank makes of the weights of its rows. As in `rows_for_home`, the order shows."""
    return topk_weights * (1 / 3, 1e3, -1e3, 7 / 3)[rank % 4] + rank / 7


def bias_of(shape: NormalShape, rank: int, num_tokens: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * rank + number)
    bias = torch.randn((num_tokens, shape.hidden), generator=generator)
    return (bias * (1e3, -0.1)[number]).to(shape.dtype)


def received_values(result: NormalDispatchResult, shape: NormalShape) -> torch.Tensor:
    """What experts compute with: received rows as the buffer's dtype."""
    return values_of(result.recv_x, scales_of(result, shape), shape.dtype)


def scales_of(result: NormalDispatchResult, shape: NormalShape) -> torch.Tensor | None:
    """`recv_scales` as float32."""
    if result.recv_scales is None or shape.scale_format != "ue8m0":
        return result.recv_scales
    return reference.unpack_ue8m0(result.recv_scales, result.handle.buffer.num_scales)


def check_received(result: NormalDispatchResult, case: NormalCase, rank: int) -> None:
    """Every received row, in order. Raises AssertionError that says whose row is wrong."""
    expected = case.received[rank]
    n = len(expected.rows)
    assert int(result.handle.num_recv_tokens_per_rank.sum()) == n, f"rank {rank}"
    got, got_scales = result.recv_x[:n], scales_of(result, case.shape)
    if not same_bits(got, expected.rows):
        row = next(i for i in range(n) if not same_bits(got[i], expected.rows[i]))
        of_got, of_expected = (s if s is None else s[row] for s in (got_scales, expected.scales))
        raise AssertionError(
            f"rank {rank}, row {row}: expected ({origin_of(expected.rows[row], of_expected)}), "
            f"got ({origin_of(got[row], of_got)})"
        )
    assert (got_scales is None) == (expected.scales is None)
    if got_scales is not None and expected.scales is not None:
        assert same_bits(got_scales[:n], expected.scales), f"rank {rank}: scales"
    assert torch.equal(result.recv_topk_idx[:n], expected.topk_idx), f"rank {rank}"
    assert same_bits(result.recv_topk_weights[:n], expected.topk_weights), f"rank {rank}"
    assert (result.recv_topk_idx[n:] == -1).all(), f"rank {rank}: unused rows list experts"
    tokens = [token for _, token in expected.origins] + [-1] * (len(result.recv_x) - n)
    assert result.handle.recv_src_tokens.tolist() == tokens, f"rank {rank}"


def check_combined(out: torch.Tensor, case: NormalCase, rank: int) -> None:
    expected = case.combined[rank]
    assert out.shape == expected.shape
    if not same_bits(out, expected):
        token = next(t for t in range(len(out)) if not same_bits(out[t], expected[t]))
        raise AssertionError(
            f"rank {rank}, token {token} of experts {case.topk_idx[rank][token].tolist()}: "
            f"is {out[token]}, expected {expected[token]}"
        )
