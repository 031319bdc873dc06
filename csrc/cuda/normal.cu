#include <algorithm>
#include <string>

#include "cuda/check.h"
#include "cuda/normal.h"
#include "cuda/normal_launch.cuh"
#include "cuda/normal_rank.cuh"

namespace ep::cuda {

using protocol::OpResult;

NormalRank::NormalRank(const protocol::NormalDeviceConfig& config, uint32_t self_rank,
                       const std::vector<std::byte*>& bases, uint64_t timeout_ns,
                       uint32_t num_max_sms, bool shares_gpu)
    : view_{NormalDeviceLayout(config), self_rank, bases[self_rank]} {
  prepare_normal_dispatch();
  prepare_normal_combine();
  const size_t num_ranks = bases.size();
  view_.bases = bases_ = device_copy(bases, "writing the table of peers");
  std::copy_n(bases.begin(), std::min<size_t>(num_ranks, kNumNearRanks), view_.near_bases);
  view_.state = zeroed_device_array<NormalState>(1);
  view_.block_rank_counts = zeroed_device_array<uint32_t>(num_max_sms * num_ranks);
  view_.expert_counts = zeroed_device_array<uint32_t>(config.num_experts);
  check(cudaHostAlloc(&view_.report, sizeof(HostReport), cudaHostAllocMapped),
        "allocating a rank's report");
  view_.report->result = {};
  view_.owners = Owners(view_.layout.partition());
  view_.num_local_experts = view_.layout.partition().num_local_experts(self_rank);
  view_.host_counts = allocate_host_counts(view_.num_local_experts);
  view_.timeout_ns = timeout_ns;
  view_.shares_gpu = shares_gpu;
  check(cudaDeviceSynchronize(), "setting a rank up");
}

NormalRank::~NormalRank() {
  // Errors here have nobody to go to; the device's memory goes with the process at the latest.
  cudaFree(bases_);
  cudaFree(view_.state);
  cudaFree(view_.block_rank_counts);
  cudaFree(view_.expert_counts);
  cudaFreeHost(view_.report);
  cudaFreeHost(view_.host_counts);
}

OpResult NormalRank::dispatch(const NormalDispatch& params, uint32_t num_sms, void* stream) {
  launch_normal_dispatch(view_, params, launch(num_sms, normal_dispatch_threads(), stream));
  return launched("dispatch");
}

OpResult NormalRank::unpack(const uint32_t* batch, const NormalOutputs& outputs, uint32_t num_sms,
                            void* stream) {
  launch_normal_unpack(view_, batch, outputs, launch(num_sms, normal_dispatch_threads(), stream));
  return launched("unpacking a dispatch");
}

OpResult NormalRank::combine(const NormalCombine& params, uint32_t num_sms, void* stream) {
  launch_normal_combine(view_, params, launch(num_sms, normal_combine_threads(), stream));
  return launched("combine");
}

OpResult NormalRank::wait_for_counts(uint64_t ticket, void* stream,
                                     bool (*is_interrupted)()) const {
  return cuda::wait_for_counts(*view_.host_counts, ticket, stream, is_interrupted,
                               [this] { return report(); });
}

HostCounts NormalRank::counts() const { return *view_.host_counts; }

std::vector<uint32_t> NormalRank::expert_counts() const {
  const uint32_t* counts = view_.host_counts->experts();
  return {counts, counts + view_.num_local_experts};
}

// Where ranks share the GPU, the SMs are for those of others.
Launch NormalRank::launch(uint32_t num_sms, uint32_t num_threads, void* stream) const {
  return {num_sms, num_threads, static_cast<cudaStream_t>(stream), !view_.shares_gpu};
}

OpResult NormalRank::launched(const char* what) const {
  check(cudaGetLastError(), (std::string("launching ") + what).c_str());
  return report();
}

OpResult NormalRank::report() const { return read_report(*view_.report); }

const uint64_t* NormalRank::epochs() const { return view_.state->epochs; }

}  // namespace ep::cuda
