// What the four kernels have in common: order, bounded waits, signals and credits, the last block.
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
  uint64_t epochs[protocol::kNumPhases][protocol::kNumHalves];  // operations completed
  uint32_t failed;  // 1: a kernel gave up; later ones end at once
  uint32_t num_arrived[protocol::kNumPhases][protocol::kNumHalves];  // blocks of a running kernel
};

struct HostReport {
  protocol::OpResult result;
};

template <typename T>
__device__ T* at(std::byte* base, uint64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

// A block's view of a running operation, the same in all its threads.
class Op {
 public:
  __device__ Op(const RankView& rank, Phase phase, Half half)
      : rank_(rank), phase_(phase), half_(half) {
    // One thread asks for the block: these words are not cached near it, and one address of L2
    // answers thousands of warps one after the other (a quarter of a kernel's stalls, H100, ncu).
    __shared__ uint64_t num_sent, num_hooked;
    __shared__ bool has_failed;
    if (threadIdx.x == 0) {
      num_sent = ptx::ld_relaxed_gpu(&rank.state->epochs[index(phase)][index(Half::kSend)]);
      num_hooked = ptx::ld_relaxed_gpu(&rank.state->epochs[index(phase)][index(Half::kRecv)]);
      has_failed = ptx::ld_relaxed_gpu(&rank.state->failed) != 0;
    }
    __syncthreads();
    num_sent_ = num_sent;
    num_hooked_ = num_hooked;
    has_failed_ = has_failed;
    epoch_ = (half == Half::kSend ? num_sent_ : num_hooked_) + 1;
    bank_ = protocol::bank_of(epoch_, rank.layout.config().num_banks);
  }

  __device__ uint64_t epoch() const { return epoch_; }
  __device__ uint32_t bank() const { return bank_; }
  __device__ std::byte* self() const { return rank_.self_base; }
  __device__ std::byte* peer(uint32_t rank) const {
    return rank < kNumNearRanks ? rank_.near_bases[rank] : rank_.bases[rank];
  }

  // Waits for: the credit of every peer for the operation that last used this bank. Whole block.
  // False where the buffer is failed, the order is wrong or a peer does not come: end the kernel.
  __device__ bool start_send() const {
    const uint32_t num_banks = rank_.layout.config().num_banks;
    bool ok = may_start(protocol::may_send(num_sent_, num_hooked_, num_banks));
    const uint64_t expected = epoch_ > num_banks ? epoch_ - num_banks : 0;
    for (uint32_t r = threadIdx.x; r < num_ranks() && ok; r += blockDim.x) {
      const auto* word = at<uint64_t>(self(), rank_.layout.credit(phase_, r));
      uint64_t seen;
      ok = spin_until(word, r, expected, &seen, [&](uint64_t v) { return v >= expected; });
    }
    return __syncthreads_and(ok);
  }

  // Waits for: the signal of every source for this epoch; `counts[r]` is what it carries. Whole
  // block. False as in `start_send`. A replayed graph runs no Python, so both check the order.
  __device__ bool start_recv(uint32_t* counts) const {
    bool ok = may_start(protocol::may_hook(num_sent_, num_hooked_));
    for (uint32_t r = threadIdx.x; r < num_ranks() && ok; r += blockDim.x) {
      const auto* word = at<uint64_t>(self(), rank_.layout.signal(bank_, phase_, r));
      uint64_t seen;
      ok = spin_until(word, r, epoch_, &seen,
                      [&](uint64_t v) { return protocol::signal_epoch(v) >= epoch_; });
      if (ok && protocol::signal_epoch(seen) != epoch_) {
        ok = fail(Status::kNewerEpoch, r, epoch_, protocol::signal_epoch(seen), 0);
      }
      if (ok) counts[r] = static_cast<uint32_t>(protocol::signal_count(seen));
    }
    return __syncthreads_and(ok);
  }

  // True in the block that arrives last, for the whole block: all others have done their work, and
  // what they wrote is ordered before what this block writes after a fence. A block that gave up
  // does not arrive, so nothing is published then.
  __device__ bool is_last_block() const {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t* num_arrived = &rank_.state->num_arrived[index(phase_)][index(half_)];
      is_last = ptx::atom_add_acq_rel_gpu(num_arrived, 1) == gridDim.x - 1;
      if (is_last) *num_arrived = 0;
    }
    __syncthreads();
    return is_last;
  }

  // Publishes: to every peer, `count(r)` messages or rows of this epoch. Last block only.
  template <typename Count>
  __device__ void publish_signals(Count count) const {
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += blockDim.x) {
      const uint64_t signal = protocol::pack_signal(epoch_, count(r));
      ptx::fence_acq_rel_sys();  // in every publishing thread: a release is a fence and its own
                                 // store
      ptx::st_relaxed_sys(
          at<uint64_t>(peer(r), rank_.layout.signal(bank_, phase_, rank_.self_rank)), signal);
    }
    complete();
  }

  // Publishes: to every peer, that this rank has emptied the bank. Last block only.
  __device__ void publish_credits() const {
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += blockDim.x) {
      ptx::fence_acq_rel_sys();
      ptx::st_relaxed_sys(at<uint64_t>(peer(r), rank_.layout.credit(phase_, rank_.self_rank)),
                          epoch_);
    }
    complete();
  }

  // The first failure of the buffer is kept. Always returns false.
  __device__ bool fail(Status status, uint32_t peer_rank, uint64_t expected, uint64_t seen,
                       uint64_t waited_ns) const {
    if (atomicExch(&rank_.state->failed, 1) == 0) {
      protocol::OpResult result;
      result.status = status;
      result.record = {static_cast<int32_t>(rank_.self_rank),
                       static_cast<int32_t>(peer_rank),
                       phase_,
                       half_,
                       epoch_,
                       expected,
                       seen,
                       waited_ns};
      write_report(result);
    }
    return false;
  }
  __device__ bool refuse_expert(uint32_t token, uint32_t k, int64_t expert) const {
    if (atomicExch(&rank_.state->failed, 1) == 0) {
      protocol::OpResult result;
      result.status = Status::kBadExpert;
      result.token = token;
      result.k = k;
      result.expert = expert;
      write_report(result);
    }
    return false;
  }

 private:
  template <typename E>
  __device__ static uint32_t index(E value) {
    return static_cast<uint32_t>(value);
  }
  __device__ uint32_t num_ranks() const { return rank_.layout.config().num_ranks; }
  __device__ bool may_start(bool in_order) const {
    if (has_failed_) return false;
    return in_order || fail(Status::kOutOfOrder, 0, num_sent_, num_hooked_, 0);
  }

  template <typename Arrived>
  __device__ bool spin_until(const uint64_t* word, uint32_t peer_rank, uint64_t expected,
                             uint64_t* seen, Arrived arrived) const {
    *seen = ptx::ld_acquire_sys(word);
    if (arrived(*seen)) return true;
    const uint64_t begin_ns = ptx::globaltimer_ns();
    while (true) {
      // The timer is far slower than the word.
      for (int poll = 0; poll < 64; ++poll) {
        *seen = ptx::ld_acquire_sys(word);
        if (arrived(*seen)) return true;
      }
      const uint64_t waited_ns = ptx::globaltimer_ns() - begin_ns;
      if (waited_ns > rank_.timeout_ns) {
        const uint64_t shown = half_ == Half::kSend ? *seen : protocol::signal_epoch(*seen);
        return fail(Status::kTimeout, peer_rank, expected, shown, waited_ns);
      }
      if (ptx::ld_relaxed_gpu(&rank_.state->failed) != 0) return false;
    }
  }

  __device__ void write_report(const protocol::OpResult& result) const {
    // The host looks at the status alone until it is not kOk: it goes last.
    protocol::OpResult* report = &rank_.report->result;
    const Status status = result.status;
    protocol::OpResult body = result;
    body.status = Status::kOk;
    *report = body;
    __threadfence_system();
    *reinterpret_cast<volatile uint32_t*>(&report->status) = static_cast<uint32_t>(status);
  }

  __device__ void complete() const {
    if (threadIdx.x == 0) rank_.state->epochs[index(phase_)][index(half_)] = epoch_;
  }

  const RankView& rank_;
  Phase phase_;
  Half half_;
  uint64_t num_sent_, num_hooked_;  // when this kernel began
  bool has_failed_;
  uint64_t epoch_;
  uint32_t bank_;
};

// prefix[r] = counts[0] + .. + counts[r - 1], prefix[num_ranks] the sum. Whole block; `counts` may
// be in shared or global memory, `prefix` has num_ranks + 1 entries of shared memory.
__device__ inline void prefix_sum(const uint32_t* counts, uint32_t num_ranks, uint32_t* prefix) {
  if (threadIdx.x < 32) {
    uint32_t before = 0;
    for (uint32_t first = 0; first < num_ranks; first += 32) {
      const uint32_t r = first + threadIdx.x;
      const uint32_t count = r < num_ranks ? counts[r] : 0;
      uint32_t sum = count;
      for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffff, sum, step);
        if (threadIdx.x >= step) sum += other;
      }
      if (r < num_ranks) prefix[r] = before + sum - count;
      before += __shfl_sync(0xffffffff, sum, 31);
    }
    if (threadIdx.x == 0) prefix[num_ranks] = before;
  }
  __syncthreads();
}

// The source of message `m`: the last r with prefix[r] <= m that has messages.
__device__ inline uint32_t source_of(const uint32_t* prefix, uint32_t num_ranks, uint32_t m) {
  uint32_t low = 0, high = num_ranks;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (prefix[middle] <= m) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace ep::cuda
