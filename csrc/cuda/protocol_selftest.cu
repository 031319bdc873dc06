#include <cuda_runtime.h>

#include <vector>

#include "cuda/protocol_selftest.h"
#include "ptx/float8.cuh"

namespace ep::cuda {
namespace {

using protocol::Phase;

constexpr uint32_t kNumCases = 4096;
constexpr uint32_t kNumWords = 15;

// The same function on both sides; case numbers walk through epochs, ranks, tokens and experts.
EP_HOST_DEVICE void evaluate(const protocol::LowLatencyConfig& config, uint32_t case_idx,
                             uint64_t* words) {
  const protocol::LowLatencyLayout layout(config);
  const uint64_t epoch = 1 + uint64_t{case_idx} * 2654435761u;
  const uint32_t bank = protocol::bank_of(epoch, config.num_banks);
  const uint32_t rank = case_idx % config.num_ranks;
  const uint32_t token = case_idx % config.num_max_tokens_per_rank;
  const Phase phase = case_idx % 2 == 0 ? Phase::kDispatch : Phase::kCombine;
  words[0] = protocol::pack_signal(epoch, case_idx & protocol::kMaxCount);
  words[1] = layout.signal(bank, phase, rank);
  words[2] = layout.credit(phase, rank);
  words[3] = layout.counts(bank, rank);
  words[4] = layout.header(bank, rank, token);
  words[5] = layout.inbox_row(bank, rank, token);
  words[6] = layout.staged_scales(bank, token);
  words[7] = layout.outbox(bank, rank, token);
  words[8] = layout.tagged_message(bank, rank, token);
  words[9] = layout.tagged_outcome(bank, token) + layout.answering_row(bank, rank, token);
  words[10] = layout.partition().owner(case_idx % config.num_experts);
  const uint32_t workspace = case_idx % (config.num_workspaces + 1);
  words[11] = layout.num_bytes() + layout.workspace_credit(workspace, rank) +
              layout.workspace_arrivals(rank) + layout.workspace_topk_weights(workspace, token) +
              layout.combine_input(workspace, layout.message_in_workspace(
                                                  config.num_max_tokens_per_rank, rank, token));
  words[13] = layout.outcome(bank, token) + layout.combine_scales_in_row();
  // Every 32-bit pattern once in a while: the hardware's conversion against the protocol's.
  const float value = protocol::float_of(case_idx * 1048583u);
#if defined(__CUDA_ARCH__)
  words[12] = ptx::to_e4m3x2(value, value) & 0xff;
#else
  words[12] = protocol::to_e4m3(value);
#endif
  words[12] |= uint64_t{protocol::bits_of(
                   protocol::scale_for(value, protocol::ScaleFormat::kPowerOfTwo).inverse)}
               << 8;
  // NaN by itself: its bits are nobody's business.
#if defined(__CUDA_ARCH__)
  const float of_float8 = ptx::from_e4m3x2(case_idx).x;
#else
  const float of_float8 = protocol::from_e4m3(static_cast<uint8_t>(case_idx));
#endif
  words[14] = of_float8 != of_float8 ? 1 : protocol::bits_of(of_float8);
}

__global__ void evaluate_kernel(const __grid_constant__ protocol::LowLatencyConfig config,
                                uint64_t* words) {
  const uint32_t case_idx = blockIdx.x * blockDim.x + threadIdx.x;
  if (case_idx < kNumCases) evaluate(config, case_idx, words + uint64_t{case_idx} * kNumWords);
}

}  // namespace

int64_t protocol_mismatches(const protocol::LowLatencyConfig& config) {
  std::vector<uint64_t> from_device(uint64_t{kNumCases} * kNumWords);
  const size_t num_bytes = from_device.size() * sizeof(uint64_t);
  uint64_t* device_words = nullptr;
  if (cudaMalloc(&device_words, num_bytes) != cudaSuccess) return -1;
  evaluate_kernel<<<kNumCases / 256, 256>>>(config, device_words);
  const bool copied = cudaMemcpy(from_device.data(), device_words, num_bytes,
                                 cudaMemcpyDeviceToHost) == cudaSuccess;
  cudaFree(device_words);
  if (!copied) return -1;

  int64_t num_mismatches = 0;
  for (uint32_t case_idx = 0; case_idx < kNumCases; ++case_idx) {
    uint64_t expected[kNumWords];
    evaluate(config, case_idx, expected);
    for (uint32_t i = 0; i < kNumWords; ++i) {
      num_mismatches += expected[i] != from_device[uint64_t{case_idx} * kNumWords + i];
    }
  }
  return num_mismatches;
}

}  // namespace ep::cuda
