"""Settings of the network: what NVSHMEM is told, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ep_backend import LowLatencyBuffer, NetworkConfig, virtual_world
from ep_backend.cli import app
from ep_backend.network import apply, check_fixed, check_free
from tests.support.shapes import Shape


def environment(config: NetworkConfig, family: str = "low_latency") -> dict[str, str]:
    return config.environment(family, num_max_tokens_per_rank=128, num_banks=2)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("NVSHMEM_IBGDA_ENABLE_MULTI_PORT", "1"), ("NVSHMEM_IB_ATOMIC_POLICY", "MULTI")],
)
def test_several_cards_that_add_to_one_word_are_refused(variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{variable} is '{value}'"):
        check_free({}, {variable: value})
    check_free({}, {variable: "0"})


def test_transports() -> None:
    assert environment(NetworkConfig())["NVSHMEM_IB_ENABLE_IBGDA"] == "1"
    assert environment(NetworkConfig(transport="ibgda_cpu"))["NVSHMEM_IBGDA_NIC_HANDLER"] == "cpu"
    proxy = environment(NetworkConfig(transport="proxy"))
    assert (proxy["NVSHMEM_IB_ENABLE_IBGDA"], proxy["NVSHMEM_REMOTE_TRANSPORT"]) == ("0", "ibrc")
    none = environment(NetworkConfig(transport="none"))
    assert none == {"NVSHMEM_IB_ENABLE_IBGDA": "0", "NVSHMEM_REMOTE_TRANSPORT": "none"}


def test_everything_that_is_set_reaches_nvshmem() -> None:
    config = NetworkConfig(
        service_level=3,
        adaptive_routing=True,
        traffic_class=106,
        gid_index=3,
        queue_pairs_per_peer=8,
        queue_pair_depth=4096,
        nics=("mlx5_0:1", "mlx5_1:1"),
        bootstrap_interface="eth0",
    )
    assert environment(config) == {
        "NVSHMEM_IB_ENABLE_IBGDA": "1",
        "NVSHMEM_IBGDA_NIC_HANDLER": "auto",
        "NVSHMEM_QP_DEPTH": "4096",
        "NVSHMEM_IB_SL": "3",
        "NVSHMEM_IB_TRAFFIC_CLASS": "106",
        "NVSHMEM_IB_GID_INDEX": "3",
        "NVSHMEM_IBGDA_NUM_RC_PER_PE": "8",
        "NVSHMEM_HCA_LIST": "mlx5_0:1,mlx5_1:1",
        "NVSHMEM_ENABLE_NIC_PE_MAPPING": "1",
        "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "eth0",
    }
    mapped = environment(NetworkConfig(nic_mapping="mlx5_0:1:2"))
    assert mapped["NVSHMEM_HCA_PE_MAPPING"] == "mlx5_0:1:2"
    assert mapped["NVSHMEM_ENABLE_NIC_PE_MAPPING"] == "1"


@given(st.integers(1, 4096), st.integers(2, 8))
def test_a_queue_pair_holds_all_that_a_buffer_has_in_flight(num_tokens: int, banks: int) -> None:
    # Both phases; a message a token, the counts and the signal; two requests each.
    num_requests = 2 * banks * (num_tokens + 2) * 2
    if num_requests > 1 << 15:
        with pytest.raises(ValueError, match=f"so {num_requests} requests .* holds 32768 at most"):
            NetworkConfig().depth_for(num_tokens, banks)
        assert NetworkConfig(queue_pair_depth=1024).depth_for(num_tokens, banks) == 1024
        return
    depth = NetworkConfig().depth_for(num_tokens, banks)
    assert depth == 1024 or num_requests <= depth < 2 * num_requests
    assert depth >= max(1024, num_requests)
    assert depth & (depth - 1) == 0


def test_service_levels_of_both_families() -> None:
    apart = NetworkConfig(service_level=1, normal_service_level=2)
    for family in ("low_latency", "normal"):
        with pytest.raises(ValueError, match="one class of queue pairs a process"):
            environment(apart, family)
    alike = NetworkConfig(service_level=2, normal_service_level=2)
    assert environment(alike, "normal")["NVSHMEM_IB_SL"] == "2"
    prefill = NetworkConfig(normal_service_level=4)
    assert environment(prefill, "normal")["NVSHMEM_IB_SL"] == "4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transport=tcp", "transport is 'tcp', expected 'ibgda'"),
        ("links=nvlink", "links is 'nvlink'"),
        ("service_level=16", "service_level is 16"),
        ("service_level=high", "service_level is 'high', expected a number"),
        ("queue_pair_depth=1000", "queue_pair_depth is 1000, expected a power of two"),
        (
            "adaptive_routing=1",
            "adaptive_routing is True, but service_level and normal_service_level are None",
        ),
        ("adaptive_routing=yes", "adaptive_routing is 'yes', expected 0 or 1"),
        ("nics=mlx5_0:1 nic_mapping=mlx5_0:1:1", "pass one of them"),
        ("lane=3", "holds 'lane=3', expected NAME=VALUE"),
        ("transport", "holds 'transport', expected NAME=VALUE"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig.parse(text)


def test_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EP_BACKEND_NETWORK", raising=False)
    assert NetworkConfig.from_env() is None
    monkeypatch.setenv("EP_BACKEND_NETWORK", "")
    assert NetworkConfig.from_env() == NetworkConfig()
    text = "transport=proxy nics=mlx5_0:1,mlx5_1:1 service_level=3 adaptive_routing=1"
    monkeypatch.setenv("EP_BACKEND_NETWORK", text)
    assert NetworkConfig.from_env() == NetworkConfig(
        transport="proxy", nics=("mlx5_0:1", "mlx5_1:1"), service_level=3, adaptive_routing=True
    )


def test_variables_that_are_set_already() -> None:
    required = {"NVSHMEM_IB_SL": "3", "NVSHMEM_QP_DEPTH": "2048"}
    environ = {"NVSHMEM_IB_SL": "3", "NVSHMEM_DISABLE_NVLS": "0"}
    check_free(required, environ)
    apply(required, environ)
    assert environ["NVSHMEM_QP_DEPTH"] == "2048"
    assert environ["NVSHMEM_DISABLE_NVLS"] == "0"  # the user's word on what is only our default
    with pytest.raises(ValueError, match="NVSHMEM_IB_SL is '3' in the environment, but"):
        check_free({"NVSHMEM_IB_SL": "4"}, environ)


def test_variables_that_nvshmem_has_read() -> None:
    fixed: dict[str, str | None] = {"NVSHMEM_IB_SL": "3"}
    check_fixed({"NVSHMEM_IB_SL": "3"}, fixed)
    with pytest.raises(ValueError, match=r"NVSHMEM_IB_SL=4, but NVSHMEM has started in .* with 3"):
        check_fixed({"NVSHMEM_IB_SL": "4"}, fixed)
    with pytest.raises(ValueError, match="with it unset"):
        check_fixed({"NVSHMEM_QP_DEPTH": "2048"}, fixed)
    # A smaller buffer than the first one; a larger one.
    fixed["NVSHMEM_QP_DEPTH"] = "2048"
    check_fixed({"NVSHMEM_QP_DEPTH": "1024"}, fixed)
    with pytest.raises(ValueError, match=r"NVSHMEM_QP_DEPTH=4096, but .* with 2048"):
        check_fixed({"NVSHMEM_QP_DEPTH": "4096"}, fixed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "device is 'cpu', but over a network it is 'cuda'"),
        ({"device": "cuda", "num_max_tagged_tokens": 4}, "nothing is tagged over a network"),
        (
            {"device": "cuda", "output_layout": "rank_major", "num_workspaces": 1},
            "num_workspaces is 1, but over a network it is 0",
        ),
    ],
)
def test_buffers_that_no_network_serves(changed: dict[str, object], message: str) -> None:
    shape = Shape(1, network=NetworkConfig(), **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        shape.settings().check(1)
    if not changed:
        with pytest.raises(ValueError, match=message):
            virtual_world(1).run(shape.buffer)


def test_pushed_and_untagged() -> None:
    config = Shape(3, device="cuda", network=NetworkConfig()).config()
    assert config.packs_messages
    assert (config.transfer.name, config.num_max_tagged_tokens) == ("PUSH", 0)


def test_links_without_a_network() -> None:
    def links(buffer: LowLatencyBuffer) -> list[str]:
        with buffer:
            return buffer.links()

    shape = Shape(2)
    assert virtual_world(2).run(lambda group: links(shape.buffer(group))) == [
        ["self", "shm"],
        ["shm", "self"],
    ]


def test_command() -> None:
    done = CliRunner().invoke(app, ["network", "service_level=2", "--max-tokens", "256"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert {"NVSHMEM_IB_SL=2", "NVSHMEM_QP_DEPTH=4096"} <= set(lines)
    assert any(line.startswith("# no adaptive routing") for line in lines)
    assert CliRunner().invoke(app, ["network", "service_level=99"]).exit_code == 2
    done = CliRunner().invoke(app, ["network", "normal_service_level=4", "--kernels", "normal"])
    assert "NVSHMEM_IB_SL=4" in done.stdout.splitlines()
    assert CliRunner().invoke(app, ["network", "--kernels", "fast"]).exit_code == 2


@given(st.integers(1, 8), st.integers(1, 8))
def test_nodes_are_hosts_where_nothing_else_is_said(size: int, num_hosts: int) -> None:
    hosts = [rank // size for rank in range(size * num_hosts)]
    assert NetworkConfig().node_size(hosts) == size


def test_nodes_may_be_smaller_than_hosts() -> None:
    assert NetworkConfig(ranks_per_node=2).node_size([0] * 4) == 2
    for ranks_per_node in (3, 8):
        with pytest.raises(ValueError, match=f"not nodes of {ranks_per_node} ranks each"):
            NetworkConfig(ranks_per_node=ranks_per_node).node_size([0] * 4)


@pytest.mark.parametrize("hosts", [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 2]])
def test_hosts_that_are_no_nodes_are_refused(hosts: list[int]) -> None:
    with pytest.raises(ValueError, match="not nodes of"):
        NetworkConfig().node_size(hosts)


def test_which_buffers_have_nodes() -> None:
    """Those that forward; and flat ones, if they are told, unless everything is put."""
    (group, *_) = virtual_world(4).groups
    nodes = NetworkConfig(ranks_per_node=2)
    shape = Shape(4, device="cuda", network=NetworkConfig())
    for network, hierarchical, expected in (
        (NetworkConfig(), False, 4),
        (NetworkConfig(), True, 4),  # of one host
        (nodes, False, 2),
        (nodes, True, 2),
        (NetworkConfig(ranks_per_node=2, links="rdma"), False, 4),
    ):
        settings = replace(shape, network=network, hierarchical=hierarchical).settings()
        assert settings.ranks_per_node(group) == expected


def test_adaptive_routing_takes_the_level_of_either_family() -> None:
    config = NetworkConfig(normal_service_level=5, adaptive_routing=True)
    told = [line for line in config.advice() if "adaptively" in line]
    assert len(told) == 1
    assert "service level 5 must be one" in told[0]
    assert not any("service_level is not set" in line for line in config.advice())
    assert config.environment("normal", 64, 2)["NVSHMEM_IB_SL"] == "5"


def test_a_process_with_both_families_is_told_to_give_both_levels() -> None:
    config = NetworkConfig(service_level=3)
    by_normal = dict(config.environment("normal", 64, 2))
    with pytest.raises(ValueError, match=r"NVSHMEM_IB_SL=3, .* it unset.*normal_service_level of"):
        check_fixed(config.environment("low_latency", 64, 2), by_normal)
    both = NetworkConfig(service_level=3, normal_service_level=3)
    check_fixed(both.environment("low_latency", 64, 2), dict(both.environment("normal", 64, 2)))
