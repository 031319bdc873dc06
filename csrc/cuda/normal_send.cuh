// Tokens on their way to their ranks: a warp loads a row into shared memory with the copy engine,
// once, and stores it from there to every rank that wants it.
#pragma once

#include "cuda/normal_route.cuh"
#include "cuda/normal_rows.cuh"

namespace ep::cuda::normal {

// Which rows a block sends, and with which blocks it shares them.
//
// Between two GPUs half of the rows stay at home. Where bulk stores to the peer and at home leave
// one SM, they wait for each other. With SMs for both, some copy what stays at home and the others
// send. 8192 bfloat16 rows of 7168 from each of two H100s (NV18) to both, us on 14 / 16 / 18 / 20 /
// 24 / 32 SMs: 352 / 381 / - / 429 / 418 / 387 where all SMs do both; 402 / 347 / 335 / 342 / 331 /
// 330 with these roles. On 24 that is 354 GB/s over the link, where copy engines reach 387. On
// fewer SMs rows would be loaded twice for nothing.
//
// Of more GPUs less stays at home, and the link wants all SMs: four H200s took 1093 and 1031 us for
// as many rows each on 16 and 24 SMs, three of which copied at home, and 1068 and 988 where all
// did both.
struct Role {
  uint32_t block = blockIdx.x, num_blocks = gridDim.x;  // among those of this role
  bool sends_own = true, sends_to_peers = true;

  __device__ Role() {}
  __device__ explicit Role(const NormalView& rank) {
    const bool has_one_peer = rank.layout.config().num_ranks == 2;
    if (rank.shares_gpu || !has_one_peer || gridDim.x < kNumLinkSMs + kNumLeastOwnSMs) return;
    const uint32_t num_own = min(kNumOwnSMs, gridDim.x - kNumLinkSMs);
    sends_own = blockIdx.x < num_own;
    sends_to_peers = !sends_own;
    block = sends_own ? blockIdx.x : blockIdx.x - num_own;
    num_blocks = sends_own ? num_own : gridDim.x - num_own;
  }

 private:
  static constexpr uint32_t kNumLinkSMs = 9;  // fill the link, nearly
  static constexpr uint32_t kNumOwnSMs = 8;   // copy as much at home meanwhile
  static constexpr uint32_t kNumLeastOwnSMs = 7;
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
        lane_(threadIdx.x % kWarp),
        buffer_(Rows::buffer(shared, barriers)) {
    if constexpr (kHasRoles) role_ = Role(op.rank());
    has_bulk_scales_ = rows.num_scales > 0 && rows.num_scales % 4 == 0 &&
                       layout_.config().scale_format != protocol::ScaleFormat::kUE8M0;
  }

  // Asks for the row that this warp sends first, while nobody knows yet where to. `run` from token
  // 0 to the last must follow, or `forget_first`: a block must not end before it is here.
  __device__ void fetch_first() {
    const uint32_t token = first_token();
    is_fetched_ = token < params_.routes.num_tokens;
    if (is_fetched_) load(token, 0);
  }
  __device__ void forget_first() {
    if (is_fetched_) await_load();
    is_fetched_ = false;
  }

  // Tokens begin .. end - 1, among all warps of the role. `place(rank, number)`: in which row of
  // that rank its row `number` of this batch goes. Whole block; behind `finish`, all is written.
  template <typename Place>
  __device__ void run(uint32_t begin, uint32_t end, Place place) {
    const uint64_t step = uint64_t{role_.num_blocks} * num_warps();
    for (uint64_t token = uint64_t{begin} + first_token(); token < end; token += step) {
      const bool is_last = token + step >= end;
      send(static_cast<uint32_t>(token), is_last ? kNoToken : static_cast<uint32_t>(token + step),
           place);
    }
  }
  __device__ void finish() const {
    ptx::bulk_wait_written();
    ptx::fence_proxy_async();
  }

 private:
  // Rows that become float8 take SMs longer than the link: they are made once, for all ranks.
  static constexpr bool kHasRoles = Rows::kIsInPlace;
  static constexpr uint32_t kNoToken = 0xffffffff;

  // Of a block. Float8 rows that many SMs send over one link hold each other up: two H200s took 220
  // us for 8192 tokens from 24 SMs with 16 warps each, 191 with 10. (Between more GPUs 24 SMs with
  // 16 were faster than 16 with as many, and fewer were not tried.)
  __device__ uint32_t num_warps() const {
    constexpr uint32_t kNumSenders = 256;
    if (Rows::kIsInPlace || op_.rank().shares_gpu || op_.num_ranks() != 2) return Rows::kNumWarps;
    return max(min(Rows::kNumWarps, kNumSenders / gridDim.x), 1);
  }
  // Of a batch, this warp's; none, where it sends nothing.
  __device__ uint32_t first_token() const {
    return warp_ < num_warps() ? warp_ * role_.num_blocks + role_.block : kNoToken;
  }
  __device__ uint32_t chunk_bytes(uint32_t first) const {
    return min(Rows::kChunkBytes, static_cast<uint32_t>(rows_.row_bytes) - first);
  }
  // A chunk of a token's row, from byte `first` on. Whole warp, done with what is there.
  __device__ void load(uint32_t token, uint32_t first) const {
    __syncwarp();
    if (lane_ != 0) return;
    ptx::mbarrier_arrive_expect(buffer_.barrier, chunk_bytes(first));
    ptx::bulk_load(buffer_.in, rows_.x + token * rows_.row_bytes + first, chunk_bytes(first),
                   buffer_.barrier);
  }
  __device__ void await_load() {
    ptx::mbarrier_wait(buffer_.barrier, parity_);
    parity_ ^= 1;
  }

  // `next_token`: this warp's next one, or none.
  template <typename Place>
  __device__ void send(uint32_t token, uint32_t next_token, Place place) {
    Targets targets;
    for (uint32_t first = 0; first < rows_.row_bytes; first += Rows::kChunkBytes) {
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
      if constexpr (!Rows::kIsInPlace) {
        ptx::bulk_wait_read();
        __syncwarp();
      }
      rows_.finish(buffer_, token, first, num_bytes);
      if constexpr (!Rows::kIsInPlace) fetch_next(token, first, next_token);
      const uint32_t first_out = first / Rows::kBytesPerByte;
      const uint32_t num_out = num_bytes / Rows::kBytesPerByte;
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint64_t message = targets.messages[half];
        if (message == kNoMessage || is_stored_by_lanes(message)) continue;
        std::byte* peer = op_.peer(message_rank(message));
        const uint64_t row = targets.rows[half];
        ptx::bulk_store(peer + layout_.row(row) + first_out, buffer_.out, num_out);
        if (has_bulk_scales_) {
          ptx::bulk_store(peer + layout_.scales(row) + first_out / 128 * 4, buffer_.scales,
                          protocol::scales_for(num_out) * 4);
        }
      }
      ptx::bulk_commit();
      store_by_lanes(targets, first_out, num_out);
      if (rows_.num_scales > 0 && !has_bulk_scales_) {
        send_scales(targets, first_out / 128, num_out);
      }
    }
  }

  // The chunk behind this one, which is made already.
  __device__ void fetch_next(uint32_t token, uint32_t first, uint32_t next_token) {
    const uint32_t next = first + Rows::kChunkBytes;
    is_fetched_ = next < rows_.row_bytes || next_token != kNoToken;
    if (!is_fetched_) return;
    if (next < rows_.row_bytes) {
      load(token, next);
    } else {
      load(next_token, 0);
    }
  }

  __device__ bool is_own(uint64_t message) const {
    return message != kNoMessage && message_rank(message) == op_.rank().self_rank;
  }
  // By ordinary stores; all else by the copy engine.
  //
  // Float8 rows that stay: while rows are made, the copy engine has time for the others. 8 ranks of
  // one H100 took 6432 us so, 7063 us where it stored all (chunks of 7168 bytes).
  //
  // Rows as they are for several peers: four H200s took 1126 us on 8 SMs for 8192 bfloat16 rows,
  // and 1202 us where the copy engine stored all; on 24 SMs as long. To one peer there is no
  // difference, nor where all are stored so.
  __device__ bool is_stored_by_lanes(uint64_t message) const {
    if (message == kNoMessage) return false;
    if (!Rows::kIsInPlace) return op_.num_ranks() > 1 && is_own(message);
    return op_.num_ranks() > 2 && !op_.rank().shares_gpu && !is_own(message);
  }

  // Whole warp.
  __device__ void store_by_lanes(const Targets& targets, uint32_t first_out,
                                 uint32_t num_out) const {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const bool is_target = is_stored_by_lanes(targets.messages[half]);
      const uint32_t lanes = __ballot_sync(kAllLanes, is_target);
      if (lanes == 0) continue;
      std::byte* peer = is_target ? op_.peer(message_rank(targets.messages[half])) : nullptr;
      const uint64_t row = targets.rows[half];
      store_vectors(buffer_.out, num_out / 16, peer + layout_.row(row) + first_out, lanes);
      if (!has_bulk_scales_) continue;
      const uint32_t num_vectors = protocol::scales_for(num_out) / 4;
      store_vectors(buffer_.scales, num_vectors, peer + layout_.scales(row) + first_out / 128 * 4,
                    lanes);
    }
    __syncwarp();  // they may be overwritten
  }

  // Vectors of shared memory, each read once, to where each of `lanes` has its `to`.
  __device__ void store_vectors(const void* shared, uint32_t num_vectors, std::byte* to,
                                uint32_t lanes) const {
    constexpr uint32_t kUnroll = Rows::kIsInPlace ? 7 : 8;  // whole chunks of 7168 elements, or all
    const auto* from = static_cast<const uint4*>(shared);
#pragma unroll 1
    for (uint32_t first = lane_; first - lane_ < num_vectors; first += kUnroll * kWarp) {
      uint4 vectors[kUnroll];
#pragma unroll
      for (uint32_t u = 0; u < kUnroll; ++u) {
        if (first + u * kWarp < num_vectors) vectors[u] = from[first + u * kWarp];
      }
#pragma unroll 1
      for (uint32_t left = lanes; left != 0; left &= left - 1) {
        const auto address = reinterpret_cast<uint64_t>(to);
        auto* target =
            reinterpret_cast<uint4*>(__shfl_sync(kAllLanes, address, __ffs(left) - 1)) + first;
#pragma unroll
        for (uint32_t u = 0; u < kUnroll; ++u) {
          if (first + u * kWarp < num_vectors) target[u * kWarp] = vectors[u];
        }
      }
    }
  }

  // Those that this block's role serves. Stores leave in the order of lanes: as far as one half has
  // them all, from the first rank behind this one on, round to this one. If all ranks began with
  // the same peer, its link alone would be busy.
  template <typename Place>
  __device__ void find_targets(uint32_t token, Place place, Targets* targets) const {
    const uint32_t num_columns = layout_.num_max_messages_per_token();
    const uint64_t* messages = params_.routes.messages + uint64_t{token} * num_columns;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t column = half * kWarp + lane_;
      // Other blocks have written them.
      uint64_t message = column < num_columns ? ptx::ld_relaxed_gpu(messages + column) : kNoMessage;
      if (half == 0 && num_columns <= kWarp) message = from_behind_own(message);
      if (!(is_own(message) ? role_.sends_own : role_.sends_to_peers)) message = kNoMessage;
      targets->messages[half] = message;
      targets->rows[half] =
          message == kNoMessage ? 0 : place(message_rank(message), message_number(message));
    }
  }

  // Lanes have the messages of a token, ranks ascending, and none behind them; whole warp.
  __device__ uint64_t from_behind_own(uint64_t message) const {
    const bool is_there = message != kNoMessage;
    const uint32_t self = op_.rank().self_rank;
    const uint32_t size = __popc(__ballot_sync(kAllLanes, is_there));
    const uint32_t num_before =
        __popc(__ballot_sync(kAllLanes, is_there && message_rank(message) <= self));
    const uint32_t lane =
        lane_ + num_before < size ? lane_ + num_before : lane_ + num_before - size;
    const uint64_t turned = __shfl_sync(kAllLanes, message, lane % kWarp);
    return is_there ? turned : kNoMessage;
  }

  // Calls `act(rank, row)` for every target; whole warp.
  template <typename Act>
  __device__ static void for_each(const Targets& targets, Act act) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      uint32_t lanes = __ballot_sync(kAllLanes, targets.messages[half] != kNoMessage);
      for (; lanes != 0; lanes &= lanes - 1) {
        const uint32_t lane = __ffs(lanes) - 1;
        const uint64_t message = __shfl_sync(kAllLanes, targets.messages[half], lane);
        act(message_rank(message), __shfl_sync(kAllLanes, targets.rows[half], lane));
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
      const uint32_t from = layout_.config().global_expert_ids ? 0 : first_expert;
      const int32_t no_expert = layout_.no_expert(first_expert);
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t k = half * kWarp + lane_;
        if (k >= topk_.top_k) continue;
        const bool is_there = ranks[half] == r;
        at<int32_t>(peer, layout_.topk_idx(row))[k] =
            is_there ? static_cast<int32_t>(experts[half] - from) : no_expert;
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
  SendBuffer buffer_;
  Role role_;
  bool is_fetched_ = false;
  bool has_bulk_scales_;  // they travel as they are, in whole vectors
  uint32_t parity_ = 0;
};

}  // namespace ep::cuda::normal
