// A launch is a call by all threads of all blocks of a rank, behind a barrier of them. Now and then
// a block begins late.
#pragma once

#include "cuda/kernels.h"
#include "cuda_runtime.h"

namespace ep::cuda {

struct Launch {
  uint32_t num_blocks = 0;  // 0: all of the rank's; else the others wait
  bool is_small = false;

  template <typename... Params>
  static void prepare(void (*)(Params...)) {}

  template <typename... Params, typename... Args>
  void run(void (*kernel)(Params...), uint64_t, const Args&... args) const {
    const uint32_t num_all = num_blocks_of_rank();
    gridDim.x = num_blocks == 0 ? num_all : num_blocks;
    if (threadIdx.x == 0) gpu_on_cpu::be_late(4, 3000);
    if (blockIdx.x < gridDim.x) kernel(args...);
    __syncthreads();
    gridDim.x = num_all;
    gpu_on_cpu::meet_all();
  }

 private:
  // As it was at the process's first launch.
  static uint32_t num_blocks_of_rank() {
    static const uint32_t num_blocks = gridDim.x;
    return num_blocks;
  }
};

}  // namespace ep::cuda
