// Which rank owns which expert: contiguous blocks, the first E mod R ranks hold one more.
//
// Example, E = 7 experts on R = 3 ranks: rank 0 owns 0 1 2, rank 1 owns 3 4, rank 2 owns 5 6.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

struct ExpertPartition {
  uint32_t num_experts;
  uint32_t num_ranks;

  EP_HOST_DEVICE constexpr uint32_t num_local_experts(uint32_t rank) const {
    return num_experts / num_ranks + (rank < num_experts % num_ranks ? 1 : 0);
  }
  EP_HOST_DEVICE constexpr uint32_t num_max_local_experts() const { return num_local_experts(0); }
  EP_HOST_DEVICE constexpr uint32_t first_expert(uint32_t rank) const {
    uint32_t num_larger = num_experts % num_ranks;
    return rank * (num_experts / num_ranks) + (rank < num_larger ? rank : num_larger);
  }
  EP_HOST_DEVICE constexpr uint32_t owner(uint32_t expert) const {
    uint32_t base = num_experts / num_ranks;
    uint32_t num_in_larger = (num_experts % num_ranks) * (base + 1);
    return expert < num_in_larger ? expert / (base + 1)
                                  : num_experts % num_ranks + (expert - num_in_larger) / base;
  }
  // One that the rank with this first expert does not own; -1 where it owns all.
  EP_HOST_DEVICE constexpr int32_t foreign_expert(uint32_t first_expert_of_rank) const {
    if (first_expert_of_rank > 0) return 0;
    const bool owns_all = num_ranks == 1 || num_experts <= 1;
    return owns_all ? -1 : static_cast<int32_t>(num_experts - 1);
  }
};

}  // namespace ep::protocol
