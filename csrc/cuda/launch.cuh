// How the kernels are launched: blocks, stream, shared memory, programmatic dependent launch.
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
  template <typename... Params, typename... Args>
  void run(void (*kernel)(Params...), uint64_t shared_bytes, const Args&... args) const {
    if (shared_bytes > kDefaultSharedBytes) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes));
    }
    // The kernel may be put on the GPU while the one before it ends.
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = num_blocks;
    config.blockDim = num_threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, args...);
  }

  // Shared memory that a kernel may have without asking.
  static constexpr uint64_t kDefaultSharedBytes = 24 << 10;  // 48 KiB less what kernels declare
};

// Shared memory of a dispatch: a bit for each token, under every expert and rank, and what arrives.
uint64_t dispatch_shared_bytes(const protocol::LowLatencyLayout& layout, uint32_t self_rank,
                               uint32_t num_tokens);

void launch_dispatch_send(const RankView& rank, const DispatchSendParams& send,
                          const Launch& launch);
void launch_dispatch_recv(const RankView& rank, const DispatchRecvParams& recv,
                          const Launch& launch);
void launch_dispatch(const RankView& rank, const DispatchSendParams& send,
                     const DispatchRecvParams& recv, const Launch& launch);
void launch_combine_send(const RankView& rank, const CombineSendParams& send, const Launch& launch);
void launch_combine_recv(const RankView& rank, const CombineRecvParams& recv, const Launch& launch);
void launch_combine(const RankView& rank, const CombineSendParams& send,
                    const CombineRecvParams& recv, const Launch& launch);

}  // namespace ep::cuda
