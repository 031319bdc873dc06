// What a rank's symmetric memory holds behind NormalLayout where ranks are on several nodes.
// README.md beside this has pictures, the table of writers and readers, and the rules.
//
// Exchanges are hierarchical: a token crosses the network once for each node, to the rank of its
// source's number there, the forwarder, and one row of it comes back from there. Everything within
// a node is as NormalLayout has it.
//
// R ranks, G of them a node, N nodes, C tokens a round, K top_k, L local experts, D = min(K, G).
#pragma once

#include "protocol/nodes.h"
#include "protocol/normal_layout.h"

namespace ep::protocol {

// Changes whenever a region, a word or a rule of what is here does.
constexpr uint32_t kNormalNodeProtocolVersion = 1;

// What all ranks must agree on.
struct NormalNodeConfig {
  NormalConfig normal;
  uint32_t ranks_per_node;
};

class NormalNodeLayout {
 public:
  EP_HOST_DEVICE constexpr explicit NormalNodeLayout(const NormalNodeConfig& config)
      : config_(config),
        base_(config.normal),
        nodes_{config.normal.num_ranks, config.ranks_per_node} {
    const uint64_t num_remote = nodes_.num_remote();
    num_columns_ =
        config.ranks_per_node < config.normal.top_k ? config.ranks_per_node : config.normal.top_k;
    node_signals_offset_ = align_up(base_.num_bytes(), kSlotAlign);
    node_sleepers_offset_ =
        end_of(node_signals_offset_, kNumRoundBanks * kNumPhases * num_remote * 8);
    node_counts_offset_ = end_of(node_sleepers_offset_, kNumPhases * num_remote * 4);
    staged_counts_offset_ = end_of(node_counts_offset_, num_remote * node_counts_bytes());
    const uint64_t num_messages =
        kNumRoundBanks * num_remote * uint64_t{config.normal.num_tokens_per_round};
    node_routes_offset_ = end_of(staged_counts_offset_, num_remote * node_counts_bytes());
    staged_routes_offset_ = end_of(node_routes_offset_, num_messages * route_bytes());
    node_inbox_offset_ = end_of(staged_routes_offset_, num_messages * route_bytes());
    node_outbox_offset_ = end_of(node_inbox_offset_, num_messages * message_stride());
    num_bytes_ = end_of(node_outbox_offset_, num_messages * message_stride());
  }

  // The largest C whose memory fits into `num_bytes`; 0: none does. `config`'s own C is ignored.
  static uint32_t num_tokens_that_fit(NormalNodeConfig config, uint64_t num_bytes) {
    uint64_t fits = 0, too_many = kMaxCount + 1;
    while (fits + 1 < too_many) {
      const uint64_t middle = (fits + too_many) / 2;
      config.normal.num_tokens_per_round = static_cast<uint32_t>(middle);
      (NormalNodeLayout(config).num_bytes() <= num_bytes ? fits : too_many) = middle;
    }
    return static_cast<uint32_t>(fits);
  }

  EP_HOST_DEVICE constexpr const NormalLayout& base() const { return base_; }
  EP_HOST_DEVICE constexpr const Nodes& nodes() const { return nodes_; }
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }
  // D: ranks of a node that a token may go to.
  EP_HOST_DEVICE constexpr uint32_t num_columns() const { return num_columns_; }

  // Counts of one source for all ranks of a node.
  EP_HOST_DEVICE constexpr uint64_t counts_stride() const {
    return sizeof(BatchCounts) + uint64_t{base_.partition().num_max_local_experts()} * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t node_counts_bytes() const {
    return nodes_.ranks_per_node * counts_stride();
  }
  // A route: where in the node a token goes, u32 num_ranks, then D x u32 {rank << 16 | slot}.
  EP_HOST_DEVICE constexpr uint64_t route_bytes() const { return (1 + uint64_t{num_columns_}) * 4; }
  // What travels of a message in dispatch, and where its row is.
  EP_HOST_DEVICE constexpr uint64_t dispatch_bytes() const {
    const uint64_t scales_bytes = uint64_t{base_.num_scales()} * 4;
    return scales_bytes > 0 ? scales_in_message() + scales_bytes
                            : row_in_message() + base_.dispatch_row_bytes();
  }
  EP_HOST_DEVICE constexpr uint64_t weights_in_message() const {
    return base_.weights(0, 0, 0) - base_.message(0, 0, 0);
  }
  EP_HOST_DEVICE constexpr uint64_t token_in_message() const {
    return base_.token(0, 0, 0) - base_.message(0, 0, 0);
  }
  EP_HOST_DEVICE constexpr uint64_t row_in_message() const {
    return base_.row(0, 0, 0) - base_.message(0, 0, 0);
  }
  EP_HOST_DEVICE constexpr uint64_t scales_in_message() const {
    return base_.scales(0, 0, 0) - base_.message(0, 0, 0);
  }

  // `remote` numbers the other nodes: of the source, or of the destination.
  EP_HOST_DEVICE constexpr uint64_t node_signal(uint32_t bank, Phase phase, uint32_t remote) const {
    return node_signals_offset_ +
           ((uint64_t{bank} * kNumPhases + as_idx(phase)) * nodes_.num_remote() + remote) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t node_signal_sleepers(Phase phase, uint32_t remote) const {
    return node_sleepers_offset_ + (uint64_t{as_idx(phase)} * nodes_.num_remote() + remote) * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t node_counts(uint32_t remote, uint32_t rank_in_node) const {
    return node_counts_offset_ + remote * node_counts_bytes() + rank_in_node * counts_stride();
  }
  EP_HOST_DEVICE constexpr uint64_t staged_counts(uint32_t remote, uint32_t rank_in_node) const {
    return staged_counts_offset_ + remote * node_counts_bytes() + rank_in_node * counts_stride();
  }
  EP_HOST_DEVICE constexpr uint64_t node_route(uint32_t bank, uint32_t remote,
                                               uint32_t slot) const {
    return node_routes_offset_ + message_idx(bank, remote, slot) * route_bytes();
  }
  EP_HOST_DEVICE constexpr uint64_t staged_route(uint32_t bank, uint32_t remote,
                                                 uint32_t slot) const {
    return staged_routes_offset_ + message_idx(bank, remote, slot) * route_bytes();
  }
  EP_HOST_DEVICE constexpr uint64_t node_inbox(uint32_t bank, uint32_t remote,
                                               uint32_t slot) const {
    return node_inbox_offset_ + message_idx(bank, remote, slot) * message_stride();
  }
  EP_HOST_DEVICE constexpr uint64_t node_outbox(uint32_t bank, uint32_t remote,
                                                uint32_t slot) const {
    return node_outbox_offset_ + message_idx(bank, remote, slot) * message_stride();
  }

  // The first byte of each region, in order, for tests and for drawing.
  EP_HOST_DEVICE constexpr uint64_t node_signals_offset() const { return node_signals_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_sleepers_offset() const { return node_sleepers_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_counts_offset() const { return node_counts_offset_; }
  EP_HOST_DEVICE constexpr uint64_t staged_counts_offset() const { return staged_counts_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_routes_offset() const { return node_routes_offset_; }
  EP_HOST_DEVICE constexpr uint64_t staged_routes_offset() const { return staged_routes_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_inbox_offset() const { return node_inbox_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_outbox_offset() const { return node_outbox_offset_; }

 private:
  EP_HOST_DEVICE static constexpr uint64_t end_of(uint64_t offset, uint64_t bytes) {
    return align_up(offset + bytes, kSlotAlign);
  }
  EP_HOST_DEVICE static constexpr uint32_t as_idx(Phase phase) {
    return static_cast<uint32_t>(phase);
  }
  EP_HOST_DEVICE constexpr uint64_t message_stride() const { return base_.message_bytes(); }
  EP_HOST_DEVICE constexpr uint64_t message_idx(uint32_t bank, uint32_t remote,
                                                uint32_t slot) const {
    return (uint64_t{bank} * nodes_.num_remote() + remote) * config_.normal.num_tokens_per_round +
           slot;
  }

  NormalNodeConfig config_;
  NormalLayout base_;
  Nodes nodes_;
  uint32_t num_columns_ = 0;
  uint64_t node_signals_offset_ = 0, node_sleepers_offset_ = 0, node_counts_offset_ = 0;
  uint64_t staged_counts_offset_ = 0, node_routes_offset_ = 0, staged_routes_offset_ = 0;
  uint64_t node_inbox_offset_ = 0, node_outbox_offset_ = 0, num_bytes_ = 0;
};

}  // namespace ep::protocol
