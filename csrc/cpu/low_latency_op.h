// What the four kernels have in common: order, waits, signals, credits, counters.
#pragma once

#include "cpu/low_latency.h"

namespace ep::cpu {

// One running operation. Once `ok()` is false every further step is skipped by its caller and
// `result()` says why; only `complete()` advances the epoch.
class LowLatencyRank::Op {
 public:
  // Refuses to start out of order or on a failed buffer.
  Op(LowLatencyRank& rank, protocol::Phase phase, protocol::Half half);

  bool ok() const { return result_.status == Status::kOk; }
  uint64_t epoch() const { return epoch_; }
  uint32_t bank() const { return bank_; }
  protocol::Phase phase() const { return phase_; }
  OpResult result() const { return result_; }

  // Waits for: the credit of every peer for the operation that last used this bank.
  bool wait_for_credits();
  // Waits for: the signal of `src_rank` for this epoch. `*count` is what it carries. One that
  // promises tagged units fails the buffer: these kernels do not read them.
  bool wait_for_signal(uint32_t src_rank, uint64_t* count);
  // The same of any word that `src_rank` writes for this epoch; offsets are in this rank's memory.
  bool wait_for_word(uint32_t src_rank, uint64_t word, uint64_t sleepers, uint64_t* count);
  // Publishes: to `dst_rank`, that all data of this epoch is in its memory.
  void publish_signal(uint32_t dst_rank, uint64_t count);
  // Publishes: to every peer, that this rank has emptied this epoch's bank.
  void publish_credits();

  // For the statistics: rows of so many bytes went to `dst_rank`.
  void count_sent(uint32_t dst_rank, uint64_t num_bytes) {
    rank_.statistics_.add_sent(kind(), dst_rank, num_bytes);
  }

  // The buffer cannot be trusted any more: fails it. Always returns false.
  bool fail(Status status, uint32_t peer_rank, uint64_t expected, uint64_t seen);
  // A mistake in the arguments; the buffer stays usable. Always returns false.
  bool refuse_expert(uint32_t token, uint32_t k, int64_t expert);
  OpResult complete(uint64_t num_rows);

 private:
  uint32_t kind() const { return index(phase_) * protocol::kNumHalves + index(half_); }
  bool waited(Status status, uint32_t peer_rank, uint64_t expected, uint64_t seen);

  LowLatencyRank& rank_;
  protocol::Phase phase_;
  protocol::Half half_;
  uint64_t epoch_;
  uint32_t bank_;
  Deadline deadline_;
  uint64_t counted_wait_ns_ = 0;  // of the deadline's, what some peer has been charged with
  OpResult result_;
};

}  // namespace ep::cpu
