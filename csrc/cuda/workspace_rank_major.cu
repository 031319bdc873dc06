// Workspaces of a row a message, with its experts and weights beside it: they go where the
// receiver's experts read them, too. The token's experts and weights count as one more part of its
// row.

#include "cuda/workspace_dispatch.cuh"

namespace ep::cuda {
namespace {

using protocol::LowLatencyConfig;

// Where a token goes, rank by rank in ascending order. In shared memory, one for each warp.
struct Receivers {
  std::byte* rows[kMaxTopK];
  uint32_t* scales[kMaxTopK];
  uint32_t answers[kMaxTopK];  // rank << 16 | the message's slot
  uint32_t size;
};

template <typename Rows>
class RankMajorSender {
 public:
  __device__ RankMajorSender(const WorkspaceSend<Rows>& send, Receivers* receivers, bool)
      : rank_(send.rank),
        layout_(rank_.layout),
        op_(send.op),
        routing_(send.routing),
        sets_(send.sets),
        rows_(send.rows),
        params_(send.params),
        receivers_(receivers),
        workspace_(static_cast<uint32_t>(params_.workspace)),
        num_parts_(protocol::parts_for(layout_.dispatch_row_bytes())) {}
  __host__ __device__ static uint32_t num_words(const LowLatencyConfig&) { return 0; }

  // A message's place depends on this rank's batch only.
  __device__ bool agree() const { return true; }

  // `fetched`: the first part of the first item.
  __device__ void run(Items items, typename Rows::Fetched fetched) const {
    while (items.more()) {
      const uint32_t token = items.row(), end_part = items.end_part();
      const uint32_t end_of_row = min(end_part, num_parts_);
      uint32_t part = items.first_part();
      find_receivers(token);
      items.next();
      auto fetch_next = [&] {
        if (items.more()) fetched = rows_.fetch(items.row(), items.first_part());
      };
      if (part >= end_of_row) fetch_next();
#pragma unroll 1
      for (; part < end_of_row; ++part) {
        const Part p = rows_.finish(fetched);
        // The next part is on its way while this one leaves.
        if (part + 1 < end_of_row) {
          fetched = rows_.fetch(token, part + 1);
        } else {
          fetch_next();
        }
        send_part(p, part);
      }
      if (end_part > num_parts_) send_routes(token);
    }
  }

 private:
  // A lane a rank.
  __device__ void find_receivers(uint32_t token) const {
    const uint32_t lane = threadIdx.x % kWarp;
    uint32_t size = 0;
    __syncwarp();  // those of the last token have been used
#pragma unroll 1
    for (uint32_t word = 0; word < sets_.num_rank_words(); ++word) {
      const uint32_t ranks = sets_.rank_word(token, word);
      if ((ranks >> lane & 1) != 0) {
        const uint32_t r = word * kWarp + lane, slot = sets_.before_rank(r, token);
        const uint32_t i = size + __popc(ranks & ((1u << lane) - 1));
        const uint32_t message =
            LowLatencyLayout::message_in_workspace(params_.num_slots, rank_.self_rank, slot);
        std::byte* peer = op_.peer(r);
        receivers_->rows[i] = peer + layout_.workspace_row(workspace_, message);
        receivers_->scales[i] = at<uint32_t>(peer, layout_.workspace_scales(workspace_, message));
        receivers_->answers[i] = r << 16 | slot;
      }
      size += __popc(ranks);
    }
    if (lane == 0) receivers_->size = size;
    __syncwarp();
  }

  __device__ void send_part(const Part& p, uint32_t part) const {
    const ScaleWord scale(p, part, layout_);
    const uint32_t size = receivers_->size;
#pragma unroll 2
    for (uint32_t i = 0; i < size; ++i) {
      store_vectors(p, receivers_->rows[i], rows_.shape.num_vectors, part);
      if (scale.is_there) receivers_->scales[i][scale.idx] = scale.value;
    }
  }

  // To each rank of the token, K experts and weights: its own in the order of k, then none. A group
  // of lanes serves a rank, as many lanes as there are k, or all. Its lane for k (and k + 32, where
  // K is larger) writes one place of the rank's list: an expert of that rank behind those of
  // smaller k, any other behind them all, as none.
  __device__ void send_routes(uint32_t token) const {
    constexpr uint32_t kRoutesOfLane = kMaxTopK / kWarp;
    const uint32_t top_k = routing_.top_k, size = receivers_->size;
    const uint32_t shift = min(ceil_log2(top_k), 5u), group_size = 1u << shift;
    const uint32_t lane = threadIdx.x % kWarp, group = lane >> shift;
    const uint32_t first_k = lane & (group_size - 1);
    uint32_t experts[kRoutesOfLane], owners[kRoutesOfLane];
    float weights[kRoutesOfLane];
#pragma unroll
    for (uint32_t i = 0; i < kRoutesOfLane; ++i) {
      const uint32_t k = i * kWarp + first_k;
      const int64_t expert = k < top_k ? routing_.expert(token, k) : -1;
      experts[i] = static_cast<uint32_t>(expert);
      owners[i] = expert < 0 ? kNoRank : routing_.owners.owner(experts[i]);
      weights[i] = k < top_k ? routing_.weight(token, k) : 0.0f;
    }
#pragma unroll 1
    for (uint32_t i = lane; i < size; i += kWarp) {
      params_.answers[token * layout_.num_outcome_columns() + i] = receivers_->answers[i];
    }
    if (lane == 0) params_.num_partials[token] = size;
#pragma unroll 1
    for (uint32_t first = 0; first < size; first += kWarp >> shift) {
      const bool is_used = first + group < size;
      const uint32_t answer = receivers_->answers[is_used ? first + group : 0];
      const uint32_t r = answer >> 16;
      uint32_t alike[kRoutesOfLane], num_alike = 0, num_before = 0;
#pragma unroll
      for (uint32_t i = 0; i < kRoutesOfLane; ++i) {
        alike[i] = __ballot_sync(kAllLanes, owners[i] == r) >> (group << shift);
        if (group_size < kWarp) alike[i] &= (1u << group_size) - 1;
        num_alike += __popc(alike[i]);
      }
      if (!is_used) continue;
      const uint32_t message = LowLatencyLayout::message_in_workspace(
          params_.num_slots, rank_.self_rank, answer & 0xffff);
      auto* idx = at<int32_t>(op_.peer(r), layout_.workspace_topk_idx(workspace_, message));
      auto* weight = at<float>(op_.peer(r), layout_.workspace_topk_weights(workspace_, message));
      const uint32_t first_expert = routing_.owners.first_expert(r);
      const int32_t no_expert = layout_.no_expert(first_expert);
      const uint32_t from = layout_.config().global_expert_ids ? 0 : first_expert;
#pragma unroll
      for (uint32_t i = 0; i < kRoutesOfLane; ++i) {
        const uint32_t k = i * kWarp + first_k;
        if (k >= top_k) continue;
        const bool is_here = owners[i] == r;
        const uint32_t before = num_before + __popc(alike[i] & ((1u << first_k) - 1));
        const uint32_t place = is_here ? before : num_alike + k - before;
        idx[place] = is_here ? static_cast<int32_t>(experts[i] - from) : no_expert;
        weight[place] = is_here ? weights[i] : 0.0f;
        num_before += __popc(alike[i]);
      }
    }
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const Routing& routing_;
  const TokenSets& sets_;
  const Rows& rows_;
  const DispatchSendParams& params_;
  Receivers* receivers_;
  uint32_t workspace_, num_parts_;
};

// The hook: how many messages each source has sent, and no experts in the slots behind them.
class RankMajorReceiver {
 public:
  // `shared`: num_words().
  __device__ RankMajorReceiver(const RankView& rank, const DispatchRecvParams& params,
                               uint32_t* shared)
      : rank_(rank),
        params_(params),
        workspace_(static_cast<uint32_t>(params.workspace)),
        num_ranks_(rank.layout.config().num_ranks),
        counts_(shared),
        old_counts_(shared + num_ranks_) {}
  __host__ __device__ static uint32_t num_words(const LowLatencyConfig& config) {
    return 2 * config.num_ranks;
  }

  // One block. `skip_rank`: this one, whose messages to itself no signal counts, but `sets`.
  __device__ bool run(const Op& op, uint32_t skip_rank, const TokenSets& sets) const {
    uint32_t* counted = rank_.workspace_counts + workspace_ * (num_ranks_ + 1);
    const bool is_alike = counted[num_ranks_] == params_.num_slots;
    for (uint32_t r = threadIdx.x; r < num_ranks_; r += blockDim.x) {
      old_counts_[r] = is_alike ? counted[r] : params_.num_slots;
    }
    bool ok =
        op.start_recv(skip_rank, counts_, [&] { return sets.tokens_of_rank(skip_rank); }, true);
    // A source that was told of other slots has written elsewhere.
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < num_ranks_ && ok; r += blockDim.x) {
      if (counts_[r] > params_.num_slots) ok = op.corrupt(r, params_.num_slots, counts_[r]);
    }
    if (!__syncthreads_and(ok)) return false;
    for (uint32_t r = threadIdx.x; r < num_ranks_; r += blockDim.x) {
      params_.handle.num_messages[r] = counts_[r];
      counted[r] = counts_[r];
    }
    if (threadIdx.x == 0) counted[num_ranks_] = params_.num_slots;
    for (uint32_t r = threadIdx.x / kWarp; r < num_ranks_; r += kWarps) clear(r);
    return true;
  }

 private:
  // Slots that have held a message since they were cleared last, but hold none now; all of them
  // where slots lay elsewhere before. One warp.
  __device__ void clear(uint32_t src_rank) const {
    const uint32_t top_k = rank_.layout.config().top_k;
    const uint32_t before = src_rank * params_.num_slots;
    const uint32_t first = before + counts_[src_rank], end = before + old_counts_[src_rank];
    const int32_t no_expert = rank_.layout.no_expert(rank_.owners.first_expert(rank_.self_rank));
    auto* idx = at<int32_t>(rank_.self_base, rank_.layout.workspace_topk_idx(workspace_, 0));
#pragma unroll 1
    for (uint32_t i = first * top_k + threadIdx.x % kWarp; i < end * top_k; i += kWarp) {
      idx[i] = no_expert;
    }
  }

  const RankView& rank_;
  const DispatchRecvParams& params_;
  uint32_t workspace_, num_ranks_;
  uint32_t *counts_, *old_counts_;
};

struct RankMajor {
  static constexpr bool kByExpert = false;
  using Places = Receivers;
  template <typename Rows>
  using Sender = RankMajorSender<Rows>;
  using Receiver = RankMajorReceiver;
  // Of an item's row: one more than the row has.
  __device__ static uint32_t num_parts(const LowLatencyLayout& layout) {
    return protocol::parts_for(layout.dispatch_row_bytes()) + 1;
  }
};

}  // namespace

const WorkspaceDispatch kRankMajorWorkspaceDispatch = make_workspace_dispatch<RankMajor>();

}  // namespace ep::cuda
