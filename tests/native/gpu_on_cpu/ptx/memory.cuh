// As csrc/ptx/memory.cuh. Vectors that are not aligned end the program, as they do a kernel.
#pragma once

#include <cstdlib>

#include "cuda_runtime.h"

namespace ep::ptx {

template <typename T>
T load(const T* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline uint4 load_vector(const uint4* vector) {
  if (reinterpret_cast<uintptr_t>(vector) % sizeof *vector != 0) __builtin_trap();
  return *vector;
}
// One access of 16 bytes.
typedef uint32_t WholeVector __attribute__((vector_size(16), may_alias));

// Waits poll with these, and with that of a vector.
inline uint64_t ld_acquire_sys(const uint64_t* word) {
  gpu_on_cpu::poll();
  return load(word);
}
inline uint32_t ld_acquire_gpu(const uint32_t* word) {
  gpu_on_cpu::poll();
  return load(word);
}
inline uint64_t ld_relaxed_sys(const uint64_t* word) { return load(word); }
inline uint32_t ld_relaxed_sys(const uint32_t* word) { return load(word); }
inline uint64_t ld_relaxed_gpu(const uint64_t* word) { return load(word); }
inline uint32_t ld_relaxed_gpu(const uint32_t* word) { return load(word); }
inline void st_release_gpu(uint32_t* word, uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
template <typename T>
void st_relaxed_gpu(T* word, T value) {
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
}
inline void st_relaxed_sys(uint64_t* word, uint64_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
inline uint4 ld_relaxed_sys_b128(const uint4* word) {
  if (rand() % 4 == 0) gpu_on_cpu::poll();
  const WholeVector v = *reinterpret_cast<const volatile WholeVector*>(word);
  return {v[0], v[1], v[2], v[3]};
}
inline void st_relaxed_sys_b128(uint4* word, uint4 value) {
  gpu_on_cpu::be_late(64, 300);
  *reinterpret_cast<volatile WholeVector*>(word) = WholeVector{value.x, value.y, value.z, value.w};
}
inline uint4 ld_row(const uint4* vector) { return load_vector(vector); }
inline uint4 ld_once(const uint4* vector) { return load_vector(vector); }
inline void prefetch_l1(const void*) {}
inline uint32_t atom_add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}
inline uint64_t atom_add_relaxed_gpu(uint64_t* word, uint64_t value) {
  return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
inline uint32_t atom_add_relaxed_gpu(uint32_t* word, uint32_t value) {
  return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
inline void red_add_relaxed_gpu(uint64_t* word, uint64_t value) {
  __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
inline void red_add_relaxed_sys(uint64_t* word, uint64_t value) {
  __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
inline void fence_acq_rel_gpu() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint64_t globaltimer_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace ep::ptx
