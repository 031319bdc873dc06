// Where a batch's tokens go, counted: what deep_ep.Buffer.get_dispatch_layout returns.
#pragma once

#include <cstdint>

#include "protocol/partition.h"

namespace ep::cuda {

// T tokens, K top_k, E experts, R ranks.
struct DispatchLayout {
  // [T, K] int64 or int32, -1 = not routed. An expert that does not exist counts as the nearest.
  const void* topk_idx;
  bool topk_idx_is_int64;
  uint32_t num_tokens, top_k;
  protocol::ExpertPartition partition;
  // A token that lists an expert twice counts once.
  int32_t* num_tokens_per_rank;    // [R]
  int32_t* num_tokens_per_expert;  // [E]
  bool* is_token_in_rank;          // [T, R]
};

// Throws std::runtime_error where CUDA refuses.
void dispatch_layout(const DispatchLayout& layout, void* stream);

}  // namespace ep::cuda
