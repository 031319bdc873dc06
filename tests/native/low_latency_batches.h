// What a seed of stress_low_latency_gpu.cpp draws: a shape, the program that all ranks run, and
// their batches, with room for what the CPU's kernels make of them and what a GPU's do.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "protocol/multi_node_layout.h"
#include "stress_gpu.h"

namespace ep::stress {

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

// In workspaces: a dispatch without a combine is done with when the next one comes.
const Program kAlone{{Step::kDispatch, 0},   {Step::kHook, 0},     {Step::kDispatch, 1},
                     {Step::kHook, 1},       {Step::kDispatch, 2}, {Step::kHook, 2},
                     {Step::kDispatch, 3},   {Step::kHook, 3},     {Step::kCombine, 3},
                     {Step::kCombineHook, 3}};

// By GPUs only.
const Program kDamaged{{Step::kDispatch, 0}, {Step::kDamage, 0}, {Step::kHook, 0}};

enum class Kind : uint32_t { kFlat, kHierarchical, kOneHost, kWorkspaces };
constexpr uint32_t kNumKinds = 4;

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
  Status status = Status::kOk;  // that all ranks report, but one that ends

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
    if (shape.is_one_host()) {
      const uint32_t num_tokens = shape.config.num_max_tokens_per_rank;
      shape.ranks_per_node = num_ranks;
      shape.config.transfer = static_cast<protocol::Transfer>(random.below(3));
      shape.config.num_max_tagged_tokens = random.one_of({0, num_tokens / 2, num_tokens});
      shape.is_fused = random.below(2) == 1;
      if (shape.is_fused) shape.program = &kLoop;
      if (random.below(6) == 0) shape.config.num_ranks = shape.ranks_per_node = 1;
    }
    if (kind == Kind::kWorkspaces) shape.draw_workspaces(random);
    return shape;
  }
  // Rows by expert are added up at home, and rank-major rows are not. Two workspaces are not enough
  // for dispatches ahead of their combines.
  void draw_workspaces(Random& random) {
    if (program == &kAhead) program = &kTurns;
    if (random.below(2) == 0) program = &kAlone;
    const bool is_by_expert = random.below(3) == 0;
    output = is_by_expert ? OutputLayout::kExpertMajor : OutputLayout::kRankMajor;
    config.num_workspaces = program == &kTurns ? 2 : 1 + random.below(2);
    config.reduction = is_by_expert ? Reduction::kSource : Reduction::kRank;
    config.transfer = is_by_expert || random.below(2) == 0 ? protocol::Transfer::kPull
                                                           : protocol::Transfer::kPullPush;
    config.combine_dtype = config.dtype;
    config.global_expert_ids = !is_by_expert && random.below(2) == 1;
  }
  bool is_source() const { return config.reduction == Reduction::kSource; }
  bool is_one_host() const { return kind == Kind::kOneHost || kind == Kind::kWorkspaces; }
  bool is_hierarchical() const { return kind == Kind::kHierarchical; }
  protocol::Nodes nodes() const { return {config.num_ranks, ranks_per_node}; }
  protocol::MultiNodeConfig multi_node() const { return {config, ranks_per_node, true}; }
  // The CPU's kernels always push, tag nothing, and have no workspaces.
  protocol::LowLatencyConfig of_cpu() const {
    protocol::LowLatencyConfig of_cpu = config;
    of_cpu.transfer = protocol::Transfer::kPush;
    of_cpu.num_max_tagged_tokens = 0;
    of_cpu.num_workspaces = 0;
    of_cpu.global_expert_ids = false;
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
  int32_t workspace = -1;
  uint32_t num_slots = 0;
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
            out.workspace,
            out.num_slots};
  }
  protocol::DispatchRecvParams recv(const Outputs& out) const {
    return {output,     out.recv_x,        out.recv_scales,
            out.counts, out.recv_topk_idx, out.recv_topk_weights,
            out.handle, out.workspace,     out.num_slots};
  }
  protocol::CombineSendParams send_home(const Outputs& out) const {
    return {y, out.handle, out.workspace, out.num_slots};
  }
  protocol::CombineRecvParams recv_home(const Outputs& out) const {
    return {out.out,      num_tokens,    out.num_partials, out.answers,
            topk_weights, out.workspace, out.num_slots};
  }
};

using Operations = std::vector<std::vector<std::unique_ptr<Batch>>>;  // by operation, then rank

// Into a workspace, with as many slots as the largest batch has tokens, or more.
inline void place(Random& random, const Shape& shape, uint64_t op,
                  const std::vector<std::unique_ptr<Batch>>& operation) {
  uint32_t num_slots = 1;
  for (const auto& batch : operation) num_slots = std::max(num_slots, batch->num_tokens);
  num_slots += random.below(shape.config.num_max_tokens_per_rank - num_slots + 1);
  for (const auto& batch : operation) {
    batch->seen.workspace = static_cast<int32_t>(op % shape.config.num_workspaces);
    batch->seen.num_slots = num_slots;
  }
}

inline Operations draw_operations(Random& random, const Shape& shape) {
  const protocol::LowLatencyLayout layout(shape.config);
  Operations operations(kNumOps);
  for (auto& operation : operations) {
    for (uint32_t r = 0; r < shape.config.num_ranks; ++r) {
      operation.push_back(std::make_unique<Batch>(random, shape, layout, r));
    }
    if (shape.config.num_workspaces > 0)
      place(random, shape, &operation - operations.data(), operation);
  }
  return operations;
}

}  // namespace ep::stress
