// Words every room shares: host/device marker, phases, payload types, alignment.
// Headers in this folder do no I/O, allocate nothing and compile for the CPU and for CUDA devices.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE
#endif

namespace ep::protocol {

// The two exchanges of an MoE layer. Each has its own epochs, signals and credits.
enum class Phase : uint32_t { kDispatch = 0, kCombine = 1 };
constexpr uint32_t kNumPhases = 2;

// An operation is a send and, later, a hook that receives.
enum class Half : uint32_t { kSend = 0, kRecv = 1 };
constexpr uint32_t kNumHalves = 2;

enum class DType : uint32_t { kFloat32 = 0, kBFloat16 = 1 };

EP_HOST_DEVICE constexpr uint64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

EP_HOST_DEVICE constexpr uint64_t align_up(uint64_t bytes, uint64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// One cache line of a GPU's L2 and two of a CPU's: slots never share a line with a neighbour.
constexpr uint64_t kSlotAlign = 128;
// Payloads start where the widest CPU vector store is aligned.
constexpr uint64_t kPayloadAlign = 64;

}  // namespace ep::protocol
