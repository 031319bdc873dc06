#include "cpu/wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <ctime>

#include "cpu/atomics.h"
#include "protocol/signals.h"

namespace ep::cpu {
namespace {

// How long one sleep may last before the deadline and pending Python signals are looked at again.
constexpr uint64_t kSleepSliceNs = 100'000'000;
// Reads of the word between two reads of the clock, and two offers of the core, while spinning.
constexpr int kPollsPerClockRead = 16;

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the futex watches the low half of a 64-bit word at the word's own address");

// Not FUTEX_PRIVATE: the word is shared between processes.
void futex_wait(uint64_t* word, uint64_t seen, uint64_t timeout_ns) {
  timespec timeout{static_cast<time_t>(timeout_ns / 1'000'000'000),
                   static_cast<long>(timeout_ns % 1'000'000'000)};
  syscall(SYS_futex, word, FUTEX_WAIT, static_cast<uint32_t>(seen), &timeout, nullptr, 0);
}

void futex_wake_all(uint64_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

Status Deadline::wait_until(uint64_t* word, bool (*arrived)(uint64_t, uint64_t), uint64_t expected,
                            uint32_t* sleepers, uint64_t* seen) {
  *seen = ld_acquire(word);
  if (arrived(*seen, expected)) return Status::kOk;

  if (policy_.idle != nullptr) {
    while (!arrived(*seen, expected)) {
      policy_.idle();
      *seen = ld_acquire(word);
    }
    return Status::kOk;
  }
  const uint64_t wait_begin_ns = now_ns();
  const uint64_t spin_ns = std::min(policy_.spin_ns, policy_.timeout_ns);
  while (now_ns() - wait_begin_ns < spin_ns) {
    for (int poll = 0; poll < kPollsPerClockRead; ++poll) {
      cpu_pause();
      *seen = ld_acquire(word);
      if (arrived(*seen, expected)) {
        waited_ns_ += now_ns() - wait_begin_ns;
        return Status::kOk;
      }
    }
    // The writer may be waiting for this very core. A pair of 1 token on 2 ranks: 236 us without
    // this, 45 us with it, where the scheduler put both on one core; the same where it did not
    // (`bench op`, EPYC 9004 VM).
    sched_yield();
  }
  add_seq_cst(sleepers, uint32_t{1});
  Status status = sleep_until(word, arrived, expected, seen);
  add_seq_cst(sleepers, ~uint32_t{0});
  waited_ns_ += now_ns() - wait_begin_ns;
  return status;
}

Status Deadline::sleep_until(uint64_t* word, bool (*arrived)(uint64_t, uint64_t), uint64_t expected,
                             uint64_t* seen) {
  while (true) {
    *seen = ld_seq_cst(word);
    if (arrived(*seen, expected)) return Status::kOk;
    const uint64_t elapsed_ns = this->elapsed_ns();
    if (elapsed_ns >= policy_.timeout_ns) return Status::kTimeout;
    if (policy_.interrupted != nullptr && policy_.interrupted()) return Status::kInterrupted;
    const uint64_t left_ns = policy_.timeout_ns - elapsed_ns;
    futex_wait(word, *seen, left_ns < kSleepSliceNs ? left_ns : kSleepSliceNs);
  }
}

void publish(uint64_t* word, uint64_t value, uint32_t* sleepers) {
  st_seq_cst(word, value);
  if (ld_seq_cst(sleepers) != 0) futex_wake_all(word);
}

bool signal_arrived(uint64_t seen, uint64_t expected_epoch) {
  return protocol::signal_epoch(seen) >= expected_epoch;
}

bool credit_arrived(uint64_t seen, uint64_t expected_credit) { return seen >= expected_credit; }

}  // namespace ep::cpu
