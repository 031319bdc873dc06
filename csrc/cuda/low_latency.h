// The four low-latency kernels over peer pointers, and one rank's private state on the device.
//
// Launches return at once. What a kernel finds wrong it writes to pinned host memory before it
// ends; the next call on the buffer reports it. See csrc/cpu/low_latency.h for the shapes.
#pragma once

#include <cstdint>
#include <vector>

#include "protocol/layout.h"
#include "protocol/op.h"

namespace ep::cuda {

struct RankState;   // on the device: epochs, arrival counters, the failed word
struct HostReport;  // pinned: what failed

// Ranks whose bases travel with a kernel's parameters, which cost no memory access.
constexpr uint32_t kNumNearRanks = 16;

// What every kernel of one rank is given.
struct RankView {
  protocol::LowLatencyLayout layout;
  uint32_t self_rank;
  std::byte* self_base;
  std::byte* near_bases[kNumNearRanks];
  std::byte* const* bases;  // device table [R]: where this GPU sees each rank's memory
  RankState* state;
  HostReport* report;
  uint64_t timeout_ns;
};

struct DispatchSendParams {
  const std::byte* x;    // [T, H]
  const void* topk_idx;  // [T, K] int32 or int64, -1 = not routed
  bool topk_idx_is_int64;
  const float* topk_weights;  // [T, K]
  uint32_t num_tokens;
  uint32_t* num_partials;  // out [T]
};
struct DispatchRecvParams {
  std::byte* recv_x;                    // out [L, S, H]
  int32_t* num_recv_tokens_per_expert;  // out [L]
  protocol::HandleView handle;          // out
};
struct CombineSendParams {
  const std::byte* expert_out;  // [L, S, H]
  protocol::HandleView handle;
};
struct CombineRecvParams {
  std::byte* out;  // out [T, H]
  uint32_t num_tokens;
  const uint32_t* num_partials;  // [T]
};

// More would not fit the shared memory in which a dispatch counts rows by expert.
constexpr uint32_t kNumMaxExperts = 4096;

class LowLatencyRank {
 public:
  // `bases[r]`: memory of rank r as the current device sees it. Throws std::runtime_error with the
  // CUDA error where the device refuses.
  LowLatencyRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                 const std::vector<std::byte*>& bases, uint64_t timeout_ns, uint32_t num_sms);
  ~LowLatencyRank();
  LowLatencyRank(const LowLatencyRank&) = delete;
  LowLatencyRank& operator=(const LowLatencyRank&) = delete;

  protocol::OpResult dispatch_send(const DispatchSendParams& params, void* stream);
  protocol::OpResult dispatch_recv(const DispatchRecvParams& params, void* stream);
  protocol::OpResult combine_send(const CombineSendParams& params, void* stream);
  protocol::OpResult combine_recv(const CombineRecvParams& params, void* stream);
  // What a kernel has reported so far; does not wait for the device.
  protocol::OpResult report() const;

 private:
  uint32_t num_blocks(uint64_t num_rows) const;

  RankView view_;
  uint32_t num_sms_;
  uint32_t num_threads_;
  std::byte** bases_ = nullptr;
};

}  // namespace ep::cuda
