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

enum class DType : uint32_t { kFloat32 = 0, kBFloat16 = 1, kFloat8E4M3 = 2 };

EP_HOST_DEVICE constexpr uint64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 ? 2 : 1;
}

// How a float8 row's scales are chosen and handed to the experts; on the wire they are float32.
enum class ScaleFormat : uint32_t {
  kFloat32 = 0,     // amax / 448
  kPowerOfTwo = 1,  // the smallest power of two that is not below it
  kUE8M0 = 2,       // that, as its exponent byte; four bytes a 32-bit word
};

// Where the rows that a token's experts made are weighted and added. kRank: on each rank that owns
// some of them, and one partial row goes home. kSource: at home, where every row goes as it is; the
// weights are wanted at combine only.
enum class Reduction : uint32_t { kRank = 0, kSource = 1 };

// Who moves a row between ranks that can reach each other's memory.
enum class Transfer : uint32_t {
  kPush = 0,      // the sender writes to the receiver's memory: it flies between send and hook
  kPull = 1,      // the sender stages it, the receiver's hook reads it there: fewer bytes written
  kPullPush = 2,  // rows of dispatch are pulled, those of combine pushed
};
EP_HOST_DEVICE constexpr bool pulls_dispatch(Transfer transfer) {
  return transfer != Transfer::kPush;
}
EP_HOST_DEVICE constexpr bool pulls_combine(Transfer transfer) {
  return transfer == Transfer::kPull;
}

EP_HOST_DEVICE constexpr uint64_t align_up(uint64_t bytes, uint64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// One cache line of a GPU's L2 and two of a CPU's: slots never share a line with a neighbour.
constexpr uint64_t kSlotAlign = 128;
// Headers start where no two share half a line.
constexpr uint64_t kHeaderAlign = 64;
// Scales of a row start where 16-byte vectors are aligned.
constexpr uint64_t kScalesAlign = 16;

}  // namespace ep::protocol
