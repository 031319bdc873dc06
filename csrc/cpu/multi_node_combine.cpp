// Combine between nodes.
//
// Hierarchical, token a of multi_node_dispatch.cpp, with weights (p, q, r) for experts (3, 0, 2):
// rank 0 writes q * expert_0(a) to rank 1, whose token it is. Ranks 2 and 3 write r * expert_2(a)
// and p * expert_3(a) to rank 3, whose hook adds them in this order and puts the one row home.
// There the sum of node 0 and that of node 1 are added, in this order. Every node's sum is rounded
// to the type in which rows travel, that of the token's own node, too: a result does not depend on
// which node its token is on.

#include <algorithm>

#include "cpu/low_latency_op.h"
#include "cpu/multi_node.h"

namespace ep::cpu {

using protocol::Half;
using protocol::Phase;

OpResult MultiNodeRank::combine_send(const CombineSendParams& params, Forwarded forwarded) {
  Op op(*this, Phase::kCombine, Half::kSend);
  if (!op.ok() || !op.wait_for_credits()) return op.result();
  std::fill(num_rows_staged_.begin(), num_rows_staged_.end(), 0);
  const uint32_t num_messages = find_messages(params);
  const auto& config = layout_.config();
  const uint32_t num_ranks = config.num_ranks;
  if (!is_hierarchical()) {
    for (uint32_t i = 1; i <= num_ranks; ++i) {
      const uint32_t src_rank = (self_rank_ + i) % num_ranks;
      send_messages(op, src_rank, params);
      op.publish_signal(src_rank, params.handle.num_messages[src_rank]);
    }
    return op.complete(num_messages);
  }
  const uint32_t num_remote = nodes().num_remote();
  const uint64_t num_slots = uint64_t{num_remote} * config.num_max_tokens_per_rank;
  answered_[op.bank()].num_messages.assign(forwarded.num_messages,
                                           forwarded.num_messages + num_remote);
  answered_[op.bank()].messages.assign(forwarded.messages, forwarded.messages + num_slots);
  for (uint32_t src_rank = 0; src_rank < num_ranks; ++src_rank) {
    send_messages(op, src_rank, params);
  }
  // One signal for a rank's own tokens and for those whose rows it adds up.
  for (uint32_t i = 1; i <= nodes().ranks_per_node; ++i) {
    const uint32_t number = (nodes().rank_in_node(self_rank_) + i) % nodes().ranks_per_node;
    const uint32_t dst_rank = view_.neighbour(number);
    op.publish_signal(dst_rank, params.handle.num_messages[dst_rank]);
  }
  return op.complete(num_messages);
}

// Hierarchical: in the memory of the rank of this node that adds up, or whose token it is. Flat:
// in place, or staged.
std::byte* MultiNodeRank::place_row(const Op& op, uint32_t src_rank, uint32_t outcome_slot) {
  if (view_.is_local(src_rank)) return LowLatencyRank::place_row(op, src_rank, outcome_slot);
  if (is_hierarchical()) {
    const uint32_t adder = view_.forwarder_here(src_rank);
    return bases_[adder] +
           multi_node_layout_.node_partial(op.bank(), view_.remote_idx(src_rank), outcome_slot);
  }
  return bases_[self_rank_] + multi_node_layout_.row_outbox(
                                  op.bank(), multi_node_layout_.remote_rank(self_rank_, src_rank),
                                  num_rows_staged_[src_rank]);
}

void MultiNodeRank::row_is_placed(const Op& op, uint32_t src_rank, uint32_t outcome_slot) {
  const auto& layout = multi_node_layout_;
  if (!view_.is_local(src_rank) && !is_hierarchical()) {
    port_.put(Phase::kCombine, src_rank, layout_.outcome(op.bank(), outcome_slot),
              layout.row_outbox(op.bank(), multi_node_layout_.remote_rank(self_rank_, src_rank),
                                num_rows_staged_[src_rank]++),
              layout.combine_bytes());
    return;
  }
  const uint32_t dst_rank = view_.forwarder_here(src_rank);
  port_.count_store(dst_rank, layout.combine_bytes());
}

uint64_t MultiNodeRank::num_outcome_slots(uint32_t src_rank) const {
  return is_hierarchical() && !view_.is_local(src_rank) ? multi_node_layout_.num_partial_slots()
                                                        : layout_.num_outcome_slots();
}

OpResult MultiNodeRank::combine_recv(const CombineRecvParams& params) {
  if (!is_hierarchical()) return LowLatencyRank::combine_recv(params);
  Op op(*this, Phase::kCombine, Half::kRecv);
  if (!op.ok()) return op.result();
  uint64_t num_rows = 0, count = 0;
  // This node's ranks, for what is added up here and for this rank's own tokens.
  for (uint32_t i = 0; i < nodes().ranks_per_node; ++i) {
    const uint32_t src_rank = view_.neighbour(i);
    if (!op.wait_for_signal(src_rank, &count)) return op.result();
    num_rows += count;
  }
  for (; num_added_up_ < nodes().num_remote(); ++num_added_up_) add_up_node(op, num_added_up_);
  for (uint32_t remote = 0; remote < nodes().num_remote(); ++remote) {
    if (!op.wait_for_signal(view_.forwarder_on(remote), &count)) return op.result();
    num_rows += count;
  }
  for (uint32_t token = 0; token < params.num_tokens; ++token) add_up_token(op, token, params);
  op.publish_credits();
  num_added_up_ = 0;
  return op.complete(num_rows);
}

// What this node's ranks have for the tokens of one remote rank: a row a token, which goes home.
void MultiNodeRank::add_up_node(Op& op, uint32_t remote) {
  const auto& layout = multi_node_layout_;
  const auto& config = layout_.config();
  const uint32_t home = view_.forwarder_on(remote), bank = op.bank();
  std::byte* self = bases_[self_rank_];
  const AnsweredMessages& answered = answered_[bank];
  const uint32_t num_messages = answered.num_messages[remote];
  const std::byte* rows[protocol::kMaxTopK];
  for (uint32_t slot = 0; slot < num_messages; ++slot) {
    const protocol::ForwardedMessage& message =
        answered.messages[uint64_t{remote} * config.num_max_tokens_per_rank + slot];
    for (uint32_t column = 0; column < message.num_partials; ++column) {
      rows[column] = self + layout.node_partial(bank, remote, slot * layout.num_columns() + column);
    }
    const uint64_t staged = layout.node_sum(bank, remote, slot);
    write_sum(hook_scratch_, self + staged, config.combine_dtype, rows, nullptr,
              message.num_partials, Store::kCached);
    port_.put(Phase::kCombine, home, layout_.outcome(bank, message.outcome_slot), staged,
              layout.combine_bytes());
  }
  op.count_sent(home, num_messages * layout.combine_bytes());
  op.publish_signal(home, num_messages);
}

// Columns of a token's outcome are in the order of their ranks, those of other nodes standing for
// their nodes.
void MultiNodeRank::add_up_token(const Op& op, uint32_t token, const CombineRecvParams& params) {
  const auto& config = layout_.config();
  const std::byte *rows[protocol::kMaxTopK], *own_rows[protocol::kMaxTopK];
  uint32_t num_rows = 0, num_own_rows = 0;
  const uint64_t first_slot = uint64_t{token} * layout_.num_outcome_columns();
  for (uint32_t i = 0; i < params.num_partials[token]; ++i) {
    const std::byte* row = bases_[self_rank_] + layout_.outcome(op.bank(), first_slot + i);
    if (!view_.is_local(params.answers[first_slot + i] >> 16)) {
      rows[num_rows++] = row;
      continue;
    }
    if (num_own_rows == 0) rows[num_rows++] = own_sum_.data();
    own_rows[num_own_rows++] = row;
  }
  if (num_own_rows > 0) {
    write_sum(hook_scratch_, own_sum_.data(), config.combine_dtype, own_rows, nullptr, num_own_rows,
              Store::kCached);
  }
  weighted_sum({config.combine_dtype, layout_.combine_scales_in_row()}, config.dtype,
               params.out + token * layout_.row_bytes(), rows, nullptr, num_rows, config.hidden,
               Store::kCached);
}

}  // namespace ep::cpu
