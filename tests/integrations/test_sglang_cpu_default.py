"""What SGLang's own exchange is given on a CPU, and only where it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("sglang", reason="SGLang is not installed")

from ep_backend_sglang import choice, cpu_default

from tests.support.processes import Rank, RankProcesses

NUM_RANKS = 3


def rows_of(rank: int, num_rows: int) -> torch.Tensor:
    return torch.arange(num_rows * 4, dtype=torch.float32).reshape(num_rows, 4) + 100 * rank


def coordinator() -> Any:
    """What the functions, methods of SGLang's coordinator, ask of it."""
    return SimpleNamespace(device_group=dist.group.WORLD)


def scatter(rank: Rank, sizes: list[int]) -> list[torch.Tensor]:
    me = rank.group.self_rank
    rows = rows_of(me, sum(sizes))
    buffer = torch.full((sizes[me], 4), -1.0)
    returned = cpu_default.reduce_scatterv(coordinator(), rows, output=buffer, sizes=sizes)
    assert returned is buffer
    equal = rows_of(me, 2 * NUM_RANKS)
    even = torch.empty(2, 4)
    assert cpu_default.reduce_scatter_tensor(coordinator(), even, equal) is None
    return [buffer, cpu_default.reduce_scatterv(coordinator(), rows, sizes=sizes), even]


def misuse(rank: Rank) -> list[str]:
    errors = []
    for num_rows, sizes in ((6, [1, 2, 4]), (6, [3, 3]), (5, None)):
        try:
            cpu_default.reduce_scatterv(coordinator(), torch.ones(num_rows, 4), sizes=sizes)
        except ValueError as e:
            errors.append(str(e))
    return errors


@pytest.mark.parametrize("sizes", [[4, 1, 2], [3, 0, 1], [2, 2, 2]])
def test_every_rank_gets_its_rows_of_the_sum(sizes: list[int]) -> None:
    with RankProcesses(NUM_RANKS) as ranks:
        found = ranks.run(scatter, sizes)
    total = sum(rows_of(rank, sum(sizes)) for rank in range(NUM_RANKS))
    for way in (0, 1):
        assert [len(parts[way]) for parts in found] == sizes
        assert torch.equal(torch.cat([parts[way] for parts in found]), total)
    even = sum(rows_of(rank, 2 * NUM_RANKS) for rank in range(NUM_RANKS))
    assert torch.equal(torch.cat([parts[2] for parts in found]), even)


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    with RankProcesses(NUM_RANKS) as ranks:
        answers = ranks.run(misuse)
    for errors in answers:
        assert errors[0] == "6 rows are scattered as [1, 2, 4], 3 ranks."
        assert len(errors) == 3


IN_SGLANG = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers import dp_attention
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
print(
    GroupCoordinator.reduce_scatterv.__module__,
    dp_attention.memcpy_func.__name__,
    hasattr(FusedMoE.run_moe_core, "__wrapped__"),
)
"""
SGLANGS_OWN = "sglang.srt.distributed.parallel_state memcpy_triton False"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({cpu_default.VARIABLE: "1"}, "ep_backend_sglang.cpu_default memcpy_cpu True"),
        ({}, SGLANGS_OWN),
        # A server with our backend needs none of it.
        ({cpu_default.VARIABLE: "1", choice.VARIABLE: "1"}, SGLANGS_OWN),
    ],
)
def test_sglang_is_changed_only_where_it_is_asked_for(
    environment: dict[str, str], expected: str
) -> None:
    """In a process of its own: it stays changed."""
    ours = (cpu_default.VARIABLE, choice.VARIABLE)
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_SGLANG],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == expected


def test_it_is_for_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_default.VARIABLE, "1")
    for has_accelerator in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda has=has_accelerator: has)
        assert cpu_default.is_wanted() is not has_accelerator
