// What a rank's symmetric memory holds behind LowLatencyLayout where ranks are on several nodes.
// Pictures, the table of writers and readers, and the rules are in README.md beside this.
//
// Over the network a rank puts what it has staged in its own memory, and a signal behind it on the
// same queue pair: the regions here are the staging and, hierarchical, where a node's forwarders
// get what is for their node. The last step of either is that of one node: messages lie in the
// inbox, and rows in the outcome, of LowLatencyLayout.
//
// R ranks, G of them a node, N nodes, M tokens a rank, K top_k, B banks, D = min(K, G), L local
// experts.
#pragma once

#include "protocol/layout.h"
#include "protocol/nodes.h"

namespace ep::protocol {

// Changes whenever a region, a word or a rule of what is here does.
constexpr uint32_t kMultiNodeProtocolVersion = 1;

// What all ranks must agree on. Rows are pushed, none are tagged, there are no workspaces.
struct MultiNodeConfig {
  LowLatencyConfig low_latency;
  uint32_t ranks_per_node;
  // A token crosses the network once for each node, not for each rank: Reduction::kRank only.
  bool is_hierarchical;
};

// What the forwarder of a message needs to know when rows of it come back.
struct ForwardedMessage {
  uint32_t outcome_slot;  // at home
  uint32_t num_partials;  // ranks of this node that it has gone to
};
static_assert(sizeof(ForwardedMessage) == 8);

class MultiNodeLayout {
 public:
  EP_HOST_DEVICE constexpr explicit MultiNodeLayout(const MultiNodeConfig& config)
      : config_(config),
        base_(config.low_latency),
        nodes_{config.low_latency.num_ranks, config.ranks_per_node} {
    const LowLatencyConfig& low_latency = config.low_latency;
    const uint64_t num_banks = low_latency.num_banks;
    const uint64_t num_tokens = low_latency.num_max_tokens_per_rank;
    const uint64_t num_nodes = config.is_hierarchical ? nodes_.num_remote() : 0;
    const uint64_t num_ranks =
        config.is_hierarchical ? 0 : uint64_t{nodes_.num_remote()} * config.ranks_per_node;
    const uint64_t num_staged = config.is_hierarchical ? 0 : num_tokens;
    header_bytes_ = protocol::header_bytes(low_latency.top_k);
    scales_bytes_ = uint64_t{base_.num_scales()} * 4;
    row_stride_ = align_up(base_.dispatch_row_bytes(), kSlotAlign);
    scales_stride_ = align_up(scales_bytes_, kScalesAlign);
    const uint64_t row_end = header_bytes_ + base_.dispatch_row_bytes();
    scales_in_node_message_ = align_up(row_end, kScalesAlign);
    node_message_bytes_ =
        base_.num_scales() > 0 ? scales_in_node_message_ + scales_bytes_ : row_end;
    node_message_stride_ = align_up(node_message_bytes_, kSlotAlign);
    combine_bytes_ = base_.num_combine_scales() > 0
                         ? base_.combine_scales_in_row() + uint64_t{base_.num_combine_scales()} * 4
                         : base_.combine_row_bytes();
    combine_stride_ = align_up(combine_bytes_, kSlotAlign);
    num_columns_ =
        config.ranks_per_node < low_latency.top_k ? config.ranks_per_node : low_latency.top_k;
    num_rows_home_ =
        low_latency.reduction == Reduction::kSource ? num_tokens * low_latency.top_k : num_tokens;

    node_signals_offset_ = align_up(base_.num_bytes(), kSlotAlign);
    node_sleepers_offset_ = end_of(node_signals_offset_, num_banks * num_nodes * 8);
    node_inbox_offset_ = end_of(node_sleepers_offset_, num_nodes * 4);
    const uint64_t num_messages = num_banks * num_nodes * num_tokens;
    node_outbox_offset_ = end_of(node_inbox_offset_, num_messages * node_message_stride_);
    node_partials_offset_ = end_of(node_outbox_offset_, num_messages * node_message_stride_);
    node_sums_offset_ =
        end_of(node_partials_offset_, num_messages * num_columns_ * combine_stride_);
    staged_headers_offset_ = end_of(node_sums_offset_, num_messages * combine_stride_);
    staged_rows_offset_ =
        end_of(staged_headers_offset_, num_banks * num_ranks * num_tokens * header_bytes_);
    staged_scales_offset_ = end_of(staged_rows_offset_, num_banks * num_staged * row_stride_);
    staged_counts_offset_ = end_of(staged_scales_offset_, num_banks * num_staged * scales_stride_);
    row_outbox_offset_ = end_of(staged_counts_offset_, num_banks * num_ranks * counts_bytes());
    num_bytes_ =
        end_of(row_outbox_offset_, num_banks * num_ranks * num_rows_home_ * combine_stride_);
  }

  EP_HOST_DEVICE constexpr const MultiNodeConfig& config() const { return config_; }
  EP_HOST_DEVICE constexpr const LowLatencyLayout& base() const { return base_; }
  EP_HOST_DEVICE constexpr const Nodes& nodes() const { return nodes_; }
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }

  // What travels of a message: its header with all K entries, its row, its scales.
  EP_HOST_DEVICE constexpr uint64_t header_bytes() const { return header_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t scales_bytes() const { return scales_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t node_message_bytes() const { return node_message_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t row_in_node_message() const { return header_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t scales_in_node_message() const {
    return scales_in_node_message_;
  }
  // Of a row of combine, its scales included.
  EP_HOST_DEVICE constexpr uint64_t combine_bytes() const { return combine_bytes_; }
  // Of the counts for one rank.
  EP_HOST_DEVICE constexpr uint64_t counts_bytes() const {
    return uint64_t{base_.partition().num_max_local_experts()} * 8;
  }
  // D: ranks of a node that a token may go to.
  EP_HOST_DEVICE constexpr uint32_t num_columns() const { return num_columns_; }
  // Rows of combine that one rank may send to one other.
  EP_HOST_DEVICE constexpr uint64_t num_rows_home() const { return num_rows_home_; }

  // Hierarchical. `remote` numbers the other nodes: of the source, or of the destination.
  EP_HOST_DEVICE constexpr uint64_t node_signal(uint32_t bank, uint32_t remote) const {
    return node_signals_offset_ + (uint64_t{bank} * nodes_.num_remote() + remote) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t node_signal_sleepers(uint32_t remote) const {
    return node_sleepers_offset_ + uint64_t{remote} * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t node_inbox(uint32_t bank, uint32_t remote,
                                               uint32_t slot) const {
    return node_inbox_offset_ + node_message_idx(bank, remote, slot) * node_message_stride_;
  }
  EP_HOST_DEVICE constexpr uint64_t node_outbox(uint32_t bank, uint32_t remote,
                                                uint32_t slot) const {
    return node_outbox_offset_ + node_message_idx(bank, remote, slot) * node_message_stride_;
  }
  // Where a rank of the node puts its partial row of a message. `partial_slot` is the outcome slot
  // that the forwarder gave the message: slot * D + column.
  EP_HOST_DEVICE constexpr uint64_t node_partial(uint32_t bank, uint32_t remote,
                                                 uint32_t partial_slot) const {
    const uint64_t first = node_message_idx(bank, remote, 0) * num_columns_;
    return node_partials_offset_ + (first + partial_slot) * combine_stride_;
  }
  EP_HOST_DEVICE constexpr uint64_t num_partial_slots() const {
    return uint64_t{config_.low_latency.num_max_tokens_per_rank} * num_columns_;
  }
  EP_HOST_DEVICE constexpr uint64_t node_sum(uint32_t bank, uint32_t remote, uint32_t slot) const {
    return node_sums_offset_ + node_message_idx(bank, remote, slot) * combine_stride_;
  }

  // Flat. `remote_rank` numbers the ranks of other nodes.
  EP_HOST_DEVICE constexpr uint32_t remote_rank(uint32_t self_rank, uint32_t peer_rank) const {
    const uint32_t remote = nodes_.remote_idx(nodes_.node_of(self_rank), nodes_.node_of(peer_rank));
    return nodes_.rank_at(remote, nodes_.rank_in_node(peer_rank));
  }
  EP_HOST_DEVICE constexpr uint64_t staged_header(uint32_t bank, uint32_t remote_rank,
                                                  uint32_t slot) const {
    const uint64_t first =
        remote_rank_idx(bank, remote_rank) * config_.low_latency.num_max_tokens_per_rank;
    return staged_headers_offset_ + (first + slot) * header_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t staged_row(uint32_t bank, uint32_t token) const {
    return staged_rows_offset_ + token_idx(bank, token) * row_stride_;
  }
  EP_HOST_DEVICE constexpr uint64_t staged_scales(uint32_t bank, uint32_t token) const {
    return staged_scales_offset_ + token_idx(bank, token) * scales_stride_;
  }
  EP_HOST_DEVICE constexpr uint64_t staged_counts(uint32_t bank, uint32_t remote_rank) const {
    return staged_counts_offset_ + remote_rank_idx(bank, remote_rank) * counts_bytes();
  }
  EP_HOST_DEVICE constexpr uint64_t row_outbox(uint32_t bank, uint32_t remote_rank,
                                               uint32_t i) const {
    const uint64_t first = remote_rank_idx(bank, remote_rank) * num_rows_home_;
    return row_outbox_offset_ + (first + i) * combine_stride_;
  }

  // The first byte of each region, in order, for tests and for drawing.
  EP_HOST_DEVICE constexpr uint64_t node_signals_offset() const { return node_signals_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_sleepers_offset() const { return node_sleepers_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_inbox_offset() const { return node_inbox_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_outbox_offset() const { return node_outbox_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_partials_offset() const { return node_partials_offset_; }
  EP_HOST_DEVICE constexpr uint64_t node_sums_offset() const { return node_sums_offset_; }
  EP_HOST_DEVICE constexpr uint64_t staged_headers_offset() const { return staged_headers_offset_; }
  EP_HOST_DEVICE constexpr uint64_t staged_rows_offset() const { return staged_rows_offset_; }
  EP_HOST_DEVICE constexpr uint64_t staged_scales_offset() const { return staged_scales_offset_; }
  EP_HOST_DEVICE constexpr uint64_t staged_counts_offset() const { return staged_counts_offset_; }
  EP_HOST_DEVICE constexpr uint64_t row_outbox_offset() const { return row_outbox_offset_; }

 private:
  EP_HOST_DEVICE static constexpr uint64_t end_of(uint64_t offset, uint64_t bytes) {
    return align_up(offset + bytes, kSlotAlign);
  }
  EP_HOST_DEVICE constexpr uint64_t node_message_idx(uint32_t bank, uint32_t remote,
                                                     uint32_t slot) const {
    return (uint64_t{bank} * nodes_.num_remote() + remote) *
               config_.low_latency.num_max_tokens_per_rank +
           slot;
  }
  EP_HOST_DEVICE constexpr uint64_t remote_rank_idx(uint32_t bank, uint32_t remote_rank) const {
    return uint64_t{bank} * nodes_.num_remote() * config_.ranks_per_node + remote_rank;
  }
  EP_HOST_DEVICE constexpr uint64_t token_idx(uint32_t bank, uint32_t token) const {
    return uint64_t{bank} * config_.low_latency.num_max_tokens_per_rank + token;
  }

  MultiNodeConfig config_;
  LowLatencyLayout base_;
  Nodes nodes_;
  uint32_t num_columns_ = 0;
  uint64_t header_bytes_ = 0, scales_bytes_ = 0, row_stride_ = 0, scales_stride_ = 0;
  uint64_t scales_in_node_message_ = 0, node_message_bytes_ = 0, node_message_stride_ = 0;
  uint64_t combine_bytes_ = 0, combine_stride_ = 0, num_rows_home_ = 0;
  uint64_t node_signals_offset_ = 0, node_sleepers_offset_ = 0, node_inbox_offset_ = 0;
  uint64_t node_outbox_offset_ = 0, node_partials_offset_ = 0, node_sums_offset_ = 0;
  uint64_t staged_headers_offset_ = 0, staged_rows_offset_ = 0, staged_scales_offset_ = 0;
  uint64_t staged_counts_offset_ = 0, row_outbox_offset_ = 0, num_bytes_ = 0;
};

}  // namespace ep::protocol
