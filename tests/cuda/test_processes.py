"""Ranks as processes that map each other's GPU memory: on GPUs of their own where there are enough,
else sharing one (then every exchange takes milliseconds: the GPU runs one process at a time)."""

from __future__ import annotations

import pytest
import torch

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
@pytest.mark.parametrize("transfer", ["push", "pull"])
def test_processes_equal_the_reference(num_ranks: int, program: str, transfer: str) -> None:
    # Batches of up to 3 of 6 tokens are tagged.
    shape = Shape(num_ranks, hidden=512, device="cuda", transfer=transfer, num_max_tagged_tokens=3)
    scenario = mixed_scenario(shape, seed=3)
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_on_gpu, scenario, program, 10, deadline_secs=60)
