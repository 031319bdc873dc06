// R ranks on several nodes, joined by the network of csrc/cpu/network.h. A seed decides what the
// network delivers next, which program the ranks run, and all batches. Every received row and every
// result is checked. Seed after seed, from empty memory.
//
//   stress_network SCHEDULE ALGORITHM RANKS RANKS_PER_NODE FIRST_SEED NUM_SEEDS HIDDEN DTYPE OUTPUT
//   SCHEDULE     turns    one thread: the seed also decides which rank goes on, and so everything
//                threads  one for each rank, and the network's
//   ALGORITHM    flat, hierarchical
//   DTYPE        float32, bfloat16, float8: dispatched and combined as such
//   OUTPUT       expert_major, rank_major, or source (flat only)
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "stress_rank.h"

namespace {

using namespace stress;

constexpr uint32_t kNumBanks = 2;
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

  static Scheduler* running;

  uint64_t random_;
  cpu::Network& network_;
  std::vector<std::unique_ptr<Coroutine>> coroutines_;
  Coroutine* current_ = nullptr;
  ucontext_t context_;
};
Scheduler* Scheduler::running = nullptr;

struct Step {
  enum { kDispatch, kHook, kCombine, kCombineHook } what;
  uint32_t op;
};
// Every rank issues the same; what each is for is said in tests/support/programs.py.
const std::vector<Step> kLoop{
    {Step::kDispatch, 0}, {Step::kHook, 0}, {Step::kCombine, 0}, {Step::kCombineHook, 0},
    {Step::kDispatch, 1}, {Step::kHook, 1}, {Step::kCombine, 1}, {Step::kCombineHook, 1},
    {Step::kDispatch, 2}, {Step::kHook, 2}, {Step::kCombine, 2}, {Step::kCombineHook, 2},
    {Step::kDispatch, 3}, {Step::kHook, 3}, {Step::kCombine, 3}, {Step::kCombineHook, 3}};
const std::vector<Step> kMicroBatches{
    {Step::kDispatch, 0},    {Step::kDispatch, 1}, {Step::kHook, 0},
    {Step::kCombine, 0},     {Step::kHook, 1},     {Step::kCombine, 1},
    {Step::kCombineHook, 0}, {Step::kDispatch, 2}, {Step::kCombineHook, 1},
    {Step::kDispatch, 3},    {Step::kHook, 2},     {Step::kCombine, 2},
    {Step::kHook, 3},        {Step::kCombine, 3},  {Step::kCombineHook, 2},
    {Step::kCombineHook, 3}};
const std::vector<Step> kSteady{{Step::kDispatch, 0}, {Step::kDispatch, 1}, {Step::kHook, 0},
                                {Step::kDispatch, 2}, {Step::kHook, 1},     {Step::kDispatch, 3},
                                {Step::kHook, 2},     {Step::kDispatch, 4}, {Step::kHook, 3},
                                {Step::kDispatch, 5}, {Step::kHook, 4},     {Step::kHook, 5}};
const std::vector<Step> kThreeCombines{
    {Step::kDispatch, 0},    {Step::kHook, 0},    {Step::kDispatch, 1},    {Step::kHook, 1},
    {Step::kDispatch, 2},    {Step::kHook, 2},    {Step::kCombine, 0},     {Step::kCombine, 1},
    {Step::kCombineHook, 0}, {Step::kCombine, 2}, {Step::kCombineHook, 1}, {Step::kCombineHook, 2}};
const std::vector<Step>* const kPrograms[] = {&kLoop, &kMicroBatches, &kSteady, &kThreeCombines};

void run_program(Rank& rank, uint64_t seed) {
  std::vector<std::unique_ptr<Operation>> operations(8);
  for (const Step& step : *kPrograms[seed % 4]) {
    // Operations of different seeds have different batches.
    const uint64_t op = seed * 16 + step.op;
    if (step.what == Step::kDispatch) operations[step.op] = rank.dispatch_send(op);
    Operation& operation = *operations[step.op];
    if (step.what == Step::kHook) rank.dispatch_recv(op, operation);
    if (step.what == Step::kCombine) rank.combine_send(op, operation);
    if (step.what == Step::kCombineHook) rank.combine_recv(op, operation);
  }
}

Options options_of(char** argv) {
  const std::string dtype = argv[8], output = argv[9];
  const DType row_dtype = dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
  const DType travelling = dtype == "float8" ? DType::kFloat8E4M3 : row_dtype;
  return {argv[2],
          static_cast<uint32_t>(std::atoi(argv[3])),
          kNumBanks,
          0,
          static_cast<uint32_t>(std::atoi(argv[7])),
          row_dtype,
          travelling,
          travelling,
          output == "rank_major" ? OutputLayout::kRankMajor : OutputLayout::kExpertMajor,
          output == "source" ? protocol::Reduction::kSource : protocol::Reduction::kRank,
          false};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 10) return 2;
  const bool is_threaded = std::string(argv[1]) == "threads";
  const Options options = options_of(argv);
  const auto ranks_per_node = static_cast<uint32_t>(std::atoi(argv[4]));
  const auto first_seed = static_cast<uint64_t>(std::atoll(argv[5]));
  const auto num_seeds = static_cast<uint64_t>(std::atoll(argv[6]));
  LowLatencyConfig low_latency{options.num_ranks,
                               kNumExperts,
                               kMaxTokens,
                               options.hidden,
                               kTopK,
                               options.num_banks,
                               options.dtype,
                               options.dispatch_dtype,
                               protocol::ScaleFormat::kPowerOfTwo};
  low_latency.reduction = options.reduction;
  low_latency.combine_dtype = options.combine_dtype;
  const protocol::MultiNodeConfig config{low_latency, ranks_per_node,
                                         options.mode == "hierarchical"};
  const uint64_t num_bytes = protocol::MultiNodeLayout(config).num_bytes();
  std::vector<std::byte*> bases;
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    bases.push_back(static_cast<std::byte*>(std::aligned_alloc(128, num_bytes)));
  }
  const cpu::WaitPolicy policy{20'000'000'000, 5'000, nullptr,
                               is_threaded ? nullptr : &Scheduler::wait};
  const protocol::Nodes nodes{options.num_ranks, ranks_per_node};
  for (uint64_t seed = first_seed; seed < first_seed + num_seeds; ++seed) {
    for (std::byte* base : bases) std::memset(base, 0, num_bytes);
    auto network = std::make_shared<cpu::Network>(nodes, seed);
    if (is_threaded) network->start_thread();
    Scheduler scheduler(seed, *network);
    std::vector<std::unique_ptr<Rank>> ranks;
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
      ranks.push_back(std::make_unique<Rank>(
          options, rank, bases[rank],
          std::make_unique<SeveralNodes>(config, rank, bases, policy, network)));
      auto main = [&rank = *ranks.back(), seed] { run_program(rank, seed); };
      if (is_threaded) {
        threads.emplace_back(main);
      } else {
        scheduler.add(main);
      }
    }
    for (auto& thread : threads) thread.join();
    if (!scheduler.run()) give_up("nobody can go on: seed", options.num_ranks, 0, seed, 0);
    for (uint32_t rank = 0; rank < options.num_ranks; ++rank) network->flush(rank);
  }
  for (std::byte* base : bases) std::free(base);
  std::puts("stress_network: ok");
  return 0;
}
