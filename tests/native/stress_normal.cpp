// R ranks as threads over ordinary memory, hundreds of normal dispatches and combines with batch
// sizes and routings that change from one to the next, in rounds of a few tokens; every received
// row and every result is checked. Built by test_normal_sanitizers.py, with no Python in the
// process.
//
//   stress_normal RANKS OPS HIDDEN DTYPE TOKENS_PER_ROUND [damage]
//   DTYPE        float32, bfloat16; bfloat16/float8: dispatched as float8
//   damage       one rank answers one row wrongly: the check must end the program
#include <thread>

#include "cpu/normal.h"
#include "stress_normal_rank.h"

using namespace stress;

int main(int argc, char** argv) {
  if (argc < 6) return 2;
  const auto num_ranks = static_cast<uint32_t>(std::atoi(argv[1]));
  const auto num_ops = static_cast<uint64_t>(std::atoll(argv[2]));
  const std::string dtypes = argv[4];
  const DType dtype = dtypes == "float32" ? DType::kFloat32 : DType::kBFloat16;
  const protocol::NormalConfig config{num_ranks,
                                      kNumExperts,
                                      static_cast<uint32_t>(std::atoi(argv[3])),
                                      kTopK,
                                      dtype,
                                      dtypes == "bfloat16/float8" ? DType::kFloat8E4M3 : dtype,
                                      protocol::ScaleFormat::kPowerOfTwo,
                                      static_cast<uint32_t>(std::atoi(argv[5]))};
  // Exactly as many bytes as the layout says: AddressSanitizer sees the first byte behind them.
  const uint64_t num_bytes = protocol::NormalLayout(config).num_bytes();
  std::vector<std::byte*> bases;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    bases.push_back(static_cast<std::byte*>(std::aligned_alloc(128, num_bytes)));
    std::memset(bases.back(), 0, num_bytes);
  }
  std::vector<std::thread> threads;
  for (uint32_t self = 0; self < num_ranks; ++self) {
    threads.emplace_back([&, self] {
      const cpu::WaitPolicy policy{20'000'000'000, self % 2 * 5'000, nullptr};
      auto kernels = std::make_unique<cpu::NormalRank>(config, self, bases, policy);
      NormalRankUnderStress<cpu::NormalRank> rank(config, self, std::move(kernels), argc > 6);
      for (uint64_t op = 0; op < num_ops; ++op) rank.run(op);
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::byte* base : bases) std::free(base);
  std::puts("stress: ok");
  return 0;
}
