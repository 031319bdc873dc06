// The kernels of a rank with a network, as its host calls them.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "nvshmem/network_view.cuh"

namespace ep::nvshmem {

using cuda::CombineRecvParams;
using cuda::CombineSendParams;
using cuda::DispatchRecvParams;
using cuda::DispatchSendParams;
using cuda::Launch;

// See Launch::prepare.
void prepare_dispatch();
void prepare_combine();

// Shared memory of the largest dispatch's halves.
uint64_t dispatch_shared_bytes(const protocol::LowLatencyLayout& layout, uint32_t self_rank);

void launch_dispatch_send(const NetworkView& rank, const DispatchSendParams& send,
                          const Launch& launch);
void launch_dispatch_recv(const NetworkView& rank, const DispatchRecvParams& recv,
                          const Launch& launch);
void launch_combine_send(const NetworkView& rank, const CombineSendParams& send,
                         const Launch& launch);
void launch_combine_recv(const NetworkView& rank, const CombineRecvParams& recv,
                         const Launch& launch);

}  // namespace ep::nvshmem
