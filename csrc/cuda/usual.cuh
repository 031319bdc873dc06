// Kernels for what most models do, without the code of all else: instructions that are not executed
// lie between those that are, and every kernel starts with few of them near the SM. By expert, a
// pair of one token takes 10.8 us so and 13.6 with one kernel for everything, one of 128 tokens
// 26.9 and 28.7 (two H200s over NVLink, float8, hidden 7168).
#pragma once

#include <type_traits>

#include "cuda/kernels.h"

namespace ep::cuda {

// Usual: rows by expert, a partial row a rank, and no more ranks or experts a token than a warp has
// lanes. What a kernel that only sends is told of its output does not matter.
template <Batch kOfBatch>
struct UsualView : RankView {
  static constexpr bool kIsUsual = true;
  static constexpr Batch kBatch = kOfBatch;

  explicit UsualView(const RankView& rank) : RankView(rank) {}
};

inline bool is_usual(const protocol::LowLatencyConfig& config) {
  return config.reduction == protocol::Reduction::kRank && fits_a_warp(config);
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
// Calls `prepare` with a null pointer to each type of view that with_view<kReceives> gives.
template <bool kReceives, typename Function>
void for_each_view(Function&& prepare) {
  prepare(static_cast<RankView*>(nullptr));
  prepare(static_cast<UsualView<Batch::kTagged>*>(nullptr));
  prepare(static_cast<UsualView<Batch::kUntagged>*>(nullptr));
  if constexpr (kReceives) prepare(static_cast<UsualView<Batch::kAlone>*>(nullptr));
}

}  // namespace ep::cuda
