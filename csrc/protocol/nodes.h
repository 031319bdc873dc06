// Which node a rank is on: nodes of as many ranks each, in rank order. Ranks of one node reach each
// other's memory (links shm, p2p); to ranks of other nodes they send over a network (link rdma).
//
// Example, R = 6 ranks, 2 a node: node 1 is ranks 2 and 3; rank 3 is number 1 there, and ranks 1
// and 5 have that number on the other nodes. Among node 1's *remote* nodes, node 0 is number 0 and
// node 2 is number 1.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

struct Nodes {
  uint32_t num_ranks;
  uint32_t ranks_per_node;  // divides num_ranks

  EP_HOST_DEVICE constexpr uint32_t num_nodes() const { return num_ranks / ranks_per_node; }
  EP_HOST_DEVICE constexpr uint32_t node_of(uint32_t rank) const { return rank / ranks_per_node; }
  EP_HOST_DEVICE constexpr uint32_t rank_in_node(uint32_t rank) const {
    return rank % ranks_per_node;
  }
  EP_HOST_DEVICE constexpr uint32_t rank_at(uint32_t node, uint32_t rank_in_node) const {
    return node * ranks_per_node + rank_in_node;
  }
  EP_HOST_DEVICE constexpr bool share_node(uint32_t a, uint32_t b) const {
    return node_of(a) == node_of(b);
  }
  // The rank of `node` through which `rank` exchanges with it: of the same number there.
  EP_HOST_DEVICE constexpr uint32_t forwarder(uint32_t node, uint32_t rank) const {
    return rank_at(node, rank_in_node(rank));
  }

  // The nodes other than a rank's own, numbered from 0: *remote* ones.
  EP_HOST_DEVICE constexpr uint32_t num_remote() const { return num_nodes() - 1; }
  EP_HOST_DEVICE constexpr uint32_t remote_idx(uint32_t self_node, uint32_t node) const {
    return node < self_node ? node : node - 1;
  }
  EP_HOST_DEVICE constexpr uint32_t remote_node(uint32_t self_node, uint32_t idx) const {
    return idx < self_node ? idx : idx + 1;
  }
};

// The same, seen from one rank.
struct NodeView {
  Nodes nodes;
  uint32_t self_rank;

  EP_HOST_DEVICE constexpr uint32_t self_node() const { return nodes.node_of(self_rank); }
  EP_HOST_DEVICE constexpr bool is_local(uint32_t rank) const {
    return nodes.share_node(self_rank, rank);
  }
  // Of this node, by its number there.
  EP_HOST_DEVICE constexpr uint32_t neighbour(uint32_t rank_in_node) const {
    return nodes.rank_at(self_node(), rank_in_node);
  }
  // Which of the remote nodes that rank is on; and which this one is to that rank.
  EP_HOST_DEVICE constexpr uint32_t remote_idx(uint32_t rank) const {
    return nodes.remote_idx(self_node(), nodes.node_of(rank));
  }
  EP_HOST_DEVICE constexpr uint32_t idx_at(uint32_t rank) const {
    return nodes.remote_idx(nodes.node_of(rank), self_node());
  }
  // On a remote node, the rank with which this one exchanges; and on this node, the one with which
  // `rank` does.
  EP_HOST_DEVICE constexpr uint32_t forwarder_on(uint32_t remote) const {
    return nodes.forwarder(nodes.remote_node(self_node(), remote), self_rank);
  }
  EP_HOST_DEVICE constexpr uint32_t forwarder_here(uint32_t rank) const {
    return nodes.forwarder(self_node(), rank);
  }
  // Hierarchical: whether signals and credits are exchanged with that rank.
  EP_HOST_DEVICE constexpr bool is_peer(uint32_t rank) const {
    return is_local(rank) || nodes.rank_in_node(rank) == nodes.rank_in_node(self_rank);
  }
};

}  // namespace ep::protocol
