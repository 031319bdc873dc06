// Who gets which token where messages go to ranks of the own node and, for each other node, to the
// rank of this one's number there.
#pragma once

#include "cuda/routing.cuh"
#include "nvshmem/hierarchical_view.cuh"

namespace ep::nvshmem {

struct NodeRouting : cuda::Routing {
  protocol::NodeView nodes;

  __device__ NodeRouting(const HierarchicalView& rank, const cuda::DispatchSendParams& params)
      : cuda::Routing(rank, params), nodes(rank.nodes) {}

  __device__ uint32_t destination(uint32_t expert) const {
    return destination_of(owners.owner(expert));
  }
  // Of a message for experts of rank `owner`.
  __device__ uint32_t destination_of(uint32_t owner) const {
    if (nodes.is_local(owner)) return owner;
    return nodes.nodes.forwarder(nodes.nodes.node_of(owner), nodes.self_rank);
  }
};

// One route of a token: its k-th expert, seen by the lane that has it.
struct NodeRoute {
  uint32_t k, expert, dst_rank;
  float weight;
  uint32_t slot;         // of the token's message to dst_rank
  uint32_t column;       // of its answer: messages of the token to ranks below dst_rank
  uint32_t entry_idx;    // entries of the message before this one: by owner, then k
  uint32_t num_entries;  // and in all
};

// One warp, a lane a route. Calls `each(route)` on the lanes that have one.
template <typename Each>
__device__ void for_each_node_route(const NodeRouting& routing, const cuda::TokenSets& sets,
                                    uint32_t token, Each each) {
  const uint32_t lane = threadIdx.x % kWarp, top_k = routing.top_k;
  __syncwarp();  // what the last token's routes have left may be written over
#pragma unroll 1
  for (uint32_t first_k = 0; first_k < top_k; first_k += kWarp) {
    NodeRoute route = {};
    route.k = first_k + lane;
    const int64_t expert = route.k < top_k ? routing.expert(token, route.k) : -1;
    route.weight = route.k < top_k ? routing.weight(token, route.k) : 0.0f;
    route.expert = static_cast<uint32_t>(expert);
    const uint32_t owner = expert < 0 ? cuda::kNoRank : routing.owners.owner(route.expert);
    route.dst_rank = expert < 0 ? cuda::kNoRank : routing.destination_of(owner);
    auto count = [&](uint32_t k, uint32_t other_owner, bool is_alike) {
      const bool is_before = other_owner < owner || (other_owner == owner && k < route.k);
      route.entry_idx += is_alike && is_before;
      route.num_entries += is_alike;
    };
    if (top_k <= kWarp) {
      const uint32_t alike = __match_any_sync(cuda::kAllLanes, route.dst_rank);
#pragma unroll 1
      for (uint32_t k = 0; k < top_k; ++k) {
        count(k, __shfl_sync(cuda::kAllLanes, owner, k), (alike >> k & 1) != 0);
      }
    }
    if (expert < 0) continue;
    if (top_k > kWarp) {
#pragma unroll 1
      for (uint32_t k = 0; k < top_k; ++k) {
        const int64_t other = routing.expert(token, k);
        if (other < 0) continue;
        const uint32_t other_owner = routing.owners.owner(static_cast<uint32_t>(other));
        count(k, other_owner, routing.destination_of(other_owner) == route.dst_rank);
      }
    }
    route.column = sets.ranks_below(route.dst_rank, token);
    route.slot = sets.before_rank(route.dst_rank, token);
    each(route);
  }
  __syncwarp();
}

}  // namespace ep::nvshmem
