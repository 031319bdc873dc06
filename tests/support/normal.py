"""Shapes and operations of the normal kernels, with what must come out of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_backend import (
    Group,
    NormalBuffer,
    NormalDispatchHandle,
    NormalDispatchResult,
    _native,
    reference_normal,
)
from ep_backend.normal_settings import NormalSettings
from tests.support.routing import make_routing
from tests.support.scenario import origin_of, payload, same_bits
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

    def layout(self) -> _native.NormalLayout:
        unbounded = NormalSettings(self.hidden, self.num_experts, self.top_k, self.dtype, 1 << 40)
        config = unbounded.config(self.num_ranks)
        config.num_tokens_per_round = self.num_tokens_per_round
        return _native.NormalLayout(config)

    def buffer(
        self, group: Group, timeout_secs: float = 30.0, spin_us: float | None = None
    ) -> NormalBuffer:
        buffer = NormalBuffer(
            group,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
            num_bytes=self.layout().num_bytes,
            timeout_secs=timeout_secs,
            spin_us=spin_us,
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

    x: list[torch.Tensor]
    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    received: list[reference_normal.ReceivedRows]
    combined: list[torch.Tensor]

    def inputs(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments of `dispatch`."""
        return self.x[rank], self.topk_idx[rank], self.topk_weights[rank]

    def run(self, buffer: NormalBuffer) -> NormalDispatchHandle:
        """The operation on one rank, every result checked."""
        rank = buffer.group.self_rank
        result = buffer.dispatch(*self.inputs(rank))
        check_received(result, self, rank)
        assert result.num_recv_tokens_per_expert == self.received[rank].num_tokens_per_expert
        out = buffer.combine(rows_for_home(result.recv_x, rank), result.handle)
        check_combined(out, self, rank)
        return result.handle


def case_of(
    shape: NormalShape,
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
) -> NormalCase:
    """These inputs, and what the reference makes of them."""
    received = reference_normal.dispatch(x, topk_idx, topk_weights, shape.num_experts)
    home = [rows_for_home(r.rows, rank) for rank, r in enumerate(received)]
    num_tokens = [len(t) for t in x]
    combined = reference_normal.combine(home, received, num_tokens, shape.dtype)
    return NormalCase(x, topk_idx, topk_weights, received, combined)


def make_case(
    shape: NormalShape,
    routing: str,
    num_tokens: list[int],
    seed: int,
    idx_dtype: torch.dtype = torch.int64,
) -> NormalCase:
    """An operation to which rank r contributes `num_tokens[r]` tokens."""
    generator = torch.Generator().manual_seed(seed)
    like = shape.as_low_latency()
    x = [payload(like, rank, n, seed) for rank, n in enumerate(num_tokens)]
    idx = [make_routing(routing, like, n, generator).to(idx_dtype) for n in num_tokens]
    weights = [torch.randn((n, shape.top_k), generator=generator) for n in num_tokens]
    return case_of(shape, x, idx, weights)


def rows_for_home(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """What a rank makes of its rows. Of three ranks' results, the order in which they are added
    shows: the terms are of very different sizes."""
    scale = (1 / 3, 1e3, -1e3, 7 / 3)[rank % 4]
    return (rows.float() * scale + rank / 7).to(rows.dtype)


def check_received(result: NormalDispatchResult, case: NormalCase, rank: int) -> None:
    """Every received row, in order. Raises AssertionError that says whose row is wrong."""
    expected = case.received[rank]
    n = len(expected.rows)
    assert int(result.handle.num_recv_tokens_per_rank.sum()) == n, f"rank {rank}"
    got = result.recv_x[:n]
    if not same_bits(got, expected.rows):
        row = next(i for i in range(n) if not same_bits(got[i], expected.rows[i]))
        raise AssertionError(
            f"rank {rank}, row {row}: expected ({origin_of(expected.rows[row], None)}), "
            f"got ({origin_of(got[row], None)})"
        )
    assert torch.equal(result.recv_topk_idx[:n], expected.topk_idx), f"rank {rank}"
    assert same_bits(result.recv_topk_weights[:n], expected.topk_weights), f"rank {rank}"
    assert (result.recv_topk_idx[n:] == -1).all(), f"rank {rank}: unused rows list experts"


def check_combined(out: torch.Tensor, case: NormalCase, rank: int) -> None:
    expected = case.combined[rank]
    assert out.shape == expected.shape
    if not same_bits(out, expected):
        token = next(t for t in range(len(out)) if not same_bits(out[t], expected[t]))
        raise AssertionError(
            f"rank {rank}, token {token} of experts {case.topk_idx[rank][token].tolist()}: "
            f"is {out[token]}, expected {expected[token]}"
        )
