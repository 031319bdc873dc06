// What the kernels have in common: order, signals and credits, completion, cutting up the work.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/wait.cuh"
#include "ptx/grid.cuh"

namespace ep::cuda {

constexpr uint32_t kWarp = 32;
// Of every block. Two blocks fit an SM: either the next kernel's beside this one's, or two of a
// kernel with much to do (LowLatencyRank::plan).
constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / kWarp;
constexpr uint32_t kBlocksPerSM = 2;
constexpr uint32_t kAllLanes = 0xffffffff;
// No rank is left out.
constexpr uint32_t kNoRank = 0xffffffff;

// The least s with n <= 2^s; 0 for n = 0.
__device__ inline uint32_t ceil_log2(uint32_t n) { return n <= 1 ? 0 : 32 - __clz(n - 1); }

template <typename T>
__device__ T* at(std::byte* base, uint64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

// Whether rows are added up at home, see protocol::Reduction.
template <typename View>
__device__ bool is_source(const View& rank) {
  if constexpr (View::kIsUsual) return View::kIsSource;
  return rank.layout.config().reduction == protocol::Reduction::kSource;
}

// Whether a rank's own batch of so many tokens is tagged.
template <typename View>
__device__ bool is_batch_tagged(const View& rank, uint32_t num_tokens) {
  if (View::kHasNetwork || View::kBatch == Batch::kUntagged) return false;
  return View::kBatch == Batch::kTagged || num_tokens <= rank.layout.config().num_max_tagged_tokens;
}

// Whether what is tagged goes to oneself as to all others even in a kernel that sends and receives:
// another warp takes it from there sooner than this one could.
template <typename View>
__device__ bool sends_to_self(const View& rank, uint32_t num_tokens) {
  if (View::kBatch != Batch::kAny) return View::kBatch == Batch::kTagged;
  return rank.layout.config().num_ranks > 1 && is_batch_tagged(rank, num_tokens);
}

// One warp. Calls `each(i)` for 0 .. n - 1, a lane a number. `kIsUsual`: n is at most a warp's.
template <bool kIsUsual, typename Each>
__device__ void share_lanes(uint32_t n, Each each) {
  uint32_t i = threadIdx.x % kWarp;
  if constexpr (kIsUsual) {
    if (i < n) each(i);
  } else {
    for (; i < n; i += kWarp) each(i);
  }
}

// Of signals: any is right.
struct Always {
  __device__ bool operator()(uint32_t, uint32_t) const { return true; }
};

// A block's view of a running operation, the same in all its threads. `View`: what the kernels of
// a rank are given, RankView, or one derived from it where some peers are reached over a network:
// kHasNetwork, and reaches(), is_peer(), store(), add(), has_arrived(), note_arrived() and
// num_outcome_slots() of it.
template <typename View>
class OpOf {
 public:
  static constexpr bool kHasNetwork = View::kHasNetwork;

  // Begins the kernel: nothing of earlier kernels may be touched before. Whole block. `meanwhile()`
  // runs while the epochs are on their way; it must not wait.
  template <typename Meanwhile>
  __device__ OpOf(const View& rank, Phase phase, bool sends, bool receives, Meanwhile meanwhile)
      : rank_(rank), phase_(phase), half_(sends ? Half::kSend : Half::kRecv), receives_(receives) {
    ptx::wait_for_earlier_kernels();
    // Ranks on one GPU wait for each other. Two kernels of each fit there together, and there are
    // no more than two, because the next one starts only now.
    if (rank.next_starts == NextStarts::kAtOnce) ptx::let_next_kernel_start();
    // One thread asks for the block: these words are not cached near it, and one address of L2
    // answers thousands of warps one after the other (a quarter of a kernel's stalls, H100, ncu).
    // For all before it stores the first, or each would be awaited before the next is asked for.
    __shared__ uint64_t num_sent, num_hooked, num_hooked_of_other;
    __shared__ bool has_failed;
    if (threadIdx.x == 0) {
      const uint64_t sent = ptx::ld_relaxed_gpu(progress(Half::kSend));
      const uint64_t hooked = ptx::ld_relaxed_gpu(progress(Half::kRecv));
      const uint64_t hooked_of_other =
          gives_other_credit() ? ptx::ld_relaxed_gpu(progress(other_phase(), Half::kRecv)) : 0;
      const uint32_t failed = ptx::ld_relaxed_gpu(&rank.state->failed);
      num_sent = sent >> kProgressShift;
      num_hooked = hooked >> kProgressShift;
      num_hooked_of_other = hooked_of_other >> kProgressShift;
      has_failed = failed != 0;
    }
    // Relaxed, because nothing is read behind a credit, and no store goes ahead of the load that
    // lets it. (An acquire would hold up the loads behind it.)
    if (sends && threadIdx.x < num_ranks()) {
      credit_ = ptx::ld_relaxed_sys(credit_word(threadIdx.x));
    }
    meanwhile();
    __syncthreads();
    num_sent_ = num_sent;
    num_hooked_ = num_hooked;
    num_hooked_of_other_ = num_hooked_of_other;
    has_failed_ = has_failed;
    epoch_ = (sends ? num_sent_ : num_hooked_) + 1;
    const uint32_t num_banks = rank.layout.config().num_banks;
    bank_ = (num_banks & (num_banks - 1)) == 0 ? static_cast<uint32_t>(epoch_) & (num_banks - 1)
                                               : protocol::bank_of(epoch_, num_banks);
  }

  __device__ uint64_t epoch() const { return epoch_; }
  __device__ uint32_t tag() const { return static_cast<uint32_t>(epoch_); }
  __device__ uint32_t bank() const { return bank_; }
  __device__ std::byte* self() const { return rank_.self_base; }
  __device__ std::byte* peer(uint32_t r) const {
    return View::kIsUsual ? rank_.near_bases[r] : base_of(rank_, r);
  }
  // Whether this GPU reads and writes the memory of rank `r` itself.
  __device__ bool reaches(uint32_t r) const {
    if constexpr (kHasNetwork) return rank_.reaches(r);
    return true;
  }
  // Whether credits are exchanged with rank `r`.
  __device__ bool is_peer(uint32_t r) const {
    if constexpr (kHasNetwork) return rank_.is_peer(r);
    return true;
  }
  __device__ OpId receiving() const { return {phase_, Half::kRecv, epoch_}; }

  // Gives every peer this rank's credit for what it has received, then waits for: the credit of
  // every peer for the operation that last used this bank. (This rank's own hook of it has ended:
  // that is the order.) Whole block. False where the buffer is failed, the order is wrong, a peer
  // does not come, or a thread is not `ok`: end the kernel. `wait_for_more()`: waits on each thread
  // for what else this send needs.
  template <typename Wait>
  __device__ bool start_send(bool ok, Wait wait_for_more) const {
    const uint32_t num_banks = rank_.layout.config().num_banks;
    const bool in_order = receives_ ? num_sent_ == num_hooked_
                                    : protocol::may_send(num_sent_, num_hooked_, num_banks);
    ok = may_start(in_order) && ok;
    const uint64_t expected = epoch_ > num_banks ? epoch_ - num_banks : 0;
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < num_ranks() && ok; r += blockDim.x) {
      if (r == rank_.self_rank || !is_peer(r)) continue;
      // Over a network every hook gives its own, once.
      if (!kHasNetwork && blockIdx.x == 0) {
        publish_credit(r, phase_, num_hooked_);
        if (gives_other_credit()) publish_credit(r, other_phase(), num_hooked_of_other_);
      }
      if (r == threadIdx.x && credit_ >= expected) continue;
      const OpId id = {phase_, Half::kSend, epoch_};
      ok = wait_for_word(rank_, id, r, credit_word(r), expected, 0, blockIdx.x == 0) >= expected;
    }
    return __syncthreads_and(ok && wait_for_more());
  }
  __device__ bool start_send(bool ok) const {
    return start_send(ok, [] { return true; });
  }

  // Waits for the signal of every source but `skip_rank` for this epoch; `sources[r]`, where
  // wanted, is what it carries, {is_tagged 1, count 15}; `skipped()` is that of skip_rank.
  // `is_right(r, it)`: whether to go on; else it has said why not. Whole block, a barrier behind
  // it. False, on some threads, as in `start_send`. A replayed graph runs no Python, so both check
  // the order.
  template <typename Skipped, typename IsRight = Always>
  __device__ bool start_recv(uint32_t skip_rank, uint32_t* sources, Skipped skipped,
                             bool speaks = blockIdx.x == 0, IsRight is_right = {}) const {
    bool ok = may_receive();
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < num_ranks() && ok; r += blockDim.x) {
      if (r == skip_rank) {
        if (sources != nullptr) sources[r] = skipped();
        continue;
      }
      const auto* word = at<uint64_t>(self(), rank_.layout.signal(bank_, phase_, r));
      uint32_t source;
      ok = take_signal(word, r, speaks, &source);
      if constexpr (kHasNetwork) {
        // The signal may be here before what it tells of.
        if (!rank_.reaches(r)) {
          ok = ok &&
               rank_.has_arrived(receiving(), bank_, r, protocol::signal_count(source), speaks);
        }
      }
      ok = ok && is_right(r, source);
      if (ok && sources != nullptr) sources[r] = source;
    }
    return ok;
  }
  // The same where rows say themselves that they are there: one warp waits for signals. False, on
  // some lanes, as in `start_send`.
  template <typename Skipped, typename IsRight = Always>
  __device__ bool take_signals(uint32_t skip_rank, uint32_t* sources, Skipped skipped,
                               IsRight is_right = {}) const {
    bool ok = true;
#pragma unroll 1
    for (uint32_t r = threadIdx.x % kWarp; r < num_ranks() && ok; r += kWarp) {
      uint32_t source;
      if (r == skip_rank) {
        source = skipped();
      } else {
        const auto* word = at<uint64_t>(self(), rank_.layout.signal(bank_, phase_, r));
        ok = take_signal(word, r, true, &source) && is_right(r, source);
      }
      if (sources != nullptr) sources[r] = source;
    }
    __syncwarp();
    return ok;
  }
  // Whether a hook may go on: the order is right, and the buffer has not failed.
  __device__ bool may_receive() const {
    return may_start(half_ == Half::kSend || protocol::may_hook(num_sent_, num_hooked_));
  }
  // Waits for a signal of this epoch at `word`, which rank `writer` writes; `*source` is what it
  // carries. False as in `start_send`.
  __device__ bool take_signal(const uint64_t* word, uint32_t writer, bool speaks,
                              uint32_t* source) const {
    const uint64_t minimum = protocol::pack_signal(epoch_, 0);
    uint64_t seen = ptx::ld_acquire_sys(word);
    if (seen < minimum) {
      seen =
          wait_for_word(rank_, receiving(), writer, word, minimum, protocol::kEpochShift, speaks);
    }
    bool ok = seen >= minimum;
    if (protocol::signal_epoch(seen) > epoch_) {
      ok = fail(rank_, receiving(), Status::kNewerEpoch, writer, epoch_,
                protocol::signal_epoch(seen), 0);
    }
    const auto& config = rank_.layout.config();
    const uint32_t most = protocol::signal_is_tagged(seen) ? config.num_max_tagged_tokens
                                                           : config.num_max_tokens_per_rank;
    if (ok && protocol::signal_count(seen) > most) {
      ok = corrupt(writer, most, protocol::signal_count(seen));
    }
    *source = static_cast<uint32_t>(protocol::signal_low_bits(seen));
    return ok;
  }

  // Waits for a word of counts, {epoch, count}, which has no signal behind it. That wait is not
  // counted: others wait for the source's signal meanwhile.
  __device__ bool read_count(const uint64_t* word, uint32_t src_rank, uint32_t* count) const {
    const uint64_t minimum = protocol::pack_signal(epoch_, 0);
    uint64_t seen = ptx::ld_relaxed_sys(word);
    if (seen < minimum) {
      seen =
          wait_for_word(rank_, receiving(), src_rank, word, minimum, protocol::kEpochShift, false);
    }
    *count = static_cast<uint32_t>(protocol::signal_count(seen));
    return seen >= minimum;
  }

  // `word`: what was seen at `address`. Waits until it is of this epoch.
  __device__ bool have_tag(const uint4* address, uint32_t src_rank, uint4* word) const {
    if (word->w != tag()) *word = wait_for_tag(rank_, receiving(), src_rank, address);
    return word->w == tag();
  }

  // True in the block that arrives last, for the whole block: all others have written their rows,
  // ordered before what this block writes after a fence. A block that gave up does not arrive, so
  // nothing is published then.
  __device__ bool is_last_block() const {
    __shared__ bool is_last;
    __syncthreads();
    if (gridDim.x == 1) return true;
    if (threadIdx.x == 0) {
      uint32_t* num_arrived = &rank_.state->num_arrived[static_cast<uint32_t>(phase_)];
      is_last = ptx::atom_add_acq_rel_gpu(num_arrived, 1) == gridDim.x - 1;
      if (is_last) *num_arrived = 0;
    }
    __syncthreads();
    return is_last;
  }

  // On one thread a block: whether all others have come here. Of what they have written that says
  // nothing.
  __device__ bool is_last_to_come() const {
    uint32_t* num_arrived = &rank_.state->num_arrived[static_cast<uint32_t>(phase_)];
    const bool is_last = ptx::atom_add_relaxed_gpu(num_arrived, 1) == gridDim.x - 1;
    if (is_last) *num_arrived = 0;
    return is_last;
  }

  // Whether this block does what one block does for all: the last one has the fewest items.
  __device__ static bool is_clerk() { return blockIdx.x == gridDim.x - 1; }
  // The same of a warp, for what needs no more: its last.
  __device__ static bool is_clerk_warp() { return is_clerk() && threadIdx.x / kWarp == kWarps - 1; }

  // Who sees a word that is written behind it sees the rows before it. In every thread that writes
  // such a word: a release is a fence and its own store. Ranks that share a GPU need less, which
  // is much cheaper: of 8 on an H200 a pair of 16 tokens in workspaces took 13.5 us rank-major
  // instead of 16.0, by expert 18.9 instead of 21.4, and of 128 tokens 58.6 and 82.5, not 60.1 and
  // 84.0.
  __device__ void fence() const {
    if (!kHasNetwork && rank_.shares_gpu) {
      ptx::fence_acq_rel_gpu();
    } else {
      ptx::fence_acq_rel_sys();
    }
  }

  // To rank `r`: this epoch and {is_tagged, count}. Whoever publishes untagged rows fences first.
  __device__ void publish_signal(uint32_t r, uint32_t source) const {
    const uint64_t word = rank_.layout.signal(bank_, phase_, rank_.self_rank);
    const uint64_t value = protocol::pack_signal(epoch_, source);
    if constexpr (kHasNetwork) {
      if (!rank_.reaches(r)) return rank_.store(word, value, r);
    }
    ptx::st_relaxed_sys(at<uint64_t>(peer(r), word), value);
  }

  // To rank `r`: what dispatch `epoch` has brought to the workspace has been read.
  __device__ void publish_workspace_credit(uint32_t r, uint32_t workspace, uint64_t epoch) const {
    auto* word = at<uint64_t>(peer(r), rank_.layout.workspace_credit(workspace, rank_.self_rank));
    ptx::st_relaxed_sys(word, epoch);
  }

  // Ends the kernel for this block, whose threads all say whether they are done. The block that
  // completes a hook of its own gives every peer its credit: by then every block has used what it
  // has read. A kernel that has sent, too, leaves that to the next one that sends: it need not stay
  // until its stores have reached the peers. `speaks_for_all`: the others end without a word.
  // `makes_blanks`: before peers have the credit, what it has written must be there; after a kernel
  // that has sent, too, the next one gives it when this one has ended.
  __device__ void complete(bool ok, bool speaks_for_all = false, bool makes_blanks = false) const {
    if (rank_.next_starts == NextStarts::kAsWarpsEnd) ptx::let_next_kernel_start();
    if (!__syncthreads_and(ok) || threadIdx.x >= kWarp) return;
    const uint32_t share = speaks_for_all ? kProgressPerOp : this->share();
    bool is_last = false;
    if (threadIdx.x == 0) {
      if (makes_blanks && half_ == Half::kRecv) ptx::fence_acq_rel_gpu();
      if (half_ == Half::kSend) {
        ptx::red_add_relaxed_gpu(progress(Half::kSend), share);
        if (receives_) ptx::red_add_relaxed_gpu(progress(Half::kRecv), share);
      } else if (speaks_for_all || num_ranks() == 1) {
        ptx::red_add_relaxed_gpu(progress(Half::kRecv), share);
        is_last = speaks_for_all;
      } else {
        const uint64_t before = ptx::atom_add_relaxed_gpu(progress(Half::kRecv), share);
        is_last = (before + share) >> kProgressShift == epoch_;
      }
    }
    if (!__shfl_sync(kAllLanes, is_last, 0)) return;
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += kWarp) {
      if (r != rank_.self_rank && is_peer(r)) publish_credit(r, phase_, epoch_);
    }
  }

  // To all peers: the rows of this block are in their workspaces, or, tagged, those of all blocks
  // say so themselves. Whole block, untagged a barrier before it.
  template <bool kTagged>
  __device__ void publish_arrivals() const {
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += blockDim.x) {
      if (r == rank_.self_rank) continue;
      if (!kTagged) fence();
      auto* word = at<uint64_t>(peer(r), rank_.layout.workspace_arrivals(rank_.self_rank));
      ptx::red_add_relaxed_sys(word, kTagged ? kProgressPerOp : share());
    }
  }
  // Waits until all that peers have sent is in this rank's workspace. False on threads that gave
  // up.
  __device__ bool wait_for_arrivals() const {
    const uint64_t minimum = epoch_ << kProgressShift;
    bool ok = true;
    // From the last thread on: the first ones may be waiting for signals.
#pragma unroll 1
    for (uint32_t r = blockDim.x - 1 - threadIdx.x; r < num_ranks() && ok; r += blockDim.x) {
      if (r == rank_.self_rank) continue;
      const auto* word = at<uint64_t>(self(), rank_.layout.workspace_arrivals(r));
      if (ptx::ld_acquire_sys(word) >= minimum) continue;
      ok = wait_for_word(rank_, receiving(), r, word, minimum, kProgressShift, true) >= minimum;
    }
    return ok;
  }
  __device__ bool corrupt(uint32_t src_rank, uint64_t expected, uint64_t seen) const {
    return fail(rank_, receiving(), Status::kCorrupt, src_rank, expected, seen, 0);
  }

 private:
  __device__ uint32_t num_ranks() const { return rank_.layout.config().num_ranks; }
  // Of the operation's progress: this block's.
  __device__ uint32_t share() const { return blockIdx.x == 0 ? rank_.first_share : rank_.share; }
  __device__ Phase other_phase() const {
    return phase_ == Phase::kDispatch ? Phase::kCombine : Phase::kDispatch;
  }
  // A combine's send gives dispatch's credits, too. A dispatch does not give combine's: in another
  // stream, a kernel that has made blanks may have counted itself before they are there.
  __device__ bool gives_other_credit() const {
    return half_ == Half::kSend && phase_ == Phase::kCombine;
  }
  __device__ uint64_t* progress(Phase phase, Half half) const {
    return &rank_.state->progress[static_cast<uint32_t>(phase)][static_cast<uint32_t>(half)];
  }
  __device__ uint64_t* progress(Half half) const { return progress(phase_, half); }
  __device__ void publish_credit(uint32_t r, Phase phase, uint64_t epoch) const {
    const uint64_t word = rank_.layout.credit(phase, rank_.self_rank);
    if constexpr (kHasNetwork) {
      if (!rank_.reaches(r)) {
        rank_.note_arrived(bank_, phase, r);
        return rank_.add(word, 1, r);
      }
    }
    ptx::st_relaxed_sys(at<uint64_t>(peer(r), word), epoch);
  }
  __device__ const uint64_t* credit_word(uint32_t r) const {
    return at<uint64_t>(self(), rank_.layout.credit(phase_, r));
  }
  __device__ bool may_start(bool in_order) const {
    if (has_failed_) return false;
    const OpId id = {phase_, half_, epoch_};
    return in_order || fail(rank_, id, Status::kOutOfOrder, 0, num_sent_, num_hooked_, 0);
  }

  const View& rank_;
  Phase phase_;
  Half half_;  // kSend also where the kernel sends and receives
  bool receives_;
  uint64_t credit_ = 0;             // of rank threadIdx.x, seen at the kernel's beginning
  uint64_t num_sent_, num_hooked_;  // when this kernel began
  uint64_t num_hooked_of_other_;    // the other phase's; where this kernel sends
  bool has_failed_;
  uint64_t epoch_;
  uint32_t bank_;
};
using Op = OpOf<RankView>;

// How a kernel's work is cut: every row into 2^n runs of parts, a warp each, enough of them to keep
// all warps of the grid busy and no more. (The last run of a row may be empty.)
class Items {
 public:
  // `num_taken`: items of other work that the first warps do just before, so that this begins with
  // the others. `block`: this one's number among the `num_blocks` that share the rows.
  __device__ Items(uint32_t num_rows, uint32_t num_parts, uint32_t num_taken = 0,
                   uint32_t block = blockIdx.x, uint32_t num_blocks = gridDim.x)
      : num_parts_(num_parts) {
    step_ = num_blocks * kWarps;
    const int wanted = static_cast<int>(ceil_log2(step_)) - floor_log2(max(num_rows, 1));
    shift_ = static_cast<uint32_t>(min(max(wanted, 0), static_cast<int>(ceil_log2(num_parts))));
    parts_per_item_ = (num_parts + (1u << shift_) - 1) >> shift_;
    end_ = num_rows << shift_;
    // Neighbouring items on different SMs.
    item_ = threadIdx.x / kWarp * num_blocks + block;
    if (num_taken < step_)
      item_ = item_ < num_taken ? item_ + step_ - num_taken : item_ - num_taken;
    skip_empty();
  }
  __device__ uint32_t size() const { return end_; }
  // The item of this warp, while there is one.
  __device__ bool more() const { return item_ < end_; }
  __device__ uint32_t row() const { return item_ >> shift_; }
  __device__ uint32_t first_part() const {
    return (item_ & ((1u << shift_) - 1)) * parts_per_item_;
  }
  __device__ uint32_t end_part() const { return min(first_part() + parts_per_item_, num_parts_); }
  __device__ void next() {
    item_ += step_;
    skip_empty();
  }

 private:
  __device__ static int floor_log2(uint32_t n) { return 31 - __clz(n); }
  __device__ void skip_empty() {
#pragma unroll 1
    while (item_ < end_ && first_part() >= num_parts_) item_ += step_;
  }
  uint32_t num_parts_, step_, shift_, parts_per_item_, end_, item_;
};

// The same where a block does a row, its warps some parts each, and all come to its end together:
// somebody sends the row then. So a warp may have no parts.
class BlockItems {
 public:
  __device__ BlockItems(uint32_t num_rows, uint32_t num_parts) : end_(num_rows), row_(blockIdx.x) {
    const uint32_t parts_per_warp = (num_parts + kWarps - 1) / kWarps;
    first_part_ = threadIdx.x / kWarp * parts_per_warp;
    end_part_ = min(first_part_ + parts_per_warp, num_parts);
  }
  __device__ bool more() const { return row_ < end_; }
  __device__ uint32_t row() const { return row_; }
  __device__ uint32_t first_part() const { return first_part_; }
  __device__ uint32_t end_part() const { return end_part_; }
  __device__ void next() { row_ += gridDim.x; }
  __device__ uint32_t size() const { return end_ * kWarps; }

 private:
  uint32_t end_, row_, first_part_, end_part_;
};

// How the rows that a rank sends are cut.
template <typename View>
using SendItems = std::conditional_t<View::kHasNetwork, BlockItems, Items>;

// prefix[r] = count(0) + .. + count(r - 1), prefix[num_ranks] the sum. Whole block, a barrier
// behind it; `prefix` has num_ranks + 1 entries of shared memory.
template <typename Count>
__device__ void prefix_sum(uint32_t num_ranks, uint32_t* prefix, Count count) {
  if (threadIdx.x >= kWarp) return;
  uint32_t before = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < num_ranks; first += kWarp) {
    const uint32_t r = first + threadIdx.x;
    const uint32_t own = r < num_ranks ? count(r) : 0;
    uint32_t sum = own;
#pragma unroll 1
    for (uint32_t step = 1; step < kWarp && first + step < num_ranks; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (threadIdx.x >= step) sum += other;
    }
    if (r < num_ranks) prefix[r] = before + sum - own;
    before += __shfl_sync(kAllLanes, sum, min(num_ranks - first, kWarp) - 1);
  }
  if (threadIdx.x == 0) prefix[num_ranks] = before;
}

// Rows of local experts from each source, [R + 1][L], become those from the sources before it, and
// behind them all. A thread an expert, the `thread`-th of the block's first.
__device__ inline void count_up_rows(uint32_t* rows, uint32_t num_ranks, uint32_t num_local,
                                     uint32_t thread) {
#pragma unroll 1
  for (uint32_t e = thread; e < num_local; e += kThreads) {
    uint32_t* of_source = rows + e;
    uint32_t sum = 0;
#pragma unroll 4
    for (uint32_t r = 0; r < num_ranks; ++r, of_source += num_local) {
      const uint32_t count = *of_source;
      *of_source = sum;
      sum += count;
    }
    *of_source = sum;
  }
}

// What peers may have in a workspace, or this rank for them: slot by slot, of each the next rank's
// first, and so on, so that ranks do not all begin with the same peer. `with_self`: this rank has
// slots, too.
class PeerSlots {
 public:
  struct Slot {
    uint32_t rank, slot;
  };
  template <typename View>
  __device__ explicit PeerSlots(const View& rank, bool with_self = false)
      : self_rank_(rank.self_rank),
        last_rank_(rank.layout.config().num_ranks - 1),
        num_peers_(last_rank_ + (with_self ? 1 : 0)) {}
  // `num_slots`: of each of them.
  __device__ uint32_t size(uint32_t num_slots) const { return num_peers_ * num_slots; }
  __device__ Slot operator[](uint32_t i) const {
    const uint32_t slot = num_peers_ > 1 ? i / num_peers_ : i;
    const uint32_t r = self_rank_ + 1 + i - slot * num_peers_;
    return {r <= last_rank_ ? r : r - last_rank_ - 1, slot};
  }

 private:
  uint32_t self_rank_, last_rank_, num_peers_;
};

// In shared memory: how many messages this rank has from each source, and so whose message is
// which.
//
//   words   [R]      of each, {is_tagged 1, count 15}
//   prefix  [R + 1]  messages of the sources before
struct Sources {
  uint32_t *words, *prefix;
  uint32_t num_ranks;

  __device__ Sources(uint32_t* shared, uint32_t num_ranks)
      : words(shared), prefix(shared + num_ranks), num_ranks(num_ranks) {}
  __host__ __device__ static uint32_t num_words(uint32_t num_ranks) { return 2 * num_ranks + 1; }

  // The words of a handle. Whole block, a barrier behind it.
  __device__ void read(const uint32_t* num_messages) const {
    for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) words[r] = num_messages[r];
  }
  // From the words. Whole block, a barrier behind it.
  __device__ void count_up() const {
    prefix_sum(num_ranks, prefix, [&](uint32_t r) { return count(r); });
  }
  __device__ uint32_t count(uint32_t r) const {
    return words[r] & static_cast<uint32_t>(protocol::kMaxCount);
  }
  __device__ bool is_tagged(uint32_t r) const { return (words[r] & protocol::kTaggedBit) != 0; }
  // Whether usual kernels may take it for granted that they are tagged; where a rank's batch is,
  // its peers' are, too, as a rule. Whole warp.
  template <typename View>
  __device__ bool are_all_tagged() const {
    if (!View::kIsUsual || View::kBatch == Batch::kUntagged) return false;
    const uint32_t lane = threadIdx.x % kWarp;
    return __all_sync(kAllLanes, lane >= num_ranks || is_tagged(lane));
  }
};

// The messages of all sources but one, or of all: those of the sources behind it move up.
struct OtherMessages {
  uint32_t begin, num_skipped, size;

  __device__ OtherMessages(const Sources& sources, uint32_t skip_rank)
      : begin(skip_rank == kNoRank ? 0 : sources.prefix[skip_rank]),
        num_skipped(skip_rank == kNoRank ? 0 : sources.count(skip_rank)),
        size(sources.prefix[sources.num_ranks] - num_skipped) {}
  // The number that the i-th of them has among all.
  __device__ uint32_t operator[](uint32_t i) const { return i < begin ? i : i + num_skipped; }
};

// The source of message `m`: the last r with prefix[r] <= m that has messages.
__device__ inline uint32_t source_of(const uint32_t* prefix, uint32_t num_ranks, uint32_t m) {
  uint32_t low = 0, high = num_ranks;
#pragma unroll 1
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
