"""What is not possible yet stops early, with our reason."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from ep_backend_sglang import arguments, choice, cpu_only
from ep_backend_sglang.buffer import MOST_TOKENS_LIMIT
from typer.testing import CliRunner

from ep_backend import RendezvousError
from ep_backend import group as group_module
from ep_backend.cli import app
from ep_backend.memory import nvshmem
from ep_backend.network import VARIABLE, NetworkConfig
from tests.serving_configs.configs import (
    COMPOSE_FILES,
    LEADER_WORKER_SETS,
    Process,
    all_processes,
    containers,
    example_environment,
    services,
)
from tests.support.processes import Rank, RankProcesses

CHECKS = [process for process in all_processes() if process.is_check]
OF_SEVERAL_HOSTS = [check for check in CHECKS if "--hosts" in check.options()]
ON_CPUS = [check for check in CHECKS if check.options()["--device"] == "cpu"]


@pytest.mark.skipif(find_spec("ep_backend._nvshmem") is not None, reason="NVSHMEM is built")
@pytest.mark.parametrize("check", OF_SEVERAL_HOSTS, ids=lambda check: check.origin)
def test_no_server_of_several_hosts_starts(check: Process) -> None:
    result = CliRunner().invoke(app, check.words[1:])
    assert result.exit_code == 1
    assert "2 hosts needs RDMA" in result.stderr
    assert "without NVSHMEM" in result.stderr
    assert "on one host" in result.stderr


def test_those_are_all_wide_ones() -> None:
    assert len(OF_SEVERAL_HOSTS) == 4, "two compose files, two pods"


def test_checks_know_the_settings_of_the_network() -> None:
    """Of their servers: which transport is asked for decides what is missing."""
    files = [
        services(path, {**example_environment(path.parent), "NETWORK": "transport=proxy"})
        for path in COMPOSE_FILES
    ]
    pods = [containers(path) for path in LEADER_WORKER_SETS]
    num_set = 0
    for processes in (list(found.values()) for found in files + pods):
        settings = {p.environment.get(VARIABLE) for p in processes if p.engine}
        for process in processes:
            if settings != {None} and process.is_check:
                assert {process.environment.get(VARIABLE)} == settings, process.origin
                num_set += 1
    assert num_set == 4, "two compose files, two pods"


@pytest.mark.parametrize("check", ON_CPUS, ids=lambda check: check.origin)
def test_servers_on_cpus_start(check: Process) -> None:
    result = CliRunner().invoke(app, check.words[1:])
    assert result.exit_code == 0, result.stderr
    assert "exchange correctly" in result.stdout


def make_manager_on_another_host(rank: Rank) -> None:
    from ep_backend_vllm.communicator import make_manager

    if rank.group.self_rank == 1:
        group_module._host_identity = lambda: "another host"
    make_manager(rank.group._exchange.process_group, "ep_backend_low_latency")


def test_vllm_over_two_hosts_ends_before_it_loads_a_model() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with RankProcesses(2) as ranks:
        ranks.start(make_manager_on_another_host)
        for answer in ranks.answers():
            assert answer.error_type == RendezvousError.__name__, answer.details
            assert "rank 1 is on another host than rank 0" in answer.error


def gpus_on_another_host(
    rank: Rank, has_nvshmem: bool, experts_format: str, backend: str = ""
) -> list[int]:
    """As if there were GPUs and NVSHMEM. What comes before a manager is made."""
    from ep_backend_vllm import backends, communicator
    from vllm.platforms import current_platform

    from ep_backend.memory import nvshmem

    type(current_platform).is_cuda = lambda self: True
    os.environ[backends.FORMAT_VARIABLE] = experts_format
    if has_nvshmem or rank.group.self_rank == 0:
        nvshmem.extension = lambda: None
    if rank.group.self_rank == 1:
        group_module._host_identity = lambda: "another host"
    communicator._require_reachable(rank.group, backend or backends.LOW_LATENCY)
    return rank.group.hosts()


def test_vllm_over_two_hosts_of_gpus_goes_on_with_nvshmem() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with RankProcesses(2) as ranks:
        found = ranks.run(gpus_on_another_host, True, "batched")
        assert found == [[0, 1]] * 2
        # The normal kernels bring the standard format there, too.
        backend = "ep_backend_high_throughput"
        found = ranks.run(gpus_on_another_host, True, "standard", backend)
        assert found == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("has_nvshmem", "experts_format", "errors"),
    [
        (True, "standard", ["EP_BACKEND_VLLM_FORMAT=batched on all hosts"] * 2),
        (False, "batched", ["rank 1 refused its settings: ep_backend was", "without NVSHMEM"]),
    ],
)
def test_vllm_over_two_hosts_of_gpus_names_what_is_missing(
    has_nvshmem: bool, experts_format: str, errors: list[str]
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with RankProcesses(2) as ranks:
        ranks.start(gpus_on_another_host, has_nvshmem, experts_format)
        for answer, error in zip(ranks.answers(), errors, strict=True):
            assert error in answer.error


# In a process of its own: SGLang's choice, once made, stays.
SGLANG_ARGUMENTS = """
from ep_backend_sglang import arguments, choice, cpu_only
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

load_plugins()
arguments = ServerArgs(
    model_path="dummy", moe_a2a_backend=choice.NAME, deepep_mode="low_latency", nnodes=2
)
try:
    arguments.resolve_once()
except ValueError as error:
    print(f"refused: {error}")
print(f"chosen: {choice.is_ours()}")
"""


def test_sglang_over_two_hosts_ends_at_its_arguments() -> None:
    pytest.importorskip("sglang", reason="SGLang is not installed")
    result = subprocess.run(
        [sys.executable, "-c", SGLANG_ARGUMENTS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={name: value for name, value in os.environ.items() if name != choice.VARIABLE},
    )
    assert re.search(r"refused: .*--nnodes is 2.*from GPUs only", result.stdout), result
    assert "chosen: False" in result.stdout


def test_sglang_over_two_hosts_of_gpus_goes_on_with_nvshmem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_only, "is_active", lambda: False)
    record = SimpleNamespace(nnodes=2)
    if find_spec("ep_backend._nvshmem") is None:
        with pytest.raises(ValueError, match=r"--nnodes is 2, .* built without NVSHMEM"):
            arguments._require_network(record)
    monkeypatch.setattr(nvshmem, "extension", lambda: None)
    arguments._require_network(record)


@pytest.mark.parametrize(
    ("mode", "num_hosts", "given", "depth"),
    [
        ("auto", 2, None, 16384),
        ("auto", 2, "service_level=3", 16384),
        ("auto", 2, "normal_service_level=3", 16384),
        ("auto", 2, "queue_pair_depth=4096", 4096),
        ("auto", 1, None, None),
        ("normal", 2, None, None),
        ("low_latency", 2, None, None),
    ],
)
def test_sglang_over_two_hosts_has_queue_pairs_for_all_that_a_process_runs(
    mode: str, num_hosts: int, given: str | None, depth: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_only, "is_active", lambda: False)
    monkeypatch.setattr(nvshmem, "extension", lambda: None)
    monkeypatch.setattr(choice, "make_ours", lambda: None)
    monkeypatch.setenv(VARIABLE, given or "")
    if given is None:
        monkeypatch.delenv(VARIABLE)
    record = SimpleNamespace(
        nnodes=num_hosts,
        deepep_mode=mode,
        enable_single_batch_overlap=False,
        enable_dp_attention=False,
        **dict.fromkeys(arguments.FIELDS, choice.NAME),
    )
    arguments._choose(record)
    assert record.moe_a2a_backend == choice.BUILT_IN
    network = NetworkConfig.from_env() or NetworkConfig()
    assert network.queue_pair_depth == depth
    # Of which a process has one.
    level = 3 if given is not None and "service_level" in given else None
    assert (network.service_level, network.normal_service_level) == (level, level)
    if depth == 16384:  # what SGLang lets a low-latency dispatch take
        assert depth >= NetworkConfig().depth_for(MOST_TOKENS_LIMIT, 2)
