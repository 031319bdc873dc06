// Who gets which token, and how many: topk_idx [T, K] becomes the messages of each token, numbered
// in token order for each rank, and the counts of the batch.
//
// Every warp of the grid has a run of tokens. Runs are counted, the blocks meet, and every warp
// knows by what the runs before it hold where its own numbers begin: the same in every run. Blocks
// meet again when all are numbered. Where tokens are few, every block counts and numbers all of
// them instead, and none waits for another.
//
// Example, R = 2, E = 4, tokens 0 -> experts (0, 2), 1 -> (3, 2), 2 -> (1, -1): messages 0: {0, 0}
// {1, 0}; 1: {1, 1}; 2: {0, 1}. Rank 0 gets 2 rows, rank 1 two; experts 1, 1, 2, 1.
#pragma once

#include "cuda/normal_rank.cuh"

namespace ep::cuda::normal {

constexpr uint64_t kNoMessage = ~uint64_t{0};

// Of a block of dispatch. Those that send may be fewer.
constexpr uint32_t kSendWarps = 16;
constexpr uint32_t kSendThreads = kSendWarps * kWarp;
static_assert(kNumFewTokens <= kSendThreads);  // every block routes them by itself: one a thread

__device__ inline uint64_t pack_message(uint32_t r, uint32_t number) {
  return uint64_t{r} << 32 | number;
}
__device__ inline uint32_t message_rank(uint64_t message) {
  return static_cast<uint32_t>(message >> 32);
}
__device__ inline uint32_t message_number(uint64_t message) {
  return static_cast<uint32_t>(message);
}

struct TopK {
  const void* idx;
  bool is_int64;
  uint32_t num_tokens, top_k;

  __device__ explicit TopK(const NormalView& rank, const NormalDispatch& params)
      : idx(params.topk_idx),
        is_int64(params.topk_idx_is_int64),
        num_tokens(params.routes.num_tokens),
        top_k(rank.layout.config().top_k) {}
  // -1 where the token has no k-th expert.
  __device__ int64_t expert(uint32_t token, uint32_t k) const {
    const uint64_t i = uint64_t{token} * top_k + k;
    return is_int64 ? static_cast<const int64_t*>(idx)[i] : static_cast<const int32_t*>(idx)[i];
  }
};

// Counts of each of 64 ranks, two in a lane.
struct LaneCounts {
  uint32_t counts[2] = {};

  __device__ uint32_t of(uint32_t r) const {
    return __shfl_sync(kAllLanes, r < kWarp ? counts[0] : counts[1], r % kWarp);
  }
  __device__ void add(uint32_t r, uint32_t count) {
    if (threadIdx.x % kWarp != r % kWarp) return;
    (r < kWarp ? counts[0] : counts[1]) += count;
  }
};

// Of one block, in shared memory.
struct RouteScratch {
  uint32_t of_warp[kSendWarps][kNumMaxDeviceRanks];  // counts, then those of the warps before
  uint32_t before[kNumMaxDeviceRanks];               // of the blocks before
  uint32_t total[kNumMaxDeviceRanks];                // of the batch
};

class Router {
 public:
  // `experts`: shared, [E].
  __device__ Router(const Op& op, const NormalDispatch& params, RouteScratch* scratch,
                    uint32_t* experts)
      : op_(op),
        rank_(op.rank()),
        params_(params),
        topk_(op.rank(), params),
        scratch_(*scratch),
        experts_(experts),
        warp_(threadIdx.x / kWarp),
        lane_(threadIdx.x % kWarp),
        num_ranks_(op.num_ranks()),
        num_experts_(op.layout().config().num_experts),
        num_columns_(op.layout().num_max_messages_per_token()),
        routes_alone_(topk_.num_tokens <= kNumFewTokens) {
    const uint32_t num_runs = (routes_alone_ ? 1 : gridDim.x) * kSendWarps;
    const uint32_t run = (topk_.num_tokens + num_runs - 1) / num_runs;
    const uint64_t size = (run + kWarp - 1) / kWarp * kWarp;
    const uint64_t first = (uint64_t{routes_alone_ ? 0 : blockIdx.x} * kSendWarps + warp_) * size;
    begin_ = static_cast<uint32_t>(min(first, uint64_t{topk_.num_tokens}));
    end_ = static_cast<uint32_t>(min(first + size, uint64_t{topk_.num_tokens}));
  }

  // Whole block. False: end the kernel.
  __device__ bool run() const {
    for (uint32_t e = threadIdx.x; e < num_experts_; e += blockDim.x) experts_[e] = 0;
    __syncthreads();
    uint64_t ranks;
    if (!__syncthreads_and(count(&ranks))) return false;
    if (routes_alone_) {
      find_first_numbers(scratch_.total);
      __syncthreads();
      publish();
      assign([&](uint32_t) { return ranks; });
      return true;
    }
    write_block_counts();
    if (!op_.meet()) return false;
    read_block_counts();
    assign([&](uint32_t token) { return *messages_of(token); });
    publish();
    return op_.meet();  // whoever sends a token may be another block than has numbered it
  }

 private:
  __device__ uint64_t* messages_of(uint32_t token) const {
    return params_.routes.messages + uint64_t{token} * num_columns_;
  }

  // This warp's tokens: the ranks of each, as bits where its first message goes, unless there are
  // few: then as those of this lane's only token. And counts.
  __device__ bool count(uint64_t* ranks) const {
    bool ok = true;
    LaneCounts counts;
    *ranks = 0;
    for (uint32_t first = begin_; first < end_; first += kWarp) {
      const uint32_t token = first + lane_;
      *ranks = 0;
      if (token < end_) {
        ok = find_ranks(token, ranks) && ok;
        if (!routes_alone_) *messages_of(token) = *ranks;
      }
      for (uint32_t r = 0; r < num_ranks_; ++r) {
        counts.add(r, __popc(__ballot_sync(kAllLanes, (*ranks >> r & 1) != 0)));
      }
    }
    scratch_.of_warp[warp_][lane_] = counts.counts[0];
    scratch_.of_warp[warp_][lane_ + kWarp] = counts.counts[1];
    return ok;
  }

  // A token may list an expert twice: that is one row of it.
  __device__ bool find_ranks(uint32_t token, uint64_t* ranks) const {
    constexpr uint32_t kAtOnce = 8;
    for (uint32_t first = 0; first < topk_.top_k; first += kAtOnce) {
      int64_t experts[kAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        experts[i] = first + i < topk_.top_k ? topk_.expert(token, first + i) : -1;
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        const int64_t expert = experts[i];
        if (expert == -1) continue;
        if (expert < 0 || expert >= num_experts_) {
          return refuse_expert(rank_, token, first + i, expert);
        }
        *ranks |= uint64_t{1} << rank_.owners.owner(static_cast<uint32_t>(expert));
        bool is_listed = false;
#pragma unroll
        for (uint32_t before = 0; before < i; ++before) is_listed |= experts[before] == expert;
        for (uint32_t k = 0; k < first; ++k) is_listed |= topk_.expert(token, k) == expert;
        if (!is_listed) atomicAdd(&experts_[expert], 1);
      }
    }
    return true;
  }

  // Of each warp, from its counts; the block's go to `totals` [R].
  __device__ void find_first_numbers(uint32_t* totals) const {
    const uint32_t r = threadIdx.x;
    if (r >= num_ranks_) return;
    uint32_t sum = 0;
    for (uint32_t w = 0; w < kSendWarps; ++w) {
      const uint32_t count = scratch_.of_warp[w][r];
      scratch_.of_warp[w][r] = sum;
      sum += count;
    }
    totals[r] = sum;
    if (routes_alone_) scratch_.before[r] = 0;
  }

  __device__ void write_block_counts() const {
    find_first_numbers(rank_.block_rank_counts + blockIdx.x * num_ranks_);
    for (uint32_t e = threadIdx.x; e < num_experts_; e += blockDim.x) {
      if (experts_[e] > 0) atomicAdd(&rank_.expert_counts[e], experts_[e]);
    }
  }

  // A warp a rank.
  __device__ void read_block_counts() const {
    for (uint32_t r = warp_; r < num_ranks_; r += kSendWarps) {
      uint32_t before = 0, total = 0;
      for (uint32_t block = lane_; block < gridDim.x; block += kWarp) {
        const uint32_t count =
            ptx::ld_relaxed_gpu(&rank_.block_rank_counts[block * num_ranks_ + r]);
        total += count;
        if (block < blockIdx.x) before += count;
      }
      before = __reduce_add_sync(kAllLanes, before);
      total = __reduce_add_sync(kAllLanes, total);
      if (lane_ == 0) scratch_.before[r] = before, scratch_.total[r] = total;
    }
    __syncthreads();
  }

  // `ranks_of(token)`: bits. Where every block does this for all tokens, all write the same.
  template <typename RanksOf>
  __device__ void assign(RanksOf ranks_of) const {
    const NormalRoutes& routes = params_.routes;
    const uint32_t per_round = op_.layout().num_tokens_per_round();
    LaneCounts next;
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t r = half * kWarp + lane_;
      if (r < num_ranks_) next.counts[half] = scratch_.before[r] + scratch_.of_warp[warp_][r];
    }
    for (uint32_t first = begin_; first < end_; first += kWarp) {
      const uint32_t token = first + lane_;
      uint64_t* messages = messages_of(token);
      const uint64_t ranks = token < end_ ? ranks_of(token) : 0;
      const bool begins_round = token < end_ && token % per_round == 0;
      uint32_t column = 0;
      for (uint32_t r = 0; r < num_ranks_; ++r) {
        const bool is_sent = (ranks >> r & 1) != 0;
        const uint32_t sent = __ballot_sync(kAllLanes, is_sent);
        const uint32_t number = next.of(r) + __popc(sent & ((1u << lane_) - 1));
        if (is_sent) ptx::st_relaxed_gpu(&messages[column++], pack_message(r, number));
        if (begins_round) {
          ptx::st_relaxed_gpu(&routes.round_begins[token / per_round * num_ranks_ + r], number);
        }
        next.add(r, __popc(sent));
      }
      if (token < end_) {
        for (; column < num_columns_; ++column) {
          ptx::st_relaxed_gpu(&messages[column], kNoMessage);
        }
      }
    }
    if ((blockIdx.x == 0 || routes_alone_) && threadIdx.x < num_ranks_) {
      const uint32_t num_rounds = (topk_.num_tokens + per_round - 1) / per_round;
      ptx::st_relaxed_gpu(&routes.round_begins[num_rounds * num_ranks_ + threadIdx.x],
                          scratch_.total[threadIdx.x]);
    }
  }

  // The counts of the batch, to every rank: each block serves some, the last ones first, as few
  // tokens leave from the first.
  __device__ void publish() const {
    const NormalDeviceLayout& layout = op_.layout();
    for (uint32_t r = gridDim.x - 1 - blockIdx.x; r < num_ranks_; r += gridDim.x) {
      std::byte* peer = op_.peer(r);
      auto* for_ranks = at<uint32_t>(peer, layout.rank_counts(rank_.self_rank));
      auto* for_experts = at<uint32_t>(peer, layout.expert_counts(rank_.self_rank));
      if (threadIdx.x < num_ranks_) for_ranks[threadIdx.x] = scratch_.total[threadIdx.x];
      const uint32_t first_expert = rank_.owners.first_expert(r);
      const uint32_t num_local = rank_.owners.first_expert(r + 1) - first_expert;
      for (uint32_t e = threadIdx.x; e < num_local; e += blockDim.x) {
        if (routes_alone_) {
          for_experts[e] = experts_[first_expert + e];
          continue;
        }
        uint32_t* count = &rank_.expert_counts[first_expert + e];
        for_experts[e] = ptx::ld_relaxed_gpu(count);
        *count = 0;  // for the next batch
      }
      if (threadIdx.x == 0) {
        *at<protocol::DeviceBatchCounts>(peer, layout.counts(rank_.self_rank)) = {op_.epoch(),
                                                                                  topk_.num_tokens};
      }
      __syncthreads();
      if (threadIdx.x == 0) op_.publish_ready(r, 0);
    }
  }

  const Op& op_;
  const NormalView& rank_;
  const NormalDispatch& params_;
  TopK topk_;
  RouteScratch& scratch_;
  uint32_t* experts_;
  uint32_t warp_, lane_, num_ranks_, num_experts_, num_columns_;
  bool routes_alone_;     // every block for itself
  uint32_t begin_, end_;  // this warp's tokens
};

}  // namespace ep::cuda::normal
