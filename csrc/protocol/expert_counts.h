// How many rows a batch has for each expert, as tagged words: the counts of six experts and the low
// half of the epoch, so that nothing has to be awaited before them.
//
//   word w   | rows of expert 6 w u16 | .. | of 6 w + 5 u16 | tag u32 |
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

constexpr uint32_t kCountsPerWord = 6;

EP_HOST_DEVICE constexpr uint32_t count_words_for(uint32_t num_experts) {
  return (num_experts + kCountsPerWord - 1) / kCountsPerWord;
}

}  // namespace ep::protocol
