// Combine where some peers are behind a network, as dispatch.cu: a block makes a partial row, of
// which a warp puts it.

#include "cuda/combiner.cuh"
#include "nvshmem/launch.cuh"

namespace ep::nvshmem {
namespace {

using namespace cuda;

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    network_combine_send(const __grid_constant__ NetworkView rank,
                         const __grid_constant__ CombineSendParams send) {
  extern __shared__ uint32_t shared[];
  __shared__ SumPlan plans[kWarps];
  const Sources received(shared, rank.layout.config().num_ranks);
  ptx::touch(rank);
  ptx::touch(send);
  const OpOf<NetworkView> op(rank, Phase::kCombine, true, false,
                             [&] { received.read(send.handle.num_messages); });
  const Combiner<Rows, NetworkView> combiner(rank, op, send, received, kNoRank,
                                             &plans[threadIdx.x / kWarp]);
  received.count_up();
  if (!op.start_send(true)) return;
  combiner.send();
  op.complete(true);
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    network_combine_recv(const __grid_constant__ NetworkView rank,
                         const __grid_constant__ CombineRecvParams recv) {
  __shared__ SumPlan plans[kWarps];
  const Sources nothing(nullptr, 0);
  const CombineSendParams no_send = {};
  ptx::touch(rank);
  ptx::touch(recv);
  const OpOf<NetworkView> op(rank, Phase::kCombine, false, true, [] {});
  const Combiner<Rows, NetworkView> combiner(rank, op, no_send, nothing, kNoRank,
                                             &plans[threadIdx.x / kWarp]);
  const bool ok = op.start_recv(kNoRank, nullptr, [] { return 0u; });
  if (!__syncthreads_and(ok)) return;
  op.complete(combiner.receive(recv));
}

template <typename Rows>
void prepare_forms() {
  Launch::prepare(network_combine_send<Rows>);
  Launch::prepare(network_combine_recv<Rows>);
}

}  // namespace

void prepare_combine() {
  prepare_forms<PlainRows<__nv_bfloat16>>();
  prepare_forms<PlainRows<float>>();
  prepare_forms<Float8Rows<__nv_bfloat16>>();
  prepare_forms<Float8Rows<float>>();
}

void launch_combine_send(const NetworkView& rank, const CombineSendParams& send,
                         const Launch& launch) {
  const uint64_t num_words = Sources::num_words(rank.layout.config().num_ranks);
  with_travelling_rows(rank.layout, [&](auto rows) {
    launch.run(network_combine_send<typename decltype(rows)::type>, num_words * sizeof(uint32_t),
               rank, send);
  });
}

void launch_combine_recv(const NetworkView& rank, const CombineRecvParams& recv,
                         const Launch& launch) {
  with_travelling_rows(rank.layout, [&](auto rows) {
    launch.run(network_combine_recv<typename decltype(rows)::type>, 0, rank, recv);
  });
}

}  // namespace ep::nvshmem
