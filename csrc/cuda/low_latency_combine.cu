// Combine on a GPU; the meaning is in csrc/cpu/low_latency_combine.cpp. Every product and every sum
// is rounded on its own, in the same order as there: the bits are the same.
//
// send: a warp looks up a message's rows, then the block sums those of all its warps' messages, one
//       after the other, into the sources' outcomes.
// recv: every block waits for all signals, then adds up the partial rows of its tokens.

#include <cuda_bf16.h>

#include "cuda/launch.cuh"
#include "cuda/rank.cuh"

namespace ep::cuda {
namespace {

using protocol::HandleEntry;
using protocol::HandleMessage;

constexpr uint32_t kMaxTopK = protocol::kMaxTopK;
constexpr uint32_t kWarp = 32;
// Messages whose entries a block has looked up and not yet summed: one a warp.
constexpr uint32_t kMaxWarps = 16;

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void store(float* out, float value) { *out = value; }
__device__ void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }

// out[i] = weight(0) * row(0)[i] + weight(1) * row(1)[i] + ..., a block of threads a row. T float
// or bfloat16; Vector as wide as the alignment of a row allows.
template <typename T, typename Vector, typename Row, typename Weight>
__device__ void weighted_sum(std::byte* out, uint32_t num_rows, uint32_t num_vectors, Row row,
                             Weight weight) {
  constexpr uint32_t kWidth = sizeof(Vector) / sizeof(T);
  for (uint32_t i = threadIdx.x; i < num_vectors; i += blockDim.x) {
    float acc[kWidth] = {};
#pragma unroll 4
    for (uint32_t r = 0; r < num_rows; ++r) {
      const Vector vector = reinterpret_cast<const Vector*>(row(r))[i];
      const T* values = reinterpret_cast<const T*>(&vector);
      for (uint32_t c = 0; c < kWidth; ++c) {
        const float product = __fmul_rn(weight(r), to_float(values[c]));
        acc[c] = r == 0 ? product : __fadd_rn(acc[c], product);
      }
    }
    Vector result;
    for (uint32_t c = 0; c < kWidth; ++c) store(reinterpret_cast<T*>(&result) + c, acc[c]);
    reinterpret_cast<Vector*>(out)[i] = result;
  }
}

// What one warp has looked up about one message.
struct AnswerPlan {
  std::byte* out;
  uint32_t num_entries;
  HandleEntry entries[kMaxTopK];
};

template <typename T, typename Vector>
__global__ void combine_send_kernel(const __grid_constant__ RankView rank,
                                    const __grid_constant__ CombineSendParams params) {
  extern __shared__ uint32_t prefix[];  // [R + 1]
  __shared__ AnswerPlan plans[kMaxWarps];
  const LowLatencyLayout& layout = rank.layout;
  const uint32_t num_ranks = layout.config().num_ranks;
  const Op op(rank, Phase::kCombine, Half::kSend);
  if (!op.start_send()) return;
  prefix_sum(params.handle.num_messages, num_ranks, prefix);

  const uint32_t num_warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const uint32_t num_vectors = layout.row_bytes() / sizeof(Vector), total = prefix[num_ranks];
  for (uint32_t first = blockIdx.x; first < total; first += gridDim.x * num_warps) {
    const uint32_t own = first + warp * gridDim.x;
    if (own < total) {
      const HandleMessage message = params.handle.messages[own];
      plans[warp].out = op.peer(source_of(prefix, num_ranks, own)) +
                        layout.outcome(op.bank(), message.outcome_slot);
      plans[warp].num_entries = message.num_entries;
      for (uint32_t j = threadIdx.x % kWarp; j < message.num_entries; j += kWarp) {
        plans[warp].entries[j] = params.handle.entries[message.first_entry + j];
      }
    }
    __syncthreads();
    for (uint32_t w = 0; w < num_warps && first + w * gridDim.x < total; ++w) {
      const AnswerPlan& plan = plans[w];
      weighted_sum<T, Vector>(
          plan.out, plan.num_entries, num_vectors,
          [&](uint32_t r) { return params.expert_out + plan.entries[r].row * layout.row_bytes(); },
          [&](uint32_t r) { return plan.entries[r].weight; });
    }
    __syncthreads();  // the plans are used again
  }
  if (op.is_last_block()) {
    op.publish_signals([&](uint32_t r) { return prefix[r + 1] - prefix[r]; });
  }
}

template <typename T, typename Vector>
__global__ void combine_recv_kernel(const __grid_constant__ RankView rank,
                                    const __grid_constant__ CombineRecvParams params) {
  extern __shared__ uint32_t counts[];  // [R]
  const LowLatencyLayout& layout = rank.layout;
  const Op op(rank, Phase::kCombine, Half::kRecv);
  if (!op.start_recv(counts)) return;

  const uint32_t num_vectors = layout.row_bytes() / sizeof(Vector);
  for (uint32_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    const uint64_t slot = uint64_t{token} * layout.num_outcome_columns();
    weighted_sum<T, Vector>(
        params.out + token * layout.row_bytes(), params.num_partials[token], num_vectors,
        [&](uint32_t column) { return op.self() + layout.outcome(op.bank(), slot + column); },
        [](uint32_t) { return 1.0f; });
  }
  if (op.is_last_block()) op.publish_credits();
}

// Calls `launch` with a value of the payload's type and one of the vector type.
template <typename Function>
void with_types(const LowLatencyLayout& layout, Function&& launch) {
  with_vector(layout.row_bytes(), [&](auto vector) {
    if (layout.config().dtype == protocol::DType::kBFloat16) {
      launch(__nv_bfloat16{}, vector);
    } else if constexpr (sizeof(vector) >= sizeof(float)) {
      launch(float{}, vector);
    }
  });
}

}  // namespace

void launch_combine_send(const RankView& rank, const CombineSendParams& params,
                         const Launch& launch) {
  const size_t shared_bytes = (rank.layout.config().num_ranks + 1) * sizeof(uint32_t);
  with_types(rank.layout, [&](auto value, auto vector) {
    launch.run(combine_send_kernel<decltype(value), decltype(vector)>, shared_bytes, rank, params);
  });
}

void launch_combine_recv(const RankView& rank, const CombineRecvParams& params,
                         const Launch& launch) {
  const size_t shared_bytes = rank.layout.config().num_ranks * sizeof(uint32_t);
  with_types(rank.layout, [&](auto value, auto vector) {
    launch.run(combine_recv_kernel<decltype(value), decltype(vector)>, shared_bytes, rank, params);
  });
}

}  // namespace ep::cuda
