// The low-latency kernels for ranks on several nodes, which reach the memory of their own node's
// ranks only. What is for other nodes is staged, put, and signalled on the same queue pair.
//
// Flat: a message for each rank that owns some of a token's experts, wherever it is. Hierarchical:
// one for each node, to its rank of the same number, whose hook forwards it within the node; the
// same rank's combine hook adds up what the node's ranks have to send home. The hooks of ranks so
// depend on the first half of each other's hooks: all ranks issue them in the same order.
//
// A hook that finds a bank signalled does what low_latency.h's do: only how things come there, and
// in which order a token's rows are added (by node, then rank), differs.
#pragma once

#include <memory>

#include "cpu/low_latency.h"
#include "cpu/network.h"
#include "protocol/multi_node_layout.h"

namespace ep::cpu {

class MultiNodeRank : protected LowLatencyRank {
 public:
  // `bases[r]` is where this process sees the memory of rank r. That of ranks of other nodes is
  // only handed to the network.
  MultiNodeRank(const protocol::MultiNodeConfig& config, uint32_t self_rank,
                std::vector<std::byte*> bases, WaitPolicy policy, std::shared_ptr<Network> network);

  // As LowLatencyRank's. Hierarchical, a dispatch's hook writes, and its combine's send reads, for
  // each remote node how many messages came from it, [N - 1], and those, [N - 1, M].
  struct Forwarded {
    uint32_t* num_messages;
    protocol::ForwardedMessage* messages;
  };
  OpResult dispatch_send(const DispatchSendParams& params);
  OpResult dispatch_recv(const DispatchRecvParams& params, Forwarded forwarded);
  OpResult combine_send(const CombineSendParams& params, Forwarded forwarded);
  OpResult combine_recv(const CombineRecvParams& params);

  const protocol::MultiNodeLayout& multi_node_layout() const { return multi_node_layout_; }
  using LowLatencyRank::epoch;
  using LowLatencyRank::statistics;

 private:
  // A copy of what a combine's send was given, for its hook: of one bank.
  struct AnsweredMessages {
    std::vector<uint32_t> num_messages;
    std::vector<protocol::ForwardedMessage> messages;
  };

  bool is_hierarchical() const { return multi_node_layout_.config().is_hierarchical; }
  const protocol::Nodes& nodes() const { return view_.nodes; }

  Destination destination(uint32_t rank) const override;
  uint32_t writer_of(uint32_t src_rank) const override;
  MessagePlace place_message(const Op& op, uint32_t dst_rank, uint32_t slot,
                             uint32_t token) override;
  void message_is_placed(const Op& op, uint32_t dst_rank, uint32_t slot, uint32_t token) override;
  std::byte* place_row(const Op& op, uint32_t src_rank, uint32_t outcome_slot) override;
  void row_is_placed(const Op& op, uint32_t src_rank, uint32_t outcome_slot) override;
  uint64_t num_outcome_slots(uint32_t src_rank) const override;
  void publish_word(protocol::Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                    uint64_t sleepers) override;

  MessagePlace inbox_place(const Op& op, uint32_t dst_rank, uint32_t src_rank, uint32_t slot);
  void publish_batch(Op& op, uint32_t dst_rank);
  bool forward_node(Op& op, uint32_t remote, Forwarded forwarded);
  bool check_node_message(Op& op, uint32_t remote, uint32_t slot) const;
  protocol::ForwardedMessage forward_message(Op& op, uint32_t remote, uint32_t slot);
  void publish_forwarded(Op& op, uint32_t remote);
  void add_up_node(Op& op, uint32_t remote);
  void add_up_token(const Op& op, uint32_t token, const CombineRecvParams& params);

  protocol::MultiNodeLayout multi_node_layout_;
  protocol::NodeView view_;
  NetworkPort port_;
  std::vector<AnsweredMessages> answered_;  // by bank

  // Remote nodes whose messages the hook in progress has forwarded: one that was interrupted goes
  // on behind them.
  uint32_t num_forwarded_ = 0;
  uint32_t num_added_up_ = 0;
  // Scratch: of a source's messages, those forwarded to each rank and rows for each expert; rows of
  // combine staged for each rank; tokens whose row is staged; the sum of this node's rows.
  std::vector<uint32_t> num_forwarded_to_;
  std::vector<uint32_t> num_forwarded_rows_;
  std::vector<uint32_t> num_rows_staged_;
  int64_t staged_token_ = -1;
  std::vector<std::byte> own_sum_;
  SumScratch hook_scratch_;
};

}  // namespace ep::cpu
