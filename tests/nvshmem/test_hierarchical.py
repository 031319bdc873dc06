"""Hierarchical buffers over NVSHMEM: ranks as processes, on nodes that `ranks_per_node` makes of a
host. Ranks of a node write to each other's memory; to other nodes NVSHMEM puts, as it does over a
network, but for the wire. (test_processes.py says how ranks share a GPU.)"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_backend import Group, LowLatencyBuffer, PeerTimeout
from tests.nvshmem.test_processes import FLOAT8, SETTINGS
from tests.support.nvshmem import network_of, replay_pairs, run_programs, start
from tests.support.processes import Rank, RankProcesses
from tests.support.programs import PROGRAMS
from tests.support.scenario import Scenario, mixed_scenario, same_bits
from tests.support.shapes import Shape
from tests.support.strategies import scenarios_of, shapes

pytestmark = pytest.mark.gpu

MORE_SETTINGS: dict[str, dict[str, Any]] = {
    "many_experts_a_token": {"top_k": 40, "num_experts": 50},
    "many_tokens": {"num_max_tokens_per_rank": 70, "num_experts": 13, "top_k": 8},
    "few_blocks": {"num_sms": 2, "num_max_tokens_per_rank": 20},
    "uneven_shares": {"num_sms": 5, "num_max_tokens_per_rank": 20},
    "float8_combine_of_float32": {"dtype": torch.float32, "combine_dtype": torch.float8_e4m3fn},
}


def on_nodes(num_ranks: int, ranks_per_node: int, **arguments: Any) -> Shape:
    return Shape(
        num_ranks,
        **{"hidden": 512, "device": "cuda", "hierarchical": True, **arguments},
        ranks_per_node=ranks_per_node,
        network=network_of(ranks_per_node),
    )


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, 1), (4, 2), (4, 1)])
def test_processes_equal_the_reference(num_ranks: int, ranks_per_node: int) -> None:
    scenarios = [
        mixed_scenario(on_nodes(num_ranks, ranks_per_node, **arguments), seed=i, num_variants=7)
        for i, arguments in enumerate((SETTINGS | MORE_SETTINGS).values())
        if arguments.get("reduction") != "source"  # rows of a node are added up before they leave
    ]
    programs = ["plain_loop", "late_hooks"] if num_ranks < 4 else ["plain_loop"]
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_programs, scenarios, programs, 6, deadline_secs=120)


def test_every_program() -> None:
    scenario = mixed_scenario(on_nodes(4, 2, **FLOAT8), num_variants=5)
    with RankProcesses(4) as ranks:
        ranks.run(run_programs, [scenario], sorted(PROGRAMS), 6, deadline_secs=120)


def test_flat_buffers_put_between_nodes_and_write_within() -> None:
    shape = on_nodes(4, 2, hierarchical=False)
    with RankProcesses(4) as ranks:
        ranks.run(run_programs, [mixed_scenario(shape)], ["plain_loop"], 6, deadline_secs=60)


@st.composite
def drawn_scenarios(draw: st.DrawFn) -> Scenario:
    """Of four ranks on two nodes, or on four."""
    ranks_per_node = draw(st.sampled_from([2, 2, 1]))
    shape = replace(
        draw(shapes(device="cuda")),
        num_ranks=4,
        ranks_per_node=ranks_per_node,
        network=network_of(ranks_per_node),
        hierarchical=True,
        reduction="rank",
        num_max_tagged_tokens=None,
        num_workspaces=0,
        expert_ids="local",
    )
    return draw(scenarios_of(shape))


def test_drawn_shapes_equal_the_reference() -> None:
    with RankProcesses(4) as ranks:

        @settings(max_examples=15)
        @given(drawn_scenarios())
        def run(scenario: Scenario) -> None:
            ranks.run(run_programs, [scenario], ["plain_loop"], 3, deadline_secs=60)

        run()


def exchange(buffer: LowLatencyBuffer, seed: int) -> list[torch.Tensor]:
    """Random rows; experts scale. What is received of them, and what comes home."""
    generator = torch.Generator().manual_seed(seed + buffer.group.self_rank)
    num_tokens = int(torch.randint(buffer.num_max_tokens_per_rank + 1, (), generator=generator))
    x = torch.randn(num_tokens, buffer.hidden, generator=generator).to(buffer.dtype)
    scores = torch.rand(num_tokens, buffer.num_experts, generator=generator)
    topk_idx = scores.argsort(dim=1)[:, : buffer.top_k].contiguous()
    weights = torch.rand(num_tokens, buffer.top_k, generator=generator)
    inputs = (t.to(buffer.device) for t in (x, topk_idx, weights))
    result = buffer.dispatch_and_receive(*inputs)
    counts = result.num_recv_tokens_per_expert
    is_row = torch.arange(buffer.expert_capacity, device=buffer.device)[None] < counts[:, None]
    received = [counts, result.recv_x.view(torch.uint8)[is_row]]
    if result.recv_scales is not None:
        received.append(result.recv_scales[is_row])
    y = result.recv_x.to(buffer.dtype) * 0.5
    combined = buffer.combine_and_receive(y, result.handle)
    return [t.cpu() for t in (*received, combined)]


def exchange_on_gpu(rank: Rank, shapes: list[Shape], seeds: range) -> list[list[torch.Tensor]]:
    start(rank)
    results = []
    for shape in shapes:
        with shape.buffer(rank.group) as buffer:
            results += [exchange(buffer, seed) for seed in seeds]
            torch.cuda.synchronize()
            buffer.raise_if_failed()
    return results


def test_bits_are_those_of_the_kernels_on_cpus() -> None:
    sizes: dict[str, Any] = dict(num_max_tokens_per_rank=64, hidden=2048, num_experts=32, top_k=8)
    dtypes: list[dict[str, Any]] = [
        {},
        {"dtype": torch.float32},
        FLOAT8,
        FLOAT8 | {"dtype": torch.float32},
        FLOAT8 | {"combine_dtype": torch.float8_e4m3fn},
    ]
    gpu = [on_nodes(4, 2, **sizes, **arguments) for arguments in dtypes]
    cpu = [replace(shape, device="cpu", network=None) for shape in gpu]
    seeds = range(3)

    def exchange_on_cpu(group: Group, shape: Shape) -> list[list[torch.Tensor]]:
        with shape.buffer(group) as buffer:
            return [exchange(buffer, seed) for seed in seeds]

    expected: list[list[list[torch.Tensor]]] = [[] for _ in range(4)]
    for shape in cpu:
        answers = shape.world().run(lambda group, shape=shape: exchange_on_cpu(group, shape))
        for rank, answer in enumerate(answers):
            expected[rank] += answer
    with RankProcesses(4) as ranks:
        for rank, results in enumerate(ranks.run(exchange_on_gpu, gpu, seeds, deadline_secs=120)):
            for i, (got, want) in enumerate(zip(results, expected[rank], strict=True)):
                assert all(map(same_bits, got, want)), f"rank {rank}, {dtypes[i // len(seeds)]}"


def replay_graph(rank: Rank, shape: Shape, num_replays: int) -> None:
    start(rank)
    with shape.buffer(rank.group) as buffer:
        num_tokens = shape.num_max_tokens_per_rank
        x = torch.randn(num_tokens, shape.hidden, device="cuda").bfloat16()
        # Two experts on each rank: every partial sum, and every node's, is exact.
        two = torch.tensor([0, 1, 4, 5, 8, 9, 12, 13], device="cuda")
        topk_idx = two + 2 * (torch.arange(num_tokens, device="cuda")[:, None] % 2)
        replay_pairs(buffer, x, topk_idx, num_replays)
        assert buffer.statistics().num_ops["combine_recv"] == num_replays


def test_captured_graphs_replay() -> None:
    shape = on_nodes(4, 2, num_max_tokens_per_rank=16, num_experts=16, top_k=8)
    with RankProcesses(4) as ranks:
        ranks.run(replay_graph, shape, 10, deadline_secs=60)


def exchange_without(
    rank: Rank, shape: Shape, missing: int, stage: str, timeout_secs: float
) -> dict[str, Any] | None:
    """An exchange in which rank `missing` does not come to `stage`. Whom this rank blames, and
    where; None: nobody, until it came there."""
    start(rank)
    is_missing = rank.group.self_rank == missing
    buffer = shape.buffer(rank.group, timeout_secs=timeout_secs)
    x = torch.zeros(2, shape.hidden, dtype=torch.bfloat16, device="cuda")
    topk_idx = torch.arange(shape.top_k, device="cuda").expand(2, -1).contiguous()
    weights = torch.ones(2, shape.top_k, device="cuda")
    rank.tell("ready")
    rank.ask()  # the missing one may be dead now

    def failure() -> dict[str, Any] | None:
        torch.cuda.synchronize()
        try:
            buffer.raise_if_failed()
        except PeerTimeout as e:
            begin = time.monotonic()
            buffer.close()
            assert time.monotonic() - begin < 5.0
            return e.record
        return None

    def leaves(reached: str) -> bool:
        if not is_missing or stage != reached:
            return False
        torch.cuda.synchronize()
        rank.ask()  # until the others have given up
        return True

    if leaves("dispatch"):
        return None
    result, recv_hook = buffer.dispatch(x, topk_idx, weights)
    if leaves("dispatch hook"):
        return None
    recv_hook()
    record = failure()
    if record is not None or leaves("combine"):
        return record
    _, recv_hook = buffer.combine(result.recv_x, result.handle)
    recv_hook()
    return failure()


def blamed_for(stage: str, is_killed: bool = False) -> list[tuple[str, int] | None]:
    """By ranks 0, 1 and 2, on nodes of two, if rank 3 is missing: phase, and whom."""
    shape = on_nodes(4, 2, num_experts=4, top_k=4)
    with RankProcesses(4) as ranks:
        ranks.start(exchange_without, shape, 3, stage, 1.5)
        for rank in range(4):
            assert ranks.next_from(rank, 60) == "ready"
        if is_killed:
            ranks.kill(3)
        for rank in range(3 if is_killed else 4):
            ranks.tell(rank, None)
        answers = ranks.answers(range(3), deadline_secs=60)
        if not is_killed:
            ranks.tell(3, None)
        assert [answer.error_type for answer in answers] == [None] * 3, answers
    blamed: list[tuple[str, int] | None] = []
    for answer in answers:
        record = answer.value
        if record is not None:
            assert record["half"] == "recv"
            assert record["waited_secs"] >= 1.5
        blamed.append(None if record is None else (record["phase"], record["peer_rank"]))
    return blamed


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_rank_that_sends_nothing_is_noticed_by_all(is_killed: bool) -> None:
    """By its peers; and by the rank for which one of these would have forwarded."""
    expected = [("dispatch", 1), ("dispatch", 3), ("dispatch", 3)]
    assert blamed_for("dispatch", is_killed) == expected


def test_a_rank_that_does_not_forward_is_noticed() -> None:
    """Rank 2 misses what rank 1 has sent to its node. The others come to their combine, for which
    they miss what that node would have added up."""
    expected = [("combine", 2), ("combine", 3), ("dispatch", 3)]
    assert blamed_for("dispatch hook") == expected


def test_a_rank_that_does_not_combine_is_noticed() -> None:
    """By its neighbour; and, of the other node, by those that wait for what these would put."""
    expected = [("combine", 2), ("combine", 3), ("combine", 3)]
    assert blamed_for("combine") == expected
