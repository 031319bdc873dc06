// Workspaces of a row a (token, expert), by expert, packed: by source rank, then token. Where a row
// goes depends on how many the ranks before have for its expert. So every rank first tells every
// other what its batch has for each expert, in words that nobody has to wait behind, and waits for
// those of the ranks before: a send ends only when all ranks have come to it.

#include "cuda/workspace_expert_counts.cuh"
#include "protocol/scales.h"

namespace ep::cuda {
namespace {

using protocol::LowLatencyConfig;

// Where a token's row goes, in the order of k; at first as if the ranks before had no rows. In
// shared memory, one for each warp.
struct ExpertPlaces {
  std::byte* rows[kMaxTopK];
  uint32_t* scales[kMaxTopK];
  uint32_t row_of[kMaxTopK];  // the row's number in the workspace
  uint16_t experts[kMaxTopK], ks[kMaxTopK];
  uint32_t size;
};

template <typename Rows>
class ExpertMajorSender {
 public:
  // `keeps_counts`: nobody needs the counts but this kernel itself.
  __device__ ExpertMajorSender(const WorkspaceSend<Rows>& send, ExpertPlaces* places,
                               bool keeps_counts)
      : rank_(send.rank),
        layout_(rank_.layout),
        op_(send.op),
        routing_(send.routing),
        sets_(send.sets),
        rows_(send.rows),
        params_(send.params),
        places_(places),
        keeps_counts_(keeps_counts),
        workspace_(static_cast<uint32_t>(params_.workspace)),
        capacity_(layout_.rows_of_expert_in_workspace(params_.num_slots)),
        num_before_(send.words) {}
  __host__ __device__ static uint32_t num_words(const LowLatencyConfig& config) {
    return config.num_experts;
  }

  // Tells what this rank has for each expert; while others do, the first part of the first item
  // (`fetched`), which is returned, and most of where it goes. Whole block.
  __device__ Part begin(const Items& items, const typename Rows::Fetched& fetched) const {
    if (!keeps_counts_) ExpertCounts(rank_, op_).publish(sets_);
    if (!items.more()) return {};
    find_places(items.row(), items.first_part() == 0);
    return rows_.finish(fetched);
  }
  // Rows of each expert from the ranks before. Whole block, which ends where it is false.
  __device__ bool agree() const {
    if (keeps_counts_) return true;
    const ExpertCounts counts(rank_, op_);
    bool ok = true;
#pragma unroll 1
    for (uint32_t e = threadIdx.x; e < routing_.num_experts && ok; e += blockDim.x) {
      uint32_t before;
      ok = counts.sum(e, 0, rank_.self_rank, &before);
      // Memory that contradicts itself must not choose where we write.
      if (ok && before + sets_.tokens_of_expert(e) > capacity_) {
        ok = op_.corrupt(0, capacity_, before + sets_.tokens_of_expert(e));
      }
      num_before_[e] = before;
    }
    return __syncthreads_and(ok);
  }

  // `p`: what begin() has returned.
  __device__ void run(Items items, typename Rows::Fetched fetched, Part p) const {
    if (!items.more()) return;
    uint32_t token = items.row(), part = items.first_part(), end_part = items.end_part();
    items.next();
    move_places(token, part == 0);
#pragma unroll 1
    while (true) {
      // The next part is on its way while this one leaves.
      const bool goes_on = part + 1 < end_part, more = goes_on || items.more();
      if (more) {
        fetched =
            rows_.fetch(goes_on ? token : items.row(), goes_on ? part + 1 : items.first_part());
      }
      send_part(p, part);
      if (!more) return;
      if (goes_on) {
        ++part;
      } else {
        token = items.row(), part = items.first_part(), end_part = items.end_part();
        items.next();
        find_places(token, part == 0);
        move_places(token, part == 0);
      }
      p = rows_.finish(fetched);
    }
  }

 private:
  // As if the ranks before had no rows. A lane an expert of the token. `notes`: what combine wants
  // to know, too.
  __device__ void find_places(uint32_t token, bool notes) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = routing_.top_k;
    const uint32_t num_scale_words = layout_.num_scale_words();
    uint32_t* answers = params_.answers + token * layout_.num_answer_words();
    uint32_t size = 0;
    __syncwarp();  // those of the last token have been used
#pragma unroll 1
    for (uint32_t first_k = 0; first_k < top_k; first_k += kWarp) {
      const uint32_t k = first_k + lane;
      const int64_t expert = k < top_k ? routing_.expert(token, k) : -1;
      const uint32_t routed = __ballot_sync(kAllLanes, expert >= 0);
      uint32_t owner = kNoRank, row = 0;
      if (expert >= 0) {
        const auto e = static_cast<uint32_t>(expert);
        owner = routing_.owners.owner(e);
        const uint32_t local_expert = e - routing_.owners.first_expert(owner);
        const uint32_t position = sets_.before_expert(e, token);
        row = local_expert * capacity_ + position;
        std::byte* peer = op_.peer(owner);
        const uint32_t i = size + __popc(routed & ((1u << lane) - 1));
        places_->rows[i] = peer + layout_.workspace_row(workspace_, row);
        places_->scales[i] =
            at<uint32_t>(peer, layout_.workspace_scales(workspace_, 0)) +
            protocol::expert_scale_word_idx(num_scale_words, capacity_, local_expert, position, 0);
        places_->row_of[i] = row;
        places_->experts[i] = static_cast<uint16_t>(e);
        places_->ks[i] = static_cast<uint16_t>(k);
      }
      if (notes && k < top_k) {
        answers[k] = owner;
        answers[top_k + k] = row;
      }
      size += __popc(routed);
    }
    if (lane == 0) {
      places_->size = size;
      if (notes) params_.num_partials[token] = size;
    }
    __syncwarp();
  }

  // Behind the rows of the ranks before. `notes`: as above.
  __device__ void move_places(uint32_t token, bool notes) const {
    if (keeps_counts_) return;
    uint32_t* rows = params_.answers + token * layout_.num_answer_words() + routing_.top_k;
#pragma unroll 1
    for (uint32_t i = threadIdx.x % kWarp; i < places_->size; i += kWarp) {
      const uint32_t before = num_before_[places_->experts[i]];
      places_->rows[i] += before * layout_.dispatch_row_bytes();
      places_->scales[i] += before;
      if (notes) rows[places_->ks[i]] = places_->row_of[i] + before;
    }
    __syncwarp();
  }

  __device__ void send_part(const Part& p, uint32_t part) const {
    const ScaleWord<false> scale(p, part, layout_);
    const uint32_t size = places_->size;
#pragma unroll 4
    for (uint32_t i = 0; i < size; ++i) {
      p.store(places_->rows[i], rows_.shape.num_vectors, part);
      if (scale.is_there) places_->scales[i][uint64_t{scale.idx} * capacity_] = scale.value;
    }
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const Routing& routing_;
  const TokenSets& sets_;
  const Rows& rows_;
  const DispatchSendParams& params_;
  ExpertPlaces* places_;
  bool keeps_counts_;
  uint32_t workspace_, capacity_;
  uint32_t* num_before_;  // [E], in shared memory
};

// The hook: how many rows each expert has, and how many messages came from each source.
class ExpertMajorReceiver {
 public:
  // `shared`: num_words().
  __device__ ExpertMajorReceiver(const RankView& rank, const DispatchRecvParams& params,
                                 uint32_t* shared)
      : rank_(rank), params_(params), num_messages_(shared) {}
  __host__ __device__ static uint32_t num_words(const LowLatencyConfig& config) {
    return config.num_ranks;
  }

  // One block. `skip_rank`: this one, whose messages to itself no signal counts, but `sets`.
  __device__ bool run(const Op& op, uint32_t skip_rank, const TokenSets& sets, uint32_t) const {
    const uint32_t num_ranks = rank_.layout.config().num_ranks;
    const uint32_t first_expert = rank_.owners.first_expert(rank_.self_rank);
    const bool keeps_counts = num_ranks == 1 && skip_rank != kNoRank;
    const ExpertCounts counts(rank_, op);
    bool ok = true;
#pragma unroll 1
    for (uint32_t e = threadIdx.x; e < rank_.num_local_experts && ok; e += blockDim.x) {
      uint32_t num_rows;
      if (keeps_counts) {
        num_rows = sets.tokens_of_expert(first_expert + e);
      } else {
        ok = counts.sum(first_expert + e, 0, num_ranks, &num_rows);
      }
      params_.num_recv_tokens_per_expert[e] = static_cast<int32_t>(num_rows);
      ptx::red_add_relaxed_gpu(rank_.num_expert_rows + e, num_rows);
    }
    const auto own = [&] { return sets.tokens_of_rank(skip_rank); };
    ok = op.start_recv(skip_rank, num_messages_, own, counts_signals(skip_rank)) && ok;
    if (!__syncthreads_and(ok)) return false;
    for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
      params_.handle.num_messages[r] = num_messages_[r];
    }
    return true;
  }

 private:
  const RankView& rank_;
  const DispatchRecvParams& params_;
  uint32_t* num_messages_;
};

struct ExpertMajor {
  static constexpr bool kByExpert = true;
  static constexpr bool kTagged = false;
  static constexpr bool kSendsToSelf = false;
  using Places = ExpertPlaces;
  template <typename Rows>
  using Sender = ExpertMajorSender<Rows>;
  using Receiver = ExpertMajorReceiver;
  // Of an item's row.
  __device__ static uint32_t num_parts(const LowLatencyLayout& layout) {
    return protocol::parts_for(layout.dispatch_row_bytes());
  }
};

}  // namespace

const WorkspaceDispatch kExpertWorkspaceDispatch = make_workspace_dispatch<ExpertMajor>();

}  // namespace ep::cuda
