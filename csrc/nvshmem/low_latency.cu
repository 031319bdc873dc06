#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "nvshmem/launch.cuh"
#include "nvshmem/low_latency.h"

namespace ep::nvshmem {

using cuda::check;
using protocol::OpResult;

namespace {

void check_config(const protocol::LowLatencyConfig& config) {
  const bool is_served = config.packs_messages && config.num_max_tagged_tokens == 0 &&
                         config.num_workspaces == 0 &&
                         config.transfer == protocol::Transfer::kPush &&
                         config.reduction == protocol::Reduction::kRank;
  if (!is_served) {
    throw std::invalid_argument(
        "over a network messages are packed and pushed, never tagged, not in workspaces, and "
        "reduced on their rank");
  }
}

void check_shared_memory(const protocol::LowLatencyLayout& layout, uint32_t self_rank) {
  int device, of_block;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for the size of shared memory");
  const uint64_t num_wanted = dispatch_shared_bytes(layout, self_rank);
  const uint64_t num_present = static_cast<uint64_t>(of_block) - Launch::kDeclaredSharedBytes;
  if (num_wanted > num_present) {
    throw std::invalid_argument("a dispatch of num_max_tokens_per_rank tokens needs " +
                                std::to_string(num_wanted) +
                                " bytes of shared memory; this GPU has " +
                                std::to_string(num_present) + ". Lower num_max_tokens_per_rank.");
  }
}

}  // namespace

NetworkRank::NetworkRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                         const std::vector<std::byte*>& bases, const std::vector<int32_t>& pes,
                         uint64_t timeout_ns, uint32_t num_sms)
    : RankHost(config, self_rank, bases, timeout_ns), network_(view_.layout), num_sms_(num_sms) {
  check_config(config);
  check_shared_memory(view_.layout, self_rank);
  prepare_dispatch();
  prepare_combine();
  pes_ = cuda::zeroed_device_array<int32_t>(pes.size());
  check(cudaMemcpy(pes_, pes.data(), pes.size() * sizeof(int32_t), cudaMemcpyHostToDevice),
        "writing the table of PEs");
  arrived_ = cuda::zeroed_device_array<uint64_t>(size_t{config.num_banks} * protocol::kNumPhases *
                                                 config.num_ranks);
  check(cudaDeviceSynchronize(), "setting a rank up");
}

NetworkRank::~NetworkRank() {
  cudaFree(pes_);
  cudaFree(arrived_);
}

struct NetworkRank::Plan {
  NetworkView view;
  Launch launch;
};

NetworkRank::Plan NetworkRank::plan(uint64_t num_items, void* stream) const {
  const auto num_blocks =
      static_cast<uint32_t>(std::clamp<uint64_t>(num_items, 1, uint64_t{num_sms_}));
  Plan plan = {{{view_, pes_}, network_, arrived_},
               {num_blocks, cuda::kThreads, static_cast<cudaStream_t>(stream), true}};
  plan.view.share = cuda::kProgressPerOp / num_blocks;
  plan.view.first_share = cuda::kProgressPerOp - plan.view.share * (num_blocks - 1);
  plan.view.next_starts_early = false;
  return plan;
}

OpResult NetworkRank::dispatch_send(const DispatchSendParams& send, void* stream) {
  num_tokens_ = send.num_tokens;
  const Plan p = plan(send.num_tokens, stream);  // a block a token
  launch_dispatch_send(p.view, send, p.launch);
  return launched("dispatch_send");
}

// Peers' batches are likely as large as this rank's.
OpResult NetworkRank::dispatch_recv(const DispatchRecvParams& recv, void* stream) {
  const uint64_t num_messages = uint64_t{num_tokens_} * view_.layout.num_outcome_columns();
  const uint32_t num_parts = protocol::parts_for(view_.layout.dispatch_row_bytes());
  const Plan p = plan(num_messages * num_parts, stream);
  launch_dispatch_recv(p.view, recv, p.launch);
  return launched("dispatch_recv");
}

OpResult NetworkRank::combine_send(const CombineSendParams& send, void* stream) {
  const Plan p = plan(uint64_t{num_tokens_} * view_.layout.num_outcome_columns(), stream);
  launch_combine_send(p.view, send, p.launch);
  return launched("combine_send");
}

OpResult NetworkRank::combine_recv(const CombineRecvParams& recv, void* stream) {
  const uint32_t num_parts = protocol::parts_for(view_.layout.combine_row_bytes());
  const Plan p = plan(uint64_t{recv.num_tokens} * num_parts, stream);
  launch_combine_recv(p.view, recv, p.launch);
  return launched("combine_recv");
}

}  // namespace ep::nvshmem
