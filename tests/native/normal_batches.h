// Batches for the normal kernels that GPUs run, compiled for a CPU, and what csrc/cpu's kernels
// make of them: the same bits are expected.
#pragma once

#include <algorithm>
#include <memory>
#include <string>

#include "cpu/normal.h"
#include "stress_gpu.h"

namespace ep::stress {

using protocol::ScaleFormat;

constexpr uint32_t kNumOps = 2;
constexpr uint64_t kAnyRows = uint64_t{1} << 30;

struct Shape {
  protocol::NormalConfig normal;
  bool with_weights, is_quantized;
  uint32_t num_biases;

  static Shape draw(Random& random, uint32_t num_ranks) {
    const bool is_float8 = random.below(2) == 1;
    const DType dtype = random.below(2) == 1 ? DType::kBFloat16 : DType::kFloat32;
    Shape shape = {};
    shape.normal = {num_ranks,
                    num_ranks + random.below(8),
                    16 * (1 + random.below(random.one_of({70, 300}))),
                    random.one_of({1, 3, 4, 8}),
                    dtype,
                    is_float8 ? DType::kFloat8E4M3 : dtype,
                    static_cast<ScaleFormat>(is_float8 ? random.below(3) : 0),
                    random.one_of({3, 5, 16})};
    shape.with_weights = random.below(2) == 1;
    shape.is_quantized = is_float8 && random.below(2) == 1;
    shape.num_biases = random.below(3);
    return shape;
  }
  uint64_t element_bytes() const { return protocol::element_bytes(normal.dtype); }
};

// Rows of the shape's dtype.
inline std::byte* draw_rows(Random& random, const Shape& shape, uint64_t num_rows, float size) {
  return draw_rows(random, shape.normal.dtype, shape.normal.hidden, num_rows, size);
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
        recv_topk_idx(shared_array<int32_t>(num_rows * shape.normal.top_k)),
        recv_topk_weights(shared_array<float>(num_rows * shape.normal.top_k)),
        recv_src_tokens(shared_array<int32_t>(num_rows)),
        out(shared_array<std::byte>(num_tokens * layout.row_bytes())),
        out_weights(shared_array<float>(num_tokens * shape.normal.top_k)) {}
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
  int32_t* expert_counts;  // as the GPU's kernels have them

  Batch(Random& random, const Shape& shape, const protocol::NormalLayout& layout)
      : num_tokens(random.below(4) == 0 ? 0 : random.below(24)) {
    const protocol::NormalConfig& config = shape.normal;
    const uint32_t top_k = config.top_k;
    if (shape.is_quantized) {
      x = draw_float8(random, config.hidden, num_tokens);
      x_scales = draw_scales(uint64_t{num_tokens} * layout.num_scales());
    } else {
      x = draw_rows(random, shape, num_tokens, 3.0f);
    }
    topk_idx = shared_array<int64_t>(uint64_t{num_tokens} * top_k);
    topk_weights = shared_array<float>(uint64_t{num_tokens} * top_k);
    const uint32_t first = random.below(config.num_experts);
    const uint32_t span = 1 + random.below(config.num_experts);
    for (uint64_t i = 0; i < uint64_t{num_tokens} * top_k; ++i) {
      const uint32_t expert = (first + random.below(span)) % config.num_experts;
      topk_idx[i] = random.below(5) == 0 ? -1 : int64_t{expert};
      topk_weights[i] = random.normal();
    }
    for (uint32_t i = 0; i < shape.num_biases; ++i) {
      bias[i] = draw_rows(random, shape, num_tokens, 100.0f);
    }
    expert_counts = shared_array<int32_t>(layout.partition().num_max_local_experts());
  }
};

using Operations = std::vector<std::vector<std::unique_ptr<Batch>>>;  // by operation, then rank

inline Operations draw_operations(Random& random, const Shape& shape,
                                  const protocol::NormalLayout& layout) {
  Operations operations(kNumOps);
  for (auto& operation : operations) {
    for (uint32_t r = 0; r < shape.normal.num_ranks; ++r) {
      operation.push_back(std::make_unique<Batch>(random, shape, layout));
    }
  }
  return operations;
}

// One operation; also draws what goes home.
template <typename Kernels>
bool run_on_cpu(Kernels& kernels, const Shape& shape, const protocol::NormalLayout& layout,
                uint32_t rank, Batch& batch, Random random) {
  const uint32_t num_ranks = shape.normal.num_ranks, top_k = shape.normal.top_k;
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
  batch.y_weights = shared_array<float>(batch.num_rows * top_k);
  for (uint64_t i = 0; i < batch.num_rows * top_k; ++i) batch.y_weights[i] = random.normal();
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

// All of them. `make(rank, bases)`: a rank's kernels, whose memory has `num_bytes`.
template <typename Make>
bool run_on_cpu(const Shape& shape, const protocol::NormalLayout& layout, uint64_t num_bytes,
                const Operations& operations, uint64_t seed, Make make) {
  const uint32_t num_ranks = shape.normal.num_ranks;
  const std::vector<std::byte*> bases = memory_of(num_ranks, protocol::align_up(num_bytes, 128));
  std::vector<char> ok(num_ranks);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      auto kernels = make(rank, bases);
      ok[rank] = 1;
      for (uint32_t op = 0; op < kNumOps; ++op) {
        const Random random(seed * 1000 + op * num_ranks + rank);
        ok[rank] &= run_on_cpu(*kernels, shape, layout, rank, *operations[op][rank], random);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::count(ok.begin(), ok.end(), 1) == num_ranks;
}

inline bool compare(const Shape& shape, const protocol::NormalLayout& layout, uint32_t op,
                    uint32_t rank, const Batch& batch) {
  bool ok = true;
  const uint64_t top_k = shape.normal.top_k;
  auto same = [&](const char* what, const void* a, const void* b, uint64_t num_bytes) {
    ok &= is_same(rank, op, what, a, b, num_bytes);
  };
  const Outputs &a = *batch.expected, &b = *batch.seen;
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

inline bool compare(const Shape& shape, const protocol::NormalLayout& layout,
                    const Operations& operations) {
  bool ok = true;
  for (uint32_t op = 0; op < kNumOps; ++op) {
    for (uint32_t r = 0; r < shape.normal.num_ranks; ++r) {
      ok &= compare(shape, layout, op, r, *operations[op][r]);
    }
  }
  return ok;
}

}  // namespace ep::stress
