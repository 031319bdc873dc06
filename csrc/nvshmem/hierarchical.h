// The low-latency kernels of a rank on one of several nodes, where a token crosses the network once
// for each node: csrc/protocol/README.md, "Between nodes, hierarchical". What they do is in
// csrc/cpu/multi_node*.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/low_latency.h"
#include "protocol/node_network_layout.h"

namespace ep::nvshmem {

// Written by a dispatch's hook, read by its combine's send.
struct Forwarded {
  uint32_t* num_messages;                // [N - 1]: from each remote node
  protocol::ForwardedMessage* messages;  // [N - 1, M]
};
struct ForwardingRecvParams {
  cuda::DispatchRecvParams recv;
  Forwarded forwarded;  // out
};
struct ForwardedSendParams {
  cuda::CombineSendParams send;
  Forwarded forwarded;
};

class HierarchicalRank : public cuda::RankHost {
 public:
  // `bases[r]`: memory of rank r where it is on this node; others are put to. `pes[r]`: NVSHMEM's
  // number of rank r. `num_sms`: blocks a kernel has at most. Throws std::invalid_argument for a
  // config that these kernels do not serve, or where the GPU has too little shared memory;
  // std::runtime_error with the CUDA error where it refuses.
  HierarchicalRank(const protocol::MultiNodeConfig& config, uint32_t self_rank,
                   const std::vector<std::byte*>& bases, const std::vector<int32_t>& pes,
                   uint64_t timeout_ns, uint32_t num_sms);
  ~HierarchicalRank();

  protocol::OpResult dispatch_send(const cuda::DispatchSendParams& send, void* stream);
  protocol::OpResult dispatch_recv(const ForwardingRecvParams& recv, void* stream);
  protocol::OpResult combine_send(const ForwardedSendParams& send, void* stream);
  protocol::OpResult combine_recv(const cuda::CombineRecvParams& recv, void* stream);

 private:
  struct Plan;
  Plan plan(uint64_t num_items, void* stream) const;
  // Messages that a dispatch of as many tokens as the latest one's brings from all ranks.
  uint64_t num_messages() const;

  protocol::MultiNodeLayout multi_node_;
  protocol::NodeNetworkLayout network_;
  uint32_t num_sms_;
  uint32_t num_tokens_ = 0;  // of the latest dispatch
  int32_t* pes_ = nullptr;
  uint64_t* arrived_ = nullptr;
  uint32_t* num_finished_ = nullptr;
  Forwarded answered_ = {};
};

}  // namespace ep::nvshmem
