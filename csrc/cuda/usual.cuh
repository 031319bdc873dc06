// Kernels for what most models do, without the code of all else: instructions that are not executed
// lie between those that are, and an SM holds few of them. By expert, a pair of one token takes
// 10.7 us so and 13.4 with one kernel for everything, one of 128 tokens 27.1 and 28.7; with a GEMM
// behind each dispatch and combine, whose instructions come between, one of one token takes 1.8 us
// less, of 64 tokens 1.8 (two H200s over NVLink, float8, hidden 7168).
#pragma once

#include "cuda/kernels.h"
#include "cuda/part.cuh"

namespace ep::cuda {

// Usual: a usual shape (kernels.h), rows by expert, a partial row a rank. To a kernel that only
// sends, rows by expert or not is all the same.
template <Batch kOfBatch>
struct UsualView : RankView {
  static constexpr bool kIsUsual = true;
  static constexpr Batch kBatch = kOfBatch;

  explicit UsualView(const RankView& rank) : RankView(rank) {}
};

inline bool is_usual(const protocol::LowLatencyConfig& config) {
  return config.reduction == protocol::Reduction::kRank && has_usual_shape(config);
}
inline bool is_usual(const protocol::LowLatencyConfig& config, protocol::OutputLayout output) {
  return is_usual(config) && output == protocol::OutputLayout::kExpertMajor;
}

// On the host. Calls `launch` with what the kernel of a rank's own batch of so many tokens is
// given. `is_usual`: the rank and the output are.
template <bool kReceives, typename Function>
void with_view(const RankView& rank, bool is_usual, uint32_t num_tokens, Function&& launch) {
  const auto& config = rank.layout.config();
  if (!is_usual) return launch(rank);
  if constexpr (kReceives) {
    if (config.num_ranks == 1) return launch(UsualView<Batch::kAlone>(rank));
  }
  if (num_tokens <= config.num_max_tagged_tokens) return launch(UsualView<Batch::kTagged>(rank));
  launch(UsualView<Batch::kUntagged>(rank));
}
// The same where the batch is of no concern.
template <typename Function>
void with_view(const RankView& rank, bool is_usual, Function&& launch) {
  if (!is_usual) return launch(rank);
  launch(UsualView<Batch::kAny>(rank));
}
// Calls `prepare` with the TypeOf every view that with_view<kReceives> gives.
template <bool kReceives, typename Function>
void for_each_view(Function&& prepare) {
  prepare(TypeOf<RankView>());
  prepare(TypeOf<UsualView<Batch::kTagged>>());
  prepare(TypeOf<UsualView<Batch::kUntagged>>());
  if constexpr (kReceives) prepare(TypeOf<UsualView<Batch::kAlone>>());
}

}  // namespace ep::cuda
