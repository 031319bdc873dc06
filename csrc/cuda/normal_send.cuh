// Tokens on their way to their ranks: a warp loads a row into shared memory with the copy engine,
// once, and stores it from there to every rank that wants it.
#pragma once

#include "cuda/normal_route.cuh"
#include "cuda/part.cuh"
#include "protocol/scales.h"

namespace ep::cuda::normal {

// What a warp has of a row at once: a bfloat16 row of 7168. 8 SMs that stored 5 rows for each that
// they loaded moved 571 GB/s with 14 such warps; those that only store, 489 (H100). In channels of
// any type it is a multiple of 512, so that no word of scales is of two chunks.
constexpr uint32_t kChunkBytes = 14336;
constexpr uint32_t kChunkScales = kChunkBytes / 128;  // of float8 that arrives as such

// What a warp needs to move rows, in shared memory.
struct SendBuffer {
  std::byte* row;     // kChunkBytes
  float* scales;      // kChunkScales
  uint64_t* barrier;  // loads arrive here
};
constexpr uint32_t kSendBytes = kSendWarps * (kChunkBytes + kChunkScales * 4);

// Rows that travel as they are: float32, bfloat16, or float8 that the caller has quantised.
struct CopiedRows {
  const std::byte* x;  // [T, H]
  const float* scales;
  uint64_t row_bytes;
  uint32_t num_scales;

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
    ptx::fence_proxy_async();
    __syncwarp();
  }
};

// Rows of T that become float8 on the way, in place.
template <typename T>
struct QuantizedRows {
  const std::byte* x;  // [T, H]
  uint64_t row_bytes;
  uint32_t num_scales;
  protocol::ScaleFormat format;

  static constexpr uint32_t kBytesPerByte = sizeof(T);

  // 16 bytes of x are a vector; eight of a lane at a time, so that lanes which share a scale find
  // one of eight each. Lanes read neighbouring vectors: in a warp's 32, no bank of shared memory
  // twice. (A lane that reads the 32 bytes which it makes 16 of takes each bank twice.)
  __device__ void finish(const SendBuffer& buffer, uint32_t, uint32_t, uint32_t num_bytes) const {
    const uint32_t lane = threadIdx.x % kWarp, num_vectors = num_bytes / 16;
    const auto* vectors = reinterpret_cast<const uint4*>(buffer.row);
    for (uint32_t first = lane; first - lane < num_vectors; first += kAtOnce * kWarp) {
      uint4 inputs[kAtOnce];
      float amax[kAtOnce];
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        const uint32_t vector = first + v * kWarp;
        inputs[v] = vector < num_vectors ? vectors[vector] : uint4{};
        amax[v] = largest(inputs[v]);
      }
      const protocol::Scale own = protocol::scale_for(largest_of_sets(amax), format);
      const uint32_t group = (first + lane % kAtOnce * kWarp) / kLanesPerScale;
      if (lane % kLanesPerScale < kAtOnce && group * kLanesPerScale < num_vectors) {
        buffer.scales[group] = own.scale;
      }
      __syncwarp();  // all have read what is written now
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        const float inverse = __shfl_sync(kAllLanes, own.inverse, v, kAtOnce);
        if (first + v * kWarp < num_vectors) write(buffer, first + v * kWarp, inputs[v], inverse);
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();
  }

 private:
  static constexpr uint32_t kWidth = sizeof(uint4) / sizeof(T);  // channels of a vector
  static constexpr uint32_t kLanesPerScale = 128 / kWidth;
  static constexpr uint32_t kAtOnce = 8;

  // Of a vector, NaN left out.
  __device__ static float largest(const uint4& vector) { return QuantizeRow<T>::largest({vector}); }

  // `values[i]` of lanes that share a scale are set i; lane j returns the largest of set j mod 8.
  __device__ static float largest_of_sets(float (&values)[kAtOnce]) {
#pragma unroll
    for (uint32_t half = kAtOnce / 2; half > 0; half /= 2) {
      const bool is_upper = (threadIdx.x & half) != 0;
#pragma unroll
      for (uint32_t i = 0; i < half; ++i) {
        const float given = is_upper ? values[i] : values[i + half];
        const float kept = is_upper ? values[i + half] : values[i];
        values[i] = fmaxf(kept, __shfl_xor_sync(kAllLanes, given, half));
      }
    }
    float amax = values[0];
#pragma unroll
    for (uint32_t step = kAtOnce; step < kLanesPerScale; step *= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, step));
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
      reinterpret_cast<uint2*>(buffer.row)[vector] = {words[0], words[1]};
    } else {
      reinterpret_cast<uint32_t*>(buffer.row)[vector] = words[0];
    }
  }
};

// Ranks of a token, two in a lane.
struct Targets {
  uint64_t messages[2];
  uint64_t rows[2];  // at that rank
};

template <typename Rows>
class RowSender {
 public:
  __device__ RowSender(const Op& op, const Rows& rows, const NormalDispatch& params,
                       std::byte* shared, uint64_t* barriers)
      : op_(op),
        layout_(op.layout()),
        rows_(rows),
        params_(params),
        topk_(op.rank(), params),
        warp_(threadIdx.x / kWarp),
        lane_(threadIdx.x % kWarp) {
    stores_own_rows_ = op.num_ranks() > 1;
    has_bulk_scales_ = rows.num_scales > 0 && rows.num_scales % 4 == 0 &&
                       layout_.config().scale_format != protocol::ScaleFormat::kUE8M0;
    auto* scales = reinterpret_cast<float*>(shared + kSendWarps * kChunkBytes);
    buffer_ = {shared + warp_ * kChunkBytes, scales + warp_ * kChunkScales, barriers + warp_};
  }

  // Asks for the row that this warp sends first, while nobody knows yet where to. `run` from token
  // 0 to the last must follow, or `forget_first`: a block must not end before it is here.
  __device__ void fetch_first() {
    const uint32_t token = warp_ * gridDim.x + blockIdx.x;
    is_fetched_ = token < params_.routes.num_tokens;
    if (is_fetched_) load(token, 0);
  }
  __device__ void forget_first() {
    if (is_fetched_) await_load();
    is_fetched_ = false;
  }

  // Tokens begin .. end - 1, among all warps of the grid. `place(rank, number)`: in which row of
  // that rank its row `number` of this batch goes. Whole block; behind it, all is written.
  template <typename Place>
  __device__ void run(uint32_t begin, uint32_t end, Place place) {
    const uint64_t step = uint64_t{gridDim.x} * kSendWarps;
    for (uint64_t token = begin + warp_ * gridDim.x + blockIdx.x; token < end; token += step) {
      send(static_cast<uint32_t>(token), place);
    }
    ptx::bulk_wait_written();
    ptx::fence_proxy_async();
  }

 private:
  __device__ uint32_t chunk_bytes(uint32_t first) const {
    return min(kChunkBytes, static_cast<uint32_t>(rows_.row_bytes) - first);
  }
  // A chunk of a token's row, from byte `first` on. Whole warp, done with what is there.
  __device__ void load(uint32_t token, uint32_t first) const {
    __syncwarp();
    if (lane_ != 0) return;
    ptx::mbarrier_arrive_expect(buffer_.barrier, chunk_bytes(first));
    ptx::bulk_load(buffer_.row, rows_.x + token * rows_.row_bytes + first, chunk_bytes(first),
                   buffer_.barrier);
  }
  __device__ void await_load() {
    ptx::mbarrier_wait(buffer_.barrier, parity_);
    parity_ ^= 1;
  }

  template <typename Place>
  __device__ void send(uint32_t token, Place place) {
    Targets targets;
    for (uint32_t first = 0; first < rows_.row_bytes; first += kChunkBytes) {
      const uint32_t num_bytes = chunk_bytes(first);
      if (!is_fetched_) {
        ptx::bulk_wait_read();
        load(token, first);
      }
      is_fetched_ = false;
      if (first == 0) {
        find_targets(token, place, &targets);
        if (params_.start != DispatchStart::kCached) send_routes(token, targets);
      }
      await_load();
      rows_.finish(buffer_, token, first, num_bytes);
      const uint32_t first_out = first / Rows::kBytesPerByte;
      const uint32_t num_out = num_bytes / Rows::kBytesPerByte;
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        if (!is_sent_in_bulk(targets.messages[half])) continue;
        std::byte* peer = op_.peer(message_rank(targets.messages[half]));
        const uint64_t row = targets.rows[half];
        ptx::bulk_store(peer + layout_.row(row) + first_out, buffer_.row, num_out);
        if (has_bulk_scales_) {
          ptx::bulk_store(peer + layout_.scales(row) + first_out / 128 * 4, buffer_.scales,
                          protocol::scales_for(num_out) * 4);
        }
      }
      ptx::bulk_commit();
      if (stores_own_rows_) store_own(targets, first_out, num_out);
      if (rows_.num_scales > 0 && !has_bulk_scales_) {
        send_scales(targets, first_out / 128, num_out);
      }
    }
  }

  __device__ bool is_sent_in_bulk(uint64_t message) const {
    return message != kNoMessage &&
           !(stores_own_rows_ && message_rank(message) == op_.rank().self_rank);
  }

  // What this rank itself gets of the row, by ordinary stores: the copy engine takes one row after
  // the other, so those to peers would wait for those that stay here, and these for the link.
  __device__ void store_own(const Targets& targets, uint32_t first_out, uint32_t num_out) const {
    uint32_t owner = kNoRank;
    uint64_t row = 0;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint64_t message = targets.messages[half];
      const uint32_t lanes = __ballot_sync(
          kAllLanes, message != kNoMessage && message_rank(message) == op_.rank().self_rank);
      if (lanes == 0) continue;
      owner = op_.rank().self_rank;
      row = __shfl_sync(kAllLanes, targets.rows[half], __ffs(lanes) - 1);
    }
    if (owner == kNoRank) return;
    const auto* from = reinterpret_cast<const uint4*>(buffer_.row);
    auto* to = at<uint4>(op_.self(), layout_.row(row) + first_out);
#pragma unroll 7
    for (uint32_t v = lane_; v < num_out / 16; v += kWarp) to[v] = from[v];
    if (!has_bulk_scales_) return;
    auto* scales = at<float>(op_.self(), layout_.scales(row)) + first_out / 128;
    for (uint32_t i = lane_; i < protocol::scales_for(num_out); i += kWarp) {
      scales[i] = buffer_.scales[i];
    }
  }

  template <typename Place>
  __device__ void find_targets(uint32_t token, Place place, Targets* targets) const {
    const uint32_t num_columns = layout_.num_max_messages_per_token();
    const uint64_t* messages = params_.routes.messages + uint64_t{token} * num_columns;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t column = half * kWarp + lane_;
      // Other blocks have written them.
      const uint64_t message =
          column < num_columns ? ptx::ld_relaxed_gpu(messages + column) : kNoMessage;
      targets->messages[half] = message;
      targets->rows[half] =
          message == kNoMessage ? 0 : place(message_rank(message), message_number(message));
    }
  }

  // Calls `act(rank, row)` for every target; whole warp.
  template <typename Act>
  __device__ static void for_each(const Targets& targets, Act act) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t num_targets =
          __popc(__ballot_sync(kAllLanes, targets.messages[half] != kNoMessage));
      for (uint32_t i = 0; i < num_targets; ++i) {
        const uint64_t message = __shfl_sync(kAllLanes, targets.messages[half], i);
        act(message_rank(message), __shfl_sync(kAllLanes, targets.rows[half], i));
      }
    }
  }

  // To each rank of the token, its experts there and their weights, each at its k, and the token.
  __device__ void send_routes(uint32_t token, const Targets& targets) const {
    const Owners& owners = op_.rank().owners;
    int64_t experts[2];
    uint32_t ranks[2];
    float weights[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t k = half * kWarp + lane_;
      experts[half] = k < topk_.top_k ? topk_.expert(token, k) : -1;
      ranks[half] =
          experts[half] < 0 ? kNoRank : owners.owner(static_cast<uint32_t>(experts[half]));
      weights[half] =
          k < topk_.top_k ? params_.topk_weights[uint64_t{token} * topk_.top_k + k] : 0.0f;
    }
    for_each(targets, [&](uint32_t r, uint64_t row) {
      std::byte* peer = op_.peer(r);
      const uint32_t first_expert = owners.first_expert(r);
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t k = half * kWarp + lane_;
        if (k >= topk_.top_k) continue;
        const bool is_there = ranks[half] == r;
        at<int32_t>(peer, layout_.topk_idx(row))[k] =
            is_there ? static_cast<int32_t>(experts[half] - first_expert) : -1;
        at<float>(peer, layout_.topk_weights(row))[k] = is_there ? weights[half] : 0.0f;
      }
      if (lane_ == 0) *at<uint32_t>(peer, layout_.src_token(row)) = token;
    });
  }

  // Those of `num_channels` channels, from the row's `first_scale`-th on, as the experts take them.
  __device__ void send_scales(const Targets& targets, uint32_t first_scale,
                              uint32_t num_channels) const {
    const protocol::ScaleFormat format = layout_.config().scale_format;
    const uint32_t per_word = format == protocol::ScaleFormat::kUE8M0 ? 4 : 1;
    const uint32_t num_scales = protocol::scales_for(num_channels);
    const uint32_t num_words = (num_scales + per_word - 1) / per_word;
    for (uint32_t word = lane_; word - lane_ < num_words; word += kWarp) {
      const uint32_t value =
          word < num_words ? protocol::scale_word(format, buffer_.scales, num_scales, word) : 0;
      for_each(targets, [&](uint32_t r, uint64_t row) {
        auto* words = at<uint32_t>(op_.peer(r), layout_.scales(row)) + first_scale / per_word;
        if (word < num_words) words[word] = value;
      });
    }
    __syncwarp();  // they may be overwritten
  }

  const Op& op_;
  const NormalDeviceLayout& layout_;
  const Rows& rows_;
  const NormalDispatch& params_;
  TopK topk_;
  uint32_t warp_, lane_;
  bool is_fetched_ = false;
  bool has_bulk_scales_;  // they travel as they are, in whole vectors
  bool stores_own_rows_;
  SendBuffer buffer_;
  uint32_t parity_ = 0;
};

}  // namespace ep::cuda::normal
