// What a rank does with what has come in a round of a dispatch: it passes on to its node what other
// nodes have put for that, and copies out what is for itself.
#pragma once

#include "nvshmem/normal_routes.cuh"
#include "protocol/scales.h"

namespace ep::nvshmem::normal {

using protocol::kMaxTopK;

// Where a warp writes a token: a message, with the experts of these ranks.
struct Target {
  std::byte* message;
  uint16_t first_rank, last_rank;
  uint16_t remote, slot;  // of another node
};

// What a dispatch is doing, in shared memory.
struct DispatchShared {
  SourceRows rows;
  Target targets[kNodeWarps][kMaxTopK];
  uint32_t next_row[kMaxRanks], num_in_round[kMaxRanks];  // of each source
  uint32_t num_from_node[kMaxRanks];                      // of each other node, in this round
  uint32_t num_forwarded[kMaxRanks];                      // [V, G] in this round, by this block
  uint32_t prefix[kMaxRanks + 1];
};

// A message's parts, from its first byte on.
struct Message {
  std::byte* base;
  const NormalNodeLayout& layout;

  __device__ int32_t* experts() const { return reinterpret_cast<int32_t*>(base); }
  __device__ float* weights() const {
    return reinterpret_cast<float*>(base + layout.weights_in_message());
  }
  __device__ int32_t* token() const {
    return reinterpret_cast<int32_t*>(base + layout.token_in_message());
  }
  __device__ std::byte* row() const { return base + layout.row_in_message(); }
  __device__ float* scales() const {
    return reinterpret_cast<float*>(base + layout.scales_in_message());
  }
};

// Other nodes' tokens, for ranks of this one.
class Forwarder {
 public:
  __device__ Forwarder(const NodeOp& op, const NodeDispatch& params, DispatchShared* shared)
      : op_(op),
        layout_(op.nodes_layout()),
        is_cached_(params.is_cached),
        shared_(*shared),
        targets_(shared->targets[threadIdx.x / kWarp]),
        lane_(threadIdx.x % kWarp) {}

  // Waits for: this rank's sources on other nodes. Whole block. False: end the kernel.
  __device__ bool run(uint32_t round) const {
    bool ok = true;
    const uint32_t thread = threadIdx.x, num_remote = op_.num_remote();
    const uint32_t num_pairs = num_remote * op_.nodes().ranks_per_node;
    if (thread < num_pairs) shared_.num_forwarded[thread] = 0;
    if (thread < num_remote) {
      uint32_t count = 0;
      ok = op_.wait_for_node_signal(round, thread, &count);
      if (ok && count > op_.per_round()) {
        ok = op_.corrupt(round, op_.view().forwarder_on(thread), op_.per_round(), count);
      }
      ok = ok && op_.have_arrived(round, Arrival::kDispatch, thread, count + (count > 0));
      shared_.num_from_node[thread] = count;
    }
    if (!__syncthreads_and(ok)) return false;
    const uint32_t num_messages = count_up(
        num_remote, shared_.prefix, [&](uint32_t remote) { return shared_.num_from_node[remote]; });
    const uint32_t step = gridDim.x * kNodeWarps;
    for (uint32_t i = thread / kWarp * gridDim.x + blockIdx.x; i < num_messages; i += step) {
      const uint32_t remote = cuda::source_of(shared_.prefix, num_remote, i);
      ok = forward(round, remote, i - shared_.prefix[remote]) && ok;
    }
    if (!__syncthreads_and(ok)) return false;
    uint32_t* of_round = op_.rank().num_forwarded + round % kRoundsInFlight * num_pairs;
    if (thread < num_pairs && shared_.num_forwarded[thread] > 0) {
      atomicAdd(&of_round[thread], shared_.num_forwarded[thread]);
    }
    if (op_.arrive(Step::kForwarded, round) && thread < num_pairs) {
      const uint32_t count = ptx::ld_relaxed_gpu(&of_round[thread]);
      of_round[thread] = 0;  // for another round
      const uint32_t remote = thread / op_.nodes().ranks_per_node;
      op_.publish_signal(round, op_.view().forwarder_on(remote),
                         op_.view().neighbour(thread % op_.nodes().ranks_per_node), count);
    }
    return true;
  }

 private:
  // Whole warp.
  __device__ bool forward(uint32_t round, uint32_t remote, uint32_t slot) const {
    const uint32_t src_rank = op_.view().forwarder_on(remote), bank = op_.bank(round);
    const Message in = {op_.self() + layout_.node_inbox(bank, remote, slot), layout_};
    Route route;
    __syncwarp();  // the targets of the message before have been used
    if (!route.read(op_, round, remote, slot)) return false;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t i = half * kWarp + lane_;
      if (i >= route.num_ranks) continue;
      const uint32_t r = route.messages[half] >> 16, dst_slot = route.messages[half] & 0xffff;
      targets_[i].message = op_.neighbour(r) + layout_.base().message(bank, src_rank, dst_slot);
      targets_[i].first_rank = static_cast<uint16_t>(r);
      const uint32_t pair = remote * op_.nodes().ranks_per_node + op_.nodes().rank_in_node(r);
      atomicAdd(&shared_.num_forwarded[pair], 1);
    }
    __syncwarp();
    if (!is_cached_) write_routes(in, route.num_ranks);
    copy_row(in, route.num_ranks);
    return true;
  }

  // With each rank's experts alone, by their number there.
  __device__ void write_routes(const Message& in, uint32_t num_targets) const {
    const cuda::Owners& owners = op_.rank().owners;
    const auto first_of_node = static_cast<int32_t>(owners.first_expert(op_.view().neighbour(0)));
    const auto* words = reinterpret_cast<const uint32_t*>(in.experts());
    const auto* weight_words = reinterpret_cast<const uint32_t*>(in.weights());
    for (uint32_t k = lane_; k < layout_.base().config().top_k; k += kWarp) {
      const auto listed = static_cast<int32_t>(ptx::ld_relaxed_sys(words + k));
      const float weight = __uint_as_float(ptx::ld_relaxed_sys(weight_words + k));
      for (uint32_t t = 0; t < num_targets; ++t) {
        const Message out = {targets_[t].message, layout_};
        const uint32_t r = targets_[t].first_rank;
        const auto first = static_cast<int32_t>(owners.first_expert(r)) - first_of_node;
        const auto end = static_cast<int32_t>(owners.first_expert(r + 1)) - first_of_node;
        const bool is_own = listed >= 0 && listed >= first && listed < end;
        out.experts()[k] = is_own ? listed - first : -1;
        out.weights()[k] = is_own ? weight : 0.0f;
      }
    }
    const uint32_t token = ptx::ld_relaxed_sys(reinterpret_cast<const uint32_t*>(in.token()));
    for (uint32_t t = lane_; t < num_targets; t += kWarp) {
      *Message{targets_[t].message, layout_}.token() = static_cast<int32_t>(token);
    }
  }

  // The row, and its scales behind it, read once.
  __device__ void copy_row(const Message& in, uint32_t num_targets) const {
    constexpr uint32_t kAtOnce = 4;
    const uint64_t num_bytes = layout_.dispatch_bytes() - layout_.row_in_message();
    const auto num_vectors = static_cast<uint32_t>((num_bytes + 15) / 16);
    const auto* from = reinterpret_cast<const uint4*>(in.row());
    for (uint32_t first = lane_; first < num_vectors; first += kAtOnce * kWarp) {
      uint4 vectors[kAtOnce];
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        if (first + v * kWarp < num_vectors) vectors[v] = ptx::ld_row(from + first + v * kWarp);
      }
      for (uint32_t t = 0; t < num_targets; ++t) {
        auto* to = reinterpret_cast<uint4*>(Message{targets_[t].message, layout_}.row()) + first;
#pragma unroll
        for (uint32_t v = 0; v < kAtOnce; ++v) {
          if (first + v * kWarp < num_vectors) to[v * kWarp] = vectors[v];
        }
      }
    }
  }

  const NodeOp& op_;
  const NormalNodeLayout& layout_;
  bool is_cached_;
  DispatchShared& shared_;
  Target* targets_;
  uint32_t lane_;
};

// What has come for this rank.
class Receiver {
 public:
  __device__ Receiver(const NodeOp& op, const NodeDispatch& params, DispatchShared* shared)
      : op_(op), layout_(op.nodes_layout()), params_(params), shared_(*shared) {
    if (threadIdx.x < op.num_ranks()) {
      shared_.next_row[threadIdx.x] = shared_.rows.first_row[threadIdx.x];
      shared_.num_in_round[threadIdx.x] = 0;
    }
    __syncthreads();
  }

  // Waits for: every source's messages of this round. Whole block. False: end the kernel.
  __device__ bool run(uint32_t round) const {
    const uint32_t num_ranks = op_.num_ranks(), bank = op_.bank(round);
    const bool ok = threadIdx.x >= num_ranks || wait_for(round, threadIdx.x);
    if (!__syncthreads_and(ok)) return false;
    const uint32_t num_messages = count_up(num_ranks, shared_.prefix,
                                           [&](uint32_t src) { return shared_.num_in_round[src]; });
    const uint32_t step = gridDim.x * kNodeWarps;
    for (uint32_t i = threadIdx.x / kWarp * gridDim.x + blockIdx.x; i < num_messages; i += step) {
      const uint32_t src = cuda::source_of(shared_.prefix, num_ranks, i);
      const uint32_t slot = i - shared_.prefix[src];
      unpack(bank, src, slot, uint64_t{shared_.next_row[src]} + slot);
    }
    if (op_.arrive(Step::kReceived, round)) {
      op_.publish_credits(round, Arrival::kDispatch, Arrival::kDispatch);
    }
    return true;
  }

  // Rows behind N list no expert and come from no token. All blocks.
  __device__ void mark_unused() const {
    if (params_.recv_topk_idx == nullptr) return;
    const uint64_t top_k = layout_.base().config().top_k;
    const uint64_t num_rows = shared_.rows.first_row[op_.num_ranks()];
    const uint64_t thread = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const uint64_t num_threads = uint64_t{gridDim.x} * blockDim.x;
    for (uint64_t i = num_rows * top_k + thread; i < params_.num_rows * top_k; i += num_threads) {
      params_.recv_topk_idx[i] = -1;
      params_.recv_topk_weights[i] = 0.0f;
    }
    for (uint64_t i = num_rows + thread; i < params_.num_rows; i += num_threads) {
      params_.recv_src_tokens[i] = -1;
    }
  }

 private:
  // Counts that contradict those of the batch must not choose where we write.
  __device__ bool wait_for(uint32_t round, uint32_t src) const {
    uint32_t count;
    if (!op_.wait_for_signal(round, src, op_.view().forwarder_here(src), &count)) return false;
    shared_.next_row[src] += shared_.num_in_round[src];
    shared_.num_in_round[src] = count;
    const uint32_t num_left = shared_.rows.first_row[src + 1] - shared_.next_row[src];
    const bool is_last = round + 1 == shared_.rows.num_rounds;
    const bool is_fine =
        count <= op_.per_round() && count <= num_left && (!is_last || count == num_left);
    return is_fine || op_.corrupt(round, src, num_left, count);
  }

  // One warp.
  __device__ void unpack(uint32_t bank, uint32_t src, uint32_t slot, uint64_t row) const {
    const auto& layout = layout_.base();
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout.config().top_k;
    const Message in = {op_.self() + layout.message(bank, src, slot), layout_};
    cuda::normal::copy_flat(params_.recv_x + row * layout.dispatch_row_bytes(), in.row(),
                            layout.dispatch_row_bytes(), lane, kWarp);
    for (uint32_t word = lane; word < layout.num_scale_words(); word += kWarp) {
      params_.recv_scales[row * layout.num_scale_words() + word] = protocol::scale_word(
          layout.config().scale_format, in.scales(), layout.num_scales(), word);
    }
    if (params_.is_cached) return;
    const auto* experts = reinterpret_cast<const uint32_t*>(in.experts());
    const auto* weights = reinterpret_cast<const uint32_t*>(in.weights());
    for (uint32_t k = lane; k < top_k; k += kWarp) {
      params_.recv_topk_idx[row * top_k + k] =
          static_cast<int32_t>(ptx::ld_relaxed_sys(experts + k));
      params_.recv_topk_weights[row * top_k + k] =
          __uint_as_float(ptx::ld_relaxed_sys(weights + k));
    }
    if (lane == 0) {
      params_.recv_src_tokens[row] =
          static_cast<int32_t>(ptx::ld_relaxed_sys(reinterpret_cast<const uint32_t*>(in.token())));
    }
  }

  const NodeOp& op_;
  const NormalNodeLayout& layout_;
  const NodeDispatch& params_;
  DispatchShared& shared_;
};

}  // namespace ep::nvshmem::normal
