// Bounded waits for words that peers write, and what is reported when they do not come.
//
// The slow paths are functions of their own, called with plain values: inlined at every wait they
// would make most of a kernel's instructions. A `View` is what the kernels of a family are given
// (RankView, NormalView); it has `self_rank`, `state->failed`, `report`, `timeout_ns`, and the
// bases of the peers.
#pragma once

#include <cstdint>

#include "cuda/low_latency.h"
#include "ptx/memory.cuh"

namespace ep::cuda {

using protocol::Half;
using protocol::LowLatencyLayout;
using protocol::Phase;
using protocol::Status;

// On the device, so that captured graphs replay.
struct RankState {
  // Operations completed, in units of 1 / kProgressPerOp: every block of a kernel adds its share as
  // it ends, and the sum crosses a whole number with the last one. So no block waits for another.
  uint64_t progress[protocol::kNumPhases][protocol::kNumHalves];
  uint32_t failed;                             // 1: a kernel gave up; later ones end at once
  uint32_t num_arrived[protocol::kNumPhases];  // blocks of a running send whose rows are written
};
constexpr uint32_t kProgressShift = protocol::kArrivalsShift;  // arrivals are told by its shares
constexpr uint32_t kProgressPerOp = 1u << kProgressShift;

struct HostReport {
  protocol::OpResult result;
};

// On the host: what kernels have reported so far.
inline protocol::OpResult read_report(const HostReport& report) {
  const auto* status = reinterpret_cast<const volatile uint32_t*>(&report.result.status);
  if (*status == static_cast<uint32_t>(Status::kOk)) return {};
  __sync_synchronize();  // the status is written last
  return report.result;
}

// Which operation a wait belongs to.
struct OpId {
  Phase phase;
  Half half;
  uint64_t epoch;
};

// Where this GPU sees the memory of rank `r`.
template <typename View>
__device__ std::byte* base_of(const View& rank, uint32_t r) {
  return r < kNumNearRanks ? rank.near_bases[r] : rank.bases[r];
}

template <typename View>
__device__ inline void write_report(const View& rank, const protocol::OpResult& result) {
  // The host looks at the status alone until it is not kOk: it goes last.
  protocol::OpResult* report = &rank.report->result;
  protocol::OpResult body = result;
  body.status = Status::kOk;
  *report = body;
  __threadfence_system();
  *reinterpret_cast<volatile uint32_t*>(&report->status) = static_cast<uint32_t>(result.status);
}

// The first failure of the buffer is kept. Always returns false.
template <typename View>
__device__ __noinline__ bool fail(const View& rank, OpId id, Status status, uint32_t peer_rank,
                                  uint64_t expected, uint64_t seen, uint64_t waited_ns) {
  if (atomicExch(&rank.state->failed, 1) == 0) {
    protocol::OpResult result;
    result.status = status;
    result.record = {static_cast<int32_t>(rank.self_rank),
                     static_cast<int32_t>(peer_rank),
                     id.phase,
                     id.half,
                     id.epoch,
                     expected,
                     seen,
                     waited_ns};
    write_report(rank, result);
  }
  return false;
}

template <typename View>
__device__ __noinline__ bool refuse_expert(const View& rank, uint32_t token, uint32_t k,
                                           int64_t expert) {
  if (atomicExch(&rank.state->failed, 1) == 0) {
    protocol::OpResult result;
    result.status = Status::kBadExpert;
    result.token = token;
    result.k = k;
    result.expert = expert;
    write_report(rank, result);
  }
  return false;
}

// A wait that began at `begin_ns` may go on. False: it has lasted too long, which is reported, or
// the buffer has failed.
template <typename View>
__device__ inline bool may_wait(const View& rank, OpId id, uint32_t peer_rank, uint64_t begin_ns,
                                uint64_t expected, uint64_t seen) {
  const uint64_t waited_ns = ptx::globaltimer_ns() - begin_ns;
  if (waited_ns > rank.timeout_ns) {
    return fail(rank, id, Status::kTimeout, peer_rank, expected, seen, waited_ns);
  }
  return ptx::ld_relaxed_gpu(&rank.state->failed) == 0;
}

// The timer is far slower than the words.
constexpr uint32_t kPollsPerLook = 64;

__device__ inline void count_wait(const RankView& rank, OpId id, uint32_t peer_rank,
                                  uint64_t waited_ns) {
  const uint32_t row =
      static_cast<uint32_t>(id.phase) * protocol::kNumHalves + static_cast<uint32_t>(id.half);
  ptx::red_add_relaxed_gpu(rank.wait_ns + row * rank.layout.config().num_ranks + peer_rank,
                           waited_ns);
}

// Until *word >= minimum; returns what was seen last, less than that where the wait was given up.
// A signal's or count's epoch is shown without its low `shown_shift` bits. `speaks`: this block's
// waiting time is counted; that of others, which wait for the same word, is not.
__device__ __noinline__ inline uint64_t wait_for_word(const RankView& rank, OpId id,
                                                      uint32_t peer_rank, const uint64_t* word,
                                                      uint64_t minimum, uint32_t shown_shift,
                                                      bool speaks) {
  const uint64_t begin_ns = ptx::globaltimer_ns();
  while (true) {
    uint64_t seen;
#pragma unroll 1
    for (uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      seen = ptx::ld_acquire_sys(word);
      if (seen >= minimum) break;
    }
    if (seen >= minimum) {
      if (speaks) count_wait(rank, id, peer_rank, ptx::globaltimer_ns() - begin_ns);
      return seen;
    }
    if (!may_wait(rank, id, peer_rank, begin_ns, minimum >> shown_shift, seen >> shown_shift)) {
      return seen;
    }
  }
}

// Until the word's tag is the epoch's; returns the word, with another tag where the wait was given
// up.
__device__ __noinline__ inline uint4 wait_for_tag(const RankView& rank, OpId id, uint32_t peer_rank,
                                                  const uint4* address) {
  const auto tag = static_cast<uint32_t>(id.epoch);
  const uint64_t begin_ns = ptx::globaltimer_ns();
  while (true) {
    uint4 word;
#pragma unroll 1
    for (uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      word = ptx::ld_relaxed_sys_b128(address);
      if (word.w == tag) return word;
    }
    if (!may_wait(rank, id, peer_rank, begin_ns, tag, word.w)) return word;
  }
}

// Until the word is no blank; false where the wait was given up.
__device__ __noinline__ inline bool wait_for_filling(const RankView& rank, OpId id,
                                                     uint32_t peer_rank, const uint4* address) {
  const uint64_t begin_ns = ptx::globaltimer_ns();
  while (true) {
#pragma unroll 1
    for (uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      if (ptx::ld_relaxed_sys_b128(address).w != 0) return true;
    }
    if (!may_wait(rank, id, peer_rank, begin_ns, id.epoch, 0)) return false;
  }
}

}  // namespace ep::cuda
