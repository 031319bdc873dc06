// What the programs have in common that run a GPU's kernels on a CPU (gpu_on_cpu/): what a seed
// draws, and what kernels report.
#pragma once

#include <cstdio>
#include <random>
#include <vector>

#include "cuda_bf16.h"
#include "protocol/op.h"
#include "world.h"

namespace ep::stress {

using gpu_on_cpu::shared_array;
using protocol::DType;
using protocol::OpResult;
using protocol::Status;

constexpr uint64_t kTimeoutNs = 10'000'000'000;

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

// [num_rows, hidden] of float32 or bfloat16.
inline std::byte* draw_rows(Random& random, DType dtype, uint32_t hidden, uint64_t num_rows,
                            float size) {
  const uint64_t count = num_rows * hidden;
  auto* rows = shared_array<std::byte>(count * protocol::element_bytes(dtype));
  for (uint64_t i = 0; i < count; ++i) {
    const float value = random.normal() * size;
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    if (dtype == DType::kFloat32) {
      std::memcpy(rows + 4 * i, &value, 4);
    } else {
      std::memcpy(rows + 2 * i, &rounded, 2);
    }
  }
  return rows;
}

// A batch's rows, where its caller has quantised them: [T, H] and [T, N].
inline std::byte* draw_float8(Random& random, uint32_t hidden, uint32_t num_tokens) {
  const uint64_t count = uint64_t{num_tokens} * hidden;
  auto* rows = shared_array<std::byte>(count);
  for (uint64_t i = 0; i < count; ++i) rows[i] = static_cast<std::byte>(random.below(0x78));
  return rows;
}
inline float* draw_scales(uint64_t count) {
  auto* scales = shared_array<float>(count);
  for (uint64_t i = 0; i < count; ++i) scales[i] = std::ldexp(1.0f, -int(i % 9));
  return scales;
}

// [T, K], from a part of the experts; some are -1.
inline int64_t* draw_experts(Random& random, uint32_t num_experts, uint64_t count) {
  auto* topk_idx = shared_array<int64_t>(count);
  const uint32_t first = random.below(num_experts), span = 1 + random.below(num_experts);
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t expert = (first + random.below(span)) % num_experts;
    topk_idx[i] = random.below(5) == 0 ? -1 : int64_t{expert};
  }
  return topk_idx;
}
inline float* draw_floats(Random& random, uint64_t count) {
  auto* floats = shared_array<float>(count);
  for (uint64_t i = 0; i < count; ++i) floats[i] = random.normal();
  return floats;
}

// Of each rank.
inline std::vector<std::byte*> memory_of(uint32_t num_ranks, uint64_t num_bytes) {
  std::vector<std::byte*> bases(num_ranks);
  for (std::byte*& base : bases) base = gpu_on_cpu::guarded_memory(num_bytes);
  return bases;
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

// Whether the bytes are the same; says what is not.
inline bool is_same(uint32_t rank, uint32_t op, const char* what, const void* a, const void* b,
                    uint64_t num_bytes) {
  if (std::memcmp(a, b, num_bytes) == 0) return true;
  std::fprintf(stderr, "stress: rank %u, operation %u: wrong %s\n", rank, op, what);
  return false;
}

// Of a program FIRST_SEED NUM_SEEDS: `run(seed)` for each, until one fails. In a process of its
// own, with which its memory goes.
template <typename Run>
int run_seeds(const char* name, int argc, char** argv, Run run) {
  if (argc != 3) return 2;
  const uint64_t first = std::stoull(argv[1]), count = std::stoull(argv[2]);
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const pid_t process = fork();
    if (process == 0) _exit(run(seed) ? 0 : 1);
    int status = 0;
    waitpid(process, &status, 0);
    if (status == 0) continue;
    std::fprintf(stderr, "stress: seed %llu\n", static_cast<unsigned long long>(seed));
    return 1;
  }
  std::printf("%s: ok\n", name);
  return 0;
}

}  // namespace ep::stress
