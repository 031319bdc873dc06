// What sends and hooks of ranks on several nodes have in common: where things go, and how.
#include "cpu/multi_node.h"

#include <utility>

namespace ep::cpu {

using protocol::Phase;

MultiNodeRank::MultiNodeRank(const protocol::MultiNodeConfig& config, uint32_t self_rank,
                             std::vector<std::byte*> bases, WaitPolicy policy,
                             std::shared_ptr<Network> network)
    : LowLatencyRank(config.low_latency, self_rank, std::move(bases), policy),
      multi_node_layout_(config),
      view_{multi_node_layout_.nodes(), self_rank},
      port_(std::move(network), self_rank, bases_),
      answered_(config.low_latency.num_banks),
      num_forwarded_to_(config.low_latency.num_ranks),
      num_forwarded_rows_(config.low_latency.num_experts),
      num_rows_staged_(config.low_latency.num_ranks),
      own_sum_(multi_node_layout_.combine_bytes()),
      hook_scratch_(layout_) {
  if (!is_hierarchical()) return;
  peers_.clear();
  for (uint32_t rank = 0; rank < config.low_latency.num_ranks; ++rank) {
    if (view_.is_peer(rank)) peers_.push_back(rank);
  }
}

LowLatencyRank::Destination MultiNodeRank::destination(uint32_t rank) const {
  if (!is_hierarchical() || view_.is_local(rank)) return {rank};
  return {nodes().forwarder(nodes().node_of(rank), self_rank_), true};
}

uint32_t MultiNodeRank::writer_of(uint32_t src_rank) const {
  return is_hierarchical() ? view_.forwarder_here(src_rank) : src_rank;
}

void MultiNodeRank::publish_word(Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                                 uint64_t sleepers) {
  port_.publish_word(phase, peer, word, value, sleepers);
}

}  // namespace ep::cpu
