// How the scales of received float8 rows are laid out: as masked grouped GEMMs take them.
//
//   expert-major   [L, N, S]: the scales of one channel group lie side by side, row by row
//                  (what TMA loads; torch sees it as [L, S, N] with strides (N*S, 1, S))
//   rank-major     [R, M, N]; rows of the normal kernels alike, [rows, N]
//
// N = num_scales words of float32; for UE8M0 four exponent bytes a 32-bit word, N = ceil(/ 4), the
// lowest byte the first group, bytes behind the last group 0.
#pragma once

#include "protocol/float8.h"
#include "protocol/layout.h"
#include "protocol/op.h"

namespace ep::protocol {

// Word `word` of a row's scales as the experts take them.
EP_HOST_DEVICE inline uint32_t scale_word(ScaleFormat format, const float* scales,
                                          uint32_t num_scales, uint32_t word) {
  if (format != ScaleFormat::kUE8M0) return bits_of(scales[word]);
  uint32_t bytes = 0;
  for (uint32_t i = 4 * word; i < 4 * word + 4 && i < num_scales; ++i) {
    bytes |= uint32_t{ue8m0_of(scales[i])} << (i % 4 * 8);
  }
  return bytes;
}

// Index of word `word` of row `row`; rows counted over all experts, or over all sources.
EP_HOST_DEVICE constexpr uint64_t scale_word_idx(const LowLatencyLayout& layout,
                                                 OutputLayout output, uint64_t row, uint32_t word) {
  const uint64_t num_words = layout.num_scale_words();
  if (output == OutputLayout::kRankMajor) return row * num_words + word;
  const uint64_t capacity = layout.expert_capacity();
  return (row / capacity * num_words + word) * capacity + row % capacity;
}

}  // namespace ep::protocol
