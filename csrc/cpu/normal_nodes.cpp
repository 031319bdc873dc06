// What goes between nodes in all normal calls, and the counts.
#include "cpu/normal_nodes.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/atomics.h"
#include "cpu/normal_op.h"

namespace ep::cpu {

using protocol::Phase;

NormalNodeRank::NormalNodeRank(const protocol::NormalNodeConfig& config, uint32_t self_rank,
                               std::vector<std::byte*> bases, WaitPolicy policy,
                               std::shared_ptr<Network> network)
    : NormalRank(config.normal, self_rank, std::move(bases), policy),
      node_layout_(config),
      view_{node_layout_.nodes(), self_rank},
      port_(std::move(network), self_rank, bases_),
      num_for_node_(node_layout_.nodes().num_remote()),
      num_forwarded_to_(config.normal.num_ranks),
      own_sum_(layout_.row_bytes()),
      own_weights_(config.normal.top_k) {
  peers_.clear();
  for (uint32_t rank = 0; rank < config.normal.num_ranks; ++rank) {
    if (view_.is_peer(rank)) peers_.push_back(rank);
  }
}

void NormalNodeRank::publish_word(Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                                  uint64_t sleepers) {
  port_.publish_word(phase, peer, word, value, sleepers);
}

// Publishes: to this rank's forwarder on that node, what has been put for it.
void NormalNodeRank::signal_node(Op& op, uint64_t round, uint32_t remote, uint64_t count) {
  const uint32_t dst_rank = view_.forwarder_on(remote), here = view_.idx_at(dst_rank);
  publish_word(op.phase(), dst_rank, node_layout_.node_signal(op.bank(round), op.phase(), here),
               protocol::pack_signal(op.epoch(round), count),
               node_layout_.node_signal_sleepers(op.phase(), here));
}

// Publishes: to a rank of this node, what `src_rank` has for it.
void NormalNodeRank::publish_forwarded(Op& op, uint64_t round, uint32_t src_rank, uint32_t dst_rank,
                                       uint64_t count) {
  publish_word(op.phase(), dst_rank, layout_.signal(op.bank(round), op.phase(), src_rank),
               protocol::pack_signal(op.epoch(round), count),
               layout_.signal_sleepers(op.phase(), src_rank));
}

bool NormalNodeRank::send_counts(Op& op, uint64_t num_tokens) {
  const uint32_t num_ranks = nodes().ranks_per_node, num_remote = nodes().num_remote();
  for (uint32_t remote = 0; remote < num_remote; ++remote) {
    const uint32_t dst_rank = view_.forwarder_on(remote);
    for (uint32_t i = 0; i < num_ranks; ++i) {
      write_counts(bases_[self_rank_] + node_layout_.staged_counts(remote, i), op,
                   nodes().rank_at(nodes().node_of(dst_rank), i), num_tokens);
    }
    port_.put(Phase::kDispatch, dst_rank, node_layout_.node_counts(view_.idx_at(dst_rank), 0),
              node_layout_.staged_counts(remote, 0), node_layout_.node_counts_bytes());
    signal_node(op, 0, remote, 0);
  }
  for (uint32_t i = 0; i < num_ranks; ++i) {
    const uint32_t dst_rank = view_.neighbour(i);
    write_counts(bases_[dst_rank] + layout_.counts(self_rank_), op, dst_rank, num_tokens);
    port_.count_store(dst_rank, node_layout_.counts_stride());
    op.publish_signal(0, dst_rank, 0);
  }
  for (uint32_t remote = 0; remote < num_remote; ++remote) {
    if (!forward_counts(op, remote)) return false;
  }
  return true;
}

// Waits for: the counts of this rank's source on that node. Passes them on.
bool NormalNodeRank::forward_counts(Op& op, uint32_t remote) {
  const uint32_t src_rank = view_.forwarder_on(remote);
  uint64_t count;
  if (!op.wait_for_word(0, src_rank, node_layout_.node_signal(op.bank(0), Phase::kDispatch, remote),
                        node_layout_.node_signal_sleepers(Phase::kDispatch, remote), &count)) {
    return false;
  }
  for (uint32_t i = 0; i < nodes().ranks_per_node; ++i) {
    const uint32_t dst_rank = view_.neighbour(i);
    std::memcpy(bases_[dst_rank] + layout_.counts(src_rank),
                bases_[self_rank_] + node_layout_.node_counts(remote, i),
                node_layout_.counts_stride());
    port_.count_store(dst_rank, node_layout_.counts_stride());
    publish_forwarded(op, 0, src_rank, dst_rank, 0);
  }
  return true;
}

// Where a token goes on one remote node, as its forwarder will read it. Returns the message's slot.
uint32_t NormalNodeRank::stage_route(uint32_t bank, uint32_t remote, const uint32_t* messages,
                                     const uint32_t* end) {
  const uint32_t slot = num_for_node_[remote]++;
  auto* route = at<uint32_t>(bases_[self_rank_], node_layout_.staged_route(bank, remote, slot));
  *route = static_cast<uint32_t>(end - messages);
  std::copy(messages, end, route + 1);
  return slot;
}

// The routes of a round's messages for each node, behind these, and the signal.
void NormalNodeRank::send_routes(Op& op, uint64_t round, uint64_t flags) {
  const uint32_t bank = op.bank(round);
  for (uint32_t remote = 0; remote < nodes().num_remote(); ++remote) {
    const uint32_t dst_rank = view_.forwarder_on(remote);
    if (num_for_node_[remote] > 0) {
      port_.put(op.phase(), dst_rank, node_layout_.node_route(bank, view_.idx_at(dst_rank), 0),
                node_layout_.staged_route(bank, remote, 0),
                num_for_node_[remote] * node_layout_.route_bytes());
    }
    signal_node(op, round, remote, num_for_node_[remote] | flags);
  }
}

// Memory that contradicts its signal must not choose where we read and write.
bool NormalNodeRank::read_route(Op& op, uint64_t round, uint32_t remote, uint32_t slot,
                                Route* route) {
  const uint32_t src_rank = view_.forwarder_on(remote);
  const auto* words =
      at<uint32_t>(bases_[self_rank_], node_layout_.node_route(op.bank(round), remote, slot));
  *route = {words[0], words + 1};
  const uint32_t num_max = node_layout_.num_columns();
  if (route->num_ranks < 1 || route->num_ranks > num_max) {
    return op.fail_corrupt(round, src_rank, num_max, route->num_ranks);
  }
  for (uint32_t i = 0; i < route->num_ranks; ++i) {
    const uint32_t rank = route->messages[i] >> 16, dst_slot = route->messages[i] & 0xffff;
    if (rank >= layout_.config().num_ranks || !view_.is_local(rank)) {
      return op.fail_corrupt(round, src_rank, view_.neighbour(0), rank);
    }
    if (dst_slot >= layout_.config().num_tokens_per_round) {
      return op.fail_corrupt(round, src_rank, layout_.config().num_tokens_per_round, dst_slot);
    }
  }
  return true;
}

}  // namespace ep::cpu
