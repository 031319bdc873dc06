#include <algorithm>
#include <string>
#include <utility>

#include "cuda/check.h"
#include "cuda/low_latency.h"
#include "cuda/rank.cuh"

namespace ep::cuda {

using protocol::OpResult;

RankHost::RankHost(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                   const std::vector<std::byte*>& bases, uint64_t timeout_ns)
    : view_{LowLatencyLayout(config), self_rank, bases[self_rank]} {
  const size_t num_ranks = bases.size();
  bases_ = device_copy(bases, "writing the table of peers");
  view_.state = zeroed_device_array<RankState>(1);
  view_.wait_ns =
      zeroed_device_array<uint64_t>(protocol::kNumPhases * protocol::kNumHalves * num_ranks);
  view_.num_expert_rows =
      zeroed_device_array<uint64_t>(view_.layout.partition().num_max_local_experts());
  const uint32_t num_workspaces = config.num_workspaces;
  view_.workspace_dispatches = zeroed_device_array<uint64_t>(num_workspaces);
  view_.workspace_counts = zeroed_device_array<uint32_t>(num_workspaces * (num_ranks + 1));
  check(cudaHostAlloc(&view_.report, sizeof(HostReport), cudaHostAllocMapped),
        "allocating a rank's report");
  view_.report->result = {};
  std::copy_n(bases.begin(), std::min<size_t>(num_ranks, kNumNearRanks), view_.near_bases);
  view_.bases = bases_;
  view_.timeout_ns = timeout_ns;
  view_.owners = Owners(view_.layout.partition());
  view_.num_local_experts = view_.layout.partition().num_local_experts(self_rank);
  check(cudaDeviceSynchronize(), "setting a rank up");
}

RankHost::~RankHost() {
  // Errors here have nobody to go to; the device's memory goes with the process at the latest.
  cudaFree(bases_);
  cudaFree(view_.state);
  cudaFree(view_.wait_ns);
  cudaFree(view_.num_expert_rows);
  cudaFree(view_.workspace_dispatches);
  cudaFree(view_.workspace_counts);
  cudaFreeHost(view_.report);
}

OpResult RankHost::launched(const char* what) const {
  check(cudaGetLastError(), (std::string("launching ") + what).c_str());
  return report();
}

OpResult RankHost::report() const { return read_report(*view_.report); }

Statistics RankHost::statistics() const {
  const auto& partition = view_.layout.partition();
  constexpr size_t kNumKinds = size_t{protocol::kNumPhases} * protocol::kNumHalves;
  std::vector<uint64_t> num_ops = counters_.read(&view_.state->progress[0][0], kNumKinds);
  for (uint64_t& progress : num_ops) progress >>= kProgressShift;
  return {std::move(num_ops), counters_.read(view_.wait_ns, kNumKinds * partition.num_ranks),
          counters_.read(view_.num_expert_rows, partition.num_local_experts(view_.self_rank))};
}

}  // namespace ep::cuda
