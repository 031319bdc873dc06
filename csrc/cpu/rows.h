// Arithmetic on rows of `hidden` elements, the same bits on every CPU and GPU: terms are added in
// the order given, and a weighted one by a fused multiply-add, which rounds to float32 once. All
// else is rounded one by one, whatever a compiler would like to fuse.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "protocol/float8.h"

namespace ep::cpu {

// Where a written row is expected to be read.
enum class Store {
  kCached,    // soon, by this core: an ordinary store
  kStreamed,  // later, or by another core: past the caches, straight to memory
};

// How to write `num_bytes` of rows that a peer reads.
Store store_for_peer(uint64_t num_bytes);
// How to write `num_bytes` of rows that this rank reads, where `num_alike` ranks and banks hold as
// many each.
Store store_for_self(uint64_t num_bytes, uint32_t num_alike);

// Streamed rows are not ordered by release stores: call this before a signal publishes them.
void fence_streamed_rows();

void copy_row(std::byte* out, const std::byte* row, uint64_t row_bytes, Store store);

// How the rows of a sum lie in memory.
struct RowFormat {
  protocol::DType dtype;
  uint64_t scales_in_row = 0;  // bytes; float8 only, float32 scales
};

// out[i] = fma(weights[1], rows[1][i], weights[0] * rows[0][i]) and so on, float32 inside, stored
// as `dtype`, which is that of the rows, or float32, or with rows of float8 any other. `weights`
// null adds the rows up. No rows: zeros.
void weighted_sum(RowFormat format, protocol::DType dtype, std::byte* out,
                  const std::byte* const* rows, const float* weights, uint32_t num_rows,
                  uint32_t hidden, Store store);

// A row of `dtype` as float8: `values` [hidden] and a scale for every 128 of them, as
// protocol/float8.h defines them.
void quantize_row(protocol::DType dtype, protocol::ScaleFormat format, const std::byte* row,
                  uint32_t hidden, std::byte* values, float* scales);

// Where a row that is about to be sent lies.
struct Row {
  const std::byte* values;  // [H] of dispatch_dtype
  const float* scales;      // [N], float8 only
};

// Rows of x as they travel: quantised here, unless they are not float8, or are so already.
class OutgoingRows {
 public:
  OutgoingRows(protocol::DType dtype, protocol::DType dispatch_dtype, protocol::ScaleFormat format,
               uint32_t hidden);

  // The row of one token. Valid until the next call. `x_scales` is read where `is_quantized`.
  Row at(const std::byte* x, const float* x_scales, bool is_quantized, uint64_t token);

 private:
  protocol::DType dtype_;
  protocol::ScaleFormat format_;
  uint32_t hidden_;
  uint32_t num_scales_;
  uint64_t row_bytes_, dispatch_row_bytes_;
  std::vector<std::byte> values_;
  std::vector<float> scales_;
};

}  // namespace ep::cpu
