// Tagged words: 12 bytes of data and the low half of the epoch. A reader polls the very words it
// needs, so neither a fence nor a signal stands between the data and it. They cost bytes, so they
// are for small batches. A word is written and read as one 128-bit access.
//
// A tagged message is the words of its header, padded to a slot's alignment, and the parts of its
// row; a tagged partial row is its parts alone.
//
//   header   | src_token outcome_slot num_entries tag | entry 0, tag | .. | entry K - 1, tag | pad
//   part     kPartBytes of a row, 16-byte vectors 0 .. 63, and the scales of those; lane i of a
//   warp
//            has vectors a = i and b = i + 32, and s: a scale in lanes 8g (of vectors 8g .. 8g + 7)
//            and 8g + 1 (of vectors 32 + 8g .. 32 + 8g + 7)
//
//            | a0 a1 a2 tag | x 32 lanes | a3 b0 b1 tag | x 32 lanes | b2 b3 s tag | x 32 lanes
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

constexpr uint32_t kWordBytes = 16;

// Rows are handled in parts of this size, a warp each.
constexpr uint32_t kPartBytes = 1024;
constexpr uint32_t kTaggedPartBytes = 3 * 32 * kWordBytes;
// 128 channels of float8 share a scale.
constexpr uint32_t kChannelsPerScale = 128;
constexpr uint32_t kScalesPerPart = kPartBytes / kChannelsPerScale;

EP_HOST_DEVICE constexpr uint64_t tagged_header_bytes(uint32_t top_k) {
  return align_up((1 + uint64_t{top_k}) * kWordBytes, kSlotAlign);
}
EP_HOST_DEVICE constexpr uint32_t parts_for(uint64_t row_bytes) {
  return static_cast<uint32_t>((row_bytes + kPartBytes - 1) / kPartBytes);
}
EP_HOST_DEVICE constexpr uint64_t tagged_row_bytes(uint64_t row_bytes) {
  return uint64_t{parts_for(row_bytes)} * kTaggedPartBytes;
}

}  // namespace ep::protocol
