// Arithmetic of bfloat16 that C++ spells with more instructions.
#pragma once

#include <cstdint>

namespace ep::ptx {

// Of two pairs, pair by pair, the number of larger magnitude; its sign means nothing. NaN only
// where both are.
__device__ inline uint32_t max_magnitudes(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

}  // namespace ep::ptx
