// What the three normal kernels are given. The same for all devices.
//
// T tokens of this rank, H hidden, K top_k, R ranks, L local experts, N rows received, D =
// min(K, R), the ranks that a token can go to, I rounds of the largest batch, S scales of a float8
// row, W 32-bit words of a received row's scales.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

// Where this rank's tokens go, and so where their rows come home from.
struct SendRoutes {
  uint64_t num_tokens;  // T
  // [T] how many ranks, and [T, D] which, ascending: rank << 16 | the message's slot in its round.
  uint32_t* num_messages;
  uint32_t* messages;
};

// What this rank receives, and so what it sends home.
struct RecvRows {
  uint64_t num_rounds;  // I
  uint64_t* num_rows;   // [R] rows from each rank
  uint32_t* per_round;  // [I, R] of them, in each round
};

struct NormalCountsParams {
  const void* topk_idx;  // [T, K] int32 or int64, -1 = not routed
  bool topk_idx_is_int64;
  SendRoutes routes;                     // out
  uint64_t* num_rounds;                  // out [1]
  uint64_t* num_rows;                    // out [R]
  uint64_t* num_recv_tokens_per_expert;  // out [L]
};
struct NormalDispatchParams {
  const std::byte* x;     // [T, H]
  bool x_is_quantized;    // x is float8, with scales; else it is of the buffer's dtype
  const float* x_scales;  // [T, S]
  // Rows travel alone, and `rows.per_round`, which is written otherwise, is compared with what
  // comes.
  bool is_cached;
  const void* topk_idx;  // [T, K] as above, and its weights; not of a cached routing
  bool topk_idx_is_int64;
  const float* topk_weights;
  SendRoutes routes;
  RecvRows rows;
  std::byte* recv_x;         // out [N, H], by source rank, then token
  uint32_t* recv_scales;     // out [N, W] of float8 rows
  int32_t* recv_topk_idx;    // out [N, K] local experts at their k, -1 where another rank's
  float* recv_topk_weights;  // out [N, K], 0 where another rank's
  int32_t* recv_src_tokens;  // out [N] the token of its source that a row is of
};
struct NormalCombineParams {
  const std::byte* x;  // [N, H] in the order of recv_x: each row the sum of its experts, weighted
  bool has_topk_weights;      // on every rank, or on none
  const float* topk_weights;  // [N, K]
  const std::byte* bias[2];   // [T, H], added behind a token's rows; null: none
  SendRoutes routes;
  RecvRows rows;
  std::byte* out;                // out [T, H]
  float* combined_topk_weights;  // out [T, K], sums of `topk_weights`
};

}  // namespace ep::protocol
