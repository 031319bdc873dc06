// Weighted sums of rows. Every product and every sum is rounded on its own, in the order of the
// rows: the bits are those of csrc/cpu/rows.cpp.
#pragma once

#include "cuda/part.cuh"
#include "protocol/op.h"

namespace ep::cuda {

using protocol::kMaxTopK;

// 16 bytes of a row of T, as a lane adds them up.
template <typename T>
struct Sum {
  static constexpr uint32_t kWidth = sizeof(uint4) / sizeof(T);
  float acc[kWidth] = {};

  // The first one is not added to anything: 0 + -0 would lose a sign.
  __device__ void add(const uint4& vector, float weight, bool is_first) {
    float values[kWidth];
    widen(vector, values);
#pragma unroll
    for (uint32_t c = 0; c < kWidth; ++c) {
      const float product = __fmul_rn(weight, values[c]);
      acc[c] = is_first ? product : __fadd_rn(acc[c], product);
    }
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
struct PieceSum {
  Sum<T> of_vector[kVectors];

  __device__ void add(const Piece<kVectors>& p, float weight, bool is_first) {
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) of_vector[i].add(p.vectors[i], weight, is_first);
  }
  __device__ Piece<kVectors> rounded() const {
    Piece<kVectors> p;
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) p.vectors[i] = of_vector[i].rounded();
    return p;
  }
};

// kPieces pieces, kRows rows at a time: so many loads are on their way together.
template <typename T, uint32_t kVectors, uint32_t kPieces, uint32_t kRows>
__device__ void sum_some_pieces(const SumPlan& plan, uint32_t num_rows, uint32_t num_vectors,
                                uint32_t first_piece, uint32_t end_piece, const Sink& sink) {
#pragma unroll 1
  for (uint32_t piece = first_piece; piece < end_piece; piece += kPieces) {
    PieceSum<T, kVectors> sums[kPieces];
#pragma unroll 1
    for (uint32_t first = 0; first < num_rows; first += kRows) {
      Piece<kVectors> pieces[kRows][kPieces];
      const std::byte* rows[kRows];  // all, before the first load of a row would hold up the others
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        rows[r] = plan.rows[first + r < num_rows ? first + r : 0];
      }
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
#pragma unroll
        for (uint32_t p = 0; p < kPieces; ++p) {
          const bool is_there = first + r < num_rows && piece + p < end_piece;
          pieces[r][p].load(rows[r], is_there ? num_vectors : 0, piece + p, ptx::ld_row);
        }
      }
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        if (first + r < num_rows) {
          const float weight = plan.weights[first + r];
#pragma unroll
          for (uint32_t p = 0; p < kPieces; ++p) {
            sums[p].add(pieces[r][p], weight, first + r == 0);
          }
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
      const bool is_there = piece + p < end_piece;
      pieces[p].load(plan.rows[0], is_there ? num_vectors : 0, piece + p, ptx::ld_row);
    }
#pragma unroll
    for (uint32_t p = 0; p < kPieces; ++p) {
      PieceSum<T, kVectors> sum;
      sum.add(pieces[p], weight, true);
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
