"""One case of the multi-GPU benchmark, on one rank: checked, timed, checked again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ep_backend import DispatchResult, LowLatencyBuffer
from ep_backend.bench.multi_gpu_world import RankedSpread, World, time_chain
from ep_backend.bench.op_cuda_case import inputs_of_rank, make_buffer
from ep_backend.bench.op_cuda_graph import capture
from ep_backend.bench.op_cuda_rank import RankOps
from ep_backend.bench.op_cuda_settings import Case, CudaBenchSettings

# A hang ends the case, not the run: far above any time measured.
TIMEOUT_SECS = 10.0


@dataclass(frozen=True)
class MultiGpuTimes:
    """What was measured in one case."""

    pair: RankedSpread
    """A dispatch and its combine, in a chain of pairs."""
    dispatch: RankedSpread
    """In a chain of dispatches without combines."""
    relative_error: float
    """Of combine against its exact result, quantisation included; the worst rank's."""
    num_symmetric_bytes: int
    """Of one rank."""

    def to_json(self) -> dict[str, Any]:
        return {
            "pair": asdict(self.pair.spread),
            "dispatch": asdict(self.dispatch.spread),
            # A combine cannot be repeated without its dispatch.
            "combine_us": self.pair.spread.median_us - self.dispatch.spread.median_us,
            "pair_rank_difference_us": self.pair.rank_difference_us,
            "dispatch_rank_difference_us": self.dispatch.rank_difference_us,
            "relative_error": self.relative_error,
            "num_symmetric_bytes": self.num_symmetric_bytes,
        }


def measure(world: World, settings: CudaBenchSettings, case: Case) -> MultiGpuTimes:
    """Collective.

    Raises:
        StepFailed: on every rank, where any rank's result is wrong or its kernels have failed.
    """
    buffer = world.step(partial(make_buffer, settings, case, world.group, TIMEOUT_SECS))
    try:
        return _measure(world, settings, case, buffer)
    finally:
        with suppress(RuntimeError):  # the case has failed for that reason already
            torch.cuda.synchronize()
        world.gather(None)  # no peer may still read what is unmapped now
        buffer.close()


def _measure(
    world: World, settings: CudaBenchSettings, case: Case, buffer: LowLatencyBuffer
) -> MultiGpuTimes:
    inputs = inputs_of_rank(settings, world.group.self_rank, case.num_tokens)
    rank = world.step(lambda: RankOps(buffer, inputs, case.form))

    def first_dispatch() -> None:
        result = rank.dispatch()
        _synchronize(buffer)
        rank.make_expert_out(result)

    def eager_pair() -> float:
        result = rank.pair()
        _synchronize(buffer)
        return rank.check("eager", result)

    world.step(first_dispatch)
    world.step(eager_pair)
    lead_in, _ = world.step(partial(_chain, rank.pair, 1))
    pairs, last_result = world.step(partial(_chain, rank.pair, settings.chain))
    dispatches, _ = world.step(partial(_chain, rank.dispatch, settings.chain))

    def replayed_pair() -> float:
        rank.poison(last_result)
        pairs.replay()
        _synchronize(buffer)
        return rank.check("graph", last_result)

    def time(chain: torch.cuda.CUDAGraph) -> RankedSpread:
        return time_chain(
            world,
            lead_in,
            chain,
            num_ops=settings.chain,
            num_repeats=settings.num_repeats,
            raise_if_failed=buffer.raise_if_failed,
        )

    world.step(replayed_pair)
    pair = time(pairs)
    dispatch = time(dispatches)
    relative_error = world.step(replayed_pair)
    world.step(eager_pair)
    return MultiGpuTimes(
        pair=pair,
        dispatch=dispatch,
        relative_error=max(world.gather(relative_error)),
        num_symmetric_bytes=buffer.num_symmetric_bytes,
    )


def _chain(
    operation: Callable[[], DispatchResult], num_ops: int
) -> tuple[torch.cuda.CUDAGraph, DispatchResult]:
    """A graph of `num_ops` operations, and the last one's result."""
    results: list[DispatchResult] = []

    def branch() -> None:
        for _ in range(num_ops):
            results[:] = [operation()]

    return capture([branch]), results[0]


def _synchronize(buffer: LowLatencyBuffer) -> None:
    torch.cuda.synchronize()
    buffer.raise_if_failed()
