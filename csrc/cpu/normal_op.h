// What the three normal kernels have in common: rounds, waits, signals, credits.
#pragma once

#include "cpu/normal.h"

namespace ep::cpu {

// One running call. Once `ok()` is false every further step is skipped by its caller and `result()`
// says why; only `complete()` advances the epoch.
class NormalRank::Op {
 public:
  // Refuses to start on a failed buffer.
  Op(NormalRank& rank, NormalCall call);

  bool ok() const { return result_.status == Status::kOk; }
  protocol::OpResult result() const { return result_; }
  // Of a round of this call, counted from 0.
  uint64_t epoch(uint64_t round) const { return first_epoch_ + round; }
  protocol::Phase phase() const { return phase_; }
  uint32_t bank(uint64_t round) const {
    return protocol::bank_of(epoch(round), protocol::kNumRoundBanks);
  }

  // Waits for: every peer to have emptied all that this rank has sent, in either phase. Memory that
  // belongs to no bank, or to both phases, is free then.
  bool wait_until_emptied();
  // Runs `send(round)` and `receive(round)` of each round. Sends are a round ahead, so that rows
  // fly while others are unpacked. Credits are waited for before a send, and given after a receive.
  template <typename Send, typename Receive>
  bool run_rounds(uint64_t num_rounds, Send send, Receive receive);

  // Waits for: the signal of `src_rank` for this round. `*count` is what it carries, a flag above
  // the count included: where none is expected, no count is as large.
  bool wait_for_signal(uint64_t round, uint32_t src_rank, uint64_t* count);
  // The same of any word that `writer` writes for this round; offsets are in this rank's memory.
  bool wait_for_word(uint64_t round, uint32_t writer, uint64_t word, uint64_t sleepers,
                     uint64_t* count);
  // Publishes: to `dst_rank`, that all data of this round is in its memory.
  void publish_signal(uint64_t round, uint32_t dst_rank, uint64_t count);
  // Publishes: to every peer, that this rank has emptied this round's bank.
  void publish_credits(uint64_t round);

  // For the statistics: rows of so many bytes went to `dst_rank`.
  void count_sent(uint32_t dst_rank, uint64_t num_bytes) {
    rank_.statistics_.add_sent(kind(), dst_rank, num_bytes);
  }

  // Memory that contradicts its signal: fails the buffer. Always returns false.
  bool fail_corrupt(uint64_t round, uint32_t peer_rank, uint64_t expected, uint64_t seen);
  // A mistake in the arguments; the buffer stays usable. Always returns false.
  bool refuse_expert(uint64_t token, uint32_t k, int64_t expert);
  protocol::OpResult complete(uint64_t num_rounds, uint64_t num_rows);

 private:
  uint32_t kind() const { return static_cast<uint32_t>(call_); }
  bool wait_for_credits(uint64_t epoch, protocol::Phase phase, uint64_t emptied);
  bool wait_for(uint32_t peer_rank, uint64_t word, uint64_t sleepers,
                bool (*arrived)(uint64_t, uint64_t), uint64_t expected, uint64_t* seen);
  bool fail(Status status, protocol::Half half, uint64_t epoch, uint32_t peer_rank,
            uint64_t expected, uint64_t seen);

  NormalRank& rank_;
  NormalCall call_;
  protocol::Phase phase_;
  uint64_t begin_ns_;
  uint64_t first_epoch_;
  protocol::OpResult result_;
};

// Every rank gives weights, or none does: a signal of combine says what its sender thought.
inline uint64_t weights_bit(const protocol::NormalCombineParams& params) {
  return params.has_topk_weights ? protocol::kTaggedBit : 0;
}

template <typename Send, typename Receive>
bool NormalRank::Op::run_rounds(uint64_t num_rounds, Send send, Receive receive) {
  constexpr uint64_t kAhead = protocol::kNumRoundBanks - 1;
  for (uint64_t step = 0; step < num_rounds + kAhead; ++step) {
    if (step < num_rounds) {
      const uint64_t epoch = this->epoch(step);
      const bool is_bank_new = epoch <= protocol::kNumRoundBanks;
      const uint64_t emptied = is_bank_new ? 0 : epoch - protocol::kNumRoundBanks;
      if (!wait_for_credits(epoch, phase_, emptied)) return false;
      send(step);
    }
    if (step >= kAhead) {
      if (!receive(step - kAhead)) return false;
      publish_credits(step - kAhead);
    }
  }
  return true;
}

}  // namespace ep::cpu
