// Ranks of several blocks each, as processes that share memory, and the network between them.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>

#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cuda_runtime.h"
#include "nvshmem.h"

thread_local gpu_on_cpu::Dim threadIdx;
gpu_on_cpu::Dim blockIdx, gridDim, blockDim;

namespace gpu_on_cpu {

Block block;

constexpr size_t kPage = 4096;

// Zeroed, for all processes that are started later; behind the last 16 bytes, and before the page
// of the first, any access ends the program.
inline std::byte* guarded_memory(size_t num_bytes) {
  num_bytes = (num_bytes + 15) / 16 * 16;
  const size_t size = (num_bytes + kPage - 1) / kPage * kPage;
  void* memory =
      mmap(nullptr, size + 2 * kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) abort();
  auto* begin = static_cast<std::byte*>(memory);
  mprotect(begin, kPage, PROT_NONE);
  mprotect(begin + kPage + size, kPage, PROT_NONE);
  return begin + kPage + size - num_bytes;
}
template <typename T>
T* shared_array(size_t count) {
  return reinterpret_cast<T*>(guarded_memory(count * sizeof(T)));
}

// The memory of all ranks, where this process sees it.
struct SymmetricMemory {
  std::vector<std::byte*> bases;
  int self_rank;

  template <typename T>
  T* on(T* address, int rank) const {
    const auto* self = bases[self_rank];
    return reinterpret_cast<T*>(bases[rank] + (reinterpret_cast<const std::byte*>(address) - self));
  }
};
inline SymmetricMemory memory;

// What this block has posted. Its thread delivers in any order, now and then late: a payload is
// read when it is delivered, and there before what its put adds.
class Network {
 public:
  explicit Network(uint64_t seed) : random_(seed), thread_([this] { run(); }) {}
  ~Network() {
    {
      std::lock_guard lock(mutex_);
      is_stopping_ = true;
    }
    thread_.join();
  }
  void post(const Put& put) {
    std::lock_guard lock(mutex_);
    posted_.push_back(put);
  }

 private:
  static constexpr uint32_t kMaxDelayUs = 5000;

  void run() {
    while (true) {
      Put put;
      {
        std::lock_guard lock(mutex_);
        if (posted_.empty() && is_stopping_) return;
        if (!posted_.empty()) {
          std::swap(posted_[random_() % posted_.size()], posted_.back());
          put = posted_.back();
          posted_.pop_back();
        } else {
          put.word = nullptr;
        }
      }
      if (put.word == nullptr) {
        usleep(50);
      } else {
        deliver(put);
        if (random_() % 3 == 0) usleep(random_() % kMaxDelayUs);
      }
    }
  }
  static void deliver(const Put& put) {
    if (put.to != nullptr) std::memcpy(put.to, put.from, put.num_bytes);
    if (put.adds) {
      __atomic_fetch_add(put.word, put.value, __ATOMIC_ACQ_REL);
    } else {
      __atomic_store_n(put.word, put.value, __ATOMIC_RELEASE);
    }
  }

  std::mutex mutex_;
  std::vector<Put> posted_;
  bool is_stopping_ = false;
  std::mt19937_64 random_;
  std::thread thread_;
};
inline Network* network = nullptr;

void post(const Put& put, int pe) {
  Put there = put;
  if (put.to != nullptr) there.to = memory.on(static_cast<std::byte*>(put.to), pe);
  there.word = memory.on(put.word, pe);
  network->post(there);
}

// `body(rank)` by every thread of every block of every rank. Returns whether all have ended well.
template <typename Body>
bool run_blocks(const std::vector<std::byte*>& bases, uint32_t num_blocks, uint32_t num_threads,
                uint64_t seed, Body body) {
  std::vector<pid_t> processes;
  for (uint32_t rank = 0; rank < bases.size(); ++rank) {
    auto* grid = shared_array<pthread_barrier_t>(1);
    pthread_barrierattr_t attributes;
    pthread_barrierattr_init(&attributes);
    pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(grid, &attributes, num_blocks * num_threads);
    for (uint32_t b = 0; b < num_blocks; ++b) {
      const pid_t process = fork();
      if (process != 0) {
        processes.push_back(process);
        continue;
      }
      memory = {bases, static_cast<int>(rank)};
      blockIdx.x = b, gridDim.x = num_blocks, blockDim.x = num_threads;
      block.grid = grid;
      pthread_barrier_init(&block.barrier, nullptr, num_threads);
      for (uint32_t w = 0; w < num_threads / kLanes; ++w) {
        pthread_barrier_init(&block.warps[w].barrier, nullptr, kLanes);
      }
      {
        Network own(seed * 1000 + rank * num_blocks + b);
        network = &own;
        std::vector<std::thread> threads;
        for (uint32_t t = 0; t < num_threads; ++t) {
          threads.emplace_back([&body, rank, t] {
            threadIdx.x = t;
            body(rank);
          });
        }
        for (std::thread& thread : threads) thread.join();
      }
      _exit(0);
    }
  }
  bool ok = true;
  for (const pid_t process : processes) {
    int status = 0;
    waitpid(process, &status, 0);
    ok = ok && status == 0;
  }
  return ok;
}

}  // namespace gpu_on_cpu
