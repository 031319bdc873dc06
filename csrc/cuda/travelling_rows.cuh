// Rows of combine as they travel: of T, as experts write them, or of float8. Either kind makes the
// parts of a row that is sent, and adds up the parts of rows that have come. The bits are those of
// csrc/cpu/low_latency_combine.cpp.
#pragma once

#include "cuda/sum.cuh"

namespace ep::cuda {

using protocol::LowLatencyLayout;

// `kVectors`: of a lane's piece.
template <typename T, uint32_t kVectors>
class PlainRows {
 public:
  static constexpr uint32_t kPieceVectors = kVectors;
  static constexpr bool kAreUsual = sizeof(T) == 2;  // see usual.cuh
  // A partial row to which nothing is added is the token's row.
  static constexpr bool kLonePartialIsResult = true;
  // How rows of a tagged batch come, and how many are on their way at the same time.
  using Coming = FilledPiece<kVectors>;
  static constexpr uint32_t kTaggedBatch = 4;
  // Of a row, for a warp each.
  __host__ __device__ static constexpr uint32_t num_parts(uint64_t row_bytes) {
    return Piece<kVectors>::count(row_bytes);
  }

  __device__ explicit PlainRows(const LowLatencyLayout& layout)
      : num_vectors_(static_cast<uint32_t>(layout.combine_row_bytes() / sizeof(uint4))) {}

  // Of a row that travels.
  __device__ uint32_t num_vectors() const { return num_vectors_; }

  // Parts first_part .. end_part - 1, as all below. One warp.
  __device__ void send_sum(const SumPlan& plan, uint32_t num_rows, uint32_t first_part,
                           uint32_t end_part, const Sink& sink) const {
    sum_pieces<T, kVectors>(plan, num_rows, num_vectors_, first_part, end_part, sink);
  }
  __device__ void send_row(const std::byte* row, uint32_t first_part, uint32_t end_part,
                           const Sink& sink) const {
    copy_pieces<kVectors>(row, num_vectors_, first_part, end_part, sink);
  }
  __device__ void add_up(const SumPlan& plan, uint32_t num_rows, uint32_t first_part,
                         uint32_t end_part, std::byte* out) const {
    sum_pieces<T, kVectors>(plan, num_rows, num_vectors_, first_part, end_part, {out, false, 0});
  }
  // The sum of rows that have come, as it travels on; it may go where one of them lies.
  __device__ void add_up_to_send(const SumPlan& plan, uint32_t num_rows, uint32_t first_part,
                                 uint32_t end_part, const Sink& sink) const {
    sum_pieces<T, kVectors>(plan, num_rows, num_vectors_, first_part, end_part, sink);
  }

  // A part of a token's row, from parts that have come one by one.
  class PartSum {
   public:
    // How many rows will be added.
    __device__ explicit PartSum(uint32_t num_rows) { sum_.start(num_rows); }
    __device__ void add(const Piece<kVectors>& p, float weight) { sum_.add(p, weight); }
    __device__ void store(std::byte* out, uint32_t num_vectors, uint32_t piece) const {
      sum_.rounded().store(out, num_vectors, piece);
    }

   private:
    PieceSum<T, kVectors> sum_;
  };

 private:
  uint32_t num_vectors_;
};

// The channels of a 16-byte vector of float8, as a lane adds them up: several vectors of T.
template <typename T>
class ChannelSum {
 public:
  static constexpr uint32_t kWidth = sizeof(uint4) / sizeof(T);
  static constexpr uint32_t kVectors = kChannelsPerVector / kWidth;

  // Of how many rows, see start_of_sum.
  __device__ explicit ChannelSum(uint32_t num_rows) {
#pragma unroll
    for (uint32_t c = 0; c < kChannelsPerVector; ++c) acc_[c] = start_of_sum(num_rows);
  }
  __device__ void add(const uint4 (&vectors)[kVectors], float weight) {
#pragma unroll
    for (uint32_t j = 0; j < kVectors; ++j) {
      float values[kWidth];
      widen(vectors[j], values);
#pragma unroll
      for (uint32_t c = 0; c < kWidth; ++c) add_channel(j * kWidth + c, values[c], weight);
    }
  }
  __device__ void add_float8(const uint4& vector, float scale, float weight) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (uint32_t c = 0; c < kChannelsPerVector; c += 2) {
      const float2 pair = ptx::from_e4m3x2(words[c / 4] >> (c % 4 * 8));
      add_channel(c, __fmul_rn(pair.x, scale), weight);
      add_channel(c + 1, __fmul_rn(pair.y, scale), weight);
    }
  }
  // With the scale of the channels that eight lanes hold together.
  __device__ uint4 to_float8(uint32_t* scale_bits) const {
    float amax[1] = {0.0f};
#pragma unroll
    for (uint32_t c = 0; c < kChannelsPerVector; ++c) amax[0] = fmaxf(amax[0], fabsf(acc_[c]));
    protocol::Scale scales[1];
    scales_of_lanes(amax, protocol::ScaleFormat::kFloat32, scales);
    *scale_bits = __float_as_uint(scales[0].scale);
    return quantized(acc_, scales[0]);
  }
  // `vector`: counted in vectors of float8.
  __device__ void store(std::byte* out, uint32_t vector) const {
#pragma unroll
    for (uint32_t j = 0; j < kVectors; ++j) {
      Sum<T> sum;
#pragma unroll
      for (uint32_t c = 0; c < kWidth; ++c) sum.acc[c] = acc_[j * kWidth + c];
      reinterpret_cast<uint4*>(out)[vector * kVectors + j] = sum.rounded();
    }
  }

 private:
  __device__ void add_channel(uint32_t c, float value, float weight) {
    acc_[c] = __fmaf_rn(weight, value, acc_[c]);
  }
  float acc_[kChannelsPerVector];
};

// How a row of float8 lies in an outcome.
struct Float8Shape {
  RowShape row;
  uint32_t scales_in_row;  // bytes

  __device__ explicit Float8Shape(const LowLatencyLayout& layout)
      : row{static_cast<uint32_t>(layout.combine_row_bytes() / sizeof(uint4)),
            layout.num_combine_scales()},
        scales_in_row(static_cast<uint32_t>(layout.combine_scales_in_row())) {}
  __device__ const uint32_t* scale(const std::byte* row, uint32_t vector) const {
    constexpr uint32_t kVectorsPerScale = protocol::kChannelsPerScale / kChannelsPerVector;
    return reinterpret_cast<const uint32_t*>(row + scales_in_row) + vector / kVectorsPerScale;
  }
  __device__ void store(const Part& p, const Sink& sink, uint32_t part) const {
    if (sink.is_tagged) {
      store_tagged(p, sink.row, row.num_vectors, part, sink.tag);
    } else {
      store_part(p, {sink.row, reinterpret_cast<float*>(sink.row + scales_in_row)}, row, part);
    }
  }
};

// Vector `i` of a part's two, both by the same code.
template <typename T>
__device__ __forceinline__ void put_float8(const ChannelSum<T>& sum, uint32_t i, Part* out) {
  uint32_t scale;
  out->vectors[1] = sum.to_float8(&scale);
  if (i == 0) out->vectors[0] = out->vectors[1];
  if (i == 0 || threadIdx.x % 8 == 1) out->scale = scale;
}

// Sums of rows of T, as float8. A vector at a time: with both at once,
// which is twice the code, a pair of one token takes 0.2 us more, one of 128 tokens 0.7 us less (2
// virtual ranks, H100). `weights`: null for a single row as it is.
template <typename T>
__device__ EP_OUT_OF_LINE void quantize_sum(const std::byte* const* rows, const float* weights,
                                            uint32_t num_rows, uint32_t first_part,
                                            uint32_t end_part, Float8Shape shape, Sink sink) {
  constexpr uint32_t kVectors = ChannelSum<T>::kVectors;
  constexpr uint32_t kRows = 8 / kVectors;  // on their way together
#pragma unroll 1
  for (uint32_t part = first_part; part < end_part; ++part) {
    Part out;
#pragma unroll 1
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t vector = Part::vector(part, i);
      ChannelSum<T> sum(num_rows);
#pragma unroll 1
      for (uint32_t first = 0; first < num_rows; first += kRows) {
        uint4 vectors[kRows][kVectors];
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) {
          const bool has_row = first + r < num_rows;
          const auto* row = reinterpret_cast<const uint4*>(rows[has_row ? first + r : 0]);
#pragma unroll
          for (uint32_t j = 0; j < kVectors; ++j) {
            const bool is_there = has_row && vector < shape.row.num_vectors;
            vectors[r][j] = is_there ? ptx::ld_row(row + vector * kVectors + j) : uint4{};
          }
        }
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) {
          if (first + r < num_rows) {
            sum.add(vectors[r], weights == nullptr ? 1.0f : weights[first + r]);
          }
        }
      }
      put_float8(sum, i, &out);
    }
    shape.store(out, sink, part);
  }
}

// Adds a vector of each row of float8, where rows have it.
template <typename T>
__device__ void add_rows(ChannelSum<T>& sum, const SumPlan& plan, uint32_t num_rows,
                         const Float8Shape& shape, uint32_t vector) {
  constexpr uint32_t kRows = 4;  // on their way together
  const bool has_vector = vector < shape.row.num_vectors;
#pragma unroll 1
  for (uint32_t first = 0; first < num_rows; first += kRows) {
    uint4 vectors[kRows];
    uint32_t scales[kRows];
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) {
      const bool is_there = has_vector && first + r < num_rows;
      const std::byte* row = plan.rows[first + r < num_rows ? first + r : 0];
      const auto* address = reinterpret_cast<const uint4*>(row) + vector;
      vectors[r] = is_there ? ptx::ld_row(address) : uint4{};
      scales[r] = is_there ? ptx::ld_relaxed_sys(shape.scale(row, vector)) : 0;
    }
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) {
      if (first + r < num_rows) {
        sum.add_float8(vectors[r], __uint_as_float(scales[r]), plan.weights[first + r]);
      }
    }
  }
}

// Sums of rows of float8, as T. As above.
template <typename T>
__device__ EP_OUT_OF_LINE void add_up_float8(const SumPlan& plan, uint32_t num_rows,
                                             uint32_t first_part, uint32_t end_part,
                                             Float8Shape shape, std::byte* out) {
#pragma unroll 1
  for (uint32_t part = first_part; part < end_part; ++part) {
#pragma unroll 1
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t vector = Part::vector(part, i);
      ChannelSum<T> sum(num_rows);
      add_rows(sum, plan, num_rows, shape, vector);
      if (vector < shape.row.num_vectors) sum.store(out, vector);
    }
  }
}

// Sums of rows of float8, as float8 again. As above.
template <typename T>
__device__ EP_OUT_OF_LINE void add_up_to_float8(const SumPlan& plan, uint32_t num_rows,
                                                uint32_t first_part, uint32_t end_part,
                                                Float8Shape shape, Sink sink) {
#pragma unroll 1
  for (uint32_t part = first_part; part < end_part; ++part) {
    Part out;
#pragma unroll 1
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t vector = Part::vector(part, i);
      ChannelSum<T> sum(num_rows);
      add_rows(sum, plan, num_rows, shape, vector);
      put_float8(sum, i, &out);
    }
    shape.store(out, sink, part);
  }
}

template <typename T>
class Float8Rows {
 public:
  static constexpr bool kAreUsual = sizeof(T) == 2;
  // It has to be quantised as if it had travelled.
  static constexpr bool kLonePartialIsResult = false;
  using Coming = TaggedPart;
  // With two, whose code is twice as long, a pair of 16 tokens takes 0.9 us more (as above).
  static constexpr uint32_t kTaggedBatch = 1;
  __host__ __device__ static constexpr uint32_t num_parts(uint64_t row_bytes) {
    return protocol::parts_for(row_bytes);
  }

  __device__ explicit Float8Rows(const LowLatencyLayout& layout) : shape_(layout) {}

  __device__ uint32_t num_vectors() const { return shape_.row.num_vectors; }

  __device__ void send_sum(const SumPlan& plan, uint32_t num_rows, uint32_t first_part,
                           uint32_t end_part, const Sink& sink) const {
    quantize_sum<T>(plan.rows, plan.weights, num_rows, first_part, end_part, shape_, sink);
  }
  __device__ void send_row(const std::byte* row, uint32_t first_part, uint32_t end_part,
                           const Sink& sink) const {
    quantize_sum<T>(&row, nullptr, 1, first_part, end_part, shape_, sink);
  }
  __device__ void add_up(const SumPlan& plan, uint32_t num_rows, uint32_t first_part,
                         uint32_t end_part, std::byte* out) const {
    add_up_float8<T>(plan, num_rows, first_part, end_part, shape_, out);
  }
  __device__ void add_up_to_send(const SumPlan& plan, uint32_t num_rows, uint32_t first_part,
                                 uint32_t end_part, const Sink& sink) const {
    add_up_to_float8<T>(plan, num_rows, first_part, end_part, shape_, sink);
  }

  class PartSum {
   public:
    __device__ explicit PartSum(uint32_t num_rows)
        : sums_{ChannelSum<T>(num_rows), ChannelSum<T>(num_rows)} {}
    // Whole warp.
    __device__ void add(const Part& p, float weight) {
      const uint32_t first_lane = threadIdx.x % kWarp / 8 * 8;
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t scale = __shfl_sync(kAllLanes, p.scale, first_lane + i);
        sums_[i].add_float8(p.vectors[i], __uint_as_float(scale), weight);
      }
    }
    __device__ void store(std::byte* out, uint32_t num_vectors, uint32_t part) const {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t vector = Part::vector(part, i);
        if (vector < num_vectors) sums_[i].store(out, vector);
      }
    }

   private:
    ChannelSum<T> sums_[2];
  };

 private:
  Float8Shape shape_;
};

// On the host. Calls `launch` with the TypeOf the rows of a layout's combine. `in_small_pieces`:
// where there are kernels for that.
template <typename Function>
void with_travelling_rows(const LowLatencyLayout& layout, bool in_small_pieces, Function&& launch) {
  with_type(layout, [&](auto value) {
    using T = decltype(value);
    if (layout.num_combine_scales() > 0) return launch(TypeOf<Float8Rows<T>>());
    if constexpr (PlainRows<T, 1>::kAreUsual) {
      if (in_small_pieces) return launch(TypeOf<PlainRows<T, 1>>());
    }
    launch(TypeOf<PlainRows<T, 2>>());
  });
}
template <typename Function>
void with_travelling_rows(const LowLatencyLayout& layout, Function&& launch) {
  with_travelling_rows(layout, false, launch);
}

}  // namespace ep::cuda
