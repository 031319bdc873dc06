"""Settings of the network between hosts, and what they mean to NVSHMEM.

NVSHMEM reads its environment once, when it starts, and one start serves all buffers of a process.
So does one class of queue pairs: a service level cannot differ between kernels of a process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from ep_backend.checks import check_int
from ep_backend.settings import check_choice

VARIABLE = "EP_BACKEND_NETWORK"

# What drives the network cards, and NVSHMEM's variables for it.
TRANSPORTS = {
    "ibgda": {"NVSHMEM_IB_ENABLE_IBGDA": "1", "NVSHMEM_IBGDA_NIC_HANDLER": "auto"},
    "ibgda_cpu": {"NVSHMEM_IB_ENABLE_IBGDA": "1", "NVSHMEM_IBGDA_NIC_HANDLER": "cpu"},
    "proxy": {"NVSHMEM_IB_ENABLE_IBGDA": "0", "NVSHMEM_REMOTE_TRANSPORT": "ibrc"},
    "none": {"NVSHMEM_IB_ENABLE_IBGDA": "0", "NVSHMEM_REMOTE_TRANSPORT": "none"},
}
LINKS = ("auto", "rdma")

# Where the user has not said otherwise: no multicast, which sets up memory on all GPUs of a host
# and is of no use here; few teams, each of which takes symmetric memory.
DEFAULT_ENVIRONMENT = {"NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_MAX_TEAMS": "7"}

DEPTH_VARIABLE = "NVSHMEM_QP_DEPTH"
SHARED_VARIABLES = (
    "NVSHMEM_IB_ENABLE_IBGDA",
    "NVSHMEM_REMOTE_TRANSPORT",
    DEPTH_VARIABLE,
    "NVSHMEM_IBGDA_NUM_RC_PER_PE",
    "NVSHMEM_IB_SL",
    "NVSHMEM_IB_TRAFFIC_CLASS",
    "NVSHMEM_DISABLE_P2P",
    "NVSHMEM_DISABLE_CUDA_VMM",
    "NVSHMEM_CUMEM_GRANULARITY",
    "NVSHMEM_SYMMETRIC_SIZE",
    "NVSHMEM_MAX_MEMORY_PER_GPU",
    "NVSHMEM_MAX_TEAMS",
)
"""Of which two ranks must not have different ideas: how they are joined, and what is allocated on
both. Names of cards and interfaces are a host's own."""
MIN_QUEUE_PAIR_DEPTH = 1024
"""NVSHMEM's default."""
MAX_QUEUE_PAIR_DEPTH = 1 << 15
"""NVSHMEM takes no more."""
REQUESTS_PER_PUT = 2
"""The payload, and the addition that tells of it."""


@dataclass(frozen=True)
class NetworkConfig:
    """How a buffer reaches ranks on other hosts. Of what is None, NVSHMEM decides.

    Args:
        transport: "ibgda": GPUs write requests to the cards and ring their doorbells; where the
            driver does not let them, a CPU thread rings. "ibgda_cpu": it always does. "proxy": a
            CPU thread does all. "none": there is no network; ranks are on one host.
        links: "auto": GPUs write directly where they see a peer's memory, and put over the network
            elsewhere. "rdma": every message to a peer is put by NVSHMEM, wherever that is: a test
            of that path, also without a card.
        service_level: InfiniBand's, 0 to 15, of all queue pairs of the low-latency kernels
            (NVSHMEM_IB_SL). It chooses the virtual lane, which isolates traffic.
        normal_service_level: of the normal kernels. A process has one class of queue pairs: a
            process that uses both families must give both the same.
        adaptive_routing: whether this traffic is to be routed adaptively. NVSHMEM has no switch for
            it: the fabric does so on certain service levels, of which one must be given, as
            `service_level` or `normal_service_level`.
        traffic_class: RoCE's (NVSHMEM_IB_TRAFFIC_CLASS).
        gid_index: RoCE's (NVSHMEM_IB_GID_INDEX).
        queue_pairs_per_peer: over which blocks spread their puts.
        queue_pair_depth: requests that a queue pair holds, a power of two. Default: as many as the
            buffer can have in flight to one peer; with fewer, a put of the low-latency kernels may
            wait for one that has died, and rounds of the normal kernels are smaller.
        nics: cards to use, "mlx5_0:1" (NVSHMEM_HCA_LIST). Default: the nearest to each GPU.
        nic_mapping: which ranks of a host use which card, "mlx5_0:1:1,mlx5_1:1:1"
            (NVSHMEM_HCA_PE_MAPPING); not together with `nics`.
        bootstrap_interface: network interface over which NVSHMEM starts.
        ranks_per_node: ranks that reach each other's memory, in rank order. Default: those of a
            host. Fewer make several nodes of a host, which then put to each other: a test of
            kernels that forward within a node, on one host, one GPU even.

    Raises:
        ValueError: a value that does not exist, or values that exclude each other.
    """

    transport: str = "ibgda"
    links: str = "auto"
    service_level: int | None = None
    normal_service_level: int | None = None
    adaptive_routing: bool = False
    traffic_class: int | None = None
    gid_index: int | None = None
    queue_pairs_per_peer: int | None = None
    queue_pair_depth: int | None = None
    nics: tuple[str, ...] = ()
    nic_mapping: str | None = None
    bootstrap_interface: str | None = None
    ranks_per_node: int | None = None

    def __post_init__(self) -> None:
        check_choice("transport", self.transport, dict.fromkeys(TRANSPORTS))
        check_choice("links", self.links, dict.fromkeys(LINKS))
        for name, low, high in (
            ("service_level", 0, 15),
            ("normal_service_level", 0, 15),
            ("traffic_class", 0, 255),
            ("gid_index", 0, 255),
            ("queue_pairs_per_peer", 1, 128),
            ("queue_pair_depth", 64, MAX_QUEUE_PAIR_DEPTH),
            ("ranks_per_node", 1, 1 << 16),
        ):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, low, high)
        depth = self.queue_pair_depth
        if depth is not None and depth & (depth - 1) != 0:
            raise ValueError(f"queue_pair_depth is {depth}, expected a power of two.")
        if self.adaptive_routing and not self._service_levels():
            raise ValueError(
                "adaptive_routing is True, but service_level and normal_service_level are None: "
                "the fabric routes adaptively on service levels that its subnet manager lists. "
                "Pass one of those."
            )
        if self.nics and self.nic_mapping is not None:
            raise ValueError("nics and nic_mapping are both given: pass one of them.")

    def _service_levels(self) -> list[int]:
        """Those that are given."""
        levels = (self.service_level, self.normal_service_level)
        return [level for level in levels if level is not None]

    @classmethod
    def parse(cls, text: str) -> NetworkConfig:
        """Of "transport=ibgda service_level=3 nics=mlx5_0:1,mlx5_1:1".

        Raises:
            ValueError: there is no such setting or value.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        values: dict[str, Any] = {}
        for setting in text.split():
            name, has_value, value = setting.partition("=")
            if not has_value or name not in known:
                raise ValueError(
                    f"{VARIABLE} holds {setting!r}, expected NAME=VALUE with a name of "
                    f"{', '.join(known)}."
                )
            values[name] = _parsed(name, value, known[name])
        return cls(**values)

    @classmethod
    def from_env(cls) -> NetworkConfig | None:
        """Of EP_BACKEND_NETWORK; None: it is not set."""
        text = os.environ.get(VARIABLE)
        return None if text is None else cls.parse(text)

    def depth_for(self, num_max_tokens_per_rank: int, num_banks: int) -> int:
        """Requests that a queue pair must hold for all messages of all banks to one peer, both
        ways, with counts and signals. No send waits for room then: credits hold it up first, and
        their wait ends, where NVSHMEM's for a peer that has died does not.

        Raises:
            ValueError: no queue pair holds so many.
        """
        if self.queue_pair_depth is not None:
            return self.queue_pair_depth
        num_requests = REQUESTS_PER_PUT * 2 * num_banks * (num_max_tokens_per_rank + 2)
        if num_requests > MAX_QUEUE_PAIR_DEPTH:
            raise ValueError(
                f"num_max_tokens_per_rank is {num_max_tokens_per_rank} and num_banks {num_banks}, "
                f"so {num_requests} requests to a peer may be in flight, but a queue pair holds "
                f"{MAX_QUEUE_PAIR_DEPTH} at most. Lower one of the two; or pass queue_pair_depth, "
                "and a put may wait for a peer that has died."
            )
        return max(MIN_QUEUE_PAIR_DEPTH, 1 << (num_requests - 1).bit_length())

    def environment(
        self, family: str, num_max_tokens_per_rank: int, num_banks: int
    ) -> dict[str, str]:
        """NVSHMEM's variables, by name, for buffers of that family."""
        level = self.service_level if family == "low_latency" else self.normal_service_level
        other = self.normal_service_level if family == "low_latency" else self.service_level
        if level is not None and other is not None and level != other:
            raise ValueError(
                f"service_level is {self.service_level} and normal_service_level "
                f"{self.normal_service_level}, but NVSHMEM has one class of queue pairs a process. "
                "Give a process only the level of the kernels that it runs (prefill and decode in "
                "processes of their own), or both the same."
            )
        environment = dict(TRANSPORTS[self.transport])
        if self.transport != "none":
            environment[DEPTH_VARIABLE] = str(self.depth_for(num_max_tokens_per_rank, num_banks))
        for variable, value in (
            ("NVSHMEM_IB_SL", level),
            ("NVSHMEM_IB_TRAFFIC_CLASS", self.traffic_class),
            ("NVSHMEM_IB_GID_INDEX", self.gid_index),
            ("NVSHMEM_IBGDA_NUM_RC_PER_PE", self.queue_pairs_per_peer),
            ("NVSHMEM_HCA_LIST", ",".join(self.nics) or None),
            ("NVSHMEM_HCA_PE_MAPPING", self.nic_mapping),
            ("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", self.bootstrap_interface),
        ):
            if value is not None:
                environment[variable] = str(value)
        if self.nics or self.nic_mapping is not None:
            environment["NVSHMEM_ENABLE_NIC_PE_MAPPING"] = "1"
        return environment

    def node_size(self, hosts: list[int]) -> int:
        """Ranks on a node.

        Args:
            hosts: the host of each rank, numbered from 0 in rank order.

        Raises:
            ValueError: nodes would not have as many ranks each, or would not be in rank order.
        """
        num_ranks = len(hosts)
        size = self.ranks_per_node or hosts.count(0)
        for rank, host in enumerate(hosts):
            if num_ranks % size != 0 or host != hosts[rank - rank % size]:
                raise ValueError(
                    f"ranks are on hosts {hosts}, which are not nodes of {size} ranks each, in "
                    "rank order. Start as many ranks on each host, one host's behind the other's; "
                    "ranks_per_node, if given, must divide that number."
                )
        return size

    def advice(self) -> list[str]:
        """What to know of these settings, a sentence or two each."""
        advice = []
        levels = self._service_levels()
        if not levels and self.transport != "none":
            advice.append(
                "service_level is not set: this traffic shares lane 0 with all other. Give decode "
                "a service level whose virtual lane nothing else uses."
            )
        if self.adaptive_routing:
            advice.append(
                f"adaptive routing: service level {levels[0]} must be one that the subnet "
                "manager routes adaptively. It spreads load at the price of some latency: worth it "
                "on busy fabrics. Nothing here relies on the order of writes: a put's payload is "
                "followed by an atomic on the same queue pair."
            )
        else:
            advice.append(
                "no adaptive routing asked for: right for a fabric with little other traffic, and "
                "for decode alone."
            )
        if self.queue_pairs_per_peer is None and self.transport.startswith("ibgda"):
            advice.append(
                "queue_pairs_per_peer is not set: NVSHMEM makes 2. Blocks that share one queue up."
            )
        return advice


def spans_nodes(hosts: list[int], network: NetworkConfig | None) -> bool:
    """Whether ranks on these hosts are on several nodes, by `network`, or else by
    EP_BACKEND_NETWORK."""
    try:
        network = network or NetworkConfig.from_env()
    except ValueError:
        return True  # whoever needs it says what is wrong
    return max(hosts) > 0 or (network is not None and network.ranks_per_node is not None)


# Facts about both are read from NVSHMEM 3.4.5 and 3.8.0; with neither set, one card adds to a word.
SPREADING: dict[str, Callable[[str], bool]] = {
    "NVSHMEM_IBGDA_ENABLE_MULTI_PORT": lambda value: value not in ("", "0", "false", "no", "off"),
    "NVSHMEM_IB_ATOMIC_POLICY": lambda value: value == "multi",
}


def check_free(required: dict[str, str], environ: Mapping[str, str] = os.environ) -> None:
    """For NVSHMEM's variables before it starts.

    Raises:
        ValueError: one is set to something else in the environment, or to what would lose arrivals.
    """
    for variable, is_wrong in SPREADING.items():
        if is_wrong(environ.get(variable, "").lower()):
            raise ValueError(
                f"{variable} is {environ[variable]!r} in the environment: then several cards of a "
                "rank may add to one word, whose sum is lost, but receivers count messages so. "
                "Unset it."
            )
    for variable, value in required.items():
        present = environ.get(variable)
        if present is not None and present != value:
            raise ValueError(
                f"{variable} is {present!r} in the environment, but the buffer's NetworkConfig "
                f"needs {value!r}. Unset it, or change the config."
            )


def apply(required: dict[str, str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Puts NVSHMEM's variables, and defaults of ours, into the environment, before it starts."""
    environ.update(required)
    for variable, value in DEFAULT_ENVIRONMENT.items():
        environ.setdefault(variable, value)


def check_fixed(required: dict[str, str], fixed: dict[str, str | None]) -> None:
    """For a buffer that comes after NVSHMEM has started.

    Args:
        fixed: NVSHMEM's variables as they were then.

    Raises:
        ValueError: it was started with something else.
    """
    for variable, value in required.items():
        present = fixed.get(variable) or ""
        if variable == DEPTH_VARIABLE and present.isdigit() and int(present) >= int(value):
            continue  # queue pairs that hold more are as good
        if present != value:
            raise ValueError(
                f"the buffer's NetworkConfig needs {variable}={value}, but NVSHMEM has started in "
                f"this process with {present or 'it unset'}, and reads it only once. "
                "Give all buffers of a process the same NetworkConfig (queue_pair_depth: for the "
                "largest of them; service_level is of low-latency kernels, normal_service_level of "
                "normal ones: both the same where a process has both), or use another process."
            )


def _parsed(name: str, value: str, kind: str) -> Any:
    if kind.startswith("int"):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}, expected a number.") from None
    if kind == "bool":
        if value not in ("0", "1"):
            raise ValueError(f"{name} is {value!r}, expected 0 or 1.")
        return value == "1"
    if kind.startswith("tuple"):
        return tuple(value.split(","))
    return value
