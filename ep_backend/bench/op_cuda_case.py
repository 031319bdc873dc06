"""Checks and times one case of the CUDA benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from ep_backend import DispatchResult, Group, LowLatencyBuffer, virtual_world
from ep_backend.bench.op_cuda_bytes import PairBytes, count_bytes
from ep_backend.bench.op_cuda_graph import Spread, capture, time_replays
from ep_backend.bench.op_cuda_rank import RankOps, run_lockstep
from ep_backend.bench.op_cuda_settings import (
    TRAVELLING_DTYPES,
    Case,
    CudaBenchSettings,
)
from ep_backend.bench.routing import Inputs, make_inputs

# A hang ends the case, not the run: far above any time measured.
TIMEOUT_SECS = 5.0
# Several times the L2 cache of any GPU so far.
COLD_SCRATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class CaseTimes:
    """What was measured in one case. All ranks run it at the same time on one GPU."""

    pair: Spread
    """A dispatch and its combine, in a chain of pairs."""
    dispatch: Spread
    """In a chain of dispatches without combines."""
    single_pair: Spread | None
    """One pair a graph, the graph's own launch included, data in the L2 cache as in a chain."""
    cold_pair: Spread | None
    """The same, all of the L2 cache overwritten before."""
    relative_error: float
    """Of combine against its exact result, quantisation included; the worst rank's."""
    num_symmetric_bytes: int
    """Of one rank."""
    num_bytes: PairBytes

    @property
    def combine_us(self) -> float:
        """Difference of two medians: a combine cannot be repeated without its dispatch."""
        return self.pair.median_us - self.dispatch.median_us


def inputs_of(settings: CudaBenchSettings, num_ranks: int, num_tokens: int) -> list[Inputs]:
    """What every rank dispatches."""
    return [inputs_of_rank(settings, rank, num_tokens) for rank in range(num_ranks)]


def inputs_of_rank(settings: CudaBenchSettings, rank: int, num_tokens: int) -> Inputs:
    return make_inputs(
        settings.seed,
        rank,
        num_tokens=num_tokens,
        hidden=settings.hidden,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        dtype=torch.bfloat16,
    )


def make_buffer(
    settings: CudaBenchSettings,
    case: Case,
    group: Group,
    timeout_secs: float = TIMEOUT_SECS,
    device: str = "cuda",
) -> LowLatencyBuffer:
    """One rank's buffer for a case. On a CPU, without a workspace."""
    has_workspace = case.has_workspace and device == "cuda"
    return LowLatencyBuffer(
        group,
        num_max_tokens_per_rank=settings.num_max_tokens_per_rank,
        hidden=settings.hidden,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        dtype=torch.bfloat16,
        dispatch_dtype=TRAVELLING_DTYPES[case.dispatch_dtype],
        combine_dtype=TRAVELLING_DTYPES[case.combine_dtype],
        output_layout=case.buffer_layout,
        reduction="source" if case.output_layout == "expert_workspace" else "rank",
        transfer=case.transfer,
        num_max_tagged_tokens=case.num_max_tagged_tokens,
        with_hooks=case.form == "hook",
        num_workspaces=int(has_workspace),
        timeout_secs=timeout_secs,
        device=device,
        num_sms=case.num_sms,
    )


@contextmanager
def open_buffers(
    settings: CudaBenchSettings, case: Case, device: str = "cuda"
) -> Iterator[list[LowLatencyBuffer]]:
    """A buffer a virtual rank; closed at the end."""
    world = virtual_world(case.num_ranks)
    buffers = world.run(lambda group: make_buffer(settings, case, group, device=device))
    try:
        yield buffers
    finally:
        for buffer in buffers:
            buffer.close()


def measure(settings: CudaBenchSettings, case: Case) -> CaseTimes:
    """Checks a case, times it, and checks it again, on buffers of its own.

    Raises:
        CheckFailed: a result is wrong.
        EPBackendError: a kernel has reported a failure.
    """
    inputs = inputs_of(settings, case.num_ranks, case.num_tokens)
    with open_buffers(settings, case) as buffers:
        ranks = [RankOps(b, i, case.form) for b, i in zip(buffers, inputs, strict=True)]
        check_lockstep(ranks, is_first=True)
        pairs = Chain(ranks, RankOps.pair, settings.chain)
        pairs.check()
        dispatches = Chain(ranks, RankOps.dispatch, settings.chain)
        pair_us = time_replays(pairs.graph, settings.num_repeats)
        dispatch_us = time_replays(dispatches.graph, settings.num_repeats)
        single, cold = (
            single_and_cold(settings, Chain(ranks, RankOps.pair, 1).graph)
            if settings.is_cold
            else (None, None)
        )
        relative_error = pairs.check()
        check_lockstep(ranks, is_first=False)
        num_symmetric_bytes = buffers[0].num_symmetric_bytes
    return CaseTimes(
        pair=Spread.of(pair_us, settings.chain),
        dispatch=Spread.of(dispatch_us, settings.chain),
        single_pair=single,
        cold_pair=cold,
        relative_error=relative_error,
        num_symmetric_bytes=num_symmetric_bytes,
        num_bytes=count_bytes(
            [i.topk_idx for i in inputs],
            num_experts=settings.num_experts,
            hidden=settings.hidden,
            dispatch_dtype=TRAVELLING_DTYPES[case.dispatch_dtype],
            combine_dtype=TRAVELLING_DTYPES[case.combine_dtype],
            output_layout=case.output_layout,
        ),
    )


class Chain:
    """A graph that holds an operation of every rank `num_ops` times, one rank beside another."""

    def __init__(
        self, ranks: list[RankOps], operation: Callable[[RankOps], DispatchResult], num_ops: int
    ) -> None:
        self._results: dict[RankOps, DispatchResult] = {}
        """Of each rank's last operation."""

        def branch(rank: RankOps) -> None:
            for _ in range(num_ops):
                self._results[rank] = operation(rank)

        self.graph = capture([partial(branch, rank) for rank in ranks])

    def check(self) -> float:
        """Replays a chain of pairs and checks the last; returns the worst rank's error."""
        for rank, result in self._results.items():
            rank.poison(result)
        self.graph.replay()
        return _check("graph", self._results)


def check_lockstep(ranks: list[RankOps], *, is_first: bool) -> float:
    """Runs and checks a pair outside graphs; returns the worst rank's error."""
    results = run_lockstep(ranks, is_first=is_first)
    return _check("lockstep", dict(zip(ranks, results, strict=True)))


def _check(what: str, results: dict[RankOps, DispatchResult]) -> float:
    if any(rank.buffer.device.type == "cuda" for rank in results):
        torch.cuda.synchronize()
    for rank in results:
        rank.buffer.raise_if_failed()
    return max(rank.check(what, result) for rank, result in results.items())


def single_and_cold(
    settings: CudaBenchSettings, pair: torch.cuda.CUDAGraph
) -> tuple[Spread, Spread]:
    """Both from the same graph of one pair, so that their difference is the cache."""
    scratch = torch.empty(COLD_SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    single_us = time_replays(pair, settings.num_repeats)
    cold_us = time_replays(pair, settings.num_repeats, prepare=scratch.zero_)
    return Spread.of(single_us), Spread.of(cold_us)
