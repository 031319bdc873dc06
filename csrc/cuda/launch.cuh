// How the kernels are launched: blocks, stream, shared memory, programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "cuda/low_latency.h"

namespace ep::cuda {

struct Launch {
  uint32_t num_blocks;
  uint32_t num_threads;
  cudaStream_t stream;
  bool starts_early;  // may be put on the GPU while the kernel before it ends

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

// Of all kernels of a file, see Launch::prepare.
void prepare_dispatch();
void prepare_combine();
void prepare_workspace_combine();

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

// Dispatch into workspaces, whose rows are arranged in one of two ways.
struct WorkspaceDispatch {
  void (*prepare)();
  // Of a kernel that sends so many tokens, and receives.
  uint64_t (*shared_bytes)(const protocol::LowLatencyLayout& layout, uint32_t num_tokens);
  void (*send)(const RankView& rank, const DispatchSendParams& send, const Launch& launch);
  void (*recv)(const RankView& rank, const DispatchRecvParams& recv, const Launch& launch);
  void (*both)(const RankView& rank, const DispatchSendParams& send, const DispatchRecvParams& recv,
               const Launch& launch);
};
extern const WorkspaceDispatch kRankMajorWorkspaceDispatch;
extern const WorkspaceDispatch kTaggedWorkspaceDispatch;  // rank-major, too
extern const WorkspaceDispatch kExpertWorkspaceDispatch;

// Of an exchange with so many slots a source, on which all ranks agree.
inline const WorkspaceDispatch& workspace_dispatch(const protocol::LowLatencyLayout& layout,
                                                   uint32_t num_slots) {
  if (layout.has_expert_workspaces()) return kExpertWorkspaceDispatch;
  return num_slots <= layout.config().num_max_tagged_tokens ? kTaggedWorkspaceDispatch
                                                            : kRankMajorWorkspaceDispatch;
}

void launch_workspace_combine_send(const RankView& rank, const CombineSendParams& send,
                                   const Launch& launch);
void launch_workspace_combine_recv(const RankView& rank, const CombineRecvParams& recv,
                                   const Launch& launch);
void launch_workspace_combine(const RankView& rank, const CombineSendParams& send,
                              const CombineRecvParams& recv, const Launch& launch);

}  // namespace ep::cuda
