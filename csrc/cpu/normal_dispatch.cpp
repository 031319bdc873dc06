// Dispatch: x [T, H] and topk_idx [T, K] become recv_x [N, H], a row for each (token, source) that
// lists an expert of this rank, ordered by source rank, then token; as float8 with its scales.
//
// Example, R = 2, E = 4 (rank 0 owns experts 0 and 1), K = 2, C = 2 tokens a round, one batch:
//   rank 0: token a -> (0, 2), b -> (3, 2), c -> (1, -1)      rank 1: token d -> (2, 0)
// Counts: rank 0 tells rank 0 {3 tokens, 2 rows, experts 1 1} and rank 1 {3, 2, 2 1}: a and b.
// Two rounds: a b, then c; rank 1 has nothing to send in the second and signals 0 messages.
// Rank 0 receives a c d, with local experts (0 -) (1 -) (- 0): at the k of the source.

#include <algorithm>

#include "cpu/atomics.h"
#include "cpu/normal_op.h"
#include "cpu/rows.h"
#include "protocol/scales.h"

namespace ep::cpu {

using protocol::BatchCounts;
using protocol::NormalCountsParams;
using protocol::NormalDispatchParams;
using protocol::OpResult;

namespace {

int64_t expert_at(const void* topk_idx, bool is_int64, uint64_t i) {
  return is_int64 ? static_cast<const int64_t*>(topk_idx)[i]
                  : static_cast<const int32_t*>(topk_idx)[i];
}

// A few ranks, each once, ascending.
class RankSet {
 public:
  void add(uint32_t rank) {
    uint32_t* place = std::lower_bound(ranks_, ranks_ + size_, rank);
    if (place != ranks_ + size_ && *place == rank) return;
    std::copy_backward(place, ranks_ + size_, ranks_ + size_ + 1);
    *place = rank;
    ++size_;
  }
  const uint32_t* begin() const { return ranks_; }
  const uint32_t* end() const { return ranks_ + size_; }

 private:
  uint32_t ranks_[protocol::kMaxTopK];
  uint32_t size_ = 0;
};

}  // namespace

OpResult NormalRank::exchange_counts(const NormalCountsParams& params) {
  Op op(*this, NormalCall::kCounts);
  if (!op.ok() || !check_experts(op, params)) return op.result();
  route(params);
  if (!op.wait_until_emptied() || !send_counts(op, params.routes.num_tokens)) return op.result();
  *params.num_rounds = 0;
  const uint32_t num_local_experts = layout_.partition().num_local_experts(self_rank_);
  std::fill_n(params.num_recv_tokens_per_expert, num_local_experts, 0);
  for (uint32_t src_rank = 0; src_rank < layout_.config().num_ranks; ++src_rank) {
    if (!read_counts(op, src_rank, params)) return op.result();
  }
  op.publish_credits(0);
  for (uint32_t e = 0; e < num_local_experts; ++e) {
    statistics_.add_expert_rows(e, params.num_recv_tokens_per_expert[e]);
  }
  return op.complete(1, params.routes.num_tokens);
}

bool NormalRank::check_experts(Op& op, const NormalCountsParams& params) const {
  const uint32_t top_k = layout_.config().top_k;
  const int64_t num_experts = layout_.config().num_experts;
  for (uint64_t i = 0; i < params.routes.num_tokens * top_k; ++i) {
    const int64_t expert = expert_at(params.topk_idx, params.topk_idx_is_int64, i);
    if (expert < -1 || expert >= num_experts) {
      return op.refuse_expert(i / top_k, static_cast<uint32_t>(i % top_k), expert);
    }
  }
  return true;
}

// topk_idx [T, K] -> the messages of each token, with their slots, and the counts of the batch. A
// token may list an expert twice: that is one row of it.
void NormalRank::route(const NormalCountsParams& params) {
  const uint32_t top_k = layout_.config().top_k;
  const uint32_t num_columns = layout_.num_max_messages_per_token();
  std::fill(num_rows_to_.begin(), num_rows_to_.end(), 0);
  std::fill(num_rows_for_expert_.begin(), num_rows_for_expert_.end(), 0);
  for (uint64_t token = 0; token < params.routes.num_tokens; ++token) {
    if (token % layout_.config().num_tokens_per_round == 0) {
      std::fill(num_in_round_.begin(), num_in_round_.end(), 0);
    }
    RankSet ranks;
    int64_t experts[protocol::kMaxTopK];
    for (uint32_t k = 0; k < top_k; ++k) {
      experts[k] = expert_at(params.topk_idx, params.topk_idx_is_int64, token * top_k + k);
      const bool is_listed = std::find(experts, experts + k, experts[k]) != experts + k;
      if (experts[k] < 0 || is_listed) continue;
      ++num_rows_for_expert_[experts[k]];
      ranks.add(layout_.partition().owner(static_cast<uint32_t>(experts[k])));
    }
    uint32_t* messages = params.routes.messages + token * num_columns;
    for (uint32_t dst_rank : ranks) {
      *messages++ = dst_rank << 16 | num_in_round_[dst_rank]++;
      ++num_rows_to_[dst_rank];
    }
    params.routes.num_messages[token] = static_cast<uint32_t>(ranks.end() - ranks.begin());
  }
}

// Of the batch, for one rank.
void NormalRank::write_counts(std::byte* counts, const Op& op, uint32_t dst_rank,
                              uint64_t num_tokens) const {
  const auto& partition = layout_.partition();
  *at<BatchCounts>(counts, 0) = {op.epoch(0), num_tokens, num_rows_to_[dst_rank]};
  std::copy_n(num_rows_for_expert_.begin() + partition.first_expert(dst_rank),
              partition.num_local_experts(dst_rank), at<uint64_t>(counts, sizeof(BatchCounts)));
}

bool NormalRank::send_counts(Op& op, uint64_t num_tokens) {
  // Starting behind this rank, so that not all ranks wake rank 0 first.
  for (uint32_t i = 1; i <= layout_.config().num_ranks; ++i) {
    const uint32_t dst_rank = (self_rank_ + i) % layout_.config().num_ranks;
    write_counts(bases_[dst_rank] + layout_.counts(self_rank_), op, dst_rank, num_tokens);
    op.publish_signal(0, dst_rank, 0);
  }
  return true;
}

// Counts of one source -> the caller's totals.
bool NormalRank::read_counts(Op& op, uint32_t src_rank, const NormalCountsParams& params) {
  uint64_t count;
  if (!op.wait_for_signal(0, src_rank, &count)) return false;
  std::byte* self = bases_[self_rank_];
  const BatchCounts counts = *at<BatchCounts>(self, layout_.counts(src_rank));
  if (counts.epoch != op.epoch(0)) {
    return op.fail_corrupt(0, src_rank, op.epoch(0), counts.epoch);
  }
  if (counts.num_rows > counts.num_tokens) {
    return op.fail_corrupt(0, src_rank, counts.num_tokens, counts.num_rows);
  }
  params.num_rows[src_rank] = counts.num_rows;
  *params.num_rounds = std::max(*params.num_rounds, layout_.num_rounds(counts.num_tokens));
  const auto* for_expert = at<uint64_t>(self, layout_.expert_counts(src_rank));
  for (uint32_t e = 0; e < layout_.partition().num_local_experts(self_rank_); ++e) {
    params.num_recv_tokens_per_expert[e] += for_expert[e];
  }
  return true;
}

OpResult NormalRank::dispatch(const NormalDispatchParams& params) {
  Op op(*this, NormalCall::kDispatch);
  if (!op.ok() || !op.wait_until_emptied()) return op.result();
  start_rows(params.rows);
  const bool is_done = op.run_rounds(
      params.rows.num_rounds, [&](uint64_t round) { send_tokens(op, round, params); },
      [&](uint64_t round) { return receive_tokens(op, round, params); });
  return is_done ? op.complete(params.rows.num_rounds, params.routes.num_tokens) : op.result();
}

bool NormalRank::receive_tokens(Op& op, uint64_t round, const NormalDispatchParams& params) {
  for (uint32_t src_rank = 0; src_rank < layout_.config().num_ranks; ++src_rank) {
    if (!unpack_source(op, round, src_rank, params)) return false;
  }
  return true;
}

NormalRank::Tokens NormalRank::tokens_of(uint64_t round, uint64_t num_tokens) const {
  const uint64_t per_round = layout_.config().num_tokens_per_round;
  const uint64_t begin = std::min(round * per_round, num_tokens);
  return {begin, std::min(begin + per_round, num_tokens)};
}

// Where the rows of each source begin and end in recv_x.
void NormalRank::start_rows(const protocol::RecvRows& rows) {
  uint64_t num_rows = 0;
  for (uint32_t src_rank = 0; src_rank < layout_.config().num_ranks; ++src_rank) {
    next_row_[src_rank] = num_rows;
    num_rows += rows.num_rows[src_rank];
    end_row_[src_rank] = num_rows;
  }
}

// The round's tokens, each once to every rank that owns some of its experts.
void NormalRank::send_tokens(Op& op, uint64_t round, const NormalDispatchParams& params) {
  const auto& config = layout_.config();
  const auto [begin, end] = tokens_of(round, params.routes.num_tokens);
  const uint64_t row_bytes = layout_.dispatch_row_bytes();
  const Store peer_store = store_for_peer((end - begin) * row_bytes);
  std::fill(num_in_round_.begin(), num_in_round_.end(), 0);
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t* messages =
        params.routes.messages + token * layout_.num_max_messages_per_token();
    if (params.routes.num_messages[token] == 0) continue;
    const Row row = outgoing_.at(params.x, params.x_scales, params.x_is_quantized, token);
    for (uint32_t i = 0; i < params.routes.num_messages[token]; ++i) {
      const uint32_t dst_rank = messages[i] >> 16, slot = messages[i] & 0xffff;
      ++num_in_round_[dst_rank];
      write_message(bases_[dst_rank] + layout_.message(op.bank(round), self_rank_, slot), dst_rank,
                    dst_rank, token, row, dst_rank == self_rank_ ? Store::kCached : peer_store,
                    params);
    }
  }
  for (uint32_t i = 1; i <= config.num_ranks; ++i) {
    const uint32_t dst_rank = (self_rank_ + i) % config.num_ranks;
    op.publish_signal(round, dst_rank, num_in_round_[dst_rank]);
    op.count_sent(dst_rank,
                  num_in_round_[dst_rank] * (row_bytes + layout_.num_scales() * sizeof(float)));
  }
}

// A message to ranks `first_rank` .. `last_rank`: the row, and, unless the routing is cached, their
// experts and the weights, each at its k, and the token. Experts are numbered from the first of
// `first_rank`.
void NormalRank::write_message(std::byte* message, uint32_t first_rank, uint32_t last_rank,
                               uint64_t token, const Row& row, Store store,
                               const NormalDispatchParams& params) const {
  const auto& partition = layout_.partition();
  const uint32_t top_k = layout_.config().top_k;
  const auto part = [&](uint64_t offset) { return message + offset - layout_.message(0, 0, 0); };
  copy_row(part(layout_.row(0, 0, 0)), row.values, layout_.dispatch_row_bytes(), store);
  std::copy_n(row.scales, layout_.num_scales(),
              reinterpret_cast<float*>(part(layout_.scales(0, 0, 0))));
  if (params.is_cached) return;
  auto* topk_idx = reinterpret_cast<int32_t*>(message);
  auto* topk_weights = reinterpret_cast<float*>(part(layout_.weights(0, 0, 0)));
  for (uint32_t k = 0; k < top_k; ++k) {
    const uint64_t route = token * top_k + k;
    const int64_t expert = expert_at(params.topk_idx, params.topk_idx_is_int64, route);
    const uint32_t owner = expert < 0 ? ~0u : partition.owner(static_cast<uint32_t>(expert));
    const bool is_theirs = first_rank <= owner && owner <= last_rank;
    topk_idx[k] =
        is_theirs ? static_cast<int32_t>(expert - partition.first_expert(first_rank)) : -1;
    topk_weights[k] = is_theirs ? params.topk_weights[route] : 0.0f;
  }
  *reinterpret_cast<int32_t*>(part(layout_.token(0, 0, 0))) = static_cast<int32_t>(token);
}

// Messages of one source -> its next rows. Counts that contradict those of the batch must not
// choose where we write.
bool NormalRank::unpack_source(Op& op, uint64_t round, uint32_t src_rank,
                               const NormalDispatchParams& params) {
  const auto& config = layout_.config();
  uint64_t count;
  if (!op.wait_for_signal(round, src_rank, &count)) return false;
  uint32_t* noted = params.rows.per_round + round * config.num_ranks + src_rank;
  const uint64_t num_left = end_row_[src_rank] - next_row_[src_rank];
  const bool is_last = round + 1 == params.rows.num_rounds;
  const uint64_t num_due = params.is_cached ? *noted : is_last ? num_left : count;
  if (count != num_due || count > num_left || count > config.num_tokens_per_round) {
    return op.fail_corrupt(round, src_rank, std::min(num_due, num_left), count);
  }
  *noted = static_cast<uint32_t>(count);
  const uint64_t row_bytes = layout_.dispatch_row_bytes();
  const uint32_t num_words = layout_.num_scale_words(), bank = op.bank(round);
  const Store store = store_for_self(end_row_.back() * row_bytes, config.num_ranks);
  std::byte* self = bases_[self_rank_];
  for (uint32_t slot = 0; slot < count; ++slot) {
    const uint64_t row = next_row_[src_rank]++;
    copy_row(params.recv_x + row * row_bytes, self + layout_.row(bank, src_rank, slot), row_bytes,
             store);
    const auto* scales = at<float>(self, layout_.scales(bank, src_rank, slot));
    for (uint32_t word = 0; word < num_words; ++word) {
      params.recv_scales[row * num_words + word] =
          protocol::scale_word(config.scale_format, scales, layout_.num_scales(), word);
    }
    if (params.is_cached) continue;
    std::copy_n(at<int32_t>(self, layout_.message(bank, src_rank, slot)), config.top_k,
                params.recv_topk_idx + row * config.top_k);
    std::copy_n(at<float>(self, layout_.weights(bank, src_rank, slot)), config.top_k,
                params.recv_topk_weights + row * config.top_k);
    params.recv_src_tokens[row] = *at<int32_t>(self, layout_.token(bank, src_rank, slot));
  }
  return true;
}

}  // namespace ep::cpu
