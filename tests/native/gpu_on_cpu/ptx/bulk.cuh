// As csrc/ptx/bulk.cuh. What is asked for is done at once, or as late as it may be: loads when
// somebody waits for them, stores in two steps, read and written, at the waits for those. Addresses
// and sizes that are not multiples of 16 end the program.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <vector>

#include "cuda_runtime.h"

namespace gpu_on_cpu {

struct Copy {
  void* to;
  const void* from;
  uint32_t num_bytes;
  uint64_t* barrier;
  bool is_committed, is_read;
  std::vector<std::byte> bytes;
};
// Of a block; of a thread.
inline std::vector<Copy> loads, stores[kMaxThreads];

inline bool is_done_at_once() { return rand() / 64 % 2 == 0; }
inline void check_aligned(const void* a, const void* b, uint32_t num_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | num_bytes;
  if (bits % 16 != 0) __builtin_trap();
}
// A barrier: phases that have ended, in its low half; bytes that this one waits for, in the high.
inline void finish_load(const Copy& load) {
  std::memcpy(load.to, load.from, load.num_bytes);
  *load.barrier -= uint64_t{load.num_bytes} << 32;
  if (*load.barrier >> 32 == 0) ++*load.barrier;
}
inline void read_store(Copy& store) {
  if (store.is_read) return;
  store.is_read = true;
  const auto* from = static_cast<const std::byte*>(store.from);
  store.bytes.assign(from, from + store.num_bytes);
}

}  // namespace gpu_on_cpu

namespace ep::ptx {

inline void fence_proxy_async() {}
inline void fence_proxy_async_shared() {}

inline void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals) {
  if (num_arrivals != 1) __builtin_trap();
  *barrier = 0;
}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t num_bytes) {
  *barrier += uint64_t{num_bytes} << 32;
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  using gpu_on_cpu::loads;
  while (true) {
    for (size_t i = loads.size(); i-- > 0;) {
      if (loads[i].barrier != barrier) continue;
      finish_load(loads[i]);
      loads.erase(loads.begin() + static_cast<ptrdiff_t>(i));
    }
    if ((*barrier & 1) != parity) return;
    gpu_on_cpu::poll();
  }
}
inline void bulk_load(void* shared, const void* global, uint32_t num_bytes, uint64_t* barrier) {
  gpu_on_cpu::check_aligned(shared, global, num_bytes);
  const gpu_on_cpu::Copy load = {shared, global, num_bytes, barrier, true, false, {}};
  if (gpu_on_cpu::is_done_at_once()) {
    finish_load(load);
  } else {
    gpu_on_cpu::loads.push_back(load);
  }
}
inline void bulk_store(void* global, const void* shared, uint32_t num_bytes) {
  gpu_on_cpu::check_aligned(global, shared, num_bytes);
  if (gpu_on_cpu::is_done_at_once()) {
    std::memcpy(global, shared, num_bytes);
  } else {
    gpu_on_cpu::stores[threadIdx.x].push_back(
        {global, shared, num_bytes, nullptr, false, false, {}});
  }
}
inline void bulk_commit() {
  for (auto& store : gpu_on_cpu::stores[threadIdx.x]) store.is_committed = true;
}
inline void bulk_wait_read() {
  for (auto& store : gpu_on_cpu::stores[threadIdx.x]) {
    if (store.is_committed) read_store(store);
  }
}
inline void bulk_wait_written() {
  bulk_wait_read();
  for (auto& store : gpu_on_cpu::stores[threadIdx.x]) {
    if (store.is_committed) std::memcpy(store.to, store.bytes.data(), store.num_bytes);
  }
  gpu_on_cpu::stores[threadIdx.x].clear();
}

}  // namespace ep::ptx
