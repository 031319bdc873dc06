"""Where settings were found, and where they hold: device, link and protocol."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ep_backend import _native

if TYPE_CHECKING:
    from ep_backend.group import Group

NUM_MAX_NVLINKS = 18
"""That NVML asks for by number."""


@dataclass(frozen=True)
class Site:
    """Of one rank; ranks of a group may have different ones."""

    device: str
    """The card's name, or the CPU's and how many of them there are."""
    link: str
    """How ranks are joined. "self": there is one; "virtual": they are threads of one process, and
    share its device; "shm": processes on a CPU; between GPUs "nvlink-N" with N links a GPU, "pcie",
    or "p2p" where NVML does not tell."""
    protocol: int
    """Version of the kernels' protocol."""

    @classmethod
    def of(cls, kernels: str, group: Group, device: torch.device) -> Site:
        """
        Args:
            kernels: "low_latency" or "normal".
        """
        return cls(
            device_name(device), link_of(group, device), protocol_version(kernels, device.type)
        )

    def differences(self, other: Site) -> str:
        """In words: what `other` has otherwise; empty where nothing."""
        theirs = asdict(other)
        return ", ".join(
            f"{name} {theirs[name]!r}, not {value!r}"
            for name, value in asdict(self).items()
            if theirs[name] != value
        )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} CPUs"


def cpu_name() -> str:
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in cpu_lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def protocol_version(kernels: str, device_type: str) -> int:
    if kernels == "low_latency":
        return _native.PROTOCOL_VERSION
    if device_type == "cuda":
        return _native.NORMAL_DEVICE_PROTOCOL_VERSION
    return _native.NORMAL_PROTOCOL_VERSION


def link_of(group: Group, device: torch.device) -> str:
    if group.num_ranks == 1:
        return "self"
    if group.is_virtual:
        return "virtual"
    return gpu_link(device) if device.type == "cuda" else "shm"


def gpu_link(device: torch.device) -> str:
    """Of this GPU to its peers. A process may see no other GPU than its own: so its links are
    counted, not its peers asked."""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    num_links = _num_nvlinks(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    if num_links is None:
        return "p2p"
    return f"nvlink-{num_links}" if num_links > 0 else "pcie"


def _num_nvlinks(uuid: str) -> int | None:
    """Of the GPU with this UUID, those that are up; None where NVML is not there, or does not know
    the GPU (a part of one, say)."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        handle = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return None
        num_links = 0
        for link in range(NUM_MAX_NVLINKS):
            is_up = ctypes.c_uint()
            # It fails for a link that this GPU does not have.
            if nvml.nvmlDeviceGetNvLinkState(handle, link, ctypes.byref(is_up)) == 0:
                num_links += is_up.value
        return num_links
    finally:
        nvml.nvmlShutdown()
