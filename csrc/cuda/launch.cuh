// How the kernels are launched: blocks, stream, shared memory, programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "cuda/kernels.h"

namespace ep::cuda {

struct Launch {
  uint32_t num_blocks;
  uint32_t num_threads;
  cudaStream_t stream;
  bool starts_early;  // may be put on the GPU while the kernel before it ends
  // It has no more to do than its warps do at once, so that its time is that of instructions.
  bool is_small = false;

  // Once, before a kernel is launched, at any time: kernels that are loaded at their first launch
  // wait there for others to end, which may be waiting for this one.
  template <typename... Params>
  static void prepare(void (*kernel)(Params...)) {
    // All alike: an SM divides L1 into cache and shared memory anew only when it is idle, and a
    // block that waits for that holds up those behind it, of kernels for which others wait.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "setting the size of shared memory");
    int device, of_block;
    cudaFuncAttributes attributes;
    check(cudaGetDevice(&device), "asking for the current device");
    check(cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "asking for the size of shared memory");
    check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               of_block - static_cast<int>(attributes.sharedSizeBytes)),
          "setting the size of shared memory");
  }

  // Whether two blocks of the largest dispatch fit an SM, which want `num_wanted` bytes each beside
  // those that are declared. Throws std::invalid_argument where one does not. `of_what`: for that.
  static bool two_fit(uint64_t num_wanted, const std::string& of_what = "") {
    int device, of_block, of_sm;
    check(cudaGetDevice(&device), "asking for the current device");
    check(cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "asking for the size of shared memory");
    check(cudaDeviceGetAttribute(&of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          "asking for the size of shared memory");
    if (num_wanted + kDeclaredSharedBytes > static_cast<uint64_t>(of_block)) {
      throw std::invalid_argument(
          "a dispatch of num_max_tokens_per_rank tokens needs " + std::to_string(num_wanted) +
          " bytes of shared memory" + of_what + "; this GPU has " +
          std::to_string(of_block - kDeclaredSharedBytes) + ". Lower num_max_tokens_per_rank.");
    }
    return 2 * (num_wanted + kDeclaredSharedBytes) <= static_cast<uint64_t>(of_sm);
  }

  // Errors are left to cudaGetLastError.
  template <typename... Params, typename... Args>
  void run(void (*kernel)(Params...), uint64_t shared_bytes, const Args&... args) const {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = starts_early;
    cudaLaunchConfig_t config = {};
    config.gridDim = num_blocks;
    config.blockDim = num_threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, args...);
  }

  // Shared memory that kernels declare, at most.
  static constexpr uint64_t kDeclaredSharedBytes = 24 << 10;
};

}  // namespace ep::cuda
