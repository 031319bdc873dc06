"""The normal kernels between nodes on GPUs: ranks as processes that NVSHMEM joins, on GPUs of their
own where there are enough, else sharing one. Nodes are what `NetworkConfig.ranks_per_node` makes of
them: within one, GPUs write to each other's memory; between them NVSHMEM puts, without a card over
the memory of the peers. The bits are the reference's, and so those of the CPU's kernels.

Sharing a GPU, every step of a round takes milliseconds: the GPU runs one process at a time.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_backend import NormalBuffer, PeerTimeout, SettingsMismatch
from ep_backend.network import VARIABLE
from tests.cuda.test_deep_ep_normal import look_at_the_handle, run_as_deep_ep_tests, run_cases
from tests.deep_ep.test_normal_as_deep_ep_tests import Shape
from tests.support.normal import NormalCase, NormalShape, case_of, make_case
from tests.support.normal_cuda import CudaNormalRank, How, on_gpu
from tests.support.normal_network import (
    FLOAT8,
    NetworkNormalShape,
    Operations,
    draw_operations,
    draw_shape,
)
from tests.support.nvshmem import network_of, start
from tests.support.processes import Rank, RankProcesses

pytestmark = pytest.mark.gpu


def run_all(rank: Rank, drawn: list[tuple[NetworkNormalShape, Operations]]) -> None:
    """One buffer after the other; each operation, and again with its handle and other rows."""
    start(rank)
    for shape, operations in drawn:
        with shape.buffer(rank.group) as buffer:
            ops = CudaNormalRank(buffer)
            for case, how in operations:
                first = ops.run(case, how)
                again = case
                if not shape.shape.is_float8:
                    x = [-1 - t for t in case.x]
                    again = case_of(shape.shape, x, case.topk_idx, case.topk_weights)
                ops.run_again(again, first, how)
            rank.group.all_gather(None)  # nobody's memory goes while a peer still reads it


@pytest.mark.parametrize(("num_ranks", "nodes"), [(2, (1,)), (4, (2, 1))], ids=str)
def test_drawn_shapes_equal_the_reference(num_ranks: int, nodes: tuple[int, ...]) -> None:
    draw = random.Random(num_ranks)
    shapes = [draw_shape(draw, num_ranks, nodes[i % len(nodes)]) for i in range(8)]
    drawn = [(shape, draw_operations(draw, shape.shape, 2)) for shape in shapes]
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_all, drawn, deadline_secs=150)


def test_prefill_rows_equal_the_reference() -> None:
    drawn = []
    for settings in ({}, {"dispatch_dtype": FLOAT8, "scale_format": "ue8m0"}):
        shape = NormalShape(
            4,
            hidden=7168,
            num_experts=64,
            top_k=8,
            num_tokens_per_round=48,
            ranks_per_node=2,
            **settings,  # type: ignore[arg-type]
        )
        case = make_case(shape, "uniform", [140, 0, 33, 90], seed=3, num_biases=1)
        drawn.append((NetworkNormalShape(shape), [(case, How()), (case, How(1000))]))
    with RankProcesses(4) as ranks:
        ranks.run(run_all, drawn, deadline_secs=90)


def replay(rank: Rank, shape: NetworkNormalShape, cases: list[NormalCase]) -> None:
    start(rank)
    with shape.buffer(rank.group) as buffer:
        CudaNormalRank(buffer).replay(cases, 300)
        rank.group.all_gather(None)


def test_a_graph_is_replayed_with_other_tokens() -> None:
    shape = NormalShape(2, hidden=512, num_experts=8, ranks_per_node=1, num_tokens_per_round=16)
    cases = [make_case(shape, "uniform", [20, 40], seed) for seed in range(3)]
    with RankProcesses(2) as ranks:
        ranks.run(replay, NetworkNormalShape(shape), cases, deadline_secs=60)


def lose_a_rank(rank: Rank, shape: NetworkNormalShape, case: NormalCase) -> float:
    """Rank 3 is killed; the others notice, close, and go on."""
    start(rank)
    self_rank = rank.group.self_rank
    buffer = shape.buffer(rank.group, timeout_secs=1.0)
    inputs = on_gpu(case.inputs(self_rank))
    rank.tell("ready")
    if self_rank == 3:
        time.sleep(60)
    rank.ask()  # until rank 3 is dead
    with pytest.raises(PeerTimeout) as caught:
        buffer.dispatch(*inputs)
    assert caught.value.record["phase"] == "dispatch"
    assert caught.value.record["peer_rank"] != self_rank
    assert torch.ones(3, device="cuda").sum().item() == 3.0
    begin = time.monotonic()
    buffer.close()
    return time.monotonic() - begin


def test_a_dead_rank_is_noticed_and_nothing_hangs() -> None:
    shape = NormalShape(4, hidden=512, ranks_per_node=2)
    case = make_case(shape, "uniform", [5] * 4, seed=0)
    with RankProcesses(4) as ranks:
        ranks.start(lose_a_rank, NetworkNormalShape(shape), case)
        for rank in range(4):
            assert ranks.next_from(rank, 60) == "ready"
        ranks.kill(3)
        for rank in range(3):
            ranks.tell(rank, None)
        for answer in ranks.answers(range(3), deadline_secs=60):
            assert answer.error_type is None, answer.details
            assert answer.value < 5.0


def ask_for_what_is_refused(rank: Rank, shape: NetworkNormalShape, case: NormalCase) -> None:
    start(rank)
    group, self_rank = rank.group, rank.group.self_rank
    arguments = dict(hidden=512, num_experts=8, top_k=3, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="which are not nodes of 3 ranks each"):
        NormalBuffer(group, network=network_of(3), **arguments)  # type: ignore[arg-type]
    network = replace(network_of(1), queue_pairs_per_peer=1 + group.self_rank)
    with pytest.raises(SettingsMismatch, match=r"network\.queue_pairs_per_peer differs"):
        NormalBuffer(group, network=network, **arguments)  # type: ignore[arg-type]
    # A token of an expert that does not exist, and more rows than there is room for.
    with shape.buffer(group, timeout_secs=1.0) as buffer:
        x, topk_idx, weights = on_gpu(case.inputs(self_rank))
        topk_idx[1, 0] = shape.shape.num_experts
        group.all_gather(None)
        with pytest.raises(ValueError, match=r"topk_idx\[1, 0\] is 8, expected"):
            buffer.dispatch(x, topk_idx, weights)
    with shape.buffer(group, timeout_secs=1.0) as buffer:
        inputs = on_gpu(case.inputs(self_rank))
        group.all_gather(None)
        buffer.dispatch(*inputs, num_worst_tokens=1)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="num_worst_tokens is 1"):
            buffer.raise_if_failed()
    with shape.buffer(group) as buffer:  # the failures have broken nothing
        CudaNormalRank(buffer).run(case, How())
        group.all_gather(None)


def test_mistakes_are_refused() -> None:
    shape = NormalShape(2, hidden=512, num_experts=8, ranks_per_node=1)
    case = make_case(shape, "uniform", [5, 5], seed=0)
    with RankProcesses(2) as ranks:
        ranks.run(ask_for_what_is_refused, NetworkNormalShape(shape), case, deadline_secs=60)


def call_as_deep_ep(rank: Rank, cases: list[NormalCase], in_rounds: NormalCase) -> None:
    """Nodes of one rank, as the environment says."""
    start(rank)
    os.environ[VARIABLE] = "transport=none bootstrap_interface=lo ranks_per_node=1"
    run_cases(rank, cases, 1 << 20)
    assert look_at_the_handle(rank, in_rounds, 1, knows_all=False) == 7
    assert look_at_the_handle(rank, in_rounds, 1 << 20, knows_all=False) == 1
    assert run_as_deep_ep_tests(rank, Shape(num_tokens=33, num_experts=11, top_k=7)) == 24


def test_deep_eps_normal_calls() -> None:
    kinds: tuple[dict[str, Any], ...] = (
        {},
        dict(dtype=torch.float32),
        dict(dispatch_dtype=FLOAT8, scale_format="ue8m0"),
    )
    shapes = [
        NormalShape(2, hidden=272, num_experts=7, top_k=4, ranks_per_node=1, **kind)
        for kind in kinds
    ]
    cases = [
        make_case(shape, "masked", [23, 9], seed=i, num_biases=i, is_quantized=shape.is_float8)
        for i, shape in enumerate(shapes)
    ]
    shape = NormalShape(2, hidden=16, num_experts=7, ranks_per_node=1)
    in_rounds = make_case(shape, "masked", [7, 3], seed=4)
    with RankProcesses(2) as ranks:
        ranks.run(call_as_deep_ep, cases, in_rounds, deadline_secs=120)
