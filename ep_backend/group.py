"""Who the ranks are, and how they meet.

A `Group` is one rank's view of the world: its rank, the number of ranks, and the collective calls
that set things up. Rendezvous goes through torch.distributed (gloo); nothing here is on the path of
a token.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from ep_backend.errors import RendezvousError, SettingsMismatch
from ep_backend.memory import SymmetricMemory, cuda, shm
from ep_backend.virtual_network import VirtualNetwork

T = TypeVar("T")

DEFAULT_RENDEZVOUS_SECS = 120.0
RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Exchange(Protocol):
    """The one collective that a group needs."""

    def all_gather(self, self_rank: int, value: Any) -> list[Any]: ...


class _GlooExchange:
    def __init__(self, process_group: dist.ProcessGroup, timeout_secs: float) -> None:
        self.process_group = process_group
        self.timeout = timedelta(seconds=timeout_secs)

    def all_gather(self, self_rank: int, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.process_group.size()
        try:
            # The only gloo call that takes a timeout of its own and says who is missing.
            dist.monitored_barrier(self.process_group, timeout=self.timeout)
            dist.all_gather_object(values, value, group=self.process_group)
        except RuntimeError as e:
            raise RendezvousError(f"rank {self_rank}: the ranks could not meet: {e}") from e
        return values


class _ThreadExchange:
    def __init__(self, num_ranks: int, timeout_secs: float) -> None:
        self._values: list[Any] = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=timeout_secs)

    def all_gather(self, self_rank: int, value: Any) -> list[Any]:
        self._values[self_rank] = value
        try:
            self._barrier.wait()
            values = list(self._values)
            self._barrier.wait()  # nobody may start the next exchange before all have read this one
        except threading.BrokenBarrierError as e:
            raise RendezvousError(
                f"virtual rank {self_rank}: another virtual rank failed or did not arrive"
            ) from e
        return values

    def abort(self) -> None:
        """A rank has failed: the others stop waiting for it."""
        self._barrier.abort()


class Group:
    """The ranks of one expert-parallel world, seen from one of them.

    Attributes:
        self_rank: this rank, 0..num_ranks-1.
        num_ranks: how many ranks there are.
        is_virtual: the ranks are threads of this process.
        network: what joins the nodes of virtual ranks; None where all ranks are on one node.
    """

    def __init__(
        self,
        exchange: _Exchange,
        self_rank: int,
        num_ranks: int,
        *,
        is_virtual: bool,
        network: VirtualNetwork | None = None,
    ) -> None:
        self._exchange = exchange
        self.self_rank = self_rank
        self.num_ranks = num_ranks
        self.is_virtual = is_virtual
        self._hosts: list[int] | None = None
        self.network = network

    @property
    def ranks_per_node(self) -> int:
        """Ranks on a node: that reach each other's memory. Those of node n come before those of
        node n + 1."""
        return self.num_ranks if self.network is None else self.network.ranks_per_node

    @property
    def ranks_of_node(self) -> range:
        """Those of this rank's node."""
        first = self.self_rank - self.self_rank % self.ranks_per_node
        return range(first, first + self.ranks_per_node)

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @classmethod
    def from_process_group(
        cls,
        process_group: dist.ProcessGroup | None = None,
        timeout_secs: float = DEFAULT_RENDEZVOUS_SECS,
    ) -> Group:
        """The ranks of a torch.distributed process group with a gloo backend. Not collective.

        Args:
            process_group: default: the world.
            timeout_secs: how long set-up waits for a missing rank.

        Raises:
            ValueError: torch.distributed is not initialised, or the group has no gloo backend.
        """
        if not dist.is_initialized():
            raise ValueError(
                "torch.distributed is not initialised. Call "
                "torch.distributed.init_process_group('gloo') first, or use Group.from_env()."
            )
        group = process_group if process_group is not None else dist.group.WORLD
        assert group is not None
        backend = dist.get_backend(group)
        if backend != "gloo":
            raise ValueError(
                f"the process group's backend is {backend!r}, expected 'gloo': ranks exchange "
                "Python objects at set-up. Pass torch.distributed.new_group(backend='gloo')."
            )
        return cls(_GlooExchange(group, timeout_secs), group.rank(), group.size(), is_virtual=False)

    @classmethod
    def from_env(cls, timeout_secs: float = DEFAULT_RENDEZVOUS_SECS) -> Group:
        """Initialises torch.distributed from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as
        torchrun sets them, and takes its world. Collective.

        Raises:
            RendezvousError: not all ranks came in time.
        """
        if not dist.is_initialized():
            try:
                dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_secs))
            except dist.DistError as e:
                world = {name: os.environ.get(name) for name in RENDEZVOUS_VARIABLES}
                raise RendezvousError(
                    f"not all ranks came within {timeout_secs} s: {e}. Start WORLD_SIZE processes, "
                    f"each with its RANK and the same address; here {world}."
                ) from e
        return cls.from_process_group(timeout_secs=timeout_secs)

    def all_gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order. Collective.

        Raises:
            RendezvousError: a rank is missing after the group's timeout; the text says which.
        """
        return self._exchange.all_gather(self.self_rank, value)

    def agree(
        self,
        what: str,
        settings: dict[str, Any],
        error: Exception | None = None,
        remedies: Mapping[str, str] | None = None,
    ) -> None:
        """Makes sure that every rank came with the same settings. Collective.

        Args:
            what: what is being set up, for the messages.
            settings: compared key by key; values must compare and pickle.
            error: what this rank found wrong with its own arguments. It is raised here, after the
                other ranks have been told, so that none of them waits for this one.
            remedies: what to do where a setting differs, by its name. Default: pass the same.

        Raises:
            SettingsMismatch: names the setting and every rank's value, on every rank.
        """
        answers = self.all_gather((settings, None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (_, refusal) in enumerate(answers):
            if refusal is not None:
                raise SettingsMismatch(f"{what}: rank {rank} refused its settings: {refusal}")
        for key in dict.fromkeys(key for theirs, _ in answers for key in theirs):
            values = [theirs.get(key) for theirs, _ in answers]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
                remedy = (remedies or {}).get(key, "Pass the same on every rank.")
                raise SettingsMismatch(f"{what}: {key} differs between ranks ({listed}). {remedy}")

    def hosts(self) -> list[int]:
        """`[R]`: the host of each rank, numbered from 0 as ranks name them. Collective, the first
        time."""
        if self._hosts is None:
            names = [""] * self.num_ranks
            if not self.is_virtual:
                names = self.all_gather(_host_identity())
            numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
            self._hosts = [numbers[name] for name in names]
        return self._hosts

    def require_one_host(self) -> None:
        """Does nothing where all ranks run under one kernel. Collective.

        Raises:
            RendezvousError: on every rank, when a rank is on another host.
        """
        for rank, host in enumerate(self.hosts()):
            if host != 0:
                raise RendezvousError(
                    f"rank {rank} is on another host than rank 0. Ranks are joined by the memory "
                    "of one host; start all ranks of this group there. (Only buffers on GPUs reach "
                    "further, in a build with NVSHMEM.)"
                )

    def allocate(self, num_bytes: int, device: torch.device) -> SymmetricMemory:
        """Zeroed memory of this size on every rank's device, mapped by every rank. Collective.

        Raises:
            RendezvousError: the ranks are on different hosts (memory/nvshmem.py joins those), or a
                rank has no room.
        """
        if device.type == "cuda":
            self.require_one_host()
            return cuda.allocate(self, num_bytes, device)
        if self.is_virtual:
            return shm.allocate_in_process(self, num_bytes)
        self.require_one_host()
        return shm.allocate_shared(self, num_bytes)


class VirtualWorld:
    """`num_ranks` ranks as threads of this process: for tests, benchmarks and development.

    The kernels, the memory layout and the waits are those of processes.

    Attributes:
        network: between the ranks' nodes, with counters; None where there is one node.
    """

    def __init__(
        self, num_ranks: int, timeout_secs: float, network: VirtualNetwork | None = None
    ) -> None:
        self._exchange = _ThreadExchange(num_ranks, timeout_secs)
        self.network = network
        self.groups = [
            Group(self._exchange, rank, num_ranks, is_virtual=True, network=network)
            for rank in range(num_ranks)
        ]

    def run(self, rank_main: Callable[[Group], T]) -> list[T]:
        """Calls `rank_main(group)` on one thread a rank; returns the results in rank order.

        Raises:
            The first exception that is not merely "another rank failed".
        """

        errors: list[BaseException] = []  # in the order they happened

        def guarded(group: Group) -> T:
            try:
                return rank_main(group)
            except BaseException as e:
                errors.append(e)
                self._exchange.abort()
                raise

        with ThreadPoolExecutor(len(self.groups)) as pool:
            futures = [pool.submit(guarded, group) for group in self.groups]
        for error in sorted(errors, key=lambda e: isinstance(e, RendezvousError)):
            raise error
        return [future.result() for future in futures]


def virtual_world(
    num_ranks: int,
    timeout_secs: float = 60.0,
    *,
    ranks_per_node: int | None = None,
    network_seed: int = 0,
    network_delay_us: int = 0,
) -> VirtualWorld:
    """A world of `num_ranks` threads. See `VirtualWorld`.

    Args:
        ranks_per_node: if given, ranks are on nodes of so many, and a network that reorders all
            that RDMA may reorder joins the nodes: see `VirtualNetwork`. Default: all are on one
            node, without a network.
        network_seed: of the order in which the network delivers.
        network_delay_us: how long it pauses, at most, between two deliveries.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}, expected at least 1")
    network = None
    if ranks_per_node is not None:
        network = VirtualNetwork(num_ranks, ranks_per_node, network_seed, network_delay_us)
    return VirtualWorld(num_ranks, timeout_secs, network)


def _host_identity() -> str:
    """The same for processes that run under one kernel, different otherwise."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
