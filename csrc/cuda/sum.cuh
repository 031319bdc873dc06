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

  __device__ void store(const Part& p, uint32_t num_vectors, uint32_t part) const {
    if (is_tagged) {
      fill_blanks(p, row, num_vectors, part);
    } else {
      store_vectors(p, row, num_vectors, part);
    }
  }
};

// kParts parts, kRows rows at a time: so many loads are on their way together.
template <typename T, uint32_t kParts, uint32_t kRows>
__device__ void sum_some_parts(const SumPlan& plan, uint32_t num_rows, uint32_t num_vectors,
                               uint32_t first_part, uint32_t end_part, const Sink& sink) {
  const Lane lane;
#pragma unroll 1
  for (uint32_t part = first_part; part < end_part; part += kParts) {
    Sum<T> sums[kParts][2];
#pragma unroll 1
    for (uint32_t first = 0; first < num_rows; first += kRows) {
      uint4 vectors[kRows][kParts][2];
      const uint4* rows[kRows];  // all, before the first load of a row would hold up the others
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        rows[r] = reinterpret_cast<const uint4*>(plan.rows[first + r < num_rows ? first + r : 0]);
      }
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        const bool has_row = first + r < num_rows;
#pragma unroll
        for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
          for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t vector = lane.vector(part + p, i);
            vectors[r][p][i] = {};
            if (has_row && part + p < end_part && vector < num_vectors) {
              vectors[r][p][i] = ptx::ld_row(rows[r] + vector);
            }
          }
        }
      }
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        if (first + r < num_rows) {
          const float weight = plan.weights[first + r];
#pragma unroll
          for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
              sums[p][i].add(vectors[r][p][i], weight, first + r == 0);
            }
          }
        }
      }
    }
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
      if (part + p < end_part) {
        const Part out = {{sums[p][0].rounded(), sums[p][1].rounded()}, 0};
        sink.store(out, num_vectors, part + p);
      }
    }
  }
}

// The same for a single row: nothing is kept but the row, so more parts fit.
template <typename T, uint32_t kParts>
__device__ void scale_some_parts(const SumPlan& plan, uint32_t num_vectors, uint32_t first_part,
                                 uint32_t end_part, const Sink& sink) {
  const Lane lane;
  const auto* row = reinterpret_cast<const uint4*>(plan.rows[0]);
  const float weight = plan.weights[0];
#pragma unroll 1
  for (uint32_t part = first_part; part < end_part; part += kParts) {
    uint4 vectors[kParts][2] = {};
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t vector = lane.vector(part + p, i);
        if (part + p < end_part && vector < num_vectors) {
          vectors[p][i] = ptx::ld_row(row + vector);
        }
      }
    }
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
      Part out = {};
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        Sum<T> sum;
        sum.add(vectors[p][i], weight, true);
        out.vectors[i] = sum.rounded();
      }
      if (part + p < end_part) sink.store(out, num_vectors, part + p);
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

// Parts first_part .. end_part - 1 of a row as they are. One warp.
__device__ EP_OUT_OF_LINE void copy_parts(const std::byte* row, uint32_t num_vectors,
                                          uint32_t first_part, uint32_t end_part, Sink sink) {
  const RowView view = {const_cast<std::byte*>(row), nullptr};
#pragma unroll 2
  for (uint32_t part = first_part; part < end_part; ++part) {
    sink.store(load_part(view, {num_vectors, 0}, part, ptx::ld_row), num_vectors, part);
  }
}

// Parts first_part .. end_part - 1 of the sum. One warp.
template <typename T>
__device__ EP_OUT_OF_LINE void sum_parts(const SumPlan& plan, uint32_t num_rows,
                                         uint32_t num_vectors, uint32_t first_part,
                                         uint32_t end_part, Sink sink) {
  if (num_rows == 1) {
    scale_some_parts<T, 4>(plan, num_vectors, first_part, end_part, sink);
  } else if (num_rows == 2) {
    sum_some_parts<T, 2, 2>(plan, num_rows, num_vectors, first_part, end_part, sink);
  } else if (num_rows <= 4) {
    sum_some_parts<T, 1, 4>(plan, num_rows, num_vectors, first_part, end_part, sink);
  } else {
    sum_some_parts<T, 1, 8>(plan, num_rows, num_vectors, first_part, end_part, sink);
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
