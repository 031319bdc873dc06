#pragma once

#include "cuda_runtime.h"

namespace ep::cuda {

struct HostCounts {
  uint64_t ticket, num_rows;
  uint32_t num_rounds, is_direct;
};

}  // namespace ep::cuda
