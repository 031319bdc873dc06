// Who gets which token, and where: found out by every block for itself.
#pragma once

#include "cuda/rank.cuh"
#include "protocol/message.h"

namespace ep::cuda {

using protocol::kMaxTopK;

struct Routing {
  const void* topk_idx;
  bool is_int64;
  const float* topk_weights;
  uint32_t num_tokens;
  uint32_t num_ranks, num_experts;
  uint32_t top_k;
  Owners owners;

  __device__ Routing(const RankView& rank, const protocol::DispatchSendParams& params)
      : topk_idx(params.topk_idx),
        is_int64(params.topk_idx_is_int64),
        topk_weights(params.topk_weights),
        num_tokens(params.num_tokens),
        num_ranks(rank.layout.config().num_ranks),
        num_experts(rank.layout.config().num_experts),
        top_k(rank.layout.config().top_k),
        owners(rank.owners) {}

  // -1 where the token has no k-th expert.
  __device__ int64_t expert(uint32_t token, uint32_t k) const {
    const uint32_t i = token * top_k + k;
    return is_int64 ? static_cast<const int64_t*>(topk_idx)[i]
                    : static_cast<const int32_t*>(topk_idx)[i];
  }
  __device__ float weight(uint32_t token, uint32_t k) const {
    return topk_weights == nullptr ? 0.0f : topk_weights[token * top_k + k];
  }
  // The rank that gets the token's message for that expert.
  __device__ uint32_t destination(uint32_t expert) const { return owners.owner(expert); }
};

// In shared memory: who gets which token, as bits.
//
//   tokens  [E][num_words], then [R][num_words]  of an expert, of a rank: bit t for token t
//   ranks   [T][num_rank_words]                  of a token: bit r for rank r
//
// Example, E = 4, R = 2, tokens 0 -> experts (0, 2), 1 -> (3, 2): the experts' bits are 0b01 0b00
// 0b11 0b10, the ranks' 0b01 0b11, the tokens' 0b11 0b10. Token 1 is message 1 to rank 1 and row 1
// of expert 2: one bit below it.
class TokenSets {
 public:
  // `with_experts`: else only who gets which token is found out, and nothing of experts.
  __device__ TokenSets(uint32_t* shared, const Routing& routing, bool with_experts = true)
      : TokenSets(shared, routing.num_tokens, routing.num_ranks,
                  with_experts ? routing.num_experts : 0) {}
  // Filled with add().
  __device__ TokenSets(uint32_t* shared, uint32_t num_tokens, uint32_t num_ranks,
                       uint32_t num_experts)
      : num_words_(words(num_tokens)),
        num_rank_words_(words(num_ranks)),
        num_experts_(num_experts),
        num_ranks_(num_ranks),
        num_tokens_(num_tokens),
        tokens_(shared),
        ranks_(shared + (num_experts_ + num_ranks_) * num_words_) {}

  __host__ __device__ static uint64_t num_bytes(const protocol::LowLatencyConfig& config,
                                                uint32_t num_tokens, bool with_experts = true) {
    return num_bytes(num_tokens, config.num_ranks, with_experts ? config.num_experts : 0);
  }
  __host__ __device__ static uint64_t num_bytes(uint32_t num_tokens, uint32_t num_ranks,
                                                uint32_t num_experts) {
    const uint64_t num_rows = uint64_t{num_experts} + num_ranks;
    return (num_rows * words(num_tokens) + uint64_t{num_tokens} * words(num_ranks)) * 4;
  }

  // Whole block; touches shared memory only, so it may run before the kernel's turn.
  __device__ void clear() {
    const uint32_t num_all =
        (num_experts_ + num_ranks_) * num_words_ + num_tokens_ * num_rank_words_;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < num_all; i += blockDim.x) tokens_[i] = 0;
  }
  // Whole block, after clear() and a barrier. False, on some threads, where some expert does not
  // exist. A barrier must follow. `first`: the expert of the first route that this thread looks at.
  template <typename AnyRouting>
  __device__ bool fill(const RankView& rank, const AnyRouting& routing, int64_t first) {
    bool ok = true;
    const uint32_t shift = ceil_log2(routing.top_k);  // no division
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < routing.num_tokens << shift; i += blockDim.x) {
      const uint32_t token = i >> shift, k = i & ((1u << shift) - 1);
      if (k >= routing.top_k) continue;
      const int64_t expert = i == threadIdx.x ? first : routing.expert(token, k);
      if (expert == -1) continue;
      if (expert < -1 || expert >= routing.num_experts) {
        ok = refuse_expert(rank, token, k, expert);
        continue;
      }
      const auto e = static_cast<uint32_t>(expert);
      add(token, e, routing.destination(e));
    }
    return ok;
  }
  // The token has that expert, and goes to that rank.
  __device__ void add(uint32_t token, uint32_t expert, uint32_t rank) const {
    const uint32_t bit = 1u << (token % 32);
    if (num_experts_ > 0) atomicOr(tokens_ + expert * num_words_ + token / 32, bit);
    atomicOr(tokens_ + (num_experts_ + rank) * num_words_ + token / 32, bit);
    atomicOr(ranks_ + token * num_rank_words_ + rank / 32, 1u << (rank % 32));
  }
  // The expert that fill() wants to know beforehand, or -1; and its weight comes nearer.
  __device__ static int64_t first_expert(const Routing& routing) {
    const uint32_t shift = ceil_log2(routing.top_k);
    const uint32_t token = threadIdx.x >> shift, k = threadIdx.x & ((1u << shift) - 1);
    if (token >= routing.num_tokens || k >= routing.top_k) return -1;
    if (routing.topk_weights != nullptr) {
      ptx::prefetch_l1(routing.topk_weights + token * routing.top_k + k);
    }
    return routing.expert(token, k);
  }

  __device__ uint32_t tokens_of_expert(uint32_t expert) const {
    return count_all(tokens_ + expert * num_words_);
  }
  __device__ uint32_t tokens_of_rank(uint32_t rank) const {
    return count_all(tokens_ + (num_experts_ + rank) * num_words_);
  }
  // Tokens below `token` that go to the expert, or to the rank.
  __device__ uint32_t before_expert(uint32_t expert, uint32_t token) const {
    return count(tokens_ + expert * num_words_, token);
  }
  __device__ uint32_t before_rank(uint32_t rank, uint32_t token) const {
    return count(tokens_ + (num_experts_ + rank) * num_words_, token);
  }
  // Ranks that get the token, all and those below `rank`.
  __device__ uint32_t ranks_of(uint32_t token) const {
    return count(ranks_ + token * num_rank_words_, num_rank_words_ * 32);
  }
  __device__ uint32_t ranks_below(uint32_t rank, uint32_t token) const {
    return count(ranks_ + token * num_rank_words_, rank);
  }
  // Of ranks 32 * word .. 32 * word + 31, those that get the token.
  __device__ uint32_t rank_word(uint32_t token, uint32_t word) const {
    return ranks_[token * num_rank_words_ + word];
  }
  __device__ uint32_t num_rank_words() const { return num_rank_words_; }
  __device__ bool goes_to_rank(uint32_t rank, uint32_t token) const {
    return (ranks_[token * num_rank_words_ + rank / 32] >> (rank % 32) & 1) != 0;
  }

 private:
  __host__ __device__ static constexpr uint32_t words(uint32_t num_bits) {
    return (num_bits + 31) / 32;
  }
  // Bits set of a set of tokens. Most batches need one word.
  __device__ uint32_t count_all(const uint32_t* words) const {
    uint32_t num_set = num_words_ > 0 ? __popc(words[0]) : 0;
#pragma unroll 1
    for (uint32_t w = 1; w < num_words_; ++w) num_set += __popc(words[w]);
    return num_set;
  }
  // Bits set below bit `end`.
  __device__ static uint32_t count(const uint32_t* words, uint32_t end) {
    uint32_t num_set = 0;
#pragma unroll 1  // inlined in many places: unrolled, the kernels were 160 KB of instructions
    for (; end >= 32; end -= 32) num_set += __popc(*words++);
    return end == 0 ? num_set : num_set + __popc(*words & ((1u << end) - 1));
  }

  uint32_t num_words_, num_rank_words_, num_experts_, num_ranks_, num_tokens_;
  uint32_t *tokens_, *ranks_;
};

// The ranks of a token, `size` of them in ascending order, are served from the first behind this
// rank on, round to this one: if all ranks began with the same peer, its link alone would be busy.
// Returns the number behind the first `num_before`.
__device__ inline uint32_t next_behind(uint32_t num_before, uint32_t size) {
  return num_before == size ? 0 : num_before;
}

// One warp, a lane a rank. Calls `each(r, slot, i)` on the lanes whose rank gets the token, the
// i-th of those that do, in that slot; returns how many do. `kIsUsual`: there are no more ranks
// than lanes.
template <bool kIsUsual, typename Each>
__device__ uint32_t for_each_rank(const TokenSets& sets, uint32_t token, Each each) {
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t size = 0;
  __syncwarp();  // what the last token's ranks have left may be written over
  uint32_t word = 0;
#pragma unroll 1
  do {
    const uint32_t ranks = sets.rank_word(token, word);
    if ((ranks >> lane & 1) != 0) {
      const uint32_t r = word * kWarp + lane;
      each(r, sets.before_rank(r, token), size + __popc(ranks & ((1u << lane) - 1)));
    }
    size += __popc(ranks);
  } while (!kIsUsual && ++word < sets.num_rank_words());
  return size;
}

// One route of a token: its k-th expert, seen by the lane that has it.
struct Route {
  uint32_t k, expert, dst_rank;
  float weight;
  uint32_t slot;         // of the token's message to dst_rank
  uint32_t column;       // of its answer: ranks of the token below dst_rank
  uint32_t entry_idx;    // routes of the token to dst_rank before this one
  uint32_t num_entries;  // and in all
  uint32_t order;        // routes of the token before this one, without those that go nowhere
  uint32_t num_below;    // routes of the token to ranks below dst_rank; where they are wanted
};

// One warp, a lane a route. Calls `each(route, is_routed)` on all lanes, also those that have none;
// returns how many there are. `counts_below`: wants num_below. `kIsUsual`: a token has no more
// routes than a warp has lanes.
template <bool kIsUsual, typename Each>
__device__ uint32_t for_each_route(const Routing& routing, const TokenSets& sets, uint32_t token,
                                   Each each, bool counts_below = false) {
  const uint32_t lane = threadIdx.x % kWarp, top_k = routing.top_k;
  __syncwarp();  // what the last token's routes have left may be written over
  uint32_t num_routes = 0, first_k = 0;
#pragma unroll 1
  do {
    Route route;
    route.k = first_k + lane;
    const int64_t expert = route.k < top_k ? routing.expert(token, route.k) : -1;
    route.weight = route.k < top_k ? routing.weight(token, route.k) : 0.0f;
    route.expert = static_cast<uint32_t>(expert);
    route.dst_rank = expert < 0 ? kNoRank : routing.owners.owner(route.expert);
    const uint32_t alike = __match_any_sync(kAllLanes, route.dst_rank);
    const uint32_t routed = __ballot_sync(kAllLanes, expert >= 0);
    route.order = num_routes + __popc(routed & ((1u << lane) - 1));
    num_routes += __popc(routed);
    route.num_below = 0;
    if (counts_below) {
#pragma unroll 1
      for (uint32_t j = 0; j < min(top_k, kWarp); ++j) {
        route.num_below += __shfl_sync(kAllLanes, route.dst_rank, j) < route.dst_rank;
      }
    }
    const bool is_routed = expert >= 0;
    route.entry_idx = __popc(alike & ((1u << lane) - 1));
    route.num_entries = __popc(alike);
    if (!kIsUsual && top_k > kWarp && is_routed) {
      route.entry_idx = route.num_entries = route.num_below = 0;
#pragma unroll 1
      for (uint32_t j = 0; j < top_k; ++j) {
        const int64_t other = routing.expert(token, j);
        if (other < 0) continue;
        const uint32_t owner = routing.owners.owner(static_cast<uint32_t>(other));
        route.entry_idx += owner == route.dst_rank && j < route.k;
        route.num_entries += owner == route.dst_rank;
        route.num_below += owner < route.dst_rank;
      }
    }
    route.column = is_routed ? sets.ranks_below(route.dst_rank, token) : 0;
    route.slot = is_routed ? sets.before_rank(route.dst_rank, token) : 0;
    each(route, is_routed);
  } while (!kIsUsual && (first_k += kWarp) < top_k);
  __syncwarp();
  return num_routes;
}

}  // namespace ep::cuda
