"""Symmetric memory on GPUs of several hosts, through NVSHMEM.

NVSHMEM has one world a process, and its allocations are collective over all of it. So:

- the first group that asks for such memory makes the world, of all its ranks; others may follow
  with the same processes, in any order of ranks;
- a group with fewer or other processes than the world is refused: disjoint groups (of pipeline
  stages, say) are worlds of their own and need nothing of that;
- memory of closed buffers is kept for the next ones: to free it, NVSHMEM would wait for all peers.

Nothing here waits for a peer without an end; NVSHMEM is not finalized, which would.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ep_backend.errors import RendezvousError
from ep_backend.memory import raise_first
from ep_backend.memory.cuda import tensor_at
from ep_backend.network import DEPTH_VARIABLE, SHARED_VARIABLES, apply, check_fixed, check_free

if TYPE_CHECKING:
    from ep_backend.group import Group
    from ep_backend.network import NetworkConfig

T = TypeVar("T")

WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
VERSION_NOTE = "_nvshmem_version.txt"
"""Beside the extension."""
VARIABLES_REMEDY = (
    "NVSHMEM's memory and queue pairs must be alike on all hosts: set it to the same everywhere, "
    "or unset it."
)
CALL_SECS = 60.0
"""How long one of NVSHMEM's collective calls may take: less than ranks wait at the next meeting for
those that are still in it."""


@dataclass
class _Block:
    """Of symmetric memory. All ranks have allocated the same ones, in the same order."""

    address: int
    num_bytes: int
    is_free: bool = False
    has_failed: Callable[[], bool] = lambda: False
    """Whether the buffer that had it last has: its kernels may have run on after it was closed."""


@dataclass
class _World:
    """NVSHMEM as this process has started it, or found it."""

    identity: str
    """The same on all its ranks, and only there; "" where somebody else has started it."""
    environment: dict[str, str | None]
    """NVSHMEM's variables at its start."""
    device: torch.device
    is_attached: bool = False
    """Our kernels have been shown NVSHMEM's state."""
    blocks: list[_Block] = field(default_factory=list)


_world: _World | None = None


def extension() -> ModuleType:
    """`ep_backend._nvshmem`.

    Raises:
        ImportError: it was not built, or does not fit the NVSHMEM that is here; the text says what
            to do.
    """
    try:
        return importlib.import_module("ep_backend._nvshmem")
    except ModuleNotFoundError as e:
        raise ImportError(
            "ep_backend was built without NVSHMEM, so ranks on several hosts cannot be joined. "
            "Build it where nvcc and the wheel nvidia-nvshmem-cu13 are, with EP_BACKEND_NVSHMEM=ON "
            "(pip install --no-build-isolation, or with NVSHMEM_ROOT set)."
        ) from e
    except ImportError as e:
        # Where it refuses another version itself, it says all of this.
        hint = "" if "build ep_backend again" in str(e) else f" {_versions()}"
        raise ImportError(f"ep_backend._nvshmem does not load: {e}{hint}") from e


def depth() -> int | None:
    """Requests that queue pairs hold, where NVSHMEM has started and was told; None elsewhere."""
    told = (None if _world is None else _world.environment.get(DEPTH_VARIABLE)) or ""
    return int(told) if told.isdigit() else None


def _versions() -> str:
    """Which NVSHMEM the extension was built with, and which is here."""
    spec = importlib.util.find_spec("ep_backend._nvshmem")
    note = Path(spec.origin if spec is not None and spec.origin else "").parent / VERSION_NOTE
    built = note.read_text().strip() if note.exists() else "unknown"
    found = []
    for wheel in WHEELS:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{wheel} {metadata.version(wheel)}")
    return (
        f"(It was built with NVSHMEM {built}; installed: {', '.join(found) or 'no wheel'}. Install "
        f"{WHEELS[0]}=={built}, or build ep_backend again beside the version that is there.)"
    )


class NetworkSettings(Protocol):
    """Of a buffer over a network."""

    @property
    def network(self) -> NetworkConfig | None: ...

    def check(self, num_ranks: int) -> None:
        """Raises `ValueError` for what no kernel could serve."""

    def environment(self) -> dict[str, str]:
        """NVSHMEM's variables, by name."""


class NetworkMemory:
    """Own memory, and that of peers that this GPU sees.

    Attributes:
        bases: address of each rank's memory; 0: only the network reaches it.
        pes: NVSHMEM's number of each rank.
    """

    def __init__(self, block: _Block, bases: list[int], pes: list[int]) -> None:
        self._block = block
        self._bases = bases
        self.pes = pes

    @property
    def bases(self) -> list[int]:
        return list(self._bases)

    def close(self, *, has_failed: Callable[[], bool] = lambda: False) -> None:
        # After a failure late puts may come: that memory is not used again.
        self._block.has_failed = has_failed
        self._block.is_free = not has_failed()


def allocate(
    group: Group,
    num_bytes: int,
    device: torch.device,
    settings: NetworkSettings,
    ranks_per_node: int | None = None,
) -> NetworkMemory:
    """Zeroed memory of every rank on its `device`. Collective.

    Args:
        ranks_per_node: if given, ranks of a node must see each other's memory, and others do not
            look for it.

    Raises:
        ValueError: settings that NVSHMEM cannot have, or not any more.
        RendezvousError: a rank cannot start NVSHMEM or allocate, or the group is not NVSHMEM's
            world. Any rank's error is raised on every rank.
    """
    network = settings.network
    assert network is not None
    environment: dict[str, str] = {}
    error: Exception | None = None
    try:
        settings.check(group.num_ranks)
        extension()
        environment = settings.environment()
        _check_start(group, device, environment)
    except (ImportError, ValueError) as e:
        error = ValueError(str(e))
    shared = {} if error is not None else _shared_variables(environment)
    group.agree("memory over a network", shared, error, dict.fromkeys(shared, VARIABLES_REMEDY))
    native = extension()
    world, pes = _join(group, device, environment, native)
    block = _block(group, world, num_bytes, native)
    with torch.cuda.device(device):
        tensor_at(block.address, (num_bytes,), torch.uint8, device).zero_()
        torch.cuda.synchronize(device)
    group.all_gather(None)  # nobody writes before all is zero
    bases = [native.address_on(block.address, pe) for pe in pes]
    if ranks_per_node is not None:
        return NetworkMemory(block, _of_node(group, block, bases, ranks_per_node), pes)
    if network.links == "rdma":
        bases = [base if rank == group.self_rank else 0 for rank, base in enumerate(bases)]
    return NetworkMemory(block, _mutual(group, bases), pes)


def _of_node(group: Group, block: _Block, bases: list[int], ranks_per_node: int) -> list[int]:
    """Those of this rank's node; 0 elsewhere.

    Raises:
        RendezvousError: on every rank, where one does not see the memory of another of its node.
            The block, which nobody has written to, is free again.
    """
    node = group.self_rank // ranks_per_node
    bases = [base if rank // ranks_per_node == node else 0 for rank, base in enumerate(bases)]
    unseen = [
        rank for rank, base in enumerate(bases) if base == 0 and rank // ranks_per_node == node
    ]
    error = None
    if unseen:
        error = (
            f"its GPU does not see the memory of rank {unseen[0]}, which is on its node. Ranks of "
            "a node need peer access (NVLink, or PCIe): see ep-backend doctor. ranks_per_node=1 "
            "makes every rank a node."
        )
    errors = group.all_gather(error)
    block.is_free = any(errors)
    raise_first(errors)
    return bases


def _mutual(group: Group, bases: list[int]) -> list[int]:
    """Those of ranks that see this one's memory, too: kernels write to whom they expect to write to
    them, else both put. (A process that sees fewer GPUs sees the memory of fewer.)"""
    seen = group.all_gather([base != 0 for base in bases])
    return [base if seen[rank][group.self_rank] else 0 for rank, base in enumerate(bases)]


def _block(group: Group, world: _World, num_bytes: int, native: ModuleType) -> _Block:
    """The smallest that is large enough and free on every rank, or a new one."""
    free = {i for i, b in enumerate(world.blocks) if b.is_free and b.num_bytes >= num_bytes}
    everywhere = set.intersection(*group.all_gather(free))
    if everywhere:
        # What this rank has put into its peers' blocks must not come after they are zeroed.
        error = _try(lambda: _bounded("quiet", world.device, native.quiet))
        raise_first(group.all_gather(error))
        # All kernels of closed buffers have ended now.
        failed = {i for i in everywhere if world.blocks[i].has_failed()}
        failed = set.union(*group.all_gather(failed))
        for i in failed:
            world.blocks[i].is_free = False
        everywhere -= failed
    if everywhere:
        block = world.blocks[min(everywhere, key=lambda i: (world.blocks[i].num_bytes, i))]
        block.is_free = False
        return block
    addresses: list[int] = []

    def allocate_new() -> None:
        addresses.append(_bounded("malloc", world.device, lambda: native.allocate(num_bytes)))

    raise_first(group.all_gather(_try(allocate_new)))
    world.blocks.append(_Block(addresses[0], num_bytes))
    return world.blocks[-1]


def _check_start(group: Group, device: torch.device, environment: dict[str, str]) -> None:
    """Raises `ValueError` where NVSHMEM cannot have this environment, or not any more."""
    if group.is_virtual and group.num_ranks > 1:
        raise ValueError(
            "NVSHMEM has one rank a process: ranks that are threads cannot be joined by it."
        )
    if _world is None and not extension().is_initialized():
        check_free(environment)
        return
    check_fixed(environment, _variables() if _world is None else _world.environment)
    if _world is not None and _world.device != device:
        raise ValueError(
            f"NVSHMEM has started on {_world.device} in this process, not on {device}."
        )


def _join(
    group: Group, device: torch.device, environment: dict[str, str], native: ModuleType
) -> tuple[_World, list[int]]:
    """The world of this group, started if there is none; NVSHMEM's number of each rank."""
    global _world
    if _world is None and native.is_initialized():
        _world = _World("", _variables(), device)
    identity = None if _world is None else _world.identity
    identities = set(group.all_gather(identity))
    if len(identities) > 1:
        raise RendezvousError(
            "some ranks of this group have started NVSHMEM with other processes before, or have "
            "not started it: a process has one NVSHMEM world. Let all groups that use it have the "
            "same processes."
        )
    if identities == {None}:
        apply(environment)
        _start(group, device, native)
    assert _world is not None
    error = None
    if not _world.is_attached:
        error = _try(lambda: _bounded("attach", device, native.attach))
    _world.is_attached = error is None
    pes_and_errors = group.all_gather((native.self_pe(), error))
    raise_first([error for _, error in pes_and_errors])
    pes = [pe for pe, _ in pes_and_errors]
    if sorted(pes) != list(range(native.num_pes())):
        raise RendezvousError(
            f"this group's ranks are {sorted(pes)} of NVSHMEM's {native.num_pes()} in this "
            "process, but its memory is allocated by all of them together. Use a group of all of "
            "them."
        )
    return _world, pes


def _start(group: Group, device: torch.device, native: ModuleType) -> None:
    """Starts NVSHMEM on every rank. Collective."""
    global _world
    unique_id, error = b"", None
    if group.self_rank == 0:
        try:
            unique_id = native.make_unique_id()
        except RuntimeError as e:
            error = str(e)
    ids = group.all_gather((unique_id, error))
    raise_first([error for _, error in ids])
    unique_id = ids[0][0]

    def start() -> None:
        initialize(native, unique_id, group.self_rank, group.num_ranks, device)

    raise_first(group.all_gather(_try(lambda: _bounded("init", device, start))))
    _world = _World(hashlib.sha256(unique_id).hexdigest(), _variables(), device)


def initialize(
    native: ModuleType, unique_id: bytes, pe: int, num_pes: int, device: torch.device
) -> None:
    """With nvshmem4py where it is, so that other users of it in this process find it started."""
    try:
        core: Any = importlib.import_module("nvshmem.core")
        device_class: Any = importlib.import_module("cuda.core").Device
    except ImportError:
        native.initialize(unique_id, pe, num_pes)
        return
    uid = core.get_unique_id(empty=True)
    uid._data.view("int8")[:] = memoryview(unique_id).cast("b")
    core.init(
        device=device_class(device.index),
        uid=uid,
        rank=pe,
        nranks=num_pes,
        initializer_method="uid",
    )
    if not native.is_initialized():
        raise RuntimeError(
            f"nvshmem4py has loaded another host library than {native.HOST_LIBRARY}, with which "
            "ep_backend is linked: keep one nvidia-nvshmem wheel in this environment."
        )


def _shared_variables(required: dict[str, str]) -> dict[str, str | None]:
    """NVSHMEM's variables that must be the same on all ranks, as they were, or will be, at its
    start."""
    if _world is not None:
        environ = {name: value for name, value in _world.environment.items() if value is not None}
    else:
        environ = {name: value for name, value in _variables().items() if value is not None}
        apply(required, environ)
    return {name: environ.get(name) for name in SHARED_VARIABLES}


def _variables() -> dict[str, str | None]:
    return {name: value for name, value in os.environ.items() if name.startswith("NVSHMEM_")}


def _try(call: Callable[[], Any]) -> str | None:
    """What went wrong."""
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def _bounded(what: str, device: torch.device, call: Callable[[], T]) -> T:
    """Runs one of NVSHMEM's calls, which wait for peers without an end, in a thread of its own.

    Raises:
        RendezvousError: it did not return in time. The thread stays there.
    """
    values: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            torch.cuda.set_device(device)
            values.append(call())
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run, name=f"nvshmem-{what}", daemon=True)
    thread.start()
    thread.join(CALL_SECS)
    if errors:
        raise errors[0]
    if not values:
        raise RendezvousError(
            f"NVSHMEM's {what} did not return within {CALL_SECS:.0f} s: a rank is missing, or its "
            "processes do not reach each other (bootstrap_interface chooses the interface)."
        )
    return values[0]
