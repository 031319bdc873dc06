// How many rows every rank's batch has for each expert. By expert, in workspaces, where a row goes
// depends on it: each rank tells every other, in words that nobody has to wait behind.
#pragma once

#include "cuda/workspace_dispatch.cuh"

namespace ep::cuda {

using protocol::count_words_for;
using protocol::kCountsPerWord;

// The counts of every rank's batch.
class ExpertCounts {
 public:
  __device__ ExpertCounts(const RankView& rank, const Op& op) : rank_(rank), op_(op) {}

  // This rank's to every rank; a block tells some of them.
  __device__ void publish(const TokenSets& sets) const {
    const auto& config = rank_.layout.config();
    if (blockIdx.x >= config.num_ranks) return;
    const uint32_t num_words = count_words_for(config.num_experts);
#pragma unroll 1
    for (uint32_t w = threadIdx.x; w < num_words; w += blockDim.x) {
      uint32_t pairs[kCountsPerWord / 2] = {};
#pragma unroll
      for (uint32_t i = 0; i < kCountsPerWord; ++i) {
        const uint32_t expert = w * kCountsPerWord + i;
        if (expert < config.num_experts) {
          pairs[i / 2] |= sets.tokens_of_expert(expert) << (i % 2 * 16);
        }
      }
#pragma unroll 1
      for (uint32_t r = blockIdx.x; r < config.num_ranks; r += gridDim.x) {
        ptx::st_relaxed_sys_b128(word(op_.peer(r), rank_.self_rank, w),
                                 {pairs[0], pairs[1], pairs[2], op_.tag()});
      }
    }
  }

  // The sum of what ranks first .. end - 1 have for an expert. False: one did not come, which is
  // reported.
  __device__ bool sum(uint32_t expert, uint32_t first, uint32_t end, uint32_t* sum) const {
    constexpr uint32_t kBatch = 8;  // words on their way at the same time
    const uint32_t w = expert / kCountsPerWord, i = expert % kCountsPerWord;
    *sum = 0;
#pragma unroll 1
    for (; first < end; first += kBatch) {
      uint4 words[kBatch];
#pragma unroll
      for (uint32_t j = 0; j < kBatch; ++j) {
        if (first + j < end) words[j] = ptx::ld_relaxed_sys_b128(word(op_.self(), first + j, w));
      }
#pragma unroll
      for (uint32_t j = 0; j < kBatch; ++j) {
        if (first + j >= end) break;
        if (!op_.have_tag(word(op_.self(), first + j, w), first + j, &words[j])) return false;
        *sum += count_in(words[j], i);
      }
    }
    return true;
  }

  __device__ static uint32_t count_in(const uint4& word, uint32_t i) {
    const uint32_t pair = i < 2 ? word.x : i < 4 ? word.y : word.z;
    return pair >> (i % 2 * 16) & 0xffff;
  }
  // Where that source's word of counts is, `base` being its reader's memory.
  __device__ uint4* word(std::byte* base, uint32_t src_rank, uint32_t w) const {
    return at<uint4>(base, rank_.layout.all_counts(op_.bank(), src_rank)) + w;
  }

 private:
  const RankView& rank_;
  const Op& op_;
};

}  // namespace ep::cuda
