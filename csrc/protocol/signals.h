// The 64-bit words that publish data: {epoch 48, is_tagged 1, count 15}.
//
//   63                               16  15        14           0
//   | epoch                            | is_tagged | count        |
//
// Signals (count = messages sent) and per-expert counts (count = rows) have this form. A word from
// an earlier epoch is older data, a word from a later one is a protocol error: nothing is cleared.
// is_tagged, in a dispatch's signals: the messages are tagged words (tagged.h), of which the signal
// says how many come, not that they are there. In the signals of a normal combine: routing weights
// have come home with the rows.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

constexpr uint32_t kEpochShift = 16;
constexpr uint64_t kTaggedBit = uint64_t{1} << 15;
constexpr uint64_t kMaxCount = kTaggedBit - 1;
// 2^48 epochs at 3,700 operations a second (61 layers, 60 steps a second) last 2,400 years.
constexpr uint64_t kMaxEpoch = (uint64_t{1} << (64 - kEpochShift)) - 1;

// A word of arrivals counts dispatches, in parts of which there are more than a grid has blocks.
constexpr uint32_t kArrivalsShift = 20;

EP_HOST_DEVICE constexpr uint64_t pack_signal(uint64_t epoch, uint64_t count) {
  return (epoch << kEpochShift) | count;
}
EP_HOST_DEVICE constexpr uint64_t signal_epoch(uint64_t signal) { return signal >> kEpochShift; }
EP_HOST_DEVICE constexpr uint64_t signal_count(uint64_t signal) { return signal & kMaxCount; }
// The count, and is_tagged above it.
EP_HOST_DEVICE constexpr uint64_t signal_low_bits(uint64_t signal) {
  return signal & (kTaggedBit | kMaxCount);
}
EP_HOST_DEVICE constexpr bool signal_is_tagged(uint64_t signal) {
  return (signal & kTaggedBit) != 0;
}

}  // namespace ep::protocol
