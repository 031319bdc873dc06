// What a rank's symmetric memory holds behind a hierarchical MultiNodeLayout where puts are counted
// as they arrive, so that they may go by any queue pair. README.md beside this draws it.
#pragma once

#include "protocol/multi_node_layout.h"

namespace ep::protocol {

class NodeNetworkLayout {
 public:
  EP_HOST_DEVICE constexpr explicit NodeNetworkLayout(const MultiNodeLayout& layout)
      : num_remote_(layout.nodes().num_remote()),
        arrivals_offset_(align_up(layout.num_bytes(), kSlotAlign)) {
    const uint64_t num_words =
        uint64_t{layout.config().low_latency.num_banks} * kNumPhases * num_remote_;
    num_bytes_ = align_up(arrivals_offset_ + num_words * 8, kSlotAlign);
  }

  // Of all: the other regions', too.
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }

  // What has arrived with operations of that bank since the beginning: in dispatch messages for
  // this node from the rank of this one's number on a remote node, in combine that node's sums.
  EP_HOST_DEVICE constexpr uint64_t arrivals(uint32_t bank, Phase phase, uint32_t remote) const {
    return arrivals_offset_ + uint64_t{arrivals_idx(bank, phase, remote)} * 8;
  }
  EP_HOST_DEVICE constexpr uint32_t arrivals_idx(uint32_t bank, Phase phase,
                                                 uint32_t remote) const {
    return (bank * kNumPhases + static_cast<uint32_t>(phase)) * num_remote_ + remote;
  }
  EP_HOST_DEVICE constexpr uint64_t arrivals_offset() const { return arrivals_offset_; }

 private:
  uint32_t num_remote_;
  uint64_t arrivals_offset_ = 0, num_bytes_ = 0;
};

}  // namespace ep::protocol
