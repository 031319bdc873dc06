#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "nvshmem/normal.h"
#include "nvshmem/normal_launch.cuh"
#include "nvshmem/normal_op.cuh"

namespace ep::nvshmem {

using cuda::check;
using cuda::device_copy;
using cuda::Launch;
using cuda::zeroed_device_array;
using protocol::OpResult;

namespace {

Launch launch_of(uint32_t num_sms, void* stream) {
  return {num_sms, kNodeThreads, static_cast<cudaStream_t>(stream), false};
}

const protocol::NormalNodeConfig& checked(const protocol::NormalNodeConfig& config) {
  const uint32_t num_ranks = config.normal.num_ranks, per_node = config.ranks_per_node;
  const bool is_served = num_ranks <= protocol::kNumMaxDeviceRanks &&
                         config.normal.num_experts <= protocol::kNumMaxDeviceExperts &&
                         per_node >= 1 && num_ranks % per_node == 0 && per_node < num_ranks;
  if (!is_served) {
    throw std::invalid_argument(
        "the normal kernels over a network are for ranks on several nodes, as many on each: " +
        std::to_string(num_ranks) + " ranks, " + std::to_string(per_node) + " a node");
  }
  return config;
}

}  // namespace

NormalNetworkRank::NormalNetworkRank(const protocol::NormalNodeConfig& config, uint32_t self_rank,
                                     const std::vector<std::byte*>& bases,
                                     const std::vector<int32_t>& pes, uint64_t timeout_ns)
    : view_{protocol::NormalNetworkLayout(checked(config)),
            {{config.normal.num_ranks, config.ranks_per_node}, self_rank},
            self_rank,
            bases[self_rank]} {
  prepare_node_counts();
  prepare_node_dispatch();
  prepare_node_combine();
  const auto& nodes = view_.nodes.nodes;
  view_.bases = bases_ = device_copy(bases, "writing the table of peers");
  view_.pes = pes_ = device_copy(pes, "writing the table of PEs");
  view_.state = zeroed_device_array<NodeState>(1);
  view_.arrived = zeroed_device_array<uint64_t>(view_.layout.num_arrivals());
  view_.expert_counts = zeroed_device_array<uint32_t>(config.normal.num_experts);
  view_.num_rows_to = zeroed_device_array<uint64_t>(config.normal.num_ranks);
  view_.num_forwarded = zeroed_device_array<uint32_t>(size_t{kRoundsInFlight} * nodes.num_remote() *
                                                      nodes.ranks_per_node);
  check(cudaHostAlloc(&view_.report, sizeof(cuda::HostReport), cudaHostAllocMapped),
        "allocating a rank's report");
  view_.report->result = {};
  const auto& partition = view_.layout.nodes().base().partition();
  view_.owners = cuda::Owners(partition);
  view_.num_local_experts = partition.num_local_experts(self_rank);
  view_.host_counts = cuda::allocate_host_counts(view_.num_local_experts);
  view_.timeout_ns = timeout_ns;
  check(cudaDeviceSynchronize(), "setting a rank up");
}

NormalNetworkRank::~NormalNetworkRank() {
  // Errors here have nobody to go to; the device's memory goes with the process at the latest.
  cudaFree(bases_);
  cudaFree(pes_);
  cudaFree(view_.state);
  cudaFree(view_.arrived);
  cudaFree(view_.expert_counts);
  cudaFree(view_.num_rows_to);
  cudaFree(view_.num_forwarded);
  cudaFreeHost(view_.report);
  cudaFreeHost(view_.host_counts);
}

OpResult NormalNetworkRank::exchange_counts(const NodeCounts& params, uint32_t num_sms,
                                            void* stream) {
  launch_node_counts(view_, params, launch_of(num_sms, stream));
  return launched("the exchange of counts");
}

OpResult NormalNetworkRank::dispatch(const NodeDispatch& params, uint32_t num_sms, void* stream) {
  launch_node_dispatch(view_, params, launch_of(num_sms, stream));
  return launched("dispatch");
}

OpResult NormalNetworkRank::combine(const NodeCombine& params, uint32_t num_sms, void* stream) {
  launch_node_combine(view_, params, launch_of(num_sms, stream));
  return launched("combine");
}

OpResult NormalNetworkRank::wait_for_counts(uint64_t ticket, void* stream,
                                            bool (*is_interrupted)()) const {
  return cuda::wait_for_counts(*view_.host_counts, ticket, stream, is_interrupted,
                               [this] { return report(); });
}

std::vector<uint32_t> NormalNetworkRank::expert_counts() const {
  const uint32_t* counts = view_.host_counts->experts();
  return {counts, counts + view_.num_local_experts};
}

OpResult NormalNetworkRank::launched(const char* what) const {
  check(cudaGetLastError(), (std::string("launching ") + what).c_str());
  return report();
}

OpResult NormalNetworkRank::report() const { return cuda::read_report(*view_.report); }

const uint64_t* NormalNetworkRank::num_operations() const { return view_.state->num_operations; }

}  // namespace ep::nvshmem
