// What sends and hooks of ranks on several nodes have in common: where things go, and how.
#include "cpu/multi_node.h"

#include <utility>

#include "cpu/atomics.h"
#include "cpu/low_latency_op.h"

namespace ep::cpu {

using protocol::Phase;

MultiNodeRank::MultiNodeRank(const protocol::MultiNodeConfig& config, uint32_t self_rank,
                             std::vector<std::byte*> bases, WaitPolicy policy,
                             std::shared_ptr<Network> network)
    : LowLatencyRank(config.low_latency, self_rank, std::move(bases), policy),
      multi_node_layout_(config),
      network_(std::move(network)),
      answered_(config.low_latency.num_banks),
      num_forwarded_to_(config.low_latency.num_ranks),
      num_forwarded_rows_(config.low_latency.num_experts),
      num_rows_staged_(config.low_latency.num_ranks),
      own_sum_(multi_node_layout_.combine_bytes()),
      hook_scratch_(layout_) {
  if (!is_hierarchical()) return;
  peers_.clear();
  for (uint32_t rank = 0; rank < config.low_latency.num_ranks; ++rank) {
    const bool is_forwarder = nodes().rank_in_node(rank) == nodes().rank_in_node(self_rank);
    if (is_local(rank) || is_forwarder) peers_.push_back(rank);
  }
}

LowLatencyRank::Destination MultiNodeRank::destination(uint32_t rank) const {
  if (!is_hierarchical() || is_local(rank)) return {rank};
  return {nodes().forwarder(nodes().node_of(rank), self_rank_), true};
}

uint32_t MultiNodeRank::writer_of(uint32_t src_rank) const {
  return is_hierarchical() ? nodes().forwarder(nodes().node_of(self_rank_), src_rank) : src_rank;
}

void MultiNodeRank::put(Phase phase, uint32_t dst_rank, uint64_t offset, uint64_t staged,
                        uint64_t num_bytes) {
  fence_streamed_rows();
  network_->put(queue_pair(phase, dst_rank), bases_[dst_rank] + offset, bases_[self_rank_] + staged,
                num_bytes);
}

void MultiNodeRank::publish_word(Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                                 uint64_t sleepers) {
  if (is_local(peer)) {
    network_->count_signal(self_rank_, peer);
    LowLatencyRank::publish_word(phase, peer, word, value, sleepers);
    return;
  }
  network_->signal(queue_pair(phase, peer), at<uint64_t>(bases_[peer], word), value,
                   at<uint32_t>(bases_[peer], sleepers));
}

}  // namespace ep::cpu
