"""What the CPU's op benchmarks share: settings, what a way is, and the timing of ways in turns.

R ranks, T tokens of every rank.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist

from ep_backend.bench.op_processes import Report
from ep_backend.bench.routing import Inputs, make_inputs

# A block of copies lasts at least this long: several time slices of the scheduler, so that ranks
# which share a core also share it in the roofline.
MIN_ROOFLINE_BLOCK_SECS = 0.02
# Sums differ in order; in bfloat16 gloo's ways also round the weights (relative error 2^-9 each).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class BenchSettings:
    """What `ep-backend bench op` was asked for, whichever kernels."""

    kind: ClassVar[str]

    num_ranks: int = 2
    num_tokens: tuple[int, ...] = (1, 16, 64, 512)
    """T, one case each; every rank has as many."""
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
    """Bytes that a pair moves on this rank."""
    pair_us: dict[str, list[float]] = field(default_factory=dict)
    """By way: the time of each pair, in the order measured."""
    memcpy_us: list[float] = field(default_factory=list)
    """By round: the mean time to copy `num_bytes / 2`, which moves `num_bytes`."""


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


class Way(Protocol):
    """A way to exchange rows; both calls return when this rank has everything."""

    def dispatch(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """The rows that came, then what belongs to them."""
        ...

    def combine(self, rows: torch.Tensor, /) -> torch.Tensor:
        """`[T, H]`, of the dispatch before; `rows` lie as that has brought them."""
        ...


AnyWay = TypeVar("AnyWay", bound=Way)


def measure_cases(
    settings: BenchSettings,
    rank: int,
    report: Report,
    *,
    make_ways: Callable[[int], dict[str, AnyWay]],
    check: Callable[[Inputs, dict[str, AnyWay]], None],
    count_bytes: Callable[[int], int],
) -> None:
    """Times every way in every case, once they agree; a `RankReport` a case. Collective.

    Args:
        make_ways: of T; by name.
        check: raises AssertionError where ways differ.
        count_bytes: of T, that a pair moves on this rank.

    Raises:
        AssertionError: a way gave a wrong result.
    """
    for num_tokens in settings.num_tokens:
        ways = make_ways(num_tokens)
        inputs = settings.inputs(rank, num_tokens)
        check(inputs, ways)
        pairs = {name: _pair_of(way, inputs) for name, way in ways.items()}
        report(measure(settings, pairs, num_tokens, count_bytes(num_tokens)))


def _pair_of(way: Way, inputs: Inputs) -> Callable[[], None]:
    def pair() -> None:
        recv_x, *_ = way.dispatch(inputs)
        way.combine(recv_x)

    return pair


def measure(
    settings: BenchSettings, pairs: dict[str, Callable[[], None]], num_tokens: int, num_bytes: int
) -> RankReport:
    """Times a pair of every way, and memcpy, in turns. Collective.

    Args:
        pairs: by way; each is a dispatch and its combine.
        num_bytes: that a pair moves on this rank.
    """
    result = RankReport(num_tokens, num_bytes)
    memcpy = Memcpy(num_bytes)
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


def check_out(
    settings: BenchSettings, name: str, out: torch.Tensor, expected: torch.Tensor
) -> None:
    """Raises `AssertionError` for a wrong result: ours must be exact."""
    if name == "ours":
        is_right = torch.equal(out, expected)
    else:
        tolerance = TOLERANCE[settings.dtype]
        scale = float(expected.abs().max())
        is_right = torch.allclose(out, expected, rtol=tolerance, atol=tolerance * scale)
    if not is_right:
        raise AssertionError(f"{name}: combine is wrong")
