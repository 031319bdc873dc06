// Stands in for CUDA, so that kernels run on a CPU: a block is a process, and what __shared__
// declares is the process's. Its threads run in turns, in any order, each until it waits: for the
// others at a barrier, where lanes of a warp meet too, or for a word. Memory is as coherent as the
// CPU's: bugs of order are found where threads, blocks, ranks or the network come too early, not
// where a fence is missing.
#pragma once

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __noinline__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

namespace gpu_on_cpu {

constexpr uint32_t kLanes = 32, kMaxThreads = 1024;

struct Dim {
  uint32_t x;
};
struct Barrier {
  uint32_t num_threads, num_arrived, num_meetings;
};
struct Warp {
  Barrier barrier;
  uint64_t values[kLanes];
};
// Of this process's block.
struct Block {
  Barrier barrier;
  pthread_barrier_t* grid;  // shared by all blocks of the rank
  int votes[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
};
extern Block block;

// Let other threads of the block run: until all are at the barrier; or for a moment, because this
// one polls.
void meet(Barrier& barrier);
void poll();
// Once in so many calls, hold all threads of the block up: others, which then are early, must wait.
void be_late(uint32_t once_in, uint32_t max_us);

}  // namespace gpu_on_cpu

extern gpu_on_cpu::Dim threadIdx, blockIdx, gridDim, blockDim;

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
using cudaStream_t = void*;

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// --- blocks and warps ----------------------------------------------------------------------------

inline void __syncthreads() { gpu_on_cpu::meet(gpu_on_cpu::block.barrier); }
inline bool __syncthreads_and(int predicate) {
  int* votes = gpu_on_cpu::block.votes;
  votes[threadIdx.x] = predicate != 0;
  __syncthreads();
  bool all = true;
  for (uint32_t i = 0; i < blockDim.x; ++i) all &= votes[i] != 0;
  __syncthreads();
  return all;
}

namespace gpu_on_cpu {

inline Warp& warp() { return block.warps[threadIdx.x / kLanes]; }
inline uint32_t lane() { return threadIdx.x % kLanes; }
inline void meet() { meet(warp().barrier); }

// Calls `use(values of all lanes)` between two barriers.
template <typename T, typename Use>
auto exchange(const T& value, Use use) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  warp().values[lane()] = bits;
  meet();
  const auto result = use(warp().values);
  meet();
  return result;
}
template <typename T>
T from_lane(const T& value, uint32_t src) {
  return exchange(value, [src](const uint64_t* values) {
    T out;
    std::memcpy(&out, &values[src % kLanes], sizeof out);
    return out;
  });
}

// All blocks of the rank.
inline void meet_all() {
  __syncthreads();
  if (threadIdx.x == 0) pthread_barrier_wait(block.grid);
  __syncthreads();
}

}  // namespace gpu_on_cpu

inline void __syncwarp(uint32_t = ~0u) { gpu_on_cpu::meet(); }
template <typename T>
T __shfl_sync(uint32_t, T value, uint32_t src, uint32_t width = gpu_on_cpu::kLanes) {
  return gpu_on_cpu::from_lane(value, gpu_on_cpu::lane() / width * width + src % width);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, uint32_t mask) {
  return gpu_on_cpu::from_lane(value, gpu_on_cpu::lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, uint32_t delta) {
  const uint32_t lane = gpu_on_cpu::lane();
  return gpu_on_cpu::from_lane(value, lane >= delta ? lane - delta : lane);
}
inline uint32_t __ballot_sync(uint32_t, int predicate) {
  return gpu_on_cpu::exchange(static_cast<uint32_t>(predicate != 0), [](const uint64_t* values) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < gpu_on_cpu::kLanes; ++i) bits |= static_cast<uint32_t>(values[i]) << i;
    return bits;
  });
}
inline bool __all_sync(uint32_t mask, int predicate) {
  return ~__ballot_sync(mask, predicate) == 0;
}
inline bool __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
  return gpu_on_cpu::exchange(value, [value](const uint64_t* values) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < gpu_on_cpu::kLanes; ++i) {
      bits |= static_cast<uint32_t>(values[i] == value) << i;
    }
    return bits;
  });
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  return gpu_on_cpu::exchange(value, [](const uint64_t* values) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < gpu_on_cpu::kLanes; ++i) sum += static_cast<uint32_t>(values[i]);
    return sum;
  });
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  return gpu_on_cpu::exchange(value, [](const uint64_t* values) {
    return static_cast<uint32_t>(*std::min_element(values, values + gpu_on_cpu::kLanes));
  });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return gpu_on_cpu::exchange(value, [](const uint64_t* values) {
    return static_cast<uint32_t>(*std::max_element(values, values + gpu_on_cpu::kLanes));
  });
}

// --- words ---------------------------------------------------------------------------------------

template <typename T, typename U>
T atomicAdd(T* word, U value) {
  return __atomic_fetch_add(word, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <typename T, typename U>
T atomicOr(T* word, U value) {
  return __atomic_fetch_or(word, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <typename T, typename U>
T atomicExch(T* word, U value) {
  return __atomic_exchange_n(word, static_cast<T>(value), __ATOMIC_SEQ_CST);
}
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline int __popcll(uint64_t word) { return __builtin_popcountll(word); }
inline int __ffs(uint32_t word) { return __builtin_ffs(static_cast<int>(word)); }
inline int __clz(uint32_t word) { return word == 0 ? 32 : __builtin_clz(word); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
