// Dispatch: x [T, H] and topk_idx [T, K] become recv_x [L, S, H] on the ranks that own the experts.
//
// Example, 2 ranks, 4 experts, K = 2, M = 2. Rank 0 has tokens a -> experts (0, 2), b -> (3, 2);
// rank 1 has c -> (2, 0). Messages to rank 1: a [2], b [3, 2] from rank 0, c [2] from itself. Rank
// 1 owns experts 2 and 3; its recv_x[0] (expert 2) is a b c -, its recv_x[1] (expert 3) is b - - -,
// and its counts are [3, 1].
//
// Rank-major instead, recv_x [R, M, H]: from rank 0 a b, with local experts [0 -] and [1 0], from
// rank 1 c -, with [0 -] and, for the slot that is not used, [- -]. The counts are the same.

#include <algorithm>

#include "cpu/atomics.h"
#include "cpu/low_latency_op.h"
#include "cpu/rows.h"
#include "cpu/token_routes.h"
#include "protocol/scales.h"

namespace ep::cpu {

using protocol::ExpertEntry;
using protocol::Half;
using protocol::MessageHeader;
using protocol::OutputLayout;
using protocol::Phase;

namespace {

void write_scales(const protocol::LowLatencyLayout& layout, const DispatchRecvParams& params,
                  uint64_t row, const float* scales) {
  auto* words = static_cast<uint32_t*>(params.recv_scales);
  for (uint32_t word = 0; word < layout.num_scale_words(); ++word) {
    words[protocol::scale_word_idx(layout, params.output, row, word)] =
        protocol::scale_word(layout.config().scale_format, scales, layout.num_scales(), word);
  }
}

// Rank-major: the experts of one row, in k order, and how they are weighted.
void list_experts(const DispatchRecvParams& params, uint64_t row, uint32_t top_k,
                  const ExpertEntry* entries, uint32_t num_entries) {
  int32_t* topk_idx = params.recv_topk_idx + row * top_k;
  float* topk_weights = params.recv_topk_weights + row * top_k;
  for (uint32_t i = 0; i < top_k; ++i) {
    topk_idx[i] = i < num_entries ? entries[i].local_expert : -1;
    topk_weights[i] = i < num_entries ? entries[i].weight : 0.0f;
  }
}

// Reduction::kSource: the rows of a token that will come home. Returns how many.
uint32_t list_answers(const protocol::LowLatencyLayout& layout, const DispatchSendParams& params,
                      uint32_t token) {
  const uint32_t top_k = layout.config().top_k;
  const uint64_t first = uint64_t{token} * top_k;
  uint32_t num_answers = 0;
  for (uint32_t k = 0; k < top_k; ++k) {
    const int64_t expert = expert_at(params, first + k);
    if (expert < 0) continue;
    const uint32_t rank = layout.partition().owner(static_cast<uint32_t>(expert));
    params.answers[first + num_answers++] = rank << 16 | k;
  }
  return num_answers;
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

  const uint64_t row_bytes = layout_.dispatch_row_bytes();
  const Store peer_store = store_for_peer(params.num_tokens * row_bytes);
  TokenRoutes routes;
  for (uint32_t token = 0; token < params.num_tokens; ++token) {
    routes.assign(layout_.partition(), params, token, layout_.config().top_k);
    params.num_partials[token] = 0;
    if (routes.begin() == routes.end()) continue;
    const Row row = outgoing_.at(params.x, params.x_scales, params.x_is_quantized, token);
    uint32_t num_messages = 0;
    for (auto first = routes.begin(); first != routes.end();) {
      const auto [dst_rank, is_node] = destination(first->rank);
      const uint32_t slot = num_messages_to_[dst_rank]++;
      const MessagePlace place = place_message(op, dst_rank, slot, token);
      auto* entries = reinterpret_cast<ExpertEntry*>(place.header + sizeof(MessageHeader));

      auto route = first;
      for (; route != routes.end() && destination(route->rank).rank == dst_rank; ++route) {
        ExpertEntry& entry = entries[route - first];
        entry = route->entry;
        if (is_node) entry.local_expert = static_cast<uint16_t>(route->expert);
        const ExpertEntry* twin = find_twin(entries, &entry);
        entry.position = twin != nullptr ? twin->position : num_rows_for_expert_[route->expert]++;
      }
      // Where all rows come home, each to the column of its own k, messages name the first.
      const uint32_t column = is_reduced_at_source() ? 0 : num_messages;
      const uint32_t outcome_slot = token * layout_.num_outcome_columns() + column;
      ++num_messages;
      *reinterpret_cast<MessageHeader*>(place.header) = {token, outcome_slot,
                                                         static_cast<uint32_t>(route - first),
                                                         static_cast<uint32_t>(op.epoch())};
      if (!is_reduced_at_source()) params.answers[outcome_slot] = dst_rank << 16 | slot;
      if (!place.has_row) {
        copy_row(place.row, row.values, row_bytes,
                 dst_rank == self_rank_ ? Store::kCached : peer_store);
        std::copy_n(row.scales, layout_.num_scales(), place.scales);
      }
      message_is_placed(op, dst_rank, slot, token);
      first = route;
    }
    params.num_partials[token] =
        is_reduced_at_source() ? list_answers(layout_, params, token) : num_messages;
  }
}

LowLatencyRank::MessagePlace LowLatencyRank::place_message(const Op& op, uint32_t dst_rank,
                                                           uint32_t slot, uint32_t) {
  std::byte* dst = bases_[dst_rank];
  return {dst + layout_.header(op.bank(), self_rank_, slot),
          dst + layout_.inbox_row(op.bank(), self_rank_, slot),
          at<float>(dst, layout_.inbox_scales(op.bank(), self_rank_, slot))};
}

// Of the rows that this rank sends to each expert of `dst_rank`.
void LowLatencyRank::write_counts(uint64_t* counts, const Op& op, uint32_t dst_rank) const {
  const uint32_t first_expert = layout_.partition().first_expert(dst_rank);
  for (uint32_t local = 0; local < layout_.partition().num_local_experts(dst_rank); ++local) {
    counts[local] = protocol::pack_signal(op.epoch(), num_rows_for_expert_[first_expert + local]);
  }
}

void LowLatencyRank::publish_counts_and_signals(Op& op) {
  const auto& partition = layout_.partition();
  const uint64_t bytes_of_row = layout_.dispatch_row_bytes() + layout_.num_scales() * sizeof(float);
  // Starting behind this rank, so that not all ranks wake rank 0 first.
  for (uint32_t i = 1; i <= partition.num_ranks; ++i) {
    const uint32_t dst_rank = (self_rank_ + i) % partition.num_ranks;
    write_counts(at<uint64_t>(bases_[dst_rank], layout_.counts(op.bank(), self_rank_)), op,
                 dst_rank);
    op.publish_signal(dst_rank, num_messages_to_[dst_rank]);
    op.count_sent(dst_rank, num_messages_to_[dst_rank] * bytes_of_row);
  }
}

OpResult LowLatencyRank::dispatch_recv(const DispatchRecvParams& params) {
  Op op(*this, Phase::kDispatch, Half::kRecv);
  if (!op.ok() || !unpack_sources(op, params)) return op.result();
  finish_dispatch(op, params);
  return op.complete(next_message_);
}

bool LowLatencyRank::unpack_sources(Op& op, const DispatchRecvParams& params) {
  std::fill(next_row_.begin(), next_row_.end(), 0);
  num_rows_ = next_message_ = next_entry_ = 0;
  // In rank order, each source as soon as it has signalled: rows of an expert end up ordered by
  // source, then token, whatever arrived first.
  for (uint32_t src_rank = 0; src_rank < layout_.config().num_ranks; ++src_rank) {
    if (!unpack_source(op, src_rank, params)) return false;
  }
  return true;
}

void LowLatencyRank::finish_dispatch(Op& op, const DispatchRecvParams& params) {
  std::copy(next_row_.begin(), next_row_.end(), params.num_recv_tokens_per_expert);
  for (uint32_t e = 0; e < next_row_.size(); ++e) statistics_.add_expert_rows(e, next_row_[e]);
  op.publish_credits();
}

// Inbox of one source -> rows of recv_x and entries of the handle. Nothing is copied before all its
// headers agree with the counts.
bool LowLatencyRank::unpack_source(Op& op, uint32_t src_rank, const DispatchRecvParams& params) {
  const auto& config = layout_.config();
  uint64_t num_messages;
  if (!op.wait_for_word(writer_of(src_rank), layout_.signal(op.bank(), op.phase(), src_rank),
                        layout_.signal_sleepers(op.phase(), src_rank), &num_messages)) {
    return false;
  }
  if (num_messages > config.num_max_tokens_per_rank) {
    return op.fail(Status::kCorrupt, src_rank, config.num_max_tokens_per_rank, num_messages);
  }
  params.handle.num_messages[src_rank] = static_cast<uint32_t>(num_messages);
  const uint64_t num_rows_before = num_rows_;
  first_row_ = next_row_;
  const uint32_t first_message = next_message_;
  for (uint32_t slot = 0; slot < num_messages; ++slot) {
    if (!unpack_message(op, src_rank, slot, params)) return false;
  }
  if (!check_counts(op, src_rank)) return false;
  if (params.output == OutputLayout::kExpertMajor) {
    copy_rows(op, src_rank, first_message, num_rows_ - num_rows_before, params);
    return true;
  }
  copy_rows(op, src_rank, first_message, num_messages, params);
  for (uint64_t slot = num_messages; slot < config.num_max_tokens_per_rank; ++slot) {
    const uint64_t row = uint64_t{src_rank} * config.num_max_tokens_per_rank + slot;
    list_experts(params, row, config.top_k, nullptr, 0);
  }
  return true;
}

// Header of one message -> its entries in the handle and, rank-major, its experts.
bool LowLatencyRank::unpack_message(Op& op, uint32_t src_rank, uint32_t slot,
                                    const DispatchRecvParams& params) {
  const std::byte* message = bases_[self_rank_] + layout_.header(op.bank(), src_rank, slot);
  const auto& header = *reinterpret_cast<const MessageHeader*>(message);
  const auto* entries = reinterpret_cast<const ExpertEntry*>(message + sizeof(MessageHeader));
  if (!check_header(op, src_rank, header)) return false;
  const bool is_rank_major = params.output == OutputLayout::kRankMajor;
  HandleEntry* out = params.handle.entries + next_entry_;
  for (uint32_t i = 0; i < header.num_entries; ++i) {
    uint64_t row = 0;
    if (!place_entry(op, src_rank, entries, i, &row)) return false;
    if (is_rank_major) continue;
    const float weight =
        is_reduced_at_source() ? protocol::float_of(entries[i].k) : entries[i].weight;
    out[i] = {static_cast<uint32_t>(row), weight};
  }
  if (is_rank_major) {
    const auto& config = layout_.config();
    const uint32_t row = src_rank * config.num_max_tokens_per_rank + slot;
    list_experts(params, row, config.top_k, entries, header.num_entries);
    out[0] = {row, 1.0f};
  }
  const uint32_t num_entries = is_rank_major ? 1 : header.num_entries;
  params.handle.messages[next_message_++] = {header.src_token, header.outcome_slot, next_entry_,
                                             num_entries};
  next_entry_ += num_entries;
  return true;
}

// Memory that contradicts its signal must not choose where we write.
bool LowLatencyRank::check_header(Op& op, uint32_t src_rank, const MessageHeader& header) const {
  const auto epoch_tag = static_cast<uint32_t>(op.epoch());
  if (header.epoch_tag != epoch_tag) {
    return op.fail(Status::kCorrupt, src_rank, epoch_tag, header.epoch_tag);
  }
  if (header.num_entries < 1 || header.num_entries > layout_.config().top_k) {
    return op.fail(Status::kCorrupt, src_rank, layout_.config().top_k, header.num_entries);
  }
  const uint64_t num_columns = is_reduced_at_source() ? layout_.config().top_k : 1;
  if (header.outcome_slot + num_columns > num_outcome_slots(src_rank)) {
    return op.fail(Status::kCorrupt, src_rank, num_outcome_slots(src_rank), header.outcome_slot);
  }
  return true;
}

// The row of recv_x [L * S, H] that entry i of a message belongs to.
bool LowLatencyRank::place_entry(Op& op, uint32_t src_rank, const ExpertEntry* entries, uint32_t i,
                                 uint64_t* row) {
  const uint32_t local_expert = entries[i].local_expert;
  if (local_expert >= next_row_.size()) {
    return op.fail(Status::kCorrupt, src_rank, next_row_.size(), local_expert);
  }
  const uint32_t top_k = layout_.config().top_k;
  if (entries[i].k >= top_k) return op.fail(Status::kCorrupt, src_rank, top_k, entries[i].k);
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
  *row = local_expert * layout_.expert_capacity() + first_row_[local_expert] + position;
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

// Rows of one source, and their scales, to the places that the handle gives them. Entries of a
// message that are of one expert share a row.
void LowLatencyRank::copy_rows(Op& op, uint32_t src_rank, uint32_t first_message, uint64_t num_rows,
                               const DispatchRecvParams& params) const {
  const auto& config = layout_.config();
  const uint64_t row_bytes = layout_.dispatch_row_bytes();
  // If every source sends about as much as this one, every rank and bank holds num_ranks as much.
  const Store store =
      store_for_self(num_rows * row_bytes * config.num_ranks, config.num_ranks * config.num_banks);
  std::byte* self = bases_[self_rank_];
  for (uint32_t slot = 0; slot < next_message_ - first_message; ++slot) {
    const std::byte* values = self + layout_.inbox_row(op.bank(), src_rank, slot);
    const auto* scales = at<float>(self, layout_.inbox_scales(op.bank(), src_rank, slot));
    const HandleMessage& message = params.handle.messages[first_message + slot];
    const HandleEntry* entries = params.handle.entries + message.first_entry;
    for (const HandleEntry* entry = entries; entry != entries + message.num_entries; ++entry) {
      const bool is_copied = std::any_of(
          entries, entry, [&](const HandleEntry& other) { return other.row == entry->row; });
      if (is_copied) continue;
      copy_row(params.recv_x + entry->row * row_bytes, values, row_bytes, store);
      write_scales(layout_, params, entry->row, scales);
    }
  }
}

}  // namespace ep::cpu
