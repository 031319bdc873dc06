// The normal kernels that GPUs of one node run (csrc/cuda/normal_*.cu), compiled for a CPU by the
// headers in gpu_on_cpu/, beside those of csrc/cpu: the same batches, the same bits. A seed decides
// on the shape, the batches, the room for rows, and when the copy engine does what it is asked.
//
//   stress_normal_links FIRST_SEED NUM_SEEDS
#include "cuda/host_counts.h"
#include "cuda/normal_launch.cuh"
#include "cuda/normal_rank.cuh"
#include "normal_batches.h"

namespace {

using namespace ep;
using namespace ep::stress;
using cuda::CombineInput;
using cuda::DispatchStart;

constexpr uint32_t kNumThreads = 64;

// How an operation is called on all ranks.
struct Call {
  bool is_exact;   // the host learns the counts first
  bool is_direct;  // all rows have room
  CombineInput input;
};

cuda::NormalView view_of(const protocol::NormalDeviceLayout& layout, uint32_t rank,
                         const std::vector<std::byte*>& bases, uint32_t num_blocks,
                         bool shares_gpu) {
  const protocol::NormalDeviceConfig& config = layout.config();
  auto** table = shared_array<std::byte*>(config.num_ranks);
  std::copy(bases.begin(), bases.end(), table);
  cuda::NormalView view = {layout, rank, bases[rank]};
  std::copy(bases.begin(), bases.end(), view.near_bases);
  view.bases = table;
  view.state = shared_array<cuda::NormalState>(1);
  view.block_rank_counts = shared_array<uint32_t>(num_blocks * config.num_ranks);
  view.expert_counts = shared_array<uint32_t>(config.num_experts);
  view.report = shared_array<cuda::HostReport>(1);
  view.host_counts = shared_array<cuda::HostCounts>(1 + config.num_experts);
  view.timeout_ns = kTimeoutNs;
  view.owners = cuda::Owners(layout.partition());
  view.num_local_experts = layout.partition().num_local_experts(rank);
  view.shares_gpu = shares_gpu;
  return view;
}

cuda::NormalRoutes routes_of(const protocol::NormalDeviceLayout& layout, uint32_t num_tokens) {
  const uint32_t per_round = layout.num_tokens_per_round(), num_ranks = layout.config().num_ranks;
  const uint32_t num_rounds = (num_tokens + per_round - 1) / per_round;
  return {num_tokens,
          shared_array<uint64_t>(uint64_t{num_tokens} * layout.num_max_messages_per_token()),
          shared_array<uint32_t>(uint64_t{num_rounds + 1} * num_ranks),
          shared_array<uint32_t>(uint64_t{num_ranks} * (1 + num_ranks))};
}

// One thread of one block.
void run_kernels(const cuda::NormalView& view, const cuda::NormalRoutes& routes, const Shape& shape,
                 const Batch& batch, const Call& call, uint64_t ticket) {
  const cuda::Launch launch = {};
  const Outputs& out = *batch.seen;
  const bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
  const cuda::NormalOutputs outputs = {out.recv_x,          out.recv_scales,
                                       out.recv_topk_idx,   out.recv_topk_weights,
                                       out.recv_src_tokens, batch.num_rows};
  cuda::NormalDispatch dispatch = {
      batch.x, shape.is_quantized, batch.x_scales, DispatchStart::kRoute, batch.topk_idx,
      true,    batch.topk_weights, routes,         batch.expert_counts};
  dispatch.num_rows = kAnyRows;
  if (call.is_exact) {
    dispatch.ticket = ticket;
    cuda::launch_normal_dispatch(view, dispatch, launch);
    const cuda::HostCounts& host = *view.host_counts;
    if (host.ticket != ticket || host.num_rows != batch.num_rows ||
        (host.is_direct != 0) != call.is_direct) {
      abort();
    }
    dispatch.start = DispatchStart::kResume;
  }
  dispatch.num_rows = batch.num_rows;
  dispatch.may_come_in_rounds = true;
  dispatch.out = outputs;
  if (call.is_exact && call.is_direct) {
    cuda::launch_normal_unpack(view, routes.batch, outputs, launch);
  } else {
    cuda::launch_normal_dispatch(view, dispatch, launch);
  }
  if (is_first) {  // the rows must come again
    std::memset(out.recv_x, 0, batch.num_rows * view.layout.dispatch_row_bytes());
    std::memset(out.recv_scales, 0, batch.num_rows * view.layout.num_scale_words() * 4);
  }
  gpu_on_cpu::meet_all();
  dispatch.start = DispatchStart::kCached;
  dispatch.ticket = 0;
  dispatch.out.recv_topk_idx = dispatch.out.recv_src_tokens = nullptr;
  dispatch.out.recv_topk_weights = nullptr;
  cuda::launch_normal_dispatch(view, dispatch, launch);
  if (is_first && call.input == CombineInput::kCombineRows) {
    std::memcpy(view.self_base + view.layout.combine_row(0), batch.y,
                batch.num_rows * view.layout.row_bytes());
  }
  gpu_on_cpu::meet_all();
  cuda::launch_normal_combine(view,
                              {batch.y,
                               call.input,
                               shape.with_weights,
                               batch.y_weights,
                               {batch.bias[0], batch.bias[1]},
                               routes,
                               out.recv_src_tokens,
                               out.out,
                               out.out_weights},
                              launch);
}

Call draw_call(Random& random, const std::vector<std::unique_ptr<Batch>>& batches,
               uint32_t num_rows) {
  Call call = {random.below(2) == 1, true, CombineInput::kElsewhere};
  for (const auto& batch : batches) call.is_direct = call.is_direct && batch->num_rows <= num_rows;
  if (call.is_direct && random.below(2) == 1) call.input = CombineInput::kCombineRows;
  return call;
}

bool run_on_gpu(Random& random, const Shape& shape, const protocol::NormalDeviceLayout& layout,
                const Operations& operations, uint64_t seed) {
  const uint32_t num_ranks = shape.normal.num_ranks, num_blocks = 1 + random.below(3);
  const bool shares_gpu = random.below(4) == 0;
  const std::vector<std::byte*> bases = memory_of(num_ranks, layout.num_bytes());
  std::vector<cuda::NormalView> views;
  for (uint32_t r = 0; r < num_ranks; ++r) {
    views.push_back(view_of(layout, r, bases, num_blocks, shares_gpu));
  }
  std::vector<std::vector<cuda::NormalRoutes>> routes(kNumOps);
  std::vector<Call> calls;
  for (uint32_t op = 0; op < kNumOps; ++op) {
    calls.push_back(draw_call(random, operations[op], layout.config().num_rows));
    for (const auto& batch : operations[op]) {
      routes[op].push_back(routes_of(layout, batch->num_tokens));
    }
  }
  bool ok = gpu_on_cpu::run_blocks(bases, num_blocks, kNumThreads, seed, [&](uint32_t r) {
    for (uint32_t op = 0; op < kNumOps; ++op) {
      run_kernels(views[r], routes[op][r], shape, *operations[op][r], calls[op], op + 1);
    }
  });
  if (!ok) std::fprintf(stderr, "stress: a block was ended by a signal\n");
  for (uint32_t r = 0; r < num_ranks; ++r) ok &= report("the GPU's", r, views[r].report->result);
  return ok;
}

bool run_seed(uint64_t seed) {
  Random random(seed);
  const Shape shape = Shape::draw(random, 1 + random.below(3));
  const protocol::NormalConfig& config = shape.normal;
  const protocol::NormalLayout base(config);
  const uint32_t num_rows = config.num_ranks * random.one_of({2, 6, 24});
  const protocol::NormalDeviceLayout layout({config.num_ranks, config.num_experts, config.hidden,
                                             config.top_k, config.dtype, config.dispatch_dtype,
                                             config.scale_format, num_rows});
  const Operations operations = draw_operations(random, shape, base);
  auto make = [&](uint32_t rank, const std::vector<std::byte*>& bases) {
    const cpu::WaitPolicy policy = {kTimeoutNs, 0, nullptr};
    return std::make_unique<cpu::NormalRank>(config, rank, bases, policy);
  };
  return run_on_cpu(shape, base, base.num_bytes(), operations, seed, make) &&
         run_on_gpu(random, shape, layout, operations, seed) && compare(shape, base, operations);
}

}  // namespace

int main(int argc, char** argv) { return run_seeds("stress_normal_links", argc, argv, run_seed); }
