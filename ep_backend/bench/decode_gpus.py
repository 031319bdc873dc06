"""The decode benchmark between GPUs of one host, a process each: a CUDA graph a step on each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch

from ep_backend import Group
from ep_backend.bench.decode_rank import PARTS, DecodeRank
from ep_backend.bench.decode_settings import Case, DecodeSettings
from ep_backend.bench.decode_times import Times
from ep_backend.bench.multi_gpu_world import World, time_chain
from ep_backend.bench.op_cuda_graph import capture
from ep_backend.bench.op_processes import Report, run_ranks


def measure_all(
    settings: DecodeSettings, num_ranks: int, on_times: Callable[[Case, Times], None]
) -> None:
    """All cases of so many ranks, in the same processes.

    Raises:
        RankFailed: a result is wrong, or a rank failed.
    """
    cases = iter(settings.cases_of(num_ranks))

    def on_reports(reports: list[Times]) -> None:
        on_times(next(cases), reports[0])  # of the slowest rank; all know them

    run_ranks(bench_rank, num_ranks, settings, on_reports)


def bench_rank(rank: int, settings: DecodeSettings, report: Report) -> None:
    """The process of one rank."""
    # Triton's cache is shared; compilers of all ranks at once are enough threads.
    torch.set_num_threads(1)
    torch.cuda.set_device(rank)
    world = World(Group.from_process_group())
    for case in settings.cases_of(world.group.num_ranks):
        report(measure(world, settings, case))
        gc.collect()
        torch.cuda.empty_cache()


def measure(world: World, settings: DecodeSettings, case: Case) -> Times:
    """Checks a case before and after it is timed. Collective.

    Raises:
        StepFailed: a result is wrong, or a kernel has reported a failure, on any rank.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    rank = world.step(lambda: DecodeRank(settings, case, world.group, device))
    try:
        world.step(rank.warm_up)
        graphs = world.step(lambda: {part: capture([partial(rank.run, part)]) for part in PARTS})
        world.step(partial(_check, graphs["step"], rank))
        times_us = {
            part: time_chain(
                world,
                graphs["exchange"],  # in which ranks wait for each other
                graphs[part],
                num_ops=1,
                num_repeats=settings.num_repeats,
                raise_if_failed=rank.buffer.raise_if_failed,
            )
            for part in PARTS
        }
        errors = world.gather(world.step(partial(_check, graphs["step"], rank)))
    finally:
        rank.buffer.close()
    medians_us = {part: [times.spread.median_us] for part, times in times_us.items()}
    return Times.of_steps(medians_us, settings.num_layers, max(errors))


def _check(step: torch.cuda.CUDAGraph, rank: DecodeRank) -> float:
    rank.forget()
    step.replay()
    torch.cuda.synchronize()
    rank.buffer.raise_if_failed()
    return rank.check()
