// Conversions that the hardware has.
#pragma once

#include <cstdint>

namespace ep::ptx {

// Two floats to e4m3, nearest even, beyond 448 to 448; `low` in the low byte. The same bits as
// protocol::to_e4m3.
__device__ inline uint32_t to_e4m3x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace ep::ptx
