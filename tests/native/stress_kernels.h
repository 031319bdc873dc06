// What a rank of the stress programs calls: the kernels of one node, or of several.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "cpu/low_latency.h"
#include "cpu/multi_node.h"

namespace stress {

using namespace ep;

// What one operation of one rank keeps between its send and its hooks.
struct Operation {
  std::vector<uint32_t> num_partials;
  std::vector<uint32_t> answers;
  std::vector<uint32_t> num_messages;
  std::vector<cpu::HandleMessage> messages;
  std::vector<cpu::HandleEntry> entries;
  std::vector<std::byte> recv_x;
  std::vector<float> recv_scales;
  std::vector<int32_t> counts;
  std::vector<int32_t> recv_topk_idx;
  std::vector<float> recv_topk_weights;
  std::vector<std::byte> expert_out;
  std::vector<std::byte> out;

  // Between nodes only.
  std::vector<uint32_t> num_forwarded;
  std::vector<protocol::ForwardedMessage> forwarded;

  cpu::HandleView handle() { return {num_messages.data(), messages.data(), entries.data()}; }
};

class Kernels {
 public:
  virtual ~Kernels() = default;
  virtual const protocol::LowLatencyLayout& layout() const = 0;
  virtual cpu::OpResult dispatch_send(const cpu::DispatchSendParams& params) = 0;
  virtual cpu::OpResult dispatch_recv(const cpu::DispatchRecvParams& params, Operation&) = 0;
  virtual cpu::OpResult combine_send(const cpu::CombineSendParams& params, Operation&) = 0;
  virtual cpu::OpResult combine_recv(const cpu::CombineRecvParams& params) = 0;
};

class OneNode : public Kernels {
 public:
  OneNode(const protocol::LowLatencyConfig& config, uint32_t self,
          const std::vector<std::byte*>& bases, cpu::WaitPolicy policy)
      : rank_(config, self, bases, policy) {}
  const protocol::LowLatencyLayout& layout() const override { return rank_.layout(); }
  cpu::OpResult dispatch_send(const cpu::DispatchSendParams& params) override {
    return rank_.dispatch_send(params);
  }
  cpu::OpResult dispatch_recv(const cpu::DispatchRecvParams& params, Operation&) override {
    return rank_.dispatch_recv(params);
  }
  cpu::OpResult combine_send(const cpu::CombineSendParams& params, Operation&) override {
    return rank_.combine_send(params);
  }
  cpu::OpResult combine_recv(const cpu::CombineRecvParams& params) override {
    return rank_.combine_recv(params);
  }

 private:
  cpu::LowLatencyRank rank_;
};

class SeveralNodes : public Kernels {
 public:
  SeveralNodes(const protocol::MultiNodeConfig& config, uint32_t self,
               const std::vector<std::byte*>& bases, cpu::WaitPolicy policy,
               std::shared_ptr<cpu::Network> network)
      : rank_(config, self, bases, policy, std::move(network)) {}
  const protocol::LowLatencyLayout& layout() const override {
    return rank_.multi_node_layout().base();
  }
  cpu::OpResult dispatch_send(const cpu::DispatchSendParams& params) override {
    return rank_.dispatch_send(params);
  }
  cpu::OpResult dispatch_recv(const cpu::DispatchRecvParams& params, Operation& op) override {
    const auto& multi_node = rank_.multi_node_layout();
    op.num_forwarded.resize(multi_node.nodes().num_remote());
    op.forwarded.resize(op.num_forwarded.size() * layout().config().num_max_tokens_per_rank);
    return rank_.dispatch_recv(params, {op.num_forwarded.data(), op.forwarded.data()});
  }
  cpu::OpResult combine_send(const cpu::CombineSendParams& params, Operation& op) override {
    return rank_.combine_send(params, {op.num_forwarded.data(), op.forwarded.data()});
  }
  cpu::OpResult combine_recv(const cpu::CombineRecvParams& params) override {
    return rank_.combine_recv(params);
  }

 private:
  cpu::MultiNodeRank rank_;
};

}  // namespace stress
