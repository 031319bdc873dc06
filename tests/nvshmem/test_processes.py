"""Ranks as processes that NVSHMEM joins: on GPUs of their own where there are enough, else sharing
one (every exchange then takes milliseconds: the GPU runs one process at a time).

Without a network card, links="rdma" has NVSHMEM put every message all the same, over the memory of
the peers: staging, puts, counted arrivals and credits are those of a network, the wire is not.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_backend import LowLatencyBuffer, PeerTimeout
from ep_backend.network import VARIABLE
from tests.deep_ep.support import Exchange, buffer_of
from tests.support.nvshmem import network_of, replay_pairs, run_programs, start
from tests.support.processes import Rank, RankProcesses
from tests.support.scenario import Scenario, mixed_scenario, same_bits
from tests.support.shapes import Shape

pytestmark = pytest.mark.gpu

NETWORKS = {links: network_of(links=links) for links in ("auto", "rdma")}
FLOAT8 = {"dispatch_dtype": torch.float8_e4m3fn, "scale_format": "ue8m0"}
SETTINGS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float8": FLOAT8,
    "float32": {"dtype": torch.float32},
    "float8_rank_major": FLOAT8 | {"output_layout": "rank_major"},
    "float8_both_ways": FLOAT8 | {"combine_dtype": torch.float8_e4m3fn},
    "three_banks": {"num_banks": 3},
    "source": {"reduction": "source", "top_k": 9},
    "source_float8": FLOAT8 | {"combine_dtype": torch.float8_e4m3fn, "reduction": "source"},
    "source_of_many_experts": {"reduction": "source", "top_k": 40, "num_experts": 50},
}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("links", NETWORKS)
def test_processes_equal_the_reference(num_ranks: int, links: str) -> None:
    scenarios = [
        mixed_scenario(
            Shape(num_ranks, hidden=512, device="cuda", network=NETWORKS[links], **settings),
            seed=i,
            num_variants=7,
        )
        for i, settings in enumerate(SETTINGS.values())
    ]
    programs = ["plain_loop", "late_hooks", "fused_loop"] if num_ranks < 4 else ["plain_loop"]
    with RankProcesses(num_ranks) as ranks:
        ranks.run(run_programs, scenarios, programs, 6, deadline_secs=120)


def exchange(buffer: LowLatencyBuffer, seed: int) -> tuple[torch.Tensor, ...]:
    """Random rows; experts scale. What is received of them, and what comes home."""
    generator = torch.Generator().manual_seed(seed + buffer.group.self_rank)
    num_tokens = int(torch.randint(buffer.num_max_tokens_per_rank + 1, (), generator=generator))
    x = torch.randn(num_tokens, buffer.hidden, generator=generator).to(buffer.dtype).cuda()
    scores = torch.rand(num_tokens, buffer.num_experts, generator=generator)
    topk_idx = scores.argsort(dim=1)[:, : buffer.top_k]
    weights = torch.rand(num_tokens, buffer.top_k, generator=generator).cuda()
    home = weights if buffer.reduction == "source" else None
    result, recv_hook = buffer.dispatch(x, topk_idx.cuda(), None if home is not None else weights)
    recv_hook()
    counts = result.num_recv_tokens_per_expert
    rows = torch.arange(buffer.expert_capacity, device="cuda")[None] < counts[:, None]
    recv_x = result.recv_x.view(torch.uint8)[rows]
    y = result.recv_x.to(buffer.dtype) * 0.5
    combined, recv_hook = buffer.combine(y, result.handle, topk_weights=home)
    recv_hook()
    torch.cuda.synchronize()
    buffer.raise_if_failed()
    return counts, recv_x, combined


def compare(rank: Rank, shape: Shape) -> None:
    """The same exchanges through CUDA IPC and through NVSHMEM, in one process."""
    start(rank)
    shapes = [shape, *(replace(shape, network=network) for network in NETWORKS.values())]
    buffers = [shape.buffer(rank.group) for shape in shapes]
    for seed in range(4):
        expected, *others = [exchange(buffer, seed) for buffer in buffers]
        for other in others:
            assert all(same_bits(a, b) for a, b in zip(expected, other, strict=True))
    rank.group.all_gather(None)
    for buffer in buffers:
        buffer.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dispatch_dtype", [None, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("reduction", ["rank", "source"])
def test_bits_are_those_of_the_kernels_over_peer_pointers(
    num_ranks: int, dispatch_dtype: torch.dtype | None, reduction: str
) -> None:
    shape = Shape(
        num_ranks,
        num_max_tokens_per_rank=64,
        hidden=2048,
        num_experts=32,
        top_k=8,
        device="cuda",
        dispatch_dtype=dispatch_dtype,
        reduction=reduction,
    )
    with RankProcesses(num_ranks) as ranks:
        ranks.run(compare, shape, deadline_secs=120)


def serve_all_from_one(rank: Rank, shape: Shape) -> None:
    """Rank 0 has every expert that is asked for, and a token or none; the others have many."""
    start(rank)
    with shape.buffer(rank.group) as buffer:
        for op in range(4):
            num_tokens = op % 2 if rank.group.self_rank == 0 else shape.num_max_tokens_per_rank
            x = torch.full((num_tokens, shape.hidden), float(op), device="cuda").bfloat16()
            topk_idx = torch.arange(shape.top_k, device="cuda").expand(num_tokens, -1).contiguous()
            weights = torch.full((num_tokens, shape.top_k), 1 / shape.top_k, device="cuda")
            result, recv_hook = buffer.dispatch(x, topk_idx)
            recv_hook()
            out, recv_hook = buffer.combine(result.recv_x, result.handle, topk_weights=weights)
            recv_hook()
            torch.cuda.synchronize()
            buffer.raise_if_failed()
            assert torch.equal(out, x)


@pytest.mark.parametrize("links", NETWORKS)
def test_a_rank_without_a_batch_serves_the_others(links: str) -> None:
    shape = Shape(
        4,
        200,
        512,
        num_experts=16,
        top_k=4,
        device="cuda",
        network=NETWORKS[links],
        reduction="source",
    )
    with RankProcesses(4) as ranks:
        ranks.run(serve_all_from_one, shape, deadline_secs=120)


def drive_deep_ep(rank: Rank, scenario: Scenario, network: str) -> None:
    """Its buffers find the network in the environment."""
    start(rank)
    os.environ[VARIABLE] = network
    buffer = buffer_of(rank.group)
    for op in range(4):
        variant = scenario.variant(op)
        Exchange(buffer, scenario.shape, variant, is_hooked=op % 2 == 0).run(zero_copy=op == 3)
    links = [b.links() for b in buffer._buffers.values() if isinstance(b, LowLatencyBuffer)]
    expected = ["rdma"] * rank.group.num_ranks
    expected[rank.group.self_rank] = "self"
    assert links == [expected]
    buffer.destroy()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_deep_ep(num_ranks: int) -> None:
    shape = Shape(
        num_ranks,
        hidden=512,
        device="cuda",
        dispatch_dtype=torch.float8_e4m3fn,
        scale_format="ue8m0",
        reduction="source",
    )
    scenario = Scenario(shape)
    for seed, routing in enumerate(("uniform", "masked", "repeated")):
        num_tokens = [max(0, 6 - seed - 3 * rank) for rank in range(num_ranks)]
        scenario.add(routing, num_tokens, seed)
    network = "transport=none links=rdma bootstrap_interface=lo"
    with RankProcesses(num_ranks) as ranks:
        ranks.run(drive_deep_ep, scenario, network, deadline_secs=60)


def replay_graph(rank: Rank, shape: Shape, num_replays: int) -> None:
    start(rank)
    with shape.buffer(rank.group) as buffer:
        x = torch.randn(shape.num_max_tokens_per_rank, shape.hidden, device="cuda").bfloat16()
        topk_idx = torch.arange(len(x) * shape.top_k, device="cuda").view(len(x), -1)
        topk_idx %= shape.num_experts
        replay_pairs(buffer, x, topk_idx, num_replays)


@pytest.mark.parametrize("links", NETWORKS)
def test_captured_graphs_replay(links: str) -> None:
    shape = Shape(2, 16, 512, num_experts=16, top_k=8, device="cuda", network=NETWORKS[links])
    with RankProcesses(2) as ranks:
        ranks.run(replay_graph, shape, 20, deadline_secs=60)


def lose_a_peer(rank: Rank, shape: Shape) -> float:
    """Rank 1 is killed; the others notice, close, and go on."""
    start(rank)
    buffer = shape.buffer(rank.group, timeout_secs=1.0)
    rank.tell("ready")
    if rank.group.self_rank == 1:
        time.sleep(60)
    rank.ask()  # until rank 1 is dead
    x = torch.zeros(2, shape.hidden, dtype=torch.bfloat16, device="cuda")
    topk_idx = torch.zeros(2, shape.top_k, dtype=torch.int64, device="cuda")
    weights = torch.ones(2, shape.top_k, device="cuda")
    _, recv_hook = buffer.dispatch(x, topk_idx, weights)
    recv_hook()
    torch.cuda.synchronize()
    with pytest.raises(PeerTimeout, match="rank 1"):
        buffer.raise_if_failed()
    begin = time.monotonic()
    buffer.close()
    return time.monotonic() - begin


def test_a_dead_peer_is_noticed_and_nothing_hangs() -> None:
    shape = Shape(2, hidden=512, device="cuda", network=NETWORKS["rdma"])
    with RankProcesses(2) as ranks:
        ranks.start(lose_a_peer, shape)
        for rank in range(2):
            assert ranks.next_from(rank, 60) == "ready"
        ranks.kill(1)
        ranks.tell(0, None)
        (answer,) = ranks.answers([0], deadline_secs=60)
        assert answer.error_type is None, answer.details
        assert answer.value < 5.0


def ask_for_other_settings(rank: Rank, shape: Shape) -> None:
    start(rank)
    group = rank.group
    with shape.buffer(group):
        other = replace(shape.network, queue_pairs_per_peer=4)
        with pytest.raises(ValueError, match="NVSHMEM_IBGDA_NUM_RC_PER_PE=4, but NVSHMEM has"):
            replace(shape, network=other).buffer(group)
        with pytest.raises(ValueError, match="num_max_tagged_tokens is 2, but nothing is tagged"):
            replace(shape, num_max_tagged_tokens=2).buffer(group)
    with shape.buffer(group) as buffer:  # the refusals have broken nothing
        exchange(buffer, 0)


def test_settings_that_are_fixed_are_refused() -> None:
    shape = Shape(2, hidden=512, device="cuda", network=NETWORKS["auto"])
    with RankProcesses(2) as ranks:
        ranks.run(ask_for_other_settings, shape, deadline_secs=60)


def refuse_part_of_the_world(rank: Rank, shape: Shape) -> str:
    import torch.distributed as dist

    from ep_backend import Group

    start(rank)
    shape.buffer(rank.group)
    alone = [dist.new_group([r], backend="gloo") for r in range(2)][rank.group.self_rank]
    try:
        replace(shape, num_ranks=1).buffer(Group.from_process_group(alone))
    except RuntimeError as e:
        return str(e)
    return "not refused"


def test_a_part_of_the_world_is_refused() -> None:
    shape = Shape(2, hidden=512, device="cuda", network=NETWORKS["auto"])
    with RankProcesses(2) as ranks:
        for text in ranks.run(refuse_part_of_the_world, shape, deadline_secs=60):
            assert "of NVSHMEM's 2 in this process" in text


def find_it_started(rank: Rank, shape: Shape) -> None:
    """nvshmem4py has started NVSHMEM before ep_backend came."""
    start(rank)
    core = pytest.importorskip("nvshmem.core")
    device = pytest.importorskip("cuda.core").Device(torch.cuda.current_device())
    assert shape.network is not None
    os.environ.update(shape.network.environment("low_latency", shape.num_max_tokens_per_rank, 2))
    os.environ["NVSHMEM_DISABLE_NVLS"] = "1"
    uid = core.get_unique_id(empty=rank.group.self_rank != 0)
    data = bytes(uid._data.view("uint8"))
    uid._data.view("uint8")[:] = memoryview(rank.group.all_gather(data)[0])
    core.init(
        device=device,
        uid=uid,
        rank=rank.group.self_rank,
        nranks=rank.group.num_ranks,
        initializer_method="uid",
    )
    run_programs(rank, [mixed_scenario(shape, num_variants=3)], ["plain_loop"], 3)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nvshmem_that_somebody_else_has_started(num_ranks: int) -> None:
    pytest.importorskip("nvshmem.core", reason="no nvshmem4py: starting NVSHMEM by it was NOT run")
    shape = Shape(num_ranks, hidden=512, device="cuda", network=NETWORKS["rdma"])
    with RankProcesses(num_ranks) as ranks:
        ranks.run(find_it_started, shape, deadline_secs=60)
