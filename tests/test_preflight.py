"""`ep-backend check`: it passes where an exchange works, and names what is missing elsewhere."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ep_backend import _native
from ep_backend.cli import app
from ep_backend.faults import FAULT_VARIABLE, Fault
from ep_backend.preflight import KERNELS, NotDeployable, check


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_cpu_exchanges(kernels: str) -> None:
    found = check(device="cpu", kernels=kernels)
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
        ({"num_hosts": 2}, "needs RDMA"),
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
    assert "built without CUDA" in result.stderr


def test_too_few_gpus_and_gpus_apart_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ep_backend.preflight._native.has_cuda", True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(
        "torch.cuda.can_device_access_peer", lambda own, peer: {own, peer} != {1, 3}
    )
    with pytest.raises(NotDeployable, match="8 GPUs are needed, but torch sees 4"):
        check(device="cuda", num_gpus=8)
    with pytest.raises(NotDeployable, match="GPU 1 cannot read GPU 3's memory"):
        check(device="cuda", num_gpus=4)


@pytest.mark.gpu
@pytest.mark.skipif(not _native.has_cuda, reason="this build has no CUDA kernels")
def test_a_gpu_exchanges() -> None:
    assert "low-latency kernels exchange correctly" in check(device="cuda")
