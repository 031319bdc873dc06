// The kernels of a rank with a network, as its host calls them.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/usual.cuh"
#include "nvshmem/network_view.cuh"

namespace ep::nvshmem {

using cuda::CombineRecvParams;
using cuda::CombineSendParams;
using cuda::DispatchRecvParams;
using cuda::DispatchSendParams;
using cuda::Launch;

// Of the kernels that such a rank may launch, see Launch::prepare.
void prepare_dispatch(const protocol::LowLatencyConfig& config);
void prepare_combine(const protocol::LowLatencyConfig& config);

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

// Calls `launch` with what a kernel of `Rows` is given: see cuda/usual.cuh. Nothing is tagged.
template <typename Rows, typename Function>
void with_view(const NetworkView& rank, bool is_usual, Function&& launch) {
  cuda::with_usual<Rows>(rank, is_usual, launch, [&](auto is_source) {
    launch(cuda::UsualView<cuda::Batch::kUntagged, is_source, NetworkView>(rank));
  });
}
// Calls `prepare` with the TypeOf every view that it may give.
template <typename Rows, typename Function>
void for_each_view(const protocol::LowLatencyConfig& config, Function&& prepare) {
  cuda::for_each_view<Rows, cuda::Batch::kUntagged>(config, prepare, cuda::TypeOf<NetworkView>());
}

}  // namespace ep::nvshmem
