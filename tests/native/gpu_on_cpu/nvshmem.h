// Stands in for NVSHMEM: what is put comes late, and in any order. Only a put's payload is there
// before what it adds to a word.
#pragma once

#include <cstddef>

#include "cuda_runtime.h"

constexpr int NVSHMEM_SIGNAL_ADD = 10;

namespace gpu_on_cpu {

// To the same place in the memory of rank `pe`.
struct Put {
  void* to;  // null: there is only a word
  const void* from;
  size_t num_bytes;
  uint64_t* word;
  uint64_t value;
  bool adds;
};
void post(const Put& put, int pe);

}  // namespace gpu_on_cpu

inline void nvshmem_uint64_p(uint64_t* word, uint64_t value, int pe) {
  gpu_on_cpu::post({nullptr, nullptr, 0, word, value, false}, pe);
}
inline void nvshmemx_signal_op(uint64_t* word, uint64_t value, int, int pe) {
  gpu_on_cpu::post({nullptr, nullptr, 0, word, value, true}, pe);
}
inline void nvshmemx_putmem_signal_nbi_warp(void* to, const void* from, size_t num_bytes,
                                            uint64_t* word, uint64_t value, int, int pe) {
  __syncwarp();
  if (gpu_on_cpu::lane() == 0) gpu_on_cpu::post({to, from, num_bytes, word, value, true}, pe);
  __syncwarp();
}
