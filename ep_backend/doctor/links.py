"""Which link joins each pair of ranks, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ep_backend.doctor.gpu import Gpus


@dataclass(frozen=True)
class Link:
    """Of a pair of ranks; `kind` None: they cannot be joined."""

    kind: str | None
    why: str


def link_table(
    num_ranks: int, ranks_per_host: int, device: str, gpus: Gpus, no_network: str = "RDMA is off"
) -> list[list[Link]]:
    """`[R][R]`: from a rank to a rank. Rank r of a host has that host's GPU number r.

    Args:
        ranks_per_host: hosts are thought to be like this one.
        no_network: why a buffer's memory is not NVSHMEM's, which a network reaches; "": it is.

    Raises:
        ValueError: there is no such table.
    """
    if num_ranks < 1 or not 1 <= ranks_per_host <= num_ranks:
        raise ValueError(
            f"{num_ranks} ranks, {ranks_per_host} on a host; expected at least 1, and not more on "
            "a host than there are"
        )
    return [
        [_link(a, b, ranks_per_host, device, gpus, no_network) for b in range(num_ranks)]
        for a in range(num_ranks)
    ]


def _link(a: int, b: int, ranks_per_host: int, device: str, gpus: Gpus, no_network: str) -> Link:
    if a == b:
        return Link("self", "a rank and itself")
    if a // ranks_per_host != b // ranks_per_host:
        if no_network:
            return Link(None, f"on different hosts: only RDMA joins those; {no_network}")
        return Link("rdma", "on different hosts: NVSHMEM puts messages over the network")
    if device == "cpu":
        return Link("shm", "processes of one host share memory")
    own, peer = a % ranks_per_host, b % ranks_per_host
    absent = [gpu for gpu in (own, peer) if gpu >= len(gpus)]
    if absent:
        return Link(None, f"this host has no GPU {absent[0]}")
    if not gpus.can_access(own, peer) and not no_network:
        return Link("rdma", f"GPU {own} does not reach the memory of GPU {peer}: over the network")
    if not gpus.can_access(own, peer):
        return Link(None, f"GPU {own} does not reach the memory of GPU {peer}")
    return Link("p2p", "the GPUs reach each other's memory, over NVLink or PCIe")
