// Dispatch between nodes, each token once a node; the meaning, and a worked example, are in
// csrc/cpu/multi_node_dispatch.cpp.

#include "cuda/dispatch_recv.cuh"
#include "nvshmem/hierarchical_forward.cuh"
#include "nvshmem/hierarchical_launch.cuh"
#include "nvshmem/hierarchical_send.cuh"

namespace ep::nvshmem {
namespace {

using namespace cuda;

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    hierarchical_dispatch_send(const __grid_constant__ HierarchicalView rank,
                               const __grid_constant__ Rows rows,
                               const __grid_constant__ DispatchSendParams send) {
  using Sender = NodeDispatchSender<Rows>;
  extern __shared__ uint32_t shared[];
  __shared__ typename Sender::Plan plans[kWarps];
  const NodeRouting routing(rank, send);
  TokenSets sets(shared, routing);
  const BlockItems items(send.num_tokens, protocol::parts_for(rank.layout.dispatch_row_bytes()));
  typename Rows::Fetched fetched;
  int64_t first_expert = -1;
  sets.clear();
  ptx::touch(rank);
  ptx::touch(send);
  const HierarchicalOp op(rank, Phase::kDispatch, true, false, [&] {
    first_expert = TokenSets::first_expert(routing);
    if (items.more()) fetched = rows.fetch(items.row(), items.first_part());
  });
  const Sender sender(rank, op, routing, sets, rows, send);
  const bool ok = sets.fill(rank, routing, first_expert);
  if (!op.start_send(ok)) return;
  sender.run(items, fetched, &plans[threadIdx.x / kWarp]);
  op.complete(true);
}

// Waits for the signals of all sources: of those of other nodes, that they have been forwarded.
// What this rank has forwarded to itself is waited for as if its source had written it: that is who
// is late. Whole block, a barrier behind it. False, on some threads: the wait was given up.
__device__ bool wait_for_sources(const HierarchicalView& rank, const HierarchicalOp& op,
                                 uint32_t* sources) {
  bool ok = true;
  for (uint32_t r = threadIdx.x; r < rank.layout.config().num_ranks && ok; r += blockDim.x) {
    const uint32_t forwarder = rank.nodes.forwarder_here(r);
    const uint32_t writer = forwarder == rank.self_rank ? r : forwarder;
    const auto* word = at<uint64_t>(op.self(), rank.layout.signal(op.bank(), Phase::kDispatch, r));
    ok = op.take_signal(word, writer, blockIdx.x == 0, &sources[r]);
  }
  return ok;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    hierarchical_dispatch_recv(const __grid_constant__ HierarchicalView rank,
                               const __grid_constant__ ForwardingRecvParams params) {
  extern __shared__ uint32_t shared[];
  __shared__ Forwarder::Plan plans[kWarps];
  ptx::touch(rank);
  ptx::touch(params);
  const HierarchicalOp op(rank, Phase::kDispatch, false, true, [] {});
  if (!__syncthreads_and(op.may_receive())) return;
  // Before anything is waited for that other ranks forward.
  const Forwarder forwarder(rank, op, shared, params.forwarded, &plans[threadIdx.x / kWarp]);
  if (!forwarder.run()) return;
  const Arrivals arrivals(shared, rank.layout.config().num_ranks, rank.num_local_experts);
  const DispatchReceiver<HierarchicalView> receiver(rank, op, params.recv, arrivals);
  const bool ok = wait_for_sources(rank, op, arrivals.sources.words);
  receiver.receive_all(ok);
}

}  // namespace

void prepare_hierarchical_dispatch() {
  Launch::prepare(hierarchical_dispatch_send<CopyRow>);
  Launch::prepare(hierarchical_dispatch_send<QuantizeRow<__nv_bfloat16>>);
  Launch::prepare(hierarchical_dispatch_send<QuantizeRow<float>>);
  Launch::prepare(hierarchical_dispatch_recv);
}

namespace {

uint64_t send_shared_bytes(const protocol::MultiNodeLayout& layout, uint32_t num_tokens) {
  return TokenSets::num_bytes(layout.config().low_latency, num_tokens);
}
uint64_t recv_shared_bytes(const protocol::MultiNodeLayout& layout) {
  const auto& partition = layout.base().partition();
  return std::max(Forwarder::num_bytes(layout),
                  Arrivals::num_bytes(partition.num_ranks, partition.num_max_local_experts()));
}

}  // namespace

uint64_t hierarchical_dispatch_shared_bytes(const protocol::MultiNodeLayout& layout) {
  const uint32_t num_tokens = layout.config().low_latency.num_max_tokens_per_rank;
  return std::max(send_shared_bytes(layout, num_tokens), recv_shared_bytes(layout));
}

void launch_dispatch_send(const HierarchicalView& rank, const DispatchSendParams& send,
                          const Launch& launch) {
  with_rows(rank.layout, send, [&](auto rows) {
    launch.run(hierarchical_dispatch_send<decltype(rows)>,
               send_shared_bytes(rank.multi_node, send.num_tokens), rank, rows, send);
  });
}

void launch_dispatch_recv(const HierarchicalView& rank, const ForwardingRecvParams& recv,
                          const Launch& launch) {
  launch.run(hierarchical_dispatch_recv, recv_shared_bytes(rank.multi_node), rank, recv);
}

}  // namespace ep::nvshmem
