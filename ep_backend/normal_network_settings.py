"""Settings of a normal buffer on CUDA whose ranks are on several nodes: their checks, before the
ranks agree on them, and their kernels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ep_backend import _native
from ep_backend.kernels import check_current, current_stream
from ep_backend.memory import nvshmem
from ep_backend.memory.nvshmem import NetworkMemory
from ep_backend.network import MAX_QUEUE_PAIR_DEPTH, REQUESTS_PER_PUT, NetworkConfig
from ep_backend.normal_cuda_settings import check_cuda_shape
from ep_backend.normal_settings import NormalShape, node_config
from ep_backend.settings import NETWORK_REMEDY, agreed_network

if TYPE_CHECKING:
    from ep_backend.group import Group

NUM_BANKS = 2
"""Rounds in flight."""


def max_tokens_per_round(queue_pair_depth: int) -> int:
    """With more, a queue pair would not hold all that is in flight to a peer, and a put might wait
    for one that has died."""
    return max(1, queue_pair_depth // (REQUESTS_PER_PUT * 2 * NUM_BANKS) - 2)


MAX_TOKENS_PER_ROUND = max_tokens_per_round(MAX_QUEUE_PAIR_DEPTH)


@dataclass(frozen=True)
class NetworkNormalSettings(NormalShape):
    """What all ranks must agree on."""

    network: NetworkConfig
    num_ranks: int
    ranks_per_node: int
    queue_pair_depth: int
    """At most: of the network's settings, or of NVSHMEM as a buffer has started it."""

    def agreed(self) -> dict[str, Any]:
        """By name, for `Group.agree`."""
        settings = {"device": "cuda"} | asdict(self) | agreed_network(self.network)
        return settings | {
            "expert_ids": self.expert_ids,
            "protocol version": _native.NORMAL_PROTOCOL_VERSION,
            "protocol version between nodes": _native.NORMAL_NODE_PROTOCOL_VERSION,
            "protocol version over a network": _native.NORMAL_NETWORK_PROTOCOL_VERSION,
        }

    def remedies(self) -> dict[str, str]:
        """For `Group.agree`, where a setting of the network differs."""
        return dict.fromkeys(agreed_network(self.network), NETWORK_REMEDY)

    def check(self, num_ranks: int) -> None:
        """Raises `ValueError` for what no kernel could serve."""
        check_cuda_shape(self, num_ranks)
        if self.ranks_per_node >= num_ranks:
            raise ValueError(
                f"ranks_per_node is {self.ranks_per_node} and there are {num_ranks} ranks, all on "
                "one node: nothing goes over a network. Pass fewer, or leave ranks_per_node out."
            )
        if self.network.links == "rdma":
            raise ValueError(
                "the network's links are 'rdma', but ranks of a node write to each other's memory. "
                "Pass links='auto'; ranks_per_node=1 makes every rank a node, to which all is put."
            )
        least = self.least_num_bytes()
        self.check_num_bytes(
            least,
            f"With {num_ranks} ranks, {self.ranks_per_node} a node, one token of each rank at a "
            f"time, twice, takes {least}. Pass at least that; more is faster.",
        )

    def least_num_bytes(self) -> int:
        """For one token of each rank at a time; of any settings that `num_bytes` may go with."""
        return _native.NormalNetworkLayout(self._config(1)).num_bytes

    def config(self) -> _native.NormalNodeConfig:
        """With as many tokens a round as the budget, and a queue pair, have room for."""
        return self._config(self.num_tokens_per_round())

    def num_tokens_per_round(self) -> int:
        fits = _native.NormalNetworkLayout.num_tokens_that_fit(self._config(0), self.num_bytes)
        return min(fits, max_tokens_per_round(self.queue_pair_depth))

    def environment(self) -> dict[str, str]:
        """NVSHMEM's variables, by name."""
        return self.network.environment("normal", self.num_tokens_per_round(), NUM_BANKS)

    def _config(self, num_tokens_per_round: int) -> _native.NormalNodeConfig:
        config = self.round_config(self.num_ranks, num_tokens_per_round)
        return node_config(config, self.ranks_per_node)


def network_settings_of(
    group: Group, network: NetworkConfig | None = None, **shape: Any
) -> NetworkNormalSettings:
    """Of this group's ranks, by `network`, or else by EP_BACKEND_NETWORK. Collective, if nobody has
    asked for the group's hosts before.

    Args:
        shape: of `NormalShape`.

    Raises:
        ValueError: there is no such setting, or ranks are not on nodes of as many each.
    """
    network = network or NetworkConfig.from_env() or NetworkConfig()
    return NetworkNormalSettings(
        network=network,
        num_ranks=group.num_ranks,
        ranks_per_node=network.node_size(group.hosts()),
        queue_pair_depth=network.queue_pair_depth or nvshmem.depth() or MAX_QUEUE_PAIR_DEPTH,
        **shape,
    )


class NetworkNormalKernels:
    """They are launched on the calling thread's current stream, but for combine, which is told.
    Kernels take addresses and sizes; csrc/nvshmem/bindings_normal.cpp says which."""

    def __init__(
        self,
        config: _native.NormalNodeConfig,
        self_rank: int,
        memory: NetworkMemory,
        timeout_secs: float,
        device: torch.device,
    ) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._rank = nvshmem.extension().NormalNetworkRank(
                config,
                self_rank,
                memory.bases,
                memory.pes,
                timeout_ns=int(timeout_secs * 1e9),
            )

    def normal_route(self, *args: int) -> _native.OpResult:
        return self._rank.exchange_counts(*args, current_stream(self._device))

    def normal_counts(self, ticket: int) -> _native.OpResult:
        """Waits for the counts of the exchange with this ticket, without the interpreter lock."""
        return self._rank.wait_for_counts(ticket, current_stream(self._device))

    def normal_dispatch(self, *args: int) -> _native.OpResult:
        return self._rank.dispatch(*args, current_stream(self._device))

    def normal_combine(self, *args: int) -> _native.OpResult:
        check_current(self._device)
        return self._rank.combine(*args)

    def counts(self) -> tuple[int, int, list[int]]:
        """What `normal_counts` has waited for: N, I, and rows that list each local expert."""
        return self._rank.counts()

    def report(self) -> _native.OpResult:
        return self._rank.report()

    def num_operations(self) -> int:
        """Address of how many dispatches, and combines, have been completed."""
        return self._rank.num_operations()
