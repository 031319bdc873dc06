// Conversions that the hardware has.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace ep::ptx {

// Two floats to e4m3, nearest even, beyond 448 to 448; `low` in the low byte. The same bits as
// protocol::to_e4m3.
__device__ inline uint32_t to_e4m3x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// The two e4m3 of the low 16 bits, exactly; the low byte first. As protocol::from_e4m3.
__device__ inline float2 from_e4m3x2(uint32_t pair) {
  uint32_t bits;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(bits) : "h"(static_cast<uint16_t>(pair)));
  __half2 halves;
  memcpy(&halves, &bits, sizeof halves);
  return __half22float2(halves);
}

}  // namespace ep::ptx
