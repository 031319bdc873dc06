// Ranks by turns in one thread, and a network between them: a seed decides everything.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/network.h"
#include "stress_rank.h"

namespace stress {

constexpr size_t kStackBytes = 256 << 10;
// After so many turns of ranks in which nothing was delivered and nobody ended, nobody can go on.
constexpr uint64_t kMaxTurns = 100'000;

// Ranks as coroutines; a wait gives the turn back.
class Scheduler {
 public:
  Scheduler(uint64_t seed, cpu::Network& network) : random_(mix(seed)), network_(network) {}

  void add(std::function<void()> main) {
    auto coroutine = std::make_unique<Coroutine>();
    coroutine->main = std::move(main);
    coroutine->stack.resize(kStackBytes);
    getcontext(&coroutine->context);
    coroutine->context.uc_stack.ss_sp = coroutine->stack.data();
    coroutine->context.uc_stack.ss_size = kStackBytes;
    coroutine->context.uc_link = &context_;
    makecontext(&coroutine->context, &Scheduler::enter, 0);
    coroutines_.push_back(std::move(coroutine));
  }

  // False: all that are left wait for each other.
  bool run() {
    running = this;
    // Networks from slow to fast.
    const uint64_t deliveries_in_16 = 1 + mix(random_) % 15;
    for (uint64_t num_turns = 0; num_turns < kMaxTurns && !coroutines_.empty();) {
      random_ = mix(random_);
      if (random_ % 16 < deliveries_in_16 && network_.deliver_one()) {
        num_turns = 0;
        continue;
      }
      const size_t chosen = (random_ >> 8) % coroutines_.size();
      current_ = coroutines_[chosen].get();
      swapcontext(&context_, &current_->context);
      ++num_turns;
      if (current_->is_done) {
        coroutines_.erase(coroutines_.begin() + static_cast<std::ptrdiff_t>(chosen));
        num_turns = 0;
      }
    }
    return coroutines_.empty();
  }

  // Of the rank that waits.
  static void wait() { swapcontext(&running->current_->context, &running->context_); }

 private:
  struct Coroutine {
    std::function<void()> main;
    std::vector<std::byte> stack;
    ucontext_t context;
    bool is_done = false;
  };

  static void enter() {
    Coroutine* self = running->current_;
    self->main();
    self->is_done = true;
  }

  static inline Scheduler* running = nullptr;

  uint64_t random_;
  cpu::Network& network_;
  std::vector<std::unique_ptr<Coroutine>> coroutines_;
  Coroutine* current_ = nullptr;
  ucontext_t context_;
};

}  // namespace stress
