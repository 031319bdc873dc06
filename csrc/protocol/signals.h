// The 64-bit words that publish data: {epoch 48, count 16}.
//
//   63                               16 15           0
//   | epoch                            | count        |
//
// Signals (count = messages sent) and per-expert counts (count = rows) have this form. A word from
// an earlier epoch is older data, a word from a later one is a protocol error: nothing is cleared.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

constexpr uint32_t kCountBits = 16;
constexpr uint64_t kMaxCount = (uint64_t{1} << kCountBits) - 1;
// 2^48 epochs at 3,700 operations a second (61 layers, 60 steps a second) last 2,400 years.
constexpr uint64_t kMaxEpoch = (uint64_t{1} << (64 - kCountBits)) - 1;

EP_HOST_DEVICE constexpr uint64_t pack_signal(uint64_t epoch, uint64_t count) {
  return (epoch << kCountBits) | count;
}
EP_HOST_DEVICE constexpr uint64_t signal_epoch(uint64_t signal) { return signal >> kCountBits; }
EP_HOST_DEVICE constexpr uint64_t signal_count(uint64_t signal) { return signal & kMaxCount; }

}  // namespace ep::protocol
