// Workspaces of a row a message, with its experts and weights beside it: they go where the
// receiver's experts read them, too. The token's experts and weights count as one more part of its
// row.

#include "cuda/workspace_dispatch.cuh"

namespace ep::cuda {

using protocol::LowLatencyConfig;

// Where a token goes, rank by rank in ascending order. In shared memory, one for each warp.
// `kIsUsual`, here and below: see usual.cuh.
template <bool kIsUsual>
struct Receivers {
  static constexpr uint32_t kMost = kIsUsual ? kWarp : kMaxTopK;
  std::byte* rows[kMost];  // in the workspace, or behind the words of a tagged message
  uint32_t* scales[kMost];
  uint32_t answers[kMost];  // rank << 16 | the message's slot
  uint32_t size;
  uint32_t first;  // of the rank that is served first
};

template <typename Rows, bool kTagged, bool kIsUsual>
class RankMajorSender {
 public:
  __device__ RankMajorSender(const WorkspaceSend<Rows>& send, Receivers<kIsUsual>* receivers, bool)
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

  // A message's place depends on this rank's batch only: there is nothing to agree upon.
  struct Begun {};
  __device__ Begun begin(const Items&, const typename Rows::Fetched&) const { return {}; }
  __device__ bool agree() const { return true; }

  // `fetched`: the first part of the first item. Waits for nobody.
  __device__ bool run(Items items, typename Rows::Fetched fetched, Begun = {}) const {
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
    return true;
  }

 private:
  // Messages to itself go straight to their place in any case: the end of a kernel says that they
  // are there.
  __device__ bool is_tagged(uint32_t r) const { return kTagged && r != rank_.self_rank; }
  __device__ uint64_t tagged_message(uint32_t slot) const {
    return layout_.tagged_message(op_.bank(), rank_.self_rank, slot);
  }

  __device__ void find_receivers(uint32_t token) const {
    const uint32_t size =
        for_each_rank<kIsUsual>(sets_, token, [&](uint32_t r, uint32_t slot, uint32_t i) {
          const uint32_t message =
              LowLatencyLayout::message_in_workspace(params_.num_slots, rank_.self_rank, slot);
          std::byte* peer = op_.peer(r);
          receivers_->rows[i] = is_tagged(r)
                                    ? peer + tagged_message(slot) + layout_.tagged_row_in_message()
                                    : peer + layout_.workspace_row(workspace_, message);
          receivers_->scales[i] = at<uint32_t>(peer, layout_.workspace_scales(workspace_, message));
          receivers_->answers[i] = r << 16 | slot;
        });
    if (threadIdx.x % kWarp == 0) {
      receivers_->size = size;
      receivers_->first = next_behind(sets_.ranks_below(rank_.self_rank + 1, token), size);
    }
    __syncwarp();
  }

  __device__ void send_part(const Part& p, uint32_t part) const {
    const ScaleWord<kIsUsual> scale(p, part, layout_);
    const uint32_t size = receivers_->size;
    uint32_t i = receivers_->first;
#pragma unroll 2
    for (uint32_t j = 0; j < size; ++j, i = next_behind(i + 1, size)) {
      if (is_tagged(receivers_->answers[i] >> 16)) {
        store_tagged(p, receivers_->rows[i], rows_.shape.num_vectors, part, op_.tag());
        continue;
      }
      p.store(receivers_->rows[i], rows_.shape.num_vectors, part);
      if (scale.is_there) receivers_->scales[i][scale.idx] = scale.value;
    }
  }

  // To each rank of the token, K experts and weights: its own in the order of k, then none. A group
  // of lanes serves a rank, as many lanes as there are k, or all. Its lane for k (and k + 32, where
  // K is larger) writes one place of the rank's list: an expert of that rank behind those of
  // smaller k, any other behind them all, as none.
  __device__ void send_routes(uint32_t token) const {
    constexpr uint32_t kRoutesOfLane = Receivers<kIsUsual>::kMost / kWarp;
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
      auto* words = at<uint4>(op_.peer(r), tagged_message(answer & 0xffff)) + 1;
#pragma unroll
      for (uint32_t i = 0; i < kRoutesOfLane; ++i) {
        const uint32_t k = i * kWarp + first_k;
        if (k >= top_k) continue;
        const bool is_here = owners[i] == r;
        const uint32_t before = num_before + __popc(alike[i] & ((1u << first_k) - 1));
        const uint32_t place = is_here ? before : num_alike + k - before;
        const int32_t listed = is_here ? static_cast<int32_t>(experts[i] - from) : no_expert;
        const float listed_weight = is_here ? weights[i] : 0.0f;
        if (is_tagged(r)) {
          ptx::st_relaxed_sys_b128(words + place, {static_cast<uint32_t>(listed),
                                                   __float_as_uint(listed_weight), 0, op_.tag()});
        } else {
          idx[place] = listed;
          weight[place] = listed_weight;
        }
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
  Receivers<kIsUsual>* receivers_;
  uint32_t workspace_, num_parts_;
};

// The hook: how many messages each source has sent, and no experts in the slots behind them.
// Tagged, also the messages themselves.
template <bool kTagged, bool kIsUsual>
class RankMajorReceiver {
 public:
  // `shared`: num_words().
  __device__ RankMajorReceiver(const RankView& rank, const DispatchRecvParams& params,
                               uint32_t* shared)
      : rank_(rank),
        layout_(rank.layout),
        params_(params),
        workspace_(static_cast<uint32_t>(params.workspace)),
        num_ranks_(layout_.config().num_ranks),
        num_vectors_(static_cast<uint32_t>(layout_.dispatch_row_bytes() / sizeof(uint4))),
        num_parts_(protocol::parts_for(layout_.dispatch_row_bytes())),
        sources_(shared, num_ranks_),
        old_counts_(shared + Sources::num_words(num_ranks_)) {}
  __host__ __device__ static uint32_t num_words(const LowLatencyConfig& config) {
    return Sources::num_words(config.num_ranks) + config.num_ranks;
  }

  // One block; tagged, all of them. `skip_rank`: this one, whose messages to itself no signal
  // counts, but `sets`. `num_taken`: items that the kernel has sent, see Items; tagged. False on
  // some threads: they gave up.
  __device__ bool run(const Op& op, uint32_t skip_rank, const TokenSets& sets,
                      uint32_t num_taken) const {
    if (!kTagged) return count_messages(op, skip_rank, sets);
    if (!op.may_receive()) return false;
    const bool ok = !Op::is_clerk_warp() || count_messages(op, skip_rank, sets);
    return receive(op, num_taken) && ok;
  }

 private:
  // Waits for all signals, and notes what they say. Whole block; tagged, one warp.
  __device__ bool count_messages(const Op& op, uint32_t skip_rank, const TokenSets& sets) const {
    const uint32_t first = kTagged ? threadIdx.x % kWarp : threadIdx.x;
    const uint32_t step = kTagged ? kWarp : blockDim.x;
    uint32_t* counted = rank_.workspace_counts + workspace_ * (num_ranks_ + 1);
    const bool is_alike = counted[num_ranks_] == params_.num_slots;
    for (uint32_t r = first; r < num_ranks_; r += step) {
      old_counts_[r] = is_alike ? counted[r] : params_.num_slots;
    }
    const HasSlots is_right = {op, params_.num_slots, kTagged};
    const auto own = [&] { return sets.tokens_of_rank(skip_rank); };
    if (kTagged) {
      const bool ok = op.take_signals(skip_rank, sources_.words, own, is_right);
      if (!__all_sync(kAllLanes, ok)) return false;
    } else {
      const bool ok =
          op.start_recv(skip_rank, sources_.words, own, counts_signals(skip_rank), is_right);
      if (!__syncthreads_and(ok)) return false;
    }
    for (uint32_t r = first; r < num_ranks_; r += step) {
      params_.handle.num_messages[r] = counted[r] = sources_.count(r);
    }
    if (first == 0) counted[num_ranks_] = params_.num_slots;
    for (uint32_t r = first / kWarp; r < num_ranks_; r += step / kWarp) clear(r);
    return true;
  }

  // The peers' messages to their places. Nobody waits to learn how many there are: a message says
  // itself that it is there, and only where none comes somebody asks whether one will. Warps that
  // have sent nothing begin, and so receive while others send: of one or two tokens a rank a pair
  // takes 0.5 us less (two H200s, NVLink). False, on all lanes of a warp: it gave up.
  __device__ bool receive(const Op& op, uint32_t num_taken) const {
    const PeerSlots slots(rank_);
    for (Items items(slots.size(params_.num_slots), num_parts_ + 1, num_taken); items.more();
         items.next()) {
      const PeerSlots::Slot from = slots[items.row()];
      std::byte* message = op.self() + layout_.tagged_message(op.bank(), from.rank, from.slot);
      std::byte* row = message + layout_.tagged_row_in_message();
      const uint32_t place =
          LowLatencyLayout::message_in_workspace(params_.num_slots, from.rank, from.slot);
      const uint32_t first_part = items.first_part();
      const uint32_t end_of_row = min(items.end_part(), num_parts_);
      TaggedPart tagged;
      if (first_part < end_of_row) {
        const auto ask = [&] { tagged.begin(row, num_vectors_, first_part, op.tag()); };
        ask();
        const Coming coming = poll_message(
            rank_, op, from, ask, [&] { return tagged.is_here(op.tag()); },
            [&] {
              return TaggedPart::wait(rank_, op.receiving(), from.rank, row, num_vectors_,
                                      first_part);
            });
        if (coming == Coming::kGivenUp) return false;
        if (coming == Coming::kNever) continue;
      }
#pragma unroll 1
      for (uint32_t part = first_part; part < end_of_row; ++part) {
        if (part > first_part &&
            !poll_part(rank_, op.receiving(), from.rank, row, num_vectors_, part, &tagged)) {
          return false;
        }
        const Part p = tagged.part();
        if (part + 1 < end_of_row) tagged.begin(row, num_vectors_, part + 1, op.tag());
        p.store(op.self() + layout_.workspace_row(workspace_, place), num_vectors_, part);
        const ScaleWord<kIsUsual> scale(p, part, layout_);
        if (scale.is_there) {
          at<uint32_t>(op.self(), layout_.workspace_scales(workspace_, place))[scale.idx] =
              scale.value;
        }
      }
      if (items.end_part() > num_parts_ && !receive_routes(op, message, from, place)) {
        return false;
      }
    }
    return true;
  }

  // The message's experts and weights, if there is one. False as in receive().
  __device__ bool receive_routes(const Op& op, std::byte* message, const PeerSlots::Slot& from,
                                 uint32_t place) const {
    const uint32_t top_k = layout_.config().top_k;
    const auto* words = reinterpret_cast<const uint4*>(message) + 1;
    auto* idx = at<uint32_t>(op.self(), layout_.workspace_topk_idx(workspace_, place));
    auto* weights = at<uint32_t>(op.self(), layout_.workspace_topk_weights(workspace_, place));
    const uint32_t lane = threadIdx.x % kWarp;
    uint4 word = {0, 0, 0, op.tag()};
    const auto ask = [&] {
      if (lane < top_k) word = ptx::ld_relaxed_sys_b128(words + lane);
    };
    ask();
    const Coming coming = poll_message(
        rank_, op, from, ask, [&] { return word.w == op.tag(); },
        [&] { return op.have_tag(words + lane, from.rank, &word); });
    if (coming != Coming::kHere) return coming == Coming::kNever;
    bool ok = true;
    share_lanes<kIsUsual>(top_k, [&](uint32_t k) {
      if (k != lane) word = ptx::ld_relaxed_sys_b128(words + k);
      ok = ok && op.have_tag(words + k, from.rank, &word);
      if (ok) idx[k] = word.x, weights[k] = word.y;
    });
    return __all_sync(kAllLanes, ok);
  }

  // Slots that have held a message since they were cleared last, but hold none now; all of them
  // where slots lay elsewhere before. One warp.
  __device__ void clear(uint32_t src_rank) const {
    const uint32_t top_k = layout_.config().top_k;
    const uint32_t before = src_rank * params_.num_slots;
    const uint32_t first = before + sources_.count(src_rank), end = before + old_counts_[src_rank];
    const int32_t no_expert = layout_.no_expert(rank_.owners.first_expert(rank_.self_rank));
    auto* idx = at<int32_t>(rank_.self_base, layout_.workspace_topk_idx(workspace_, 0));
#pragma unroll 1
    for (uint32_t i = first * top_k + threadIdx.x % kWarp; i < end * top_k; i += kWarp) {
      idx[i] = no_expert;
    }
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const DispatchRecvParams& params_;
  uint32_t workspace_, num_ranks_, num_vectors_, num_parts_;
  Sources sources_;
  uint32_t* old_counts_;
};

template <bool kIsTagged, bool kIsUsual>
struct RankMajor {
  static constexpr bool kByExpert = false;
  static constexpr bool kTagged = kIsTagged;
  static constexpr bool kSendsToSelf = false;
  using Places = Receivers<kIsUsual>;
  template <typename Rows>
  using Sender = RankMajorSender<Rows, kTagged, kIsUsual>;
  using Receiver = RankMajorReceiver<kTagged, kIsUsual>;
  // Of an item's row: one more than the row has.
  __device__ static uint32_t num_parts(const LowLatencyLayout& layout) {
    return protocol::parts_for(layout.dispatch_row_bytes()) + 1;
  }
};

}  // namespace ep::cuda
