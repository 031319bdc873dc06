// Batches for the normal kernels that GPUs run, compiled for a CPU, and what csrc/cpu's kernels
// make of them: the same bits are expected.
#pragma once

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>

#include "cpu/normal.h"
#include "cuda_bf16.h"
#include "world.h"

namespace ep::stress {

using gpu_on_cpu::shared_array;
using protocol::DType;
using protocol::OpResult;
using protocol::ScaleFormat;
using protocol::Status;

constexpr uint32_t kNumOps = 2;
constexpr uint64_t kTimeoutNs = 10'000'000'000;
constexpr uint64_t kAnyRows = uint64_t{1} << 30;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>(engine_() % limit); }
  uint32_t one_of(const std::vector<uint32_t>& values) {
    return values[below(static_cast<uint32_t>(values.size()))];
  }
  float normal() { return normal_(engine_); }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

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
  const uint64_t count = num_rows * shape.normal.hidden;
  auto* rows = shared_array<std::byte>(count * shape.element_bytes());
  for (uint64_t i = 0; i < count; ++i) {
    const float value = random.normal() * size;
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    if (shape.normal.dtype == DType::kFloat32) {
      std::memcpy(rows + 4 * i, &value, 4);
    } else {
      std::memcpy(rows + 2 * i, &rounded, 2);
    }
  }
  return rows;
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
      const uint64_t num_values = uint64_t{num_tokens} * config.hidden;
      const uint64_t num_scales = uint64_t{num_tokens} * layout.num_scales();
      x = shared_array<std::byte>(num_values);
      for (uint64_t i = 0; i < num_values; ++i) x[i] = static_cast<std::byte>(random.below(0x78));
      x_scales = shared_array<float>(num_scales);
      for (uint64_t i = 0; i < num_scales; ++i) x_scales[i] = std::ldexp(1.0f, -int(i % 9));
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

inline bool report(const char* whose, uint32_t rank, const OpResult& result) {
  if (result.status == Status::kOk) return true;
  const protocol::FlightRecord& record = result.record;
  std::fprintf(stderr,
               "stress: rank %u, %s kernels: status %u, peer %d, phase %u, half %u, epoch %llu, "
               "expected %llu, saw %llu\n",
               rank, whose, static_cast<uint32_t>(result.status), record.peer_rank,
               static_cast<uint32_t>(record.phase), static_cast<uint32_t>(record.half),
               static_cast<unsigned long long>(record.epoch),
               static_cast<unsigned long long>(record.expected),
               static_cast<unsigned long long>(record.seen));
  return false;
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
  std::vector<std::byte*> bases;
  for (uint32_t r = 0; r < num_ranks; ++r) {
    bases.push_back(gpu_on_cpu::guarded_memory(protocol::align_up(num_bytes, 128)));
  }
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
    if (std::memcmp(a, b, num_bytes) == 0) return;
    std::fprintf(stderr, "stress: rank %u, operation %u: wrong %s\n", rank, op, what);
    ok = false;
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

// `run_seed(seed)` for the seeds that are asked for. What the program returns.
template <typename RunSeed>
int run_seeds(int argc, char** argv, const char* name, RunSeed run_seed) {
  if (argc != 3) return 2;
  const uint64_t first = std::stoull(argv[1]), count = std::stoull(argv[2]);
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const bool ok = run_seed(seed);
    gpu_on_cpu::free_guarded_memory();
    if (ok) continue;
    std::fprintf(stderr, "stress: seed %llu\n", static_cast<unsigned long long>(seed));
    return 1;
  }
  std::printf("%s: ok\n", name);
  return 0;
}

}  // namespace ep::stress
