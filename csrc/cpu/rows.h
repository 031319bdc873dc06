// Arithmetic on rows of `hidden` elements. Every multiply and add is rounded to float32 on its own
// (no fused multiply-add) and terms are added in the order given, so results equal plain PyTorch
// code, and later the CUDA kernels, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/base.h"

namespace ep::cpu {

// out[i] = weights[0] * rows[0][i] + weights[1] * rows[1][i] + ..., float32 inside, stored as
// `dtype`. `weights` null adds the rows up. No rows: zeros.
void weighted_sum(protocol::DType dtype, std::byte* out, const std::byte* const* rows,
                  const float* weights, uint32_t num_rows, uint32_t hidden);

}  // namespace ep::cpu
