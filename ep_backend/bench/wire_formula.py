"""What dispatch and combine send over the network, as formulas: copies of a token, messages, bytes.

Three ways to send a token to the experts of its K, of which some are on other nodes:

    per_expert  a copy for each expert; all their rows come home. (DeepEP's low-latency kernels)
    per_rank    a copy for each rank that owns some of them; it sends home one row, or, with
                reduction "source", one for each of the token's K that it has. (ours, flat)
    per_node    a copy for each node that does; it sends home one row. (ours, hierarchical)

R ranks, G of them a node, N nodes, T tokens of a rank, K top_k, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from ep_backend import _native
from ep_backend.settings import BufferSettings
from ep_backend.virtual_network import Traffic

SCHEMES = ("per_expert", "per_rank", "per_node")
PHASES = ("dispatch", "combine")
DEEPEP_HEADER_BYTES = 16


@dataclass(frozen=True)
class WireShape:
    """Of an exchange between nodes."""

    num_nodes: int
    ranks_per_node: int
    num_tokens: int
    """T, of every rank."""
    hidden: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    dispatch_dtype: torch.dtype
    combine_dtype: torch.dtype
    reduction: str = "rank"
    """Of `per_rank`: where rows are weighted and added."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """Those that there are: what is added up on the way cannot be weighted at home."""
        return SCHEMES if self.reduction == "rank" else ("per_expert", "per_rank")

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def nodes(self) -> _native.Nodes:
        return _native.Nodes(self.num_ranks, self.ranks_per_node)

    @property
    def experts_of_ranks(self) -> list[int]:
        """How many experts each rank owns."""
        partition = _native.ExpertPartition(self.num_experts, self.num_ranks)
        return [partition.num_local_experts(rank) for rank in range(self.num_ranks)]

    def layout(self, hierarchical: bool) -> _native.MultiNodeLayout:
        """Raises `ValueError` for what no buffer could be."""
        settings = BufferSettings(
            num_max_tokens_per_rank=self.num_tokens,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=self.dtype,
            dispatch_dtype=self.dispatch_dtype,
            combine_dtype=self.combine_dtype,
            scale_format="float32",
            output_layout="expert_major",
            reduction=self.reduction,
            transfer="push",
            num_max_tagged_tokens=0,
            num_workspaces=0,
            expert_ids="local",
            num_banks=2,
            device="cpu",
            hierarchical=hierarchical,
        )
        settings.check(self.num_ranks)
        return _native.MultiNodeLayout(
            settings.multi_node_config(self.num_ranks, self.ranks_per_node)
        )


@dataclass(frozen=True)
class Copies:
    """Of all tokens of all ranks together, how many (token, .) pairs there are; expected numbers
    need not be whole."""

    remote_experts: float
    """Experts on other nodes."""
    remote_ranks: float
    """Ranks on other nodes that own some of the token's experts."""
    forwarders: float
    """Of these, those whose number in their node is that of the token's rank in its own."""
    remote_nodes: float
    """Other nodes that own some."""
    neighbours: float
    """Ranks of the token's own node, other than its own, that own some."""
    batches: float
    """(rank, remote rank) pairs between which any token goes."""
    remote_rows: float
    """Of combine with reduction "source": one for each k whose expert is on another node."""
    neighbour_rows: float
    """The same of experts of the node's other ranks."""

    def remote(self, scheme: str) -> float:
        """Copies that cross the network."""
        return {
            "per_expert": self.remote_experts,
            "per_rank": self.remote_ranks,
            "per_node": self.remote_nodes,
        }[scheme]

    def remote_in(self, phase: str, scheme: str, shape: WireShape) -> float:
        """The same, or rows that come home over it."""
        if (phase, scheme, shape.reduction) == ("combine", "per_rank", "source"):
            return self.remote_rows
        return self.remote(scheme)

    @classmethod
    def of_routing(cls, topk_idx: list[torch.Tensor], shape: WireShape) -> Copies:
        """Of these tokens: of each rank `[T_r, K]`, -1 = not routed. An expert listed twice counts
        once, also for `per_expert`."""
        nodes = shape.nodes
        partition = _native.ExpertPartition(shape.num_experts, shape.num_ranks)
        counts = dict.fromkeys([field.name for field in fields(cls) if field.name != "batches"], 0)
        batches = set()
        for src_rank, idx in enumerate(topk_idx):
            for token in idx.tolist():
                owners = [partition.owner(expert) for expert in set(token) if expert >= 0]
                ranks = set(owners)
                remote = {rank for rank in ranks if not nodes.share_node(src_rank, rank)}
                counts["remote_experts"] += sum(rank in remote for rank in owners)
                counts["remote_ranks"] += len(remote)
                counts["forwarders"] += sum(
                    nodes.rank_in_node(rank) == nodes.rank_in_node(src_rank) for rank in remote
                )
                counts["remote_nodes"] += len({nodes.node_of(rank) for rank in remote})
                counts["neighbours"] += len(ranks - remote - {src_rank})
                rows = [partition.owner(expert) for expert in token if expert >= 0]
                counts["remote_rows"] += sum(rank in remote for rank in rows)
                neighbours = ranks - remote - {src_rank}
                counts["neighbour_rows"] += sum(rank in neighbours for rank in rows)
                batches |= {(src_rank, rank) for rank in remote}
        return cls(**counts, batches=len(batches))

    @classmethod
    def expected(cls, shape: WireShape) -> Copies:
        """Where every token has K different experts, all sets of K as likely."""
        nodes = shape.nodes
        of_rank = shape.experts_of_ranks
        chance = [_chance(owned, shape) for owned in of_rank]
        g = shape.ranks_per_node
        of_node = [sum(of_rank[i : i + g]) for i in range(0, shape.num_ranks, g)]
        node_chance = [_chance(owned, shape) for owned in of_node]
        experts = forwarders = ranks = remote_nodes = neighbours = near_experts = batches = 0.0
        for src_rank in range(shape.num_ranks):
            for rank, p in enumerate(chance):
                num_experts = shape.top_k * of_rank[rank] / shape.num_experts
                if nodes.share_node(src_rank, rank):
                    neighbours += p * (rank != src_rank)
                    near_experts += num_experts * (rank != src_rank)
                    continue
                experts += num_experts
                ranks += p
                forwarders += p * (nodes.rank_in_node(rank) == nodes.rank_in_node(src_rank))
                batches += 1 - (1 - p) ** shape.num_tokens
            own_node = nodes.node_of(src_rank)
            remote_nodes += sum(node_chance) - node_chance[own_node]
        t = shape.num_tokens
        return cls(
            remote_experts=t * experts,
            remote_ranks=t * ranks,
            forwarders=t * forwarders,
            remote_nodes=t * remote_nodes,
            neighbours=t * neighbours,
            batches=batches,
            remote_rows=t * experts,
            neighbour_rows=t * near_experts,
        )


def _chance(num_owned: int, shape: WireShape) -> float:
    """That some of a token's K experts are among so many of all E: 1 - C(E - n, K) / C(E, K)."""
    e, k = shape.num_experts, shape.top_k
    return 1 - math.comb(e - num_owned, k) / math.comb(e, k)


def bytes_of_copy(scheme: str, phase: str, shape: WireShape) -> int:
    """Of a token, or of the row that comes home for it, as it crosses the network."""
    layout = shape.layout(hierarchical=scheme == "per_node")
    if phase == "combine":
        return layout.combine_bytes
    if scheme == "per_node":
        return layout.node_message_bytes
    row = layout.base.dispatch_row_bytes + layout.scales_bytes
    return row + (DEEPEP_HEADER_BYTES if scheme == "per_expert" else layout.header_bytes)


def network_traffic(scheme: str, phase: str, copies: Copies, shape: WireShape) -> Traffic:
    """What all ranks together send over the network in one operation: its send, its hook and what
    that forwards and credits. Of `per_expert`, copies alone."""
    r, g = shape.num_ranks, shape.ranks_per_node
    num_copies = copies.remote_in(phase, scheme, shape)
    payload = num_copies * bytes_of_copy(scheme, phase, shape)
    if scheme == "per_expert":
        return Traffic(round(num_copies), round(payload), 0)
    # Between all remote ranks, or between those of the same number: a signal, and a credit.
    num_pairs = r * (r - g) if scheme == "per_rank" else r * (shape.num_nodes - 1)
    num_puts = num_copies
    if scheme == "per_rank" and phase == "dispatch":
        # Scales lie apart from the rows; headers of a batch go together; so do counts.
        has_scales = shape.layout(hierarchical=False).base.num_scales > 0
        num_counts = [(r - g) * n for n in shape.experts_of_ranks]
        num_puts += (
            num_copies * has_scales
            + copies.batches
            + sum((r - g) * (n > 0) for n in shape.experts_of_ranks)
        )
        payload += 8 * sum(num_counts)
    return Traffic(round(num_puts), round(payload), 2 * num_pairs)


def node_traffic(scheme: str, phase: str, copies: Copies, shape: WireShape) -> Traffic:
    """The same between different ranks of a node, of ours."""
    r, g = shape.num_ranks, shape.ranks_per_node
    is_hierarchical = scheme == "per_node"
    layout = shape.layout(is_hierarchical)
    num_rows = copies.neighbours
    # To or from whoever forwards for the node, which keeps its own.
    num_rows += copies.remote_ranks - copies.forwarders if is_hierarchical else 0
    num_pairs = r * (g - 1)
    if phase == "combine" and shape.reduction == "source":
        num_rows = copies.neighbour_rows
    if phase == "combine":
        return Traffic(round(num_rows), round(num_rows * layout.combine_bytes), 2 * num_pairs)
    # Each source's counts and its signal, also those that are forwarded.
    num_sources = shape.num_nodes if is_hierarchical else 1
    counts = num_sources * (g - 1)
    num_bytes = layout.header_bytes + layout.base.dispatch_row_bytes + layout.scales_bytes
    return Traffic(
        round(num_rows) + num_sources * num_pairs,
        round(num_rows * num_bytes) + 8 * counts * sum(shape.experts_of_ranks),
        (num_sources + 1) * num_pairs,
    )
