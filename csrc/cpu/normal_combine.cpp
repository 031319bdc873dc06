// Combine: x [N, H], a row for each row that dispatch brought, goes home as out [T, H]: for each
// token the sum of its rows, in rank order, rounded once. A token that went nowhere is 0.
//
// The rounds are those of dispatch, the other way: in each, a rank answers the messages that it got
// in it, in their order, so that all rows of a token come home in one round, in the slots that its
// messages had. In the example of normal_dispatch.cpp a is the sum of a row of rank 0's slot 0 and
// one of rank 1's.

#include <algorithm>

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
  const uint64_t row_bytes = layout_.row_bytes();
  // This rank's own rows last: nobody else waits for them.
  for (uint32_t i = 1; i <= num_ranks; ++i) {
    const uint32_t src_rank = (self_rank_ + i) % num_ranks;
    const uint32_t count = params.rows.per_round[round * num_ranks + src_rank];
    const Store store = src_rank == self_rank_ ? Store::kCached : store_for_peer(count * row_bytes);
    for (uint32_t slot = 0; slot < count; ++slot) {
      copy_row(bases_[src_rank] + layout_.row(op.bank(round), self_rank_, slot),
               params.x + next_row_[src_rank]++ * row_bytes, row_bytes, store);
    }
    op.publish_signal(round, src_rank, count);
    op.count_sent(src_rank, count * row_bytes);
  }
}

// The round's tokens, once every rank has answered all of their messages.
bool NormalRank::add_up(Op& op, uint64_t round, const NormalCombineParams& params) {
  const auto& config = layout_.config();
  const uint32_t num_columns = layout_.num_max_messages_per_token();
  const uint64_t begin = std::min(round * config.num_tokens_per_round, params.routes.num_tokens);
  const uint64_t end = std::min(begin + config.num_tokens_per_round, params.routes.num_tokens);
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
    if (count != num_in_round_[rank]) {
      return op.fail_corrupt(round, rank, num_in_round_[rank], count);
    }
  }

  const std::byte* rows[protocol::kMaxTopK];
  const std::byte* self = bases_[self_rank_];
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t* messages = params.routes.messages + token * num_columns;
    const uint32_t num_messages = params.routes.num_messages[token];
    for (uint32_t i = 0; i < num_messages; ++i) {
      rows[i] = self + layout_.row(op.bank(round), messages[i] >> 16, messages[i] & 0xffff);
    }
    weighted_sum(config.dtype, params.out + token * layout_.row_bytes(), rows, nullptr,
                 num_messages, config.hidden, Store::kCached);
  }
  return true;
}

}  // namespace ep::cpu
