// Rows on their way out of a rank, in chunks in shared memory: as they are, or made float8.
#pragma once

#include <type_traits>

#include "cuda/normal_route.cuh"
#include "cuda/part.cuh"
#include "protocol/scales.h"
#include "ptx/bfloat16.cuh"

namespace ep::cuda::normal {

// What a warp needs to move rows, in shared memory: chunks of them.
struct SendBuffer {
  std::byte* in;      // as loaded
  std::byte* out;     // as it travels
  float* scales;      // of that
  uint64_t* barrier;  // loads arrive here
};

// What is known of rows of any kind: how much of one a warp has at once, and how many warps of a
// block send. Chunks are whole words of scales; where rows are quantised, whole sectors of them,
// too (32 bytes: eight scales).
template <uint32_t kInBytes, uint32_t kOutBytes, uint32_t kScales, uint32_t kWarps>
struct SendShape {
  static constexpr uint32_t kChunkBytes = kInBytes, kNumWarps = kWarps;
  static constexpr bool kIsInPlace = kOutBytes == 0;
  static constexpr uint32_t kSharedBytes = kWarps * (kInBytes + kOutBytes + kScales * 4);
  static_assert(kWarps <= kSendWarps);

  __device__ static SendBuffer buffer(std::byte* shared, uint64_t* barriers) {
    const uint32_t warp = min(threadIdx.x / kWarp, kWarps - 1);  // the others send nothing
    std::byte* in = shared + warp * (kInBytes + kOutBytes);
    auto* scales = reinterpret_cast<float*>(shared + kWarps * (kInBytes + kOutBytes));
    return {in, kIsInPlace ? in : in + kInBytes, scales + warp * kScales, barriers + warp};
  }
};

// Rows that travel as they are: float32, bfloat16, or float8 that the caller has quantised.
//
// A chunk is a bfloat16 row of 7168. 8 SMs that stored 5 rows for each that they loaded moved 571
// GB/s with 14 such warps; those that only store, 489 (H100).
struct CopiedRows : SendShape<14336, 0, 14336 / 128, 14> {
  const std::byte* x;  // [T, H]
  const float* scales;
  uint64_t row_bytes;
  uint32_t num_scales;

  CopiedRows(const std::byte* x, const float* scales, uint64_t row_bytes, uint32_t num_scales)
      : x(x), scales(scales), row_bytes(row_bytes), num_scales(num_scales) {}

  static constexpr uint32_t kBytesPerByte = 1;  // of x, for each that travels

  // Bytes [first, first + num_bytes) of the token's row are in `buffer`: makes of them what
  // travels, and finds the scales of that.
  __device__ void finish(const SendBuffer& buffer, uint32_t token, uint32_t first,
                         uint32_t num_bytes) const {
    if (num_scales == 0) return;
    const float* of_token = scales + uint64_t{token} * num_scales + first / 128;
    for (uint32_t i = threadIdx.x % kWarp; i < protocol::scales_for(num_bytes); i += kWarp) {
      buffer.scales[i] = of_token[i];
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
  }
};

// Rows of T that become float8 on the way. Making them takes SMs as long as sending them: the next
// chunk is loaded while this one leaves. (A fence of all memory behind each chunk, not of shared
// memory alone, took 8 SMs 40 us of 450.)
template <typename T>
struct QuantizedRows : SendShape<8192, 8192 / sizeof(T), 8192 / sizeof(T) / 128, kSendWarps> {
  const std::byte* x;  // [T, H]
  uint64_t row_bytes;
  uint32_t num_scales;
  protocol::ScaleFormat format;

  QuantizedRows(const std::byte* x, uint64_t row_bytes, uint32_t num_scales,
                protocol::ScaleFormat format)
      : x(x), row_bytes(row_bytes), num_scales(num_scales), format(format) {}

  static constexpr uint32_t kBytesPerByte = sizeof(T);

  // 16 bytes of x are a vector; eight of a lane at a time, or four of what is left. Lanes read
  // neighbouring vectors: in a warp's 32, no bank of shared memory twice. (A lane that reads the 32
  // bytes which it makes 16 of takes each bank twice.)
  __device__ void finish(const SendBuffer& buffer, uint32_t, uint32_t, uint32_t num_bytes) const {
    const uint32_t num_vectors = num_bytes / 16;
    uint32_t first = threadIdx.x % kWarp;
#pragma unroll 1
    for (; first / kWarp * kWarp + 8 * kWarp <= num_vectors; first += 8 * kWarp) {
      quantize<8, true>(buffer, first, num_vectors);
    }
#pragma unroll 1
    for (; first / kWarp * kWarp < num_vectors; first += 4 * kWarp) {
      quantize<4, false>(buffer, first, num_vectors);
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
  }

 private:
  static constexpr uint32_t kWidth = sizeof(uint4) / sizeof(T);  // channels of a vector
  static constexpr uint32_t kLanesPerScale = 128 / kWidth;
  // The largest magnitude, NaN left out: of bfloat16, two, of the even channels and of the odd.
  using Largest = std::conditional_t<sizeof(T) == 2, uint32_t, float>;

  // Vectors first, first + 32, ..: kCount of them in a lane, so that lanes which share a scale find
  // one of kCount each. Whole warp.
  template <uint32_t kCount, bool kAreAllThere>
  __device__ void quantize(const SendBuffer& buffer, uint32_t first, uint32_t num_vectors) const {
    const uint32_t lane = threadIdx.x % kWarp;
    const auto* vectors = reinterpret_cast<const uint4*>(buffer.in);
    uint4 inputs[kCount];
    Largest amax[kCount];
#pragma unroll
    for (uint32_t v = 0; v < kCount; ++v) {
      const uint32_t vector = first + v * kWarp;
      inputs[v] = kAreAllThere || vector < num_vectors ? vectors[vector] : uint4{};
      amax[v] = largest(inputs[v]);
    }
    const protocol::Scale own = protocol::scale_for(magnitude(largest_of_sets(amax)), format);
    // A set that has a scale: the last may have fewer vectors than this lane's number in it.
    const uint32_t scale = (first + lane % kCount * kWarp) / kLanesPerScale;
    if (lane % kLanesPerScale < kCount && (kAreAllThere || scale * kLanesPerScale < num_vectors)) {
      buffer.scales[scale] = own.scale;
    }
#pragma unroll
    for (uint32_t v = 0; v < kCount; ++v) {
      const float inverse = __shfl_sync(kAllLanes, own.inverse, v, kCount);
      if (kAreAllThere || first + v * kWarp < num_vectors) {
        write(buffer, first + v * kWarp, inputs[v], inverse);
      }
    }
  }

  __device__ static uint32_t larger(uint32_t a, uint32_t b) { return ptx::max_magnitudes(a, b); }
  __device__ static float larger(float a, float b) { return fmaxf(fabsf(a), fabsf(b)); }
  __device__ static float magnitude(float value) { return fabsf(value); }
  __device__ static float magnitude(uint32_t pair) {
    return larger(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
  }
  __device__ static Largest largest(const uint4& vector) {
    if constexpr (sizeof(T) == 2) {
      return larger(larger(vector.x, vector.y), larger(vector.z, vector.w));
    } else {
      float values[kWidth];
      widen(vector, values);
      return larger(larger(values[0], values[1]), larger(values[2], values[3]));
    }
  }

  // `values[i]` of lanes that share a scale are set i; lane j returns the largest of set j mod
  // kCount.
  template <uint32_t kCount>
  __device__ static Largest largest_of_sets(Largest (&values)[kCount]) {
#pragma unroll
    for (uint32_t half = kCount / 2; half > 0; half /= 2) {
      const bool is_upper = (threadIdx.x & half) != 0;
#pragma unroll
      for (uint32_t i = 0; i < half; ++i) {
        const Largest given = is_upper ? values[i] : values[i + half];
        const Largest kept = is_upper ? values[i + half] : values[i];
        values[i] = larger(kept, __shfl_xor_sync(kAllLanes, given, half));
      }
    }
    Largest amax = values[0];
#pragma unroll
    for (uint32_t step = kCount; step < kLanesPerScale; step *= 2) {
      amax = larger(amax, __shfl_xor_sync(kAllLanes, amax, step));
    }
    return amax;
  }

  __device__ static void write(const SendBuffer& buffer, uint32_t vector, const uint4& input,
                               float inverse) {
    float values[kWidth];
    widen(input, values);
    uint32_t words[kWidth / 4] = {};
#pragma unroll
    for (uint32_t c = 0; c < kWidth; c += 2) {
      words[c / 4] |=
          ptx::to_e4m3x2(__fmul_rn(values[c], inverse), __fmul_rn(values[c + 1], inverse))
          << (c % 4 * 8);
    }
    if constexpr (kWidth == 8) {
      reinterpret_cast<uint2*>(buffer.out)[vector] = {words[0], words[1]};
    } else {
      reinterpret_cast<uint32_t*>(buffer.out)[vector] = words[0];
    }
  }
};

}  // namespace ep::cuda::normal
