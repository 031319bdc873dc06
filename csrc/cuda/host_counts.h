// What a dispatch of exact sizes tells the host, and how the host waits for it.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <thread>

#include "cuda/check.h"
#include "protocol/op.h"

namespace ep::cuda {

// Pinned. Behind it `uint32_t[L]`: rows that list each local expert.
struct HostCounts {
  uint64_t ticket;      // of the call that this belongs to; written last
  uint64_t num_rows;    // N
  uint32_t num_rounds;  // I of the largest batch
  uint32_t is_direct;   // every rank has room for all its rows

  const uint32_t* experts() const { return reinterpret_cast<const uint32_t*>(this + 1); }
};

inline HostCounts* allocate_host_counts(uint32_t num_local_experts) {
  HostCounts* counts = nullptr;
  check(cudaHostAlloc(&counts, sizeof(HostCounts) + num_local_experts * sizeof(uint32_t),
                      cudaHostAllocMapped),
        "allocating a rank's counts");
  *counts = {};
  return counts;
}

// Waits for: the counts of the call with this ticket, which has been launched, or its failure,
// which `report()` tells. The kernel bounds its own waits, but what is ahead of it in the stream
// may take any time: `is_interrupted` is asked now and then; not often, as that takes Python's
// lock, which other threads may keep for milliseconds. Throws std::runtime_error where the device
// has failed.
template <typename Report>
protocol::OpResult wait_for_counts(const HostCounts& counts, uint64_t ticket, void* stream,
                                   bool (*is_interrupted)(), Report report) {
  using protocol::Status;
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kBetweenQuestions(50);
  constexpr uint32_t kNumPolls = 1 << 14;
  Clock::time_point next_question = Clock::now() + kBetweenQuestions;
  const volatile uint64_t* word = &counts.ticket;
  while (true) {
    for (uint32_t poll = 0; poll < kNumPolls; ++poll) {
      if (*word == ticket) {
        __sync_synchronize();  // the ticket is written last
        return {};
      }
    }
    const protocol::OpResult result = report();
    if (result.status != Status::kOk) return result;
    const cudaError_t error = cudaStreamQuery(static_cast<cudaStream_t>(stream));
    if (error != cudaErrorNotReady) {
      check(error, "waiting for the counts of a dispatch");
      if (*word != ticket && report().status == Status::kOk) {
        throw std::runtime_error("a dispatch has ended without its counts");
      }
      continue;
    }
    if (Clock::now() >= next_question) {
      if (is_interrupted()) {
        protocol::OpResult interrupted;
        interrupted.status = Status::kInterrupted;
        return interrupted;
      }
      next_question = Clock::now() + kBetweenQuestions;
    }
    std::this_thread::yield();
  }
}

}  // namespace ep::cuda
