"""The decode benchmark between processes on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ep_backend import Group
from ep_backend.bench.decode_rank import PARTS, DecodeRank
from ep_backend.bench.decode_settings import Case, DecodeSettings
from ep_backend.bench.decode_times import Times
from ep_backend.bench.op_processes import Report, run_ranks

NUM_WARMUP = 3


@dataclass(frozen=True)
class RankReport:
    """Of one rank in one case."""

    times_us: dict[str, list[float]]
    """Of the steps of every part."""
    relative_error: float


def measure_all(
    settings: DecodeSettings, num_ranks: int, on_times: Callable[[Case, Times], None]
) -> None:
    """All cases of so many ranks, in the same processes.

    Raises:
        RankFailed: a result is wrong, or a rank failed.
    """
    cases = iter(settings.cases_of(num_ranks))

    def on_reports(reports: list[RankReport]) -> None:
        slowest = {
            part: list(map(max, zip(*(report.times_us[part] for report in reports), strict=True)))
            for part in PARTS
        }
        error = max(report.relative_error for report in reports)
        on_times(next(cases), Times.of_steps(slowest, settings.num_layers, error))

    run_ranks(bench_rank, num_ranks, settings, on_reports)


def bench_rank(rank: int, settings: DecodeSettings, report: Report) -> None:
    """The process of one rank."""
    torch.set_num_threads(1)
    group = Group.from_process_group()
    for case in settings.cases_of(group.num_ranks):
        decode = DecodeRank(settings, case, group, torch.device("cpu"))
        decode.run("step")
        decode.check()
        times_us = {part: _time(decode, part, settings.num_repeats) for part in PARTS}
        decode.forget()
        decode.run("step")
        report(RankReport(times_us, decode.check()))
        decode.buffer.close()


def _time(decode: DecodeRank, part: str, num_repeats: int) -> list[float]:
    times_us = []
    for i in range(NUM_WARMUP + num_repeats):
        dist.barrier()
        begin = time.perf_counter()
        decode.run(part)
        if i >= NUM_WARMUP:
            times_us.append((time.perf_counter() - begin) * 1e6)
    return times_us
