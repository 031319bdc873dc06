// Dispatch: x [T, H] and topk_idx [T, K] become recv_x [L, S, H] on the ranks that own the experts.
//
// Example, 2 ranks, 4 experts, K = 2, M = 2. Rank 0 has tokens a -> experts (0, 2), b -> (3, 2);
// rank 1 has c -> (2, 0). Messages to rank 1: a [2], b [3, 2] from rank 0, c [2] from itself. Rank
// 1 owns experts 2 and 3; its recv_x[0] (expert 2) is a b c -, its recv_x[1] (expert 3) is b - - -,
// and its counts are [3, 1].

#include <algorithm>

#include "cpu/atomics.h"
#include "cpu/low_latency_op.h"
#include "cpu/rows.h"

namespace ep::cpu {

using protocol::ExpertEntry;
using protocol::Half;
using protocol::MessageHeader;
using protocol::Phase;

namespace {

int64_t expert_at(const DispatchSendParams& params, uint64_t i) {
  return params.topk_idx_is_int64 ? static_cast<const int64_t*>(params.topk_idx)[i]
                                  : static_cast<const int32_t*>(params.topk_idx)[i];
}

// The experts of one token, grouped by the rank that owns them: ranks ascending, k ascending
// within.
class TokenRoutes {
 public:
  struct Route {
    uint32_t rank;
    uint32_t expert;
    ExpertEntry entry;
  };

  void assign(const protocol::ExpertPartition& partition, const DispatchSendParams& params,
              uint32_t token, uint32_t top_k) {
    num_routes_ = 0;
    for (uint32_t k = 0; k < top_k; ++k) {
      const uint64_t i = uint64_t{token} * top_k + k;
      const int64_t expert_or_none = expert_at(params, i);
      if (expert_or_none < 0) continue;
      const uint32_t expert = static_cast<uint32_t>(expert_or_none);
      const uint32_t rank = partition.owner(expert);
      const auto local_expert = static_cast<uint16_t>(expert - partition.first_expert(rank));
      uint32_t place = num_routes_++;
      for (; place > 0 && routes_[place - 1].rank > rank; --place) {
        routes_[place] = routes_[place - 1];
      }
      routes_[place] = {
          rank, expert, {local_expert, static_cast<uint16_t>(k), 0, params.topk_weights[i]}};
    }
  }

  const Route* begin() const { return routes_; }
  const Route* end() const { return routes_ + num_routes_; }

 private:
  Route routes_[protocol::kMaxTopK];
  uint32_t num_routes_ = 0;
};

// A token may list an expert twice. It then occupies one row there, and both weights count.
const ExpertEntry* find_twin(const ExpertEntry* entries, const ExpertEntry* entry) {
  const auto* twin = std::find_if(
      entries, entry, [&](const ExpertEntry& e) { return e.local_expert == entry->local_expert; });
  return twin == entry ? nullptr : twin;
}

// One payload to the rows of its entries; entries of one expert share a row.
void copy_to_rows(const protocol::LowLatencyLayout& layout, const std::byte* payload,
                  const DispatchRecvParams& params, const HandleEntry* entries,
                  uint32_t num_entries, Store store) {
  for (const HandleEntry* entry = entries; entry != entries + num_entries; ++entry) {
    const bool is_copied = std::any_of(
        entries, entry, [&](const HandleEntry& other) { return other.row == entry->row; });
    if (is_copied) continue;
    copy_row(params.recv_x + entry->row * layout.row_bytes(), payload, layout.row_bytes(), store);
  }
}

}  // namespace

OpResult LowLatencyRank::dispatch_send(const DispatchSendParams& params) {
  Op op(*this, Phase::kDispatch, Half::kSend);
  if (!op.ok() || !check_experts(op, params) || !op.wait_for_credits()) return op.result();
  write_messages(op, params);
  publish_counts_and_signals(op);
  return op.complete(params.num_tokens);
}

bool LowLatencyRank::check_experts(Op& op, const DispatchSendParams& params) const {
  const uint32_t top_k = layout_.config().top_k;
  const int64_t num_experts = layout_.config().num_experts;
  const uint64_t num_routes = uint64_t{params.num_tokens} * top_k;
  for (uint64_t i = 0; i < num_routes; ++i) {
    const int64_t expert = expert_at(params, i);
    if (expert < -1 || expert >= num_experts) {
      return op.refuse_expert(static_cast<uint32_t>(i / top_k), static_cast<uint32_t>(i % top_k),
                              expert);
    }
  }
  return true;
}

// Copies each token once to every rank that owns some of its experts.
void LowLatencyRank::write_messages(Op& op, const DispatchSendParams& params) {
  std::fill(num_messages_to_.begin(), num_messages_to_.end(), 0);
  std::fill(num_rows_for_expert_.begin(), num_rows_for_expert_.end(), 0);

  const Store peer_store = store_for_peer(params.num_tokens * layout_.row_bytes());
  TokenRoutes routes;
  for (uint32_t token = 0; token < params.num_tokens; ++token) {
    routes.assign(layout_.partition(), params, token, layout_.config().top_k);
    uint32_t column = 0;
    for (auto first = routes.begin(); first != routes.end(); ++column) {
      const uint32_t dst_rank = first->rank;
      const uint32_t slot = num_messages_to_[dst_rank]++;
      std::byte* message = bases_[dst_rank] + layout_.message(op.bank(), self_rank_, slot);
      auto* entries = reinterpret_cast<ExpertEntry*>(message + sizeof(MessageHeader));

      auto route = first;
      for (; route != routes.end() && route->rank == dst_rank; ++route) {
        ExpertEntry& entry = entries[route - first];
        entry = route->entry;
        const ExpertEntry* twin = find_twin(entries, &entry);
        entry.position = twin != nullptr ? twin->position : num_rows_for_expert_[route->expert]++;
      }
      *reinterpret_cast<MessageHeader*>(message) = {
          token, token * layout_.num_outcome_columns() + column,
          static_cast<uint32_t>(route - first), static_cast<uint32_t>(op.epoch())};
      copy_row(message + layout_.payload_in_message(), params.x + token * layout_.row_bytes(),
               layout_.row_bytes(), dst_rank == self_rank_ ? Store::kCached : peer_store);
      first = route;
    }
    params.num_partials[token] = column;
  }
}

void LowLatencyRank::publish_counts_and_signals(Op& op) {
  const auto& partition = layout_.partition();
  // Starting behind this rank, so that not all ranks wake rank 0 first.
  for (uint32_t i = 1; i <= partition.num_ranks; ++i) {
    const uint32_t dst_rank = (self_rank_ + i) % partition.num_ranks;
    auto* counts = at<uint64_t>(bases_[dst_rank], layout_.counts(op.bank(), self_rank_));
    const uint32_t first_expert = partition.first_expert(dst_rank);
    for (uint32_t local = 0; local < partition.num_local_experts(dst_rank); ++local) {
      counts[local] = protocol::pack_signal(op.epoch(), num_rows_for_expert_[first_expert + local]);
    }
    op.publish_signal(dst_rank, num_messages_to_[dst_rank]);
  }
}

OpResult LowLatencyRank::dispatch_recv(const DispatchRecvParams& params) {
  Op op(*this, Phase::kDispatch, Half::kRecv);
  if (!op.ok()) return op.result();
  std::fill(next_row_.begin(), next_row_.end(), 0);
  num_rows_ = next_message_ = next_entry_ = 0;
  // In rank order, each source as soon as it has signalled: rows of an expert end up ordered by
  // source, then token, whatever arrived first.
  for (uint32_t src_rank = 0; src_rank < layout_.config().num_ranks; ++src_rank) {
    if (!unpack_source(op, src_rank, params)) return op.result();
  }
  std::copy(next_row_.begin(), next_row_.end(), params.num_recv_tokens_per_expert);
  op.publish_credits();
  return op.complete(next_message_);
}

// Inbox of one source -> rows of recv_x and entries of the handle. Nothing is copied before all its
// headers agree with the counts.
bool LowLatencyRank::unpack_source(Op& op, uint32_t src_rank, const DispatchRecvParams& params) {
  uint64_t num_messages;
  if (!op.wait_for_signal(src_rank, &num_messages)) return false;
  if (num_messages > layout_.config().num_max_tokens_per_rank) {
    return op.fail(Status::kCorrupt, src_rank, layout_.config().num_max_tokens_per_rank,
                   num_messages);
  }
  params.handle.num_messages[src_rank] = static_cast<uint32_t>(num_messages);
  const uint64_t num_rows_before = num_rows_;
  first_row_ = next_row_;
  const uint32_t first_message = next_message_;
  for (uint32_t slot = 0; slot < num_messages; ++slot) {
    if (!unpack_message(op, src_rank, slot, params)) return false;
  }
  if (!check_counts(op, src_rank)) return false;

  const uint64_t num_rows = num_rows_ - num_rows_before;
  const auto& config = layout_.config();
  // If every source sends about as much as this one, every rank and bank holds num_ranks as much.
  const Store store = store_for_self(num_rows * layout_.row_bytes() * config.num_ranks,
                                     config.num_ranks * config.num_banks);
  for (uint32_t slot = 0; slot < num_messages; ++slot) {
    const std::byte* message = bases_[self_rank_] + layout_.message(op.bank(), src_rank, slot);
    const HandleMessage& unpacked = params.handle.messages[first_message + slot];
    copy_to_rows(layout_, message + layout_.payload_in_message(), params,
                 params.handle.entries + unpacked.first_entry, unpacked.num_entries, store);
  }
  return true;
}

// Header of one message -> its rows in recv_x, and the handle.
bool LowLatencyRank::unpack_message(Op& op, uint32_t src_rank, uint32_t slot,
                                    const DispatchRecvParams& params) {
  const std::byte* message = bases_[self_rank_] + layout_.message(op.bank(), src_rank, slot);
  const auto& header = *reinterpret_cast<const MessageHeader*>(message);
  const auto* entries = reinterpret_cast<const ExpertEntry*>(message + sizeof(MessageHeader));
  const auto epoch_tag = static_cast<uint32_t>(op.epoch());
  // Memory that contradicts its signal must not choose where we write.
  if (header.epoch_tag != epoch_tag) {
    return op.fail(Status::kCorrupt, src_rank, epoch_tag, header.epoch_tag);
  }
  if (header.num_entries < 1 || header.num_entries > layout_.config().top_k) {
    return op.fail(Status::kCorrupt, src_rank, layout_.config().top_k, header.num_entries);
  }
  if (header.outcome_slot >= layout_.num_outcome_slots()) {
    return op.fail(Status::kCorrupt, src_rank, layout_.num_outcome_slots(), header.outcome_slot);
  }
  params.handle.messages[next_message_++] = {header.src_token, header.outcome_slot, next_entry_,
                                             header.num_entries};
  HandleEntry* out = params.handle.entries + next_entry_;
  next_entry_ += header.num_entries;
  for (uint32_t i = 0; i < header.num_entries; ++i) {
    const uint32_t local_expert = entries[i].local_expert;
    if (local_expert >= next_row_.size()) {
      return op.fail(Status::kCorrupt, src_rank, next_row_.size(), local_expert);
    }
    const ExpertEntry* twin = find_twin(entries, entries + i);
    const uint32_t row_of_source = next_row_[local_expert] - first_row_[local_expert];
    const uint32_t position = twin != nullptr ? twin->position : row_of_source;
    if (entries[i].position != position) {
      return op.fail(Status::kCorrupt, src_rank, position, entries[i].position);
    }
    if (twin == nullptr) {
      ++next_row_[local_expert];
      ++num_rows_;
    }
    const uint64_t row =
        local_expert * layout_.expert_capacity() + first_row_[local_expert] + position;
    out[i] = {static_cast<uint32_t>(row), entries[i].weight};
  }
  return true;
}

// The counts that came with the signal must be of this epoch and equal the rows of its messages.
bool LowLatencyRank::check_counts(Op& op, uint32_t src_rank) const {
  const auto* counts = at<uint64_t>(bases_[self_rank_], layout_.counts(op.bank(), src_rank));
  for (size_t local = 0; local < next_row_.size(); ++local) {
    const uint64_t expected =
        protocol::pack_signal(op.epoch(), next_row_[local] - first_row_[local]);
    if (counts[local] != expected) {
      return op.fail(Status::kCorrupt, src_rank, expected, counts[local]);
    }
  }
  return true;
}

}  // namespace ep::cpu
