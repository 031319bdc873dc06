// The normal kernels for ranks on several nodes, hierarchical: a token crosses the network once for
// each node, to the rank of this one's number there, which forwards it within the node; the same
// rank adds up what the node has to send home. Rounds, counts and credits are those of normal.h,
// and so is all within a node.
//
// Forwarders keep nothing: whoever sends a round's tokens says with them where in the node they go,
// and says it again when their rows are to come home.
#pragma once

#include <memory>

#include "cpu/network.h"
#include "cpu/normal.h"
#include "protocol/normal_node_layout.h"

namespace ep::cpu {

class NormalNodeRank : protected NormalRank {
 public:
  // `bases[r]` is where this process sees the memory of rank r. That of ranks of other nodes is
  // only handed to the network.
  NormalNodeRank(const protocol::NormalNodeConfig& config, uint32_t self_rank,
                 std::vector<std::byte*> bases, WaitPolicy policy,
                 std::shared_ptr<Network> network);

  using NormalRank::combine;
  using NormalRank::dispatch;
  using NormalRank::epoch;
  using NormalRank::exchange_counts;
  using NormalRank::statistics;

 private:
  // Where in a node a token goes, as it travels: `num_ranks`, then {rank << 16 | slot} of each.
  struct Route {
    uint32_t num_ranks;
    const uint32_t* messages;
  };

  const protocol::Nodes& nodes() const { return view_.nodes; }
  // Of a row of dispatch and its scales.
  uint64_t travelling_bytes() const {
    return layout_.dispatch_row_bytes() + layout_.num_scales() * sizeof(float);
  }
  void publish_word(protocol::Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                    uint64_t sleepers) override;
  uint32_t writer_of(uint32_t src_rank) const override { return view_.forwarder_here(src_rank); }

  bool send_counts(Op& op, uint64_t num_tokens) override;
  bool forward_counts(Op& op, uint32_t remote);
  void publish_forwarded(Op& op, uint64_t round, uint32_t src_rank, uint32_t dst_rank,
                         uint64_t count);
  void signal_node(Op& op, uint64_t round, uint32_t remote, uint64_t count);

  void send_tokens(Op& op, uint64_t round, const protocol::NormalDispatchParams& params) override;
  uint32_t send_to_node(Op& op, uint64_t round, uint64_t token, const uint32_t* messages,
                        const uint32_t* end, const Row& row, Store store,
                        const protocol::NormalDispatchParams& params);
  uint32_t stage_route(uint32_t bank, uint32_t remote, const uint32_t* messages,
                       const uint32_t* end);
  void send_routes(Op& op, uint64_t round, uint64_t flags);
  bool receive_tokens(Op& op, uint64_t round,
                      const protocol::NormalDispatchParams& params) override;
  bool forward_round(Op& op, uint64_t round, uint32_t remote, bool is_cached);
  void forward_message(uint32_t bank, uint32_t remote, uint32_t slot, uint32_t dst_rank,
                       uint32_t dst_slot, bool is_cached);
  bool read_route(Op& op, uint64_t round, uint32_t remote, uint32_t slot, Route* route);

  void send_home(Op& op, uint64_t round, const protocol::NormalCombineParams& params) override;
  bool add_up(Op& op, uint64_t round, const protocol::NormalCombineParams& params) override;
  bool wait_for_rows(Op& op, uint64_t round, const protocol::NormalCombineParams& params);
  bool add_up_node(Op& op, uint64_t round, uint32_t remote,
                   const protocol::NormalCombineParams& params);
  void add_up_token(uint32_t bank, uint64_t token, const protocol::NormalCombineParams& params);
  void add_weights(float* sums, const std::byte* message, bool is_first) const;

  protocol::NormalNodeLayout node_layout_;
  protocol::NodeView view_;
  NetworkPort port_;
  // Scratch: of a round, messages for each remote node; of one source's, those forwarded to each
  // rank; a token's sum over this node, and of its weights.
  std::vector<uint32_t> num_for_node_;
  std::vector<uint32_t> num_forwarded_to_;
  std::vector<std::byte> own_sum_;
  std::vector<float> own_weights_;
};

}  // namespace ep::cpu
