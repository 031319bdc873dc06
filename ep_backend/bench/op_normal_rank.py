"""One rank's part of `ep-backend bench op --kind normal`: check every way, then time them in turns.

R ranks, T tokens of every rank, N rows received, H hidden, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch

from ep_backend import Group, NormalBuffer, reference, reference_normal
from ep_backend.bench import op_measure
from ep_backend.bench.op_measure import BenchSettings, check_out, measure_cases
from ep_backend.bench.op_normal_gloo import NormalAllGather, NormalAllToAll, Received
from ep_backend.bench.op_processes import RANK_TIMEOUT_SECS, Report
from ep_backend.bench.routing import Inputs

# Tokens a rank of the comparison with the reference, which is slow.
NUM_CHECK_TOKENS = 40


@dataclass(frozen=True)
class NormalBenchSettings(BenchSettings):
    """What `ep-backend bench op --kind normal` was asked for."""

    kind: ClassVar[str] = "normal"

    num_tokens: tuple[int, ...] = (512, 2048, 4096)
    dtype: torch.dtype = torch.bfloat16
    num_iterations: int = 30
    num_warmup: int = 3
    num_bytes: int = 64 << 20
    """Of symmetric memory that a rank takes."""


class Way(op_measure.Way, Protocol):
    def dispatch(self, inputs: Inputs) -> Received: ...


class Ours:
    def __init__(self, buffer: NormalBuffer) -> None:
        self._buffer = buffer

    def dispatch(self, inputs: Inputs) -> Received:
        result = self._buffer.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)
        self._handle = result.handle
        return result.recv_x, result.recv_topk_idx, result.recv_topk_weights

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        return self._buffer.combine(rows, self._handle)


def count_bytes(settings: NormalBenchSettings, rank: int, num_tokens: int) -> int:
    """Bytes of rows that the contract makes `rank` move in a pair, each read or write once.

    Dispatch reads T rows of x, writes one message to each (token, rank) it goes to, reads the
    messages it got and writes a row of `recv_x` for each. Combine reads those rows, writes each to
    its source, reads what it gets itself, and writes T rows.
    """
    num_rows = 2 * num_tokens
    for src_rank in range(settings.num_ranks):
        topk_idx = settings.inputs(src_rank, num_tokens).topk_idx
        for dst_rank in range(settings.num_ranks):
            own = reference.experts_of_rank(settings.num_experts, settings.num_ranks, dst_rank)
            num_messages = int(((topk_idx >= own.start) & (topk_idx < own.stop)).any(1).sum())
            num_rows += num_messages * (2 * (src_rank == rank) + 4 * (dst_rank == rank))
    return num_rows * settings.hidden * settings.dtype.itemsize


def bench_normal_rank(rank: int, settings: NormalBenchSettings, report: Report) -> None:
    """Measures every case; makes one `RankReport` a case. Collective.

    Raises:
        AssertionError: a way gave a wrong result.
    """
    torch.set_num_threads(1)
    group = Group.from_process_group(timeout_secs=RANK_TIMEOUT_SECS)
    with (
        torch.inference_mode(),
        NormalBuffer(
            group,
            hidden=settings.hidden,
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            dtype=settings.dtype,
            num_bytes=settings.num_bytes,
        ) as buffer,
    ):
        make_ways = partial(_make_ways, settings, rank, buffer)
        _check_against_reference(settings, rank, NUM_CHECK_TOKENS, make_ways(NUM_CHECK_TOKENS))
        measure_cases(
            settings,
            rank,
            report,
            make_ways=make_ways,
            check=partial(_check_against_each_other, settings),
            count_bytes=partial(count_bytes, settings, rank),
        )


def _make_ways(
    settings: NormalBenchSettings, rank: int, buffer: NormalBuffer, num_tokens: int
) -> dict[str, Way]:
    return {
        "ours": Ours(buffer),
        "gloo_all_to_all": NormalAllToAll(settings, rank, num_tokens),
        "gloo_all_gather": NormalAllGather(settings, rank, num_tokens),
    }


def _check_against_reference(
    settings: NormalBenchSettings, rank: int, num_tokens: int, ways: dict[str, Way]
) -> None:
    """Every way equals the reference. Each rank multiplies by its number, so that a row of the
    wrong rank is noticed."""
    inputs = [settings.inputs(r, num_tokens) for r in range(settings.num_ranks)]
    received = reference_normal.dispatch(
        [i.x for i in inputs],
        [i.topk_idx for i in inputs],
        [i.topk_weights for i in inputs],
        settings.num_experts,
    )
    home = [of_rank.rows * (r + 1) for r, of_rank in enumerate(received)]
    sizes = [num_tokens] * settings.num_ranks
    expected_out = reference_normal.combine(home, received, sizes, settings.dtype)[rank]
    mine = received[rank]
    for name, way in ways.items():
        _check_received(
            name, way.dispatch(inputs[rank]), mine.rows, mine.topk_idx, mine.topk_weights
        )
        check_out(settings, name, way.combine(home[rank]), expected_out)


def _check_against_each_other(
    settings: NormalBenchSettings, inputs: Inputs, ways: dict[str, Way]
) -> None:
    """With all tokens of a case: every way gives what ours gives, which its tests compare with the
    reference."""
    ours, *others = ways
    received = ways[ours].dispatch(inputs)
    out = ways[ours].combine(received[0])
    for name in others:
        _check_received(name, ways[name].dispatch(inputs), *received)
        check_out(settings, name, ways[name].combine(received[0]), out)


def _check_received(name: str, got: Received, *expected: torch.Tensor) -> None:
    for what, tensor, other in zip(("rows", "experts", "weights"), got, expected, strict=True):
        if not torch.equal(tensor, other):
            raise AssertionError(f"{name}: {what} are wrong")
