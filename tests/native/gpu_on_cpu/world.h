// Ranks of several blocks each, as processes that share memory, and the network between them.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "nvshmem.h"

gpu_on_cpu::Dim threadIdx, blockIdx, gridDim, blockDim;

namespace gpu_on_cpu {

Block block;

constexpr size_t kPage = 4096;
constexpr uint32_t kMaxSecs = 60;  // of a block: others of its rank may have been ended by a signal

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
    has_news_.notify_one();
    thread_.join();
  }
  void post(const Put& put) {
    {
      std::lock_guard lock(mutex_);
      posted_.push_back(put);
    }
    has_news_.notify_one();
  }

 private:
  static constexpr uint32_t kMaxDelayUs = 5000;

  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      has_news_.wait(lock, [this] { return is_stopping_ || !posted_.empty(); });
      if (posted_.empty()) return;
      std::swap(posted_[random_() % posted_.size()], posted_.back());
      const Put put = posted_.back();
      posted_.pop_back();
      lock.unlock();
      deliver(put);
      if (random_() % 3 == 0) usleep(random_() % kMaxDelayUs);
      lock.lock();
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
  std::condition_variable has_news_;
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

// The threads of a block, in turns.
class Turns {
 public:
  Turns(uint32_t num_threads, std::function<void()> body, uint64_t seed)
      : body_(std::move(body)), threads_(num_threads), random_(seed) {}

  void run() {
    std::vector<uint32_t> order(threads_.size());
    for (uint32_t t = 0; t < order.size(); ++t) {
      order[t] = t;
      threads_[t].stack.resize(kStackBytes);
      getcontext(&threads_[t].context);
      threads_[t].context.uc_stack.ss_sp = threads_[t].stack.data();
      threads_[t].context.uc_stack.ss_size = kStackBytes;
      threads_[t].context.uc_link = &others_;
      makecontext(&threads_[t].context, &run_one, 0);
    }
    while (!order.empty()) {
      std::shuffle(order.begin(), order.end(), random_);
      bool all_poll = true, has_run = false;
      for (const uint32_t t : order) {
        Thread& thread = threads_[t];
        if (thread.barrier != nullptr && thread.barrier->num_meetings == thread.meeting) continue;
        thread.barrier = nullptr, thread.polls = false, has_run = true;
        threadIdx.x = t;
        swapcontext(&others_, &thread.context);
        all_poll = all_poll && thread.polls;
      }
      order.erase(std::remove_if(order.begin(), order.end(),
                                 [this](uint32_t t) { return threads_[t].has_ended; }),
                  order.end());
      if (!has_run) abort();  // they wait at different barriers
      if (all_poll) usleep(100);
    }
  }
  void meet(Barrier& barrier) {
    Thread& self = threads_[threadIdx.x];
    if (++barrier.num_arrived == barrier.num_threads) {
      barrier.num_arrived = 0;
      ++barrier.num_meetings;
      return;
    }
    self.barrier = &barrier, self.meeting = barrier.num_meetings;
    swapcontext(&self.context, &others_);
  }
  void poll() {
    Thread& self = threads_[threadIdx.x];
    self.polls = true;
    swapcontext(&self.context, &others_);
  }

 private:
  static constexpr size_t kStackBytes = 1 << 18;

  struct Thread {
    ucontext_t context;
    std::vector<std::byte> stack;
    const Barrier* barrier = nullptr;  // where it waits
    uint32_t meeting = 0;
    bool polls = false, has_ended = false;
  };
  static void run_one();

  std::function<void()> body_;
  std::vector<Thread> threads_;
  ucontext_t others_;
  std::mt19937_64 random_;
};
inline Turns* turns = nullptr;

inline void Turns::run_one() {
  turns->body_();
  turns->threads_[threadIdx.x].has_ended = true;
}
void meet(Barrier& barrier) { turns->meet(barrier); }
void poll() { turns->poll(); }
void be_late(uint32_t once_in, uint32_t max_us) {
  if (static_cast<uint32_t>(rand()) / 64 % once_in != 0) return;
  usleep(static_cast<uint32_t>(rand()) % max_us);
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
    pthread_barrier_init(grid, &attributes, num_blocks);
    for (uint32_t b = 0; b < num_blocks; ++b) {
      const pid_t process = fork();
      if (process != 0) {
        processes.push_back(process);
        continue;
      }
      alarm(kMaxSecs);
      const uint64_t own_seed = seed * 1000 + rank * num_blocks + b;
      srand(static_cast<unsigned>(own_seed));
      memory = {bases, static_cast<int>(rank)};
      blockIdx.x = b, gridDim.x = num_blocks, blockDim.x = num_threads;
      block.grid = grid;
      block.barrier.num_threads = num_threads;
      for (uint32_t w = 0; w < num_threads / kLanes; ++w) {
        block.warps[w].barrier.num_threads = kLanes;
      }
      {
        Network own(own_seed);
        network = &own;
        Turns own_turns(num_threads, [&body, rank] { body(rank); }, own_seed);
        turns = &own_turns;
        own_turns.run();
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
