"""Checks of the GPUs of this host, and of how they reach each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ep_backend import _native
from ep_backend.doctor.checks import Check, Level, Machine

CAPABILITY = (9, 0)
"""Of Hopper. Code for `sm_90a` runs on no other GPU, newer ones included."""


@dataclass(frozen=True)
class Gpus:
    """Those that this process may use."""

    names: tuple[str, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = ()
    pci_addresses: tuple[str, ...] = ()
    """As in /sys/bus/pci/devices, 0000:1b:00.0; empty: not known."""
    can_access: Callable[[int, int], bool] = lambda _a, _b: False
    """Whether one reads another's memory."""

    def __len__(self) -> int:
        return len(self.names)

    def first(self, num_gpus: int) -> Gpus:
        return Gpus(
            self.names[:num_gpus],
            self.capabilities[:num_gpus],
            self.pci_addresses[:num_gpus],
            self.can_access,
        )

    @classmethod
    def visible(cls) -> Gpus:
        if not torch.cuda.is_available():
            return cls()
        devices = range(torch.cuda.device_count())
        properties = [torch.cuda.get_device_properties(i) for i in devices]
        return cls(
            tuple(p.name for p in properties),
            tuple((p.major, p.minor) for p in properties),
            tuple(_pci_address(p) for p in properties),
            lambda a, b: a == b or torch.cuda.can_device_access_peer(a, b),
        )


def _pci_address(properties: Any) -> str:
    """Empty where this torch does not tell it."""
    numbers = [getattr(properties, f"pci_{n}_id", None) for n in ("domain", "bus", "device")]
    if None in numbers:
        return ""
    domain, bus, device = numbers
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def check_gpus(machine: Machine, gpus: Gpus, has_cuda_build: bool | None = None) -> list[Check]:
    """
    Args:
        has_cuda_build: of this library. Default: as it is.
    """
    return [
        check_build(has_cuda_build),
        _check_driver(machine),
        *check_cards(gpus),
        *check_peers(gpus),
    ]


def check_build(has_cuda_build: bool | None = None) -> Check:
    """
    Args:
        has_cuda_build: of this library. Default: as it is.
    """
    if has_cuda_build is None:
        has_cuda_build = _native.has_cuda
    if has_cuda_build:
        return Check("CUDA kernels", Level.OK, "in this build")
    return Check(
        "CUDA kernels",
        Level.MISSING,
        "this build is CPU-only",
        "Install where nvcc is, with EP_BACKEND_CUDA=ON.",
    )


def _check_driver(machine: Machine) -> Check:
    version = machine.read("/proc/driver/nvidia/version")
    if version is None:
        return Check(
            "NVIDIA driver",
            Level.MISSING,
            "not loaded, or hidden from this container",
            "Install it; start the container with GPUs (docker run --gpus all).",
        )
    return Check("NVIDIA driver", Level.OK, version.splitlines()[0].removeprefix("NVRM version: "))


def check_cards(gpus: Gpus) -> list[Check]:
    if len(gpus) == 0:
        return [
            Check(
                "GPUs",
                Level.MISSING,
                "torch sees none",
                "Check CUDA_VISIBLE_DEVICES, and that torch is a CUDA build.",
            )
        ]
    checks = []
    for i, (name, capability) in enumerate(zip(gpus.names, gpus.capabilities, strict=True)):
        number = ".".join(map(str, capability))
        if capability == CAPABILITY:
            checks.append(Check(f"GPU {i}", Level.OK, f"{name}, compute capability {number}"))
            continue
        checks.append(
            Check(
                f"GPU {i}",
                Level.MISSING,
                f"{name}, compute capability {number}: the kernels are compiled for 9.0",
                "Use a Hopper GPU: H100, H200, H20, GH200.",
            )
        )
    return checks


def check_peers(gpus: Gpus) -> list[Check]:
    pairs = [(a, b) for a in range(len(gpus)) for b in range(len(gpus)) if a != b]
    apart = [f"{a} -> {b}" for a, b in pairs if not gpus.can_access(a, b)]
    if not pairs:
        return []
    if apart:
        return [
            Check(
                "peer access",
                Level.MISSING,
                f"GPUs do not reach each other's memory: {', '.join(apart)}",
                "Ranks on those need RDMA. On a host with NVLink look at nvidia-smi topo -m, and "
                "at the fabric manager.",
            )
        ]
    return [Check("peer access", Level.OK, f"between all {len(gpus)} GPUs")]
