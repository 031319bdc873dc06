"""The doctor, on machines that are trees of files: what each lacks, and nothing else, is named."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ep_backend import _native
from ep_backend.cli import app
from ep_backend.doctor import Check, Level, Link, Machine, examine, link_table
from ep_backend.doctor.gpu import Gpus, check_gpus
from ep_backend.doctor.rdma import Build, check_rdma
from ep_backend.doctor.report import Examination, print_examination
from ep_backend.doctor.tuning import check_tuning
from ep_backend.tuning import Site, Table
from tests.tuning.test_table import ENTRY

HOPPER = ("NVIDIA H100 80GB HBM3", (9, 0))
WHEELS = {"nvidia-nvshmem-cu13": "3.4.5", "nvshmem4py-cu13": "0.4.1"}


def gpus(num_gpus: int, apart: set[tuple[int, int]] | None = None) -> Gpus:
    return Gpus(
        (HOPPER[0],) * num_gpus,
        (HOPPER[1],) * num_gpus,
        tuple(f"0000:{0x18 + 0x20 * i:02x}:00.0" for i in range(num_gpus)),
        lambda a, b: a == b or (a, b) not in (apart or set()),
    )


def write(root: Path, absolute: str, text: str) -> None:
    path = root / absolute.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def make_cluster_node(root: Path) -> Machine:
    """Two GPUs, each behind a PCIe switch with a card."""
    write(root, "/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module 580")
    write(
        root,
        "/proc/driver/nvidia/params",
        'EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"',
    )
    write(root, "/proc/modules", "nvidia_peermem 16384 0 - Live\nnvidia 1 0 - Live")
    write(root, "/proc/sys/kernel/osrelease", "6.8.0-generic")
    for i in range(2):
        switch = f"sys/devices/pci0000:{0x15 + 0x20 * i:02x}/0000:{0x16 + 0x20 * i:02x}:00.0"
        for device in (f"0000:{0x18 + 0x20 * i:02x}:00.0", f"0000:{0x19 + 0x20 * i:02x}:00.0"):
            (root / switch / device).mkdir(parents=True)
        gpu_link = root / f"sys/bus/pci/devices/0000:{0x18 + 0x20 * i:02x}:00.0"
        gpu_link.parent.mkdir(parents=True, exist_ok=True)
        gpu_link.symlink_to(root / switch / f"0000:{0x18 + 0x20 * i:02x}:00.0")
        port = f"/sys/class/infiniband/mlx5_{i}/ports/1"
        write(root, f"{port}/state", "4: ACTIVE")
        write(root, f"{port}/link_layer", "InfiniBand")
        write(root, f"{port}/rate", "400 Gb/sec (4X NDR)")
        card = root / f"sys/class/infiniband/mlx5_{i}/device"
        card.symlink_to(root / switch / f"0000:{0x19 + 0x20 * i:02x}:00.0")
    return Machine(root, {}, WHEELS.get, lambda _: resource.RLIM_INFINITY)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


BUILD = Build(nvshmem="3.4.5")


def missing_in(machine: Machine, build: Build = BUILD) -> set[str]:
    return {c.name for c in check_rdma(machine, gpus(2), build) if c.level is Level.MISSING}


def test_a_cluster_node_lacks_nothing_but_perhaps_our_kernels(tmp_path: Path) -> None:
    machine = make_cluster_node(tmp_path)
    assert missing_in(machine) == set()
    without = Build(why_not="built without NVSHMEM")
    assert missing_in(machine, without) == {"kernels over NVSHMEM"}
    found = by_name(check_rdma(machine, gpus(2), without))["kernels over NVSHMEM"].found
    assert found == "built without NVSHMEM"
    checks = by_name(check_rdma(machine, gpus(2)))
    assert "mlx5_0:1 InfiniBand 400 Gb/sec" in checks["network cards"].found
    assert checks["card of GPU 0"].found == "mlx5_0, on its PCIe switch"
    assert checks["card of GPU 1"].found == "mlx5_1, on its PCIe switch"
    assert "NVIDIA UNIX" in by_name(check_gpus(machine, gpus(2), True))["NVIDIA driver"].found


@pytest.mark.parametrize(
    ("file", "text", "name", "found"),
    [
        ("/proc/driver/nvidia/params", "EnableStreamMemOPs: 0", "IBGDA", "NVreg_EnableStreamMem"),
        (
            "/proc/driver/nvidia/params",
            "EnableStreamMemOPs: 1",
            "IBGDA",
            'lacks NVreg_RegistryDwords="PeerMappingOverride=1;"',
        ),
        ("/proc/modules", "ext4 1 0 - Live", "GPU memory for cards", "neither nvidia_peermem nor"),
    ],
)
def test_what_a_node_lacks_is_named(
    tmp_path: Path, file: str, text: str, name: str, found: str
) -> None:
    machine = make_cluster_node(tmp_path)
    write(tmp_path, file, text)
    assert missing_in(machine) == {name}
    check = by_name(check_rdma(machine, gpus(2)))[name]
    assert found in check.found
    assert check.remedy


def test_a_cpu_thread_may_ring_the_doorbells(tmp_path: Path) -> None:
    machine = make_cluster_node(tmp_path)
    write(tmp_path, "/proc/driver/nvidia/params", "EnableStreamMemOPs: 0")
    write(tmp_path, "/dev/gdrdrv", "")
    assert by_name(check_rdma(machine, gpus(2)))["IBGDA"].level is Level.NOTE
    write(tmp_path, "/proc/modules", "nvidia 1 0 - Live")  # dmabuf, perhaps
    assert by_name(check_rdma(machine, gpus(2)))["GPU memory for cards"].level is Level.NOTE


def test_a_proxy_needs_no_doorbells(tmp_path: Path) -> None:
    node = make_cluster_node(tmp_path)
    write(tmp_path, "/proc/driver/nvidia/params", "EnableStreamMemOPs: 0")
    environ = {"EP_BACKEND_NETWORK": "transport=proxy"}
    machine = Machine(tmp_path, environ, WHEELS.get, node.limit_of)
    assert missing_in(machine) == set()
    assert by_name(check_rdma(machine, gpus(2), BUILD))["IBGDA"].found == (
        "not used: transport proxy"
    )


def test_limits_wheels_and_ports(tmp_path: Path) -> None:
    node = make_cluster_node(tmp_path)
    limited = Machine(tmp_path, {}, WHEELS.get, lambda _: 64 << 10)
    locked = by_name(check_rdma(limited, gpus(2)))["locked memory"]
    assert (locked.level, locked.found.split(":")[0]) == (Level.MISSING, "limited to 64 KiB")
    bare = Machine(tmp_path, {}, {"nvidia-nvshmem-cu13": "3.4.5"}.get, node.limit_of)
    checks = by_name(check_rdma(bare, gpus(2), BUILD))
    assert "nvshmem4py is not installed" in checks["NVSHMEM"].found
    assert checks["NVSHMEM"].level is Level.NOTE
    empty = Machine(tmp_path, {}, lambda _: None, node.limit_of)
    without = Build(why_not="built without NVSHMEM")
    assert by_name(check_rdma(empty, gpus(2), without))["NVSHMEM"].level is Level.MISSING
    # NVSHMEM_ROOT named one that is of no wheel.
    assert missing_in(empty) == set()
    assert by_name(check_rdma(empty, gpus(2), BUILD))["NVSHMEM"].found == "3.4.5, not of a wheel"
    for i in range(2):
        write(tmp_path, f"/sys/class/infiniband/mlx5_{i}/ports/1/state", "1: DOWN")
    cards = by_name(check_rdma(node, gpus(2)))["network cards"]
    assert cards.found == "no port is active: mlx5_0, mlx5_1"


def test_gpus_of_another_generation_or_apart(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {}, WHEELS.get)
    cards = ("A100", HOPPER[0], "B200")
    gpus = Gpus(cards, ((8, 0), (9, 0), (10, 0)), ("", "", ""), lambda _a, _b: False)
    checks = by_name(check_gpus(machine, gpus, False))
    assert checks["CUDA kernels"].level is Level.MISSING
    assert checks["NVIDIA driver"].level is Level.MISSING
    for i, number in ((0, "8.0"), (2, "10.0")):
        found = checks[f"GPU {i}"].found
        assert f"compute capability {number}: the kernels are compiled for 9.0" in found
    assert checks["GPU 1"].level is Level.OK
    assert "0 -> 1, 0 -> 2, 1 -> 0" in checks["peer access"].found
    assert by_name(check_gpus(machine, Gpus(), True))["GPUs"].found == "torch sees none"


def test_every_pair_has_a_link_or_a_reason() -> None:
    table = link_table(4, 2, "cuda", gpus(2, apart={(1, 0)}))
    assert table[0][0].kind == "self"
    assert table[0][1].kind == table[2][3].kind == "p2p"
    assert table[1][0] == Link(None, "GPU 1 does not reach the memory of GPU 0")
    assert "on different hosts" in table[0][2].why
    assert table[0][2].kind is None
    assert {link.kind for row in link_table(3, 3, "cpu", gpus(0)) for link in row} == {
        "self",
        "shm",
    }
    assert "no GPU 2" in link_table(3, 3, "cuda", gpus(2))[0][2].why
    with_network = link_table(4, 2, "cuda", gpus(2, apart={(1, 0)}), no_network="")
    assert [link.kind for link in with_network[0]] == ["self", "p2p", "rdma", "rdma"]
    assert "does not reach the memory of GPU 0" in with_network[1][0].why
    assert with_network[1][0].kind == "rdma"
    with pytest.raises(ValueError, match="4 ranks, 5 on a host"):
        link_table(4, 5, "cpu", gpus(0))


def test_a_config_runs_if_what_it_needs_is_there(tmp_path: Path) -> None:
    machine = make_cluster_node(tmp_path)
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert examine("cpu", 2, 2, machine, Gpus()).can_run
    on_gpus = examine("cuda", 2, 2, machine, gpus(2))
    assert {check.name for check in on_gpus.missing} <= {"CUDA kernels"}  # as this build is
    assert not on_gpus.apart
    on_hosts = examine("rdma", 4, 2, machine, gpus(2), Build(why_not="built without NVSHMEM"))
    assert not on_hosts.can_run
    assert on_hosts.apart == {
        "on different hosts: only RDMA joins those; this build is without NVSHMEM": 8
    }
    on_hosts = examine("rdma", 4, 2, machine, gpus(2), BUILD)
    assert {check.name for check in on_hosts.missing} <= {"CUDA kernels"}
    assert not on_hosts.apart


def test_network_settings_that_cannot_be(tmp_path: Path) -> None:
    make_cluster_node(tmp_path)
    for environ, text in (
        ({"EP_BACKEND_NETWORK": "transport=tcp"}, "transport is 'tcp', expected 'ibgda'"),
        ({"NVSHMEM_IB_ENABLE_IBGDA": "0"}, "NVSHMEM_IB_ENABLE_IBGDA is '0' in the environment"),
    ):
        machine = Machine(tmp_path, environ, WHEELS.get, lambda _: resource.RLIM_INFINITY)
        check = by_name(check_rdma(machine, gpus(2), BUILD))["network settings"]
        assert (check.level, text in check.found) == (Level.MISSING, True)
    machine = Machine(tmp_path, {"EP_BACKEND_NETWORK": "service_level=3"}, WHEELS.get)
    check = by_name(check_rdma(machine, gpus(2), BUILD))["network settings"]
    assert check.level is Level.NOTE
    assert "no adaptive routing" in check.found


def test_a_config_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="config is 'tpu', expected 'cpu' or"):
        examine("tpu", 1, 1)


def test_broken_results_on_purpose_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    machine = Machine(tmp_path, {"EP_BACKEND_FAULT": "drop-remote-contributions"})
    examination = examine("cpu", 2, 2, machine, Gpus())
    assert [check.name for check in examination.missing] == ["EP_BACKEND_FAULT"]


def printed(examination: Examination) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_examination(examination, console)
    return console.export_text()


def test_what_is_printed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {}, lambda _: None, lambda _: 0)
    text = printed(examine("rdma", 20, 2, machine, gpus(2), Build(why_not="without")))
    assert "pip install 'ep_backend[nvshmem]'" in text  # no markup
    assert "(the first 16 of 20 ranks)" in text
    assert "rdma, 20 ranks: cannot run" in text
    assert "360 pairs of ranks: on different hosts" in text


def test_this_machine() -> None:
    """Whatever it is, it says why it lacks what it lacks."""

    def run(*arguments: str) -> tuple[int, Any]:
        result = CliRunner().invoke(app, ["doctor", *arguments, "--json"])
        return result.exit_code, json.loads(result.stdout)

    status, document = run("--config", "cpu")
    assert (status, document["can_run"]) == (0, True)
    status, document = run("--config", "rdma", "--ranks", "4", "--ranks-per-host", "2")
    assert status == 1
    assert [link["kind"] for link in document["links"][0]][:1] == ["self"]
    for checks in document["checks"].values():
        for check in checks:
            assert check["found"]
            assert check["remedy"] or check["level"] == "ok"
    assert CliRunner().invoke(app, ["doctor", "--config", "tpu"]).exit_code == 2


def tuned(tmp_path: Path, text: str | None = None) -> list[Check]:
    """Of a machine with two H100s, with this text as its table."""
    path = "/home/u/.cache/ep_backend/tuning.json"
    if text is not None:
        write(tmp_path, path, text)
    return check_tuning(Machine(tmp_path, {"HOME": "/home/u"}), gpus(2))


def test_a_table_that_is_not_there_or_off_is_no_fault(tmp_path: Path) -> None:
    (check,) = tuned(tmp_path)
    assert check.level is Level.OK
    assert "/home/u/.cache/ep_backend/tuning.json: none" in check.found
    (check,) = check_tuning(Machine(tmp_path, {"EP_BACKEND_TUNING": "off"}), gpus(2))
    assert check.found == "off (EP_BACKEND_TUNING, or no home directory)"


def test_a_table_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (check,) = tuned(tmp_path, "{}")
    assert check.level is Level.NOTE
    assert "is ignored: its schema is None" in check.found


def test_what_of_a_table_holds_here(tmp_path: Path) -> None:
    site = Site(HOPPER[0], "nvlink-18", _native.PROTOCOL_VERSION)
    here = replace(ENTRY, site=site)
    elsewhere = [
        replace(ENTRY, site=replace(site, device="NVIDIA H200")),
        replace(ENTRY, site=replace(site, protocol=1)),
    ]
    table, *entries = tuned(tmp_path, json.dumps(Table((here, *elsewhere)).to_json()))
    assert table.level is Level.OK
    assert "1 entries for this machine; 2 of another device or version are ignored" in table.found
    assert [check.found for check in entries] == [
        f"{ENTRY.shape}, nvlink-18: num_sms 24, transfer push, num_max_tagged_tokens 16"
    ]
