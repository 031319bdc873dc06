// The first half of a dispatch's hook: messages for this node become what their source would have
// written to each of the node's ranks.
//
// A remote node is the business of some blocks, each of which finds out by itself who gets which of
// its messages, and forwards a share of them. The last of them to finish signals. A warp reads a
// message, writes its headers, and moves some parts of its row.
//
//   blocks 0 .. 6 of 3 remote nodes:   0 3 6 | 1 4 | 2 5
#pragma once

#include "cuda/dispatch_send.cuh"
#include "nvshmem/hierarchical_view.cuh"

namespace ep::nvshmem {

class Forwarder {
 public:
  using Plan = cuda::SendPlan;

  // `shared`: num_bytes().
  __device__ Forwarder(const HierarchicalView& rank, const HierarchicalOp& op, uint32_t* shared,
                       const Forwarded& forwarded, Plan* plan)
      : rank_(rank),
        layout_(rank.layout),
        multi_node_(rank.multi_node),
        op_(op),
        shared_(shared),
        forwarded_(forwarded),
        plan_(plan),
        experts_(rank) {}

  __host__ __device__ static uint64_t num_bytes(const protocol::MultiNodeLayout& layout) {
    const uint32_t num_ranks = layout.config().ranks_per_node;
    const uint32_t num_experts = num_ranks * layout.base().partition().num_max_local_experts();
    const auto& config = layout.config().low_latency;
    return cuda::TokenSets::num_bytes(config.num_max_tokens_per_rank, num_ranks, num_experts);
  }

  // All that this block has to forward. Whole block, a barrier behind it. False, on all threads: it
  // gave up.
  __device__ bool run() const {
    const uint32_t num_remote = rank_.num_remote();
    for (uint32_t remote = blockIdx.x % num_remote; remote < num_remote; remote += gridDim.x) {
      if (!forward_node(remote)) return false;
    }
    return true;
  }

 private:
  // Of the blocks that have the same remote node.
  struct Share {
    uint32_t idx, num_blocks;

    __device__ Share(uint32_t remote, uint32_t num_remote)
        : idx(blockIdx.x / num_remote),
          num_blocks(remote < gridDim.x ? (gridDim.x - remote + num_remote - 1) / num_remote : 1) {}
  };

  __device__ bool forward_node(uint32_t remote) const {
    const Share share(remote, rank_.num_remote());
    const uint32_t src_rank = rank_.nodes.forwarder_on(remote);
    __shared__ uint32_t num_arrived;
    bool ok = true;
    if (threadIdx.x == 0) {
      const uint64_t word = multi_node_.node_signal(op_.bank(), remote);
      const bool speaks = share.idx == 0;
      uint32_t count;
      // The signal may be here before what it tells of.
      ok = op_.take_signal(cuda::at<uint64_t>(op_.self(), word), src_rank, speaks, &count) &&
           rank_.has_arrived(op_.receiving(), op_.bank(), src_rank, count, speaks);
      num_arrived = count;
    }
    if (!__syncthreads_and(ok)) return false;
    const uint32_t num_messages = num_arrived;
    cuda::TokenSets sets(shared_, num_messages, rank_.num_local(), experts_.num);
    sets.clear();
    __syncthreads();
    // Before any of it is passed on.
    ok = read_messages(remote, num_messages, sets);
    if (!__syncthreads_and(ok)) return false;
    publish_counts(share, src_rank, sets);
    if (share.idx == 0 && threadIdx.x == 0) forwarded_.num_messages[remote] = num_messages;
    const uint32_t num_parts = protocol::parts_for(layout_.dispatch_row_bytes());
    for (cuda::Items items(num_messages, num_parts, 0, share.idx, share.num_blocks); items.more();
         items.next()) {
      forward_message(remote, src_rank, items, sets);
    }
    if (is_last_block(remote, share)) signal_neighbours(src_rank, sets);
    __syncthreads();
    return true;
  }

  __device__ std::byte* message_at(uint32_t remote, uint32_t slot) const {
    return op_.self() + multi_node_.node_inbox(op_.bank(), remote, slot);
  }
  struct Entry {
    uint32_t expert, k, position;  // the expert's global number
    float weight;
  };
  __device__ static Entry load_entry(const std::byte* message, uint32_t j) {
    const auto* words = reinterpret_cast<const uint32_t*>(message + sizeof(cuda::MessageHeader) +
                                                          j * sizeof(cuda::ExpertEntry));
    const uint32_t word = ptx::ld_relaxed_sys(words);
    return {word & 0xffff, word >> 16, ptx::ld_relaxed_sys(words + 1),
            __uint_as_float(ptx::ld_relaxed_sys(words + 2))};
  }
  __device__ uint32_t rank_in_node(uint32_t expert) const {
    return rank_.owners.owner(expert) - rank_.nodes.neighbour(0);
  }

  // Who gets which message -> `sets`, with experts and ranks as the node numbers them; a thread an
  // entry. Memory that contradicts its signal must not choose where we write. Whole block.
  __device__ bool read_messages(uint32_t remote, uint32_t num_messages,
                                const cuda::TokenSets& sets) const {
    const auto& config = layout_.config();
    const uint32_t src_rank = rank_.nodes.forwarder_on(remote);
    const uint32_t shift = cuda::ceil_log2(config.top_k);  // no division
    bool ok = true;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < num_messages << shift && ok; i += blockDim.x) {
      const uint32_t slot = i >> shift, j = i & ((1u << shift) - 1);
      if (j >= config.top_k) continue;
      const std::byte* message = message_at(remote, slot);
      const uint4 header = ptx::ld_row(reinterpret_cast<const uint4*>(message));
      const Entry entry = load_entry(message, j);
      if (header.w != op_.tag()) {
        ok = op_.corrupt(src_rank, op_.tag(), header.w);
      } else if (header.z < 1 || header.z > config.top_k) {
        ok = op_.corrupt(src_rank, config.top_k, header.z);
      } else if (header.y >= layout_.num_outcome_slots()) {
        ok = op_.corrupt(src_rank, layout_.num_outcome_slots(), header.y);
      } else if (j >= header.z) {
        continue;
      } else if (entry.expert - experts_.first >= experts_.num) {
        ok = op_.corrupt(src_rank, experts_.first, entry.expert);
      } else {
        sets.add(slot, entry.expert - experts_.first, rank_in_node(entry.expert));
      }
    }
    return ok;
  }

  // How many rows the source has for every expert of the node. The words' readers look at the epoch
  // in them.
  __device__ void publish_counts(const Share& share, uint32_t src_rank,
                                 const cuda::TokenSets& sets) const {
    for (uint32_t i = share.idx * blockDim.x + threadIdx.x; i < experts_.num;
         i += share.num_blocks * blockDim.x) {
      const uint32_t expert = experts_.first + i, owner = rank_.owners.owner(expert);
      auto* counts = cuda::at<uint64_t>(op_.peer(owner), layout_.counts(op_.bank(), src_rank));
      ptx::st_relaxed_sys(counts + (expert - rank_.owners.first_expert(owner)),
                          protocol::pack_signal(op_.epoch(), sets.tokens_of_expert(i)));
    }
  }

  // Some parts of a message. One warp.
  __device__ void forward_message(uint32_t remote, uint32_t src_rank, const cuda::Items& items,
                                  const cuda::TokenSets& sets) const {
    const uint32_t slot = items.row();
    plan_message(remote, src_rank, slot, items.first_part() == 0, sets);
    std::byte* message = message_at(remote, slot);
    const cuda::RowView row = {message + multi_node_.row_in_node_message(),
                               cuda::at<float>(message, multi_node_.scales_in_node_message())};
    const cuda::RowShape shape = {
        static_cast<uint32_t>(layout_.dispatch_row_bytes() / sizeof(uint4)), layout_.num_scales()};
    constexpr uint32_t kBatch = 4;  // parts on their way at the same time
#pragma unroll 1
    for (uint32_t part = items.first_part(); part < items.end_part(); part += kBatch) {
      cuda::Part batch[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (part + i < items.end_part()) {
          batch[i] = cuda::load_part(row, shape, part + i, ptx::ld_row);
        }
      }
#pragma unroll 1
      for (uint32_t r = 0; r < plan_->num_rows; ++r) {
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (part + i < items.end_part()) {
            cuda::store_part(batch[i], {plan_->rows[r], plan_->scales[r]}, shape, part + i);
          }
        }
      }
    }
  }

  // Headers of the message to the node's ranks, places of its row to the plan; a lane an entry. One
  // warp.
  __device__ void plan_message(uint32_t remote, uint32_t src_rank, uint32_t slot, bool writes,
                               const cuda::TokenSets& sets) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout_.config().top_k;
    const std::byte* message = message_at(remote, slot);
    const uint4 header = ptx::ld_row(reinterpret_cast<const uint4*>(message));
    const uint32_t num_columns = sets.ranks_of(slot);
    __syncwarp();  // the last message's plan has been read
#pragma unroll 1
    for (uint32_t first = 0; first < top_k; first += kWarp) {
      const uint32_t j = first + lane;
      const bool is_entry = j < header.z;
      Entry entry = {};
      if (is_entry) entry = load_entry(message, j);
      const uint32_t number = is_entry ? rank_in_node(entry.expert) : cuda::kNoRank;
      const uint32_t alike = __match_any_sync(cuda::kAllLanes, number);
      if (!is_entry) continue;
      uint32_t entry_idx = __popc(alike & ((1u << lane) - 1)), num_entries = __popc(alike);
      if (top_k > kWarp) {
        entry_idx = num_entries = 0;
#pragma unroll 1
        for (uint32_t i = 0; i < header.z; ++i) {
          const bool is_alike = rank_in_node(load_entry(message, i).expert) == number;
          entry_idx += is_alike && i < j;
          num_entries += is_alike;
        }
      }
      const uint32_t column = sets.ranks_below(number, slot);
      const uint32_t dst_slot = sets.before_rank(number, slot);
      const uint32_t dst_rank = rank_.nodes.neighbour(number), bank = op_.bank();
      std::byte* peer = op_.peer(dst_rank);
      if (writes) {
        std::byte* out = peer + layout_.header(bank, src_rank, dst_slot);
        auto* entries = reinterpret_cast<cuda::ExpertEntry*>(out + sizeof(cuda::MessageHeader));
        entries[entry_idx] = {
            static_cast<uint16_t>(entry.expert - rank_.owners.first_expert(dst_rank)),
            static_cast<uint16_t>(entry.k), entry.position, entry.weight};
        if (entry_idx == 0) {
          *reinterpret_cast<cuda::MessageHeader*>(out) = {
              header.x, slot * multi_node_.num_columns() + column, num_entries, op_.tag()};
        }
      }
      if (entry_idx == 0) {
        plan_->rows[column] = peer + layout_.inbox_row(bank, src_rank, dst_slot);
        plan_->scales[column] =
            cuda::at<float>(peer, layout_.inbox_scales(bank, src_rank, dst_slot));
      }
    }
    if (lane == 0) {
      plan_->num_rows = num_columns;
      if (writes) {
        const uint64_t i = uint64_t{remote} * layout_.config().num_max_tokens_per_rank + slot;
        forwarded_.messages[i] = {header.y, num_columns};
      }
    }
    __syncwarp();
  }

  // As OpOf::is_last_block, of the blocks that have this node.
  __device__ bool is_last_block(uint32_t remote, const Share& share) const {
    __shared__ bool is_last;
    __syncthreads();
    if (share.num_blocks == 1) return true;
    if (threadIdx.x == 0) {
      uint32_t* num_finished = rank_.num_finished + remote;
      is_last = ptx::atom_add_acq_rel_gpu(num_finished, 1) == share.num_blocks - 1;
      if (is_last) *num_finished = 0;
    }
    __syncthreads();
    return is_last;
  }

  // As the source would signal to the node's ranks.
  __device__ void signal_neighbours(uint32_t src_rank, const cuda::TokenSets& sets) const {
    const uint64_t word = layout_.signal(op_.bank(), Phase::kDispatch, src_rank);
    for (uint32_t i = threadIdx.x; i < rank_.num_local(); i += blockDim.x) {
      ptx::fence_acq_rel_sys();
      ptx::st_relaxed_sys(cuda::at<uint64_t>(op_.peer(rank_.nodes.neighbour(i)), word),
                          protocol::pack_signal(op_.epoch(), sets.tokens_of_rank(i)));
    }
  }

  const HierarchicalView& rank_;
  const protocol::LowLatencyLayout& layout_;
  const protocol::MultiNodeLayout& multi_node_;
  const HierarchicalOp& op_;
  uint32_t* shared_;
  Forwarded forwarded_;
  Plan* plan_;
  NodeExperts experts_;
};

}  // namespace ep::nvshmem
