// Rounds of a dispatch between nodes: messages for a node, which their forwarder passes on.
//
// Example, 2 nodes of 2 ranks, 4 experts, one a rank, K = 3. Rank 1 has token a -> experts (3, 0,
// 2). It writes a to rank 0; rank 3, which has its number on node 1, gets a over the network once,
// with experts (1 - 0), numbered from the node's first, and the route [rank 2 slot 0, rank 3 slot
// 0]. It writes a to rank 2 with (- - 0) and to itself with (0 - -), in the slots that rank 1 says.

#include <algorithm>
#include <cstring>

#include "cpu/atomics.h"
#include "cpu/normal_nodes.h"
#include "cpu/normal_op.h"

namespace ep::cpu {

using protocol::NormalDispatchParams;
using protocol::Phase;

void NormalNodeRank::send_tokens(Op& op, uint64_t round, const NormalDispatchParams& params) {
  const auto [begin, end] = tokens_of(round, params.routes.num_tokens);
  const Store store = store_for_peer((end - begin) * layout_.dispatch_row_bytes());
  const uint64_t message_bytes = node_layout_.dispatch_bytes();
  std::fill(num_in_round_.begin(), num_in_round_.end(), 0);
  std::fill(num_for_node_.begin(), num_for_node_.end(), 0);
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t num_messages = params.routes.num_messages[token];
    if (num_messages == 0) continue;
    const Row row = outgoing_.at(params.x, params.x_scales, params.x_is_quantized, token);
    const uint32_t* message = params.routes.messages + token * layout_.num_max_messages_per_token();
    const uint32_t* last = message + num_messages;
    while (message != last) {
      const uint32_t dst_rank = *message >> 16, slot = *message & 0xffff;
      if (!view_.is_local(dst_rank)) {
        message += send_to_node(op, round, token, message, last, row, store, params);
        continue;
      }
      ++num_in_round_[dst_rank];
      write_message(bases_[dst_rank] + layout_.message(op.bank(round), self_rank_, slot), dst_rank,
                    dst_rank, token, row, dst_rank == self_rank_ ? Store::kCached : store, params);
      port_.count_store(dst_rank, message_bytes);
      ++message;
    }
  }
  send_routes(op, round, 0);
  for (uint32_t i = 0; i < nodes().ranks_per_node; ++i) {
    const uint32_t dst_rank = view_.neighbour(i);
    op.publish_signal(round, dst_rank, num_in_round_[dst_rank]);
    op.count_sent(dst_rank, num_in_round_[dst_rank] * travelling_bytes());
  }
}

// Of a token's messages, those to the node of the first. Returns how many they are.
uint32_t NormalNodeRank::send_to_node(Op& op, uint64_t round, uint64_t token,
                                      const uint32_t* messages, const uint32_t* end, const Row& row,
                                      Store store, const NormalDispatchParams& params) {
  const uint32_t node = nodes().node_of(*messages >> 16);
  const uint32_t* node_end = std::find_if(
      messages, end, [&](uint32_t message) { return nodes().node_of(message >> 16) != node; });
  const uint32_t remote = view_.remote_idx(*messages >> 16), bank = op.bank(round);
  const uint32_t dst_rank = view_.forwarder_on(remote);
  const uint32_t slot = stage_route(bank, remote, messages, node_end);
  const uint64_t staged = node_layout_.node_outbox(bank, remote, slot);
  const uint64_t there = node_layout_.node_inbox(bank, view_.idx_at(dst_rank), slot);
  write_message(bases_[self_rank_] + staged, nodes().rank_at(node, 0),
                nodes().rank_at(node, nodes().ranks_per_node - 1), token, row, store, params);
  const uint64_t first = params.is_cached ? node_layout_.row_in_message() : 0;
  port_.put(Phase::kDispatch, dst_rank, there + first, staged + first,
            node_layout_.dispatch_bytes() - first);
  op.count_sent(dst_rank, travelling_bytes());
  return static_cast<uint32_t>(node_end - messages);
}

bool NormalNodeRank::receive_tokens(Op& op, uint64_t round, const NormalDispatchParams& params) {
  // Before anything is waited for that other ranks forward.
  for (uint32_t remote = 0; remote < nodes().num_remote(); ++remote) {
    if (!forward_round(op, round, remote, params.is_cached)) return false;
  }
  return NormalRank::receive_tokens(op, round, params);
}

// Waits for: a round's messages of this rank's source on that node.
bool NormalNodeRank::forward_round(Op& op, uint64_t round, uint32_t remote, bool is_cached) {
  const uint32_t src_rank = view_.forwarder_on(remote), bank = op.bank(round);
  uint64_t count;
  if (!op.wait_for_word(round, src_rank, node_layout_.node_signal(bank, Phase::kDispatch, remote),
                        node_layout_.node_signal_sleepers(Phase::kDispatch, remote), &count)) {
    return false;
  }
  if (count > layout_.config().num_tokens_per_round) {
    return op.fail_corrupt(round, src_rank, layout_.config().num_tokens_per_round, count);
  }
  std::fill(num_forwarded_to_.begin(), num_forwarded_to_.end(), 0);
  for (uint32_t slot = 0; slot < count; ++slot) {
    Route route;
    if (!read_route(op, round, remote, slot, &route)) return false;
    for (uint32_t i = 0; i < route.num_ranks; ++i) {
      const uint32_t dst_rank = route.messages[i] >> 16, dst_slot = route.messages[i] & 0xffff;
      const uint32_t expected = num_forwarded_to_[dst_rank]++;
      if (dst_slot != expected) return op.fail_corrupt(round, src_rank, expected, dst_slot);
      forward_message(bank, remote, slot, dst_rank, dst_slot, is_cached);
    }
  }
  for (uint32_t i = 0; i < nodes().ranks_per_node; ++i) {
    const uint32_t dst_rank = view_.neighbour(i);
    publish_forwarded(op, round, src_rank, dst_rank, num_forwarded_to_[dst_rank]);
    op.count_sent(dst_rank, num_forwarded_to_[dst_rank] * travelling_bytes());
  }
  return true;
}

// A message for this node -> one for one of its ranks: with its experts alone, by their number
// there.
void NormalNodeRank::forward_message(uint32_t bank, uint32_t remote, uint32_t slot,
                                     uint32_t dst_rank, uint32_t dst_slot, bool is_cached) {
  const auto& partition = layout_.partition();
  const uint32_t src_rank = view_.forwarder_on(remote), top_k = layout_.config().top_k;
  const std::byte* message = bases_[self_rank_] + node_layout_.node_inbox(bank, remote, slot);
  std::byte* out = bases_[dst_rank] + layout_.message(bank, src_rank, dst_slot);
  const uint64_t first = node_layout_.row_in_message();
  std::memcpy(out + first, message + first, node_layout_.dispatch_bytes() - first);
  port_.count_store(dst_rank, node_layout_.dispatch_bytes());
  if (is_cached) return;
  const auto first_of_node = static_cast<int32_t>(partition.first_expert(view_.neighbour(0)));
  const auto first_expert = static_cast<int32_t>(partition.first_expert(dst_rank)) - first_of_node;
  const auto num_experts = static_cast<int32_t>(partition.num_local_experts(dst_rank));
  const auto* topk_idx = reinterpret_cast<const int32_t*>(message);
  const auto* weights = reinterpret_cast<const float*>(message + node_layout_.weights_in_message());
  auto* out_idx = reinterpret_cast<int32_t*>(out);
  auto* out_weights = reinterpret_cast<float*>(out + node_layout_.weights_in_message());
  for (uint32_t k = 0; k < top_k; ++k) {
    const int32_t expert = topk_idx[k] - first_expert;
    const bool is_own = topk_idx[k] >= 0 && expert >= 0 && expert < num_experts;
    out_idx[k] = is_own ? expert : -1;
    out_weights[k] = is_own ? weights[k] : 0.0f;
  }
  std::memcpy(out + node_layout_.token_in_message(), message + node_layout_.token_in_message(),
              sizeof(int32_t));
}

}  // namespace ep::cpu
