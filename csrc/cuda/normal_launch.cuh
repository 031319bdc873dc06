// How the normal kernels are launched.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/normal.h"

namespace ep::cuda {

// Of all kernels of a file, see Launch::prepare.
void prepare_normal_dispatch();
void prepare_normal_combine();

void launch_normal_dispatch(const NormalView& rank, const NormalDispatch& params,
                            const Launch& launch);
void launch_normal_unpack(const NormalView& rank, const uint32_t* batch,
                          const NormalOutputs& outputs, const Launch& launch);
void launch_normal_combine(const NormalView& rank, const NormalCombine& params,
                           const Launch& launch);

// Threads of a block; those of unpack as dispatch's.
uint32_t normal_dispatch_threads();
uint32_t normal_combine_threads();

}  // namespace ep::cuda
