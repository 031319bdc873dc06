// The normal kernels that GPUs run between nodes (csrc/nvshmem/normal_*.cu), compiled for a CPU by
// the headers in gpu_on_cpu/, beside those of csrc/cpu: the same batches, the same bits. A seed
// decides on the shape, the batches, and what the network delivers next.
//
//   stress_normal_nodes FIRST_SEED NUM_SEEDS
#include "cpu/normal_nodes.h"
#include "normal_batches.h"
#include "nvshmem/normal_op.cuh"

namespace {

using namespace ep;
using namespace ep::stress;

bool run_on_cpu(const Shape& shape, const protocol::NormalNodeConfig& config,
                const Operations& operations, uint64_t seed) {
  const protocol::NormalNodeLayout layout(config);
  auto network = std::make_shared<cpu::Network>(layout.nodes(), seed, 0);
  network->start_thread();
  auto make = [&](uint32_t rank, const std::vector<std::byte*>& bases) {
    const cpu::WaitPolicy policy = {kTimeoutNs, 0, nullptr};
    return std::make_unique<cpu::NormalNodeRank>(config, rank, bases, policy, network);
  };
  return run_on_cpu(shape, layout.base(), layout.num_bytes(), operations, seed, make);
}

nvshmem::NodeRoutes routes_of(const Shape& shape, const protocol::NormalNodeLayout& layout,
                              const Batch& batch) {
  const uint32_t num_tokens = batch.num_tokens, per_round = shape.normal.num_tokens_per_round;
  const uint32_t num_rounds = (num_tokens + per_round - 1) / per_round;
  const uint32_t num_remote = layout.nodes().num_remote(), num_ranks = shape.normal.num_ranks;
  const uint32_t num_columns = layout.base().num_max_messages_per_token();
  return {num_tokens,
          shared_array<uint64_t>(num_tokens),
          shared_array<uint32_t>(uint64_t{num_tokens} * num_columns),
          shared_array<uint32_t>(uint64_t{num_tokens} * std::min(shape.normal.top_k, num_remote)),
          shared_array<uint32_t>(uint64_t{num_rounds} * (num_ranks + num_remote)),
          shared_array<uint32_t>(uint64_t{2} * num_ranks)};
}

nvshmem::NodeRankView view_of(const Shape& shape, const protocol::NormalNetworkLayout& layout,
                              uint32_t rank, const std::vector<std::byte*>& bases) {
  const uint32_t num_ranks = shape.normal.num_ranks;
  const protocol::Nodes& nodes = layout.nodes().nodes();
  const auto& partition = layout.nodes().base().partition();
  auto** of_node = shared_array<std::byte*>(num_ranks);
  auto* pes = shared_array<int32_t>(num_ranks);
  for (uint32_t r = 0; r < num_ranks; ++r) {
    of_node[r] = nodes.share_node(rank, r) ? bases[r] : nullptr;
    pes[r] = static_cast<int32_t>(r);
  }
  return {layout,
          {nodes, rank},
          rank,
          bases[rank],
          of_node,
          pes,
          shared_array<nvshmem::NodeState>(1),
          shared_array<uint64_t>(layout.num_arrivals()),
          shared_array<uint32_t>(shape.normal.num_experts),
          shared_array<uint64_t>(num_ranks),
          shared_array<uint32_t>(size_t{nvshmem::kRoundsInFlight} * nodes.num_remote() *
                                 nodes.ranks_per_node),
          shared_array<cuda::HostReport>(1),
          nullptr,
          kTimeoutNs,
          cuda::Owners(partition),
          partition.num_local_experts(rank)};
}

// One thread of one block.
void run_kernels(const nvshmem::NodeRankView& view, const nvshmem::NodeRoutes& routes,
                 const Shape& shape, const Batch& batch) {
  const cuda::Launch launch;
  const Outputs& out = *batch.seen;
  const nvshmem::NodeCounts counts = {batch.topk_idx,      true, routes,
                                      batch.expert_counts, 0,    kAnyRows};
  nvshmem::NodeDispatch dispatch = {batch.x,
                                    shape.is_quantized,
                                    batch.x_scales,
                                    false,
                                    batch.topk_idx,
                                    true,
                                    batch.topk_weights,
                                    routes,
                                    out.recv_x,
                                    out.recv_scales,
                                    out.recv_topk_idx,
                                    out.recv_topk_weights,
                                    out.recv_src_tokens,
                                    batch.num_rows};
  nvshmem::launch_node_counts(view, counts, launch);
  nvshmem::launch_node_dispatch(view, dispatch, launch);
  if (blockIdx.x == 0 && threadIdx.x == 0) {  // the rows must come again
    const uint64_t row_bytes = view.layout.nodes().base().dispatch_row_bytes();
    std::memset(out.recv_x, 0, batch.num_rows * row_bytes);
  }
  gpu_on_cpu::meet_all();
  dispatch.is_cached = true;
  dispatch.recv_topk_idx = dispatch.recv_src_tokens = nullptr;
  dispatch.recv_topk_weights = nullptr;
  nvshmem::launch_node_dispatch(view, dispatch, launch);
  nvshmem::launch_node_combine(view,
                               {batch.y,
                                shape.with_weights,
                                batch.y_weights,
                                {batch.bias[0], batch.bias[1]},
                                routes,
                                out.recv_src_tokens,
                                out.out,
                                out.out_weights},
                               launch);
}

bool run_on_gpu(const Shape& shape, const protocol::NormalNetworkLayout& layout,
                const Operations& operations, uint32_t num_blocks, uint64_t seed) {
  const uint32_t num_ranks = shape.normal.num_ranks;
  const std::vector<std::byte*> bases = memory_of(num_ranks, layout.num_bytes());
  std::vector<nvshmem::NodeRankView> views;
  for (uint32_t r = 0; r < num_ranks; ++r) views.push_back(view_of(shape, layout, r, bases));
  std::vector<std::vector<nvshmem::NodeRoutes>> routes(kNumOps);
  for (uint32_t op = 0; op < kNumOps; ++op) {
    for (const auto& batch : operations[op]) {
      routes[op].push_back(routes_of(shape, layout.nodes(), *batch));
    }
  }
  bool ok = gpu_on_cpu::run_blocks(bases, num_blocks, nvshmem::kNodeThreads, seed, [&](uint32_t r) {
    for (uint32_t op = 0; op < kNumOps; ++op) {
      run_kernels(views[r], routes[op][r], shape, *operations[op][r]);
    }
  });
  if (!ok) std::fprintf(stderr, "stress: a block was ended by a signal\n");
  for (uint32_t r = 0; r < num_ranks; ++r) ok &= report("the GPU's", r, views[r].report->result);
  return ok;
}

bool run_seed(uint64_t seed) {
  Random random(seed);
  const uint32_t per_node = random.one_of({1, 2}), num_nodes = random.one_of({2, 3});
  const Shape shape = Shape::draw(random, per_node * num_nodes);
  const protocol::NormalNodeConfig config = {shape.normal, per_node};
  const protocol::NormalNetworkLayout layout(config);
  const protocol::NormalLayout& base = layout.nodes().base();
  const uint32_t num_blocks = 1 + random.below(3);
  const Operations operations = draw_operations(random, shape, base);
  return run_on_cpu(shape, config, operations, seed) &&
         run_on_gpu(shape, layout, operations, num_blocks, seed) &&
         compare(shape, base, operations);
}

}  // namespace

int main(int argc, char** argv) { return run_seeds("stress_normal_nodes", argc, argv, run_seed); }
