"""`ep-backend check`: it passes where an exchange works, and names what is missing elsewhere."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ep_backend import NetworkConfig, _native
from ep_backend.cli import app
from ep_backend.doctor.checks import Check, Level
from ep_backend.doctor.gpu import Gpus
from ep_backend.faults import FAULT_VARIABLE, Fault
from ep_backend.preflight import KERNELS, REDUCTIONS, NotDeployable, check


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_cpu_exchanges(kernels: str, reduction: str) -> None:
    found = check(device="cpu", kernels=kernels, reduction=reduction)
    assert "CPU" in found
    assert f"{kernels} kernels exchange correctly" in found


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_wrong_result_is_noticed(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, Fault.DROP_REMOTE_CONTRIBUTIONS.value)
    with pytest.raises(NotDeployable, match="gave a wrong result"):
        check(kernels=kernels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hosts": 3}, "3 hosts needs RDMA, which only .* device cpu"),
        ({"num_hosts": 2, "kernels": "normal"}, "2 hosts needs RDMA, which only .* device cpu"),
        ({"reduction": "home"}, "reduction is 'home', expected one of rank, source"),
        ({"device": "tpu"}, "device is 'tpu', expected 'cpu' or 'cuda'"),
        ({"kernels": "fast"}, "kernels is 'fast', expected one of low-latency, normal"),
    ],
)
def test_what_is_missing_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(NotDeployable, match=message):
        check(**arguments)


@pytest.mark.skipif(_native.has_cuda, reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so() -> None:
    result = CliRunner().invoke(app, ["check", "--device", "cuda", "--gpus", "8"])
    assert result.exit_code == 1
    assert "CUDA kernels: this build is CPU-only. Install where nvcc is" in result.stderr


def test_too_few_gpus_old_ones_and_gpus_apart_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(
        ("NVIDIA H100",) * 4 + ("NVIDIA A100",),
        ((9, 0),) * 4 + ((8, 0),),
        ("",) * 5,
        lambda own, peer: {own, peer} != {1, 3},
    )
    monkeypatch.setattr("ep_backend._native.has_cuda", True)
    monkeypatch.setattr(Gpus, "visible", lambda: gpus)
    monkeypatch.setattr("ep_backend.preflight._check_exchange", lambda *_: None)
    with pytest.raises(NotDeployable, match="8 GPUs are needed, but torch sees 5"):
        check(device="cuda", num_gpus=8)
    with pytest.raises(
        NotDeployable, match=r"GPU 4: NVIDIA A100, .* the kernels are compiled for 9\.0"
    ):
        check(device="cuda", num_gpus=5)
    with pytest.raises(NotDeployable, match=r"reach each other's memory: 1 -> 3, 3 -> 1\. .*RDMA"):
        check(device="cuda", num_gpus=4)
    assert "3 x NVIDIA H100, low-latency kernels" in check(device="cuda", num_gpus=3)


def test_what_a_network_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(("NVIDIA H100",), ((9, 0),), ("",))
    monkeypatch.setattr("ep_backend._native.has_cuda", True)
    monkeypatch.setattr(Gpus, "visible", lambda: gpus)
    monkeypatch.setattr("ep_backend.preflight._check_exchange", lambda *_: None)
    found = [Check("kernels over NVSHMEM", Level.NOTE, "in this build")]
    monkeypatch.setattr("ep_backend.preflight.check_rdma", lambda *_: found)
    for kernels in KERNELS:
        for reduction in REDUCTIONS:
            text = check(num_hosts=2, device="cuda", kernels=kernels, reduction=reduction)
            assert f"{kernels} kernels exchange correctly, and what 2 hosts need is there" in text
    found.append(Check("locked memory", Level.MISSING, "limited to 64 KiB"))
    check(num_hosts=2, device="cuda")
    found.append(Check("network cards", Level.MISSING, "none.", "Install their driver."))
    with pytest.raises(NotDeployable, match=r"network cards: none\. Install .* on one host"):
        check(num_hosts=2, device="cuda")


def test_nothing_is_started_that_the_servers_will_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the network's settings it is asked what they need, no more."""
    seen: list[NetworkConfig | None] = []
    monkeypatch.setenv("EP_BACKEND_NETWORK", "transport=proxy")
    monkeypatch.setattr("ep_backend.preflight._check_gpus", lambda _: "GPUs")
    monkeypatch.setattr(
        "ep_backend.preflight.check_rdma", lambda *_: seen.append(NetworkConfig.from_env()) or []
    )
    monkeypatch.setattr(
        "ep_backend.preflight._check_exchange", lambda *_: seen.append(NetworkConfig.from_env())
    )
    check(num_hosts=2, device="cuda")
    assert seen == [NetworkConfig(transport="proxy"), None]
    assert NetworkConfig.from_env() == seen[0]


@pytest.mark.gpu
@pytest.mark.skipif(not _native.has_cuda, reason="this build has no CUDA kernels")
def test_a_gpu_exchanges() -> None:
    assert "low-latency kernels exchange correctly" in check(device="cuda")
