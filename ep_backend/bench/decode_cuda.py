"""The decode benchmark between virtual ranks on one GPU: a CUDA graph a step, a branch a rank."""

from __future__ import annotations

from functools import partial

import torch

from ep_backend import virtual_world
from ep_backend.bench.decode_rank import PARTS, DecodeRank
from ep_backend.bench.decode_settings import Case, DecodeSettings
from ep_backend.bench.decode_times import Times
from ep_backend.bench.op_cuda_graph import capture, time_replays


def measure(settings: DecodeSettings, case: Case) -> Times:
    """Checks a case before and after it is timed.

    Raises:
        CheckFailed: a result is wrong.
        EPBackendError: a kernel has reported a failure.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    world = virtual_world(case.num_ranks)
    ranks = world.run(lambda group: DecodeRank(settings, case, group, device))
    try:
        for rank in ranks:
            rank.warm_up()
        torch.cuda.synchronize()
        graphs = {part: capture([partial(rank.run, part) for rank in ranks]) for part in PARTS}
        _check(graphs["step"], ranks)
        times_us = {part: time_replays(graphs[part], settings.num_repeats) for part in PARTS}
        error = _check(graphs["step"], ranks)
    finally:
        for rank in ranks:
            rank.buffer.close()
    return Times.of_steps(times_us, settings.num_layers, error)


def _check(step: torch.cuda.CUDAGraph, ranks: list[DecodeRank]) -> float:
    for rank in ranks:
        rank.forget()
    step.replay()
    torch.cuda.synchronize()
    for rank in ranks:
        rank.buffer.raise_if_failed()
    return max(rank.check() for rank in ranks)
