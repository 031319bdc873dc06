"""The normal kernels in the multi-GPU benchmark, on one rank: checked, timed, checked again.

GB/s over the link are bytes of rows (with their scales) that a rank sends to all others, or fetches
from them, by time; in the other direction flow as many. Which experts a row is for travels beside
it, and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ep_backend import NormalBuffer
from ep_backend.bench.multi_gpu_copies import Copies, CopyTimes
from ep_backend.bench.multi_gpu_settings import NormalSettings
from ep_backend.bench.multi_gpu_world import Queue, RankedSpread, Replayed, World, time_chain
from ep_backend.bench.op_cuda_bytes import BF16_BYTES, travelling_row_bytes
from ep_backend.bench.op_cuda_graph import capture
from ep_backend.bench.op_cuda_normal_case import (
    NormalCase,
    NormalSizes,
    RankOps,
    check_combined,
    check_received,
    make_buffer,
    make_inputs,
    tokens_for,
)
from ep_backend.bench.op_cuda_settings import TRAVELLING_DTYPES
from ep_backend.bench.routing import Inputs
from ep_backend.reference import experts_of_rank


@dataclass(frozen=True)
class Traffic:
    """Rows of a batch, the mean of all ranks."""

    num_tokens: int
    """T of a rank."""
    num_rows: float
    """That a rank sends, to itself, too."""
    num_remote_rows: float
    """To others."""

    def link_bytes(self, row_bytes: int) -> int:
        """Out of a rank."""
        return round(self.num_remote_rows * row_bytes)

    def moved_bytes(self, hidden: int, row_bytes: int) -> int:
        """Read plus written by a rank's SMs: a token's own row, and a row for each rank of it."""
        return round(self.num_tokens * hidden * BF16_BYTES + self.num_rows * row_bytes)


def traffic_of(topk_idx: list[torch.Tensor], num_experts: int) -> Traffic:
    """From every rank's `[T, K]`."""
    num_ranks, num_rows, num_own = len(topk_idx), 0, 0
    for dst_rank in range(num_ranks):
        own = experts_of_rank(num_experts, num_ranks, dst_rank)
        for src_rank, idx in enumerate(topk_idx):
            num_sent = int(((idx >= own.start) & (idx < own.stop)).any(1).sum())
            num_rows += num_sent
            num_own += num_sent if src_rank == dst_rank else 0
    num_tokens = len(topk_idx[0])
    return Traffic(num_tokens, num_rows / num_ranks, (num_rows - num_own) / num_ranks)


@dataclass(frozen=True)
class NormalTimes:
    """Of one number of SMs. Without `exact_dispatch`, the host waits for nothing."""

    dispatch: RankedSpread
    """Routes, counts and rows (`num_worst_tokens`)."""
    exact_dispatch: RankedSpread
    """The same, but the host waits for counts: what a stream sees, Python included."""
    cached_dispatch: RankedSpread
    """Rows alone."""
    combine: RankedSpread
    """Of rows that experts have put where combine finds them."""
    copied_combine: RankedSpread
    """Of rows anywhere, which are copied first."""

    def to_json(self) -> dict[str, Any]:
        spreads = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: asdict(ranked.spread) for name, ranked in spreads.items()} | {
            "rank_difference_us": max(r.rank_difference_us for r in spreads.values())
        }


def gbs(num_bytes: int, times: RankedSpread) -> float:
    return num_bytes / times.spread.median_us / 1e3


def result_of(
    times: NormalTimes, copies: tuple[CopyTimes, CopyTimes], moved_bytes: tuple[int, int]
) -> dict[str, Any]:
    """What goes into JSON.

    Args:
        copies: of as many bytes as dispatch, and combine, bring over the link.
        moved_bytes: by dispatch, and by combine.
    """
    dispatch, combine = copies
    rates = {}
    for name, op, copy, by_sms, moved in (
        ("dispatch", times.dispatch, dispatch, dispatch.push, moved_bytes[0]),
        ("cached_dispatch", times.cached_dispatch, dispatch, dispatch.push, moved_bytes[0]),
        ("combine", times.combine, combine, combine.pull, moved_bytes[1]),
    ):
        rates[f"{name}_gbs"] = gbs(copy.num_bytes, op)
        rates[f"{name}_copy_fraction"] = gbs(copy.num_bytes, op) / gbs(copy.num_bytes, copy.engine)
        rates[f"{name}_sms_copy_fraction"] = gbs(moved, op) / gbs(2 * copy.num_bytes, by_sms)
    return times.to_json() | rates


def sizes_of(settings: NormalSettings) -> NormalSizes:
    return NormalSizes(
        hidden=settings.hidden,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        chain=settings.chain,
        num_repeats=settings.num_repeats,
        seed=settings.seed,
    )


def copies_of(world: World, settings: NormalSettings) -> Copies:
    """With room for what a rank's largest batch sends to others. Collective."""
    num_others = min(world.group.num_ranks - 1, settings.top_k)
    num_rows = max(settings.num_tokens) * max(num_others, 1)
    num_max_bytes = num_rows * settings.hidden * BF16_BYTES
    return Copies(world, sizes_of(settings), settings.num_sms, num_max_bytes)


class NormalBench:
    """One size and dtype, on one rank; collective."""

    def __init__(self, world: World, settings: NormalSettings, num_tokens: int, dtype: str) -> None:
        self._world = world
        num_ranks = world.group.num_ranks
        self._sizes = sizes_of(settings)
        self._case = NormalCase(num_ranks, num_tokens, dtype, settings.num_sms[-1])
        self._all_num_sms = settings.num_sms

    def run(self, copies: Copies, report: Callable[..., None]) -> None:
        """
        Args:
            report: takes each result, with its SMs, as it goes into JSON.

        Raises:
            StepFailed: on every rank, where any rank's result is wrong or its kernels have failed.
        """
        world, sizes, case = self._world, self._sizes, self._case
        inputs = world.step(
            lambda: [make_inputs(sizes, case, rank) for rank in range(case.num_ranks)]
        )
        received = [tokens_for(sizes, case, inputs, rank) for rank in range(case.num_ranks)]
        num_worst = max(map(len, received))
        make = partial(make_buffer, sizes, case, world.group, num_worst, case.num_sms)
        buffer = world.step(make)
        try:
            ops = RankOps(buffer, inputs[world.group.self_rank], num_worst)
            self._run(ops, inputs, received[world.group.self_rank], copies, report)
        finally:
            with suppress(RuntimeError):  # the case has failed for that reason already
                torch.cuda.synchronize()
            world.gather(None)  # no peer may still reach what is unmapped now
            buffer.close()

    def _run(
        self,
        ops: RankOps,
        inputs: list[Inputs],
        tokens: torch.Tensor,
        copies: Copies,
        report: Callable[..., None],
    ) -> None:
        world, sizes, case = self._world, self._sizes, self._case
        traffic = traffic_of([i.topk_idx for i in inputs], sizes.num_experts)
        x = torch.cat([i.x for i in inputs])
        for dispatch in (ops.dispatch_exactly, ops.dispatch):
            world.step(partial(_check_dispatch, ops, dispatch, x, tokens, world.group.self_rank))
        del x, inputs
        world.step(partial(self._check_combine, ops))
        rows = ops.rows.clone()
        lead_in = world.step(lambda: capture([ops.dispatch]))

        row_bytes = travelling_row_bytes(TRAVELLING_DTYPES[case.dispatch_dtype], sizes.hidden)
        all_row_bytes = (row_bytes, sizes.hidden * BF16_BYTES)
        of_dispatch, of_combine = (copies.of(traffic.link_bytes(b), lead_in) for b in all_row_bytes)
        moved = (
            traffic.moved_bytes(sizes.hidden, all_row_bytes[0]),
            traffic.moved_bytes(sizes.hidden, all_row_bytes[1]),
        )
        for num_sms in self._all_num_sms:
            ops.num_sms = num_sms
            times = self._time(ops, rows)
            world.step(partial(self._check_combine, ops))
            of_copies = (of_dispatch[num_sms], of_combine[num_sms])
            result = result_of(times, of_copies, moved)
            result["num_symmetric_bytes"] = ops.buffer.num_symmetric_bytes
            report(replace(case, num_sms=num_sms), traffic, result)

    def _time(self, ops: RankOps, rows: torch.Tensor) -> NormalTimes:
        world, sizes = self._world, self._sizes

        def chain(act: Callable[[], object], num_ops: int) -> torch.cuda.CUDAGraph:
            def branch() -> None:
                for _ in range(num_ops):
                    act()

            return capture([branch])

        def time(lead_in: Replayed, replayed: Replayed) -> RankedSpread:
            return time_chain(
                world,
                lead_in,
                replayed,
                num_ops=sizes.chain,
                num_repeats=sizes.num_repeats,
                raise_if_failed=ops.buffer.raise_if_failed,
            )

        def time_graph(act: Callable[[], object]) -> RankedSpread:
            lead_in = world.step(lambda: chain(act, 1))
            return time(lead_in, world.step(lambda: chain(act, sizes.chain)))

        dispatch = time_graph(ops.dispatch)
        exact = time(
            world.step(lambda: chain(ops.dispatch, 1)), Queue(ops.dispatch_exactly, sizes.chain)
        )
        return NormalTimes(
            dispatch=dispatch,
            exact_dispatch=exact,
            cached_dispatch=time_graph(ops.dispatch_again),
            combine=time_graph(ops.combine),
            copied_combine=time_graph(partial(ops.combine_copied, rows)),
        )

    def _check_combine(self, ops: RankOps) -> None:
        ops.out.fill_(float("nan"))
        ops.combine()
        synchronize(ops.buffer)
        check_combined(self._sizes, self._case, ops, self._world.group.self_rank)


def _check_dispatch(
    ops: RankOps, dispatch: Callable[[], Any], x: torch.Tensor, tokens: torch.Tensor, rank: int
) -> None:
    """Leaves behind what a combine needs: experts that return what they get."""
    result = dispatch()
    synchronize(ops.buffer)
    check_received(result, x, tokens, rank)
    ops.handle = result.handle
    ops.rows = ops.buffer.combine_input(result.handle)
    ops.rows[: len(tokens)] = x[tokens]
    result.recv_x.view(torch.uint8).fill_(0xFF)  # NaN, for the next one


def synchronize(buffer: NormalBuffer) -> None:
    torch.cuda.synchronize()
    buffer.raise_if_failed()
