// Combine between nodes, each node's sum of a token once; the meaning is in
// csrc/cpu/multi_node_combine.cpp.

#include "nvshmem/hierarchical_launch.cuh"
#include "nvshmem/hierarchical_sums.cuh"

namespace ep::nvshmem {
namespace {

using namespace cuda;

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    hierarchical_combine_send(const __grid_constant__ HierarchicalView rank,
                              const __grid_constant__ ForwardedSendParams params) {
  extern __shared__ uint32_t shared[];
  __shared__ SumPlan plans[kWarps];
  const Sources received(shared, rank.layout.config().num_ranks);
  ptx::touch(rank);
  ptx::touch(params);
  const HierarchicalOp op(rank, Phase::kCombine, true, false,
                          [&] { received.read(params.send.handle.num_messages); });
  const NodeCombiner<Rows> combiner(rank, op, &plans[threadIdx.x / kWarp]);
  received.count_up();
  if (!op.start_send(true)) return;
  combiner.send(params, received);
  op.complete(true);
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    hierarchical_combine_recv(const __grid_constant__ HierarchicalView rank,
                              const __grid_constant__ CombineRecvParams recv) {
  extern __shared__ uint32_t shared[];
  __shared__ SumPlan plans[kWarps];
  ptx::touch(rank);
  ptx::touch(recv);
  const HierarchicalOp op(rank, Phase::kCombine, false, true, [] {});
  const NodeCombiner<Rows> combiner(rank, op, &plans[threadIdx.x / kWarp]);
  bool ok = op.may_receive() && combiner.wait_for_neighbours();
  if (!__syncthreads_and(ok)) return;
  // All that needs no other node, before those are waited for.
  combiner.add_up_nodes(shared);
  combiner.add_up_neighbours(recv);
  ok = combiner.wait_for_nodes();
  if (!__syncthreads_and(ok)) return;
  combiner.add_up_tokens(recv);
  op.complete(true);
}

template <typename Rows>
void prepare_forms() {
  Launch::prepare(hierarchical_combine_send<Rows>);
  Launch::prepare(hierarchical_combine_recv<Rows>);
}

uint64_t send_shared_bytes(const protocol::LowLatencyLayout& layout) {
  return Sources::num_words(layout.config().num_ranks) * sizeof(uint32_t);
}

}  // namespace

void prepare_hierarchical_combine() {
  prepare_forms<PlainRows<__nv_bfloat16, 2>>();
  prepare_forms<PlainRows<float, 2>>();
  prepare_forms<Float8Rows<__nv_bfloat16>>();
  prepare_forms<Float8Rows<float>>();
}

void launch_combine_send(const HierarchicalView& rank, const ForwardedSendParams& send,
                         const Launch& launch) {
  with_travelling_rows(rank.layout, [&](auto rows) {
    launch.run(hierarchical_combine_send<typename decltype(rows)::type>,
               send_shared_bytes(rank.layout), rank, send);
  });
}

void launch_combine_recv(const HierarchicalView& rank, const CombineRecvParams& recv,
                         const Launch& launch) {
  const uint64_t num_nodes = rank.multi_node.nodes().num_nodes();
  with_travelling_rows(rank.layout, [&](auto rows) {
    launch.run(hierarchical_combine_recv<typename decltype(rows)::type>,
               num_nodes * sizeof(uint32_t), rank, recv);
  });
}

}  // namespace ep::nvshmem
