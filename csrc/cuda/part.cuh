// A part of a row in the registers of a warp: kPartBytes, and the scales of those where the row is
// float8. Lane i has the 16-byte vectors i and i + 32 of the part; protocol/tagged.h draws it.
#pragma once

#include <cuda_bf16.h>

#include "cuda/rank.cuh"
#include "protocol/blanks.h"
#include "protocol/float8.h"
#include "protocol/tagged.h"
#include "ptx/float8.cuh"

namespace ep::cuda {

// Some vectors a lane of a row: two are a part. With one, a warp runs half as many instructions,
// which is what the time of a small batch goes into; with two, twice as many loads are on their
// way.
template <uint32_t kVectors>
struct Piece {
  uint4 vectors[kVectors];

  // Of a row.
  __host__ __device__ static constexpr uint32_t count(uint64_t row_bytes) {
    constexpr uint32_t kBytes = kVectors * kWarp * sizeof(uint4);
    return static_cast<uint32_t>((row_bytes + kBytes - 1) / kBytes);
  }
  // Which vector of the row is the lane's `i`-th of a piece.
  __device__ static uint32_t vector(uint32_t piece, uint32_t i) {
    return piece * (kVectors * kWarp) + i * kWarp + threadIdx.x % kWarp;
  }

  template <typename Load>
  __device__ void load(const std::byte* row, uint32_t num_vectors, uint32_t piece, Load load,
                       bool is_there = true) {
    const auto* own = reinterpret_cast<const uint4*>(row) + vector(piece, 0);
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) {
      vectors[i] = {};
      if (is_there && vector(piece, i) < num_vectors) vectors[i] = load(own + i * kWarp);
    }
  }
  __device__ void store(std::byte* row, uint32_t num_vectors, uint32_t piece) const {
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) {
      if (vector(piece, i) < num_vectors) {
        reinterpret_cast<uint4*>(row)[vector(piece, i)] = vectors[i];
      }
    }
  }
  // Into blanks.
  __device__ void fill(std::byte* row, uint32_t num_vectors, uint32_t piece) const {
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) {
      uint4 word = vectors[i];
      word.w = protocol::filling(word.w);
      if (vector(piece, i) < num_vectors) {
        ptx::st_relaxed_sys_b128(reinterpret_cast<uint4*>(row) + vector(piece, i), word);
      }
    }
  }
};

struct Part : Piece<2> {
  uint32_t scale;  // bits of a float32, in lanes 8g (of vectors[0]) and 8g + 1 (of vectors[1])
};
static_assert(sizeof(Piece<2>) * kWarp == protocol::kPartBytes);

// Which scale of a part this lane has.
struct Lane {
  uint32_t lane = threadIdx.x % kWarp;

  __device__ bool has_scale() const { return lane % 8 < 2; }
  // In scales of the row; for lanes that have one.
  __device__ uint32_t scale(uint32_t part) const {
    return part * protocol::kScalesPerPart + (lane % 8) * 4 + lane / 8;
  }
};

// A row as it lies in memory: payload and, where num_scales > 0, its scales.
struct RowView {
  std::byte* payload;
  float* scales;
};

struct RowShape {
  uint32_t num_vectors;
  uint32_t num_scales;
};

template <typename Load>
__device__ Part load_part(const RowView& row, const RowShape& shape, uint32_t part, Load load) {
  const Lane lane;
  Part out = {};
  out.load(row.payload, shape.num_vectors, part, load);
  if (shape.num_scales > 0 && lane.has_scale() && lane.scale(part) < shape.num_scales) {
    out.scale =
        ptx::ld_relaxed_sys(reinterpret_cast<const uint32_t*>(row.scales) + lane.scale(part));
  }
  return out;
}

__device__ inline void store_part(const Part& p, const RowView& row, const RowShape& shape,
                                  uint32_t part) {
  const Lane lane;
  p.store(row.payload, shape.num_vectors, part);
  if (shape.num_scales > 0 && lane.has_scale() && lane.scale(part) < shape.num_scales) {
    reinterpret_cast<uint32_t*>(row.scales)[lane.scale(part)] = p.scale;
  }
}

// The word of received scales that this lane writes of a part, if it has one: scales.h. Whole warp.
// `kIsUsual`: they are not packed.
template <bool kIsUsual>
struct ScaleWord {
  uint32_t idx, value;  // in words of the row
  bool is_there;

  __device__ ScaleWord(const Part& p, uint32_t part, const protocol::LowLatencyLayout& layout) {
    const Lane lane;
    const uint32_t num_scales = layout.num_scales();
    idx = lane.scale(part), value = p.scale;
    is_there = lane.has_scale() && idx < num_scales;
    if (kIsUsual || layout.config().scale_format != protocol::ScaleFormat::kUE8M0) return;
    // Exponents of four scales each, in lanes 0 and 1.
    value = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t scale = __shfl_sync(kAllLanes, p.scale, lane.lane % 8 + 8 * i);
      const bool is_scale = part * protocol::kScalesPerPart + lane.lane * 4 + i < num_scales;
      if (is_scale) value |= uint32_t{protocol::ue8m0_of(__uint_as_float(scale))} << (8 * i);
    }
    idx = part * (protocol::kScalesPerPart / 4) + lane.lane;
    is_there = lane.lane < 2 && idx < layout.num_scale_words();
  }
};

// --- tagged ----------------------------------------------------------------------------------

// Where this lane's three words of a part lie in a tagged row.
__device__ inline uint4* tagged_words(std::byte* row, uint32_t part) {
  return reinterpret_cast<uint4*>(row + part * protocol::kTaggedPartBytes) + threadIdx.x % kWarp;
}

// Lanes whose vectors[0] is behind the row's end have nothing to say.
__device__ inline bool has_words(uint32_t num_vectors, uint32_t part) {
  return Part::vector(part, 0) < num_vectors;
}

__device__ inline void store_tagged(const Part& p, std::byte* row, uint32_t num_vectors,
                                    uint32_t part, uint32_t tag) {
  if (!has_words(num_vectors, part)) return;
  uint4* words = tagged_words(row, part);
  const uint4 &a = p.vectors[0], &b = p.vectors[1];
  ptx::st_relaxed_sys_b128(words, {a.x, a.y, a.z, tag});
  ptx::st_relaxed_sys_b128(words + kWarp, {a.w, b.x, b.y, tag});
  ptx::st_relaxed_sys_b128(words + 2 * kWarp, {b.z, b.w, p.scale, tag});
}

// A part of a tagged row on its way: begin() asks for the words, is_here() says whether all have
// come. If not, begin again: nothing needs to be kept.
class TaggedPart {
 public:
  static constexpr bool kMakesBlanks = false;
  // Lanes with nothing to read say that all is here.
  __device__ void begin(std::byte* row, uint32_t num_vectors, uint32_t part, uint32_t tag) {
    const uint4* address = tagged_words(row, part);
    const bool is_mine = has_words(num_vectors, part);
#pragma unroll
    for (uint32_t i = 0; i < 3; ++i) {
      words_[i] = is_mine ? ptx::ld_relaxed_sys_b128(address + i * kWarp) : uint4{0, 0, 0, tag};
    }
  }
  __device__ bool is_here(uint32_t tag) const {
    return words_[0].w == tag && words_[1].w == tag && words_[2].w == tag;
  }
  // Waits for this lane's words. False: the wait was given up.
  __device__ static bool wait(const RankView& rank, OpId id, uint32_t src_rank, std::byte* row,
                              uint32_t num_vectors, uint32_t part) {
    const uint4* address = tagged_words(row, part);
    bool ok = true;
    for (uint32_t i = 0; i < 3 && ok && has_words(num_vectors, part); ++i) {
      const uint4 word = wait_for_tag(rank, id, src_rank, address + i * kWarp);
      ok = word.w == static_cast<uint32_t>(id.epoch);
    }
    return ok;
  }
  __device__ Part part() const {
    return {{{{words_[0].x, words_[0].y, words_[0].z, words_[1].x},
              {words_[1].y, words_[1].z, words_[2].x, words_[2].y}}},
            words_[2].z};
  }

 private:
  uint4 words_[3];
};

// Until all tagged words that a warp needs are here: `ask()` has them on their way together, which
// the caller may have done once (`has_asked`), and `are_here()` is about those of this lane. Waited
// for one after the other, each would cost a way to L2, even if all have come with the first: a
// pair of 16 tokens took 14.5 us so between two H200s and 20.8 between four, and takes 12.7 and
// 14.3 (by expert, float8, hidden 7168). `wait()`, for those of this lane, is bounded: it takes
// over where they are long in coming. False, on all lanes: it gave up.
template <typename Ask, typename AreHere, typename Wait>
__device__ __forceinline__ bool poll_tagged(bool has_asked, Ask ask, AreHere are_here, Wait wait) {
#pragma unroll 1
  for (uint32_t poll = 0;; ++poll) {
    if (!has_asked || poll > 0) ask();
    if (__all_sync(kAllLanes, are_here())) return true;
    if (poll >= kPollsPerLook && !__all_sync(kAllLanes, wait())) return false;
  }
}

// The same for a part that has been asked for.
__device__ __forceinline__ bool poll_part(const RankView& rank, OpId id, uint32_t src_rank,
                                          std::byte* row, uint32_t num_vectors, uint32_t part,
                                          TaggedPart* tagged) {
  const auto tag = static_cast<uint32_t>(id.epoch);
  return poll_tagged(
      true, [&] { tagged->begin(row, num_vectors, part, tag); },
      [&] { return tagged->is_here(tag); },
      [&] { return TaggedPart::wait(rank, id, src_rank, row, num_vectors, part); });
}

// --- into blanks -----------------------------------------------------------------------------

// A piece on its way into blanks, as TaggedPart above.
template <uint32_t kVectors>
class FilledPiece {
 public:
  static constexpr bool kMakesBlanks = true;
  __device__ void begin(const std::byte* row, uint32_t num_vectors, uint32_t piece, uint32_t) {
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) {
      const uint32_t vector = Piece<kVectors>::vector(piece, i);
      words_.vectors[i] = {0, 0, 0, ~0u};
      if (vector < num_vectors) {
        words_.vectors[i] = ptx::ld_relaxed_sys_b128(reinterpret_cast<const uint4*>(row) + vector);
      }
    }
  }
  __device__ bool is_here(uint32_t) const {
    return words_.vectors[0].w != 0 && words_.vectors[kVectors - 1].w != 0;
  }
  // Makes blanks of the words again.
  __device__ static void clear(std::byte* row, uint32_t num_vectors, uint32_t piece) {
    Piece<kVectors>{}.store(row, num_vectors, piece);
  }
  // Waits for this lane's words. False: the wait was given up.
  __device__ static bool wait(const RankView& rank, OpId id, uint32_t src_rank,
                              const std::byte* row, uint32_t num_vectors, uint32_t piece) {
    bool ok = true;
    for (uint32_t i = 0; i < kVectors && ok; ++i) {
      const uint32_t vector = Piece<kVectors>::vector(piece, i);
      if (vector >= num_vectors) continue;
      ok = wait_for_filling(rank, id, src_rank, reinterpret_cast<const uint4*>(row) + vector);
    }
    return ok;
  }
  // `has_travelled`: else its words are as they were.
  __device__ Piece<kVectors> part(bool has_travelled = true) const {
    Piece<kVectors> p = words_;
    if (!has_travelled) return p;
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) p.vectors[i].w = protocol::filled(p.vectors[i].w);
    return p;
  }

 private:
  static_assert(kVectors <= 2);
  Piece<kVectors> words_;
};

// --- a token's row, on its way out -----------------------------------------------------------
//
// fetch() asks for a part, finish() makes of it what travels: several may be on their way at once.

// Rows that travel as they are: float32, bfloat16, or float8 that the caller has quantised.
struct CopyRow {
  static constexpr bool kAreUsual = true;  // see usual.cuh

  RowView rows;  // [T, H] and [T, N]
  uint64_t row_bytes;
  RowShape shape;

  using Fetched = Part;
  __device__ Fetched fetch(uint32_t token, uint32_t part) const {
    const RowView row = {rows.payload + token * row_bytes, rows.scales + token * shape.num_scales};
    return load_part(row, shape, part, [](const uint4* v) { return ptx::ld_once(v); });
  }
  __device__ Part finish(const Fetched& fetched) const { return fetched; }
};

__device__ inline void widen(const uint4& vector, float (&out)[8]) {
  const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(pairs[i] << 16);
    out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000);
  }
}
__device__ inline void widen(const uint4& vector, float (&out)[4]) {
  out[0] = __uint_as_float(vector.x), out[1] = __uint_as_float(vector.y);
  out[2] = __uint_as_float(vector.z), out[3] = __uint_as_float(vector.w);
}

// Channels of a vector of float8. Eight lanes hold those that share a scale.
constexpr uint32_t kChannelsPerVector = 16;

// Of kCount sets of channels that eight lanes hold together; `amax`: of this lane's, NaN left out.
// Each lane makes one of the divisions, not all. (No array is indexed by a lane: it would go to
// memory.)
template <uint32_t kCount>
__device__ inline void scales_of_lanes(const float (&amax)[kCount], protocol::ScaleFormat format,
                                       protocol::Scale (&scales)[kCount]) {
  const uint32_t lane = threadIdx.x % kWarp;
  float own = 0.0f;
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) {
    float largest = amax[i];
#pragma unroll
    for (uint32_t step = 1; step < 8; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    if (lane / 2 % kCount == i) own = protocol::clamped_amax(largest);
  }
  const bool is_inverse = lane % 2 != 0;
  const float quotient =
      (is_inverse ? protocol::kMaxE4M3 : own) / (is_inverse ? own : protocol::kMaxE4M3);
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) {
    scales[i] = protocol::scale_of(__shfl_sync(kAllLanes, quotient, 2 * i, 2 * kCount),
                                   __shfl_sync(kAllLanes, quotient, 2 * i + 1, 2 * kCount), format);
  }
}

__device__ inline uint4 quantized(const float (&values)[kChannelsPerVector],
                                  const protocol::Scale& scale) {
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t c = 0; c < kChannelsPerVector; c += 2) {
    words[c / 4] |=
        ptx::to_e4m3x2(__fmul_rn(values[c], scale.inverse), __fmul_rn(values[c + 1], scale.inverse))
        << (c % 4 * 8);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Rows of T that become float8 on the way.
template <typename T>
struct QuantizeRow {
  const std::byte* x;  // [T, H]
  uint32_t hidden;
  RowShape shape;
  protocol::ScaleFormat format;

  static constexpr bool kAreUsual = sizeof(T) == 2;
  static constexpr uint32_t kWidth = sizeof(uint4) / sizeof(T);     // elements of an input vector
  static constexpr uint32_t kInputs = kChannelsPerVector / kWidth;  // of an output vector

  struct Fetched {
    uint4 inputs[2][kInputs];
  };
  __device__ Fetched fetch(uint32_t token, uint32_t part) const {
    const auto* row = reinterpret_cast<const uint4*>(x + uint64_t{token} * hidden * sizeof(T));
    Fetched out = {};
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t vector = Part::vector(part, i);
      if (vector >= shape.num_vectors) continue;
#pragma unroll
      for (uint32_t j = 0; j < kInputs; ++j) {
        out.inputs[i][j] = ptx::ld_once(row + vector * kInputs + j);
      }
    }
    return out;
  }
  // Whole warp.
  __device__ Part finish(const Fetched& fetched) const {
    const float amax[2] = {largest(fetched.inputs[0]), largest(fetched.inputs[1])};
    protocol::Scale scales[2];
    scales_of_lanes(amax, format, scales);
    Part out;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      float values[kInputs][kWidth];
#pragma unroll
      for (uint32_t j = 0; j < kInputs; ++j) widen(fetched.inputs[i][j], values[j]);
      out.vectors[i] =
          quantized(reinterpret_cast<const float (&)[kChannelsPerVector]>(values), scales[i]);
    }
    const float first = scales[0].scale, second = scales[1].scale;
    out.scale = __float_as_uint(threadIdx.x % 8 == 1 ? second : first);
    return out;
  }

  // Of this lane's elements, NaN left out.
  template <uint32_t kCount>
  __device__ static float largest(const uint4 (&inputs)[kCount]) {
    float amax = 0.0f;
#pragma unroll
    for (uint32_t j = 0; j < kCount; ++j) {
      if constexpr (sizeof(T) == 2) {
        // Two at a time; the order of bfloat16 numbers is that of their float32 ones.
        const __nv_bfloat162 both =
            __hmax2(__hmax2(magnitudes(inputs[j].x), magnitudes(inputs[j].y)),
                    __hmax2(magnitudes(inputs[j].z), magnitudes(inputs[j].w)));
        amax = fmaxf(amax, fmaxf(__low2float(both), __high2float(both)));
      } else {
        float values[kWidth];
        widen(inputs[j], values);
#pragma unroll
        for (uint32_t c = 0; c < kWidth; ++c) amax = fmaxf(amax, fabsf(values[c]));
      }
    }
    return amax;
  }

 private:
  __device__ static __nv_bfloat162 magnitudes(uint32_t pair) {
    pair &= 0x7fff7fff;
    __nv_bfloat162 out;
    memcpy(&out, &pair, sizeof out);
    return out;
  }
};

// --- on the host -----------------------------------------------------------------------------

// A type, as what a generic function is called with.
template <typename Type>
struct TypeOf {
  using type = Type;
};

// Calls `launch` with the way x becomes what travels.
template <typename Function>
void with_rows(const protocol::LowLatencyLayout& layout, const protocol::DispatchSendParams& send,
               Function&& launch) {
  const auto& config = layout.config();
  const RowShape shape = {static_cast<uint32_t>(layout.dispatch_row_bytes() / sizeof(uint4)),
                          layout.num_scales()};
  if (shape.num_scales == 0 || send.x_is_quantized) {
    const RowView rows = {const_cast<std::byte*>(send.x), const_cast<float*>(send.x_scales)};
    launch(CopyRow{rows, layout.dispatch_row_bytes(), shape});
  } else if (config.dtype == protocol::DType::kBFloat16) {
    launch(QuantizeRow<__nv_bfloat16>{send.x, config.hidden, shape, config.scale_format});
  } else {
    launch(QuantizeRow<float>{send.x, config.hidden, shape, config.scale_format});
  }
}

// The rows of a block's items, part by part. `fetched`: the first part of the first item.
// `plan(token, part)`: before its parts, of which that is the first; `send(data, part)`;
// `end(token, is_last)`: behind the parts of an item, `is_last`: which has one more than the row.
template <typename Rows, typename Items, typename Plan, typename Send, typename End>
__device__ __forceinline__ void send_rows(const Rows& rows, uint32_t num_parts, Items items,
                                          typename Rows::Fetched fetched, Plan plan, Send send,
                                          End end) {
  while (items.more()) {
    const uint32_t token = items.row(), end_part = items.end_part();
    const uint32_t end_of_row = min(end_part, num_parts);
    uint32_t part = items.first_part();
    const bool is_last = end_part > num_parts && part <= num_parts;
    plan(token, part);
    items.next();
#pragma unroll 1
    do {
      const bool is_part = part < end_of_row;  // else the item is no more than what is behind
      Part p;
      if (is_part) p = rows.finish(fetched);
      // The next part is on its way while this one leaves, and while its token is planned.
      const bool goes_on = part + 1 < end_of_row;
      if (goes_on || items.more()) {
        fetched =
            rows.fetch(goes_on ? token : items.row(), goes_on ? part + 1 : items.first_part());
      }
      if (is_part) send(p, part);
    } while (++part < end_of_row);
    end(token, is_last);
  }
}

}  // namespace ep::cuda
