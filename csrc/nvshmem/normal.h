// The normal kernels for ranks on several nodes, on GPUs, and one rank's private state on the
// device. What they mean is in csrc/cpu/normal_nodes.h; within a node a GPU writes to its peers'
// memory, to other nodes NVSHMEM puts.
//
// Launches return at once. What a kernel finds wrong it writes to pinned host memory before it
// ends; the next call on the buffer reports it. The host waits in `wait_for_counts` only.
//
// T tokens of this rank, N rows received, H hidden, K top_k, R ranks, G of them a node, V other
// nodes, L local experts, D = min(K, R), the ranks that a token can go to, C tokens of a round, I
// rounds of the largest batch, S scales of a float8 row, W 32-bit words of a received row's scales.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/host_counts.h"
#include "cuda/low_latency.h"
#include "protocol/normal_device_layout.h"
#include "protocol/normal_network_layout.h"
#include "protocol/op.h"

namespace ep::nvshmem {

struct NodeState;  // on the device: epochs, arrival counters, the failed word

// What every kernel of one rank is given.
struct NodeRankView {
  protocol::NormalNetworkLayout layout;
  protocol::NodeView nodes;
  uint32_t self_rank;
  std::byte* self_base;
  std::byte* const* bases;  // [R]: where this GPU sees each rank of its node
  const int32_t* pes;       // [R]: NVSHMEM's number of each rank
  NodeState* state;
  uint64_t* arrived;        // [arrivals]: what the rounds so far have seen arrive
  uint32_t* expert_counts;  // [E]: of a batch while it is routed, else 0
  uint64_t* num_rows_to;    // [R]: of the batch that is routed
  uint32_t* num_forwarded;  // [rounds in flight, V, G]: of a round while it is forwarded, else 0
  cuda::HostReport* report;
  cuda::HostCounts* host_counts;
  uint64_t timeout_ns;
  cuda::Owners owners;
  uint32_t num_local_experts;
};

// Where tokens went and rows came from: on the device, kept by the caller's handle.
struct NodeRoutes {
  uint32_t num_tokens;     // T
  uint64_t* ranks;         // [T] ranks that a token goes to, as bits
  uint32_t* messages;      // [T, D] rank << 16 | the message's slot in its round, ranks ascending
  uint32_t* node_slots;    // [T, min(K, V)] slots of its messages for other nodes, nodes ascending
  uint32_t* round_counts;  // [ceil(T / C), R + V] messages for each rank, and for each other node
  uint32_t* sources;       // [R, 2] of each: tokens of its batch, its rows for this rank
};

struct NodeCounts {
  const void* topk_idx;  // [T, K] int32 or int64, -1 = not routed
  bool topk_idx_is_int64;
  NodeRoutes routes;                    // out
  int32_t* num_recv_tokens_per_expert;  // out [L]
  uint64_t ticket;                      // not 0: the host waits for counts
  uint64_t num_rows;                    // room for received rows: more are an error
};

struct NodeDispatch {
  const std::byte* x;     // [T, H]
  bool x_is_quantized;    // x is float8, with scales; else it is of the buffer's dtype
  const float* x_scales;  // [T, S]
  bool is_cached;         // rows travel alone
  const void* topk_idx;   // [T, K] as above, and its weights; not of a cached routing
  bool topk_idx_is_int64;
  const float* topk_weights;
  NodeRoutes routes;
  std::byte* recv_x;         // out [N, H], by source rank, then token
  uint32_t* recv_scales;     // out [N, W] of float8 rows
  int32_t* recv_topk_idx;    // out [N, K] local experts at their k, -1 where another rank's
  float* recv_topk_weights;  // out [N, K], 0 where another rank's
  int32_t* recv_src_tokens;  // out [N]
  uint64_t num_rows;         // of these tensors: N, or what the caller holds to be enough
};

struct NodeCombine {
  const std::byte* x;         // [N, H] in the order of recv_x
  bool has_topk_weights;      // on every rank, or on none: they go home too
  const float* topk_weights;  // [N, K]
  const std::byte* bias[2];   // [T, H], added behind a token's rows; null: none
  NodeRoutes routes;
  const int32_t* recv_src_tokens;  // [N]
  std::byte* out;                  // out [T, H]
  float* combined_topk_weights;    // out [T, K]
};

class NormalNetworkRank {
 public:
  // `bases[r]`: memory of rank r of this node as the current device sees it; others are not looked
  // at. `pes[r]`: NVSHMEM's number of rank r. Throws std::invalid_argument for a config that these
  // kernels do not serve; std::runtime_error with the CUDA error where the device refuses.
  NormalNetworkRank(const protocol::NormalNodeConfig& config, uint32_t self_rank,
                    const std::vector<std::byte*>& bases, const std::vector<int32_t>& pes,
                    uint64_t timeout_ns);
  ~NormalNetworkRank();
  NormalNetworkRank(const NormalNetworkRank&) = delete;
  NormalNetworkRank& operator=(const NormalNetworkRank&) = delete;

  // Routes the batch and exchanges its counts; then `dispatch` brings the rows.
  protocol::OpResult exchange_counts(const NodeCounts& params, uint32_t num_sms, void* stream);
  protocol::OpResult dispatch(const NodeDispatch& params, uint32_t num_sms, void* stream);
  protocol::OpResult combine(const NodeCombine& params, uint32_t num_sms, void* stream);

  // See cuda::wait_for_counts.
  protocol::OpResult wait_for_counts(uint64_t ticket, void* stream, bool (*is_interrupted)()) const;
  // After that.
  const cuda::HostCounts& counts() const { return *view_.host_counts; }
  std::vector<uint32_t> expert_counts() const;

  // What a kernel has reported so far; does not wait for the device.
  protocol::OpResult report() const;
  // On the device: how many dispatches, and combines, have been completed.
  const uint64_t* num_operations() const;

 private:
  protocol::OpResult launched(const char* what) const;

  NodeRankView view_;
  std::byte** bases_ = nullptr;
  int32_t* pes_ = nullptr;
};

}  // namespace ep::nvshmem
