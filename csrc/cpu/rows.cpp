#include "cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "protocol/tagged.h"

// ThreadSanitizer does not see streaming stores, so it gets ordinary ones.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define EP_STREAMING_STORES
#include <emmintrin.h>
#endif

// One build serves every x86-64 CPU: the loader picks the widest clone that the CPU has. (The
// default one calls a function for every fused multiply-add, which CPUs since 2013 have.)
// ThreadSanitizer's runtime is not ready when the loader runs those resolvers. GCC before 12 does
// not know levels.
#if !defined(__x86_64__) || !defined(__gnu_linux__) || defined(__SANITIZE_THREAD__)
#define EP_VECTOR_CLONES
#elif __GNUC__ >= 12
#define EP_VECTOR_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define EP_VECTOR_CLONES __attribute__((target_clones("default", "fma", "avx512f")))
#endif
#define EP_INLINE inline __attribute__((always_inline))

namespace ep::cpu {
namespace {

// Rows for a peer of at least this many bytes are streamed. Writing rows that a peer has just read
// from its cache and reading them there took, cached against streamed: 8 KiB 0.5 / 1.2 us, 128 KiB
// 18 / 12 us, 512 KiB 66 to 260 / 45 us (two cores of an EPYC 9004 VM; copy of rows of 8 KiB).
constexpr uint64_t kMinStreamedBytes = 64 << 10;
// Rows of this rank are streamed when all ranks and banks together hold this much: the L3 of an
// EPYC 9004 chiplet. (sysconf's answer there is ten times too large.) Unpacking, cached against
// streamed: 16 MiB in all 106 / 192 us, 32 MiB 500 / 318 us, 128 MiB 6.7 / 1.3 ms (2 ranks, rows of
// 8 KiB).
constexpr uint64_t kCacheBytes = 32 << 20;

// Elements summed at a time: the accumulator stays in registers and all rows are read side by side.
// Against 256 at a time: 1.4 / 1.8 ms for 512 tokens' partial rows from memory, the same from cache
// (4 rows each of 8 KiB, 2 ranks, EPYC 9004 VM).
constexpr uint32_t kBlock = 64;

#if defined(EP_STREAMING_STORES)
// Whole 16-byte vectors only; returns how many bytes it wrote.
EP_INLINE uint64_t stream(std::byte* out, const std::byte* row, uint64_t num_bytes) {
  if (reinterpret_cast<uintptr_t>(out) % sizeof(__m128i) != 0) return 0;
  uint64_t i = 0;
  for (; i + sizeof(__m128i) <= num_bytes; i += sizeof(__m128i)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i)));
  }
  return i;
}
#else
EP_INLINE uint64_t stream(std::byte*, const std::byte*, uint64_t) { return 0; }
#endif

EP_INLINE void copy_streamed(std::byte* out, const std::byte* row, uint64_t num_bytes) {
  const uint64_t num_streamed = stream(out, row, num_bytes);
  if (num_streamed < num_bytes) {
    std::memcpy(out + num_streamed, row + num_streamed, num_bytes - num_streamed);
  }
}

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

// kBlock elements of a row, as numbers.
template <typename T>
struct Block {
  const T* values;

  EP_INLINE Block(const std::byte* row, uint32_t begin, uint64_t)
      : values(reinterpret_cast<const T*>(row) + begin) {}
  EP_INLINE float operator[](uint32_t i) const { return to_float(values[i]); }
};

struct Float8 {};
template <>
struct Block<Float8> {
  const uint8_t* values;
  float scale;
  static_assert(protocol::kChannelsPerScale % kBlock == 0);

  EP_INLINE Block(const std::byte* row, uint32_t begin, uint64_t scales_in_row)
      : values(reinterpret_cast<const uint8_t*>(row) + begin),
        scale(reinterpret_cast<const float*>(row +
                                             scales_in_row)[begin / protocol::kChannelsPerScale]) {}
  EP_INLINE float operator[](uint32_t i) const { return protocol::from_e4m3(values[i]) * scale; }
};

template <typename T>
EP_INLINE void add_block(float* acc, const Block<T>& row, float weight, bool is_first,
                         uint32_t length) {
  if (is_first) {
    for (uint32_t i = 0; i < length; ++i) acc[i] = weight * row[i];
  } else {
    for (uint32_t i = 0; i < length; ++i) acc[i] = std::fma(weight, row[i], acc[i]);
  }
}

template <typename T>
EP_INLINE void store_block(T* out, const float* acc, uint32_t length, Store how) {
  if (how == Store::kCached) {
    for (uint32_t i = 0; i < length; ++i) store(out + i, acc[i]);
    return;
  }
  alignas(64) T block[kBlock];
  for (uint32_t i = 0; i < length; ++i) store(block + i, acc[i]);
  copy_streamed(reinterpret_cast<std::byte*>(out), reinterpret_cast<const std::byte*>(block),
                length * sizeof(T));
}

template <typename T, typename Out>
EP_INLINE void weighted_sum_impl(Out* out, const std::byte* const* rows, uint64_t scales_in_row,
                                 const float* weights, uint32_t num_rows, uint32_t hidden,
                                 Store how) {
  alignas(64) float acc[kBlock] = {};
  for (uint32_t begin = 0; begin < hidden; begin += kBlock) {
    const uint32_t length = std::min(kBlock, hidden - begin);
    for (uint32_t r = 0; r < num_rows; ++r) {
      const Block<T> row(rows[r], begin, scales_in_row);
      const float weight = weights == nullptr ? 1.0f : weights[r];
      // A full block has a length the compiler knows, so its loops need no tail.
      if (length == kBlock) {
        add_block(acc, row, weight, r == 0, kBlock);
      } else {
        add_block(acc, row, weight, r == 0, length);
      }
    }
    store_block(out + begin, acc, length, how);
  }
}

template <typename Out>
EP_INLINE void weighted_sum_as(Out* out, RowFormat format, const std::byte* const* rows,
                               const float* weights, uint32_t num_rows, uint32_t hidden,
                               Store how) {
  const uint64_t scales_in_row = format.scales_in_row;
  if (format.dtype == protocol::DType::kFloat32) {
    weighted_sum_impl<float>(out, rows, scales_in_row, weights, num_rows, hidden, how);
  } else if (format.dtype == protocol::DType::kBFloat16) {
    weighted_sum_impl<uint16_t>(out, rows, scales_in_row, weights, num_rows, hidden, how);
  } else {
    weighted_sum_impl<Float8>(out, rows, scales_in_row, weights, num_rows, hidden, how);
  }
}

EP_VECTOR_CLONES void weighted_sum_f32(float* out, RowFormat format, const std::byte* const* rows,
                                       const float* weights, uint32_t num_rows, uint32_t hidden,
                                       Store how) {
  weighted_sum_as(out, format, rows, weights, num_rows, hidden, how);
}

EP_VECTOR_CLONES void weighted_sum_bf16(uint16_t* out, RowFormat format,
                                        const std::byte* const* rows, const float* weights,
                                        uint32_t num_rows, uint32_t hidden, Store how) {
  weighted_sum_as(out, format, rows, weights, num_rows, hidden, how);
}

// `group`, at most kChannelsPerScale elements, as float8. Returns its scale.
template <typename T>
EP_INLINE float quantize_group(protocol::ScaleFormat format, const T* group, uint32_t length,
                               uint8_t* values) {
  // As integers: magnitudes of floats are ordered like their bits, and NaN can be masked out (by a
  // conditional instead, GCC 12 would not vectorise the loop).
  uint32_t amax = 0;
  for (uint32_t i = 0; i < length; ++i) {
    const uint32_t bits = protocol::bits_of(to_float(group[i])) & 0x7fffffff;
    const uint32_t magnitude = bits & (bits <= 0x7f800000 ? ~0u : 0u);
    amax = amax < magnitude ? magnitude : amax;
  }
  const protocol::Scale scale = protocol::scale_for(protocol::float_of(amax), format);
  for (uint32_t i = 0; i < length; ++i) {
    values[i] = protocol::to_e4m3(to_float(group[i]) * scale.inverse);
  }
  return scale.scale;
}

template <typename T>
EP_INLINE void quantize_impl(protocol::ScaleFormat format, const T* row, uint32_t hidden,
                             uint8_t* values, float* scales) {
  constexpr uint32_t kLength = protocol::kChannelsPerScale;
  for (uint32_t begin = 0; begin < hidden; begin += kLength) {
    const uint32_t length = std::min(kLength, hidden - begin);
    // As in weighted_sum_impl: a full group needs no tail.
    *scales++ = length == kLength ? quantize_group(format, row + begin, kLength, values + begin)
                                  : quantize_group(format, row + begin, length, values + begin);
  }
}

EP_VECTOR_CLONES void quantize_f32(protocol::ScaleFormat format, const float* row, uint32_t hidden,
                                   uint8_t* values, float* scales) {
  quantize_impl(format, row, hidden, values, scales);
}

EP_VECTOR_CLONES void quantize_bf16(protocol::ScaleFormat format, const uint16_t* row,
                                    uint32_t hidden, uint8_t* values, float* scales) {
  quantize_impl(format, row, hidden, values, scales);
}

}  // namespace

Store store_for_peer(uint64_t num_bytes) {
  return num_bytes < kMinStreamedBytes ? Store::kCached : Store::kStreamed;
}

Store store_for_self(uint64_t num_bytes, uint32_t num_alike) {
  return num_bytes * num_alike < kCacheBytes ? Store::kCached : Store::kStreamed;
}

void fence_streamed_rows() {
#if defined(EP_STREAMING_STORES)
  _mm_sfence();
#endif
}

void copy_row(std::byte* out, const std::byte* row, uint64_t row_bytes, Store store) {
  if (store == Store::kCached) {
    std::memcpy(out, row, row_bytes);
  } else {
    copy_streamed(out, row, row_bytes);
  }
}

void weighted_sum(RowFormat format, protocol::DType dtype, std::byte* out,
                  const std::byte* const* rows, const float* weights, uint32_t num_rows,
                  uint32_t hidden, Store store) {
  if (dtype == protocol::DType::kFloat32) {
    auto* as_dtype = reinterpret_cast<float*>(out);
    weighted_sum_f32(as_dtype, format, rows, weights, num_rows, hidden, store);
  } else {
    auto* as_dtype = reinterpret_cast<uint16_t*>(out);
    weighted_sum_bf16(as_dtype, format, rows, weights, num_rows, hidden, store);
  }
}

void quantize_row(protocol::DType dtype, protocol::ScaleFormat format, const std::byte* row,
                  uint32_t hidden, std::byte* values, float* scales) {
  auto* out = reinterpret_cast<uint8_t*>(values);
  if (dtype == protocol::DType::kFloat32) {
    quantize_f32(format, reinterpret_cast<const float*>(row), hidden, out, scales);
  } else {
    quantize_bf16(format, reinterpret_cast<const uint16_t*>(row), hidden, out, scales);
  }
}

OutgoingRows::OutgoingRows(protocol::DType dtype, protocol::DType dispatch_dtype,
                           protocol::ScaleFormat format, uint32_t hidden)
    : dtype_(dtype),
      format_(format),
      hidden_(hidden),
      num_scales_(dispatch_dtype == protocol::DType::kFloat8E4M3 ? protocol::scales_for(hidden)
                                                                 : 0),
      row_bytes_(hidden * protocol::element_bytes(dtype)),
      dispatch_row_bytes_(hidden * protocol::element_bytes(dispatch_dtype)),
      values_(num_scales_ > 0 ? dispatch_row_bytes_ : 0),
      scales_(num_scales_) {}

Row OutgoingRows::at(const std::byte* x, const float* x_scales, bool is_quantized, uint64_t token) {
  if (is_quantized) return {x + token * dispatch_row_bytes_, x_scales + token * num_scales_};
  const std::byte* row = x + token * row_bytes_;
  if (num_scales_ == 0) return {row, nullptr};
  quantize_row(dtype_, format_, row, hidden_, values_.data(), scales_.data());
  return {values_.data(), scales_.data()};
}

}  // namespace ep::cpu
