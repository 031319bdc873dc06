// Rounds of a combine between nodes: a node's rows of a token are added by its forwarder, in rank
// order, rounded, and go home as one; a token adds its nodes in their order, that of its own node,
// which it adds and rounds itself, among them, then its biases. Weights likewise, without rounding.
//
// The row of rank p for a token of another node waits at the forwarder where p's messages of that
// node would: nothing else lies there in a combine.

#include <algorithm>

#include "cpu/atomics.h"
#include "cpu/normal_nodes.h"
#include "cpu/normal_op.h"

namespace ep::cpu {

using protocol::NormalCombineParams;
using protocol::Phase;

void NormalNodeRank::send_home(Op& op, uint64_t round, const NormalCombineParams& params) {
  const uint32_t num_ranks = layout_.config().num_ranks;
  const uint64_t row_bytes =
      layout_.row_bytes() + (params.has_topk_weights ? layout_.config().top_k * 4 : 0);
  // Where this rank's own tokens have gone, for who adds up their rows.
  const auto [begin, end] = tokens_of(round, params.routes.num_tokens);
  std::fill(num_for_node_.begin(), num_for_node_.end(), 0);
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t* message = params.routes.messages + token * layout_.num_max_messages_per_token();
    const uint32_t* last = message + params.routes.num_messages[token];
    while (message != last) {
      const uint32_t node = nodes().node_of(*message >> 16);
      const uint32_t* node_end = std::find_if(
          message, last, [&](uint32_t other) { return nodes().node_of(other >> 16) != node; });
      if (!view_.is_local(*message >> 16)) {
        stage_route(op.bank(round), view_.remote_idx(*message >> 16), message, node_end);
      }
      message = node_end;
    }
  }
  send_routes(op, round, weights_bit(params));
  // Rows of this node's own tokens to their ranks, those of others to who adds them up.
  for (uint32_t src_rank = 0; src_rank < num_ranks; ++src_rank) {
    const uint32_t dst_rank = writer_of(src_rank);
    const uint32_t as_rank = nodes().forwarder(nodes().node_of(src_rank), self_rank_);
    send_rows(op, round, src_rank, dst_rank, as_rank, params);
    const uint32_t count = params.rows.per_round[round * num_ranks + src_rank];
    for (uint32_t i = 0; i < count; ++i) port_.count_store(dst_rank, row_bytes);
  }
  for (uint32_t i = 0; i < nodes().ranks_per_node; ++i) {
    const uint32_t dst_rank = view_.neighbour(i);
    const uint32_t count = params.rows.per_round[round * num_ranks + dst_rank];
    op.publish_signal(round, dst_rank, count | weights_bit(params));
  }
}

bool NormalNodeRank::add_up(Op& op, uint64_t round, const NormalCombineParams& params) {
  if (!wait_for_rows(op, round, params)) return false;
  const auto [begin, end] = tokens_of(round, params.routes.num_tokens);
  std::fill(num_for_node_.begin(), num_for_node_.end(), 0);
  for (uint64_t token = begin; token < end; ++token) {
    add_up_token(op.bank(round), token, params);
  }
  return true;
}

// Waits for: this node's rows; adds up those for other nodes; then for what those have added up.
bool NormalNodeRank::wait_for_rows(Op& op, uint64_t round, const NormalCombineParams& params) {
  const auto [begin, end] = tokens_of(round, params.routes.num_tokens);
  std::fill(num_in_round_.begin(), num_in_round_.end(), 0);
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t* messages =
        params.routes.messages + token * layout_.num_max_messages_per_token();
    uint32_t last_node = ~0u;
    for (uint32_t i = 0; i < params.routes.num_messages[token]; ++i) {
      const uint32_t rank = messages[i] >> 16, node = nodes().node_of(rank);
      // A node answers with one row, its forwarder's.
      if (view_.is_local(rank)) {
        ++num_in_round_[rank];
      } else if (node != last_node) {
        ++num_in_round_[nodes().forwarder(node, self_rank_)];
      }
      last_node = node;
    }
  }
  const auto wait_for = [&](uint32_t rank) {
    uint64_t count;
    if (!op.wait_for_signal(round, rank, &count)) return false;
    const uint64_t expected = num_in_round_[rank] | weights_bit(params);
    return count == expected || op.fail_corrupt(round, rank, expected, count);
  };
  for (uint32_t i = 0; i < nodes().ranks_per_node; ++i) {
    if (!wait_for(view_.neighbour(i))) return false;
  }
  for (uint32_t remote = 0; remote < nodes().num_remote(); ++remote) {
    if (!add_up_node(op, round, remote, params)) return false;
  }
  for (uint32_t remote = 0; remote < nodes().num_remote(); ++remote) {
    if (!wait_for(view_.forwarder_on(remote))) return false;
  }
  return true;
}

// Waits for: where the tokens of this rank's source on that node have gone. Their rows lie here.
bool NormalNodeRank::add_up_node(Op& op, uint64_t round, uint32_t remote,
                                 const NormalCombineParams& params) {
  const auto& config = layout_.config();
  const uint32_t home = view_.forwarder_on(remote), bank = op.bank(round);
  uint64_t count;
  if (!op.wait_for_word(round, home, node_layout_.node_signal(bank, Phase::kCombine, remote),
                        node_layout_.node_signal_sleepers(Phase::kCombine, remote), &count)) {
    return false;
  }
  const uint64_t num_messages = count ^ weights_bit(params);
  if (num_messages > config.num_tokens_per_round) {
    return op.fail_corrupt(round, home, weights_bit(params), count);
  }
  std::byte* self = bases_[self_rank_];
  const std::byte* rows[protocol::kMaxTopK];
  for (uint32_t slot = 0; slot < num_messages; ++slot) {
    Route route;
    if (!read_route(op, round, remote, slot, &route)) return false;
    const uint64_t staged = node_layout_.node_outbox(bank, remote, slot);
    auto* weights = at<float>(self, staged + node_layout_.weights_in_message());
    for (uint32_t i = 0; i < route.num_ranks; ++i) {
      const uint32_t as_rank = nodes().forwarder(nodes().node_of(home), route.messages[i] >> 16);
      const uint64_t message = layout_.message(bank, as_rank, route.messages[i] & 0xffff);
      rows[i] = self + message + node_layout_.row_in_message();
      if (params.has_topk_weights) add_weights(weights, self + message, i == 0);
    }
    weighted_sum({config.dtype}, config.dtype, self + staged + node_layout_.row_in_message(), rows,
                 nullptr, route.num_ranks, config.hidden, Store::kCached);
    const uint64_t first =
        params.has_topk_weights ? node_layout_.weights_in_message() : node_layout_.row_in_message();
    port_.put(Phase::kCombine, home,
              node_layout_.node_inbox(bank, view_.idx_at(home), slot) + first, staged + first,
              node_layout_.row_in_message() + layout_.row_bytes() - first);
  }
  op.publish_signal(round, home, num_messages | weights_bit(params));
  op.count_sent(home, num_messages * layout_.row_bytes());
  return true;
}

// Adds those of one message to `sums` [K].
void NormalNodeRank::add_weights(float* sums, const std::byte* message, bool is_first) const {
  const auto* weights = reinterpret_cast<const float*>(message + node_layout_.weights_in_message());
  for (uint32_t k = 0; k < layout_.config().top_k; ++k) {
    sums[k] = is_first ? weights[k] : sums[k] + weights[k];
  }
}

void NormalNodeRank::add_up_token(uint32_t bank, uint64_t token,
                                  const NormalCombineParams& params) {
  const auto& config = layout_.config();
  const std::byte* self = bases_[self_rank_];
  const uint32_t* message = params.routes.messages + token * layout_.num_max_messages_per_token();
  const uint32_t* last = message + params.routes.num_messages[token];
  float* sums =
      params.has_topk_weights ? params.combined_topk_weights + token * config.top_k : nullptr;
  if (sums != nullptr) std::fill_n(sums, config.top_k, 0.0f);
  const std::byte *rows[protocol::kMaxTopK + 2], *own_rows[protocol::kMaxTopK];
  uint32_t num_terms = 0;
  while (message != last) {
    const uint32_t rank = *message >> 16, node = nodes().node_of(rank);
    const float* node_weights;
    if (view_.is_local(rank)) {
      uint32_t num_own_rows = 0;
      for (; message != last && view_.is_local(*message >> 16); ++message, ++num_own_rows) {
        const std::byte* own = self + layout_.message(bank, *message >> 16, *message & 0xffff);
        own_rows[num_own_rows] = own + node_layout_.row_in_message();
        if (sums != nullptr) add_weights(own_weights_.data(), own, num_own_rows == 0);
      }
      weighted_sum({config.dtype}, config.dtype, own_sum_.data(), own_rows, nullptr, num_own_rows,
                   config.hidden, Store::kCached);
      rows[num_terms] = own_sum_.data();
      node_weights = own_weights_.data();
    } else {
      const uint32_t remote = view_.remote_idx(rank);
      const std::byte* sum = self + node_layout_.node_inbox(bank, remote, num_for_node_[remote]++);
      while (message != last && nodes().node_of(*message >> 16) == node) ++message;
      rows[num_terms] = sum + node_layout_.row_in_message();
      node_weights = reinterpret_cast<const float*>(sum + node_layout_.weights_in_message());
    }
    for (uint32_t k = 0; sums != nullptr && k < config.top_k; ++k) {
      sums[k] = num_terms == 0 ? node_weights[k] : sums[k] + node_weights[k];
    }
    ++num_terms;
  }
  for (const std::byte* bias : params.bias) {
    if (bias != nullptr) rows[num_terms++] = bias + token * layout_.row_bytes();
  }
  weighted_sum({config.dtype}, config.dtype, params.out + token * layout_.row_bytes(), rows,
               nullptr, num_terms, config.hidden, Store::kCached);
}

}  // namespace ep::cpu
