// Kernels for what most models do, without the code of all else: instructions that are not executed
// lie between those that are, and an SM holds few of them. By expert, a pair of one token takes
// 10.7 us so and 13.4 with one kernel for everything, one of 128 tokens 27.1 and 28.7; with a GEMM
// behind each dispatch and combine, whose instructions come between, one of one token takes 1.8 us
// less, of 64 tokens 1.8 (two H200s over NVLink, float8, hidden 7168).
#pragma once

#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/part.cuh"

namespace ep::cuda {

// Usual: a usual shape (kernels.h), rows by expert, bfloat16 to begin with or in the end. To a
// kernel that only sends, rows by expert or not is all the same.
template <Batch kOfBatch, bool kAtSource, typename View = RankView>
struct UsualView : View {
  static constexpr bool kIsUsual = true;
  static constexpr Batch kBatch = kOfBatch;
  static constexpr bool kIsSource = kAtSource;

  explicit UsualView(const View& rank) : View(rank) {}
};

// --- on the host -----------------------------------------------------------------------------

// Calls `launch` with what a kernel of `Rows` is given. `is_usual`: shape and output are.
// `make_view(is_source)`: the view then, of a std::bool_constant.
template <typename Rows, typename View, typename MakeView, typename Function>
void with_usual(const View& rank, bool is_usual, Function&& launch, MakeView make_view) {
  if constexpr (Rows::kAreUsual) {
    if (is_usual) {
      const bool is_source = rank.layout.config().reduction == protocol::Reduction::kSource;
      return is_source ? make_view(std::true_type()) : make_view(std::false_type());
    }
  }
  launch(rank);
}
// Of a rank's own batch of so many tokens.
template <typename Rows, bool kReceives, typename Function>
void with_view(const RankView& rank, bool is_usual, uint32_t num_tokens, Function&& launch) {
  const auto& config = rank.layout.config();
  with_usual<Rows>(rank, is_usual, launch, [&](auto is_source) {
    constexpr bool kIsSource = decltype(is_source)::value;
    if constexpr (kReceives) {
      if (config.num_ranks == 1) return launch(UsualView<Batch::kAlone, kIsSource>(rank));
    }
    if (num_tokens <= config.num_max_tagged_tokens) {
      return launch(UsualView<Batch::kTagged, kIsSource>(rank));
    }
    launch(UsualView<Batch::kUntagged, kIsSource>(rank));
  });
}
// Where the batch is of no concern.
template <typename Rows, typename Function>
void with_view(const RankView& rank, bool is_usual, Function&& launch) {
  with_usual<Rows>(rank, is_usual, launch,
                   [&](auto is_source) { launch(UsualView<Batch::kAny, is_source>(rank)); });
}

// Calls `prepare` with the TypeOf every view for such batches that the above may give.
template <typename Rows, Batch... kBatches, typename Function, typename View = RankView>
void for_each_view(const protocol::LowLatencyConfig& config, Function&& prepare,
                   TypeOf<View> general = {}) {
  prepare(general);
  if constexpr (Rows::kAreUsual) {
    if (!has_usual_shape(config)) return;
    if (config.reduction == protocol::Reduction::kSource) {
      (prepare(TypeOf<UsualView<kBatches, true, View>>()), ...);
    } else {
      (prepare(TypeOf<UsualView<kBatches, false, View>>()), ...);
    }
  }
}

}  // namespace ep::cuda
