// What a rank's symmetric memory holds behind NormalNodeLayout where nodes are joined by a network
// that promises less than queue pairs do: words in which arrivals are counted. README.md beside
// this says how.
#pragma once

#include "protocol/normal_node_layout.h"

namespace ep::protocol {

// Changes whenever a region, a word or a rule of what is here does.
constexpr uint32_t kNormalNetworkProtocolVersion = 1;

// Puts that a rank on another node has for this one in a round, each kind told of by a word of its
// own.
enum class Arrival : uint32_t {
  kDispatch = 0,  // its counts; or its messages, and their routes. Told of by node signals
  kRoutes = 1,    // of combine: where its tokens are. Told of by node signals
  kSums = 2,      // of combine: rows for this rank's tokens. Told of by signals
};
constexpr uint32_t kNumArrivalKinds = 3;

class NormalNetworkLayout {
 public:
  EP_HOST_DEVICE constexpr explicit NormalNetworkLayout(const NormalNodeConfig& config)
      : nodes_(config), num_remote_(nodes_.nodes().num_remote()) {
    arrivals_offset_ = align_up(nodes_.num_bytes(), kSlotAlign);
    num_bytes_ = align_up(arrivals_offset_ + uint64_t{num_arrivals()} * 8, kSlotAlign);
  }

  // The largest C whose memory fits into `num_bytes`; 0: none does. `config`'s own C is ignored.
  static uint32_t num_tokens_that_fit(NormalNodeConfig config, uint64_t num_bytes) {
    config.normal.num_tokens_per_round = 0;
    const NormalNetworkLayout without_tokens(config);
    const uint64_t num_added = without_tokens.num_bytes() - without_tokens.arrivals_offset();
    return num_bytes < num_added
               ? 0
               : NormalNodeLayout::num_tokens_that_fit(config, num_bytes - num_added);
  }

  EP_HOST_DEVICE constexpr const NormalNodeLayout& nodes() const { return nodes_; }
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }

  // Offset in bytes: how many of those puts have arrived from that node in rounds of that bank,
  // since the beginning.
  EP_HOST_DEVICE constexpr uint64_t arrivals(uint32_t bank, Arrival kind, uint32_t remote) const {
    return arrivals_offset_ + uint64_t{arrivals_idx(bank, kind, remote)} * 8;
  }
  EP_HOST_DEVICE constexpr uint32_t arrivals_idx(uint32_t bank, Arrival kind,
                                                 uint32_t remote) const {
    return (bank * kNumArrivalKinds + static_cast<uint32_t>(kind)) * num_remote_ + remote;
  }
  EP_HOST_DEVICE constexpr uint32_t num_arrivals() const {
    return kNumRoundBanks * kNumArrivalKinds * num_remote_;
  }
  EP_HOST_DEVICE constexpr uint64_t arrivals_offset() const { return arrivals_offset_; }

 private:
  NormalNodeLayout nodes_;
  uint32_t num_remote_;
  uint64_t arrivals_offset_ = 0, num_bytes_ = 0;
};

}  // namespace ep::protocol
