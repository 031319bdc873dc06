// Combine: expert_out [L, S, H] goes home as out [T, H], weighted and summed.
//
// In the rank-major layout expert_out is [R, M, H], one row a message that the caller has weighted
// and summed already; the handle then has one entry a message, of weight 1.
//
// An expert rank adds up its own experts' rows of a token (k order) and sends one partial row; the
// token's rank adds the partial rows (rank order). Example, token b of low_latency_dispatch.cpp
// with weights (p, q) for experts (3, 2): rank 1 sends p * expert_3(b) + q * expert_2(b), the only
// partial row of b, and b's outcome is that row.
//
// Reduction::kSource: an expert rank sends the rows as they are, and the token's rank weights and
// adds them (k order). In the example rank 1 sends expert_3(b) and expert_2(b), for k 0 and 1.
//
// Either row may travel as float8. A partial row is quantised as it was added up, in float32; the
// token's rank takes the values that arrive, e4m3 * scale.

#include "cpu/low_latency_op.h"
#include "cpu/rows.h"

namespace ep::cpu {

using protocol::DType;
using protocol::Half;
using protocol::Phase;

OpResult LowLatencyRank::combine_send(const CombineSendParams& params) {
  Op op(*this, Phase::kCombine, Half::kSend);
  if (!op.ok() || !op.wait_for_credits()) return op.result();
  const uint32_t num_messages = find_messages(params);
  const uint32_t num_ranks = layout_.config().num_ranks;
  // This rank's own rows last: nobody else waits for them.
  for (uint32_t i = 1; i <= num_ranks; ++i) {
    const uint32_t src_rank = (self_rank_ + i) % num_ranks;
    send_messages(op, src_rank, params);
    op.publish_signal(src_rank, params.handle.num_messages[src_rank]);
  }
  return op.complete(num_messages);
}

// Where each source's messages are in the handle. Returns how many there are.
uint32_t LowLatencyRank::find_messages(const CombineSendParams& params) {
  uint32_t num_messages = 0;
  for (uint32_t src_rank = 0; src_rank < layout_.config().num_ranks; ++src_rank) {
    first_message_of_[src_rank] = num_messages;
    num_messages += params.handle.num_messages[src_rank];
  }
  return num_messages;
}

// Everything that goes home to `src_rank`, but for the signal.
void LowLatencyRank::send_messages(Op& op, uint32_t src_rank, const CombineSendParams& params) {
  const uint64_t num_rows = is_reduced_at_source() ? send_rows(op, src_rank, params)
                                                   : send_partials(op, src_rank, params);
  op.count_sent(writer_of(src_rank), num_rows * travelling_bytes());
}

std::byte* LowLatencyRank::place_row(const Op& op, uint32_t src_rank, uint32_t outcome_slot) {
  return bases_[src_rank] + layout_.outcome(op.bank(), outcome_slot);
}

// A weighted sum of rows of `dtype`, with or without weights, as it travels.
void LowLatencyRank::write_sum(SumScratch& scratch, std::byte* out, DType dtype,
                               const std::byte* const* rows, const float* weights,
                               uint32_t num_rows, Store store) const {
  const auto& config = layout_.config();
  const RowFormat format{dtype, layout_.combine_scales_in_row()};
  if (!is_combine_float8()) {
    weighted_sum(format, config.dtype, out, rows, weights, num_rows, config.hidden, store);
    return;
  }
  auto* sum = reinterpret_cast<std::byte*>(scratch.sum.data());
  weighted_sum(format, DType::kFloat32, sum, rows, weights, num_rows, config.hidden,
               Store::kCached);
  std::byte* scales = scratch.row.data() + layout_.combine_scales_in_row();
  quantize_row(DType::kFloat32, protocol::ScaleFormat::kFloat32, sum, config.hidden,
               scratch.row.data(), reinterpret_cast<float*>(scales));
  copy_row(out, scratch.row.data(), scratch.row.size(), store);
}

// How to write so many rows of combine for `src_rank`.
Store LowLatencyRank::store_for(uint32_t src_rank, uint64_t num_rows) const {
  return src_rank == self_rank_ ? Store::kCached
                                : store_for_peer(num_rows * layout_.combine_row_bytes());
}

// One partial row to `src_rank` for each message that came from it. Returns how many.
uint64_t LowLatencyRank::send_partials(Op& op, uint32_t src_rank, const CombineSendParams& params) {
  const std::byte* rows[protocol::kMaxTopK];
  float weights[protocol::kMaxTopK];
  const HandleMessage* messages = params.handle.messages + first_message_of_[src_rank];
  const uint32_t num_messages = params.handle.num_messages[src_rank];
  const Store store = store_for(src_rank, num_messages);
  for (uint32_t i = 0; i < num_messages; ++i) {
    const HandleEntry* entries = params.handle.entries + messages[i].first_entry;
    for (uint32_t j = 0; j < messages[i].num_entries; ++j) {
      rows[j] = params.expert_out + entries[j].row * layout_.row_bytes();
      weights[j] = entries[j].weight;
    }
    const uint32_t outcome_slot = messages[i].outcome_slot;
    write_sum(sum_scratch_, place_row(op, src_rank, outcome_slot), layout_.config().dtype, rows,
              weights, messages[i].num_entries, store);
    row_is_placed(op, src_rank, outcome_slot);
  }
  return num_messages;
}

// Every row of the messages that came from `src_rank`, each to the outcome of its k. Returns how
// many. A token that lists an expert twice gets that row for both k.
uint64_t LowLatencyRank::send_rows(Op& op, uint32_t src_rank, const CombineSendParams& params) {
  const uint64_t row_bytes = layout_.row_bytes();
  const HandleMessage* messages = params.handle.messages + first_message_of_[src_rank];
  const uint32_t num_messages = params.handle.num_messages[src_rank];
  uint64_t num_rows = 0;
  for (uint32_t i = 0; i < num_messages; ++i) num_rows += messages[i].num_entries;
  const Store store = store_for(src_rank, num_rows);
  for (uint32_t i = 0; i < num_messages; ++i) {
    const HandleEntry* entries = params.handle.entries + messages[i].first_entry;
    for (uint32_t j = 0; j < messages[i].num_entries; ++j) {
      const uint32_t outcome_slot = messages[i].outcome_slot + protocol::bits_of(entries[j].weight);
      const std::byte* row = params.expert_out + entries[j].row * row_bytes;
      std::byte* out = place_row(op, src_rank, outcome_slot);
      if (is_combine_float8()) {
        write_sum(sum_scratch_, out, layout_.config().dtype, &row, nullptr, 1, store);
      } else {
        copy_row(out, row, row_bytes, store);
      }
      row_is_placed(op, src_rank, outcome_slot);
    }
  }
  return num_rows;
}

// Of each rank, how many messages of this batch it has to answer -> num_due_.
void LowLatencyRank::count_due(const CombineRecvParams& params) {
  std::fill(num_due_.begin(), num_due_.end(), 0);
  std::fill(last_token_of_.begin(), last_token_of_.end(), params.num_tokens);
  for (uint32_t token = 0; token < params.num_tokens; ++token) {
    const uint32_t* answers = params.answers + uint64_t{token} * layout_.num_outcome_columns();
    for (uint32_t i = 0; i < params.num_partials[token]; ++i) {
      const uint32_t rank = answers[i] >> 16;
      num_due_[rank] += last_token_of_[rank] != token;  // rows of one message count once
      last_token_of_[rank] = token;
    }
  }
}

OpResult LowLatencyRank::combine_recv(const CombineRecvParams& params) {
  Op op(*this, Phase::kCombine, Half::kRecv);
  if (!op.ok()) return op.result();
  count_due(params);
  // Every rank, contributing or not: a credit must never run ahead of a late sender.
  uint64_t num_rows = 0;
  for (uint32_t src_rank = 0; src_rank < layout_.config().num_ranks; ++src_rank) {
    uint64_t count;
    if (!op.wait_for_signal(src_rank, &count)) return op.result();
    // As where ranks combine two dispatches in different orders.
    if (count != num_due_[src_rank]) {
      op.fail(Status::kCorrupt, src_rank, num_due_[src_rank], count);
      return op.result();
    }
    num_rows += count;
  }

  const std::byte* rows[protocol::kMaxTopK];
  float weights[protocol::kMaxTopK];
  const std::byte* self = bases_[self_rank_];
  const auto& config = layout_.config();
  for (uint32_t token = 0; token < params.num_tokens; ++token) {
    const uint32_t num_partials = params.num_partials[token];
    const uint64_t first_slot = uint64_t{token} * layout_.num_outcome_columns();
    for (uint32_t i = 0; i < num_partials; ++i) {
      const uint32_t column = is_reduced_at_source() ? params.answers[first_slot + i] & 0xffff : i;
      rows[i] = self + layout_.outcome(op.bank(), first_slot + column);
      if (is_reduced_at_source()) weights[i] = params.topk_weights[first_slot + column];
    }
    weighted_sum({config.combine_dtype, layout_.combine_scales_in_row()}, config.dtype,
                 params.out + token * layout_.row_bytes(), rows,
                 is_reduced_at_source() ? weights : nullptr, num_partials, config.hidden,
                 Store::kCached);
  }
  op.publish_credits();
  return op.complete(num_rows);
}

}  // namespace ep::cpu
