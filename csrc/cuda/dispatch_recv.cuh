// Dispatch's second half: messages become rows of recv_x, in any order and without a word between
// blocks: an entry's position and the counts say where its row goes. A warp reads a message's
// header, then moves some parts of its row.
#pragma once

#include "cuda/dispatch_send.cuh"
#include "protocol/scales.h"

namespace ep::cuda {

using protocol::DispatchRecvParams;
using protocol::OutputLayout;

// What a warp has found out about a message. In shared memory, one for each warp.
struct MessagePlan {
  // Where its row goes: in recv_x, and its first scale in recv_scales.
  std::byte* rows[kMaxTopK];
  uint32_t* first_scales[kMaxTopK];
  uint32_t num_rows;
};

// In shared memory: what the sources send to this rank.
//
//   sources              messages of each
//   rows     [R + 1][L]  rows of a local expert from the sources before; expert-major only
struct Arrivals {
  Sources sources;
  uint32_t* rows;
  uint32_t num_local_experts;

  __device__ Arrivals(uint32_t* shared, uint32_t num_ranks, uint32_t num_local_experts)
      : sources(shared, num_ranks),
        rows(shared + Sources::num_words(num_ranks)),
        num_local_experts(num_local_experts) {}
  __host__ __device__ static uint64_t num_bytes(uint32_t num_ranks, uint32_t num_local_experts) {
    return (Sources::num_words(num_ranks) + (uint64_t{num_ranks} + 1) * num_local_experts) * 4;
  }
};

template <typename View = RankView>
class DispatchReceiver {
 public:
  using Op = OpOf<View>;

  __device__ DispatchReceiver(const View& rank, const Op& op, const DispatchRecvParams& params,
                              const Arrivals& arrivals, MessagePlan* plan)
      : rank_(rank),
        layout_(rank.layout),
        op_(op),
        params_(params),
        arrivals_(arrivals),
        plan_(plan),
        shape_{static_cast<uint32_t>(layout_.dispatch_row_bytes() / sizeof(uint4)),
               layout_.num_scales()} {}

  // Counts of all sources -> arrivals.rows. Whole block, a barrier behind it (and no signal
  // before). `own_count(e)`: where this rank's own words were not published (its rank is `own_rank`
  // then). False on some threads.
  template <typename OwnCount>
  __device__ bool read_counts(uint32_t own_rank, OwnCount own_count) const {
    const uint32_t num_local = arrivals_.num_local_experts, num_ranks = arrivals_.sources.num_ranks;
    const uint32_t stride = layout_.partition().num_max_local_experts();
    const auto* counts = at<uint64_t>(op_.self(), layout_.counts(op_.bank(), 0));
    auto count_of = [&](uint32_t r, uint32_t e, uint32_t* count) {
      if (r != own_rank) return op_.read_count(counts + r * stride + e, r, count);
      *count = own_count(e);
      return true;
    };
    bool ok = true;
    // Few ranks: a thread an expert. Many: a warp an expert, a lane a rank.
    if (num_ranks <= 8) {
#pragma unroll 1
      for (uint32_t e = threadIdx.x; e < num_local; e += blockDim.x) {
        uint32_t sum = 0;
#pragma unroll 1
        for (uint32_t r = 0; r < num_ranks; ++r) {
          arrivals_.rows[r * num_local + e] = sum;
          uint32_t count;
          ok = ok && count_of(r, e, &count);
          sum += count;
        }
        arrivals_.rows[num_ranks * num_local + e] = sum;
      }
      return ok;
    }
    const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (uint32_t e = threadIdx.x / kWarp; e < num_local; e += kWarps) {
      uint32_t before = 0;
#pragma unroll 1
      for (uint32_t first = 0; first < num_ranks; first += kWarp) {
        const uint32_t r = first + lane;
        uint32_t count = 0;
        ok = ok && (r >= num_ranks || count_of(r, e, &count));
        uint32_t sum = count;
        for (uint32_t step = 1; step < kWarp; step *= 2) {
          const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
          if (lane >= step) sum += other;
        }
        if (r < num_ranks) arrivals_.rows[r * num_local + e] = before + sum - count;
        before += __shfl_sync(kAllLanes, sum, kWarp - 1);
      }
      if (lane == 0) arrivals_.rows[num_ranks * num_local + e] = before;
    }
    return ok;
  }

  // All messages but those of `skip_rank`. `num_taken`: see Items. False, on all lanes of a warp:
  // it gave up.
  __device__ bool run(uint32_t skip_rank, uint32_t num_taken) const {
    const Sources& sources = arrivals_.sources;
    const OtherMessages messages(sources, skip_rank);
    for (Items items(messages.size, num_parts(), num_taken); items.more(); items.next()) {
      const uint32_t m = messages[items.row()];
      const uint32_t src_rank = source_of(sources.prefix, sources.num_ranks, m);
      const uint32_t slot = m - sources.prefix[src_rank];
      const bool is_tagged = !View::kHasNetwork && sources.is_tagged(src_rank);
      const bool ok = is_tagged ? receive_tagged(m, src_rank, slot, items)
                                : receive_untagged(m, src_rank, slot, items);
      if (!ok) return false;
    }
    return true;
  }

  // The messages of this rank to itself, straight from x. Returns the number of items, see Items.
  template <typename Rows>
  __device__ uint32_t take_own(const DispatchSender<Rows, View>& sender, const Routing& routing,
                               const TokenSets& sets, const Rows& rows, uint32_t num_taken) const {
    const uint32_t self = rank_.self_rank;
    const uint32_t first_expert = routing.owners.first_expert(self);
    Items items(routing.num_tokens, num_parts(), num_taken);
    for (; items.more(); items.next()) {
      const uint32_t token = items.row(), first_part = items.first_part();
      const bool writes = first_part == 0, goes_here = sets.goes_to_rank(self, token);
      if (!goes_here && !sender.is_alone()) continue;
      auto fetched = rows.fetch(token, first_part);
      const uint32_t slot = sets.before_rank(self, token),
                     m = arrivals_.sources.prefix[self] + slot;
      uint32_t num_entries = 0;
      const uint32_t num_routes = for_each_route(routing, sets, token, [&](const Route& route) {
        if (writes && sender.is_alone()) sender.note_answer(token, route);
        if (route.dst_rank != self) return;
        const ExpertEntry entry = {static_cast<uint16_t>(route.expert - first_expert),
                                   static_cast<uint16_t>(route.k),
                                   sets.before_expert(route.expert, token), route.weight};
        place_entry(m, self, slot, route.entry_idx, entry, writes);
        num_entries = route.num_entries;
        if (writes && route.entry_idx == 0) {
          write_message(m, token, sender.outcome_slot(token, route), num_entries);
        }
      });
      if (writes && sender.is_alone() && threadIdx.x % kWarp == 0) {
        sender.note_partials(token, num_routes);
      }
      if (!goes_here) continue;
      finish_plan(m, self, slot, __reduce_max_sync(kAllLanes, num_entries), writes);
#pragma unroll 1
      for (uint32_t part = first_part; part < items.end_part(); ++part) {
        const Part p = rows.finish(fetched);
        if (part + 1 < items.end_part()) fetched = rows.fetch(token, part + 1);
        store(p, part);
      }
    }
    return items.size();
  }

  // What is left, by all blocks together: counts, the sources' words, unused rank-major slots.
  // Whole block.
  template <typename OwnCount>
  __device__ bool write_counts(uint32_t own_rank, OwnCount own_count) const {
    const bool is_rank_major = params_.output == OutputLayout::kRankMajor;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    if (is_rank_major) clear_unused_slots(thread, step);
    if (!Op::is_clerk()) return true;
    if (is_rank_major) {
      const bool ok = read_counts(own_rank, own_count);
      if (!__syncthreads_and(ok)) return false;
    }
    const uint32_t num_local = arrivals_.num_local_experts;
#pragma unroll 1
    for (uint32_t e = threadIdx.x; e < num_local; e += blockDim.x) {
      const uint32_t num_rows = arrivals_.rows[arrivals_.sources.num_ranks * num_local + e];
      params_.num_recv_tokens_per_expert[e] = static_cast<int32_t>(num_rows);
      ptx::red_add_relaxed_gpu(rank_.num_expert_rows + e, num_rows);
    }
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < arrivals_.sources.num_ranks; r += blockDim.x) {
      params_.handle.num_messages[r] = arrivals_.sources.words[r];
    }
    return true;
  }

  // All of it, this rank's own messages as others', once their signals are there; ends the
  // operation. `has_signals`: on all threads, or the kernel ends. Whole block.
  __device__ void receive_all(bool has_signals) const {
    auto no_own_count = [](uint32_t) { return 0u; };
    bool ok = has_signals;
    // Counts have arrived with the signals or the messages; none is read before.
    if (!__syncthreads_and(ok)) return;
    if (params_.output == OutputLayout::kExpertMajor) ok = read_counts(kNoRank, no_own_count);
    if (!__syncthreads_and(ok)) return;
    arrivals_.sources.count_up();
    __syncthreads();
    ok = run(kNoRank, 0);
    ok &= write_counts(kNoRank, no_own_count);
    op_.complete(ok);
  }

 private:
  __device__ uint32_t num_parts() const {
    return protocol::parts_for(layout_.dispatch_row_bytes());
  }

  __device__ bool receive_untagged(uint32_t m, uint32_t src_rank, uint32_t slot,
                                   const Items& items) const {
    const uint32_t lane = threadIdx.x % kWarp;
    const std::byte* message = op_.self() + layout_.header(op_.bank(), src_rank, slot);
    const auto* fields = reinterpret_cast<const uint32_t*>(message + sizeof(MessageHeader));
    constexpr uint32_t kEntryWords = sizeof(ExpertEntry) / sizeof(uint32_t);
    // Header and entries on their way together.
    const uint4 header = ptx::ld_row(reinterpret_cast<const uint4*>(message));
    uint4 entry = {};
    if (lane < layout_.config().top_k) entry = load_entry(fields + lane * kEntryWords);
    if (!check_header(src_rank, header)) return false;
    const bool writes = items.first_part() == 0;
    __syncwarp();  // the last message's plan has been read
    bool ok = true;
#pragma unroll 1
    for (uint32_t j = lane; j < header.z && ok; j += kWarp) {
      if (j != lane) entry = load_entry(fields + j * kEntryWords);
      ok = place_entry(m, src_rank, slot, j, entry_of(entry), writes);
    }
    if (!__all_sync(kAllLanes, ok)) return false;
    if (writes && lane == 0) write_message(m, header.x, header.y, header.z);
    finish_plan(m, src_rank, slot, header.z, writes);

    constexpr uint32_t kBatch = 4;  // parts on their way at the same time
    const RowView row = untagged_row(src_rank, slot, header.x);
#pragma unroll 1
    for (uint32_t part = items.first_part(); part < items.end_part(); part += kBatch) {
      Part batch[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (part + i < items.end_part()) batch[i] = load_part(row, shape_, part + i, ptx::ld_row);
      }
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (part + i < items.end_part()) store(batch[i], part + i);
      }
    }
    return true;
  }

  __device__ bool receive_tagged(uint32_t m, uint32_t src_rank, uint32_t slot,
                                 const Items& items) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout_.config().top_k;
    std::byte* message = op_.self() + layout_.tagged_message(op_.bank(), src_rank, slot);
    const auto* words = reinterpret_cast<const uint4*>(message);
    std::byte* row = message + layout_.tagged_row_in_message();
    // Header, entries and the first part on their way together.
    uint4 header = ptx::ld_relaxed_sys_b128(words);
    uint4 entry = {};
    if (lane < top_k) entry = ptx::ld_relaxed_sys_b128(words + 1 + lane);
    TaggedPart tagged;
    tagged.begin(row, shape_.num_vectors, items.first_part(), op_.tag());
    const bool has_header = op_.have_tag(words, src_rank, &header);
    if (!__all_sync(kAllLanes, has_header) || !check_header(src_rank, header)) return false;
    const bool writes = items.first_part() == 0;
    bool ok = true;
#pragma unroll 1
    for (uint32_t j = lane; j < header.z && ok; j += kWarp) {
      if (j != lane) entry = ptx::ld_relaxed_sys_b128(words + 1 + j);
      ok = op_.have_tag(words + 1 + j, src_rank, &entry) &&
           place_entry(m, src_rank, slot, j, entry_of(entry), writes);
    }
    if (!__all_sync(kAllLanes, ok)) return false;
    if (writes && lane == 0) write_message(m, header.x, header.y, header.z);
    finish_plan(m, src_rank, slot, header.z, writes);
#pragma unroll 1
    for (uint32_t part = items.first_part(); part < items.end_part(); ++part) {
      while (!__all_sync(kAllLanes, tagged.is_here(op_.tag()))) {
        ok = wait_for_part(rank_, op_.receiving(), src_rank, row, shape_.num_vectors, part);
        if (!__all_sync(kAllLanes, ok)) return false;
        tagged.begin(row, shape_.num_vectors, part, op_.tag());
      }
      const Part p = tagged.part();
      if (part + 1 < items.end_part()) {
        tagged.begin(row, shape_.num_vectors, part + 1, op_.tag());
      }
      store(p, part);
    }
    return true;
  }

  __device__ bool is_source() const {
    return layout_.config().reduction == protocol::Reduction::kSource;
  }

  __device__ static ExpertEntry entry_of(const uint4& words) {
    return {static_cast<uint16_t>(words.x), static_cast<uint16_t>(words.x >> 16), words.y,
            __uint_as_float(words.z)};
  }
  __device__ static uint4 load_entry(const uint32_t* fields) {
    return {ptx::ld_relaxed_sys(fields), ptx::ld_relaxed_sys(fields + 1),
            ptx::ld_relaxed_sys(fields + 2), 0};
  }

  // Where partial rows of the messages from `src_rank` may go.
  __device__ uint64_t num_outcome_slots(uint32_t src_rank) const {
    if constexpr (View::kHasNetwork) return rank_.num_outcome_slots(src_rank);
    return layout_.num_outcome_slots();
  }

  // Memory that contradicts its signal must not choose where we write. The same on all lanes.
  __device__ bool check_header(uint32_t src_rank, const uint4& header) const {
    const auto& config = layout_.config();
    const bool packs_rows = View::kHasNetwork && layout_.packs_rows();
    const uint32_t num_slots = packs_rows ? header.z : is_source() ? config.top_k : 1;
    if (header.w == op_.tag() && header.z >= 1 && header.z <= config.top_k &&
        header.x < config.num_max_tokens_per_rank &&
        uint64_t{header.y} + num_slots <= num_outcome_slots(src_rank)) {
      return true;
    }
    return op_.corrupt(src_rank, op_.tag(), header.w);
  }

  // Entry `j` of message `m`: its row to the plan, and to the handle.
  __device__ bool place_entry(uint32_t m, uint32_t src_rank, uint32_t slot, uint32_t j,
                              const ExpertEntry& entry, bool writes) const {
    const uint32_t num_local = arrivals_.num_local_experts, top_k = layout_.config().top_k;
    const uint32_t local_expert = entry.local_expert;
    if (entry.k >= top_k) return op_.corrupt(src_rank, top_k, entry.k);
    if (local_expert >= num_local) return op_.corrupt(src_rank, num_local, local_expert);
    if (params_.output == OutputLayout::kRankMajor) {
      if (writes) {
        const uint64_t i = rank_major_row(src_rank, slot) * top_k + j;
        params_.recv_topk_idx[i] = static_cast<int32_t>(local_expert);
        params_.recv_topk_weights[i] = entry.weight;
      }
      return true;
    }
    const uint64_t in_expert =
        arrivals_.rows[src_rank * num_local + local_expert] + uint64_t{entry.position};
    if (in_expert >= layout_.expert_capacity()) {
      return op_.corrupt(src_rank, layout_.expert_capacity(), in_expert);
    }
    const auto row = static_cast<uint32_t>(local_expert * layout_.expert_capacity() + in_expert);
    plan_->rows[j] = params_.recv_x + row * layout_.dispatch_row_bytes();
    plan_->first_scales[j] =
        scales() + uint64_t{local_expert} * layout_.num_scale_words() * layout_.expert_capacity() +
        in_expert;
    if (writes) {
      const float weight = is_source() ? __uint_as_float(entry.k) : entry.weight;
      params_.handle.entries[uint64_t{m} * top_k + j] = {row, weight};
    }
    return true;
  }

  // After all entries: the plan is complete for the whole warp.
  __device__ void finish_plan(uint32_t m, uint32_t src_rank, uint32_t slot, uint32_t num_entries,
                              bool writes) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout_.config().top_k;
    const bool is_rank_major = params_.output == OutputLayout::kRankMajor;
    if (writes) {
      // Combine reads all of them, before it knows how many there are.
#pragma unroll 1
      for (uint32_t j = (is_rank_major ? 1 : num_entries) + lane; j < top_k; j += kWarp) {
        params_.handle.entries[uint64_t{m} * top_k + j] = {0, 0.0f};
      }
    }
    if (is_rank_major && writes) {
      const uint64_t row = rank_major_row(src_rank, slot);
#pragma unroll 1
      for (uint32_t j = num_entries + lane; j < top_k; j += kWarp) {
        params_.recv_topk_idx[row * top_k + j] = -1;
        params_.recv_topk_weights[row * top_k + j] = 0.0f;
      }
      if (lane == 0) {
        params_.handle.entries[uint64_t{m} * top_k] = {static_cast<uint32_t>(row), 1.0f};
      }
    }
    if (lane == 0) {
      if (is_rank_major) {
        const uint64_t row = rank_major_row(src_rank, slot);
        plan_->rows[0] = params_.recv_x + row * layout_.dispatch_row_bytes();
        plan_->first_scales[0] = scales() + row * layout_.num_scale_words();
      }
      plan_->num_rows = is_rank_major ? 1 : num_entries;
    }
    __syncwarp();
  }

  __device__ void write_message(uint32_t m, uint32_t src_token, uint32_t outcome_slot,
                                uint32_t num_entries) const {
    params_.handle.messages[m] = {src_token, outcome_slot, m * layout_.config().top_k,
                                  params_.output == OutputLayout::kRankMajor ? 1 : num_entries};
  }

  __device__ RowView untagged_row(uint32_t src_rank, uint32_t slot, uint32_t src_token) const {
    if (protocol::pulls_dispatch(layout_.config().transfer)) {
      std::byte* peer = op_.peer(src_rank);
      return {peer + layout_.staged_row(op_.bank(), src_token),
              at<float>(peer, layout_.staged_scales(op_.bank(), src_token))};
    }
    return {op_.self() + layout_.inbox_row(op_.bank(), src_rank, slot),
            at<float>(op_.self(), layout_.inbox_scales(op_.bank(), src_rank, slot))};
  }

  // A part to all rows of the plan.
  __device__ void store(const Part& p, uint32_t part) const {
    const ScaleWord scale(p, part, layout_);
    uint32_t word = scale.idx;
    if (params_.output == OutputLayout::kExpertMajor) {
      word *= static_cast<uint32_t>(layout_.expert_capacity());
    }
    const uint32_t num_rows = plan_->num_rows;
#pragma unroll 1
    for (uint32_t j = 0; j < num_rows; ++j) {
      store_vectors(p, plan_->rows[j], shape_.num_vectors, part);
      if (scale.is_there) plan_->first_scales[j][word] = scale.value;
    }
  }

  // Experts of slots that hold no message: none. As if top_k were a power of two: no division.
  __device__ void clear_unused_slots(uint32_t thread, uint32_t step) const {
    const uint32_t num_slots = layout_.config().num_max_tokens_per_rank;
    const uint32_t top_k = layout_.config().top_k;
    const uint32_t shift = ceil_log2(top_k);
#pragma unroll 1
    for (uint32_t r = 0; r < arrivals_.sources.num_ranks; ++r) {
      const uint32_t begin = arrivals_.sources.count(r);
      int32_t* unused = params_.recv_topk_idx + rank_major_row(r, begin) * top_k;
#pragma unroll 1
      for (uint32_t i = thread; i < (num_slots - begin) << shift; i += step) {
        const uint32_t j = i & ((1u << shift) - 1);
        if (j < top_k) unused[(i >> shift) * top_k + j] = -1;
      }
    }
  }

  __device__ uint32_t* scales() const { return static_cast<uint32_t*>(params_.recv_scales); }
  __device__ uint64_t rank_major_row(uint32_t src_rank, uint32_t slot) const {
    return uint64_t{src_rank} * layout_.config().num_max_tokens_per_rank + slot;
  }

  const View& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const DispatchRecvParams& params_;
  const Arrivals& arrivals_;
  MessagePlan* plan_;
  RowShape shape_;
};

}  // namespace ep::cuda
