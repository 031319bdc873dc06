// Combine where some peers are behind a network, as dispatch.cu: a block makes a partial row, of
// which a warp puts it.

#include "cuda/combiner.cuh"
#include "nvshmem/launch.cuh"

namespace ep::nvshmem {
namespace {

using namespace cuda;

template <typename View, typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    network_combine_send(const __grid_constant__ View rank,
                         const __grid_constant__ CombineSendParams send) {
  extern __shared__ uint32_t shared[];
  __shared__ SumPlan plans[kWarps];
  const Sources received(shared, rank.layout.config().num_ranks);
  ptx::touch(rank);
  ptx::touch(send);
  const OpOf<View> op(rank, Phase::kCombine, true, false,
                      [&] { received.read(send.handle.num_messages); });
  const Combiner<Rows, View> combiner(rank, op, send, received, kNoRank,
                                      &plans[threadIdx.x / kWarp]);
  received.count_up();
  if (!op.start_send(true)) return;
  combiner.send();
  op.complete(true);
}

template <typename View, typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    network_combine_recv(const __grid_constant__ View rank,
                         const __grid_constant__ CombineRecvParams recv) {
  __shared__ SumPlan plans[kWarps];
  const Sources nothing(nullptr, 0);
  const CombineSendParams no_send = {};
  const Items items = Combiner<Rows, View>::items(rank, recv.num_tokens);
  Noted noted;
  ptx::touch(rank);
  ptx::touch(recv);
  const OpOf<View> op(rank, Phase::kCombine, false, true, [&] {
    if (items.more()) noted.fetch(rank.layout, recv, items.row());
  });
  const Combiner<Rows, View> combiner(rank, op, no_send, nothing, kNoRank,
                                      &plans[threadIdx.x / kWarp]);
  const bool ok = op.start_recv(kNoRank, nullptr, [] { return 0u; });
  if (!__syncthreads_and(ok)) return;
  op.complete(combiner.receive(recv, items, noted));
}

template <typename Rows>
void prepare_forms(const protocol::LowLatencyConfig& config) {
  for_each_view<Rows>(config, [](auto view) {
    using View = typename decltype(view)::type;
    Launch::prepare(network_combine_send<View, Rows>);
    Launch::prepare(network_combine_recv<View, Rows>);
  });
}

// Calls `launch` with the view and the TypeOf rows.
template <typename Function>
void with_types(const NetworkView& rank, Function&& launch) {
  with_travelling_rows(rank.layout, [&](auto rows) {
    with_view<typename decltype(rows)::type>(rank, has_usual_shape(rank.layout.config()),
                                             [&](const auto& view) { launch(view, rows); });
  });
}

}  // namespace

void prepare_combine(const protocol::LowLatencyConfig& config) {
  prepare_forms<PlainRows<__nv_bfloat16, 2>>(config);
  prepare_forms<PlainRows<float, 2>>(config);
  prepare_forms<Float8Rows<__nv_bfloat16>>(config);
  prepare_forms<Float8Rows<float>>(config);
}

void launch_combine_send(const NetworkView& rank, const CombineSendParams& send,
                         const Launch& launch) {
  const uint64_t num_words = Sources::num_words(rank.layout.config().num_ranks);
  with_types(rank, [&](const auto& view, auto rows) {
    launch.run(network_combine_send<std::decay_t<decltype(view)>, typename decltype(rows)::type>,
               num_words * sizeof(uint32_t), view, send);
  });
}

void launch_combine_recv(const NetworkView& rank, const CombineRecvParams& recv,
                         const Launch& launch) {
  with_types(rank, [&](const auto& view, auto rows) {
    launch.run(network_combine_recv<std::decay_t<decltype(view)>, typename decltype(rows)::type>, 0,
               view, recv);
  });
}

}  // namespace ep::nvshmem
