"""One rank's part of `ep-backend bench op`: check every way, then time them in turns.

R ranks, T tokens of every rank, M most tokens of a rank, H hidden, K top_k, L experts of this rank,
S = R * M rows an expert has room for.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from ep_backend import Group, LowLatencyBuffer, reference
from ep_backend.bench.op_gloo import GlooAllGather, GlooAllToAll, Shape
from ep_backend.bench.op_processes import RANK_TIMEOUT_SECS, Report
from ep_backend.bench.routing import Inputs, make_inputs

# Tokens a rank of the comparison with the reference, which is slow.
NUM_CHECK_TOKENS = 8
# A block of copies lasts at least this long: several time slices of the scheduler, so that ranks
# which share a core also share it in the roofline.
MIN_ROOFLINE_BLOCK_SECS = 0.02
# Sums differ in order; in bfloat16 gloo's ways also round the weights (relative error 2^-9 each).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class OpBenchSettings:
    """What `ep-backend bench op` was asked for."""

    num_ranks: int = 2
    num_tokens: tuple[int, ...] = (1, 16, 64, 512)
    """T, one case each; every rank has as many."""
    num_max_tokens_per_rank: int = 512
    hidden: int = 2048
    num_experts: int = 64
    top_k: int = 8
    dtype: torch.dtype = torch.float32
    num_iterations: int = 100
    """Pairs timed for each way and case, in `num_rounds` blocks."""
    num_warmup: int = 10
    num_rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_iterations", "num_rounds", "hidden", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.num_tokens or min(self.num_tokens) < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}, expected positive numbers")
        if self.num_max_tokens_per_rank < max(self.num_tokens):
            raise ValueError(
                f"num_max_tokens_per_rank is {self.num_max_tokens_per_rank}, expected at least the "
                f"largest number of tokens, {max(self.num_tokens)}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, expected at most {self.num_experts} experts")
        if self.num_experts < self.num_ranks:
            raise ValueError(
                f"num_experts is {self.num_experts}, expected at least num_ranks, {self.num_ranks}"
            )
        if self.dtype not in TOLERANCE:
            raise ValueError(f"dtype is {self.dtype}, expected {' or '.join(map(str, TOLERANCE))}")
        if self.hidden * self.dtype.itemsize % 4 != 0:
            raise ValueError(
                f"hidden is {self.hidden}, expected an even number: metadata are 32-bit words"
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

    def inputs(self, rank: int, num_tokens: int) -> Inputs:
        return make_inputs(
            self.seed,
            rank,
            num_tokens=num_tokens,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
        )


@dataclass
class RankReport:
    """What one rank measured in one case."""

    num_tokens: int
    num_bytes: int
    """Bytes that a pair moves on this rank; `count_bytes` says what counts."""
    pair_us: dict[str, list[float]] = field(default_factory=dict)
    """By way: the time of each pair, in the order measured."""
    memcpy_us: list[float] = field(default_factory=list)
    """By round: the mean time to copy `num_bytes / 2`, which moves `num_bytes`."""


class Way(Protocol):
    """A way to exchange rows; both calls return when this rank has everything."""

    def dispatch(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """`recv_x` `[L, S, H]` and `[L]` counts."""
        ...

    def combine(self, expert_out: torch.Tensor) -> torch.Tensor:
        """`[T, H]`, of the dispatch before."""
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


class Memcpy:
    """The roofline: one plain copy between two private buffers.

    Source and destination together are as large as the memory that a pair touches: each buffer
    between two halves is used twice, but there are two banks of it. So a case that fits a cache is
    compared with a copy that fits it.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes // 2
        # Written once, so that every page is there.
        self._src = torch.ones(self._num_bytes, dtype=torch.uint8)
        self._dst = torch.ones(self._num_bytes, dtype=torch.uint8)

    def __call__(self) -> None:
        ctypes.memmove(self._dst.data_ptr(), self._src.data_ptr(), self._num_bytes)


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
        num_check_tokens = min(NUM_CHECK_TOKENS, settings.num_max_tokens_per_rank)
        _check_against_reference(
            settings, rank, num_check_tokens, _make_ways(settings, rank, num_check_tokens, buffer)
        )
        for num_tokens in settings.num_tokens:
            ways = _make_ways(settings, rank, num_tokens, buffer)
            inputs = settings.inputs(rank, num_tokens)
            _check_against_each_other(settings, inputs, ways)
            report(_measure(settings, rank, inputs, ways))


def _make_ways(
    settings: OpBenchSettings, rank: int, num_tokens: int, buffer: LowLatencyBuffer
) -> dict[str, Way]:
    shape = settings.shape(num_tokens)
    return {
        "ours": Ours(buffer, num_tokens),
        "gloo_all_to_all": GlooAllToAll(shape, rank),
        "gloo_all_gather": GlooAllGather(shape, rank),
    }


def _measure(
    settings: OpBenchSettings, rank: int, inputs: Inputs, ways: dict[str, Way]
) -> RankReport:
    num_tokens = len(inputs.x)
    result = RankReport(num_tokens, count_bytes(settings, rank, num_tokens))
    memcpy = Memcpy(result.num_bytes)

    def pair_of(way: Way) -> Callable[[], None]:
        def pair() -> None:
            recv_x, _ = way.dispatch(inputs)
            way.combine(recv_x)

        return pair

    pairs = {name: pair_of(way) for name, way in ways.items()}
    for pair in pairs.values():
        _time_block(pair, settings.num_warmup)
    num_copies = _num_copies(memcpy)
    for round_idx in range(settings.num_rounds):
        # Iterations that do not divide evenly go to the first rounds.
        num_pairs = len(range(round_idx, settings.num_iterations, settings.num_rounds))
        for name, pair in pairs.items():
            result.pair_us.setdefault(name, []).extend(_time_block(pair, num_pairs))
        copies_us = _time_block(memcpy, num_copies)
        result.memcpy_us.append(sum(copies_us) / num_copies)
    return result


def _time_block(run: Callable[[], None], num_times: int) -> list[float]:
    """Microseconds of each of `num_times` runs, after a barrier and one run that is not counted:
    ranks leave a barrier at different times."""
    dist.barrier()
    run()
    times_us = []
    for _ in range(num_times):
        begin_ns = time.perf_counter_ns()
        run()
        times_us.append((time.perf_counter_ns() - begin_ns) / 1e3)
    return times_us


def _num_copies(memcpy: Memcpy) -> int:
    """How many make a block of `MIN_ROOFLINE_BLOCK_SECS`; the same on every rank."""
    times_us = _time_block(memcpy, 5)
    slowest_us = torch.tensor(sorted(times_us)[2])
    dist.all_reduce(slowest_us, dist.ReduceOp.MIN)
    return int(MIN_ROOFLINE_BLOCK_SECS * 1e6 / slowest_us.item()) + 2


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
        _check_out(settings, name, way.combine(y), expected_out)


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
        _check_out(settings, name, ways[name].combine(other_recv_x), out)


def _check_out(
    settings: OpBenchSettings, name: str, out: torch.Tensor, expected: torch.Tensor
) -> None:
    if name == "ours":
        is_right = torch.equal(out, expected)
    else:
        tolerance = TOLERANCE[settings.dtype]
        scale = float(expected.abs().max())
        is_right = torch.allclose(out, expected, rtol=tolerance, atol=tolerance * scale)
    if not is_right:
        raise AssertionError(f"{name}: combine is wrong")
