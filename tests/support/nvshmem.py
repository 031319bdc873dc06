"""Ranks that NVSHMEM joins on one host, without a network card: processes on GPUs of their own
where there are enough, else sharing one."""

from __future__ import annotations

import os

import torch

from ep_backend import LowLatencyBuffer, NetworkConfig
from tests.support.processes import Rank
from tests.support.programs import PROGRAMS, Interpreter
from tests.support.scenario import Scenario
from tests.support.shapes import Shape

# Several ranks on a GPU: small pieces of symmetric memory.
ENVIRONMENT = {"NVSHMEM_CUMEM_GRANULARITY": str(128 << 20)}


def network_of(ranks_per_node: int | None = None, links: str = "auto") -> NetworkConfig:
    """Nodes on one host put to each other; with links "rdma" all ranks do."""
    return NetworkConfig(
        transport="none", links=links, bootstrap_interface="lo", ranks_per_node=ranks_per_node
    )


def start(rank: Rank) -> None:
    torch.cuda.set_device(rank.group.self_rank % torch.cuda.device_count())
    os.environ.update(ENVIRONMENT)


def expected_links(shape: Shape, self_rank: int) -> list[str]:
    assert shape.network is not None
    node_size = shape.network.ranks_per_node or shape.num_ranks

    def link_to(rank: int) -> str:
        if rank == self_rank:
            return "self"
        is_near = rank // node_size == self_rank // node_size
        return "p2p" if is_near and shape.network.links == "auto" else "rdma"

    return [link_to(rank) for rank in range(shape.num_ranks)]


def replay_pairs(
    buffer: LowLatencyBuffer, x: torch.Tensor, topk_idx: torch.Tensor, num_replays: int
) -> None:
    """A captured pair, with other rows each time. Experts change nothing; of a token's eight, every
    rank has so many that its sum is exact."""
    weights = torch.full(topk_idx.shape, 1 / 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, recv_hook = buffer.dispatch(x, topk_idx, weights)
        recv_hook()
        out, recv_hook = buffer.combine(result.recv_x, result.handle)
        recv_hook()
    for _ in range(num_replays):
        x += 1
        graph.replay()
        torch.cuda.synchronize()
        buffer.raise_if_failed()
        assert torch.equal(out, x)  # eight eighths, exactly


def run_programs(rank: Rank, scenarios: list[Scenario], programs: list[str], num_ops: int) -> None:
    """One buffer after the other: later ones take the memory of those before."""
    start(rank)
    for scenario in scenarios:
        shape = scenario.shape
        with shape.buffer(rank.group) as buffer:
            assert buffer.links() == expected_links(shape, rank.group.self_rank)
            interpreter = Interpreter(buffer, scenario)
            for program in programs:
                interpreter.run(PROGRAMS[program](num_ops, shape.num_banks))
            torch.cuda.synchronize()
            buffer.raise_if_failed()
