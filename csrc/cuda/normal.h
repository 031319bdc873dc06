// The normal kernels over peer pointers, and one rank's private state on the device.
//
// Launches return at once. What a kernel finds wrong it writes to pinned host memory before it
// ends; the next call on the buffer reports it. The host waits in `wait_for_counts` only.
//
// T tokens of this rank, N rows received, H hidden, K top_k, R ranks, L local experts, P rows that
// a rank has room for, D = min(K, R), the ranks that a token can go to, C tokens of a round, S
// scales of a float8 row, W 32-bit words of a received row's scales.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/host_counts.h"
#include "cuda/low_latency.h"
#include "protocol/normal_device_layout.h"
#include "protocol/op.h"

namespace ep::cuda {

struct Launch;
struct NormalState;  // on the device: epochs, arrival counters, the failed word

// What every normal kernel of one rank is given.
struct NormalView {
  protocol::NormalDeviceLayout layout;
  uint32_t self_rank;
  std::byte* self_base;
  std::byte* near_bases[kNumNearRanks];
  std::byte* const* bases;  // device table [R]: where this GPU sees each rank's memory
  NormalState* state;
  uint32_t* block_rank_counts;  // scratch [block][R]
  uint32_t* expert_counts;      // scratch [E]: of a batch while it is routed, else 0
  HostReport* report;
  HostCounts* host_counts;
  uint64_t timeout_ns;
  Owners owners;
  uint32_t num_local_experts;
  bool shares_gpu;  // with all its peers: there is no link
};

// Where tokens went and rows came from: on the device, kept by the caller's handle.
struct NormalRoutes {
  uint32_t num_tokens;  // T
  // [T, D] {rank 32, number among this rank's rows for it 32}, ranks ascending; ones behind them.
  uint64_t* messages;
  uint32_t* round_begins;  // [ceil(T / C) + 1, R] rows for each rank before each round; in the end
  uint32_t* batch;         // [R, 1 + R] of each source: its tokens, its rows for each rank
};

// The caller's tensors. What is null stays in symmetric memory, or is not wanted.
struct NormalOutputs {
  std::byte* recv_x;         // [N, H]
  uint32_t* recv_scales;     // [N, W]
  int32_t* recv_topk_idx;    // [N, K] experts at their k, `no_expert` where another rank's
  float* recv_topk_weights;  // [N, K], 0 where another rank's
  int32_t* recv_src_tokens;  // [N]
  uint64_t num_rows;         // of these tensors: N, or what the caller holds to be enough
};

// What a dispatch does beyond moving rows.
enum class DispatchStart : uint32_t {
  kRoute = 0,   // finds routes, exchanges counts
  kCached = 1,  // takes both from the handle
  kResume = 2,  // goes on where a kernel has stopped because rows must travel in rounds
};

struct NormalDispatch {
  const std::byte* x;     // [T, H]
  bool x_is_quantized;    // x is float8, with scales; else it is of the buffer's dtype
  const float* x_scales;  // [T, S]
  DispatchStart start;
  const void* topk_idx;  // [T, K] int32 or int64, -1 = not routed
  bool topk_idx_is_int64;
  const float* topk_weights;  // [T, K]
  NormalRoutes routes;
  int32_t* num_recv_tokens_per_expert;  // out [L]
  uint64_t ticket;    // not 0: the host waits for counts, and resumes if rows need rounds
  uint64_t num_rows;  // room for received rows: more are an error
  // Where rows are copied to: those that come in rounds must be. The tensors of a rank that gets
  // none are null, too.
  bool may_come_in_rounds;
  NormalOutputs out;
};

// Where combine's rows are.
enum class CombineInput : uint32_t {
  kElsewhere = 0,     // they are copied to symmetric memory first
  kCombineRows = 1,   // there already
  kReceivedRows = 2,  // where dispatch has put the rows it brought
};

struct NormalCombine {
  const std::byte* x;  // [N, H] in the order of recv_x
  CombineInput input;
  bool has_topk_weights;      // on every rank, or on none: they go home too
  const float* topk_weights;  // [N, K]
  const std::byte* bias[2];   // [T, H], added behind a token's rows; null: none
  NormalRoutes routes;
  const int32_t* recv_src_tokens;  // [N]
  std::byte* out;                  // out [T, H]
  float* combined_topk_weights;    // out [T, K]
};

class NormalRank {
 public:
  // `bases[r]`: memory of rank r as the current device sees it. `num_max_sms`: blocks that a kernel
  // will have at most. `shares_gpu`: all ranks are on the same GPU. Throws std::runtime_error with
  // the CUDA error where the device refuses.
  NormalRank(const protocol::NormalDeviceConfig& config, uint32_t self_rank,
             const std::vector<std::byte*>& bases, uint64_t timeout_ns, uint32_t num_max_sms,
             bool shares_gpu);
  ~NormalRank();
  NormalRank(const NormalRank&) = delete;
  NormalRank& operator=(const NormalRank&) = delete;

  protocol::OpResult dispatch(const NormalDispatch& params, uint32_t num_sms, void* stream);
  // Copies what a dispatch has brought to symmetric memory at once, as far as `outputs` wants it.
  // `batch`: of the dispatch's routes.
  protocol::OpResult unpack(const uint32_t* batch, const NormalOutputs& outputs, uint32_t num_sms,
                            void* stream);
  protocol::OpResult combine(const NormalCombine& params, uint32_t num_sms, void* stream);

  // Waits for: the counts of the dispatch with this ticket, which has been launched, or its
  // failure. `is_interrupted` is asked now and then. Throws std::runtime_error where the device has
  // failed.
  protocol::OpResult wait_for_counts(uint64_t ticket, void* stream, bool (*is_interrupted)()) const;
  // After that.
  HostCounts counts() const;
  std::vector<uint32_t> expert_counts() const;

  // What a kernel has reported so far; does not wait for the device.
  protocol::OpResult report() const;
  // On the device: how many dispatches, and combines, have been completed.
  const uint64_t* epochs() const;

 private:
  Launch launch(uint32_t num_sms, uint32_t num_threads, void* stream) const;
  protocol::OpResult launched(const char* what) const;

  NormalView view_;
  std::byte** bases_ = nullptr;
};

}  // namespace ep::cuda
