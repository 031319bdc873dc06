// Bounded waits on a 64-bit word that another process writes: spin briefly, then sleep in a futex.
//
// Sleeping and waking, in the order that loses no wake-up (all sequentially consistent):
//   waiter     sleepers += 1;  reads the word;  sleeps if it has not changed
//   publisher  writes the word;  reads sleepers;  wakes if it is not 0
// Whichever comes second sees the other. The futex compares the low 32 bits of the word, which
// change with every epoch (epoch in a credit; epoch mod 2^16 and count in a signal).
#pragma once

#include <cstdint>

#include "protocol/op.h"

namespace ep::cpu {

using protocol::Status;

struct WaitPolicy {
  uint64_t timeout_ns;
  uint64_t spin_ns;       // 0: sleep at once (more ranks than cores)
  bool (*interrupted)();  // asked about ten times a second while asleep; may be null
  // In place of polling and sleeping, where one thread runs all ranks by turns: runs the others
  // for a while. Such waits have no deadline: `idle` knows when nobody can go on.
  void (*idle)() = nullptr;
};

uint64_t now_ns();

// One operation's budget of time, started with the operation.
class Deadline {
 public:
  explicit Deadline(const WaitPolicy& policy) : policy_(policy), begin_ns_(now_ns()) {}

  uint64_t begin_ns() const { return begin_ns_; }
  uint64_t elapsed_ns() const { return now_ns() - begin_ns_; }
  // Total time inside wait_until, for the counters.
  uint64_t waited_ns() const { return waited_ns_; }

  // Waits for: `word` to satisfy `arrived(word, expected)`. Its writer calls publish() on it.
  // `sleepers` counts the threads asleep on the word. Returns kOk, kTimeout or kInterrupted;
  // `*seen` is the last value read.
  Status wait_until(uint64_t* word, bool (*arrived)(uint64_t seen, uint64_t expected),
                    uint64_t expected, uint32_t* sleepers, uint64_t* seen);

 private:
  Status sleep_until(uint64_t* word, bool (*arrived)(uint64_t, uint64_t), uint64_t expected,
                     uint64_t* seen);

  const WaitPolicy& policy_;
  uint64_t begin_ns_;
  uint64_t waited_ns_ = 0;
};

// For wait_until: of a signal, whose expected value is an epoch (a newer one ends the wait, as an
// error), and of a credit.
bool signal_arrived(uint64_t seen, uint64_t expected_epoch);
bool credit_arrived(uint64_t seen, uint64_t expected_credit);

// Publishes: `value`, and everything this thread wrote before, to whoever waits on `word`.
void publish(uint64_t* word, uint64_t value, uint32_t* sleepers);

}  // namespace ep::cpu
