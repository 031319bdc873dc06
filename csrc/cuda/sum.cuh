// Weighted sums of rows, in their order; a product is rounded only with the sum it is added to: the
// bits are those of csrc/cpu/rows.cpp.
#pragma once

#include "cuda/part.cuh"
#include "protocol/op.h"

namespace ep::cuda {

using protocol::kMaxTopK;

// With what a sum of so many rows begins: -0, to which anything can be added and keeps its sign.
__device__ inline float start_of_sum(uint32_t num_rows) { return num_rows == 0 ? 0.0f : -0.0f; }

// 16 bytes of a row of T, as a lane adds them up.
template <typename T>
struct Sum {
  static constexpr uint32_t kWidth = sizeof(uint4) / sizeof(T);
  float acc[kWidth];

  __device__ void start(float value) {
#pragma unroll
    for (uint32_t c = 0; c < kWidth; ++c) acc[c] = value;
  }
  __device__ void add(const uint4& vector, float weight) {
    float values[kWidth];
    widen(vector, values);
#pragma unroll
    for (uint32_t c = 0; c < kWidth; ++c) acc[c] = __fmaf_rn(weight, values[c], acc[c]);
  }
  __device__ uint4 rounded() const;
};

template <>
__device__ inline uint4 Sum<float>::rounded() const {
  return {__float_as_uint(acc[0]), __float_as_uint(acc[1]), __float_as_uint(acc[2]),
          __float_as_uint(acc[3])};
}
template <>
__device__ inline uint4 Sum<__nv_bfloat16>::rounded() const {
  uint32_t words[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(acc[2 * i], acc[2 * i + 1]);
    memcpy(&words[i], &pair, sizeof pair);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Rows to add up, in this order. In shared memory, one for each warp.
struct SumPlan {
  std::byte* rows[kMaxTopK];
  float weights[kMaxTopK];
};

// Where a sum goes: a row, or one of a tagged batch, which says of itself that it is there.
struct Sink {
  std::byte* row;
  bool is_tagged;
  uint32_t tag;

  template <uint32_t kVectors>
  __device__ void store(const Piece<kVectors>& p, uint32_t num_vectors, uint32_t piece) const {
    if (is_tagged) {
      p.fill(row, num_vectors, piece);
    } else {
      p.store(row, num_vectors, piece);
    }
  }
};

// A piece of a sum.
template <typename T, uint32_t kVectors>
class PieceSum {
 public:
  // Of how many rows.
  __device__ void start(uint32_t num_rows) {
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) of_vector_[i].start(start_of_sum(num_rows));
  }
  __device__ void add(const Piece<kVectors>& p, float weight) {
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) of_vector_[i].add(p.vectors[i], weight);
  }
  __device__ Piece<kVectors> rounded() const {
    Piece<kVectors> p;
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) p.vectors[i] = of_vector_[i].rounded();
    return p;
  }

 private:
  Sum<T> of_vector_[kVectors];
};

// kPieces pieces, kRows rows at a time: so many loads are on their way together.
template <typename T, uint32_t kVectors, uint32_t kPieces, uint32_t kRows>
__device__ void sum_some_pieces(const SumPlan& plan, uint32_t num_rows, uint32_t num_vectors,
                                uint32_t first_piece, uint32_t end_piece, const Sink& sink) {
  static_assert(kMaxTopK % kRows == 0);
#pragma unroll 1
  for (uint32_t piece = first_piece; piece < end_piece; piece += kPieces) {
    PieceSum<T, kVectors> sums[kPieces];
#pragma unroll
    for (uint32_t p = 0; p < kPieces; ++p) sums[p].start(num_rows);
#pragma unroll 1
    for (uint32_t first = 0; first < num_rows; first += kRows) {
      const uint32_t num_left = num_rows - first;
      // All, before the first load of a row would hold up the others; behind the last there is
      // room.
      const std::byte* rows[kRows];
      float weights[kRows];
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        rows[r] = plan.rows[first + r], weights[r] = plan.weights[first + r];
      }
      Piece<kVectors> pieces[kRows][kPieces];
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
#pragma unroll
        for (uint32_t p = 0; p < kPieces; ++p) {
          const bool is_there = r < num_left && piece + p < end_piece;
          pieces[r][p].load(rows[r], num_vectors, piece + p, ptx::ld_row, is_there);
        }
      }
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        if (r < num_left) {
#pragma unroll
          for (uint32_t p = 0; p < kPieces; ++p) sums[p].add(pieces[r][p], weights[r]);
        }
      }
    }
#pragma unroll
    for (uint32_t p = 0; p < kPieces; ++p) {
      if (piece + p < end_piece) sink.store(sums[p].rounded(), num_vectors, piece + p);
    }
  }
}

// The same for a single row: nothing is kept but the row, so more pieces fit.
template <typename T, uint32_t kVectors, uint32_t kPieces>
__device__ void scale_some_pieces(const SumPlan& plan, uint32_t num_vectors, uint32_t first_piece,
                                  uint32_t end_piece, const Sink& sink) {
  const float weight = plan.weights[0];
#pragma unroll 1
  for (uint32_t piece = first_piece; piece < end_piece; piece += kPieces) {
    Piece<kVectors> pieces[kPieces];
#pragma unroll
    for (uint32_t p = 0; p < kPieces; ++p) {
      pieces[p].load(plan.rows[0], num_vectors, piece + p, ptx::ld_row, piece + p < end_piece);
    }
#pragma unroll
    for (uint32_t p = 0; p < kPieces; ++p) {
      PieceSum<T, kVectors> sum;
      sum.start(1);
      sum.add(pieces[p], weight);
      if (piece + p < end_piece) sink.store(sum.rounded(), num_vectors, piece + p);
    }
  }
}

// For what kernels call in several places, so that their code stays small. Not where device code is
// linked later: there a call saves to memory all registers that the function may use. Combine's
// send over NVSHMEM took 20 us with calls and takes 10 without, its hook 9.8 and 4.7 (1 rank, 128
// tokens, H100).
#ifdef __CUDACC_RDC__
#define EP_OUT_OF_LINE __forceinline__
#else
#define EP_OUT_OF_LINE __noinline__ inline
#endif

// Pieces first_piece .. end_piece - 1 of a row as they are. One warp.
template <uint32_t kVectors>
__device__ EP_OUT_OF_LINE void copy_pieces(const std::byte* row, uint32_t num_vectors,
                                           uint32_t first_piece, uint32_t end_piece, Sink sink) {
#pragma unroll 2
  for (uint32_t piece = first_piece; piece < end_piece; ++piece) {
    Piece<kVectors> p;
    p.load(row, num_vectors, piece, ptx::ld_row);
    sink.store(p, num_vectors, piece);
  }
}

// Pieces first_piece .. end_piece - 1 of the sum. One warp.
template <typename T, uint32_t kVectors>
__device__ EP_OUT_OF_LINE void sum_pieces(const SumPlan& plan, uint32_t num_rows,
                                          uint32_t num_vectors, uint32_t first_piece,
                                          uint32_t end_piece, Sink sink) {
  if (num_rows == 1) {
    scale_some_pieces<T, kVectors, 4>(plan, num_vectors, first_piece, end_piece, sink);
  } else if (num_rows == 2) {
    sum_some_pieces<T, kVectors, 2, 2>(plan, num_rows, num_vectors, first_piece, end_piece, sink);
  } else if (num_rows <= 4) {
    sum_some_pieces<T, kVectors, 1, 4>(plan, num_rows, num_vectors, first_piece, end_piece, sink);
  } else {
    sum_some_pieces<T, kVectors, 1, 8>(plan, num_rows, num_vectors, first_piece, end_piece, sink);
  }
}

// On the host. Calls `launch` with a value of the rows' type.
template <typename Function>
void with_type(const protocol::LowLatencyLayout& layout, Function&& launch) {
  if (layout.config().dtype == protocol::DType::kBFloat16) {
    launch(__nv_bfloat16{});
  } else {
    launch(float{});
  }
}

}  // namespace ep::cuda
