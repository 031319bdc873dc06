// How the normal kernels over a network are launched.
#pragma once

#include "cuda/launch.cuh"
#include "nvshmem/normal.h"

namespace ep::nvshmem {

// Of every block. There is one block an SM.
constexpr uint32_t kNodeThreads = 512;

// Of all kernels of a file, see Launch::prepare.
void prepare_node_counts();
void prepare_node_dispatch();
void prepare_node_combine();

// Two kernels: the first finds each token's ranks, the second does the rest.
void launch_node_counts(const NodeRankView& rank, const NodeCounts& params,
                        const cuda::Launch& launch);
void launch_node_dispatch(const NodeRankView& rank, const NodeDispatch& params,
                          const cuda::Launch& launch);
void launch_node_combine(const NodeRankView& rank, const NodeCombine& params,
                         const cuda::Launch& launch);

}  // namespace ep::nvshmem
