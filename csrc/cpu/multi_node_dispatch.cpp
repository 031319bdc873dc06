// Dispatch between nodes.
//
// Example, hierarchical, 2 nodes of 2 ranks, 4 experts, one a rank, K = 3. Rank 1 has token a ->
// experts (3, 0, 2). It writes [0] to rank 0, its neighbour; rank 3, which has its number on node
// 1, gets one message, [2 3], over the network, and its hook forwards it: [2] to rank 2, as column
// 0, and [3] to itself, as column 1. Ranks 2 and 3 find in their inboxes what rank 1 would have
// written there itself, but that the rows they send back are for rank 3.

#include <algorithm>

#include "cpu/atomics.h"
#include "cpu/low_latency_op.h"
#include "cpu/multi_node.h"
#include "cpu/token_routes.h"

namespace ep::cpu {

using protocol::ExpertEntry;
using protocol::Half;
using protocol::MessageHeader;
using protocol::Phase;

OpResult MultiNodeRank::dispatch_send(const DispatchSendParams& params) {
  Op op(*this, Phase::kDispatch, Half::kSend);
  if (!op.ok() || !check_experts(op, params) || !op.wait_for_credits()) return op.result();
  staged_token_ = -1;
  write_messages(op, params);
  // Starting behind this rank, as low_latency_dispatch.cpp does.
  const auto behind = std::upper_bound(peers_.begin(), peers_.end(), self_rank_);
  std::for_each(behind, peers_.end(), [&](uint32_t peer) { publish_batch(op, peer); });
  std::for_each(peers_.begin(), behind, [&](uint32_t peer) { publish_batch(op, peer); });
  return op.complete(params.num_tokens);
}

// Where rank `dst_rank` of this node looks for a message from `src_rank`.
LowLatencyRank::MessagePlace MultiNodeRank::inbox_place(const Op& op, uint32_t dst_rank,
                                                        uint32_t src_rank, uint32_t slot) {
  std::byte* dst = bases_[dst_rank];
  return {dst + layout_.header(op.bank(), src_rank, slot),
          dst + layout_.inbox_row(op.bank(), src_rank, slot),
          at<float>(dst, layout_.inbox_scales(op.bank(), src_rank, slot))};
}

// In this node, in place; else in this rank's memory, from where it is put.
LowLatencyRank::MessagePlace MultiNodeRank::place_message(const Op& op, uint32_t dst_rank,
                                                          uint32_t slot, uint32_t token) {
  if (view_.is_local(dst_rank)) return inbox_place(op, dst_rank, self_rank_, slot);
  const auto& layout = multi_node_layout_;
  std::byte* self = bases_[self_rank_];
  if (is_hierarchical()) {
    std::byte* message = self + layout.node_outbox(op.bank(), view_.remote_idx(dst_rank), slot);
    return {message, message + layout.row_in_node_message(),
            at<float>(message, layout.scales_in_node_message())};
  }
  const bool has_row = staged_token_ == token;
  staged_token_ = token;
  return {self + layout.staged_header(op.bank(),
                                      multi_node_layout_.remote_rank(self_rank_, dst_rank), slot),
          self + layout.staged_row(op.bank(), token),
          at<float>(self, layout.staged_scales(op.bank(), token)), has_row};
}

void MultiNodeRank::message_is_placed(const Op& op, uint32_t dst_rank, uint32_t slot,
                                      uint32_t token) {
  const auto& layout = multi_node_layout_;
  const uint32_t bank = op.bank();
  if (view_.is_local(dst_rank)) {
    port_.count_store(dst_rank,
                      layout.header_bytes() + layout_.dispatch_row_bytes() + layout.scales_bytes());
  } else if (is_hierarchical()) {
    const uint32_t here = view_.idx_at(dst_rank);
    port_.put(Phase::kDispatch, dst_rank, layout.node_inbox(bank, here, slot),
              layout.node_outbox(bank, view_.remote_idx(dst_rank), slot),
              layout.node_message_bytes());
  } else {
    port_.put(Phase::kDispatch, dst_rank, layout_.inbox_row(bank, self_rank_, slot),
              layout.staged_row(bank, token), layout_.dispatch_row_bytes());
    if (layout.scales_bytes() == 0) return;
    port_.put(Phase::kDispatch, dst_rank, layout_.inbox_scales(bank, self_rank_, slot),
              layout.staged_scales(bank, token), layout.scales_bytes());
  }
}

// The rest of what goes to one peer: headers that still wait for company, counts, the signal.
void MultiNodeRank::publish_batch(Op& op, uint32_t dst_rank) {
  const auto& layout = multi_node_layout_;
  const uint32_t bank = op.bank(), num_messages = num_messages_to_[dst_rank];
  const uint64_t counts_bytes = layout_.partition().num_local_experts(dst_rank) * uint64_t{8};
  op.count_sent(dst_rank, num_messages * (layout_.dispatch_row_bytes() + layout.scales_bytes()));
  if (view_.is_local(dst_rank)) {
    write_counts(at<uint64_t>(bases_[dst_rank], layout_.counts(bank, self_rank_)), op, dst_rank);
    port_.count_store(dst_rank, counts_bytes);
  } else if (is_hierarchical()) {
    // Counts are what the forwarder counts.
    const uint32_t here = view_.idx_at(dst_rank);
    publish_word(Phase::kDispatch, dst_rank, layout.node_signal(bank, here),
                 protocol::pack_signal(op.epoch(), num_messages),
                 layout.node_signal_sleepers(here));
    return;
  } else {
    const uint32_t remote = multi_node_layout_.remote_rank(self_rank_, dst_rank);
    if (num_messages > 0) {
      port_.put(Phase::kDispatch, dst_rank, layout_.header(bank, self_rank_, 0),
                layout.staged_header(bank, remote, 0), num_messages * layout.header_bytes());
    }
    const uint64_t staged = layout.staged_counts(bank, remote);
    write_counts(at<uint64_t>(bases_[self_rank_], staged), op, dst_rank);
    if (counts_bytes > 0) {
      port_.put(Phase::kDispatch, dst_rank, layout_.counts(bank, self_rank_), staged, counts_bytes);
    }
  }
  op.publish_signal(dst_rank, num_messages);
}

OpResult MultiNodeRank::dispatch_recv(const DispatchRecvParams& params, Forwarded forwarded) {
  Op op(*this, Phase::kDispatch, Half::kRecv);
  if (!op.ok()) return op.result();
  // Before anything is waited for that other ranks forward.
  const uint32_t num_remote = is_hierarchical() ? nodes().num_remote() : 0;
  for (; num_forwarded_ < num_remote; ++num_forwarded_) {
    if (!forward_node(op, num_forwarded_, forwarded)) return op.result();
  }
  if (!unpack_sources(op, params)) return op.result();
  finish_dispatch(op, params);
  num_forwarded_ = 0;
  return op.complete(next_message_);
}

// Waits for: what the rank of this one's number on that node has for this node. It is checked
// whole before any of it is passed on.
bool MultiNodeRank::forward_node(Op& op, uint32_t remote, Forwarded forwarded) {
  const auto& layout = multi_node_layout_;
  const uint32_t src_rank = view_.forwarder_on(remote);
  const uint64_t num_max = layout_.config().num_max_tokens_per_rank;
  uint64_t num_messages;
  if (!op.wait_for_word(src_rank, layout.node_signal(op.bank(), remote),
                        layout.node_signal_sleepers(remote), &num_messages)) {
    return false;
  }
  if (num_messages > num_max) return op.fail(Status::kCorrupt, src_rank, num_max, num_messages);
  for (uint32_t slot = 0; slot < num_messages; ++slot) {
    if (!check_node_message(op, remote, slot)) return false;
  }
  std::fill(num_forwarded_to_.begin(), num_forwarded_to_.end(), 0);
  std::fill(num_forwarded_rows_.begin(), num_forwarded_rows_.end(), 0);
  forwarded.num_messages[remote] = static_cast<uint32_t>(num_messages);
  for (uint32_t slot = 0; slot < num_messages; ++slot) {
    forwarded.messages[remote * num_max + slot] = forward_message(op, remote, slot);
  }
  publish_forwarded(op, remote);
  return true;
}

// Memory that contradicts its signal must not choose where we write.
bool MultiNodeRank::check_node_message(Op& op, uint32_t remote, uint32_t slot) const {
  const auto& config = layout_.config();
  const uint32_t src_rank = view_.forwarder_on(remote);
  const std::byte* message =
      bases_[self_rank_] + multi_node_layout_.node_inbox(op.bank(), remote, slot);
  const auto& header = *reinterpret_cast<const MessageHeader*>(message);
  const auto* entries = reinterpret_cast<const ExpertEntry*>(message + sizeof(MessageHeader));
  const auto tag = static_cast<uint32_t>(op.epoch());
  if (header.epoch_tag != tag) return op.fail(Status::kCorrupt, src_rank, tag, header.epoch_tag);
  if (header.num_entries < 1 || header.num_entries > config.top_k) {
    return op.fail(Status::kCorrupt, src_rank, config.top_k, header.num_entries);
  }
  if (header.outcome_slot >= layout_.num_outcome_slots()) {
    return op.fail(Status::kCorrupt, src_rank, layout_.num_outcome_slots(), header.outcome_slot);
  }
  uint32_t last_rank = view_.neighbour(0);
  for (uint32_t i = 0; i < header.num_entries; ++i) {
    const uint32_t expert = entries[i].local_expert;
    if (expert >= config.num_experts) {
      return op.fail(Status::kCorrupt, src_rank, config.num_experts, expert);
    }
    const uint32_t rank = layout_.partition().owner(expert);
    if (rank < last_rank || !view_.is_local(rank)) {
      return op.fail(Status::kCorrupt, src_rank, last_rank, rank);
    }
    last_rank = rank;
  }
  return true;
}

// One message for this node -> one for each of its ranks that own some of the token's experts.
protocol::ForwardedMessage MultiNodeRank::forward_message(Op& op, uint32_t remote, uint32_t slot) {
  const auto& layout = multi_node_layout_;
  const uint32_t src_rank = view_.forwarder_on(remote);
  const std::byte* message = bases_[self_rank_] + layout.node_inbox(op.bank(), remote, slot);
  const auto& header = *reinterpret_cast<const MessageHeader*>(message);
  const auto* entries = reinterpret_cast<const ExpertEntry*>(message + sizeof(MessageHeader));
  const ExpertEntry* end = entries + header.num_entries;
  const auto& partition = layout_.partition();
  uint32_t column = 0;
  for (const ExpertEntry* first = entries; first != end; ++column) {
    const uint32_t dst_rank = partition.owner(first->local_expert);
    const uint32_t dst_slot = num_forwarded_to_[dst_rank]++;
    const MessagePlace place = inbox_place(op, dst_rank, src_rank, dst_slot);
    auto* dst_entries = reinterpret_cast<ExpertEntry*>(place.header + sizeof(MessageHeader));
    const ExpertEntry* entry = first;
    for (; entry != end && partition.owner(entry->local_expert) == dst_rank; ++entry) {
      if (find_twin(first, entry) == nullptr) ++num_forwarded_rows_[entry->local_expert];
      ExpertEntry& dst_entry = dst_entries[entry - first];
      dst_entry = *entry;
      dst_entry.local_expert =
          static_cast<uint16_t>(entry->local_expert - partition.first_expert(dst_rank));
    }
    *reinterpret_cast<MessageHeader*>(place.header) = {
        header.src_token, slot * layout.num_columns() + column,
        static_cast<uint32_t>(entry - first), header.epoch_tag};
    copy_row(place.row, message + layout.row_in_node_message(), layout_.dispatch_row_bytes(),
             Store::kCached);
    std::copy_n(reinterpret_cast<const float*>(message + layout.scales_in_node_message()),
                layout_.num_scales(), place.scales);
    port_.count_store(dst_rank,
                      layout.header_bytes() + layout_.dispatch_row_bytes() + layout.scales_bytes());
    first = entry;
  }
  return {header.outcome_slot, column};
}

// Counts and signals of a source's messages, to the ranks of this node.
void MultiNodeRank::publish_forwarded(Op& op, uint32_t remote) {
  const uint32_t src_rank = view_.forwarder_on(remote), bank = op.bank();
  const auto& partition = layout_.partition();
  for (uint32_t i = 0; i < nodes().ranks_per_node; ++i) {
    const uint32_t dst_rank = view_.neighbour(i);
    auto* counts = at<uint64_t>(bases_[dst_rank], layout_.counts(bank, src_rank));
    const uint32_t first_expert = partition.first_expert(dst_rank);
    const uint32_t num_experts = partition.num_local_experts(dst_rank);
    for (uint32_t local = 0; local < num_experts; ++local) {
      counts[local] = protocol::pack_signal(op.epoch(), num_forwarded_rows_[first_expert + local]);
    }
    port_.count_store(dst_rank, num_experts * uint64_t{8});
    op.count_sent(dst_rank, num_forwarded_to_[dst_rank] *
                                (layout_.dispatch_row_bytes() + multi_node_layout_.scales_bytes()));
    publish_word(Phase::kDispatch, dst_rank, layout_.signal(bank, Phase::kDispatch, src_rank),
                 protocol::pack_signal(op.epoch(), num_forwarded_to_[dst_rank]),
                 layout_.signal_sleepers(Phase::kDispatch, src_rank));
  }
}

}  // namespace ep::cpu
