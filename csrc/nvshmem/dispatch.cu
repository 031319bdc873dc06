// Dispatch where some peers are behind a network: what csrc/cuda/low_latency_dispatch.cu does in
// halves, with puts where there is no way to write. A block does a token: its warps write parts of
// the row, then put a message each.

#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"
#include "nvshmem/launch.cuh"

namespace ep::nvshmem {
namespace {

using namespace cuda;

template <typename View, typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    network_dispatch_send(const __grid_constant__ View rank, const __grid_constant__ Rows rows,
                          const __grid_constant__ DispatchSendParams send) {
  using Sender = DispatchSender<Rows, View>;
  extern __shared__ uint32_t shared[];
  __shared__ typename Sender::Plan plans[kWarps];
  const Routing routing(rank, send);
  TokenSets sets(shared, routing);
  const auto items = Sender::items(rank, send.num_tokens);
  typename Rows::Fetched fetched;
  int64_t first_expert = -1;
  sets.clear();
  ptx::touch(rank);
  ptx::touch(send);
  const OpOf<View> op(rank, Phase::kDispatch, true, false, [&] {
    first_expert = TokenSets::first_expert(routing);
    if (items.more()) fetched = rows.fetch(items.row(), items.first_part());
  });
  const Sender sender(rank, op, routing, sets, rows, send, kNoRank);
  const bool ok = sets.fill(rank, routing, first_expert);
  if (!op.start_send(ok)) return;
  sender.run(items, fetched, &plans[threadIdx.x / kWarp]);
  op.complete(true);
}

template <typename View>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    network_dispatch_recv(const __grid_constant__ View rank,
                          const __grid_constant__ DispatchRecvParams recv) {
  extern __shared__ uint32_t shared[];
  ptx::touch(rank);
  ptx::touch(recv);
  const OpOf<View> op(rank, Phase::kDispatch, false, true, [] {});
  const Arrivals arrivals(shared, rank.layout.config().num_ranks, rank.num_local_experts);
  const DispatchReceiver<View> receiver(rank, op, recv, arrivals);
  const bool ok = op.start_recv(kNoRank, arrivals.sources.words, [] { return 0u; });
  receiver.receive_all(ok);
}

template <typename Rows>
void prepare_send(const protocol::LowLatencyConfig& config) {
  for_each_view<Rows>(config, [](auto view) {
    Launch::prepare(network_dispatch_send<typename decltype(view)::type, Rows>);
  });
}

}  // namespace

void prepare_dispatch(const protocol::LowLatencyConfig& config) {
  prepare_send<CopyRow>(config);
  prepare_send<QuantizeRow<__nv_bfloat16>>(config);
  prepare_send<QuantizeRow<float>>(config);
  for_each_view<CopyRow>(config, [](auto view) {
    Launch::prepare(network_dispatch_recv<typename decltype(view)::type>);
  });
}

uint64_t dispatch_shared_bytes(const protocol::LowLatencyLayout& layout, uint32_t self_rank) {
  const auto& config = layout.config();
  const uint32_t num_local = layout.partition().num_local_experts(self_rank);
  return std::max(TokenSets::num_bytes(config, config.num_max_tokens_per_rank),
                  Arrivals::num_bytes(config.num_ranks, num_local));
}

void launch_dispatch_send(const NetworkView& rank, const DispatchSendParams& send,
                          const Launch& launch) {
  const auto& config = rank.layout.config();
  with_rows(rank.layout, send, [&](auto rows) {
    using Rows = decltype(rows);
    with_view<Rows>(rank, has_usual_shape(config), [&](const auto& view) {
      launch.run(network_dispatch_send<std::decay_t<decltype(view)>, Rows>,
                 TokenSets::num_bytes(config, send.num_tokens), view, rows, send);
    });
  });
}

void launch_dispatch_recv(const NetworkView& rank, const DispatchRecvParams& recv,
                          const Launch& launch) {
  const auto& config = rank.layout.config();
  const bool is_usual = has_usual_shape(config) && recv.output == OutputLayout::kExpertMajor;
  with_view<CopyRow>(rank, is_usual, [&](const auto& view) {
    launch.run(network_dispatch_recv<std::decay_t<decltype(view)>>,
               Arrivals::num_bytes(config.num_ranks, rank.num_local_experts), view, recv);
  });
}

}  // namespace ep::nvshmem
