#pragma once

#include <cstdint>

#include "protocol/layout.h"

namespace ep::cuda {

// Evaluates the protocol headers on the GPU and on the host over a grid of epochs, banks and ranks
// and counts the words that differ: host and device must agree on where everything lies.
// Returns -1 where no GPU is visible.
int64_t protocol_mismatches(const protocol::LowLatencyConfig& config);

}  // namespace ep::cuda
