#pragma once

#include "cuda_runtime.h"
#include "protocol/float8.h"

namespace ep::ptx {

inline uint32_t to_e4m3x2(float low, float high) {
  return protocol::to_e4m3(low) | uint32_t{protocol::to_e4m3(high)} << 8;
}
inline float2 from_e4m3x2(uint32_t pair) {
  return {protocol::from_e4m3(static_cast<uint8_t>(pair)),
          protocol::from_e4m3(static_cast<uint8_t>(pair >> 8))};
}

}  // namespace ep::ptx
