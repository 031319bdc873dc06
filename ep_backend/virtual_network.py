"""The network between the nodes of a virtual world: what RDMA would carry, counted and reordered.

It delivers puts and signals in any order that RDMA allows, drawn from a seed
(csrc/cpu/network.h says which), and counts what every rank sends to every other.
"""

from __future__ import annotations

from dataclasses import dataclass

from ep_backend import _native
from ep_backend.checks import check_int

SIGNAL_BYTES = 8
LINKS = ("self", "shm", "rdma")
"""How two ranks of a virtual world are joined: within a node by memory, else by the network."""


@dataclass(frozen=True)
class Traffic:
    """What has been sent over a link, or over several."""

    num_puts: int = 0
    """Over `rdma` puts; over `shm` rows, with what goes with them, and counts."""
    put_bytes: int = 0
    num_signals: int = 0
    """Words of 8 bytes: signals and credits."""

    @property
    def num_messages(self) -> int:
        return self.num_puts + self.num_signals

    @property
    def num_bytes(self) -> int:
        return self.put_bytes + SIGNAL_BYTES * self.num_signals

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_puts + other.num_puts,
            self.put_bytes + other.put_bytes,
            self.num_signals + other.num_signals,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other.times(-1)

    def times(self, factor: int) -> Traffic:
        return Traffic(self.num_puts * factor, self.put_bytes * factor, self.num_signals * factor)


class VirtualNetwork:
    """Of a `VirtualWorld` whose ranks are on several nodes.

    Args:
        num_ranks: of all nodes.
        ranks_per_node: divides `num_ranks`.
        seed: of the order in which things are delivered.
        max_delay_us: how long the network pauses, at most, between two deliveries.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, num_ranks: int, ranks_per_node: int, seed: int = 0, max_delay_us: int = 0
    ) -> None:
        check_int("ranks_per_node", ranks_per_node, 1, num_ranks, "There are so many ranks.")
        if num_ranks % ranks_per_node != 0:
            raise ValueError(
                f"ranks_per_node is {ranks_per_node}, which does not divide the {num_ranks} ranks. "
                "Every node has as many ranks."
            )
        check_int("max_delay_us", max_delay_us, 0, 1_000_000)
        self.num_ranks = num_ranks
        self.ranks_per_node = ranks_per_node
        self.nodes = _native.Nodes(num_ranks, ranks_per_node)
        self.native = _native.Network(
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            seed=seed % 2**64,
            max_delay_us=max_delay_us,
        )

    def link(self, src_rank: int, dst_rank: int) -> str:
        """How the two are joined: one of `LINKS`."""
        if src_rank == dst_rank:
            return "self"
        return "shm" if self.nodes.share_node(src_rank, dst_rank) else "rdma"

    def traffic(self, src_rank: int, dst_rank: int) -> Traffic:
        """What one rank has sent to another since the world's creation."""
        counted = self.native.counters(src_rank, dst_rank)
        return Traffic(counted.num_puts, counted.put_bytes, counted.num_signals)

    def totals(self) -> dict[str, Traffic]:
        """Of all pairs of ranks, by link."""
        totals = dict.fromkeys(LINKS, Traffic())
        for src_rank in range(self.num_ranks):
            for dst_rank in range(self.num_ranks):
                totals[self.link(src_rank, dst_rank)] += self.traffic(src_rank, dst_rank)
        return totals
