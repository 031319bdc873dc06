// R ranks as threads over ordinary memory, a few thousand dispatch/combine pairs with batch sizes
// and routings that change from one to the next; every received row and every result is checked.
// Built by test_sanitizers.py under ThreadSanitizer and AddressSanitizer, with no Python in the
// process.
//
//   stress MODE RANKS BANKS OPS HIDDEN DTYPE OUTPUT [damage]
//   MODE loop    d h c hc, one thread a rank
//        steady  BANKS dispatches outstanding all the time, one thread a rank
//        split   sends in one thread of the rank, hooks in another
//   DTYPE        float32, bfloat16, float8: float32 that is dispatched as float8, or float8_both:
//                that also comes home as float8
//   OUTPUT       expert_major, rank_major, or source: expert-major, whose rows are added at home
//   damage       one payload byte of one message is changed: the check must end the program
//
// T tokens, H hidden, K top-k, E experts, R ranks, M tokens a rank at most, B banks.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "stress_rank.h"

namespace {

using namespace stress;

void run_loop(Rank& rank, const Options& options) {
  for (uint64_t op = 0; op < options.num_ops; ++op) {
    auto operation = rank.dispatch_send(op);
    rank.dispatch_recv(op, *operation);
    rank.combine_send(op, *operation);
    rank.combine_recv(op, *operation);
  }
}

void run_steady(Rank& rank, const Options& options) {
  std::deque<std::unique_ptr<Operation>> sent;
  for (uint64_t op = 0; op < options.num_ops + options.num_banks; ++op) {
    if (op >= options.num_banks) {
      rank.dispatch_recv(op - options.num_banks, *sent.front());
      sent.pop_front();
    }
    if (op < options.num_ops) sent.push_back(rank.dispatch_send(op));
  }
}

// The sender publishes an operation to the hooks' thread, and waits there for a free bank.
void run_split(Rank& rank, const Options& options) {
  std::vector<std::unique_ptr<Operation>> operations(options.num_ops);
  std::atomic<uint64_t> num_sent{0}, num_hooked{0};
  std::thread hooks([&] {
    for (uint64_t op = 0; op < options.num_ops; ++op) {
      while (num_sent.load() <= op) std::this_thread::yield();
      rank.dispatch_recv(op, *operations[op]);
      num_hooked.store(op + 1);
      // Combine sends and hooks of this rank, beside the dispatch sends of the other thread.
      rank.combine_send(op, *operations[op]);
      rank.combine_recv(op, *operations[op]);
      operations[op].reset();
    }
  });
  for (uint64_t op = 0; op < options.num_ops; ++op) {
    while (op - num_hooked.load() >= options.num_banks) std::this_thread::yield();
    operations[op] = rank.dispatch_send(op);
    num_sent.store(op + 1);
  }
  hooks.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 8) return 2;
  const std::string dtype = argv[6];
  const DType row_dtype = dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
  const bool is_both = dtype == "float8_both";
  const std::string output = argv[7];
  const Options options{
      argv[1],
      static_cast<uint32_t>(std::atoi(argv[2])),
      static_cast<uint32_t>(std::atoi(argv[3])),
      static_cast<uint64_t>(std::atoll(argv[4])),
      static_cast<uint32_t>(std::atoi(argv[5])),
      row_dtype,
      is_both || dtype == "float8" ? DType::kFloat8E4M3 : row_dtype,
      is_both ? DType::kFloat8E4M3 : row_dtype,
      output == "rank_major" ? OutputLayout::kRankMajor : OutputLayout::kExpertMajor,
      output == "source" ? protocol::Reduction::kSource : protocol::Reduction::kRank,
      argc > 8};
  const LowLatencyConfig config = config_of(options);
  // Exactly as many bytes as the layout says: AddressSanitizer sees the first byte behind them.
  const uint64_t num_bytes = protocol::LowLatencyLayout(config).num_bytes();
  std::vector<std::byte*> bases;
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    bases.push_back(static_cast<std::byte*>(std::aligned_alloc(128, num_bytes)));
    std::memset(bases.back(), 0, num_bytes);
  }
  auto* run = options.mode == "loop" ? run_loop : options.mode == "steady" ? run_steady : run_split;
  std::vector<std::unique_ptr<Rank>> ranks;
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    const cpu::WaitPolicy policy{20'000'000'000, rank % 2 * 5'000, nullptr};
    ranks.push_back(std::make_unique<Rank>(options, rank, bases[rank],
                                           std::make_unique<OneNode>(config, rank, bases, policy)));
  }
  std::vector<std::thread> threads;
  for (auto& rank : ranks) threads.emplace_back([&] { run(*rank, options); });
  for (auto& thread : threads) thread.join();
  for (std::byte* base : bases) std::free(base);
  std::puts("stress: ok");
  return 0;
}
