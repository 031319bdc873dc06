"""How ranks meet: process groups, the environment, hosts, virtual worlds."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from ep_backend import Group, RendezvousError, _native, virtual_world
from ep_backend import group as group_module
from ep_backend.memory import cuda
from tests.support.ports import free_ports
from tests.support.processes import Rank, RankProcesses
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario, mixed_scenario
from tests.support.shapes import Shape


def run_in_subgroup(rank: Rank, scenario: Scenario, members: list[int]) -> tuple[int, int] | None:
    subgroup = dist.new_group(members, backend="gloo")
    if rank.group.self_rank not in members:
        return None
    group = Group.from_process_group(subgroup)
    with scenario.shape.buffer(group) as buffer:
        Interpreter(buffer, scenario).run(PROGRAMS["plain_loop"](6, buffer.num_banks))
    return group.self_rank, group.num_ranks


def test_a_subgroup_numbers_its_own_ranks() -> None:
    """As in an engine: expert-parallel groups are parts of the world."""
    scenario = mixed_scenario(Shape(2), seed=41)
    with RankProcesses(3) as ranks:
        assert ranks.run(run_in_subgroup, scenario, [0, 2]) == [(0, 2), None, (1, 2)]


def run_two_buffers(rank: Rank, scenarios: list[Scenario]) -> None:
    """Operations of two buffers, interleaved."""
    buffers = [scenario.shape.buffer(rank.group) for scenario in scenarios]
    interpreters = [Interpreter(b, s) for b, s in zip(buffers, scenarios, strict=True)]
    for step in PROGRAMS["two_micro_batches"](20, 2):
        for interpreter in interpreters:
            interpreter.step(*step)
    for buffer in buffers:
        buffer.close()


def test_two_buffers_of_one_group_do_not_disturb_each_other() -> None:
    scenarios = [
        mixed_scenario(Shape(2, hidden=9, top_k=2), seed=42),
        mixed_scenario(Shape(2, hidden=31, num_experts=5), seed=43),
    ]
    with RankProcesses(2) as ranks:
        ranks.run(run_two_buffers, scenarios)


def create_on_another_host(rank: Rank) -> None:
    if rank.group.self_rank == 1:
        group_module._host_identity = lambda: "another host"
    Shape(rank.group.num_ranks).buffer(rank.group)


def test_ranks_of_two_hosts_are_refused_on_both() -> None:
    with RankProcesses(2) as ranks:
        ranks.start(create_on_another_host)
        for answer in ranks.answers():
            assert answer.error_type == RendezvousError.__name__, answer.details
            assert "rank 1 is on another host than rank 0" in answer.error


RANK_OF_ENVIRONMENT = """
from ep_backend import Group
group = Group.from_env(timeout_secs=30)
print(group.self_rank, group.num_ranks, group.all_gather("rank %d" % group.self_rank))
"""


def test_a_rank_that_does_not_come_is_told_by_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)))
    with pytest.raises(RendezvousError, match=r"within 1 s: .*'RANK': '1', 'WORLD_SIZE': '2'"):
        Group.from_env(timeout_secs=1)


def test_the_environment_of_torchrun_makes_a_world() -> None:
    port = free_ports(1)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_OF_ENVIRONMENT],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert outputs == [f"{rank} 2 ['rank 0', 'rank 1']\n" for rank in range(2)]


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        Group.from_process_group()


def test_a_failed_virtual_rank_ends_the_others() -> None:
    def rank_main(group: Group) -> None:
        if group.self_rank == 1:
            raise KeyError("what really happened")
        group.all_gather(1)

    with pytest.raises(KeyError, match="what really happened"):
        virtual_world(3, timeout_secs=30.0).run(rank_main)


def test_a_missing_virtual_rank_is_a_rendezvous_error() -> None:
    with pytest.raises(RendezvousError, match="did not arrive"):
        virtual_world(2, timeout_secs=0.2).groups[0].all_gather(None)


def test_virtual_ranks_on_different_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their fences order what they write for one."""
    monkeypatch.setattr(_native, "DeviceMemory", lambda num_bytes: object(), raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    same = virtual_world(2, timeout_secs=30.0)
    same.run(lambda group: cuda.allocate(group, 64, torch.device("cuda", 0)))
    with pytest.raises(RendezvousError, match=r"rank 1: is on cuda:1, rank 0 on cuda:0; .*process"):
        virtual_world(2, timeout_secs=30.0).run(
            lambda group: cuda.allocate(group, 64, torch.device("cuda", group.self_rank))
        )


def test_a_virtual_world_has_at_least_one_rank() -> None:
    with pytest.raises(ValueError, match="num_ranks is 0, expected at least 1"):
        virtual_world(0)


def test_virtual_ranks_gather_in_rank_order_again_and_again() -> None:
    def rank_main(group: Group) -> list[list[int]]:
        return [group.all_gather(100 * i + group.self_rank) for i in range(50)]

    expected = [[100 * i, 100 * i + 1, 100 * i + 2] for i in range(50)]
    assert virtual_world(3).run(rank_main) == [expected] * 3
