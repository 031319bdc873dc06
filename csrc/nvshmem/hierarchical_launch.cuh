// The hierarchical kernels, as their host calls them.
#pragma once

#include "nvshmem/hierarchical_view.cuh"
#include "nvshmem/launch.cuh"

namespace ep::nvshmem {

// See Launch::prepare.
void prepare_hierarchical_dispatch();
void prepare_hierarchical_combine();

// Shared memory of the largest dispatch's halves.
uint64_t hierarchical_dispatch_shared_bytes(const protocol::MultiNodeLayout& layout);

void launch_dispatch_send(const HierarchicalView& rank, const DispatchSendParams& send,
                          const Launch& launch);
void launch_dispatch_recv(const HierarchicalView& rank, const ForwardingRecvParams& recv,
                          const Launch& launch);
void launch_combine_send(const HierarchicalView& rank, const ForwardedSendParams& send,
                         const Launch& launch);
void launch_combine_recv(const HierarchicalView& rank, const CombineRecvParams& recv,
                         const Launch& launch);

}  // namespace ep::nvshmem
