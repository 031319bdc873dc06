// Programmatic dependent launch (PTX griddepcontrol). Without it both do nothing.
#pragma once

#include <cstdint>

namespace ep::ptx {

// Until all kernels before this one in its stream have ended and their writes are visible. Nothing
// that they write may be touched before.
__device__ inline void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel of the stream may be put on the GPU; it waits there for this one's end.
__device__ inline void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Reads a word of every line of a kernel's parameter, so that it need not be awaited where it is
// used first: launches start with nothing of it in the constant cache. For the time before
// `wait_for_earlier_kernels`.
template <typename Param>
__device__ void touch(const Param& param) {
  constexpr uint32_t kLineWords = 64 / sizeof(uint32_t);
  const auto* words = reinterpret_cast<const uint32_t*>(&param);
  uint32_t all = 0;
#pragma unroll
  for (uint32_t i = 0; i < sizeof(Param) / sizeof(uint32_t); i += kLineWords) all ^= words[i];
  // Something must depend on it, or nothing is read; it hardly ever happens, and does nothing.
  if (all == 0x9e3779b9) asm volatile("nanosleep.u32 0;");
}

}  // namespace ep::ptx
