// R ranks on several nodes, joined by the network of csrc/cpu/network.h. A seed decides what the
// network delivers next, which program the ranks run, and all batches. Every received row and every
// result is checked. Seed after seed, from empty memory.
//
//   stress_network SCHEDULE ALGORITHM RANKS RANKS_PER_NODE FIRST_SEED NUM_SEEDS HIDDEN DTYPE OUTPUT
//   SCHEDULE     turns    one thread: the seed also decides which rank goes on, and so everything
//                threads  one for each rank, and the network's
//   ALGORITHM    flat, hierarchical: of the low-latency kernels; normal: the normal kernels
//   DTYPE        float32, bfloat16, float8: dispatched and, by low-latency kernels, combined as
//   such OUTPUT       expert_major, rank_major, or source (flat only); normal: tokens a round
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/normal_nodes.h"
#include "stress_normal_rank.h"
#include "stress_turns.h"

namespace {

using namespace stress;

constexpr uint32_t kNumBanks = 2;
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

// What every rank runs for one seed, from empty memory.
using Programs = std::vector<std::function<void()>>;
using Bases = std::vector<std::byte*>;
using MakePrograms =
    std::function<Programs(uint64_t seed, const Bases&, const std::shared_ptr<cpu::Network>&)>;

struct Plan {
  uint64_t num_bytes;
  MakePrograms make;
};

Plan low_latency(const Options& options, uint32_t ranks_per_node, cpu::WaitPolicy policy) {
  const protocol::MultiNodeConfig config{config_of(options), ranks_per_node,
                                         options.mode == "hierarchical"};
  return {protocol::MultiNodeLayout(config).num_bytes(),
          [=, &options](uint64_t seed, const Bases& bases, const auto& network) {
            Programs programs;
            for (uint32_t self = 0; self < options.num_ranks; ++self) {
              auto kernels = std::make_unique<SeveralNodes>(config, self, bases, policy, network);
              auto rank = std::make_shared<Rank>(options, self, bases[self], std::move(kernels));
              programs.push_back([rank, seed] { run_program(*rank, seed); });
            }
            return programs;
          }};
}

Plan normal(const Options& options, uint32_t ranks_per_node, uint32_t num_tokens_per_round,
            cpu::WaitPolicy policy) {
  const protocol::NormalConfig config{options.num_ranks,
                                      kNumExperts,
                                      options.hidden,
                                      kTopK,
                                      options.dtype,
                                      options.dispatch_dtype,
                                      protocol::ScaleFormat::kPowerOfTwo,
                                      num_tokens_per_round};
  const protocol::NormalNodeConfig node_config{config, ranks_per_node};
  return {protocol::NormalNodeLayout(node_config).num_bytes(),
          [=](uint64_t seed, const Bases& bases, const auto& network) {
            Programs programs;
            for (uint32_t self = 0; self < config.num_ranks; ++self) {
              using Kernels = cpu::NormalNodeRank;
              auto kernels = std::make_unique<Kernels>(node_config, self, bases, policy, network);
              auto rank = std::make_shared<NormalRankUnderStress<Kernels>>(
                  config, self, std::move(kernels), false);
              programs.push_back([rank, seed] {
                for (uint64_t op = seed * 3; op < seed * 3 + 3; ++op) rank->run(op);
              });
            }
            return programs;
          }};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 10) return 2;
  const bool is_threaded = std::string(argv[1]) == "threads";
  const Options options = options_of(argv);
  const auto ranks_per_node = static_cast<uint32_t>(std::atoi(argv[4]));
  const auto first_seed = static_cast<uint64_t>(std::atoll(argv[5]));
  const auto num_seeds = static_cast<uint64_t>(std::atoll(argv[6]));
  const cpu::WaitPolicy policy{20'000'000'000, 5'000, nullptr,
                               is_threaded ? nullptr : &Scheduler::wait};
  const Plan plan =
      options.mode == "normal"
          ? normal(options, ranks_per_node, static_cast<uint32_t>(std::atoi(argv[9])), policy)
          : low_latency(options, ranks_per_node, policy);
  // Exactly as many bytes as the layout says: AddressSanitizer sees the first byte behind them.
  Bases bases;
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    bases.push_back(static_cast<std::byte*>(std::aligned_alloc(128, plan.num_bytes)));
  }
  const protocol::Nodes nodes{options.num_ranks, ranks_per_node};
  for (uint64_t seed = first_seed; seed < first_seed + num_seeds; ++seed) {
    for (std::byte* base : bases) std::memset(base, 0, plan.num_bytes);
    auto network = std::make_shared<cpu::Network>(nodes, seed);
    Scheduler scheduler(seed, *network);
    std::vector<std::thread> threads;
    if (is_threaded) network->start_thread();
    for (auto& program : plan.make(seed, bases, network)) {
      if (is_threaded) {
        threads.emplace_back(program);
      } else {
        scheduler.add(program);
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
