// Dispatch's second half: messages become rows of recv_x, in any order and without a word between
// blocks: an entry's position and the counts say where its row goes. A warp reads a message's
// header, then moves some parts of its row; who has the end of it notes what combine needs.
#pragma once

#include "cuda/dispatch_send.cuh"
#include "protocol/scales.h"

namespace ep::cuda {

using protocol::DispatchRecvParams;
using protocol::HandleEntry;
using protocol::OutputLayout;

// Where the row of a lane's entry goes: in rows of recv_x, and its first scale in words of
// recv_scales, which there are 2^32 of only beside more rows than a GPU has memory for.
struct Place {
  uint32_t row = 0, first_scale = 0;
};

// In shared memory: what the sources send to this rank.
//
//   sources              messages of each
//   rows     [R + 1][L]  rows of a local expert from each source; counted up, from those before it
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
                              const Arrivals& arrivals)
      : rank_(rank),
        layout_(rank.layout),
        op_(op),
        params_(params),
        arrivals_(arrivals),
        shape_{static_cast<uint32_t>(layout_.dispatch_row_bytes() / sizeof(uint4)),
               layout_.num_scales()},
        num_parts_(protocol::parts_for(layout_.dispatch_row_bytes())) {}

  __device__ bool is_by_expert() const {
    return View::kIsUsual || params_.output == OutputLayout::kExpertMajor;
  }

  // Counts of all sources -> arrivals.rows. Whole block, a barrier behind it. `own_count(e)`: where
  // this rank's own words were not published (its rank is `own_rank` then). False on some threads.
  // A group of threads serves a source, so that all words are on their way together; the last
  // threads begin, because the first ones may wait for signals.
  template <typename OwnCount>
  __device__ bool read_counts(uint32_t own_rank, OwnCount own_count) const {
    const uint32_t num_local = arrivals_.num_local_experts, num_ranks = arrivals_.sources.num_ranks;
    const uint32_t shift = ceil_log2(kThreads) - min(ceil_log2(num_ranks), ceil_log2(kThreads));
    const uint32_t thread = kThreads - 1 - threadIdx.x;
    bool ok = true;
#pragma unroll 1
    for (uint32_t r = thread >> shift; r < num_ranks; r += kThreads >> shift) {
      const auto* counts = at<uint64_t>(op_.self(), layout_.counts(op_.bank(), r));
#pragma unroll 1
      for (uint32_t e = thread & ((1u << shift) - 1); e < num_local && ok; e += 1u << shift) {
        uint32_t count;
        if (r == own_rank) {
          count = own_count(e);
        } else {
          ok = op_.read_count(counts + e, r, &count);
        }
        arrivals_.rows[r * num_local + e] = count;
      }
    }
    return ok;
  }
  // How many messages lie before those of each source and, where counts have been read, how many
  // rows of each expert. Whole block, barriers before and behind it.
  __device__ void count_up() const {
    arrivals_.sources.count_up();
    if (is_by_expert()) count_up_rows();
  }

  // All messages but those of `skip_rank`. `num_taken`: see Items. False, on all lanes of a warp:
  // it gave up.
  __device__ bool run(uint32_t skip_rank, uint32_t num_taken) const {
    const bool are_tagged = arrivals_.sources.template are_all_tagged<View>();
    return are_tagged ? run<true>(skip_rank, num_taken) : run<false>(skip_rank, num_taken);
  }
  template <bool kAreTagged>
  __device__ bool run(uint32_t skip_rank, uint32_t num_taken) const {
    const Sources& sources = arrivals_.sources;
    const OtherMessages messages(sources, skip_rank);
    for (Items items(messages.size, num_parts_ + 1, num_taken); items.more(); items.next()) {
      const uint32_t m = messages[items.row()];
      const uint32_t src_rank = source_of(sources.prefix, sources.num_ranks, m);
      if (!receive<kAreTagged>(m, src_rank, m - sources.prefix[src_rank], items)) return false;
    }
    return true;
  }

  // The messages of this rank to itself, straight from x. Returns the number of items, see Items.
  template <typename Rows>
  __device__ uint32_t take_own(const DispatchSender<Rows, View>& sender, const Routing& routing,
                               const TokenSets& sets, const Rows& rows, uint32_t num_taken) const {
    const uint32_t self = rank_.self_rank, lane = threadIdx.x % kWarp;
    const uint32_t first_expert = routing.owners.first_expert(self);
    Items items(routing.num_tokens, num_parts_ + 1, num_taken);
    for (; items.more(); items.next()) {
      const uint32_t token = items.row();
      const bool notes = items.end_part() > num_parts_, goes_here = sets.goes_to_rank(self, token);
      if (!goes_here && !(notes && sender.is_alone())) continue;
      const auto first = rows.fetch(token, items.first_part());
      const uint32_t slot = sets.before_rank(self, token),
                     m = arrivals_.sources.prefix[self] + slot;
      uint32_t num_entries = 0, outcome_slot = 0;
      bool is_first = true;
      const uint32_t num_routes = for_each_route<View::kIsUsual>(
          routing, sets, token, [&](const Route& route, bool is_routed) {
            if (notes && is_routed && sender.is_alone()) sender.note_answer(token, route);
            const bool is_here = is_routed && route.dst_rank == self;
            Place place;
            if (is_here) {
              const ExpertEntry entry = {static_cast<uint16_t>(route.expert - first_expert),
                                         static_cast<uint16_t>(route.k),
                                         sets.before_expert(route.expert, token), route.weight};
              find_place(self, slot, entry, &place);
              if (notes) note_entry(m, self, slot, route.entry_idx, entry, place);
              num_entries = route.num_entries;
              if (route.entry_idx == 0) outcome_slot = sender.outcome_slot(token, route);
            }
            const uint32_t lanes = lanes_of_rows(is_here, is_first);
            if (lanes == 0) return;
            is_first = false;
            auto fetched = first;
#pragma unroll 1
            for (uint32_t part = items.first_part(); part < end_of_row(items); ++part) {
              const Part p = rows.finish(fetched);
              if (part + 1 < end_of_row(items)) fetched = rows.fetch(token, part + 1);
              store(p, part, place, lanes);
            }
          });
      if (!notes) continue;
      if (goes_here) {
        note_end(m, self, slot,
                 {token, __reduce_max_sync(kAllLanes, outcome_slot),
                  __reduce_max_sync(kAllLanes, num_entries), 0});
      }
      if (sender.is_alone() && lane == 0) sender.note_partials(token, num_routes);
    }
    return items.size();
  }

  // What is left, by all blocks together: counts, the sources' words, unused rank-major slots.
  // Whole block.
  template <typename OwnCount>
  __device__ bool write_counts(uint32_t own_rank, OwnCount own_count) const {
    const bool is_rank_major = !is_by_expert();
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    if (is_rank_major) clear_unused_slots(thread, step);
    if (!Op::is_clerk()) return true;
    if (is_rank_major) {
      const bool ok = read_counts(own_rank, own_count);
      if (!__syncthreads_and(ok)) return false;
      count_up_rows();
      __syncthreads();
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
    if (is_by_expert()) ok = read_counts(kNoRank, no_own_count);
    if (!__syncthreads_and(ok)) return;
    count_up();
    __syncthreads();
    ok = run(kNoRank, 0);
    ok &= write_counts(kNoRank, no_own_count);
    op_.complete(ok);
  }

 private:
  __device__ uint32_t end_of_row(const Items& items) const {
    return min(items.end_part(), num_parts_);
  }

  // By the last threads, because the first ones count messages.
  __device__ void count_up_rows() const {
    cuda::count_up_rows(arrivals_.rows, arrivals_.sources.num_ranks, arrivals_.num_local_experts,
                        kThreads - 1 - threadIdx.x);
  }

  // Some parts of message `m`, the `slot`-th of its source. One warp. False, on all its lanes: it
  // gave up.
  template <bool kIsTagged>
  __device__ bool receive(uint32_t m, uint32_t src_rank, uint32_t slot, const Items& items) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout_.config().top_k;
    const bool is_tagged =
        kIsTagged || (!View::kHasNetwork && arrivals_.sources.is_tagged(src_rank));
    std::byte* message =
        op_.self() + (is_tagged ? layout_.tagged_message(op_.bank(), src_rank, slot)
                                : layout_.header(op_.bank(), src_rank, slot));
    const auto* words = reinterpret_cast<const uint4*>(message);
    std::byte* tagged_row = message + layout_.tagged_row_in_message();
    const bool notes = items.end_part() > num_parts_;
    uint4 header = {};
    uint32_t first = 0;
#pragma unroll 1
    do {
      const uint32_t j = first + lane;
      uint4 entry = {};
      TaggedPart tagged;
      auto is_there = [&] { return j < min(header.z, top_k); };
      // Header, entries and, tagged, the first part on their way together.
      if (is_tagged) {
        auto ask = [&] {
          header = ptx::ld_relaxed_sys_b128(words);
          if (j < top_k) entry = ptx::ld_relaxed_sys_b128(words + 1 + j);
          tagged.begin(tagged_row, shape_.num_vectors, items.first_part(), op_.tag());
        };
        auto are_here = [&] {
          return header.w == op_.tag() && (!is_there() || entry.w == op_.tag()) &&
                 tagged.is_here(op_.tag());
        };
        auto wait = [&] {
          return op_.have_tag(words, src_rank, &header) &&
                 (!is_there() || op_.have_tag(words + 1 + j, src_rank, &entry)) &&
                 TaggedPart::wait(rank_, op_.receiving(), src_rank, tagged_row, shape_.num_vectors,
                                  items.first_part());
        };
        if (!poll_tagged(false, ask, are_here, wait)) return false;
      } else {
        if (first == 0) header = ptx::ld_row(words);
        if (j < top_k) entry = load_entry(message, j);
      }
      if (first == 0 && !check_header(src_rank, header)) return false;
      bool ok = true;
      Place place;
      if (is_there()) ok = find_place(src_rank, slot, entry_of(entry), &place);
      if (!__all_sync(kAllLanes, ok)) return false;
      const uint32_t lanes = lanes_of_rows(is_there(), first == 0);
      if (lanes != 0) {
        if (is_tagged) {
          ok = move_tagged(src_rank, tagged_row, tagged, items, place, lanes);
        } else {
          move_untagged(untagged_row(src_rank, slot, header.x), items, place, lanes);
        }
      }
      if (!ok) return false;
      if (notes && is_there()) note_entry(m, src_rank, slot, j, entry_of(entry), place);
    } while (!View::kIsUsual && (first += kWarp) < top_k);
    if (notes) note_end(m, src_rank, slot, header);
    return true;
  }

  // `tagged`: the first part, on its way.
  __device__ bool move_tagged(uint32_t src_rank, std::byte* row, TaggedPart tagged,
                              const Items& items, const Place& place, uint32_t lanes) const {
#pragma unroll 1
    for (uint32_t part = items.first_part(); part < end_of_row(items); ++part) {
      if (!poll_part(rank_, op_.receiving(), src_rank, row, shape_.num_vectors, part, &tagged)) {
        return false;
      }
      const Part p = tagged.part();
      if (part + 1 < end_of_row(items)) {
        tagged.begin(row, shape_.num_vectors, part + 1, op_.tag());
      }
      store(p, part, place, lanes);
    }
    return true;
  }
  __device__ void move_untagged(const RowView& row, const Items& items, const Place& place,
                                uint32_t lanes) const {
    constexpr uint32_t kBatch = 4;  // parts on their way at the same time
#pragma unroll 1
    for (uint32_t part = items.first_part(); part < end_of_row(items); part += kBatch) {
      Part batch[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (part + i < end_of_row(items)) batch[i] = load_part(row, shape_, part + i, ptx::ld_row);
      }
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (part + i < end_of_row(items)) store(batch[i], part + i, place, lanes);
      }
    }
  }

  __device__ bool is_source() const { return cuda::is_source(rank_); }

  __device__ static ExpertEntry entry_of(const uint4& words) {
    return {static_cast<uint16_t>(words.x), static_cast<uint16_t>(words.x >> 16), words.y,
            __uint_as_float(words.z)};
  }
  __device__ static uint4 load_entry(const std::byte* message, uint32_t j) {
    const auto* fields = reinterpret_cast<const uint32_t*>(message + sizeof(MessageHeader) +
                                                           j * sizeof(ExpertEntry));
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

  // Where an entry's row goes. False: memory that contradicts itself must not choose that.
  __device__ bool find_place(uint32_t src_rank, uint32_t slot, const ExpertEntry& entry,
                             Place* place) const {
    const uint32_t num_local = arrivals_.num_local_experts, top_k = layout_.config().top_k;
    const uint32_t num_scale_words =
        View::kIsUsual ? layout_.num_scales() : layout_.num_scale_words();
    if (entry.k >= top_k) return op_.corrupt(src_rank, top_k, entry.k);
    if (entry.local_expert >= num_local) {
      return op_.corrupt(src_rank, num_local, entry.local_expert);
    }
    if (!is_by_expert()) {
      place->row = rank_major_row(src_rank, slot);
      place->first_scale = place->row * num_scale_words;
      return true;
    }
    const auto capacity = static_cast<uint32_t>(layout_.expert_capacity());
    const uint32_t before = arrivals_.rows[src_rank * num_local + entry.local_expert];
    const uint64_t in_expert = before + uint64_t{entry.position};
    if (in_expert >= capacity) return op_.corrupt(src_rank, capacity, in_expert);
    place->row = entry.local_expert * capacity + static_cast<uint32_t>(in_expert);
    place->first_scale =
        entry.local_expert * num_scale_words * capacity + static_cast<uint32_t>(in_expert);
    return true;
  }
  // Of a message's entries that lanes have: to whose places its row goes. Rank-major all have the
  // same; `is_first`: it has not been there yet. Whole warp.
  __device__ uint32_t lanes_of_rows(bool is_there, bool is_first) const {
    const uint32_t lanes = __ballot_sync(kAllLanes, is_there);
    if (is_by_expert()) return lanes;
    return is_first ? lanes & -lanes : 0;
  }

  // Entry `j` of message `m`, to the handle.
  __device__ void note_entry(uint32_t m, uint32_t src_rank, uint32_t slot, uint32_t j,
                             const ExpertEntry& entry, const Place& place) const {
    const uint32_t top_k = layout_.config().top_k;
    if (!is_by_expert()) {
      const uint64_t i = uint64_t{rank_major_row(src_rank, slot)} * top_k + j;
      params_.recv_topk_idx[i] = static_cast<int32_t>(entry.local_expert);
      params_.recv_topk_weights[i] = entry.weight;
      return;
    }
    const float weight = is_source() ? __uint_as_float(uint32_t{entry.k}) : entry.weight;
    params_.handle.entries[uint64_t{m} * top_k + j] = {place.row, weight};
  }
  // After all entries. Whole warp.
  __device__ void note_end(uint32_t m, uint32_t src_rank, uint32_t slot,
                           const uint4& header) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout_.config().top_k;
    const bool is_rank_major = !is_by_expert();
    const uint32_t num_rows = is_rank_major ? 1 : header.z;
    HandleEntry* entries = params_.handle.entries + uint64_t{m} * top_k;
    // Combine reads all of them, before it knows how many there are.
#pragma unroll 1
    for (uint32_t j = num_rows + lane; j < top_k; j += kWarp) entries[j] = {0, 0.0f};
    if (is_rank_major) {
      const uint32_t row = rank_major_row(src_rank, slot);
#pragma unroll 1
      for (uint32_t j = header.z + lane; j < top_k; j += kWarp) {
        params_.recv_topk_idx[uint64_t{row} * top_k + j] = -1;
        params_.recv_topk_weights[uint64_t{row} * top_k + j] = 0.0f;
      }
      if (lane == 0) entries[0] = {row, 1.0f};
    }
    if (lane == 0) params_.handle.messages[m] = {header.x, header.y, m * top_k, num_rows};
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

  // A part to the places of some lanes. Whole warp.
  __device__ void store(const Part& p, uint32_t part, const Place& place, uint32_t lanes) const {
    const ScaleWord<View::kIsUsual> scale(p, part, layout_);
    uint32_t word = scale.idx;
    if (is_by_expert()) {
      word *= static_cast<uint32_t>(layout_.expert_capacity());
    }
#pragma unroll 1
    for (; lanes != 0; lanes &= lanes - 1) {
      const uint32_t lane = __ffs(static_cast<int>(lanes)) - 1;
      const uint32_t row = __shfl_sync(kAllLanes, place.row, lane);
      const uint32_t first_scale = __shfl_sync(kAllLanes, place.first_scale, lane);
      p.store(params_.recv_x + row * layout_.dispatch_row_bytes(), shape_.num_vectors, part);
      if (scale.is_there) scales()[first_scale + word] = scale.value;
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
      int32_t* unused = params_.recv_topk_idx + uint64_t{rank_major_row(r, begin)} * top_k;
#pragma unroll 1
      for (uint32_t i = thread; i < (num_slots - begin) << shift; i += step) {
        const uint32_t j = i & ((1u << shift) - 1);
        if (j < top_k) unused[(i >> shift) * top_k + j] = -1;
      }
    }
  }

  __device__ uint32_t* scales() const { return static_cast<uint32_t*>(params_.recv_scales); }
  __device__ uint32_t rank_major_row(uint32_t src_rank, uint32_t slot) const {
    return src_rank * layout_.config().num_max_tokens_per_rank + slot;
  }

  const View& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const DispatchRecvParams& params_;
  const Arrivals& arrivals_;
  RowShape shape_;
  uint32_t num_parts_;
};

}  // namespace ep::cuda
