"""Checks of what transfers need that a GPU starts itself: network cards, registration of the GPU's
memory, NVSHMEM and its device-initiated transport (IBGDA).

Facts about settings are those of NVIDIA's NVSHMEM documentation.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

from ep_backend.doctor.checks import Check, Level, Machine
from ep_backend.doctor.gpu import Gpus
from ep_backend.memory import nvshmem
from ep_backend.network import VARIABLE, NetworkConfig, check_free

NUM_TOKENS = 128
"""A rank, of a typical decode batch."""
CARDS = "/sys/class/infiniband"
DRIVER_PARAMETERS = "/proc/driver/nvidia/params"
NVSHMEM_WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")


@dataclass(frozen=True)
class Port:
    """Of a network card."""

    card: str
    number: int
    is_active: bool
    link_layer: str
    """InfiniBand or Ethernet (RoCE)."""
    rate: str


def ports_of(machine: Machine) -> list[Port]:
    ports = []
    for card in machine.names_in(CARDS):
        for number in machine.names_in(f"{CARDS}/{card}/ports"):
            at = f"{CARDS}/{card}/ports/{number}"
            state = machine.read(f"{at}/state") or ""
            layer, rate = machine.read(f"{at}/link_layer"), machine.read(f"{at}/rate")
            is_active = state.endswith("ACTIVE")
            ports.append(Port(card, int(number), is_active, layer or "unknown", rate or "unknown"))
    return ports


@dataclass(frozen=True)
class Build:
    """Of ep_backend."""

    nvshmem: str | None = None
    """With which version; None: without."""
    why_not: str = ""

    @classmethod
    def present(cls) -> Build:
        try:
            return cls(nvshmem=nvshmem.extension().DEVICE_VERSION)
        except ImportError as e:
            return cls(why_not=str(e))


def check_rdma(machine: Machine, gpus: Gpus, build: Build | None = None) -> list[Check]:
    """
    Args:
        build: of this library. Default: as it is.
    """
    ports = ports_of(machine)
    build = Build.present() if build is None else build
    return [
        _check_kernels(build),
        _check_settings(machine),
        *_check_ports(ports),
        _check_registration(machine),
        _check_device_initiated(machine, _transport(machine)),
        _check_nvshmem(machine, build),
        _check_locked_memory(machine),
        *_check_affinity(machine, gpus, sorted({port.card for port in ports if port.is_active})),
    ]


def _check_kernels(build: Build) -> Check:
    if build.nvshmem is None:
        return Check(
            "kernels over NVSHMEM",
            Level.MISSING,
            build.why_not,
            "Build with EP_BACKEND_NVSHMEM=ON, or keep each expert-parallel group on one host.",
        )
    return Check(
        "kernels over NVSHMEM",
        Level.NOTE,
        f"in this build, with NVSHMEM {build.nvshmem}; run without a card only",
        "Workspaces are for ranks on one host.",
    )


def _check_settings(machine: Machine) -> Check:
    name, text = "network settings", machine.environ.get(VARIABLE, "")
    remedy = f"Set {VARIABLE}; `ep-backend network` shows what it means to NVSHMEM."
    try:
        config = NetworkConfig.parse(text)
        required = config.environment("low_latency", NUM_TOKENS, num_banks=2)
        check_free(required, machine.environ)
    except ValueError as e:
        return Check(name, Level.MISSING, str(e), remedy)
    found = f"transport {config.transport}; {' '.join(config.advice())}"
    return Check(name, Level.NOTE, found, remedy)


def _check_ports(ports: list[Port]) -> list[Check]:
    if not ports:
        return [
            Check(
                "network cards",
                Level.MISSING,
                f"none in {CARDS}",
                "Install the cards' driver; give the container /dev/infiniband.",
            )
        ]
    active = [port for port in ports if port.is_active]
    listed = ", ".join(f"{p.card}:{p.number} {p.link_layer} {p.rate}" for p in active)
    if not active:
        return [
            Check(
                "network cards",
                Level.MISSING,
                f"no port is active: {', '.join(sorted({p.card for p in ports}))}",
                "Check cables and the subnet manager (ibstat).",
            )
        ]
    checks = [Check("network cards", Level.OK, listed)]
    if not all(port.card.startswith("mlx5") for port in active):
        checks.append(
            Check(
                "card family",
                Level.NOTE,
                "not all are mlx5, the only ones that a GPU can drive itself",
                "Choose cards with NVSHMEM_HCA_PREFIX or NVSHMEM_HCA_LIST.",
            )
        )
    return checks


def _check_registration(machine: Machine) -> Check:
    modules = {line.split()[0] for line in (machine.read("/proc/modules") or "").splitlines()}
    if "nvidia_peermem" in modules:
        return Check("GPU memory for cards", Level.OK, "nvidia_peermem is loaded")
    if "nvidia" in modules and _kernel_at_least(machine, 5, 12):
        return Check(
            "GPU memory for cards",
            Level.NOTE,
            "nvidia_peermem is not loaded; dmabuf serves where the open kernel modules run",
            "modprobe nvidia-peermem, or use the open kernel modules.",
        )
    return Check(
        "GPU memory for cards",
        Level.MISSING,
        "neither nvidia_peermem nor an NVIDIA driver with dmabuf",
        "modprobe nvidia-peermem.",
    )


def _kernel_at_least(machine: Machine, major: int, minor: int) -> bool:
    release = machine.read("/proc/sys/kernel/osrelease") or os.uname().release
    numbers = [int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2]]
    return tuple(numbers) >= (major, minor)


def _transport(machine: Machine) -> str:
    """The one that is set, where settings make sense."""
    try:
        return NetworkConfig.parse(machine.environ.get(VARIABLE, "")).transport
    except ValueError:
        return NetworkConfig().transport


def _check_device_initiated(machine: Machine, transport: str) -> Check:
    if not transport.startswith("ibgda"):
        return Check("IBGDA", Level.OK, f"not used: transport {transport}")
    parameters = machine.read(DRIVER_PARAMETERS)
    has_gdrcopy = machine.path("/dev/gdrdrv").exists()
    settings = dict(
        line.split(":", 1) for line in (parameters or "").splitlines() if line.count(":") >= 1
    )
    has_memory_ops = settings.get("EnableStreamMemOPs", "").strip() == "1"
    has_mapping = "PeerMappingOverride=1" in settings.get("RegistryDwords", "")
    if has_memory_ops and has_mapping:
        return Check("IBGDA", Level.OK, "the driver lets GPUs ring the cards' doorbells")
    lacking = [
        name
        for name, is_set in (
            ("NVreg_EnableStreamMemOPs=1", has_memory_ops),
            ('NVreg_RegistryDwords="PeerMappingOverride=1;"', has_mapping),
        )
        if not is_set
    ]
    if has_gdrcopy:
        return Check(
            "IBGDA",
            Level.NOTE,
            f"a CPU thread rings the doorbells (GDRCopy); the driver lacks {' and '.join(lacking)}",
            "Set them in /etc/modprobe.d and reboot, to let GPUs do it.",
        )
    where = "no driver is loaded" if parameters is None else f"it lacks {' and '.join(lacking)}"
    return Check(
        "IBGDA",
        Level.MISSING,
        f"the driver does not let GPUs ring doorbells ({where}), and there is no /dev/gdrdrv",
        "Set them in /etc/modprobe.d and reboot, or install GDRCopy (gdrdrv).",
    )


def _check_nvshmem(machine: Machine, build: Build) -> Check:
    found = {name: machine.version_of(name) for name in NVSHMEM_WHEELS}
    present = [f"{name} {version}" for name, version in found.items() if version is not None]
    python = machine.version_of("nvshmem4py-cu13") or machine.version_of("nvshmem4py-cu12")
    if not present:
        remedy = "pip install 'ep_backend[nvshmem]'"
        if build.nvshmem is not None:  # NVSHMEM_ROOT named another place, and it has loaded
            found_elsewhere = f"{build.nvshmem}, not of a wheel"
            return Check("NVSHMEM", Level.NOTE, found_elsewhere, f"If it should be: {remedy}")
        return Check("NVSHMEM", Level.MISSING, "no NVSHMEM wheel is installed", remedy)
    if python is None:
        return Check(
            "NVSHMEM",
            Level.NOTE,
            f"{', '.join(present)}; nvshmem4py is not installed",
            "ep_backend starts NVSHMEM itself then; other libraries may want nvshmem4py.",
        )
    return Check("NVSHMEM", Level.OK, f"{', '.join(present)}; nvshmem4py {python}")


def _check_locked_memory(machine: Machine) -> Check:
    limit = machine.limit_of(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Check("locked memory", Level.OK, "unlimited")
    return Check(
        "locked memory",
        Level.MISSING,
        f"limited to {limit >> 10} KiB: registering memory with a card fails",
        "ulimit -l unlimited (docker run --ulimit memlock=-1).",
    )


def _check_affinity(machine: Machine, gpus: Gpus, cards: list[str]) -> list[Check]:
    """The card nearest to each GPU: that with which it shares most of its way to the root."""
    checks = []
    for i, address in enumerate(gpus.pci_addresses):
        way = _pci_way(machine, f"/sys/bus/pci/devices/{address}")
        shared = {
            card: _num_alike(way, _pci_way(machine, f"{CARDS}/{card}/device")) for card in cards
        }
        if not shared or address == "":
            continue
        best = max(shared.values())
        nearest = ", ".join(card for card in cards if shared[card] == best)
        if best >= 2:
            checks.append(Check(f"card of GPU {i}", Level.OK, f"{nearest}, on its PCIe switch"))
        else:
            checks.append(
                Check(
                    f"card of GPU {i}",
                    Level.NOTE,
                    f"{nearest}, but no card shares its PCIe switch",
                    "Transfers cross the CPU's root complex; NVSHMEM_HCA_PE_MAPPING chooses.",
                )
            )
    return checks


def _pci_way(machine: Machine, link: str) -> list[str]:
    """Bridges from the root down to a device, itself included."""
    path = machine.path(link)
    if not path.exists():
        return []
    return [part for part in path.resolve().parts if part.startswith("pci") or part.count(":") == 2]


def _num_alike(a: list[str], b: list[str]) -> int:
    num_alike = 0
    for own, other in zip(a[:-1], b[:-1], strict=False):
        if own != other:
            break
        num_alike += 1
    return num_alike
