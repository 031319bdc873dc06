// What the normal kernels have in common: signals and credits, blocks that find together, and where
// rows begin. There is one block an SM.
#pragma once

#include <cstdint>

#include "cuda/normal.h"
#include "cuda/wait.cuh"
#include "ptx/bulk.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"

namespace ep::cuda {

using protocol::kMaxTopK;
using protocol::kNumMaxDeviceRanks;
using protocol::kNumRoundBanks;
using protocol::NormalDeviceLayout;

namespace normal {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

constexpr uint32_t kRoundsInFlight = 4;  // more than blocks of one rank can be apart

// Of a batch whose time is that of messages and launches, not of rows.
constexpr uint32_t kNumFewTokens = 512;

}  // namespace normal

// On the device, so that captured graphs replay.
struct NormalState {
  uint64_t epochs[protocol::kNumPhases];  // operations completed
  uint64_t rounds[protocol::kNumPhases];  // rounds of those
  uint32_t failed;                        // 1: a kernel gave up; later ones end at once
  // Blocks that have arrived, in the middle of a kernel and at its end; in each round, by half.
  uint32_t num_arrived[2];
  uint32_t num_arrived_in_round[protocol::kNumHalves][normal::kRoundsInFlight];
  uint32_t num_meetings;  // barriers of all blocks so far
};

namespace normal {

template <typename T>
__device__ T* at(std::byte* base, uint64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

// The least multiple of 16 that is not below.
__host__ __device__ constexpr uint32_t align_16(uint32_t bytes) { return (bytes + 15) / 16 * 16; }

// True in the block that arrives last, for the whole block, behind all that the others have done;
// others may arrive then again.
__device__ inline bool arrives_last(uint32_t* num_arrived) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = ptx::atom_add_acq_rel_gpu(num_arrived, 1) == gridDim.x - 1;
    if (is_last) *num_arrived = 0;
  }
  __syncthreads();
  return is_last;
}

// Of rows begin .. end - 1, which are in the order of `tokens`, the first whose token is `token` or
// later.
__device__ inline uint32_t first_row(const int32_t* tokens, uint32_t begin, uint32_t end,
                                     uint64_t token) {
  while (begin < end) {
    const uint32_t middle = begin + (end - begin) / 2;
    if (static_cast<uint32_t>(tokens[middle]) < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Until *word >= minimum; returns what was seen last, less than that where the wait was given up.
template <typename View>
__device__ __noinline__ uint64_t wait_for(const View& rank, OpId id, uint32_t peer_rank,
                                          const uint64_t* word, uint64_t minimum,
                                          uint32_t shown_shift) {
  const uint64_t begin_ns = ptx::globaltimer_ns();
  while (true) {
    uint64_t seen;
#pragma unroll 1
    for (uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      seen = ptx::ld_acquire_sys(word);
      if (seen >= minimum) return seen;
    }
    if (!may_wait(rank, id, peer_rank, begin_ns, minimum >> shown_shift, seen >> shown_shift)) {
      return seen;
    }
  }
}

// A block's view of a running operation, the same in all its threads.
class Op {
 public:
  // Whole block; before it, nothing that earlier kernels have written may be read.
  __device__ Op(const NormalView& rank, Phase phase) : rank_(rank), phase_(phase) {
    __shared__ uint64_t epoch, num_rounds;
    __shared__ bool has_failed;
    ptx::wait_for_earlier_kernels();
    if (threadIdx.x == 0) {
      epoch = ptx::ld_relaxed_gpu(&rank.state->epochs[as_idx()]) + 1;
      num_rounds = ptx::ld_relaxed_gpu(&rank.state->rounds[as_idx()]);
      has_failed = ptx::ld_relaxed_gpu(&rank.state->failed) != 0;
    }
    __syncthreads();
    epoch_ = epoch;
    num_rounds_before_ = num_rounds;
    ok_ = !has_failed;
  }

  // False: an earlier kernel has failed.
  __device__ bool ok() const { return ok_; }
  __device__ const NormalView& rank() const { return rank_; }
  __device__ const NormalDeviceLayout& layout() const { return rank_.layout; }
  __device__ uint32_t num_ranks() const { return rank_.layout.config().num_ranks; }
  __device__ uint64_t epoch() const { return epoch_; }
  // Of a round of this operation, counted from 0.
  __device__ uint64_t round_epoch(uint32_t round) const { return num_rounds_before_ + round + 1; }
  __device__ uint32_t bank(uint32_t round) const {
    return protocol::bank_of(round_epoch(round), kNumRoundBanks);
  }
  __device__ std::byte* self() const { return rank_.self_base; }
  __device__ std::byte* peer(uint32_t r) const { return base_of(rank_, r); }
  __device__ OpId id(Half half) const { return {phase_, half, epoch_}; }

  // Waits for: the word of every rank at `offset(rank)` in this rank's memory, of this epoch at
  // least. `seen(rank, word)` looks at each. Whole block. False: end the kernel.
  template <typename Offset, typename Seen>
  __device__ bool wait_for_all(Half half, Offset offset, uint64_t minimum, uint32_t shown_shift,
                               Seen seen) const {
    bool ok = true;
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += blockDim.x) {
      const auto* word = at<uint64_t>(self(), offset(r));
      const uint64_t value = wait_for(rank_, id(half), r, word, minimum, shown_shift);
      ok = value >= minimum && seen(r, value);
    }
    return __syncthreads_and(ok);
  }
  // For words that are epochs and nothing else.
  template <typename Offset>
  __device__ bool wait_for_all(Half half, Offset offset, uint64_t minimum) const {
    return wait_for_all(half, offset, minimum, 0, [](uint32_t, uint64_t) { return true; });
  }

  // Waits for: every rank's word that it has begun this operation. `accept(r, flags)` looks at what
  // it says with it. A rank that has gone on to the next one has done so against the protocol.
  template <typename Accept>
  __device__ bool wait_until_ready(Accept accept) const {
    return wait_for_all(
        Half::kSend, [&](uint32_t r) { return layout().ready(phase_, r); },
        protocol::pack_signal(epoch_, 0), protocol::kEpochShift,
        [&](uint32_t r, uint64_t word) {
          if (protocol::signal_epoch(word) != epoch_) {
            return fail(rank_, id(Half::kSend), Status::kNewerEpoch, r, epoch_,
                        protocol::signal_epoch(word), 0);
          }
          return accept(r, static_cast<uint32_t>(protocol::signal_count(word)));
        });
  }
  // Publishes: to rank `r`, all that this thread knows of, and that this rank has begun.
  __device__ void publish_ready(uint32_t r, uint32_t flags) const {
    ptx::fence_acq_rel_sys();
    ptx::st_relaxed_sys(at<uint64_t>(peer(r), layout().ready(phase_, rank_.self_rank)),
                        protocol::pack_signal(epoch_, flags));
  }
  // Publishes: to every rank, this word at `offset` in its memory, behind all that the blocks which
  // have arrived have written. Whole block.
  template <typename Word>
  __device__ void publish_to_all(uint64_t offset, Word word) const {
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += blockDim.x) {
      ptx::fence_acq_rel_sys();
      ptx::st_relaxed_sys(at<uint64_t>(peer(r), offset), word(r));
    }
  }

  // The stream's next kernel may be put on SMs that are free: what this one has to do is done but
  // for waiting. Where ranks share the GPU, those are for others. Of many tokens a launch is a
  // small part, and on SMs beside those that had the last ones rows left more slowly: two H200s
  // took 207 us for 8192 float8 rows from 24 SMs, and 191 without this.
  __device__ void let_next_start(uint32_t num_tokens) const {
    if (!rank_.shares_gpu && num_tokens <= kNumFewTokens) ptx::let_next_kernel_start();
  }

  // See arrives_last.
  __device__ bool arrive_last() const { return arrives_last(&rank_.state->num_arrived[1]); }
  __device__ bool arrive_in_round(Half half, uint32_t round) const {
    return arrives_last(
        &rank_.state->num_arrived_in_round[static_cast<uint32_t>(half)][round % kRoundsInFlight]);
  }

  // A barrier of all blocks. False: end the kernel.
  __device__ bool meet() const {
    __shared__ bool ok;
    NormalState* state = rank_.state;
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t before = ptx::ld_relaxed_gpu(&state->num_meetings);
      ok = true;
      if (ptx::atom_add_acq_rel_gpu(&state->num_arrived[0], 1) == gridDim.x - 1) {
        state->num_arrived[0] = 0;
        ptx::st_release_gpu(&state->num_meetings, before + 1);
      } else {
        const uint64_t begin_ns = ptx::globaltimer_ns();
        while (ok && ptx::ld_acquire_gpu(&state->num_meetings) == before) {
          ok = may_wait(rank_, id(Half::kSend), rank_.self_rank, begin_ns, epoch_, epoch_ - 1);
        }
      }
    }
    __syncthreads();
    return ok;
  }

  // Ends the operation. The block that arrived last, one thread.
  __device__ void complete(uint32_t num_rounds) const {
    rank_.state->rounds[as_idx()] = num_rounds_before_ + num_rounds;
    rank_.state->epochs[as_idx()] = epoch_;
  }

  __device__ bool corrupt(uint32_t peer_rank, uint64_t expected, uint64_t seen) const {
    return fail(rank_, id(Half::kRecv), Status::kCorrupt, peer_rank, expected, seen, 0);
  }

 private:
  __device__ uint32_t as_idx() const { return static_cast<uint32_t>(phase_); }

  const NormalView& rank_;
  Phase phase_;
  uint64_t epoch_, num_rounds_before_;
  bool ok_;
};

// Where rows begin: in shared memory, from the counts of all ranks.
struct RowRanges {
  uint32_t first_sent[kNumMaxDeviceRanks];          // this rank's first row at each rank
  uint32_t first_received[kNumMaxDeviceRanks + 1];  // each source's first row here; N
  uint32_t num_rows[kNumMaxDeviceRanks];            // that each rank receives
  uint32_t num_tokens[kNumMaxDeviceRanks];          // of each source
  uint32_t most_tokens, most_rows, rank_of_most;

  // `cell(src, 0)`: tokens of a source; `cell(src, 1 + dst)`: its rows for a rank. Whole block: a
  // warp a column, a lane a source or two, so that no cell is awaited behind another.
  template <typename Cell>
  __device__ void find(uint32_t num_ranks, uint32_t self_rank, Cell cell) {
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (uint32_t column = warp; column <= num_ranks; column += blockDim.x / kWarp) {
      const uint32_t low = lane < num_ranks ? cell(lane, column) : 0;
      const uint32_t high = kWarp + lane < num_ranks ? cell(kWarp + lane, column) : 0;
      if (column == 0) {
        num_tokens[lane] = low;
        num_tokens[kWarp + lane] = high;
        continue;
      }
      const uint32_t before = (lane < self_rank ? low : 0) + (kWarp + lane < self_rank ? high : 0);
      first_sent[column - 1] = __reduce_add_sync(kAllLanes, before);
      num_rows[column - 1] = __reduce_add_sync(kAllLanes, low + high);
      if (column - 1 == self_rank) {
        const uint32_t until_low = sum_of_lanes_until(low);
        const uint32_t until_high = sum_of_lanes_until(high);
        first_received[1 + lane] = until_low;
        first_received[1 + kWarp + lane] =
            __shfl_sync(kAllLanes, until_low, kWarp - 1) + until_high;
        if (lane == 0) first_received[0] = 0;
      }
    }
    __syncthreads();
    if (warp == 0) find_most(num_ranks);
    __syncthreads();
  }
  // All rows have room where they belong, at every rank.
  __device__ bool is_direct(const NormalDeviceLayout& layout) const {
    return most_rows <= layout.config().num_rows;
  }
  __device__ uint32_t num_rounds(const NormalDeviceLayout& layout) const {
    const uint32_t per_round = layout.num_tokens_per_round();
    return is_direct(layout) ? 0 : (most_tokens + per_round - 1) / per_round;
  }

 private:
  // Of this lane and those below. Whole warp.
  __device__ static uint32_t sum_of_lanes_until(uint32_t value) {
    for (uint32_t step = 1; step < kWarp; step *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, value, step);
      if (threadIdx.x % kWarp >= step) value += below;
    }
    return value;
  }
  // One warp.
  __device__ void find_most(uint32_t num_ranks) {
    const uint32_t lane = threadIdx.x % kWarp;
    const uint32_t low = lane < num_ranks ? num_rows[lane] : 0;
    const uint32_t high = kWarp + lane < num_ranks ? num_rows[kWarp + lane] : 0;
    const uint32_t rows = __reduce_max_sync(kAllLanes, max(low, high));
    const uint32_t tokens =
        __reduce_max_sync(kAllLanes, max(num_tokens[lane], num_tokens[kWarp + lane]));
    const uint32_t lows = __ballot_sync(kAllLanes, low == rows);
    const uint32_t highs = __ballot_sync(kAllLanes, high == rows);
    if (lane != 0) return;
    most_tokens = tokens;
    most_rows = rows;
    rank_of_most = lows != 0 ? __ffs(lows) - 1 : kWarp + __ffs(highs) - 1;
  }
};
static_assert(kNumMaxDeviceRanks == 2 * kWarp);

__device__ inline uint32_t batch_idx(uint32_t num_ranks, uint32_t src, uint32_t column) {
  return src * (num_ranks + 1) + column;
}

// Copies bytes, a multiple of 4, as whole vectors where both sides allow it. All threads of a group
// that together are `num_threads`, this one the `thread`-th.
__device__ inline void copy_flat(void* dst, const void* src, uint64_t num_bytes, uint64_t thread,
                                 uint64_t num_threads) {
  constexpr uint32_t kUnroll = 8;
  const bool is_aligned =
      ((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src)) & 15) == 0;
  const uint64_t num_vectors = is_aligned ? num_bytes / 16 : 0;
  auto* to = static_cast<uint4*>(dst);
  const auto* from = static_cast<const uint4*>(src);
  uint64_t i = thread;
  for (; i + (kUnroll - 1) * num_threads < num_vectors; i += kUnroll * num_threads) {
    uint4 vectors[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) vectors[u] = ptx::ld_row(from + i + u * num_threads);
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) to[i + u * num_threads] = vectors[u];
  }
  for (; i < num_vectors; i += num_threads) to[i] = ptx::ld_row(from + i);
  for (uint64_t word = num_vectors * 4 + thread; word < num_bytes / 4; word += num_threads) {
    static_cast<uint32_t*>(dst)[word] =
        ptx::ld_relaxed_sys(static_cast<const uint32_t*>(src) + word);
  }
}

// Runs `send(round)` and `receive(round)` of each round on this block, sends one round ahead, with
// what publishes them. `wait_for_credits(round)` comes before a send whose bank has been used in
// this operation. False: end the kernel.
template <typename Send, typename Receive>
__device__ bool run_rounds(const Op& op, Phase phase, uint32_t num_rounds, Send send,
                           Receive receive) {
  const NormalDeviceLayout& layout = op.layout();
  constexpr uint32_t kAhead = kNumRoundBanks - 1;
  for (uint32_t step = 0; step < num_rounds + kAhead; ++step) {
    if (step < num_rounds) {
      // Waits for: every rank to have emptied this bank. At first all are empty.
      if (step >= kNumRoundBanks &&
          !op.wait_for_all(
              Half::kSend, [&](uint32_t r) { return layout.round_credit(phase, r); },
              op.round_epoch(step) - kNumRoundBanks)) {
        return false;
      }
      if (!send(step)) return false;
    }
    if (step >= kAhead) {
      const uint32_t round = step - kAhead;
      if (!receive(round)) return false;
      if (op.arrive_in_round(Half::kRecv, round)) {
        op.publish_to_all(layout.round_credit(phase, op.rank().self_rank),
                          [&](uint32_t) { return op.round_epoch(round); });
      }
    }
  }
  return true;
}

}  // namespace normal
}  // namespace ep::cuda
