// What the hierarchical kernels of a rank are given. Ranks of the own node are written to directly.
// Of the others only the forwarders are peers, to whom everything is put, and whose puts are
// counted.
#pragma once

#include "nvshmem/hierarchical.h"
#include "nvshmem/network_view.cuh"

namespace ep::nvshmem {

struct HierarchicalView : PuttingView {
  protocol::MultiNodeLayout multi_node;
  protocol::NodeNetworkLayout network;
  protocol::NodeView nodes;
  uint64_t* arrived;       // [B][phase][N - 1]: what the hooks so far have seen arrive
  uint32_t* num_finished;  // [N - 1]: blocks of a running hook that have forwarded their share
  Forwarded answered;      // [B][N - 1], [B][N - 1][M]: copies of what combine's sends were given

  __device__ uint32_t num_remote() const { return nodes.nodes.num_remote(); }
  __device__ uint32_t num_local() const { return nodes.nodes.ranks_per_node; }

  __device__ bool reaches(uint32_t r) const { return nodes.is_local(r); }
  __device__ bool is_peer(uint32_t r) const { return nodes.is_peer(r); }
  // Where partial rows of the messages from that source may go.
  __device__ uint64_t num_outcome_slots(uint32_t src_rank) const {
    return nodes.is_local(src_rank) ? layout.num_outcome_slots() : multi_node.num_partial_slots();
  }

  // Waits until all `count` puts of that operation are here from `r`, a forwarder.
  __device__ bool has_arrived(cuda::OpId id, uint32_t bank, uint32_t r, uint64_t count,
                              bool speaks) const {
    const uint32_t remote = nodes.remote_idx(r);
    const uint64_t before = arrived[network.arrivals_idx(bank, id.phase, remote)];
    return wait_for_puts(id, r, network.arrivals(bank, id.phase, remote), before, count, speaks);
  }
  // For the hook that ends: what is here from `r`, a forwarder, has been read.
  __device__ void note_arrived(uint32_t bank, Phase phase, uint32_t r) const {
    const uint32_t remote = nodes.remote_idx(r);
    arrived[network.arrivals_idx(bank, phase, remote)] =
        ptx::ld_relaxed_sys(word(network.arrivals(bank, phase, remote)));
  }
  // Of the words at a forwarder that count this rank's puts to it.
  __device__ uint64_t arrivals_at(uint32_t bank, Phase phase, uint32_t forwarder) const {
    return network.arrivals(bank, phase, nodes.idx_at(forwarder));
  }
};

using HierarchicalOp = cuda::OpOf<HierarchicalView>;

// The experts of this rank's node, which are numbered one after the other.
struct NodeExperts {
  uint32_t first, num;

  __device__ explicit NodeExperts(const HierarchicalView& rank)
      : first(rank.owners.first_expert(rank.nodes.neighbour(0))),
        num(rank.owners.first_expert(rank.nodes.neighbour(0) + rank.num_local()) - first) {}
};

}  // namespace ep::nvshmem
