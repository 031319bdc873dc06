#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/low_latency.h"
#include "cuda/rank.cuh"

namespace ep::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Half a row of 16-byte vectors a thread, in whole warps.
uint32_t threads_for(uint64_t row_bytes) {
  const uint64_t num_vectors = (row_bytes + 31) / 32;
  return static_cast<uint32_t>(std::clamp<uint64_t>((num_vectors + 31) / 32 * 32, 64, 512));
}

}  // namespace

LowLatencyRank::LowLatencyRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                               const std::vector<std::byte*>& bases, uint64_t timeout_ns,
                               uint32_t num_sms)
    : view_{protocol::LowLatencyLayout(config),
            self_rank,
            bases[self_rank],
            {},
            nullptr,
            nullptr,
            nullptr,
            timeout_ns},
      num_sms_(num_sms),
      num_threads_(threads_for(view_.layout.row_bytes())) {
  const size_t table_bytes = bases.size() * sizeof(std::byte*);
  int device, max_shared_bytes;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for the size of shared memory");
  const uint64_t shared_bytes = dispatch_send_shared_bytes(config, config.num_max_tokens_per_rank);
  const uint64_t static_shared_bytes = (48 << 10) - kDefaultSharedBytes;
  if (shared_bytes + static_shared_bytes > static_cast<uint64_t>(max_shared_bytes)) {
    throw std::invalid_argument(
        "a dispatch of num_max_tokens_per_rank tokens needs " + std::to_string(shared_bytes) +
        " bytes of shared memory, a bit for each token and expert; this GPU has " +
        std::to_string(max_shared_bytes - static_shared_bytes) +
        ". Lower num_max_tokens_per_rank or num_experts.");
  }
  check(cudaMalloc(&bases_, table_bytes), "allocating the table of peers");
  check(cudaMemcpy(bases_, bases.data(), table_bytes, cudaMemcpyHostToDevice),
        "writing the table of peers");
  check(cudaMalloc(&view_.state, sizeof(RankState)), "allocating a rank's state");
  check(cudaMemset(view_.state, 0, sizeof(RankState)), "zeroing a rank's state");
  check(cudaHostAlloc(&view_.report, sizeof(HostReport), cudaHostAllocMapped),
        "allocating a rank's report");
  view_.report->result = {};
  std::copy_n(bases.begin(), std::min<size_t>(bases.size(), kNumNearRanks), view_.near_bases);
  view_.bases = bases_;
  check(cudaDeviceSynchronize(), "setting a rank up");
}

LowLatencyRank::~LowLatencyRank() {
  // Errors here have nobody to go to; the device's memory goes with the process at the latest.
  cudaFree(bases_);
  cudaFree(view_.state);
  cudaFreeHost(view_.report);
}

uint32_t LowLatencyRank::num_blocks(uint64_t num_rows) const {
  return static_cast<uint32_t>(std::clamp<uint64_t>(num_rows, 1, num_sms_));
}

protocol::OpResult LowLatencyRank::dispatch_send(const DispatchSendParams& params, void* stream) {
  const Launch launch{num_blocks(params.num_tokens), num_threads_,
                      static_cast<cudaStream_t>(stream)};
  launch_dispatch_send(view_, params, launch);
  check(cudaGetLastError(), "launching dispatch_send");
  return report();
}

protocol::OpResult LowLatencyRank::dispatch_recv(const DispatchRecvParams& params, void* stream) {
  const Launch launch{num_sms_, num_threads_, static_cast<cudaStream_t>(stream)};
  launch_dispatch_recv(view_, params, launch);
  check(cudaGetLastError(), "launching dispatch_recv");
  return report();
}

protocol::OpResult LowLatencyRank::combine_send(const CombineSendParams& params, void* stream) {
  const Launch launch{num_sms_, num_threads_, static_cast<cudaStream_t>(stream)};
  launch_combine_send(view_, params, launch);
  check(cudaGetLastError(), "launching combine_send");
  return report();
}

protocol::OpResult LowLatencyRank::combine_recv(const CombineRecvParams& params, void* stream) {
  const Launch launch{num_blocks(params.num_tokens), num_threads_,
                      static_cast<cudaStream_t>(stream)};
  launch_combine_recv(view_, params, launch);
  check(cudaGetLastError(), "launching combine_recv");
  return report();
}

protocol::OpResult LowLatencyRank::report() const {
  const volatile auto* status =
      reinterpret_cast<const volatile uint32_t*>(&view_.report->result.status);
  if (*status == static_cast<uint32_t>(Status::kOk)) return {};
  __sync_synchronize();  // the status is written last
  return view_.report->result;
}

}  // namespace ep::cuda
