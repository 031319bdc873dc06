"""One rank's part of `ep-backend bench op`: check every way, then time them in turns.

R ranks, T tokens of every rank, M most tokens of a rank, H hidden, K top_k, L experts of this rank,
S = R * M rows an expert has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch

from ep_backend import Group, LowLatencyBuffer, reference
from ep_backend.bench import op_measure
from ep_backend.bench.op_gloo import GlooAllGather, GlooAllToAll, Shape
from ep_backend.bench.op_measure import BenchSettings, check_out, measure_cases
from ep_backend.bench.op_processes import RANK_TIMEOUT_SECS, Report
from ep_backend.bench.routing import Inputs

# Tokens a rank of the comparison with the reference, which is slow.
NUM_CHECK_TOKENS = 8


@dataclass(frozen=True)
class OpBenchSettings(BenchSettings):
    """What `ep-backend bench op` was asked for."""

    kind: ClassVar[str] = "low-latency"

    num_max_tokens_per_rank: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_max_tokens_per_rank < max(self.num_tokens):
            raise ValueError(
                f"num_max_tokens_per_rank is {self.num_max_tokens_per_rank}, expected at least the "
                f"largest number of tokens, {max(self.num_tokens)}"
            )

    def shape(self, num_tokens: int) -> Shape:
        return Shape(
            self.num_ranks,
            num_tokens,
            self.num_max_tokens_per_rank,
            self.hidden,
            self.num_experts,
            self.top_k,
            self.dtype,
        )


class Way(op_measure.Way, Protocol):
    def dispatch(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """`recv_x` `[L, S, H]` and `[L]` counts."""
        ...


class Ours:
    def __init__(self, buffer: LowLatencyBuffer, num_tokens: int) -> None:
        self._buffer = buffer
        self._out = torch.empty(num_tokens, buffer.hidden, dtype=buffer.dtype)

    def dispatch(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        result, recv_hook = self._buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)
        recv_hook()
        self._handle = result.handle
        return result.recv_x, result.num_recv_tokens_per_expert

    def combine(self, expert_out: torch.Tensor) -> torch.Tensor:
        out, recv_hook = self._buffer.combine(expert_out, self._handle, self._out)
        recv_hook()
        return out


def count_bytes(settings: OpBenchSettings, rank: int, num_tokens: int) -> int:
    """Bytes of rows that the contract makes `rank` move in a pair, each read or write once.

    Dispatch reads T rows of x, writes one message to each (token, rank) it goes to, reads the
    messages it got and writes one row to each (token, local expert). Combine reads those rows,
    writes one partial row for each message it got, reads one for each it sent, and writes T rows.
    """
    num_rows = 2 * num_tokens
    for src_rank in range(settings.num_ranks):
        topk_idx = settings.inputs(src_rank, num_tokens).topk_idx
        for dst_rank in range(settings.num_ranks):
            own = reference.experts_of_rank(settings.num_experts, settings.num_ranks, dst_rank)
            is_local = (topk_idx >= own.start) & (topk_idx < own.stop)
            num_messages = int(is_local.any(1).sum())
            num_rows += 2 * num_messages * ((src_rank == rank) + (dst_rank == rank))
            num_rows += 2 * int(is_local.sum()) * (dst_rank == rank)
    return num_rows * settings.hidden * settings.dtype.itemsize


def bench_rank(rank: int, settings: OpBenchSettings, report: Report) -> None:
    """Measures every case; makes one `RankReport` a case. Collective.

    Raises:
        AssertionError: a way gave a wrong result.
    """
    torch.set_num_threads(1)
    group = Group.from_process_group(timeout_secs=RANK_TIMEOUT_SECS)
    with (
        torch.inference_mode(),
        LowLatencyBuffer(
            group,
            num_max_tokens_per_rank=settings.num_max_tokens_per_rank,
            hidden=settings.hidden,
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            dtype=settings.dtype,
        ) as buffer,
    ):
        make_ways = partial(_make_ways, settings, rank, buffer)
        num_check_tokens = min(NUM_CHECK_TOKENS, settings.num_max_tokens_per_rank)
        _check_against_reference(settings, rank, num_check_tokens, make_ways(num_check_tokens))
        measure_cases(
            settings,
            rank,
            report,
            make_ways=make_ways,
            check=partial(_check_against_each_other, settings),
            count_bytes=partial(count_bytes, settings, rank),
        )


def _make_ways(
    settings: OpBenchSettings, rank: int, buffer: LowLatencyBuffer, num_tokens: int
) -> dict[str, Way]:
    shape = settings.shape(num_tokens)
    return {
        "ours": Ours(buffer, num_tokens),
        "gloo_all_to_all": GlooAllToAll(shape, rank),
        "gloo_all_gather": GlooAllGather(shape, rank),
    }


def _check_against_reference(
    settings: OpBenchSettings, rank: int, num_tokens: int, ways: dict[str, Way]
) -> None:
    """Every way equals the reference. Each expert multiplies by its number, so that a row of the
    wrong expert is noticed."""
    inputs = [settings.inputs(r, num_tokens) for r in range(settings.num_ranks)]
    topk_idx = [i.topk_idx for i in inputs]
    expected = reference.dispatch([i.x for i in inputs], topk_idx, settings.num_experts)
    expert_out = [e.rows * (number + 1) for number, e in enumerate(expected)]
    weights = [i.topk_weights for i in inputs]
    expected_out = reference.combine(expert_out, expected, topk_idx, weights, settings.dtype)[rank]
    own = reference.experts_of_rank(settings.num_experts, settings.num_ranks, rank)
    for name, way in ways.items():
        recv_x, counts = way.dispatch(inputs[rank])
        y = torch.zeros_like(recv_x)
        for local, expert in enumerate(own):
            rows, num_rows = expected[expert].rows, int(counts[local])
            if not torch.equal(recv_x[local, :num_rows], rows):
                raise AssertionError(f"{name}: rows of expert {expert} on rank {rank} are wrong")
            y[local, :num_rows] = expert_out[expert]
        check_out(settings, name, way.combine(y), expected_out)


def _check_against_each_other(
    settings: OpBenchSettings, inputs: Inputs, ways: dict[str, Way]
) -> None:
    """With all tokens of a case: every way gives what ours gives, which its tests compare with the
    reference."""
    ours, *others = ways
    recv_x, counts = ways[ours].dispatch(inputs)
    out = ways[ours].combine(recv_x)
    for name in others:
        other_recv_x, other_counts = ways[name].dispatch(inputs)
        if counts.tolist() != other_counts.tolist():
            raise AssertionError(f"{name}: counts {other_counts.tolist()}, ours {counts.tolist()}")
        for local, num_rows in enumerate(counts.tolist()):
            if not torch.equal(recv_x[local, :num_rows], other_recv_x[local, :num_rows]):
                raise AssertionError(f"{name}: rows of local expert {local} differ from ours")
        check_out(settings, name, ways[name].combine(other_recv_x), out)
