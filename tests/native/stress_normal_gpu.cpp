// The normal kernels that GPUs run between nodes (csrc/nvshmem/normal_*.cu), compiled for a CPU by
// the headers in gpu_on_cpu/, beside those of csrc/cpu: the same batches, the same bits. A seed
// decides on the shape, the batches, and what the network delivers next.
//
//   stress_normal_gpu FIRST_SEED NUM_SEEDS
#include <algorithm>
#include <memory>
#include <string>

#include "cpu/normal_nodes.h"
#include "nvshmem/normal_op.cuh"
#include "stress_gpu.h"

namespace {

using namespace stress;
using protocol::ScaleFormat;

constexpr uint32_t kNumOps = 2;
constexpr uint64_t kAnyRows = uint64_t{1} << 30;

struct Shape {
  protocol::NormalNodeConfig config;
  bool with_weights, is_quantized;
  uint32_t num_biases;

  static Shape draw(Random& random) {
    const uint32_t per_node = random.one_of({1, 2}), num_nodes = random.one_of({2, 3});
    const uint32_t num_ranks = per_node * num_nodes;
    const bool is_float8 = random.below(2) == 1;
    const DType dtype = random.below(2) == 1 ? DType::kBFloat16 : DType::kFloat32;
    Shape shape = {};
    shape.config.normal = {num_ranks,
                           num_ranks + random.below(8),
                           16 * (1 + random.below(70)),
                           random.one_of({1, 3, 4, 8}),
                           dtype,
                           is_float8 ? DType::kFloat8E4M3 : dtype,
                           static_cast<ScaleFormat>(is_float8 ? random.below(3) : 0),
                           random.one_of({3, 5, 16})};
    shape.config.ranks_per_node = per_node;
    shape.with_weights = random.below(2) == 1;
    shape.is_quantized = is_float8 && random.below(2) == 1;
    shape.num_biases = random.below(3);
    return shape;
  }
  const protocol::NormalConfig& normal() const { return config.normal; }
};

std::byte* draw_rows(Random& random, const Shape& shape, uint64_t num_rows, float size) {
  return draw_rows(random, shape.normal().dtype, shape.normal().hidden, num_rows, size);
}

// What comes of an operation on one rank.
struct Outputs {
  std::byte* recv_x;
  uint32_t* recv_scales;
  int32_t* recv_topk_idx;
  float* recv_topk_weights;
  int32_t* recv_src_tokens;
  std::byte* out;
  float* out_weights;

  Outputs(const Shape& shape, const protocol::NormalLayout& layout, uint64_t num_rows,
          uint64_t num_tokens)
      : recv_x(shared_array<std::byte>(num_rows * layout.dispatch_row_bytes())),
        recv_scales(shared_array<uint32_t>(num_rows * layout.num_scale_words())),
        recv_topk_idx(shared_array<int32_t>(num_rows * shape.normal().top_k)),
        recv_topk_weights(shared_array<float>(num_rows * shape.normal().top_k)),
        recv_src_tokens(shared_array<int32_t>(num_rows)),
        out(shared_array<std::byte>(num_tokens * layout.row_bytes())),
        out_weights(shared_array<float>(num_tokens * shape.normal().top_k)) {}
};

// An operation on one rank: a dispatch, the same again with its routing, a combine.
struct Batch {
  uint32_t num_tokens;
  std::byte* x;
  float* x_scales = nullptr;
  int64_t* topk_idx;
  float* topk_weights;
  std::byte* bias[2] = {};
  // Of what has come: what goes home.
  uint64_t num_rows = 0;
  std::byte* y = nullptr;
  float* y_weights = nullptr;
  std::vector<uint64_t> num_recv_tokens_per_expert;
  std::unique_ptr<Outputs> expected, seen;
  // The GPU's.
  nvshmem::NodeRoutes routes;
  int32_t* expert_counts;

  Batch(Random& random, const Shape& shape, const protocol::NormalNodeLayout& layout)
      : num_tokens(random.below(4) == 0 ? 0 : random.below(24)) {
    const protocol::NormalConfig& config = shape.normal();
    const uint32_t top_k = config.top_k, num_ranks = config.num_ranks;
    const uint32_t num_remote = layout.nodes().num_remote();
    if (shape.is_quantized) {
      x = draw_float8(random, config.hidden, num_tokens);
      x_scales = draw_scales(uint64_t{num_tokens} * layout.base().num_scales());
    } else {
      x = draw_rows(random, shape, num_tokens, 3.0f);
    }
    topk_idx = draw_experts(random, config.num_experts, uint64_t{num_tokens} * top_k);
    topk_weights = draw_floats(random, uint64_t{num_tokens} * top_k);
    for (uint32_t i = 0; i < shape.num_biases; ++i) {
      bias[i] = draw_rows(random, shape, num_tokens, 100.0f);
    }
    const uint32_t num_rounds =
        (num_tokens + config.num_tokens_per_round - 1) / config.num_tokens_per_round;
    const uint32_t num_columns = layout.base().num_max_messages_per_token();
    routes = {num_tokens,
              shared_array<uint64_t>(num_tokens),
              shared_array<uint32_t>(uint64_t{num_tokens} * num_columns),
              shared_array<uint32_t>(uint64_t{num_tokens} * std::min(top_k, num_remote)),
              shared_array<uint32_t>(uint64_t{num_rounds} * (num_ranks + num_remote)),
              shared_array<uint32_t>(uint64_t{2} * num_ranks)};
    expert_counts = shared_array<int32_t>(layout.base().partition().num_max_local_experts());
  }
};

using Operations = std::vector<std::vector<std::unique_ptr<Batch>>>;  // by operation, then rank

// --- csrc/cpu ------------------------------------------------------------------------------------

// One operation; also draws what goes home.
bool run_on_cpu(cpu::NormalNodeRank& kernels, const Shape& shape,
                const protocol::NormalLayout& layout, uint32_t rank, Batch& batch, Random random) {
  const uint32_t num_ranks = shape.normal().num_ranks, top_k = shape.normal().top_k;
  std::vector<uint32_t> num_messages(batch.num_tokens);
  std::vector<uint32_t> messages(batch.num_tokens * layout.num_max_messages_per_token());
  std::vector<uint64_t> num_rows(num_ranks);
  batch.num_recv_tokens_per_expert.resize(layout.partition().num_local_experts(rank));
  const protocol::SendRoutes routes = {batch.num_tokens, num_messages.data(), messages.data()};
  uint64_t num_rounds = 0;
  bool ok =
      report("the CPU's", rank,
             kernels.exchange_counts({batch.topk_idx, true, routes, &num_rounds, num_rows.data(),
                                      batch.num_recv_tokens_per_expert.data()}));
  for (uint64_t count : num_rows) batch.num_rows += count;
  std::vector<uint32_t> per_round(num_rounds * num_ranks);
  const protocol::RecvRows rows = {num_rounds, num_rows.data(), per_round.data()};
  for (auto* outputs : {&batch.expected, &batch.seen}) {
    *outputs = std::make_unique<Outputs>(shape, layout, batch.num_rows, batch.num_tokens);
  }
  const Outputs& out = *batch.expected;
  ok = ok &&
       report("the CPU's", rank,
              kernels.dispatch({batch.x, shape.is_quantized, batch.x_scales, false, batch.topk_idx,
                                true, batch.topk_weights, routes, rows, out.recv_x, out.recv_scales,
                                out.recv_topk_idx, out.recv_topk_weights, out.recv_src_tokens}));
  // In which order a token's rows are added shows.
  batch.y = draw_rows(random, shape, batch.num_rows, rank % 2 == 1 ? 1000.0f : 0.3f);
  batch.y_weights = draw_floats(random, batch.num_rows * top_k);
  return ok && report("the CPU's", rank,
                      kernels.combine({batch.y,
                                       shape.with_weights,
                                       batch.y_weights,
                                       {batch.bias[0], batch.bias[1]},
                                       routes,
                                       rows,
                                       out.out,
                                       out.out_weights}));
}

bool run_on_cpu(const Shape& shape, const protocol::NormalNodeLayout& layout,
                const Operations& operations, uint64_t seed) {
  const uint32_t num_ranks = shape.normal().num_ranks;
  std::vector<std::byte*> bases;
  for (uint32_t r = 0; r < num_ranks; ++r) {
    bases.push_back(gpu_on_cpu::guarded_memory(protocol::align_up(layout.num_bytes(), 128)));
  }
  auto network = std::make_shared<cpu::Network>(layout.nodes(), seed, 0);
  network->start_thread();
  std::vector<char> ok(num_ranks);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      cpu::NormalNodeRank kernels(shape.config, rank, bases, {kTimeoutNs, 0, nullptr}, network);
      ok[rank] = 1;
      for (uint32_t op = 0; op < kNumOps; ++op) {
        const Random random(seed * 1000 + op * num_ranks + rank);
        ok[rank] &= run_on_cpu(kernels, shape, layout.base(), rank, *operations[op][rank], random);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::count(ok.begin(), ok.end(), 1) == num_ranks;
}

// --- csrc/nvshmem --------------------------------------------------------------------------------

nvshmem::NodeRankView view_of(const Shape& shape, const protocol::NormalNetworkLayout& layout,
                              uint32_t rank, const std::vector<std::byte*>& bases) {
  const uint32_t num_ranks = shape.normal().num_ranks;
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
          shared_array<uint32_t>(shape.normal().num_experts),
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
void run_kernels(const nvshmem::NodeRankView& view, const Shape& shape, const Batch& batch) {
  const cuda::Launch launch;
  const Outputs& out = *batch.seen;
  const nvshmem::NodeCounts counts = {batch.topk_idx,      true, batch.routes,
                                      batch.expert_counts, 0,    kAnyRows};
  nvshmem::NodeDispatch dispatch = {batch.x,
                                    shape.is_quantized,
                                    batch.x_scales,
                                    false,
                                    batch.topk_idx,
                                    true,
                                    batch.topk_weights,
                                    batch.routes,
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
  pthread_barrier_wait(gpu_on_cpu::block.grid);
  dispatch.is_cached = true;
  dispatch.recv_topk_idx = dispatch.recv_src_tokens = nullptr;
  dispatch.recv_topk_weights = nullptr;
  nvshmem::launch_node_dispatch(view, dispatch, launch);
  nvshmem::launch_node_combine(view,
                               {batch.y,
                                shape.with_weights,
                                batch.y_weights,
                                {batch.bias[0], batch.bias[1]},
                                batch.routes,
                                out.recv_src_tokens,
                                out.out,
                                out.out_weights},
                               launch);
}

bool run_on_gpu(const Shape& shape, const protocol::NormalNetworkLayout& layout,
                const Operations& operations, uint32_t num_blocks, uint64_t seed) {
  const uint32_t num_ranks = shape.normal().num_ranks;
  std::vector<std::byte*> bases;
  for (uint32_t r = 0; r < num_ranks; ++r) {
    bases.push_back(gpu_on_cpu::guarded_memory(layout.num_bytes()));
  }
  std::vector<nvshmem::NodeRankView> views;
  for (uint32_t r = 0; r < num_ranks; ++r) views.push_back(view_of(shape, layout, r, bases));
  bool ok = gpu_on_cpu::run_blocks(bases, num_blocks, nvshmem::kNodeThreads, seed, [&](uint32_t r) {
    for (uint32_t op = 0; op < kNumOps; ++op) run_kernels(views[r], shape, *operations[op][r]);
  });
  if (!ok) std::fprintf(stderr, "stress: a block was ended by a signal\n");
  for (uint32_t r = 0; r < num_ranks; ++r) ok &= report("the GPU's", r, views[r].report->result);
  return ok;
}

// --- both ----------------------------------------------------------------------------------------

bool compare(const Shape& shape, const protocol::NormalLayout& layout, uint32_t op, uint32_t rank,
             const Batch& batch) {
  bool ok = true;
  const uint64_t top_k = shape.normal().top_k;
  const Outputs &a = *batch.expected, &b = *batch.seen;
  auto same = [&](const char* what, const void* expected, const void* seen, uint64_t num_bytes) {
    ok &= is_same(rank, op, what, expected, seen, num_bytes);
  };
  same("rows", a.recv_x, b.recv_x, batch.num_rows * layout.dispatch_row_bytes());
  same("scales", a.recv_scales, b.recv_scales, batch.num_rows * layout.num_scale_words() * 4);
  same("experts", a.recv_topk_idx, b.recv_topk_idx, batch.num_rows * top_k * 4);
  same("weights", a.recv_topk_weights, b.recv_topk_weights, batch.num_rows * top_k * 4);
  same("tokens", a.recv_src_tokens, b.recv_src_tokens, batch.num_rows * 4);
  same("sums", a.out, b.out, batch.num_tokens * layout.row_bytes());
  if (shape.with_weights) {
    same("sums of weights", a.out_weights, b.out_weights, batch.num_tokens * top_k * 4);
  }
  const auto& counts = batch.num_recv_tokens_per_expert;
  if (!std::equal(counts.begin(), counts.end(), batch.expert_counts)) {
    std::fprintf(stderr, "stress: rank %u, operation %u: wrong counts\n", rank, op);
    ok = false;
  }
  return ok;
}

bool run_seed(uint64_t seed) {
  Random random(seed);
  const Shape shape = Shape::draw(random);
  const protocol::NormalNetworkLayout layout(shape.config);
  const uint32_t num_ranks = shape.normal().num_ranks, num_blocks = 1 + random.below(3);
  Operations operations(kNumOps);
  for (auto& operation : operations) {
    for (uint32_t r = 0; r < num_ranks; ++r) {
      operation.push_back(std::make_unique<Batch>(random, shape, layout.nodes()));
    }
  }
  bool ok = run_on_cpu(shape, layout.nodes(), operations, seed) &&
            run_on_gpu(shape, layout, operations, num_blocks, seed);
  for (uint32_t op = 0; ok && op < kNumOps; ++op) {
    for (uint32_t r = 0; r < num_ranks; ++r) {
      ok &= compare(shape, layout.nodes().base(), op, r, *operations[op][r]);
    }
  }
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  return stress::run_seeds("stress_normal_gpu", argc, argv, run_seed);
}
