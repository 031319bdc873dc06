// Blanks: 16-byte words of which the last four bytes are 0, in which rows of combine arrive. A row
// has its last word of every 16 bytes inverted on the way, so that it is never 0, and a reader
// polls the very words it needs, as with tags (tagged.h), but there are no bytes more. The reader
// makes blanks of them again before it gives its credit. A word is written and read as one 128-bit
// access.
//
// All ones, the only bits that would be inverted to 0, are a NaN of float32, and two of bfloat16:
// it travels as another NaN. Sums of either are the same.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

constexpr uint32_t kOtherNaN = 0x7fff7fff;

EP_HOST_DEVICE constexpr uint32_t filling(uint32_t word) {
  return ~(word == 0xffffffff ? kOtherNaN : word);
}
EP_HOST_DEVICE constexpr uint32_t filled(uint32_t word) { return ~word; }

}  // namespace ep::protocol
