// The low-latency kernels of GPUs, over a network (csrc/nvshmem/{dispatch,combine}.cu and
// hierarchical_*.cu) and on one host (csrc/cuda/low_latency_*.cu, without workspaces), compiled for
// a CPU by the headers in gpu_on_cpu/, beside those of csrc/cpu: the same batches, the same bits. A
// seed decides on the shape, the program that all ranks run, the batches, and what the network
// delivers next.
//
//   stress_low_latency_gpu FIRST_SEED NUM_SEEDS
//   stress_low_latency_gpu damage     a message that names a place far behind all others is refused
//   stress_low_latency_gpu stop       a rank ends before each step; the others give up, none hangs
#include <algorithm>
#include <memory>
#include <string>
#include <thread>

#include "cpu/multi_node.h"
#include "nvshmem/hierarchical_launch.cuh"
#include "stress_gpu.h"

namespace ep::cuda {

void launch_dispatch_send(const RankView&, const DispatchSendParams&, const Launch&);
void launch_dispatch_recv(const RankView&, const DispatchRecvParams&, const Launch&);
void launch_dispatch(const RankView&, const DispatchSendParams&, const DispatchRecvParams&,
                     const Launch&);
void launch_combine_send(const RankView&, const CombineSendParams&, const Launch&);
void launch_combine_recv(const RankView&, const CombineRecvParams&, const Launch&);
void launch_combine(const RankView&, const CombineSendParams&, const CombineRecvParams&,
                    const Launch&);

}  // namespace ep::cuda

namespace {

using namespace ep;
using namespace ep::stress;
using protocol::OutputLayout;
using protocol::Reduction;
using protocol::ScaleFormat;

constexpr uint32_t kNumOps = 4;

struct Step {
  enum { kDispatch, kDamage, kHook, kCombine, kCombineHook } what;
  uint32_t op;
};
using Program = std::vector<Step>;
const Program kLoop{
    {Step::kDispatch, 0}, {Step::kHook, 0}, {Step::kCombine, 0}, {Step::kCombineHook, 0},
    {Step::kDispatch, 1}, {Step::kHook, 1}, {Step::kCombine, 1}, {Step::kCombineHook, 1},
    {Step::kDispatch, 2}, {Step::kHook, 2}, {Step::kCombine, 2}, {Step::kCombineHook, 2},
    {Step::kDispatch, 3}, {Step::kHook, 3}, {Step::kCombine, 3}, {Step::kCombineHook, 3}};
// With two banks. Two micro-batches; dispatches ahead of their combines.
const Program kTurns{{Step::kDispatch, 0},    {Step::kDispatch, 1}, {Step::kHook, 0},
                     {Step::kCombine, 0},     {Step::kHook, 1},     {Step::kCombine, 1},
                     {Step::kCombineHook, 0}, {Step::kDispatch, 2}, {Step::kCombineHook, 1},
                     {Step::kDispatch, 3},    {Step::kHook, 2},     {Step::kCombine, 2},
                     {Step::kHook, 3},        {Step::kCombine, 3},  {Step::kCombineHook, 2},
                     {Step::kCombineHook, 3}};
const Program kAhead{{Step::kDispatch, 0},    {Step::kDispatch, 1},    {Step::kHook, 0},
                     {Step::kDispatch, 2},    {Step::kHook, 1},        {Step::kDispatch, 3},
                     {Step::kHook, 2},        {Step::kHook, 3},        {Step::kCombine, 0},
                     {Step::kCombine, 1},     {Step::kCombineHook, 0}, {Step::kCombine, 2},
                     {Step::kCombineHook, 1}, {Step::kCombine, 3},     {Step::kCombineHook, 2},
                     {Step::kCombineHook, 3}};

// By GPUs only: an error ends it.
const Program kDamaged{{Step::kDispatch, 0}, {Step::kDamage, 0}, {Step::kHook, 0}};

enum class Kind : uint32_t { kFlat, kHierarchical, kOneHost };

struct Shape {
  protocol::LowLatencyConfig config;  // of one host
  uint32_t ranks_per_node;
  Kind kind;
  bool is_quantized;
  bool is_fused;  // one host: hooks are one kernel with their sends
  OutputLayout output;
  const Program* program;
  uint32_t num_steps_of_first = ~0u;  // then rank 0 ends
  uint64_t timeout_ns = kTimeoutNs;

  static Shape draw(Random& random, Kind kind) {
    const uint32_t per_node = random.one_of({1, 2, 2, 3});
    const uint32_t num_nodes = per_node == 3 ? 2 : random.one_of({2, 3});
    const uint32_t num_ranks = per_node * num_nodes;
    const bool is_float8 = random.below(2) == 1, is_combine_float8 = random.below(3) == 0;
    const DType dtype = random.below(2) == 1 ? DType::kBFloat16 : DType::kFloat32;
    Shape shape = {};
    shape.config = {num_ranks,
                    num_ranks + random.below(8),
                    random.one_of({1, 3, 7, 7, 7, 34}),
                    16 * (1 + random.below(70)),
                    random.one_of({1, 3, 4, 8, 8, 8, 34}),
                    1 + random.below(3),
                    dtype,
                    is_float8 ? DType::kFloat8E4M3 : dtype,
                    static_cast<ScaleFormat>(is_float8 ? random.below(3) : 0)};
    shape.config.combine_dtype = is_combine_float8 ? DType::kFloat8E4M3 : dtype;
    shape.ranks_per_node = per_node;
    shape.kind = kind;
    shape.is_quantized = is_float8 && random.below(2) == 1;
    shape.output = random.below(3) == 0 ? OutputLayout::kRankMajor : OutputLayout::kExpertMajor;
    const bool may_be_source =
        kind != Kind::kHierarchical && shape.output == OutputLayout::kExpertMajor;
    shape.config.reduction =
        may_be_source && random.below(2) == 1 ? Reduction::kSource : Reduction::kRank;
    const Program* programs[] = {&kLoop, &kTurns, &kAhead};
    shape.program = programs[shape.config.num_banks == 1 ? 0 : random.below(3)];
    if (kind == Kind::kOneHost) {
      const uint32_t num_tokens = shape.config.num_max_tokens_per_rank;
      shape.ranks_per_node = num_ranks;
      shape.config.transfer = static_cast<protocol::Transfer>(random.below(2));
      shape.config.num_max_tagged_tokens = random.one_of({0, num_tokens / 2, num_tokens});
      shape.is_fused = random.below(2) == 1;
      if (shape.is_fused) shape.program = &kLoop;
    }
    return shape;
  }
  bool is_source() const { return config.reduction == Reduction::kSource; }
  bool is_hierarchical() const { return kind == Kind::kHierarchical; }
  protocol::Nodes nodes() const { return {config.num_ranks, ranks_per_node}; }
  protocol::MultiNodeConfig multi_node() const { return {config, ranks_per_node, true}; }
  // The CPU's kernels always push, and tag nothing.
  protocol::LowLatencyConfig of_cpu() const {
    protocol::LowLatencyConfig of_cpu = config;
    of_cpu.transfer = protocol::Transfer::kPush;
    of_cpu.num_max_tagged_tokens = 0;
    return of_cpu;
  }
  protocol::LowLatencyConfig packed() const {
    protocol::LowLatencyConfig packed = config;
    packed.packs_messages = true;
    return packed;
  }
};

// What no kernel may read before one has written it.
template <typename T>
T* undefined_array(size_t count) {
  T* array = shared_array<T>(count);
  std::memset(static_cast<void*>(array), 0xee, count * sizeof(T));
  return array;
}

// What one kind of kernels keeps and makes of an operation on one rank.
struct Outputs {
  uint32_t *num_partials, *answers;
  std::byte* recv_x;
  uint32_t* recv_scales;
  int32_t *counts, *recv_topk_idx;
  float* recv_topk_weights;
  protocol::HandleView handle;
  uint32_t* num_forwarded;
  protocol::ForwardedMessage* forwarded;
  std::byte* out;
  // Of what has come.
  uint64_t num_rows;

  Outputs(const Shape& shape, const protocol::LowLatencyLayout& layout, uint32_t num_tokens) {
    const protocol::LowLatencyConfig& config = shape.config;
    const uint64_t num_slots = layout.expert_capacity(), num_remote = shape.nodes().num_remote();
    const uint64_t num_local = layout.partition().num_max_local_experts();
    num_rows = shape.output == OutputLayout::kRankMajor ? num_slots : num_local * num_slots;
    num_partials = undefined_array<uint32_t>(num_tokens);
    answers = undefined_array<uint32_t>(uint64_t{num_tokens} * layout.num_answer_words());
    recv_x = shared_array<std::byte>(num_rows * layout.dispatch_row_bytes());
    recv_scales = shared_array<uint32_t>(num_rows * layout.num_scale_words());
    counts = undefined_array<int32_t>(num_local);
    recv_topk_idx = shared_array<int32_t>(num_slots * config.top_k);
    recv_topk_weights = shared_array<float>(num_slots * config.top_k);
    handle = {undefined_array<uint32_t>(config.num_ranks),
              undefined_array<protocol::HandleMessage>(num_slots),
              undefined_array<protocol::HandleEntry>(num_slots * config.top_k)};
    num_forwarded = undefined_array<uint32_t>(num_remote);
    forwarded =
        undefined_array<protocol::ForwardedMessage>(num_remote * config.num_max_tokens_per_rank);
    out = undefined_array<std::byte>(num_tokens * layout.row_bytes());
  }
};

struct Batch {
  uint32_t num_tokens;
  std::byte *x, *y;  // y: what experts write, wherever they have rows
  float* x_scales = nullptr;
  int64_t* topk_idx;
  float* topk_weights;
  bool is_quantized;
  OutputLayout output;
  bool is_source;
  Outputs expected, seen;

  Batch(Random& random, const Shape& shape, const protocol::LowLatencyLayout& layout, uint32_t rank)
      : num_tokens(random.below(4) == 0 ? 0
                                        : random.below(shape.config.num_max_tokens_per_rank + 1)),
        is_quantized(shape.is_quantized),
        output(shape.output),
        is_source(shape.is_source()),
        expected(shape, layout, num_tokens),
        seen(shape, layout, num_tokens) {
    const protocol::LowLatencyConfig& config = shape.config;
    const uint64_t num_routes = uint64_t{num_tokens} * config.top_k;
    if (is_quantized) {
      x = draw_float8(random, config.hidden, num_tokens);
      x_scales = draw_scales(uint64_t{num_tokens} * layout.num_scales());
    } else {
      x = draw_rows(random, config.dtype, config.hidden, num_tokens, 3.0f);
    }
    topk_idx = draw_experts(random, config.num_experts, num_routes);
    topk_weights = draw_floats(random, num_routes);
    // In which order a token's rows are added shows.
    const float size = rank % 2 == 1 ? 1000.0f : 0.3f;
    y = draw_rows(random, config.dtype, config.hidden, seen.num_rows, size);
  }

  protocol::DispatchSendParams send(const Outputs& out) const {
    return {x,
            is_quantized,
            x_scales,
            topk_idx,
            true,
            is_source ? nullptr : topk_weights,
            num_tokens,
            out.num_partials,
            out.answers,
            -1,
            0};
  }
  protocol::DispatchRecvParams recv(const Outputs& out) const {
    return {output,
            out.recv_x,
            out.recv_scales,
            out.counts,
            out.recv_topk_idx,
            out.recv_topk_weights,
            out.handle,
            -1,
            0};
  }
  protocol::CombineSendParams send_home(const Outputs& out) const { return {y, out.handle, -1}; }
  protocol::CombineRecvParams recv_home(const Outputs& out) const {
    return {out.out, num_tokens, out.num_partials, out.answers, topk_weights, -1, 0};
  }
};

using Operations = std::vector<std::vector<std::unique_ptr<Batch>>>;  // by operation, then rank

// --- csrc/cpu ------------------------------------------------------------------------------------

OpResult run_step(cpu::LowLatencyRank& kernels, uint32_t what, const Batch& batch) {
  const Outputs& out = batch.expected;
  if (what == Step::kDispatch) return kernels.dispatch_send(batch.send(out));
  if (what == Step::kHook) return kernels.dispatch_recv(batch.recv(out));
  if (what == Step::kCombine) return kernels.combine_send(batch.send_home(out));
  return kernels.combine_recv(batch.recv_home(out));
}
OpResult run_step(cpu::MultiNodeRank& kernels, uint32_t what, const Batch& batch) {
  const Outputs& out = batch.expected;
  const cpu::MultiNodeRank::Forwarded forwarded = {out.num_forwarded, out.forwarded};
  if (what == Step::kDispatch) return kernels.dispatch_send(batch.send(out));
  if (what == Step::kHook) return kernels.dispatch_recv(batch.recv(out), forwarded);
  if (what == Step::kCombine) return kernels.combine_send(batch.send_home(out), forwarded);
  return kernels.combine_recv(batch.recv_home(out));
}

// The flat kernels over a network have the bits of those on one host.
bool run_on_cpu(const Shape& shape, const Operations& operations, uint64_t seed) {
  const uint32_t num_ranks = shape.config.num_ranks;
  const uint64_t num_bytes = shape.is_hierarchical()
                                 ? protocol::MultiNodeLayout(shape.multi_node()).num_bytes()
                                 : protocol::LowLatencyLayout(shape.of_cpu()).num_bytes();
  const std::vector<std::byte*> bases = memory_of(num_ranks, protocol::align_up(num_bytes, 128));
  auto network = std::make_shared<cpu::Network>(shape.nodes(), seed, 0);
  network->start_thread();
  std::vector<char> ok(num_ranks);
  auto run_program = [&](auto& kernels, uint32_t rank) {
    ok[rank] = 1;
    for (const Step& step : *shape.program) {
      ok[rank] &=
          report("the CPU's", rank, run_step(kernels, step.what, *operations[step.op][rank]));
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const cpu::WaitPolicy policy = {kTimeoutNs, 0, nullptr};
      if (shape.is_hierarchical()) {
        cpu::MultiNodeRank kernels(shape.multi_node(), rank, bases, policy, network);
        run_program(kernels, rank);
      } else {
        cpu::LowLatencyRank kernels(shape.of_cpu(), rank, bases, policy);
        run_program(kernels, rank);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::count(ok.begin(), ok.end(), 1) == num_ranks;
}

// --- csrc/nvshmem --------------------------------------------------------------------------------

cuda::RankView base_view(const Shape& shape, const protocol::LowLatencyLayout& layout,
                         uint32_t rank, const std::vector<std::byte*>& bases, uint32_t num_blocks) {
  const uint32_t num_ranks = shape.config.num_ranks;
  auto** of_node = shared_array<std::byte*>(num_ranks);
  cuda::RankView view = {layout, rank, bases[rank]};
  for (uint32_t r = 0; r < num_ranks; ++r) {
    of_node[r] = shape.nodes().share_node(rank, r) ? bases[r] : nullptr;
    if (r < cuda::kNumNearRanks) view.near_bases[r] = of_node[r];
  }
  view.bases = of_node;
  view.state = shared_array<cuda::RankState>(1);
  view.wait_ns = shared_array<uint64_t>(protocol::kNumPhases * protocol::kNumHalves * num_ranks);
  view.num_expert_rows = shared_array<uint64_t>(layout.partition().num_max_local_experts());
  view.report = shared_array<cuda::HostReport>(1);
  view.timeout_ns = shape.timeout_ns;
  view.owners = cuda::Owners(layout.partition());
  view.num_local_experts = layout.partition().num_local_experts(rank);
  view.share = cuda::kProgressPerOp / num_blocks;
  view.first_share = cuda::kProgressPerOp - view.share * (num_blocks - 1);
  return view;
}
int32_t* own_numbers(uint32_t num_ranks) {
  auto* pes = shared_array<int32_t>(num_ranks);
  for (uint32_t r = 0; r < num_ranks; ++r) pes[r] = static_cast<int32_t>(r);
  return pes;
}

// This rank's first message to itself.
void damage(const nvshmem::NetworkView& view) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const uint32_t bank = protocol::bank_of(1, view.layout.config().num_banks);
    auto* message = view.self_base + view.layout.header(bank, view.self_rank, 0);
    reinterpret_cast<protocol::MessageHeader*>(message)->outcome_slot = ~0u;
  }
  gpu_on_cpu::meet_all();
}
// One thread of one block.
void run_step(const nvshmem::NetworkView& view, uint32_t what, const Batch& batch) {
  const cuda::Launch launch;
  const Outputs& out = batch.seen;
  if (what == Step::kDispatch) return launch_dispatch_send(view, batch.send(out), launch);
  if (what == Step::kDamage) return damage(view);
  if (what == Step::kHook) return launch_dispatch_recv(view, batch.recv(out), launch);
  if (what == Step::kCombine) return launch_combine_send(view, batch.send_home(out), launch);
  launch_combine_recv(view, batch.recv_home(out), launch);
}
struct OneHostView : cuda::RankView {
  bool is_fused;
};
void run_step(const OneHostView& view, uint32_t what, const Batch& batch) {
  const cuda::Launch launch;
  const Outputs& out = batch.seen;
  if (view.is_fused) {
    if (what == Step::kHook) launch_dispatch(view, batch.send(out), batch.recv(out), launch);
    if (what != Step::kCombineHook) return;
    return launch_combine(view, batch.send_home(out), batch.recv_home(out), launch);
  }
  if (what == Step::kDispatch) return launch_dispatch_send(view, batch.send(out), launch);
  if (what == Step::kHook) return launch_dispatch_recv(view, batch.recv(out), launch);
  if (what == Step::kCombine) return launch_combine_send(view, batch.send_home(out), launch);
  launch_combine_recv(view, batch.recv_home(out), launch);
}
void run_step(const nvshmem::HierarchicalView& view, uint32_t what, const Batch& batch) {
  const cuda::Launch launch;
  const Outputs& out = batch.seen;
  const nvshmem::Forwarded forwarded = {out.num_forwarded, out.forwarded};
  if (what == Step::kDispatch) return launch_dispatch_send(view, batch.send(out), launch);
  if (what == Step::kHook) return launch_dispatch_recv(view, {batch.recv(out), forwarded}, launch);
  if (what == Step::kCombine) {
    return launch_combine_send(view, {batch.send_home(out), forwarded}, launch);
  }
  launch_combine_recv(view, batch.recv_home(out), launch);
}

// `make_view(rank, bases)`.
template <typename MakeView>
bool run_on_gpu(const Shape& shape, uint64_t num_bytes, const Operations& operations,
                uint32_t num_blocks, uint64_t seed, MakeView make_view) {
  const uint32_t num_ranks = shape.config.num_ranks;
  const std::vector<std::byte*> bases = memory_of(num_ranks, num_bytes);
  std::vector<decltype(make_view(0, bases))> views;
  for (uint32_t r = 0; r < num_ranks; ++r) views.push_back(make_view(r, bases));
  bool ok = gpu_on_cpu::run_blocks(bases, num_blocks, cuda::kThreads, seed, [&](uint32_t rank) {
    uint32_t num_steps = 0;
    for (const Step& step : *shape.program) {
      if (rank == 0 && num_steps++ == shape.num_steps_of_first) return;
      run_step(views[rank], step.what, *operations[step.op][rank]);
    }
  });
  if (!ok) std::fprintf(stderr, "stress: a block was ended by a signal\n");
  for (uint32_t r = 0; r < num_ranks; ++r) {
    const OpResult& result = views[r].report->result;
    if (shape.num_steps_of_first != ~0u) {
      ok &= r == 0 || result.status == Status::kTimeout;
    } else if (shape.program == &kDamaged) {
      ok &= result.status == Status::kCorrupt;
    } else {
      ok &= report("the GPU's", r, result);
    }
  }
  return ok;
}

bool run_flat(const Shape& shape, const Operations& operations, uint32_t num_blocks,
              uint64_t seed) {
  const protocol::LowLatencyLayout layout(shape.packed());
  const protocol::NetworkLayout network(layout);
  const uint32_t num_ranks = shape.config.num_ranks;
  const uint32_t num_words = shape.config.num_banks * protocol::kNumPhases * num_ranks;
  return run_on_gpu(
      shape, network.num_bytes(), operations, num_blocks, seed,
      [&](uint32_t rank, const std::vector<std::byte*>& bases) {
        return nvshmem::NetworkView{
            {base_view(shape, layout, rank, bases, num_blocks), own_numbers(num_ranks)},
            network,
            shared_array<uint64_t>(num_words)};
      });
}

bool run_on_one_host(const Shape& shape, const Operations& operations, uint32_t num_blocks,
                     uint64_t seed) {
  const protocol::LowLatencyLayout layout(shape.config);
  return run_on_gpu(shape, layout.num_bytes(), operations, num_blocks, seed,
                    [&](uint32_t rank, const std::vector<std::byte*>& bases) {
                      return OneHostView{base_view(shape, layout, rank, bases, num_blocks),
                                         shape.is_fused};
                    });
}

bool run_hierarchical(const Shape& shape, const Operations& operations, uint32_t num_blocks,
                      uint64_t seed) {
  const protocol::MultiNodeLayout layout(shape.multi_node());
  const protocol::NodeNetworkLayout network(layout);
  const uint32_t num_remote = layout.nodes().num_remote();
  const uint32_t num_words = shape.config.num_banks * num_remote;
  const uint64_t num_messages = uint64_t{num_words} * shape.config.num_max_tokens_per_rank;
  return run_on_gpu(shape, network.num_bytes(), operations, num_blocks, seed,
                    [&](uint32_t rank, const std::vector<std::byte*>& bases) {
                      const nvshmem::Forwarded answered = {
                          shared_array<uint32_t>(num_words),
                          shared_array<protocol::ForwardedMessage>(num_messages)};
                      return nvshmem::HierarchicalView{
                          {base_view(shape, layout.base(), rank, bases, num_blocks),
                           own_numbers(shape.config.num_ranks)},
                          layout,
                          network,
                          {layout.nodes(), rank},
                          shared_array<uint64_t>(num_words * protocol::kNumPhases),
                          shared_array<uint32_t>(num_remote),
                          answered};
                    });
}

bool run_kind(const Shape& shape, const Operations& operations, uint32_t num_blocks,
              uint64_t seed) {
  if (shape.kind == Kind::kOneHost) return run_on_one_host(shape, operations, num_blocks, seed);
  if (shape.is_hierarchical()) return run_hierarchical(shape, operations, num_blocks, seed);
  return run_flat(shape, operations, num_blocks, seed);
}

// --- both ----------------------------------------------------------------------------------------

bool compare(const Shape& shape, const protocol::LowLatencyLayout& layout, uint32_t op,
             uint32_t rank, const Batch& batch) {
  bool ok = true;
  const Outputs &a = batch.expected, &b = batch.seen;
  auto same = [&](const char* what, const void* expected, const void* seen, uint64_t num_bytes) {
    ok &= is_same(rank, op, what, expected, seen, num_bytes);
  };
  same("rows", a.recv_x, b.recv_x, a.num_rows * layout.dispatch_row_bytes());
  same("scales", a.recv_scales, b.recv_scales, a.num_rows * layout.num_scale_words() * 4);
  same("counts", a.counts, b.counts, layout.partition().num_local_experts(rank) * 4);
  same("sums", a.out, b.out, batch.num_tokens * layout.row_bytes());
  if (shape.output == OutputLayout::kRankMajor) {
    const uint64_t num_listed = a.num_rows * shape.config.top_k;
    same("experts", a.recv_topk_idx, b.recv_topk_idx, num_listed * 4);
    same("weights", a.recv_topk_weights, b.recv_topk_weights, num_listed * 4);
  }
  return ok;
}

Operations draw_operations(Random& random, const Shape& shape) {
  const protocol::LowLatencyLayout layout(shape.config);
  Operations operations(kNumOps);
  for (auto& operation : operations) {
    for (uint32_t r = 0; r < shape.config.num_ranks; ++r) {
      operation.push_back(std::make_unique<Batch>(random, shape, layout, r));
    }
  }
  return operations;
}

bool run_seed(uint64_t seed) {
  Random random(seed);
  const Shape shape = Shape::draw(random, static_cast<Kind>(seed % 3));
  const protocol::LowLatencyLayout layout(shape.config);
  const uint32_t num_ranks = shape.config.num_ranks, num_blocks = 1 + random.below(3);
  const Operations operations = draw_operations(random, shape);
  bool ok = run_on_cpu(shape, operations, seed) && run_kind(shape, operations, num_blocks, seed);
  for (uint32_t op = 0; ok && op < kNumOps; ++op) {
    for (uint32_t r = 0; r < num_ranks; ++r) {
      ok &= compare(shape, layout, op, r, *operations[op][r]);
    }
  }
  return ok;
}

bool run_damaged(Reduction reduction) {
  Random random(1);
  Shape shape = Shape::draw(random, Kind::kFlat);
  shape.config.num_ranks = 2, shape.config.num_experts = 2, shape.config.reduction = reduction;
  shape.ranks_per_node = 1, shape.program = &kDamaged;
  shape.output = OutputLayout::kExpertMajor;
  const protocol::LowLatencyLayout layout(shape.config);
  Operations operations(1);
  for (uint32_t r = 0; r < 2; ++r) {
    std::unique_ptr<Batch> batch;
    do {
      batch = std::make_unique<Batch>(random, shape, layout, r);
    } while (batch->num_tokens == 0);
    batch->topk_idx[0] = r;
    operations[0].push_back(std::move(batch));
  }
  return run_kind(shape, operations, 1, 1);
}

// Four ranks on two nodes; rank 0 ends before each step of its first operation, and behind it.
bool run_stopped(Kind kind) {
  bool ok = true;
  for (uint32_t num_steps = 0; ok && num_steps <= 4; ++num_steps) {
    Random random(num_steps);
    Shape shape = Shape::draw(random, kind);
    shape.config.num_ranks = 4, shape.ranks_per_node = 2, shape.program = &kLoop;
    shape.num_steps_of_first = num_steps, shape.timeout_ns = 300'000'000;
    ok = run_kind(shape, draw_operations(random, shape), 2, num_steps);
    if (!ok) std::fprintf(stderr, "stress: rank 0 took %u steps\n", num_steps);
  }
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc == 2 ? argv[1] : "";
  if (what == "damage") {
    return run_damaged(Reduction::kRank) && run_damaged(Reduction::kSource) ? 0 : 1;
  }
  if (what == "stop") return run_stopped(Kind::kFlat) && run_stopped(Kind::kHierarchical) ? 0 : 1;
  return run_seeds("stress_low_latency_gpu", argc, argv, run_seed);
}
