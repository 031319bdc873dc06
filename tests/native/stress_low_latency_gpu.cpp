// The low-latency kernels of GPUs, over a network (csrc/nvshmem/{dispatch,combine}.cu and
// hierarchical_*.cu) and on one host (csrc/cuda/low_latency_*.cu, and workspace_*.cu), compiled for
// a CPU by the headers in gpu_on_cpu/, beside those of csrc/cpu: the same batches, the same bits. A
// seed decides on the shape, the program that all ranks run, the batches, and what the network
// delivers next.
//
//   stress_low_latency_gpu FIRST_SEED NUM_SEEDS
//   stress_low_latency_gpu damage     a message that names a place far behind all others is refused
//   stress_low_latency_gpu stop       a rank ends before each step; the others give up, none hangs
//   stress_low_latency_gpu slots      ranks that do not agree on a workspace's slots are told
#include <algorithm>
#include <memory>
#include <string>
#include <thread>

#include "cpu/multi_node.h"
#include "nvshmem/hierarchical_launch.cuh"
#include "stress_one_host.h"

namespace {

using namespace ep;
using namespace ep::stress;

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
    if (shape.status == Status::kOk) {
      ok &= report("the GPU's", r, result);
    } else if (r > 0 || shape.num_steps_of_first == ~0u) {
      ok &= result.status == shape.status;
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
  const uint32_t num_workspaces = shape.config.num_workspaces;
  const uint32_t num_counts = num_workspaces * (shape.config.num_ranks + 1);
  return run_on_gpu(shape, layout.num_bytes(), operations, num_blocks, seed,
                    [&](uint32_t rank, const std::vector<std::byte*>& bases) {
                      OneHostView view = {base_view(shape, layout, rank, bases, num_blocks),
                                          shape.is_fused};
                      view.workspace_dispatches = shared_array<uint64_t>(num_workspaces);
                      view.workspace_counts = shared_array<uint32_t>(num_counts);
                      return view;
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
  if (shape.is_one_host()) return run_on_one_host(shape, operations, num_blocks, seed);
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
  const bool has_counts = shape.config.num_workspaces == 0 || layout.has_expert_workspaces();
  if (has_counts)
    same("counts", a.counts, b.counts, layout.partition().num_local_experts(rank) * 4);
  same("sums", a.out, b.out, batch.num_tokens * layout.row_bytes());
  if (shape.output == OutputLayout::kRankMajor) {
    const uint64_t num_listed = a.num_rows * shape.config.top_k;
    same("experts", a.recv_topk_idx, b.recv_topk_idx, num_listed * 4);
    same("weights", a.recv_topk_weights, b.recv_topk_weights, num_listed * 4);
  }
  return ok;
}

bool run_seed(uint64_t seed) {
  Random random(seed);
  const Shape shape = Shape::draw(random, static_cast<Kind>(seed % kNumKinds));
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
  shape.ranks_per_node = 1, shape.program = &kDamaged, shape.status = Status::kCorrupt;
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

// Four ranks, on two nodes or one; rank 0 ends before each step of its first operation, and behind
// it.
bool run_stopped(Kind kind) {
  bool ok = true;
  for (uint32_t num_steps = 0; ok && num_steps <= 4; ++num_steps) {
    Random random(num_steps);
    Shape shape = Shape::draw(random, kind);
    shape.config.num_ranks = 4, shape.ranks_per_node = shape.is_one_host() ? 4 : 2;
    shape.program = &kLoop, shape.status = Status::kTimeout;
    shape.num_steps_of_first = num_steps, shape.timeout_ns = 300'000'000, shape.is_fused = false;
    ok = run_kind(shape, draw_operations(random, shape), 2, num_steps);
    if (!ok) std::fprintf(stderr, "stress: rank 0 took %u steps\n", num_steps);
  }
  return ok;
}

// Two ranks that were told of other slots of a workspace, of which both have enough. (Of one kernel
// each way, one may be told and end before it has told the other.)
bool run_of_other_slots(OutputLayout output, uint32_t num_max_tagged_tokens) {
  Random random(1);
  Shape shape = Shape::draw(random, Kind::kWorkspaces);
  shape.config.num_ranks = shape.ranks_per_node = 2, shape.config.num_workspaces = 1;
  shape.config.num_max_tokens_per_rank = 7;
  shape.config.num_max_tagged_tokens = num_max_tagged_tokens;
  shape.output = output;
  shape.config.reduction =
      output == OutputLayout::kRankMajor ? Reduction::kRank : Reduction::kSource;
  shape.program = &kLoop, shape.is_fused = false, shape.status = Status::kCorrupt;
  Operations operations = draw_operations(random, shape);
  for (const auto& operation : operations) {
    for (uint32_t r = 0; r < 2; ++r) {
      operation[r]->num_tokens = std::min(operation[r]->num_tokens, 6u);
      operation[r]->seen.num_slots = 6 + r;
    }
  }
  return run_kind(shape, operations, 2, 1);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc == 2 ? argv[1] : "";
  if (what == "damage") {
    return run_damaged(Reduction::kRank) && run_damaged(Reduction::kSource) ? 0 : 1;
  }
  if (what == "stop") {
    const Kind kinds[] = {Kind::kFlat, Kind::kHierarchical, Kind::kWorkspaces};
    return std::all_of(std::begin(kinds), std::end(kinds), run_stopped) ? 0 : 1;
  }
  if (what == "slots") {
    return run_of_other_slots(OutputLayout::kRankMajor, 0) &&
                   run_of_other_slots(OutputLayout::kRankMajor, 7) &&
                   run_of_other_slots(OutputLayout::kExpertMajor, 0)
               ? 0
               : 1;
  }
  return run_seeds("stress_low_latency_gpu", argc, argv, run_seed);
}
