// Combine's two halves: a partial row, or all rows, for every message; the sum of those of every
// token. A warp makes some parts of a row.
#pragma once

#include "cuda/travelling_rows.cuh"

namespace ep::cuda {

using protocol::CombineRecvParams;
using protocol::CombineSendParams;
using protocol::HandleEntry;
using protocol::HandleMessage;
using protocol::Reduction;

// What a rank has noted of a token of its own: how many rows come home and, a lane a column, whose.
struct Noted {
  uint32_t num_columns = 0, answer = 0;

  // Together, whether they are used or not. One warp.
  __device__ void fetch(const LowLatencyLayout& layout, const CombineRecvParams& recv,
                        uint32_t token) {
    const uint32_t lane = threadIdx.x % kWarp, most = layout.num_outcome_columns();
    num_columns = recv.num_partials[token];
    if (lane < most) answer = recv.answers[token * most + lane];
  }
};

// `Rows`: PlainRows or Float8Rows.
template <typename Rows, typename View = RankView>
class Combiner {
 public:
  using Op = OpOf<View>;
  using SendItems = cuda::SendItems<View>;

  // `skip_rank`: whose partial rows are not sent, because this kernel receives them itself.
  __device__ Combiner(const View& rank, const Op& op, const CombineSendParams& send,
                      const Sources& received, uint32_t skip_rank, SumPlan* plan)
      : rank_(rank),
        layout_(rank.layout),
        op_(op),
        send_(send),
        received_(received),
        skip_rank_(skip_rank),
        plan_(plan),
        is_source_(is_source(rank)),
        is_pull_(protocol::pulls_combine(layout_.config().transfer) && !is_source_),
        packs_rows_(View::kHasNetwork && layout_.packs_rows()),
        rows_(layout_),
        num_parts_(Rows::num_parts(layout_.combine_row_bytes())) {}

  // A partial row for every message. Whole block.
  __device__ void send() const {
    if (received_.template are_all_tagged<View>()) return send<true>();
    send<false>();
  }
  template <bool kAreTagged>
  __device__ void send() const {
    const uint32_t num_ranks = received_.num_ranks;
    bool all_tagged = true;
#pragma unroll 1
    for (uint32_t r = 0; r < num_ranks && !kAreTagged; ++r) {
      all_tagged &= r == skip_rank_ || received_.is_tagged(r);
    }
    if (Op::is_clerk()) publish(true);  // tagged rows do not wait for a signal
    // Where its own are skipped, they are the last ones.
    const uint32_t num_messages = OtherMessages(received_, skip_rank_).size;
    SendItems items(num_messages, num_parts_);
    // Where warps have several each, every other one is from the second half, where this rank's own
    // are: else all would wait for busy links first, and then none. (Two H200s over NVLink: a pair
    // of 128 tokens takes 29.1 us, not 30.3.)
    const uint32_t half = items.size() > gridDim.x * kWarps ? (num_messages + 1) / 2 : 0;
    for (; items.more(); items.next()) {
      const uint32_t i = items.row();
      const uint32_t m = behind_own(half == 0 ? i : i / 2 + (i % 2) * half);
      const Answered answered = fetch(m);  // on its way while its source is looked up
      const uint32_t src_rank = source_of(received_.prefix, num_ranks, m);
      make_partial<kAreTagged>(answered, m, src_rank, m - received_.prefix[src_rank], nullptr,
                               items);
      if constexpr (View::kHasNetwork) put_rows(m, src_rank, m - received_.prefix[src_rank]);
    }
    if (!all_tagged && op_.is_last_block()) publish(false);
  }

  // How the rows of all tokens of this rank are shared out.
  __device__ static Items items(const View& rank, uint32_t num_tokens) {
    return Items(num_tokens, Rows::num_parts(rank.layout.combine_row_bytes()));
  }
  // Adds up the partial rows of every token. `items`: see above; `noted`: of the first of them.
  // False, on all lanes of a warp: it gave up.
  __device__ bool receive(const CombineRecvParams& recv, Items items, Noted noted) const {
    const bool is_tagged = is_batch_tagged(rank_, recv.num_tokens);
    while (items.more()) {
      const Items item = items;
      const uint32_t token = item.row(), lane = threadIdx.x % kWarp;
      const uint32_t num_columns = noted.num_columns;
      const uint32_t first_column = token * layout_.num_outcome_columns();
      std::byte* out = recv.out + token * layout_.row_bytes();
      uint32_t answer = noted.answer;
      items.next();
      if (items.more()) noted.fetch(layout_, recv, items.row());
      if (!make_own(recv, first_column, num_columns, answer, out, item)) continue;
      if constexpr (!View::kHasNetwork) {  // there nothing is
        if (is_tagged) {
          if (!add_tagged(recv, first_column, num_columns, out, item)) return false;
          continue;
        }
      }
      __syncwarp();  // the last plan has been used
      share_lanes<View::kIsUsual>(num_columns, [&](uint32_t c) {
        if (c != lane) answer = recv.answers[first_column + c];
        const uint32_t upper = answer >> 16, lower = answer & 0xffff;  // op.h says of what
        if (is_pull_) {
          plan_->rows[c] = op_.peer(upper) + layout_.outbox(op_.bank(), rank_.self_rank, lower);
        } else {
          const uint32_t column = packs_rows_ ? upper : is_source_ ? lower : c;
          plan_->rows[c] = op_.self() + layout_.outcome(op_.bank(), first_column + column);
        }
        plan_->weights[c] = is_source_ ? recv.topk_weights[first_column + lower] : 1.0f;
      });
      __syncwarp();
      rows_.add_up(*plan_, num_columns, item.first_part(), item.end_part(), out);
    }
    return true;
  }

 private:
  // Signals to the sources whose rows are tagged, or to those whose rows are not. Over a network
  // they wait for nothing, either: rows that arrive are counted.
  __device__ void publish(bool to_tagged) const {
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < received_.num_ranks; r += blockDim.x) {
      const bool is_tagged = received_.is_tagged(r) || !op_.reaches(r);
      if (r == skip_rank_ || is_tagged != to_tagged) continue;
      if (!is_tagged) op_.fence();
      op_.publish_signal(r, received_.count(r));
    }
  }

  // The i-th message to be answered: the next rank's first, and so on round to this rank's own, for
  // which nobody else waits. So ranks do not all begin with the same peer.
  __device__ uint32_t behind_own(uint32_t i) const {
    const uint32_t size = received_.prefix[received_.num_ranks];
    const uint32_t m = i + received_.prefix[rank_.self_rank + 1];
    return m < size ? m : m - size;
  }

  // What all warps have made of message `m`, where its source is behind a network. Whole block.
  __device__ void put_rows(uint32_t m, uint32_t src_rank, uint32_t slot) const {
    if (op_.reaches(src_rank)) return;
    __syncthreads();
    if (threadIdx.x / kWarp != m % kWarps) return;
    const HandleMessage message = send_.handle.messages[m];
    rank_.put(layout_.outcome(op_.bank(), message.outcome_slot),
              rank_.network.staged_outcome(op_.bank(), src_rank, slot, 0),
              rank_.network.outcome_bytes(packs_rows_ ? message.num_entries : 1),
              rank_.network.arrivals(op_.bank(), Phase::kCombine, rank_.self_rank), src_rank);
  }

  // A message to be answered, and the lane's entry of it: beside the message, not after it, as
  // entries of message m begin at m * K.
  struct Answered {
    HandleMessage message;
    HandleEntry entry;
  };
  __device__ Answered fetch(uint32_t m) const {
    const uint32_t top_k = layout_.config().top_k, lane = threadIdx.x % kWarp;
    Answered answered = {send_.handle.messages[m], {}};
    if (lane < top_k) answered.entry = send_.handle.entries[uint64_t{m} * top_k + lane];
    return answered;
  }

  // The partial row of message `m` to where its source looks for it, or to `out`. One warp.
  template <bool kIsTagged, typename AnyItems>
  __device__ void make_partial(const Answered& answered, uint32_t m, uint32_t src_rank,
                               uint32_t slot, std::byte* out, const AnyItems& items) const {
    const uint32_t top_k = layout_.config().top_k;
    const HandleMessage message = answered.message;
    __syncwarp();  // the last plan has been used
    share_lanes<View::kIsUsual>(top_k, [&](uint32_t j) {
      const HandleEntry entry =
          j < kWarp ? answered.entry : send_.handle.entries[uint64_t{m} * top_k + j];
      plan_->rows[j] = const_cast<std::byte*>(send_.expert_out) + entry.row * layout_.row_bytes();
      plan_->weights[j] = entry.weight;
    });
    __syncwarp();
    if (is_source_) {
#pragma unroll 1
      for (uint32_t j = 0; j < message.num_entries; ++j) {
        const uint32_t column = packs_rows_ ? j : __float_as_uint(plan_->weights[j]);  // its k
        rows_.send_row(plan_->rows[j], items.first_part(), items.end_part(),
                       sink_at<kIsTagged>(src_rank, slot, message.outcome_slot + column, j));
      }
      return;
    }
    const Sink sink = out != nullptr ? Sink{out, false, 0}
                                     : sink_at<kIsTagged>(src_rank, slot, message.outcome_slot, 0);
    rows_.send_sum(*plan_, message.num_entries, items.first_part(), items.end_part(), sink);
  }

  // Where `src_rank` looks for the row of an outcome slot, that of its message `slot`, or of an
  // entry of that.
  template <bool kIsTagged>
  __device__ Sink sink_at(uint32_t src_rank, uint32_t slot, uint32_t outcome_slot,
                          uint32_t entry) const {
    if (kIsTagged || (!View::kHasNetwork && received_.is_tagged(src_rank))) {
      return {op_.peer(src_rank) + layout_.tagged_outcome(op_.bank(), outcome_slot), true,
              op_.tag()};
    }
    if constexpr (View::kHasNetwork) {
      if (!op_.reaches(src_rank)) {
        const uint64_t staged =
            rank_.network.staged_outcome(op_.bank(), src_rank, slot, packs_rows_ ? entry : 0);
        return {op_.self() + staged, false, 0};
      }
    }
    if (is_pull_) return {op_.self() + layout_.outbox(op_.bank(), src_rank, slot), false, 0};
    return {op_.peer(src_rank) + layout_.outcome(op_.bank(), outcome_slot), false, 0};
  }

  // Where this kernel makes the token's own partial row: that, beside the peers' rows, or, where
  // rows travel as they are, as the result if there are no others. False: nothing is left to add.
  // One warp; `answer`: of the lane's column.
  __device__ bool make_own(const CombineRecvParams& recv, uint32_t first_column,
                           uint32_t num_columns, uint32_t answer, std::byte* out,
                           const Items& items) const {
    if (View::kHasNetwork || View::kBatch == Batch::kTagged || skip_rank_ == kNoRank) return true;
    const uint32_t lane = threadIdx.x % kWarp;
    uint32_t own = 0;  // slot + 1
    share_lanes<View::kIsUsual>(num_columns, [&](uint32_t c) {
      if (c != lane) answer = recv.answers[first_column + c];
      if (answer >> 16 == skip_rank_) own = (answer & 0xffff) + 1;
    });
    own = __reduce_max_sync(kAllLanes, own);
    if (own == 0) return true;
    const bool is_only = Rows::kLonePartialIsResult && num_columns == 1;
    // Lanes of this warp read it back.
    const uint32_t m = received_.prefix[skip_rank_] + own - 1;
    make_partial<false>(fetch(m), m, skip_rank_, own - 1, is_only ? out : nullptr, items);
    return !is_only;
  }

  __device__ bool add_tagged(const CombineRecvParams& recv, uint32_t first_column,
                             uint32_t num_columns, std::byte* out, const Items& items) const {
    constexpr uint32_t kBatch = Rows::kTaggedBatch;
    using Coming = typename Rows::Coming;
    const uint64_t row_bytes = layout_.tagged_outcome_stride();
    const uint32_t num_vectors = rows_.num_vectors();
    std::byte* rows = op_.self() + layout_.tagged_outcome(op_.bank(), first_column);
    const uint32_t* answers = recv.answers + first_column;
    // All rows lie by their k, partial rows side by side.
    auto column_of = [&](uint32_t c) { return is_source_ ? answers[c] & 0xffff : c; };
#pragma unroll 1
    for (uint32_t part = items.first_part(); part < items.end_part(); ++part) {
      typename Rows::PartSum sum(num_columns);
#pragma unroll 1
      for (uint32_t first = 0; first < num_columns; first += kBatch) {
        Coming batch[kBatch];
        auto ask = [&] {
#pragma unroll
          for (uint32_t i = 0; i < kBatch; ++i) {
            const bool is_coming = first + i < num_columns;
            const uint32_t column = is_coming ? column_of(first + i) : 0;
            batch[i].begin(rows + column * row_bytes, is_coming ? num_vectors : 0, part, op_.tag());
          }
        };
        auto are_here = [&] {
          bool all = true;
#pragma unroll
          for (uint32_t i = 0; i < kBatch; ++i) all &= batch[i].is_here(op_.tag());
          return all;
        };
        auto wait = [&] {
          bool ok = true;
#pragma unroll 1
          for (uint32_t c = first; c < min(first + kBatch, num_columns) && ok; ++c) {
            ok = Coming::wait(rank_, op_.receiving(), answers[c] >> 16,
                              rows + column_of(c) * row_bytes, num_vectors, part);
          }
          return ok;
        };
        if (!poll_tagged(false, ask, are_here, wait)) return false;
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (first + i < num_columns) {
            if constexpr (Coming::kMakesBlanks) {
              Coming::clear(rows + column_of(first + i) * row_bytes, num_vectors, part);
            }
            const float weight =
                is_source_ ? recv.topk_weights[first_column + column_of(first + i)] : 1.0f;
            sum.add(batch[i].part(), weight);
          }
        }
      }
      sum.store(out, num_vectors, part);
    }
    return true;
  }

  const View& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const CombineSendParams& send_;
  const Sources& received_;
  uint32_t skip_rank_;
  SumPlan* plan_;
  bool is_source_;
  bool is_pull_;  // all rows, and tagged ones, are pushed in any case
  bool packs_rows_;
  Rows rows_;
  uint32_t num_parts_;
};

}  // namespace ep::cuda
