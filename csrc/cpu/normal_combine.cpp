// Combine: x [N, H], a row for each row that dispatch brought, goes home as out [T, H]: for each
// token the sum of its rows, in rank order, then of its biases, rounded once. A token that went
// nowhere is 0, or its biases. Weights [N, K] go home with the rows where the callers ask for it.
//
// The rounds are those of dispatch, the other way: in each, a rank answers the messages that it got
// in it, in their order, so that all rows of a token come home in one round, in the slots that its
// messages had. In the example of normal_dispatch.cpp a is the sum of a row of rank 0's slot 0 and
// one of rank 1's.

#include <algorithm>

#include "cpu/atomics.h"
#include "cpu/normal_op.h"
#include "cpu/rows.h"

namespace ep::cpu {

using protocol::NormalCombineParams;
using protocol::OpResult;

OpResult NormalRank::combine(const NormalCombineParams& params) {
  Op op(*this, NormalCall::kCombine);
  if (!op.ok() || !op.wait_until_emptied()) return op.result();
  start_rows(params.rows);
  const bool is_done = op.run_rounds(
      params.rows.num_rounds, [&](uint64_t round) { send_home(op, round, params); },
      [&](uint64_t round) { return add_up(op, round, params); });
  return is_done ? op.complete(params.rows.num_rounds, end_row_.back()) : op.result();
}

// The rows of this round's messages, to where those came from.
void NormalRank::send_home(Op& op, uint64_t round, const NormalCombineParams& params) {
  const uint32_t num_ranks = layout_.config().num_ranks;
  // This rank's own rows last: nobody else waits for them.
  for (uint32_t i = 1; i <= num_ranks; ++i) {
    const uint32_t src_rank = (self_rank_ + i) % num_ranks;
    send_rows(op, round, src_rank, src_rank, self_rank_, params);
    const uint32_t count = params.rows.per_round[round * num_ranks + src_rank];
    op.publish_signal(round, src_rank, count | weights_bit(params));
  }
}

// Of this round's messages from `src_rank`, to `dst_rank`, where those of `as_rank` lie.
void NormalRank::send_rows(Op& op, uint64_t round, uint32_t src_rank, uint32_t dst_rank,
                           uint32_t as_rank, const NormalCombineParams& params) {
  const uint32_t top_k = layout_.config().top_k, bank = op.bank(round);
  const uint64_t row_bytes = layout_.row_bytes();
  const uint32_t count = params.rows.per_round[round * layout_.config().num_ranks + src_rank];
  const Store store = dst_rank == self_rank_ ? Store::kCached : store_for_peer(count * row_bytes);
  std::byte* dst = bases_[dst_rank];
  for (uint32_t slot = 0; slot < count; ++slot) {
    const uint64_t row = next_row_[src_rank]++;
    copy_row(dst + layout_.row(bank, as_rank, slot), params.x + row * row_bytes, row_bytes, store);
    if (params.has_topk_weights) {
      std::copy_n(params.topk_weights + row * top_k, top_k,
                  at<float>(dst, layout_.weights(bank, as_rank, slot)));
    }
  }
  op.count_sent(dst_rank, count * row_bytes);
}

// The round's tokens, once every rank has answered all of their messages.
bool NormalRank::add_up(Op& op, uint64_t round, const NormalCombineParams& params) {
  const auto& config = layout_.config();
  const uint32_t num_columns = layout_.num_max_messages_per_token();
  const auto [begin, end] = tokens_of(round, params.routes.num_tokens);
  std::fill(num_in_round_.begin(), num_in_round_.end(), 0);
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t* messages = params.routes.messages + token * num_columns;
    for (uint32_t i = 0; i < params.routes.num_messages[token]; ++i) {
      ++num_in_round_[messages[i] >> 16];
    }
  }
  for (uint32_t rank = 0; rank < config.num_ranks; ++rank) {
    uint64_t count;
    if (!op.wait_for_signal(round, rank, &count)) return false;
    const uint64_t expected = num_in_round_[rank] | weights_bit(params);
    if (count != expected) return op.fail_corrupt(round, rank, expected, count);
  }

  const std::byte* rows[protocol::kMaxTopK + 2];
  const std::byte* self = bases_[self_rank_];
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t* messages = params.routes.messages + token * num_columns;
    const uint32_t num_messages = params.routes.num_messages[token];
    for (uint32_t i = 0; i < num_messages; ++i) {
      rows[i] = self + layout_.row(op.bank(round), messages[i] >> 16, messages[i] & 0xffff);
    }
    uint32_t num_terms = num_messages;
    for (const std::byte* bias : params.bias) {
      if (bias != nullptr) rows[num_terms++] = bias + token * layout_.row_bytes();
    }
    weighted_sum({config.dtype}, config.dtype, params.out + token * layout_.row_bytes(), rows,
                 nullptr, num_terms, config.hidden, Store::kCached);
    if (params.has_topk_weights) add_up_weights(op.bank(round), token, params);
  }
  return true;
}

// The weights of one token, in rank order, as its rows.
void NormalRank::add_up_weights(uint32_t bank, uint64_t token, const NormalCombineParams& params) {
  const uint32_t top_k = layout_.config().top_k;
  const uint32_t* messages = params.routes.messages + token * layout_.num_max_messages_per_token();
  float* sums = params.combined_topk_weights + token * top_k;
  std::fill_n(sums, top_k, 0.0f);
  for (uint32_t i = 0; i < params.routes.num_messages[token]; ++i) {
    const auto* weights = at<float>(bases_[self_rank_],
                                    layout_.weights(bank, messages[i] >> 16, messages[i] & 0xffff));
    for (uint32_t k = 0; k < top_k; ++k) sums[k] = i == 0 ? weights[k] : sums[k] + weights[k];
  }
}

}  // namespace ep::cpu
