// Where tokens go within another node: how a source tells its forwarder there.
#pragma once

#include "nvshmem/normal_op.cuh"

namespace ep::nvshmem::normal {

// Where a token goes on one other node, as its forwarder will read it. One thread.
__device__ inline void stage_route(const NodeOp& op, uint32_t bank, const uint32_t* messages,
                                   uint64_t ranks, uint32_t remote, uint32_t slot) {
  const uint32_t node = op.nodes().remote_node(op.view().self_node(), remote);
  const uint32_t count = __popcll(ranks_of_node(op.nodes(), ranks, node));
  const uint32_t* of_node = messages + ranks_before(ranks, op.nodes().rank_at(node, 0));
  auto* route = at<uint32_t>(op.self(), op.nodes_layout().staged_route(bank, remote, slot));
  route[0] = count;
  for (uint32_t i = 0; i < count; ++i) route[1 + i] = of_node[i];
}

// Puts the routes of a round, which all blocks have staged, behind `flags`, which their signals
// carry; a warp a node. The block that arrived last.
__device__ inline void send_routes(const NodeOp& op, uint32_t round, Arrival kind,
                                   const NodeRoutes& routes, bool has_tokens, uint32_t flags) {
  const NormalNodeLayout& layout = op.nodes_layout();
  const uint32_t num_columns = op.num_ranks() + op.num_remote(), bank = op.bank(round);
  ptx::fence_acq_rel_sys();  // a card reads what other blocks have written
  for (uint32_t remote = threadIdx.x / kWarp; remote < op.num_remote(); remote += kNodeWarps) {
    const uint32_t count =
        has_tokens ? routes.round_counts[uint64_t{round} * num_columns + op.num_ranks() + remote]
                   : 0;
    if (count > 0) {
      const uint32_t here = op.view().idx_at(op.view().forwarder_on(remote));
      op.put(round, kind, remote, layout.node_route(bank, here, 0),
             layout.staged_route(bank, remote, 0), count * layout.route_bytes());
    }
    if (threadIdx.x % kWarp == 0) op.signal_node(round, remote, count | flags);
  }
}

// A route that has come, in lanes: {rank << 16 | slot} of the i-th rank in lane i, two in a lane.
// Memory that contradicts its signal must not choose where we read and write.
struct Route {
  uint32_t num_ranks;
  uint32_t messages[2];

  // Whole warp. False: it was refused.
  __device__ bool read(const NodeOp& op, uint32_t round, uint32_t remote, uint32_t slot) {
    const uint32_t lane = threadIdx.x % kWarp, num_max = op.nodes_layout().num_columns();
    const auto* words =
        at<uint32_t>(op.self(), op.nodes_layout().node_route(op.bank(round), remote, slot));
    num_ranks = ptx::ld_relaxed_sys(words);
    bool ok = num_ranks >= 1 && num_ranks <= num_max;
    uint32_t wrong = num_ranks;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t i = half * kWarp + lane;
      messages[half] = 0;
      if (!ok || i >= num_ranks) continue;
      messages[half] = ptx::ld_relaxed_sys(words + 1 + i);
      const uint32_t r = messages[half] >> 16, dst_slot = messages[half] & 0xffff;
      ok = r < op.num_ranks() && op.view().is_local(r) && dst_slot < op.per_round();
      wrong = messages[half];
    }
    if (!ok) op.corrupt(round, op.view().forwarder_on(remote), num_max, wrong);
    return __all_sync(kAllLanes, ok);
  }
};

}  // namespace ep::nvshmem::normal
