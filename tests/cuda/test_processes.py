"""Ranks as processes that map each other's GPU memory: on GPUs of their own where there are enough,
else sharing one (then every exchange takes milliseconds: the GPU runs one process at a time)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cpu.test_normal_autograd import SHAPE, check_gradients
from tests.support.normal import NormalCase, NormalShape, make_case
from tests.support.normal_cuda import CudaNormalRank, CudaNormalShape, How
from tests.support.processes import Rank, RankProcesses
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape


def run_on_gpu(rank: Rank, scenario: Scenario, program: str, num_ops: int) -> int:
    torch.cuda.set_device(rank.group.self_rank % torch.cuda.device_count())
    with scenario.shape.buffer(rank.group) as buffer:
        steps = PROGRAMS[program](num_ops, scenario.shape.num_banks)
        num_steps = Interpreter(buffer, scenario).run(steps)
        torch.cuda.synchronize()
        buffer.raise_if_failed()
        rank.group.all_gather(None)  # nobody's memory goes while a peer still writes to it
        return num_steps


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("program", ["plain_loop", "steady", "fused_loop"])
@pytest.mark.parametrize("transfer", ["push", "pull", "pull_push"])
def test_processes_equal_the_reference(num_ranks: int, program: str, transfer: str) -> None:
    # Batches of up to 3 of 6 tokens are tagged.
    shape = Shape(num_ranks, hidden=512, device="cuda", transfer=transfer, num_max_tagged_tokens=3)
    scenario = mixed_scenario(shape, seed=3)
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_on_gpu, scenario, program, 10, deadline_secs=60)


def run_each_on_gpu(rank: Rank, scenarios: list[Scenario], programs: list[str]) -> None:
    for scenario in scenarios:
        for program in programs:
            run_on_gpu(rank, scenario, program, 12)


WORKSPACES: dict[str, dict[str, Any]] = {
    "untagged": {"output_layout": "rank_major", "num_max_tagged_tokens": 0},
    "tagged": {"output_layout": "rank_major", "num_max_tagged_tokens": 20},
    "tagged_push": {
        "output_layout": "rank_major",
        "num_max_tagged_tokens": 12,
        "transfer": "pull_push",
    },
    "by_expert": {"reduction": "source"},
}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("settings", WORKSPACES.values(), ids=WORKSPACES.keys())
def test_workspaces_of_processes_equal_the_reference(
    num_ranks: int, settings: dict[str, Any]
) -> None:
    """Rows of several parts, other ones in every operation."""
    scenarios = [
        mixed_scenario(
            Shape(num_ranks, 20, 2048, device="cuda", num_workspaces=5, **settings, **dtype),
            seed=i,
        )
        for i, dtype in enumerate(({}, {"dispatch_dtype": torch.float8_e4m3fn}))
    ]
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_each_on_gpu, scenarios, ["steady", "fused_loop"], deadline_secs=120)


def run_normally(rank: Rank, shape: CudaNormalShape, cases: list[NormalCase]) -> None:
    torch.cuda.set_device(rank.group.self_rank % torch.cuda.device_count())
    with shape.buffer(rank.group) as buffer:
        ops = CudaNormalRank(buffer)
        all_roles = {"num_sms": 24}  # some only copy own rows
        for case in cases:
            for how in (
                *(How(), How(num_worst_tokens=300, in_place=True)),
                *(How(copy=True), How(num_sms=all_roles)),
            ):
                ops.run_again(case, ops.run(case, how), how)
        torch.cuda.synchronize()
        rank.group.all_gather(None)  # nobody's memory goes while a peer still reads it


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_rows", [400, 40], ids=["direct", "rounds"])
def test_normal_kernels_of_processes_equal_the_reference(num_ranks: int, num_rows: int) -> None:
    shape = NormalShape(num_ranks, hidden=512, num_experts=7, top_k=4)
    cases = [make_case(shape, "uniform", [60, 11, 37][:num_ranks], seed) for seed in range(2)]
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_normally, CudaNormalShape(shape, num_rows), cases, deadline_secs=60)


def differentiate(rank: Rank, num_rows: int) -> None:
    torch.cuda.set_device(rank.group.self_rank % torch.cuda.device_count())
    with CudaNormalShape(SHAPE, num_rows).buffer(rank.group) as buffer:
        for num_worst_tokens in (0, 20):
            check_gradients(buffer, num_worst_tokens)
        torch.cuda.synchronize()
        buffer.raise_if_failed()
        rank.group.all_gather(None)  # nobody's memory goes while a peer still reads it


@pytest.mark.parametrize("num_rows", [100, 6], ids=["direct", "rounds"])
def test_gradients_are_those_without_an_exchange(num_rows: int) -> None:
    """Not between virtual ranks: PyTorch runs the backward of a process in one thread."""
    with RankProcesses(SHAPE.num_ranks) as ranks:
        ranks.run(differentiate, num_rows, deadline_secs=60)
