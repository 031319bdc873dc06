#pragma once

#include "cuda_runtime.h"

namespace ep::ptx {

inline uint32_t max_magnitudes(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
  for (uint32_t shift = 0; shift < 32; shift += 16) {
    const uint32_t x = a >> shift & 0x7fff, y = b >> shift & 0x7fff,
                   sign = (a ^ b) >> shift & 0x8000;
    const bool is_x = y > 0x7f80 || (x <= 0x7f80 && x > y);
    larger |= (sign | (is_x ? x : y)) << shift;
  }
  return larger;
}

}  // namespace ep::ptx
