// Dispatch on a GPU. The meaning, and the worked example, are in csrc/cpu/low_latency_dispatch.cpp.
//
// send: every block finds out by itself which tokens go where (a bit for each token under its
//       experts and ranks), so that slots and positions need no word from other blocks. A warp
//       plans a token, then the block copies the rows of all its warps' tokens. The last block to
//       finish signals.
// recv: every block waits for all signals. A warp places a message, then the block copies the
//       payloads of all its warps' messages. The last block to finish credits.

#include "cuda/launch.cuh"
#include "cuda/rank.cuh"

namespace ep::cuda {
namespace {

using protocol::ExpertEntry;
using protocol::MessageHeader;

constexpr uint32_t kMaxTopK = protocol::kMaxTopK;
constexpr uint32_t kWarp = 32;
// Tokens or messages that a block has planned and not yet copied: one a warp.
constexpr uint32_t kMaxWarps = 16;

struct Routing {
  const DispatchSendParams& params;
  const protocol::ExpertPartition partition;
  uint32_t top_k;

  // -1 where the token has no k-th expert.
  __device__ int64_t expert(uint32_t token, uint32_t k) const {
    const uint64_t i = uint64_t{token} * top_k + k;
    return params.topk_idx_is_int64 ? static_cast<const int64_t*>(params.topk_idx)[i]
                                    : static_cast<const int32_t*>(params.topk_idx)[i];
  }
};

// In shared memory: for every expert, then for every rank, a bit for each token that goes there.
//
//   row 0 .. E - 1: experts, row E .. E + R - 1: ranks; num_words words of 32 tokens each
//
// Example, E = 4, R = 2, tokens 0 -> experts (0, 2), 1 -> (3, 2): rows 0b01 0b00 0b11 0b10 of the
// experts, 0b01 0b11 of the ranks. Token 1 is message 1 and row 1 of expert 2: one bit below it.
class TokenSets {
 public:
  __device__ TokenSets(uint32_t* bits, uint32_t num_tokens, uint32_t num_experts)
      : bits_(bits), num_words_((num_tokens + 31) / 32), num_experts_(num_experts) {}

  // Whole block. False where some expert does not exist.
  __device__ bool fill(const Op& op, const Routing& routing) {
    const uint32_t num_rows = num_experts_ + routing.partition.num_ranks;
    for (uint32_t i = threadIdx.x; i < num_rows * num_words_; i += blockDim.x) bits_[i] = 0;
    __syncthreads();
    bool ok = true;
    const uint32_t num_routes = routing.params.num_tokens * routing.top_k;
    for (uint32_t i = threadIdx.x; i < num_routes; i += blockDim.x) {
      const uint32_t token = i / routing.top_k, k = i % routing.top_k;
      const int64_t expert = routing.expert(token, k);
      if (expert == -1) continue;
      if (expert < -1 || expert >= num_experts_) {
        ok = op.refuse_expert(token, k, expert);
        continue;
      }
      const uint32_t bit = 1u << (token % 32);
      atomicOr(row(expert) + token / 32, bit);
      atomicOr(row(num_experts_ + routing.partition.owner(expert)) + token / 32, bit);
    }
    return __syncthreads_and(ok);
  }

  __device__ uint32_t tokens_of_expert(uint32_t expert) const {
    return count(expert, num_words_ * 32);
  }
  __device__ uint32_t tokens_of_rank(uint32_t rank) const {
    return count(num_experts_ + rank, num_words_ * 32);
  }
  // Tokens below `token` that go to the expert, or to the rank.
  __device__ uint32_t before_expert(uint32_t expert, uint32_t token) const {
    return count(expert, token);
  }
  __device__ uint32_t before_rank(uint32_t rank, uint32_t token) const {
    return count(num_experts_ + rank, token);
  }

 private:
  __device__ uint32_t* row(uint32_t r) const { return bits_ + r * num_words_; }
  __device__ uint32_t count(uint32_t r, uint32_t end_token) const {
    uint32_t num_tokens = 0;
    for (uint32_t w = 0; w < end_token / 32; ++w) num_tokens += __popc(row(r)[w]);
    if (end_token % 32 != 0) {
      num_tokens += __popc(row(r)[end_token / 32] & ((1u << (end_token % 32)) - 1));
    }
    return num_tokens;
  }

  uint32_t* bits_;
  uint32_t num_words_;
  uint32_t num_experts_;
};

// What one warp has found out about one token.
struct TokenPlan {
  int16_t rank[kMaxTopK];  // of each route; -1: not routed
  bool is_first_of_rank[kMaxTopK];
  std::byte* payload[kMaxTopK];  // of each message, by outcome column
  uint32_t num_messages;
};

// Headers and entries go to the peers; the plan says where the row goes. One warp, a lane a route.
__device__ void plan_token(const Op& op, const RankView& rank, const Routing& routing,
                           const TokenSets& sets, uint32_t token, TokenPlan* plan) {
  const LowLatencyLayout& layout = rank.layout;
  const uint32_t lane = threadIdx.x % kWarp, top_k = routing.top_k;
  for (uint32_t k = lane; k < top_k; k += kWarp) {
    const int64_t expert = routing.expert(token, k);
    plan->rank[k] = expert < 0 ? -1 : static_cast<int16_t>(routing.partition.owner(expert));
  }
  __syncwarp();
  uint32_t num_messages = 0;
  for (uint32_t k = lane; k < top_k; k += kWarp) {
    bool is_first = plan->rank[k] >= 0;
    for (uint32_t j = 0; j < k; ++j) is_first &= plan->rank[j] != plan->rank[k];
    plan->is_first_of_rank[k] = is_first;
    num_messages += is_first;
  }
  num_messages = __reduce_add_sync(0xffffffff, num_messages);
  if (lane == 0) {
    plan->num_messages = num_messages;
    routing.params.num_partials[token] = num_messages;
  }
  __syncwarp();
  for (uint32_t k = lane; k < top_k; k += kWarp) {
    const int32_t dst_rank = plan->rank[k];
    if (dst_rank < 0) continue;
    uint32_t column = 0, entry_idx = 0, num_entries = 0;
    for (uint32_t j = 0; j < top_k; ++j) {
      column += plan->is_first_of_rank[j] && plan->rank[j] < dst_rank;
      entry_idx += j < k && plan->rank[j] == dst_rank;
      num_entries += plan->rank[j] == dst_rank;
    }
    const auto expert = static_cast<uint32_t>(routing.expert(token, k));
    std::byte* message = op.peer(dst_rank) + layout.message(op.bank(), rank.self_rank,
                                                            sets.before_rank(dst_rank, token));
    reinterpret_cast<ExpertEntry*>(message + sizeof(MessageHeader))[entry_idx] = {
        static_cast<uint16_t>(expert - routing.partition.first_expert(dst_rank)),
        static_cast<uint16_t>(k), sets.before_expert(expert, token),
        routing.params.topk_weights[uint64_t{token} * top_k + k]};
    if (entry_idx == 0) {
      *reinterpret_cast<MessageHeader*>(message) = {token,
                                                    token * layout.num_outcome_columns() + column,
                                                    num_entries, static_cast<uint32_t>(op.epoch())};
      plan->payload[column] = message + layout.payload_in_message();
    }
  }
}

// Rows for every expert to the peers' counts, a part of them by each block.
__device__ void publish_counts(const Op& op, const RankView& rank, const TokenSets& sets) {
  const auto& partition = rank.layout.partition();
  for (uint32_t expert = blockIdx.x * blockDim.x + threadIdx.x; expert < partition.num_experts;
       expert += gridDim.x * blockDim.x) {
    const uint32_t owner = partition.owner(expert);
    auto* counts = at<uint64_t>(op.peer(owner), rank.layout.counts(op.bank(), rank.self_rank));
    counts[expert - partition.first_expert(owner)] =
        protocol::pack_signal(op.epoch(), sets.tokens_of_expert(expert));
  }
}

template <typename Vector>
__global__ void dispatch_send_kernel(const __grid_constant__ RankView rank,
                                     const __grid_constant__ DispatchSendParams params) {
  extern __shared__ uint32_t shared[];
  __shared__ TokenPlan plans[kMaxWarps];
  const Op op(rank, Phase::kDispatch, Half::kSend);
  const Routing routing{params, rank.layout.partition(), rank.layout.config().top_k};
  TokenSets sets(shared, params.num_tokens, routing.partition.num_experts);
  if (!op.start_send() || !sets.fill(op, routing)) return;

  publish_counts(op, rank, sets);
  const uint32_t num_warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const uint32_t num_vectors = rank.layout.row_bytes() / sizeof(Vector);
  for (uint32_t first = blockIdx.x; first < params.num_tokens; first += gridDim.x * num_warps) {
    const uint32_t own_token = first + warp * gridDim.x;
    if (own_token < params.num_tokens) {
      plan_token(op, rank, routing, sets, own_token, &plans[warp]);
    }
    __syncthreads();
    for (uint32_t w = 0; w < num_warps && first + w * gridDim.x < params.num_tokens; ++w) {
      const uint64_t token = first + w * gridDim.x;
      const auto* row = reinterpret_cast<const Vector*>(params.x + token * rank.layout.row_bytes());
      for (uint32_t i = threadIdx.x; i < num_vectors; i += blockDim.x) {
        const Vector vector = row[i];
        for (uint32_t m = 0; m < plans[w].num_messages; ++m) {
          reinterpret_cast<Vector*>(plans[w].payload[m])[i] = vector;
        }
      }
    }
    __syncthreads();  // the plans are used again
  }
  if (op.is_last_block()) op.publish_signals([&](uint32_t r) { return sets.tokens_of_rank(r); });
}

// Rows that sources before `src_rank` send to the expert.
__device__ uint32_t rows_before(const Op& op, const LowLatencyLayout& layout, uint32_t src_rank,
                                uint32_t local_expert) {
  uint32_t num_rows = 0;
#pragma unroll 8
  for (uint32_t r = 0; r < src_rank; ++r) {
    const auto* counts = at<uint64_t>(op.self(), layout.counts(op.bank(), r));
    num_rows += static_cast<uint32_t>(protocol::signal_count(counts[local_expert]));
  }
  return num_rows;
}

// What one warp has found out about one message.
struct MessagePlan {
  const std::byte* payload;
  uint32_t rows[kMaxTopK];
  uint32_t num_entries;
};

// Header of message `m` -> the handle, and the rows its payload goes to. One warp, a lane an entry.
// False, on some lanes: memory contradicts its signal.
__device__ bool place_message(const Op& op, const RankView& rank, const DispatchRecvParams& params,
                              uint32_t m, uint32_t src_rank, uint32_t slot, MessagePlan* plan) {
  const LowLatencyLayout& layout = rank.layout;
  const std::byte* message = op.self() + layout.message(op.bank(), src_rank, slot);
  const MessageHeader header = *reinterpret_cast<const MessageHeader*>(message);
  const uint32_t lane = threadIdx.x % kWarp, top_k = layout.config().top_k;
  const auto epoch_tag = static_cast<uint32_t>(op.epoch());
  if (header.epoch_tag != epoch_tag || header.num_entries < 1 || header.num_entries > top_k ||
      header.outcome_slot >= layout.num_outcome_slots()) {
    return op.fail(Status::kCorrupt, src_rank, epoch_tag, header.epoch_tag, 0);
  }
  if (lane == 0) {
    plan->payload = message + layout.payload_in_message();
    plan->num_entries = header.num_entries;
    params.handle.messages[m] = {header.src_token, header.outcome_slot, m * top_k,
                                 header.num_entries};
  }
  const uint32_t num_local_experts = layout.partition().num_local_experts(rank.self_rank);
  for (uint32_t j = lane; j < header.num_entries; j += kWarp) {
    const ExpertEntry entry =
        reinterpret_cast<const ExpertEntry*>(message + sizeof(MessageHeader))[j];
    if (entry.local_expert >= num_local_experts) {
      return op.fail(Status::kCorrupt, src_rank, num_local_experts, entry.local_expert, 0);
    }
    const uint64_t in_expert =
        rows_before(op, layout, src_rank, entry.local_expert) + uint64_t{entry.position};
    if (in_expert >= layout.expert_capacity()) {
      return op.fail(Status::kCorrupt, src_rank, layout.expert_capacity(), in_expert, 0);
    }
    const uint64_t row = entry.local_expert * layout.expert_capacity() + in_expert;
    plan->rows[j] = static_cast<uint32_t>(row);
    params.handle.entries[uint64_t{m} * top_k + j] = {plan->rows[j], entry.weight};
  }
  return true;
}

// Counts of every expert and source, a part of them by each block.
__device__ void write_counts(const Op& op, const RankView& rank, const DispatchRecvParams& params,
                             const uint32_t* num_messages) {
  const LowLatencyLayout& layout = rank.layout;
  const uint32_t num_ranks = layout.config().num_ranks;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  for (uint32_t e = thread; e < layout.partition().num_local_experts(rank.self_rank); e += step) {
    params.num_recv_tokens_per_expert[e] = rows_before(op, layout, num_ranks, e);
  }
  for (uint32_t r = thread; r < num_ranks; r += step) {
    params.handle.num_messages[r] = num_messages[r];
  }
}

template <typename Vector>
__global__ void dispatch_recv_kernel(const __grid_constant__ RankView rank,
                                     const __grid_constant__ DispatchRecvParams params) {
  extern __shared__ uint32_t shared[];  // messages [R], prefix [R + 1]
  __shared__ MessagePlan plans[kMaxWarps];
  const LowLatencyLayout& layout = rank.layout;
  const uint32_t num_ranks = layout.config().num_ranks;
  const Op op(rank, Phase::kDispatch, Half::kRecv);
  uint32_t *num_messages = shared, *prefix = shared + num_ranks;
  if (!op.start_recv(num_messages)) return;
  prefix_sum(num_messages, num_ranks, prefix);

  const uint32_t num_warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const uint32_t num_vectors = layout.row_bytes() / sizeof(Vector), total = prefix[num_ranks];
  for (uint32_t first = blockIdx.x; first < total; first += gridDim.x * num_warps) {
    const uint32_t own = first + warp * gridDim.x;
    bool ok = true;
    if (own < total) {
      const uint32_t src_rank = source_of(prefix, num_ranks, own);
      ok = place_message(op, rank, params, own, src_rank, own - prefix[src_rank], &plans[warp]);
    }
    if (!__syncthreads_and(ok)) return;
    for (uint32_t w = 0; w < num_warps && first + w * gridDim.x < total; ++w) {
      const auto* payload = reinterpret_cast<const Vector*>(plans[w].payload);
      for (uint32_t i = threadIdx.x; i < num_vectors; i += blockDim.x) {
        const Vector vector = payload[i];
        for (uint32_t j = 0; j < plans[w].num_entries; ++j) {
          reinterpret_cast<Vector*>(params.recv_x + plans[w].rows[j] * layout.row_bytes())[i] =
              vector;
        }
      }
    }
    __syncthreads();  // the plans are used again
  }
  write_counts(op, rank, params, num_messages);
  if (op.is_last_block()) op.publish_credits();
}

}  // namespace

uint64_t dispatch_send_shared_bytes(const protocol::LowLatencyConfig& config, uint32_t num_tokens) {
  return uint64_t{config.num_experts + config.num_ranks} * ((num_tokens + 31) / 32) * 4;
}

void launch_dispatch_send(const RankView& rank, const DispatchSendParams& params,
                          const Launch& launch) {
  const uint64_t shared_bytes = dispatch_send_shared_bytes(rank.layout.config(), params.num_tokens);
  with_vector(rank.layout.row_bytes(), [&](auto vector) {
    auto* kernel = dispatch_send_kernel<decltype(vector)>;
    if (shared_bytes > kDefaultSharedBytes) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    launch.run(kernel, shared_bytes, rank, params);
  });
}

void launch_dispatch_recv(const RankView& rank, const DispatchRecvParams& params,
                          const Launch& launch) {
  const size_t shared_bytes = (2 * rank.layout.config().num_ranks + 1) * sizeof(uint32_t);
  with_vector(rank.layout.row_bytes(), [&](auto vector) {
    launch.run(dispatch_recv_kernel<decltype(vector)>, shared_bytes, rank, params);
  });
}

}  // namespace ep::cuda
