// Sums of rows that lie in peers' memory. A warp adds up a token's rows piece by piece; the copy
// engine brings the pieces, some ahead, into a ring of the warp's own, in the order of the sum:
// every addition is rounded on its own, so the bits are those of csrc/cpu/rows.cpp.
#pragma once

#include "cuda/normal_route.cuh"
#include "cuda/sum.cuh"

namespace ep::cuda::normal {

// Of a block of combine, and pieces of a warp's ring. Adding up is what takes the time: 8 SMs took
// 2915 us for what 14 warps with 4 pieces of half the size took 3923 us for, and 16 with 6 pieces
// of 2 KiB 9590 us (4096 tokens of 8 ranks, hidden 7168, H100).
constexpr uint32_t kPullWarps = 12;
constexpr uint32_t kPullThreads = kPullWarps * kWarp;
constexpr uint32_t kPieces = 2;
constexpr uint32_t kPieceBytes = 7168;
constexpr uint32_t kPieceVectors = kPieceBytes / (16 * kWarp);  // of a lane
static_assert(kPieceVectors * 16 * kWarp == kPieceBytes);
constexpr uint32_t kNumMaxTerms = kMaxTopK + 2;  // rows of a token and its biases

// 16 bytes of a row of T, as a lane adds them up.
template <typename T>
struct Accumulator {
  static constexpr uint32_t kWidth = sizeof(uint4) / sizeof(T);
  float values[kWidth];

  // The first one is not added to anything: 0 + -0 would lose a sign.
  __device__ void set(const uint4& vector) { widen(vector, values); }
  __device__ void add(const uint4& vector) {
    float terms[kWidth];
    widen(vector, terms);
#pragma unroll
    for (uint32_t c = 0; c < kWidth; ++c) values[c] = __fadd_rn(values[c], terms[c]);
  }
  __device__ uint4 rounded() const {
    Sum<T> sum;
#pragma unroll
    for (uint32_t c = 0; c < kWidth; ++c) sum.acc[c] = values[c];
    return sum.rounded();
  }
};

// The rows of a token, in the order in which they are added.
struct Terms {
  const std::byte* rows[kNumMaxTerms];
};

// A warp's ring, in shared memory.
struct Ring {
  std::byte* pieces;   // [kPieces][kPieceBytes]
  uint64_t* barriers;  // [kPieces], and what the owner of the ring adds
  Terms* terms;        // [2]: of the token that is added up, and of the next
};

template <typename T>
class Puller {
 public:
  __device__ Puller(const Op& op, Ring ring)
      : ring_(ring),
        lane_(threadIdx.x % kWarp),
        row_bytes_(static_cast<uint32_t>(op.layout().row_bytes())),
        num_chunks_((row_bytes_ + kPieceBytes - 1) / kPieceBytes),
        chunk_bytes_(align_16((row_bytes_ + num_chunks_ - 1) / num_chunks_)) {}

  // Tokens begin .. end - 1, among all warps of the grid, into `out` [T, H]. `find(token, terms)`
  // writes where a token's rows are and returns how many; whole warp.
  template <typename Find>
  __device__ void run(uint32_t begin, uint32_t end, std::byte* out, Find find) {
    const uint64_t step = uint64_t{gridDim.x} * kPullWarps;
    uint64_t token = begin + threadIdx.x / kWarp * gridDim.x + blockIdx.x;
    num_next_ = find_or_none(token, end, 0, find);
    fetch_ = {1, 0, 0};
    for (uint32_t current = 0; token < end; token += step, current ^= 1) {
      // What was the next token is this one.
      num_terms_ = num_next_;
      --fetch_.token;
      num_next_ = find_or_none(token + step, end, current ^ 1, find);
      fetch_more(current);
      add_up(current, out + token * row_bytes_);
    }
  }

 private:
  // What is asked for next: a piece of this token (0), of the next (1), or nothing yet (2).
  struct Fetch {
    uint32_t token, chunk, term;
  };

  template <typename Find>
  __device__ uint32_t find_or_none(uint64_t token, uint32_t end, uint32_t which, Find find) const {
    __syncwarp();  // the terms that were there have been asked for
    const uint32_t num_terms =
        token < end ? find(static_cast<uint32_t>(token), &ring_.terms[which]) : 0;
    __syncwarp();
    return num_terms;
  }

  __device__ uint32_t bytes_of(uint32_t chunk) const {
    return min(chunk_bytes_, row_bytes_ - chunk * chunk_bytes_);
  }

  // Fills the ring with pieces of this token and the next.
  __device__ void fetch_more(uint32_t current) {
    while (num_fetched_ - num_used_ < kPieces) {
      if (fetch_.token == 0 && num_terms_ == 0) fetch_ = {1, 0, 0};
      if (fetch_.token == 1 && num_next_ == 0) fetch_ = {2, 0, 0};
      if (fetch_.token == 2) return;
      if (lane_ == 0) {
        const uint32_t num_bytes = bytes_of(fetch_.chunk), piece = num_fetched_ % kPieces;
        const Terms& terms = ring_.terms[current ^ fetch_.token];
        ptx::mbarrier_arrive_expect(&ring_.barriers[piece], num_bytes);
        ptx::bulk_load(ring_.pieces + piece * kPieceBytes,
                       terms.rows[fetch_.term] + fetch_.chunk * chunk_bytes_, num_bytes,
                       &ring_.barriers[piece]);
      }
      ++num_fetched_;
      if (++fetch_.term < (fetch_.token == 0 ? num_terms_ : num_next_)) continue;
      fetch_.term = 0;
      if (++fetch_.chunk == num_chunks_) fetch_ = {fetch_.token + 1, 0, 0};
    }
  }

  __device__ void add_up(uint32_t current, std::byte* out) {
    for (uint32_t chunk = 0; chunk < num_chunks_; ++chunk) {
      Accumulator<T> sums[kPieceVectors] = {};
      for (uint32_t term = 0; term < num_terms_; ++term) {
        const uint32_t piece = num_used_ % kPieces;
        ptx::mbarrier_wait(&ring_.barriers[piece], num_used_ / kPieces & 1);
        const auto* vectors =
            reinterpret_cast<const uint4*>(ring_.pieces + piece * kPieceBytes) + lane_;
        if (term == 0) {
#pragma unroll
          for (uint32_t v = 0; v < kPieceVectors; ++v) sums[v].set(vectors[v * kWarp]);
        } else {
#pragma unroll
          for (uint32_t v = 0; v < kPieceVectors; ++v) sums[v].add(vectors[v * kWarp]);
        }
        __syncwarp();  // all lanes have read it
        ++num_used_;
        fetch_more(current);
      }
      const uint32_t num_vectors = bytes_of(chunk) / 16;
      auto* row = reinterpret_cast<uint4*>(out + chunk * chunk_bytes_) + lane_;
#pragma unroll
      for (uint32_t v = 0; v < kPieceVectors; ++v) {
        if (v * kWarp + lane_ < num_vectors) row[v * kWarp] = sums[v].rounded();
      }
    }
  }

  Ring ring_;
  uint32_t lane_, row_bytes_, num_chunks_, chunk_bytes_;
  uint32_t num_terms_ = 0, num_next_ = 0;
  Fetch fetch_ = {};
  uint32_t num_fetched_ = 0, num_used_ = 0;  // pieces, over all runs
};

}  // namespace ep::cuda::normal
