// Dispatch's first half: every token once to each rank of this node that owns some of its experts,
// and once to each other node where there are some. A block does a token: its warps write parts of
// the row, then put a message each.
//
// Messages to ranks of the node are written where those look for them, for other nodes they are
// staged:
//
//   header 16 | entries K x 12: all of the node's ranks, by rank, then k | row | pad to 16 | scales
//   |
#pragma once

#include "cuda/dispatch_send.cuh"
#include "nvshmem/hierarchical_routing.cuh"

namespace ep::nvshmem {

template <typename Rows>
class NodeDispatchSender {
 public:
  using Plan = cuda::NetworkSendPlan;

  __device__ NodeDispatchSender(const HierarchicalView& rank, const HierarchicalOp& op,
                                const NodeRouting& routing, const cuda::TokenSets& sets,
                                const Rows& rows, const cuda::DispatchSendParams& params)
      : rank_(rank),
        layout_(rank.layout),
        multi_node_(rank.multi_node),
        op_(op),
        routing_(routing),
        sets_(sets),
        rows_(rows),
        params_(params) {}

  // Whole block. `fetched`: the first part of the first item.
  __device__ void run(cuda::BlockItems items, typename Rows::Fetched fetched, Plan* plan) const {
    publish_counts();
    if (HierarchicalOp::is_clerk()) signal_nodes();
    cuda::send_rows(
        rows_, protocol::parts_for(layout_.dispatch_row_bytes()), items, fetched,
        [&](uint32_t token, uint32_t part) { plan_row(token, part == 0, plan); },
        [&](const cuda::Part& p, uint32_t part) {
          for (uint32_t i = 0; i < plan->num_rows; ++i) {
            cuda::store_part(p, {plan->rows[i], plan->scales[i]}, rows_.shape, part);
          }
        },
        [&](uint32_t, bool) { put_messages(*plan); });
    if (op_.is_last_block()) signal_neighbours();
  }

 private:
  // Rows for the experts of this node, a part of them by each block; what goes to other nodes is
  // counted there.
  __device__ void publish_counts() const {
    const NodeExperts experts(rank_);
    const uint32_t from_last = gridDim.x - 1 - blockIdx.x;
    for (uint32_t i = from_last * blockDim.x + threadIdx.x; i < experts.num;
         i += gridDim.x * blockDim.x) {
      const uint32_t expert = experts.first + i, owner = routing_.owners.owner(expert);
      auto* counts =
          cuda::at<uint64_t>(op_.peer(owner), layout_.counts(op_.bank(), rank_.self_rank));
      ptx::st_relaxed_sys(counts + (expert - routing_.owners.first_expert(owner)),
                          protocol::pack_signal(op_.epoch(), sets_.tokens_of_expert(expert)));
    }
  }
  // To the forwarders: how many messages come. It may be there before them.
  __device__ void signal_nodes() const {
    for (uint32_t remote = threadIdx.x; remote < rank_.num_remote(); remote += blockDim.x) {
      const uint32_t forwarder = rank_.nodes.forwarder_on(remote);
      rank_.store(multi_node_.node_signal(op_.bank(), rank_.nodes.idx_at(forwarder)),
                  protocol::pack_signal(op_.epoch(), sets_.tokens_of_rank(forwarder)), forwarder);
    }
  }
  __device__ void signal_neighbours() const {
    for (uint32_t i = threadIdx.x; i < rank_.num_local(); i += blockDim.x) {
      const uint32_t neighbour = rank_.nodes.neighbour(i);
      ptx::fence_acq_rel_sys();
      op_.publish_signal(neighbour, sets_.tokens_of_rank(neighbour));
    }
  }

  // Headers of the token, places of its row to the plan. One warp.
  __device__ void plan_row(uint32_t token, bool writes, Plan* plan) const {
    const uint32_t bank = op_.bank(), self = rank_.self_rank;
    for_each_node_route(routing_, sets_, token, [&](const NodeRoute& route) {
      const bool is_node = !rank_.reaches(route.dst_rank);
      std::byte *base = op_.self(), *message;
      if (is_node) {
        message = base +
                  multi_node_.node_outbox(bank, rank_.nodes.remote_idx(route.dst_rank), route.slot);
      } else {
        base = op_.peer(route.dst_rank);
        message = base + layout_.header(bank, self, route.slot);
      }
      if (writes) write_header(token, route, is_node, message);
      if (route.entry_idx != 0) return;
      const uint32_t i = route.column;
      plan->messages[i] = route.dst_rank << 16 | route.slot;
      if (is_node) {
        plan->rows[i] = message + multi_node_.row_in_node_message();
        plan->scales[i] = cuda::at<float>(message, multi_node_.scales_in_node_message());
      } else {
        plan->rows[i] = base + layout_.inbox_row(bank, self, route.slot);
        plan->scales[i] = cuda::at<float>(base, layout_.inbox_scales(bank, self, route.slot));
      }
    });
    if (threadIdx.x % kWarp == 0) {
      plan->num_rows = sets_.ranks_of(token);
      if (writes) params_.num_partials[token] = plan->num_rows;
    }
    __syncwarp();
  }

  __device__ void write_header(uint32_t token, const NodeRoute& route, bool is_node,
                               std::byte* message) const {
    const uint32_t first_expert = is_node ? 0 : routing_.owners.first_expert(route.dst_rank);
    const uint32_t outcome_slot = token * layout_.num_outcome_columns() + route.column;
    auto* entries = reinterpret_cast<cuda::ExpertEntry*>(message + sizeof(cuda::MessageHeader));
    entries[route.entry_idx] = {static_cast<uint16_t>(route.expert - first_expert),
                                static_cast<uint16_t>(route.k),
                                sets_.before_expert(route.expert, token), route.weight};
    if (route.entry_idx != 0) return;
    *reinterpret_cast<cuda::MessageHeader*>(message) = {token, outcome_slot, route.num_entries,
                                                        op_.tag()};
    params_.answers[outcome_slot] = route.dst_rank << 16 | route.slot;
  }

  // The token's messages for other nodes, once all warps have written their parts: a warp a
  // message. Whole block.
  __device__ void put_messages(const Plan& plan) const {
    __syncthreads();
    const uint32_t bank = op_.bank();
    for (uint32_t i = threadIdx.x / kWarp; i < plan.num_rows; i += cuda::kWarps) {
      const uint32_t dst_rank = plan.messages[i] >> 16, slot = plan.messages[i] & 0xffff;
      if (rank_.reaches(dst_rank)) continue;
      rank_.put(multi_node_.node_inbox(bank, rank_.nodes.idx_at(dst_rank), slot),
                multi_node_.node_outbox(bank, rank_.nodes.remote_idx(dst_rank), slot),
                static_cast<uint32_t>(multi_node_.node_message_bytes()),
                rank_.arrivals_at(bank, Phase::kDispatch, dst_rank), dst_rank);
    }
  }

  const HierarchicalView& rank_;
  const protocol::LowLatencyLayout& layout_;
  const protocol::MultiNodeLayout& multi_node_;
  const HierarchicalOp& op_;
  const NodeRouting& routing_;
  const cuda::TokenSets& sets_;
  const Rows& rows_;
  const cuda::DispatchSendParams& params_;
};

}  // namespace ep::nvshmem
