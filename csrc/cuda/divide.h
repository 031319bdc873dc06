// Division by a number that the host knows: a multiplication on the device.
#pragma once

#include <cstdint>

#include "protocol/base.h"

namespace ep::cuda {

// n / divisor for n * divisor < 2^32: then n * ceil(2^32 / divisor) exceeds n * 2^32 / divisor by
// less than 2^32 / divisor, too little to reach the next quotient.
struct Divisor {
  uint32_t divisor = 1;
  uint64_t magic = uint64_t{1} << 32;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d), magic(((uint64_t{1} << 32) + d - 1) / d) {}
};

EP_HOST_DEVICE inline uint32_t operator/(uint32_t n, const Divisor& d) {
  return static_cast<uint32_t>(n * d.magic >> 32);
}

}  // namespace ep::cuda
