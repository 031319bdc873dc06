"""Settings of normal buffers between nodes on GPUs: which buffer a group gets, what is refused, and
what NVSHMEM is told. Without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from ep_backend import (
    Group,
    NetworkConfig,
    NormalBuffer,
    RendezvousError,
    SettingsMismatch,
    virtual_world,
)
from ep_backend.memory import nvshmem
from ep_backend.network import MAX_QUEUE_PAIR_DEPTH, VARIABLE, check_fixed, spans_nodes
from ep_backend.normal_cuda import CudaNormalBuffer
from ep_backend.normal_cuda_settings import CudaNormalSettings
from ep_backend.normal_network import NetworkNormalBuffer
from ep_backend.normal_network_settings import (
    MAX_TOKENS_PER_ROUND,
    NetworkNormalSettings,
    network_settings_of,
)
from ep_backend.normal_settings import NormalSettings
from tests.support.nvshmem import network_of

SHAPE: dict[str, Any] = {
    "hidden": 512,
    "num_experts": 16,
    "top_k": 4,
    "dtype": torch.bfloat16,
    "dispatch_dtype": torch.bfloat16,
    "scale_format": "float32",
    "num_bytes": 8 << 20,
}
SETTINGS = NetworkNormalSettings(
    **SHAPE,
    network=NetworkConfig(),
    num_ranks=8,
    ranks_per_node=4,
    queue_pair_depth=MAX_QUEUE_PAIR_DEPTH,
)


def on_hosts(hosts: list[int]) -> Group:
    (group, *_) = virtual_world(len(hosts)).groups
    group._hosts = hosts
    return group


@pytest.mark.parametrize(
    ("hosts", "network", "kind"),
    [
        ([0, 0], None, CudaNormalBuffer),
        ([0, 0], NetworkConfig(), CudaNormalBuffer),
        ([0, 0], network_of(1), NetworkNormalBuffer),
        ([0, 0, 1, 1], None, NetworkNormalBuffer),
    ],
    ids=str,
)
def test_a_group_on_several_nodes_gets_a_buffer_over_the_network(
    hosts: list[int], network: NetworkConfig | None, kind: type
) -> None:
    made: Any = NormalBuffer.__new__(NormalBuffer, on_hosts(hosts), device="cuda", network=network)
    assert type(made) is kind
    made = NormalBuffer.__new__(NormalBuffer, on_hosts(hosts), device="cpu")
    assert type(made) is NormalBuffer


def test_the_environment_splits_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not spans_nodes([0, 0], None)
    monkeypatch.setenv(VARIABLE, "ranks_per_node=2")
    assert spans_nodes([0, 0], None)
    assert not spans_nodes([0, 0], NetworkConfig())
    monkeypatch.setenv(VARIABLE, "no such thing")  # its buffer says so, to all ranks
    assert spans_nodes([0, 0], None)


def test_nodes_are_hosts_or_parts_of_them() -> None:
    assert NetworkConfig().node_size([0, 0, 1, 1]) == 2
    assert NetworkConfig().node_size([0, 0, 0]) == 3
    assert network_of(1).node_size([0, 0, 1, 1]) == 1
    assert network_of(2).node_size([0] * 6) == 2
    for hosts, network in (
        ([0, 1, 0, 1], NetworkConfig()),
        ([0, 0, 1], NetworkConfig()),
        ([0, 0, 0, 1], NetworkConfig()),
        ([0, 0, 1, 1], network_of(4)),
        ([0, 0, 0, 0], network_of(3)),
    ):
        with pytest.raises(ValueError, match=r"not nodes of \d ranks each, in rank order"):
            network.node_size(hosts)
    with pytest.raises(ValueError, match="ranks_per_node is 0"):
        network_of(0)


def test_a_budget_decides_on_the_tokens_of_a_round() -> None:
    per_round = SETTINGS.num_tokens_per_round()
    assert 1 < per_round < MAX_TOKENS_PER_ROUND
    twice = replace(SETTINGS, num_bytes=16 << 20)
    assert 1.9 < twice.num_tokens_per_round() / per_round < 2.1
    # What is in flight must fit a queue pair, whatever the memory.
    most = replace(SETTINGS, num_bytes=1 << 40)
    assert most.num_tokens_per_round() == MAX_TOKENS_PER_ROUND
    assert most.environment()["NVSHMEM_QP_DEPTH"] == "32768"
    level = replace(most, network=NetworkConfig(normal_service_level=5))
    assert level.environment()["NVSHMEM_IB_SL"] == "5"


def test_rounds_are_as_large_as_the_queue_pairs_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def settings(network: NetworkConfig | None = None) -> NetworkNormalSettings:
        group = on_hosts([0, 0, 1, 1])
        return network_settings_of(group, network, **SHAPE | {"num_bytes": 1 << 40})

    assert settings().num_tokens_per_round() == MAX_TOKENS_PER_ROUND
    # Of all that two rounds have in flight, both ways, two requests each.
    assert settings(NetworkConfig(queue_pair_depth=1024)).num_tokens_per_round() == 126
    # NVSHMEM as a low-latency buffer has started it.
    started = NetworkConfig().environment("low_latency", 128, 2)
    world = nvshmem._World("", dict(started), torch.device("cuda", 0))
    monkeypatch.setattr(nvshmem, "_world", world)
    assert started["NVSHMEM_QP_DEPTH"] == "2048"
    assert settings().num_tokens_per_round() == 254
    check_fixed(settings().environment(), world.environment)
    # Its queue pairs are told of to peers that might have others.
    assert settings().agreed()["queue_pair_depth"] == 2048
    smaller = settings(NetworkConfig(queue_pair_depth=512))
    assert smaller.num_tokens_per_round() == 62
    check_fixed(smaller.environment(), world.environment)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_bytes": 1000}, "num_bytes is 1000, expected"),
        ({"num_ranks": 65}, "num_ranks is 65"),
        ({"ranks_per_node": 8}, "all on one node: nothing goes over a network"),
        ({"network": NetworkConfig(links="rdma")}, "links are 'rdma', but ranks of a node"),
        ({"hidden": 20}, "must be a multiple of 16"),
        ({"top_k": 65}, "top_k is 65"),
        ({"num_experts": 5000}, "num_experts is 5000"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
    ids=str,
)
def test_what_no_kernel_serves_is_refused(changes: dict[str, Any], text: str) -> None:
    settings = replace(SETTINGS, **changes)
    SETTINGS.check(SETTINGS.num_ranks)
    with pytest.raises(ValueError, match=text):
        settings.check(settings.num_ranks)


def test_on_a_cpu_there_is_no_such_network() -> None:
    def rank_main(group: Group) -> None:
        with pytest.raises(ValueError, match="network is given, but device is 'cpu'"):
            NormalBuffer(
                group,
                hidden=512,
                num_experts=16,
                top_k=4,
                dtype=torch.bfloat16,
                network=NetworkConfig(),
            )

    virtual_world(2).run(rank_main)


def test_ranks_of_a_node_must_see_each_other() -> None:
    seen = [[1, 2, 0, 0], [1, 2, 3, 0], [0, 0, 3, 4], [0, 0, 0, 4]]  # rank 3 does not see rank 2

    def of_node(group: Group, ranks_per_node: int) -> list[int]:
        return nvshmem._of_node(
            group, nvshmem._Block(10, 100), seen[group.self_rank], ranks_per_node
        )

    alone = virtual_world(4).run(lambda group: of_node(group, 1))
    assert alone == [[1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4]]

    def rank_main(group: Group) -> str:
        with pytest.raises(RendezvousError) as caught:
            of_node(group, 2)
        return str(caught.value)

    texts = set(virtual_world(4).run(rank_main))
    assert len(texts) == 1
    assert "rank 3: its GPU does not see the memory of rank 2" in texts.pop()


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (replace(SETTINGS, network=NetworkConfig(gid_index=3)), r"network.gid_index differs .*EP_"),
        (CudaNormalSettings(**SHAPE), r"network differs between ranks \(rank 0: 'given', rank 1"),
        (NormalSettings(**SHAPE), r"device differs between ranks \(rank 0: 'cuda', rank 1: 'cpu'"),
    ],
    ids=("another setting", "without a network", "on a CPU"),
)
@pytest.mark.parametrize("is_first", [True, False])
def test_ranks_that_would_have_unlike_buffers_are_told_what_differs(
    other: Any, text: str, is_first: bool
) -> None:
    pair = (SETTINGS, other) if is_first else (other, SETTINGS)

    def agree(group: Group) -> str:
        settings: Any = pair[group.self_rank]
        with pytest.raises(SettingsMismatch) as caught:
            group.agree("NormalBuffer", settings.agreed(), None, SETTINGS.remedies())
        return str(caught.value)

    texts = set(virtual_world(2).run(agree))
    assert len(texts) == 1
    assert re.search(text if is_first else text.split(" differs")[0] + " differs", *texts)
