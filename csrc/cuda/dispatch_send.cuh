// Dispatch's first half: every token once to each rank that owns some of its experts.
//
// Every block finds out by itself which tokens go where, so that slots and positions need no word
// from other blocks. A warp moves some parts of a token's row; who has the end of it writes the
// headers, too. Tagged words need nothing more; else the last block to finish signals.
//
// Messages to peers over a network are written where this rank stages them, and put from there.
#pragma once

#include "cuda/part.cuh"
#include "cuda/routing.cuh"

namespace ep::cuda {

using protocol::DispatchSendParams;
using protocol::ExpertEntry;
using protocol::MessageHeader;

// Where a token's row goes. In shared memory, one for each warp.
struct SendPlan {
  std::byte* rows[kMaxTopK];
  float* scales[kMaxTopK];
  uint32_t num_rows;
  uint32_t first_row;  // is written first
};

// The same where some of them go over a network.
struct NetworkSendPlan : SendPlan {
  uint32_t messages[kMaxTopK];  // dst rank << 16 | slot
};

template <typename Rows, typename View = RankView>
class DispatchSender {
 public:
  using Op = OpOf<View>;
  using Items = SendItems<View>;
  using Plan = std::conditional_t<View::kHasNetwork, NetworkSendPlan, SendPlan>;

  // `skip_rank`: whose messages are not sent, because this kernel receives them from x itself.
  __device__ DispatchSender(const View& rank, const Op& op, const Routing& routing,
                            const TokenSets& sets, const Rows& rows,
                            const DispatchSendParams& params, uint32_t skip_rank)
      : rank_(rank),
        layout_(rank.layout),
        op_(op),
        routing_(routing),
        sets_(sets),
        rows_(rows),
        params_(params),
        skip_rank_(skip_rank),
        is_tagged_(is_batch_tagged(rank, routing.num_tokens)) {}

  // What its signal tells rank `r`.
  __device__ uint32_t source_word(uint32_t r) const {
    return sets_.tokens_of_rank(r) | (is_tagged_ ? protocol::kTaggedBit : 0);
  }

  // True where this rank has no peers and receives from x: there is nobody to send to.
  __device__ bool is_alone() const {
    if (View::kBatch != Batch::kAny) return View::kBatch == Batch::kAlone;
    return routing_.num_ranks == 1 && skip_rank_ == 0;
  }

  // How the rows of all tokens are shared out: one part more than they have is the headers.
  __device__ static Items items(const RankView& rank, uint32_t num_tokens) {
    return Items(num_tokens, protocol::parts_for(rank.layout.dispatch_row_bytes()) + 1);
  }

  // Whole block. `items`: see above; `fetched`: the first part of the first of them.
  __device__ void run(Items items, typename Rows::Fetched fetched, Plan* plan) const {
    publish_counts();
    if constexpr (View::kHasNetwork) put_counts();
    const uint32_t num_ranks = routing_.num_ranks;
    if (is_tagged_ && Op::is_clerk()) {
      for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
        if (op_.reaches(r)) op_.publish_signal(r, source_word(r));
      }
    }
    const uint32_t num_parts = protocol::parts_for(layout_.dispatch_row_bytes());
    send_rows(
        rows_, num_parts, items, fetched,
        [&](uint32_t token, uint32_t part) {
          // All warps of a block put messages.
          if (View::kHasNetwork || part < num_parts) plan_row(token, plan);
        },
        [&](const Part& p, uint32_t part) { send_part(p, part, *plan); },
        [&](uint32_t token, bool is_last) {
          if (is_last) write_headers(token);
          if constexpr (View::kHasNetwork) put_messages(*plan);
        });
    if (is_tagged_ || !op_.is_last_block()) return;
    for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
      if (!op_.reaches(r)) continue;
      op_.fence();
      op_.publish_signal(r, source_word(r));
    }
  }

  // What combine wants to know of a token: which rows come home, and how many do.
  __device__ void note_answer(uint32_t token, const Route& route) const {
    uint32_t* answers = params_.answers + token * layout_.num_outcome_columns();
    if (is_source()) {
      const uint32_t upper = packs_rows() ? route.num_below + route.entry_idx : route.dst_rank;
      answers[route.order] = upper << 16 | route.k;
    } else if (route.entry_idx == 0) {
      answers[route.column] = route.dst_rank << 16 | route.slot;
    }
  }
  __device__ void note_partials(uint32_t token, uint32_t num_routes) const {
    params_.num_partials[token] = is_source() ? num_routes : sets_.ranks_of(token);
  }
  // Where a message's partial row goes, or the first of its rows.
  __device__ uint32_t outcome_slot(uint32_t token, const Route& route) const {
    const uint32_t column = packs_rows() ? route.num_below : is_source() ? 0 : route.column;
    return token * layout_.num_outcome_columns() + column;
  }

 private:
  __device__ bool is_source() const { return cuda::is_source(rank_); }
  __device__ bool packs_rows() const { return View::kHasNetwork && layout_.packs_rows(); }
  // Rows for every expert to the peers' counts, a part of them by each block. Their readers look at
  // the epoch in them, so they may fly ahead.
  __device__ void publish_counts() const {
    const uint32_t from_last = gridDim.x - 1 - blockIdx.x;
#pragma unroll 1
    for (uint32_t expert = from_last * blockDim.x + threadIdx.x; expert < routing_.num_experts;
         expert += gridDim.x * blockDim.x) {
      const uint32_t owner = routing_.owners.owner(expert);
      if (owner == skip_rank_ || !op_.reaches(owner)) continue;
      auto* counts = at<uint64_t>(op_.peer(owner), layout_.counts(op_.bank(), rank_.self_rank));
      ptx::st_relaxed_sys(counts + (expert - routing_.owners.first_expert(owner)),
                          protocol::pack_signal(op_.epoch(), sets_.tokens_of_expert(expert)));
    }
  }

  // Over a network: the counts, which arrive as a message more, and what the signal tells; a warp a
  // peer, beginning with the blocks that have the fewest tokens.
  __device__ void put_counts() const {
    const uint32_t lane = threadIdx.x % kWarp, self = rank_.self_rank;
    const uint32_t first = (gridDim.x - 1 - blockIdx.x) * kWarps + threadIdx.x / kWarp;
#pragma unroll 1
    for (uint32_t r = first; r < routing_.num_ranks; r += gridDim.x * kWarps) {
      if (op_.reaches(r)) continue;
      const uint64_t staged = rank_.network.staged_counts(op_.bank(), r);
      const uint32_t first_expert = routing_.owners.first_expert(r);
      const uint32_t num_counts = routing_.owners.first_expert(r + 1) - first_expert;
      for (uint32_t e = lane; e < num_counts; e += kWarp) {
        at<uint64_t>(op_.self(), staged)[e] =
            protocol::pack_signal(op_.epoch(), sets_.tokens_of_expert(first_expert + e));
      }
      rank_.put(layout_.counts(op_.bank(), self), staged, num_counts * sizeof(uint64_t),
                rank_.network.arrivals(op_.bank(), protocol::Phase::kDispatch, self), r);
      if (lane == 0) op_.publish_signal(r, source_word(r));
    }
  }

  // The messages of a token that go over a network, if some do, once all warps have written their
  // parts: a warp a message. Whole block.
  __device__ void put_messages(const Plan& plan) const {
    const uint32_t self = rank_.self_rank;
    bool is_put = false;  // the same in all warps, which have planned the same token
#pragma unroll 1
    for (uint32_t i = threadIdx.x % kWarp; i < plan.num_rows; i += kWarp) {
      is_put |= !op_.reaches(plan.messages[i] >> 16);
    }
    if (!__any_sync(kAllLanes, is_put)) return;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x / kWarp; i < plan.num_rows; i += kWarps) {
      const uint32_t dst_rank = plan.messages[i] >> 16, slot = plan.messages[i] & 0xffff;
      if (op_.reaches(dst_rank)) continue;
      rank_.put(layout_.header(op_.bank(), self, slot),
                rank_.network.staged_message(op_.bank(), dst_rank, slot),
                rank_.network.message_bytes(),
                rank_.network.arrivals(op_.bank(), protocol::Phase::kDispatch, self), dst_rank);
    }
  }

  // Where messages to rank `r` are written: as if it were the base of its memory.
  __device__ std::byte* base_for(uint32_t r) const {
    if constexpr (View::kHasNetwork) {
      // So that this rank's slots of r's inbox are those of its own outbox for r.
      if (!op_.reaches(r)) {
        return op_.self() + rank_.network.staged_message(0, r, 0) -
               layout_.header(0, rank_.self_rank, 0);
      }
    }
    return op_.peer(r);
  }

  // Where the token's row goes. One warp.
  __device__ void plan_row(uint32_t token, Plan* plan) const {
    const uint32_t self = rank_.self_rank;
    const bool is_pull = !is_tagged_ && protocol::pulls_dispatch(layout_.config().transfer);
    const uint32_t num_kept = skip_rank_ != kNoRank && sets_.goes_to_rank(skip_rank_, token);
    const uint32_t num_ranks =
        for_each_rank<View::kIsUsual>(sets_, token, [&](uint32_t r, uint32_t slot, uint32_t i) {
          if (r == skip_rank_ || is_pull) return;
          if (skip_rank_ < r) i -= num_kept;
          std::byte* peer = base_for(r);
          if constexpr (View::kHasNetwork) plan->messages[i] = r << 16 | slot;
          if (is_tagged_) {
            plan->rows[i] = peer + layout_.tagged_message(op_.bank(), self, slot) +
                            layout_.tagged_row_in_message();
          } else {
            plan->rows[i] = peer + layout_.inbox_row(op_.bank(), self, slot);
            plan->scales[i] = at<float>(peer, layout_.inbox_scales(op_.bank(), self, slot));
          }
        });
    if (threadIdx.x % kWarp == 0) {
      plan->num_rows = num_ranks - num_kept;
      plan->first_row = next_behind(sets_.ranks_below(self + 1, token) - num_kept, plan->num_rows);
      if (is_pull && plan->num_rows > 0) {
        plan->num_rows = 1;
        plan->first_row = 0;
        plan->rows[0] = op_.self() + layout_.staged_row(op_.bank(), token);
        plan->scales[0] = at<float>(op_.self(), layout_.staged_scales(op_.bank(), token));
      }
    }
    __syncwarp();
  }

  // Headers of the token to the peers. A lane a route.
  __device__ void write_headers(uint32_t token) const {
    const uint32_t num_routes = for_each_route<View::kIsUsual>(
        routing_, sets_, token,
        [&](const Route& route, bool is_routed) {
          if (!is_routed) return;
          note_answer(token, route);
          if (route.dst_rank != skip_rank_) write_header(token, route);
        },
        packs_rows());
    if (threadIdx.x % kWarp == 0) note_partials(token, num_routes);
  }

  __device__ void write_header(uint32_t token, const Route& route) const {
    const uint32_t local_expert = route.expert - routing_.owners.first_expert(route.dst_rank);
    const uint32_t outcome_slot = this->outcome_slot(token, route);
    const uint32_t position = sets_.before_expert(route.expert, token);
    std::byte* peer = base_for(route.dst_rank);
    if (is_tagged_) {
      auto* words =
          at<uint4>(peer, layout_.tagged_message(op_.bank(), rank_.self_rank, route.slot));
      ptx::st_relaxed_sys_b128(
          words + 1 + route.entry_idx,
          {local_expert | route.k << 16, position, __float_as_uint(route.weight), op_.tag()});
      if (route.entry_idx == 0) {
        ptx::st_relaxed_sys_b128(words, {token, outcome_slot, route.num_entries, op_.tag()});
      }
    } else {
      std::byte* header = peer + layout_.header(op_.bank(), rank_.self_rank, route.slot);
      reinterpret_cast<ExpertEntry*>(header + sizeof(MessageHeader))[route.entry_idx] = {
          static_cast<uint16_t>(local_expert), static_cast<uint16_t>(route.k), position,
          route.weight};
      if (route.entry_idx == 0) {
        *reinterpret_cast<MessageHeader*>(header) = {token, outcome_slot, route.num_entries,
                                                     op_.tag()};
      }
    }
  }

  __device__ void send_part(const Part& p, uint32_t part, const Plan& plan) const {
    const RowShape& shape = rows_.shape;
    uint32_t i = plan.first_row;
#pragma unroll 1
    for (uint32_t j = 0; j < plan.num_rows; ++j, i = next_behind(i + 1, plan.num_rows)) {
      if (is_tagged_) {
        store_tagged(p, plan.rows[i], shape.num_vectors, part, op_.tag());
      } else {
        store_part(p, {plan.rows[i], plan.scales[i]}, shape, part);
      }
    }
  }

  const View& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const Routing& routing_;
  const TokenSets& sets_;
  const Rows& rows_;
  const DispatchSendParams& params_;
  uint32_t skip_rank_;
  bool is_tagged_;
};

}  // namespace ep::cuda
