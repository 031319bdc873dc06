// Small batches into workspaces of a row a (token, expert): a token goes to each rank once, as a
// tagged message, and its receiver, to whom all ranks have told their counts, puts it where its
// experts read it. So no send waits for another rank's, and no fence is in the way.
//
//   message  | num_entries, tag | local expert, position, tag | .. | parts of the row, tagged |
//
// A rank's messages to itself are like all others: where they go depends on other ranks, too.

#include "cuda/workspace_expert_counts.cuh"
#include "protocol/scales.h"

namespace ep::cuda {
namespace {

using protocol::LowLatencyConfig;

// Where a token's messages are, rank by rank in ascending order. In shared memory, one for each
// warp. `kIsUsual`, here and below: see usual.cuh.
template <bool kIsUsual>
struct TaggedReceivers {
  std::byte* messages[kIsUsual ? kWarp : kMaxTopK];
  uint32_t size;
  uint32_t first;  // of the rank that is served first
};

// What both halves need to note where the rows of this rank's tokens lie.
struct OwnRoutes {
  const RankView& rank;
  const Op& op;
  uint32_t capacity;  // rows of an expert

  __device__ OwnRoutes(const RankView& rank, const Op& op, uint32_t num_slots)
      : rank(rank), op(op), capacity(rank.layout.rows_of_expert_in_workspace(num_slots)) {}

  // Which row of an expert is that of a token which `position` of this rank's are before: behind
  // those of the ranks before, whose counts are waited for. False: one did not come, or memory that
  // contradicts itself would choose what combine reads; it is reported.
  __device__ bool find_row(uint32_t expert, uint32_t position, uint32_t* row) const {
    uint32_t before;
    if (!ExpertCounts(rank, op).sum(expert, 0, rank.self_rank, &before)) return false;
    *row = before + position;
    return *row < capacity || op.corrupt(0, capacity, *row);
  }
  // Calls `each(token, k)` for every k of `num_tokens` tokens, by all blocks together; the last
  // warps begin, as the first ones have rows to move. False on threads for which one was false.
  template <typename Each>
  __device__ bool for_each(uint32_t num_tokens, Each each) const {
    const uint32_t top_k = rank.layout.config().top_k;
    const uint32_t shift = ceil_log2(top_k);  // no division
    const uint32_t from_last = kWarps - 1 - threadIdx.x / kWarp;
    const uint32_t warp = from_last * gridDim.x + blockIdx.x;
    bool ok = true;
#pragma unroll 1
    for (uint32_t i = warp * kWarp + threadIdx.x % kWarp; i < num_tokens << shift && ok;
         i += gridDim.x * kThreads) {
      const uint32_t k = i & ((1u << shift) - 1);
      if (k < top_k) ok = each(i >> shift, k);
    }
    return ok;
  }
};

template <typename Rows, bool kIsUsual>
class TaggedExpertSender {
 public:
  // `receives`: counts of other ranks may be waited for.
  __device__ TaggedExpertSender(const WorkspaceSend<Rows>& send,
                                TaggedReceivers<kIsUsual>* receivers, bool receives)
      : rank_(send.rank),
        layout_(rank_.layout),
        op_(send.op),
        routing_(send.routing),
        sets_(send.sets),
        rows_(send.rows),
        params_(send.params),
        receivers_(receivers),
        receives_(receives) {}
  __host__ __device__ static uint32_t num_words(const LowLatencyConfig&) { return 0; }

  // `fetched`: the first part of the first item. False on some threads: they gave up.
  __device__ bool run(Items items, typename Rows::Fetched fetched) const {
    ExpertCounts(rank_, op_).publish(sets_);
    const uint32_t num_parts = protocol::parts_for(layout_.dispatch_row_bytes());
    send_rows(
        rows_, num_parts, items, fetched,
        [&](uint32_t token, uint32_t part) {
          if (part < num_parts) find_receivers(token);
        },
        [&](const Part& p, uint32_t part) { send_part(p, part); },
        [&](uint32_t token, bool is_last) {
          if (is_last) send_entries(token);
        });
    return note_answers();
  }

 private:
  __device__ std::byte* message(uint32_t r, uint32_t slot) const {
    return op_.peer(r) + layout_.tagged_message(op_.bank(), rank_.self_rank, slot);
  }

  __device__ void find_receivers(uint32_t token) const {
    const uint32_t size = for_each_rank<kIsUsual>(
        sets_, token,
        [&](uint32_t r, uint32_t slot, uint32_t i) { receivers_->messages[i] = message(r, slot); });
    if (threadIdx.x % kWarp == 0) {
      receivers_->size = size;
      receivers_->first = next_behind(sets_.ranks_below(rank_.self_rank + 1, token), size);
    }
    __syncwarp();
  }

  __device__ void send_part(const Part& p, uint32_t part) const {
    const uint32_t size = receivers_->size;
    uint32_t i = receivers_->first;
#pragma unroll 1
    for (uint32_t j = 0; j < size; ++j, i = next_behind(i + 1, size)) {
      store_tagged(p, receivers_->messages[i] + layout_.tagged_row_in_message(),
                   rows_.shape.num_vectors, part, op_.tag());
    }
  }

  // To each rank of the token: which of its experts, and how many of this rank's tokens are before
  // it there.
  __device__ void send_entries(uint32_t token) const {
    const uint32_t num_routes =
        for_each_route<kIsUsual>(routing_, sets_, token, [&](const Route& route, bool is_routed) {
          if (!is_routed) return;
          auto* words = reinterpret_cast<uint4*>(message(route.dst_rank, route.slot));
          const uint32_t local_expert = route.expert - routing_.owners.first_expert(route.dst_rank);
          ptx::st_relaxed_sys_b128(
              words + 1 + route.entry_idx,
              {local_expert, sets_.before_expert(route.expert, token), 0, op_.tag()});
          if (route.entry_idx == 0) {
            ptx::st_relaxed_sys_b128(words, {route.num_entries, 0, 0, op_.tag()});
          }
        });
    if (threadIdx.x % kWarp == 0) params_.num_partials[token] = num_routes;
  }

  // Which rows combine fetches. What the ranks before have is still unknown to a kernel that only
  // sends: the hook adds it.
  __device__ bool note_answers() const {
    const OwnRoutes routes(rank_, op_, params_.num_slots);
    return routes.for_each(routing_.num_tokens, [&](uint32_t token, uint32_t k) {
      uint32_t* answers = params_.answers + token * layout_.num_answer_words() + k;
      const int64_t routed = routing_.expert(token, k);
      answers[0] = kNoRank;
      if (routed < 0) return true;
      const auto expert = static_cast<uint32_t>(routed);
      uint32_t row = sets_.before_expert(expert, token);
      if (receives_ && !routes.find_row(expert, row, &row)) return false;
      const uint32_t owner = routing_.owners.owner(expert);
      answers[0] = owner;
      answers[routing_.top_k] =
          (expert - routing_.owners.first_expert(owner)) * routes.capacity + row;
      return true;
    });
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const Routing& routing_;
  const TokenSets& sets_;
  const Rows& rows_;
  const DispatchSendParams& params_;
  TaggedReceivers<kIsUsual>* receivers_;
  bool receives_;
};

// The hook: messages become rows of experts. In shared memory:
//
//   sources  [R]         of each, {is_tagged 1, count 15}; on the block that tells of them
//   rows     [R + 1][L]  of a local expert from the sources before; [R]: from all
template <bool kIsUsual>
class TaggedExpertReceiver {
 public:
  // `shared`: num_words().
  __device__ TaggedExpertReceiver(const RankView& rank, const DispatchRecvParams& params,
                                  uint32_t* shared)
      : rank_(rank),
        layout_(rank.layout),
        params_(params),
        workspace_(static_cast<uint32_t>(params.workspace)),
        num_ranks_(layout_.config().num_ranks),
        num_local_(rank.num_local_experts),
        num_vectors_(static_cast<uint32_t>(layout_.dispatch_row_bytes() / sizeof(uint4))),
        num_parts_(protocol::parts_for(layout_.dispatch_row_bytes())),
        capacity_(layout_.rows_of_expert_in_workspace(params.num_slots)),
        sources_(shared),
        rows_(shared + num_ranks_) {}
  __host__ __device__ static uint32_t num_words(const LowLatencyConfig& config) {
    const uint32_t most_local = (config.num_experts + config.num_ranks - 1) / config.num_ranks;
    return config.num_ranks + (config.num_ranks + 1) * most_local;
  }

  // All blocks. `num_taken`: items that the kernel has sent, see Items. False on some threads: they
  // gave up.
  __device__ bool run(const Op& op, uint32_t skip_rank, const TokenSets&,
                      uint32_t num_taken) const {
    if (!op.may_receive()) return false;
    if (!__syncthreads_and(read_counts(op))) return false;
    count_up_rows(rows_, num_ranks_, num_local_, threadIdx.x);
    __syncthreads();
    bool ok = !Op::is_clerk_warp() || take_signals(op, skip_rank);
    if (Op::is_clerk()) write_counts();
    ok = complete_answers(op) && ok;
    return receive(op, num_taken) && ok;
  }

 private:
  // A thread a word of a source's counts, of those that this rank's experts are in.
  __device__ bool read_counts(const Op& op) const {
    const ExpertCounts counts(rank_, op);
    const uint32_t first_expert = rank_.owners.first_expert(rank_.self_rank);
    const uint32_t first_word = first_expert / kCountsPerWord;
    const uint32_t num_words = count_words_for(first_expert + num_local_) - first_word;
    const uint32_t shift = ceil_log2(num_words);  // no division
    bool ok = true;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < num_ranks_ << shift && ok; i += blockDim.x) {
      const uint32_t r = i >> shift, w = first_word + (i & ((1u << shift) - 1));
      if (w >= first_word + num_words) continue;
      const uint4* address = counts.word(op.self(), r, w);
      uint4 word = ptx::ld_relaxed_sys_b128(address);
      ok = op.have_tag(address, r, &word);
#pragma unroll
      for (uint32_t j = 0; j < kCountsPerWord; ++j) {
        const uint32_t local_expert = w * kCountsPerWord + j - first_expert;
        if (local_expert < num_local_) {
          rows_[r * num_local_ + local_expert] = ExpertCounts::count_in(word, j);
        }
      }
    }
    return ok;
  }
  // Of one block.
  __device__ void write_counts() const {
#pragma unroll 1
    for (uint32_t e = threadIdx.x; e < num_local_; e += blockDim.x) {
      const uint32_t num_rows = rows_[num_ranks_ * num_local_ + e];
      params_.num_recv_tokens_per_expert[e] = static_cast<int32_t>(num_rows);
      ptx::red_add_relaxed_gpu(rank_.num_expert_rows + e, num_rows);
    }
  }
  // Of one warp: waits for all signals, and notes how many messages there are.
  __device__ bool take_signals(const Op& op, uint32_t skip_rank) const {
    const bool ok = op.take_signals(
        skip_rank, sources_, [] { return 0u; }, HasSlots{op, params_.num_slots, true});
    if (!__all_sync(kAllLanes, ok)) return false;
    for (uint32_t r = threadIdx.x % kWarp; r < num_ranks_; r += kWarp) {
      params_.handle.num_messages[r] = static_cast<uint32_t>(protocol::signal_count(sources_[r]));
    }
    return true;
  }

  // Where the send was a kernel of its own.
  __device__ bool complete_answers(const Op& op) const {
    if (params_.answers == nullptr) return true;
    const OwnRoutes routes(rank_, op, params_.num_slots);
    const uint32_t top_k = layout_.config().top_k;
    return routes.for_each(params_.num_tokens, [&](uint32_t token, uint32_t k) {
      uint32_t* answers = params_.answers + token * layout_.num_answer_words() + k;
      const uint32_t owner = answers[0];
      if (owner == kNoRank) return true;
      const uint32_t local_expert = answers[top_k] / capacity_;
      uint32_t row = answers[top_k] - local_expert * capacity_;
      const uint32_t expert = rank_.owners.first_expert(owner) + local_expert;
      if (!routes.find_row(expert, row, &row)) return false;
      answers[top_k] = local_expert * capacity_ + row;
      return true;
    });
  }

  // Nobody waits for signals to learn how many messages there are: as in workspace_rank_major.cuh.
  __device__ bool receive(const Op& op, uint32_t num_taken) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout_.config().top_k;
    const PeerSlots slots(rank_, true);
    for (Items items(slots.size(params_.num_slots), num_parts_, num_taken); items.more();
         items.next()) {
      const PeerSlots::Slot from = slots[items.row()];
      std::byte* message = op.self() + layout_.tagged_message(op.bank(), from.rank, from.slot);
      std::byte* row = message + layout_.tagged_row_in_message();
      const auto* words = reinterpret_cast<const uint4*>(message);
      uint32_t first = 0;
#pragma unroll 1
      do {
        const uint32_t j = first + lane;
        uint4 header = {}, entry = {};
        TaggedPart tagged;
        const auto is_there = [&] { return j < min(header.x, top_k); };
        const auto ask = [&] {
          header = ptx::ld_relaxed_sys_b128(words);
          if (j < top_k) entry = ptx::ld_relaxed_sys_b128(words + 1 + j);
          tagged.begin(row, num_vectors_, items.first_part(), op.tag());
        };
        ask();
        const Coming coming = poll_message(
            rank_, op, from, ask,
            [&] {
              return header.w == op.tag() && (!is_there() || entry.w == op.tag()) &&
                     tagged.is_here(op.tag());
            },
            [&] {
              return op.have_tag(words, from.rank, &header) &&
                     (!is_there() || op.have_tag(words + 1 + j, from.rank, &entry)) &&
                     TaggedPart::wait(rank_, op.receiving(), from.rank, row, num_vectors_,
                                      items.first_part());
            });
        if (coming == Coming::kGivenUp) return false;
        if (coming == Coming::kNever) break;
        Place place = {};
        const bool ok = !is_there() || find_place(op, from.rank, entry, &place);
        if (!__all_sync(kAllLanes, ok)) return false;
        const uint32_t lanes = __ballot_sync(kAllLanes, is_there());
        if (!move(op, from.rank, row, tagged, items, place, lanes)) return false;
      } while (!kIsUsual && (first += kWarp) < top_k);
    }
    return true;
  }

  // Of a lane's entry.
  struct Place {
    std::byte* row;
    uint32_t* scales;
  };
  // False: memory that contradicts itself must not choose where we write.
  __device__ bool find_place(const Op& op, uint32_t src_rank, const uint4& entry,
                             Place* place) const {
    const uint32_t local_expert = entry.x;
    if (local_expert >= num_local_) return op.corrupt(src_rank, num_local_, local_expert);
    const uint64_t position = rows_[src_rank * num_local_ + local_expert] + uint64_t{entry.y};
    if (position >= capacity_) return op.corrupt(src_rank, capacity_, position);
    const auto in_expert = static_cast<uint32_t>(position);
    const uint32_t num_scale_words = kIsUsual ? layout_.num_scales() : layout_.num_scale_words();
    place->row =
        op.self() + layout_.workspace_row(workspace_, local_expert * capacity_ + in_expert);
    place->scales =
        at<uint32_t>(op.self(), layout_.workspace_scales(workspace_, 0)) +
        protocol::expert_scale_word_idx(num_scale_words, capacity_, local_expert, in_expert, 0);
    return true;
  }

  // Parts of a row to the places of some lanes. `tagged`: the first, here. Whole warp.
  __device__ bool move(const Op& op, uint32_t src_rank, std::byte* row, TaggedPart tagged,
                       const Items& items, const Place& place, uint32_t lanes) const {
#pragma unroll 1
    for (uint32_t part = items.first_part(); part < items.end_part(); ++part) {
      if (part > items.first_part() &&
          !poll_part(rank_, op.receiving(), src_rank, row, num_vectors_, part, &tagged)) {
        return false;
      }
      const Part p = tagged.part();
      if (part + 1 < items.end_part()) tagged.begin(row, num_vectors_, part + 1, op.tag());
      const ScaleWord<kIsUsual> scale(p, part, layout_);
#pragma unroll 1
      for (uint32_t left = lanes; left != 0; left &= left - 1) {
        const uint32_t lane = __ffs(static_cast<int>(left)) - 1;
        const auto to = shuffled(place.row, lane);
        const auto scales = shuffled(place.scales, lane);
        p.store(to, num_vectors_, part);
        if (scale.is_there) scales[uint64_t{scale.idx} * capacity_] = scale.value;
      }
    }
    return true;
  }
  template <typename T>
  __device__ static T* shuffled(T* pointer, uint32_t lane) {
    const auto value = reinterpret_cast<unsigned long long>(pointer);
    return reinterpret_cast<T*>(__shfl_sync(kAllLanes, value, lane));
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const DispatchRecvParams& params_;
  uint32_t workspace_, num_ranks_, num_local_, num_vectors_, num_parts_, capacity_;
  uint32_t *sources_, *rows_;
};

template <bool kIsUsual>
struct TaggedExpertMajor {
  static constexpr bool kByExpert = true;
  static constexpr bool kTagged = true;
  static constexpr bool kSendsToSelf = true;
  using Places = TaggedReceivers<kIsUsual>;
  template <typename Rows>
  using Sender = TaggedExpertSender<Rows, kIsUsual>;
  using Receiver = TaggedExpertReceiver<kIsUsual>;
  // Of an item's row: one more than the row has, its entries.
  __device__ static uint32_t num_parts(const LowLatencyLayout& layout) {
    return protocol::parts_for(layout.dispatch_row_bytes()) + 1;
  }
};

}  // namespace

const WorkspaceDispatch kTaggedExpertWorkspaceDispatch[] = {
    make_workspace_dispatch<TaggedExpertMajor<false>>(),
    make_workspace_dispatch<TaggedExpertMajor<true>>()};

}  // namespace ep::cuda
