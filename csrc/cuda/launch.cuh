// How the four kernels are launched: the widest vector a row divides into, blocks, threads, stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/low_latency.h"

namespace ep::cuda {

struct Launch {
  uint32_t num_blocks;
  uint32_t num_threads;
  cudaStream_t stream;

  // Errors are left to cudaGetLastError.
  template <typename Params>
  void run(void (*kernel)(RankView, Params), uint64_t shared_bytes, const RankView& rank,
           const Params& params) const {
    kernel<<<num_blocks, num_threads, shared_bytes, stream>>>(rank, params);
  }
};

// Shared memory that a kernel may have without asking.
constexpr uint64_t kDefaultSharedBytes = 32 << 10;  // 48 KiB less what kernels declare themselves

// Shared memory of a send: a bit for each token, under every expert and rank.
uint64_t dispatch_send_shared_bytes(const protocol::LowLatencyConfig& config, uint32_t num_tokens);

void launch_dispatch_send(const RankView& rank, const DispatchSendParams& params,
                          const Launch& launch);
void launch_dispatch_recv(const RankView& rank, const DispatchRecvParams& params,
                          const Launch& launch);
void launch_combine_send(const RankView& rank, const CombineSendParams& params,
                         const Launch& launch);
void launch_combine_recv(const RankView& rank, const CombineRecvParams& params,
                         const Launch& launch);

// Calls `launch` with a value of the widest type whose size divides a row: rows in tensors follow
// each other without padding, so a row's size is also its alignment.
template <typename Function>
void with_vector(uint64_t row_bytes, Function&& launch) {
  if (row_bytes % 16 == 0) {
    launch(uint4{});
  } else if (row_bytes % 8 == 0) {
    launch(uint2{});
  } else if (row_bytes % 4 == 0) {
    launch(uint32_t{});
  } else {
    launch(uint16_t{});
  }
}

}  // namespace ep::cuda
