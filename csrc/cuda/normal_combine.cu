// Combine on a GPU; the meaning, and the worked example, are in csrc/cpu/normal_combine.cpp.
//
// Rows stay where their experts have put them, if that is symmetric memory, or are copied there.
// Each token's home reads them, adds, and rounds once.

#include "cuda/normal_launch.cuh"
#include "cuda/normal_pull.cuh"

namespace ep::cuda {
namespace normal {
namespace {

// What a rank says when it is ready: where its rows are, and that it gives weights.
constexpr uint32_t kInReceivedRows = 1;
constexpr uint32_t kWithWeights = 2;

constexpr uint32_t kTermsBytes = kPullWarps * 2 * sizeof(Terms);
constexpr uint32_t kWarpBarriers = kPieces + 1;  // of the ring, and of rows that are staged
constexpr uint32_t kBarriersBytes = kPullWarps * kWarpBarriers * sizeof(uint64_t);
constexpr uint32_t kPullBytes = kPullWarps * kPieces * kPieceBytes + kTermsBytes + kBarriersBytes;

struct Shared {
  RowRanges ranges;
  uint32_t flags[kNumMaxDeviceRanks];  // of each rank, when it was ready
  // In a round: this rank's rows for each home.
  uint32_t begins[kNumMaxDeviceRanks], ends[kNumMaxDeviceRanks];
};

template <typename T>
class Combiner {
 public:
  __device__ Combiner(const Op& op, const NormalCombine& params, Shared* shared, std::byte* buffers)
      : op_(op),
        layout_(op.layout()),
        params_(params),
        shared_(*shared),
        top_k_(layout_.config().top_k),
        num_columns_(layout_.num_max_messages_per_token()),
        warp_(threadIdx.x / kWarp),
        lane_(threadIdx.x % kWarp),
        ring_(ring(buffers)),
        puller_(op, ring_) {
    if (lane_ < kWarpBarriers) ptx::mbarrier_init(ring_.barriers + lane_, 1);
    ptx::fence_proxy_async();
    __syncwarp();
  }

  // Whole block. False: end the kernel.
  __device__ bool run() {
    // Waits for: every home to have read what the last combine sent. So nobody is still waiting for
    // that one's words either.
    if (!op_.wait_for_all(
            Half::kSend, [&](uint32_t r) { return layout_.credit(r); }, op_.epoch() - 1)) {
      return false;
    }
    // Of few tokens the last block has none.
    const bool is_last_block = blockIdx.x == gridDim.x - 1;
    const bool copies = params_.input == CombineInput::kElsewhere || params_.has_topk_weights;
    if (!copies && is_last_block) publish_ready();  // kernels that wrote the rows have ended
    const uint32_t num_ranks = op_.num_ranks();
    shared_.ranges.find(num_ranks, op_.rank().self_rank, [&](uint32_t src, uint32_t column) {
      return params_.routes.batch[batch_idx(num_ranks, src, column)];
    });
    const bool is_direct = shared_.ranges.is_direct(layout_);
    if (!is_direct && params_.input != CombineInput::kElsewhere) {
      return op_.corrupt(shared_.ranges.rank_of_most, layout_.config().num_rows,
                         shared_.ranges.most_rows);
    }
    if (copies && is_direct) stage_all();
    if (copies && (is_direct ? arrives_last(&op_.rank().state->num_arrived[0]) : is_last_block)) {
      publish_ready();
    }
    const uint64_t first_token = warp_ * gridDim.x + blockIdx.x;
    if (lane_ == 0 && first_token < params_.routes.num_tokens) {
      ptx::prefetch_l1(params_.routes.messages + first_token * num_columns_);
    }
    const bool ok = op_.wait_until_ready([&](uint32_t r, uint32_t flags) {
      shared_.flags[r] = flags;
      const uint32_t own = own_flags();
      return ((flags ^ own) & kWithWeights) == 0 || op_.corrupt(r, own, flags);
    });
    if (!ok) return false;
    ptx::fence_proxy_async();
    num_rounds_ = shared_.ranges.num_rounds(layout_);
    if (is_direct) {
      pull(0, params_.routes.num_tokens, [&](uint32_t r, uint32_t number) {
        return uint64_t{shared_.ranges.first_sent[r]} + number;
      });
      return true;
    }
    return run_rounds(
        op_, Phase::kCombine, num_rounds_, [&](uint32_t round) { return stage(round); },
        [&](uint32_t round) { return pull_round(round); });
  }
  __device__ uint32_t num_rounds() const { return num_rounds_; }

 private:
  __device__ Ring ring(std::byte* buffers) const {
    auto* terms = reinterpret_cast<Terms*>(buffers + kPullWarps * kPieces * kPieceBytes);
    auto* barriers = reinterpret_cast<uint64_t*>(terms + kPullWarps * 2);
    return {buffers + warp_ * kPieces * kPieceBytes, barriers + warp_ * kWarpBarriers,
            terms + warp_ * 2};
  }
  __device__ uint32_t own_flags() const {
    return (params_.input == CombineInput::kReceivedRows ? kInReceivedRows : 0) |
           (params_.has_topk_weights ? kWithWeights : 0);
  }
  __device__ void copy(uint64_t offset, const void* src, uint64_t num_bytes) const {
    copy_flat(op_.self() + offset, src, num_bytes, uint64_t{blockIdx.x} * blockDim.x + threadIdx.x,
              uint64_t{gridDim.x} * blockDim.x);
  }
  // By the copy engine, through the rings, which are empty.
  __device__ void copy_in_bulk(std::byte* dst, const std::byte* src, uint64_t num_bytes) {
    constexpr uint64_t kBytes = kPieces * kPieceBytes;
    uint64_t* barrier = ring_.barriers + kPieces;
    const uint64_t step = gridDim.x * kPullWarps * kBytes;
    uint64_t first = (warp_ * gridDim.x + blockIdx.x) * kBytes;
    for (; first < num_bytes && lane_ == 0; first += step) {
      const auto size = static_cast<uint32_t>(min(kBytes, num_bytes - first));
      ptx::bulk_wait_read();
      ptx::mbarrier_arrive_expect(barrier, size);
      ptx::bulk_load(ring_.pieces, src + first, size, barrier);
      ptx::mbarrier_wait(barrier, staging_parity_);
      staging_parity_ ^= 1;
      ptx::bulk_store(dst + first, ring_.pieces, size);
      ptx::bulk_commit();
    }
    ptx::bulk_wait_written();
    ptx::fence_proxy_async();
    __syncwarp();
  }
  // Rows [row, row + count) of x, and their weights, to the staged row and those behind it.
  __device__ void stage_rows(uint64_t staged, uint64_t row, uint64_t count) {
    const uint64_t row_bytes = layout_.row_bytes();
    if (params_.input == CombineInput::kElsewhere) {
      copy_in_bulk(op_.self() + layout_.combine_row(staged), params_.x + row * row_bytes,
                   count * row_bytes);
    }
    if (params_.has_topk_weights) {
      copy(layout_.combine_weights(staged), params_.topk_weights + row * top_k_,
           count * top_k_ * 4);
    }
  }
  __device__ void stage_all() { stage_rows(0, 0, shared_.ranges.first_received[op_.num_ranks()]); }

  __device__ void publish_ready() const {
    if (threadIdx.x < op_.num_ranks()) op_.publish_ready(threadIdx.x, own_flags());
  }

  // Adds up tokens begin .. end - 1. `place(rank, number)`: the row of that rank that is its row
  // `number` of this batch.
  template <typename Place>
  __device__ void pull(uint32_t begin, uint32_t end, Place place) {
    puller_.run(begin, end, params_.out,
                [&](uint32_t token, Terms* terms) { return find_terms(token, place, terms); });
    if (!params_.has_topk_weights) return;
    const uint64_t step = uint64_t{gridDim.x} * kPullWarps;
    for (uint64_t token = begin + warp_ * gridDim.x + blockIdx.x; token < end; token += step) {
      add_up_weights(static_cast<uint32_t>(token), place);
    }
  }

  // A lane a message; the biases behind them.
  template <typename Place>
  __device__ uint32_t find_terms(uint32_t token, Place place, Terms* terms) const {
    uint32_t num_terms = 0;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t column = half * kWarp + lane_;
      const uint64_t message = message_at(token, column);
      if (message != kNoMessage) {
        const uint32_t r = message_rank(message);
        const uint64_t row = place(r, message_number(message));
        terms->rows[column] =
            op_.peer(r) + ((shared_.flags[r] & kInReceivedRows) != 0 ? layout_.row(row)
                                                                     : layout_.combine_row(row));
      }
      num_terms += __popc(__ballot_sync(kAllLanes, message != kNoMessage));
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      if (params_.bias[i] == nullptr) continue;
      if (lane_ == 0) terms->rows[num_terms] = params_.bias[i] + token * layout_.row_bytes();
      ++num_terms;
    }
    return num_terms;
  }
  __device__ uint64_t message_at(uint32_t token, uint32_t column) const {
    return column < num_columns_ ? params_.routes.messages[uint64_t{token} * num_columns_ + column]
                                 : kNoMessage;
  }

  // In rank order, as the rows. A lane a k.
  template <typename Place>
  __device__ void add_up_weights(uint32_t token, Place place) const {
    float sums[2] = {};
    for (uint32_t column = 0; column < num_columns_; ++column) {
      const uint64_t message = message_at(token, column);
      if (message == kNoMessage) break;
      const uint32_t r = message_rank(message);
      const uint64_t row = place(r, message_number(message));
      const auto* weights = at<uint32_t>(op_.peer(r), layout_.combine_weights(row));
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t k = half * kWarp + lane_;
        if (k >= top_k_) continue;
        const float weight = __uint_as_float(ptx::ld_relaxed_sys(weights + k));
        sums[half] = column == 0 ? weight : __fadd_rn(sums[half], weight);
      }
    }
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t k = half * kWarp + lane_;
      if (k < top_k_) params_.combined_topk_weights[uint64_t{token} * top_k_ + k] = sums[half];
    }
  }

  // The first of this rank's rows from `src` whose token is `token` or later.
  __device__ uint32_t first_row(uint32_t src, uint64_t token) const {
    const uint32_t* first_received = shared_.ranges.first_received;
    return normal::first_row(params_.recv_src_tokens, first_received[src], first_received[src + 1],
                             token);
  }

  // The rows of this round's tokens, of each home.
  __device__ bool stage(uint32_t round) {
    const uint32_t bank = op_.bank(round), r = threadIdx.x;
    const uint64_t per_round = layout_.num_tokens_per_round();
    __syncthreads();
    if (r < op_.num_ranks()) {
      shared_.begins[r] = first_row(r, round * per_round);
      shared_.ends[r] = first_row(r, (round + 1) * per_round);
    }
    __syncthreads();
    for (uint32_t home = 0; home < op_.num_ranks(); ++home) {
      stage_rows(layout_.staged_row(bank, home, 0), shared_.begins[home],
                 shared_.ends[home] - shared_.begins[home]);
    }
    if (op_.arrive_in_round(Half::kSend, round)) {
      op_.publish_to_all(layout_.round_signal(Phase::kCombine, bank, op_.rank().self_rank),
                         [&](uint32_t home) {
                           return protocol::pack_signal(op_.round_epoch(round),
                                                        shared_.ends[home] - shared_.begins[home]);
                         });
    }
    return true;
  }

  // Waits for: every owner's rows of this round's tokens.
  __device__ bool pull_round(uint32_t round) {
    const uint32_t bank = op_.bank(round), self_rank = op_.rank().self_rank;
    const uint32_t num_tokens = params_.routes.num_tokens, num_ranks = op_.num_ranks();
    const uint32_t per_round = layout_.num_tokens_per_round();
    const uint32_t* round_begins = params_.routes.round_begins + round * num_ranks;
    const auto begin =
        static_cast<uint32_t>(min(uint64_t{round} * per_round, uint64_t{num_tokens}));
    const uint32_t end = begin + min(per_round, num_tokens - begin);
    const bool ok = op_.wait_for_all(
        Half::kRecv, [&](uint32_t r) { return layout_.round_signal(Phase::kCombine, bank, r); },
        protocol::pack_signal(op_.round_epoch(round), 0), protocol::kEpochShift,
        [&](uint32_t r, uint64_t word) {
          const uint32_t expected =
              begin == end ? 0 : round_begins[num_ranks + r] - round_begins[r];
          return word == protocol::pack_signal(op_.round_epoch(round), expected) ||
                 op_.corrupt(r, expected, protocol::signal_count(word));
        });
    if (!ok) return false;
    ptx::fence_proxy_async();
    pull(begin, end, [&](uint32_t r, uint32_t number) {
      return layout_.staged_row(bank, self_rank, number - round_begins[r]);
    });
    return true;
  }

  const Op& op_;
  const NormalDeviceLayout& layout_;
  const NormalCombine& params_;
  Shared& shared_;
  uint32_t top_k_, num_columns_, warp_, lane_;
  uint32_t num_rounds_ = 0;
  Ring ring_;
  uint32_t staging_parity_ = 0;
  Puller<T> puller_;
};

template <typename T>
__global__ void __launch_bounds__(kPullThreads, 1)
    normal_combine_kernel(const __grid_constant__ NormalView rank,
                          const __grid_constant__ NormalCombine params) {
  extern __shared__ __align__(128) std::byte buffers[];
  __shared__ Shared shared;
  ptx::touch(rank);
  ptx::touch(params);
  const Op op(rank, Phase::kCombine);
  if (!op.ok()) return;
  Combiner<T> combiner(op, params, &shared, buffers);
  if (!combiner.run()) return;
  op.let_next_start(params.routes.num_tokens);
  if (!op.arrive_last()) return;
  // Publishes: to every owner, that this rank has read its rows.
  op.publish_to_all(rank.layout.credit(rank.self_rank), [&](uint32_t) { return op.epoch(); });
  if (threadIdx.x == 0) op.complete(combiner.num_rounds());
}

}  // namespace
}  // namespace normal

void prepare_normal_combine() {
  Launch::prepare(normal::normal_combine_kernel<__nv_bfloat16>);
  Launch::prepare(normal::normal_combine_kernel<float>);
}

void launch_normal_combine(const NormalView& rank, const NormalCombine& params,
                           const Launch& launch) {
  if (rank.layout.config().dtype == protocol::DType::kBFloat16) {
    launch.run(normal::normal_combine_kernel<__nv_bfloat16>, normal::kPullBytes, rank, params);
  } else {
    launch.run(normal::normal_combine_kernel<float>, normal::kPullBytes, rank, params);
  }
}

uint32_t normal_combine_threads() { return normal::kPullThreads; }

}  // namespace ep::cuda
