"""What vLLM's own all-to-all is given on a CPU: gathers of uneven sizes, and local ids."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ep_backend_vllm.cpu_default import all_gatherv, local_ids, reduce_scatterv

from tests.support.processes import Rank, RankProcesses

NUM_RANKS = 3
HIDDEN, TOP_K = 5, 2


def communicator(rank: Rank) -> SimpleNamespace:
    """What the functions, methods of vLLM's communicator, ask of it."""
    world = dist.group.WORLD
    return SimpleNamespace(
        world_size=NUM_RANKS, rank_in_group=rank.group.self_rank, device_group=world
    )


def rows_of(rank: int, num_rows: int) -> list[torch.Tensor]:
    """Rows, weights and ids that name their rank."""
    x = torch.arange(num_rows * HIDDEN, dtype=torch.bfloat16).reshape(num_rows, HIDDEN) + 100 * rank
    ids = torch.arange(num_rows * TOP_K, dtype=torch.int32).reshape(num_rows, TOP_K) + 1000 * rank
    return [x, ids / 7, ids, ids[:, 0].long()]


def gather(rank: Rank, sizes: list[int], tell_sizes: bool) -> list:
    me = communicator(rank)
    rows = rows_of(rank.group.self_rank, sizes[rank.group.self_rank])
    given = sizes if tell_sizes else None
    return [
        *all_gatherv(me, rows, 0, given),
        all_gatherv(me, rows[0].t().contiguous().t(), 0, given),
    ]


def scatter(rank: Rank, sizes: list[int], tell_sizes: bool) -> torch.Tensor:
    (x, *_) = rows_of(rank.group.self_rank, sum(sizes))
    return reduce_scatterv(communicator(rank), x.float(), 0, sizes if tell_sizes else None)


def misuse(rank: Rank) -> list[str]:
    me, (x, *_) = communicator(rank), rows_of(0, 6)
    errors = []
    for wrong in (
        lambda: all_gatherv(me, x, 1, None),
        lambda: all_gatherv(me, x, 0, [5, 5, 5]),
        lambda: reduce_scatterv(me, x, -1, None),
        lambda: reduce_scatterv(me, x, 0, [1, 2, 4]),
        lambda: reduce_scatterv(me, x[:5], 0, None),
    ):
        try:
            wrong()
        except (NotImplementedError, ValueError) as e:
            errors.append(f"{type(e).__name__}: {e}")
    return errors


@pytest.mark.parametrize(
    ("sizes", "tell_sizes"), [([4, 1, 2], True), ([3, 0, 1], True), ([2, 2, 2], False)]
)
def test_gathers_are_those_of_the_definition(sizes: list[int], tell_sizes: bool) -> None:
    with RankProcesses(NUM_RANKS) as ranks:
        gathered = ranks.run(gather, sizes, tell_sizes)
        scattered = ranks.run(scatter, sizes, tell_sizes)
    parts = [rows_of(rank, n) for rank, n in enumerate(sizes)]
    expected = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    for found in gathered:
        for tensor, wanted in zip(found, [*expected, expected[0]], strict=True):
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted)
    total = sum(rows_of(rank, sum(sizes))[0].float() for rank in range(NUM_RANKS))
    assert torch.equal(torch.cat(scattered), total)
    assert [len(part) for part in scattered] == sizes


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    with RankProcesses(NUM_RANKS) as ranks:
        answers = ranks.run(misuse)
    for errors in answers:
        assert len(errors) == 5
        assert "dim is 1" in errors[0]
        assert "6 rows, sizes [5, 5, 5]" in errors[1]


def test_ids_of_other_ranks_become_weightless() -> None:
    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    ids, weights = local_ids(
        torch.tensor([[2, 0], [3, 2], [1, 0]], dtype=torch.int32),
        torch.tensor([[0.5, 0.25], [0.75, 1.0], [1.0, 2.0]]),
        expert_map,
    )
    assert ids.tolist() == [[0, 0], [1, 0], [0, 0]]
    assert weights.tolist() == [[0.5, 0.0], [0.75, 1.0], [0.0, 0.0]]
    assert ids.dtype == torch.int32


IN_VLLM = """
from types import SimpleNamespace
import torch
import ep_backend_vllm
ep_backend_vllm.register()
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe import all2all_utils
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep

x, weights = torch.ones(3, 8), torch.ones(3, 2)
ids = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)
manager = SimpleNamespace(world_size=2)
group = SimpleNamespace(
    rank_in_group=1,
    device_communicator=SimpleNamespace(all2all_manager=manager),
    dispatch=lambda *given, **_: given,
)
all2all_utils.get_ep_group = naive_dp_ep.get_ep_group = lambda: group
import vllm.distributed
vllm.distributed.get_ep_group = lambda: group
parallel = SimpleNamespace(
    use_all2all_kernels=True,
    all2all_backend="allgather_reducescatter",
    use_passthrough_all2all=False,
    is_sequence_parallel=False,
)


class Moe(SimpleNamespace):
    def __getattr__(self, name):
        # Names of kernels: none is used but the one of all-gather and reduce-scatter.
        return name == "use_ag_rs_all2all_kernels"


made = all2all_utils.maybe_make_prepare_finalize(
    Moe(moe_parallel_config=parallel), FUSED_MOE_UNQUANTIZED_CONFIG, allow_new_interface=True
)
prepared = made.prepare(
    x, weights, ids, 4, torch.tensor([-1, -1, 0, 1]), False, FUSED_MOE_UNQUANTIZED_CONFIG, True
)
print(CpuCommunicator.all_gatherv.__module__, prepared[3].tolist(), prepared[4].tolist())
"""


@pytest.mark.parametrize("variable", ["1", ""])
def test_vllm_is_changed_only_where_it_is_asked_for(variable: str) -> None:
    """In a process of its own: it stays changed."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    environment = os.environ | {"EP_BACKEND_VLLM_CPU_DEFAULT": variable}
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    module, given = done.stdout.strip().splitlines()[-1].split(" ", 1)
    if variable:
        assert module == "ep_backend_vllm.cpu_default"
        assert given == "[[0, 0], [0, 1], [0, 0]] [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]"
    else:
        assert module.startswith("vllm.distributed")
        assert given.startswith("[[0, 1], [2, 3], [1, 2]]")
