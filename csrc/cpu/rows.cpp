#include "cpu/rows.h"

#include <algorithm>
#include <cstring>

// One build serves every x86-64 CPU: the loader picks the widest clone that the CPU has.
// ThreadSanitizer's runtime is not ready when the loader runs those resolvers.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_THREAD__)
#define EP_VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define EP_VECTOR_CLONES
#endif
#define EP_INLINE inline __attribute__((always_inline))

namespace ep::cpu {
namespace {

// Elements summed at a time: the accumulator (1 KiB) stays in L1 while rows stream past.
constexpr uint32_t kBlock = 256;

EP_INLINE float to_float(float value) { return value; }
EP_INLINE float to_float(uint16_t bfloat16) {
  uint32_t bits = uint32_t{bfloat16} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

EP_INLINE void store(float* out, float value) { *out = value; }
// Round to nearest even; any NaN becomes the quiet NaN that PyTorch writes.
EP_INLINE void store(uint16_t* out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <typename T>
EP_INLINE void add_block(float* acc, const T* row, float weight, bool is_first, uint32_t length) {
  if (is_first) {
    for (uint32_t i = 0; i < length; ++i) acc[i] = weight * to_float(row[i]);
  } else {
    for (uint32_t i = 0; i < length; ++i) acc[i] += weight * to_float(row[i]);
  }
}

template <typename T>
EP_INLINE void weighted_sum_impl(T* out, const std::byte* const* rows, const float* weights,
                                 uint32_t num_rows, uint32_t hidden) {
  alignas(64) float acc[kBlock] = {};
  for (uint32_t begin = 0; begin < hidden; begin += kBlock) {
    const uint32_t length = std::min(kBlock, hidden - begin);
    for (uint32_t r = 0; r < num_rows; ++r) {
      const T* row = reinterpret_cast<const T*>(rows[r]) + begin;
      const float weight = weights == nullptr ? 1.0f : weights[r];
      // A full block has a length the compiler knows, so its loops need no tail.
      if (length == kBlock) {
        add_block(acc, row, weight, r == 0, kBlock);
      } else {
        add_block(acc, row, weight, r == 0, length);
      }
    }
    for (uint32_t i = 0; i < length; ++i) store(out + begin + i, acc[i]);
  }
}

EP_VECTOR_CLONES void weighted_sum_f32(float* out, const std::byte* const* rows,
                                       const float* weights, uint32_t num_rows, uint32_t hidden) {
  weighted_sum_impl(out, rows, weights, num_rows, hidden);
}

EP_VECTOR_CLONES void weighted_sum_bf16(uint16_t* out, const std::byte* const* rows,
                                        const float* weights, uint32_t num_rows, uint32_t hidden) {
  weighted_sum_impl(out, rows, weights, num_rows, hidden);
}

}  // namespace

void weighted_sum(protocol::DType dtype, std::byte* out, const std::byte* const* rows,
                  const float* weights, uint32_t num_rows, uint32_t hidden) {
  if (dtype == protocol::DType::kFloat32) {
    weighted_sum_f32(reinterpret_cast<float*>(out), rows, weights, num_rows, hidden);
  } else {
    weighted_sum_bf16(reinterpret_cast<uint16_t*>(out), rows, weights, num_rows, hidden);
  }
}

}  // namespace ep::cpu
