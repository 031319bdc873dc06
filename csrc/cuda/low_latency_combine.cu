// Combine on a GPU; the meaning is in csrc/cpu/low_latency_combine.cpp. Every product and every sum
// is rounded on its own, in the same order as there: the bits are the same.
//
// One kernel, three forms: it sends, it receives, or it does both. A warp makes some parts of a
// partial row, or of a token's row. Where it does both, a warp makes this rank's partial row of its
// own token when it adds up the token, and nobody waits for it.

#include "cuda/launch.cuh"
#include "cuda/travelling_rows.cuh"

namespace ep::cuda {
namespace {

using protocol::HandleEntry;
using protocol::HandleMessage;
using protocol::Reduction;
using protocol::Transfer;

// `Rows`: PlainRows or Float8Rows.
template <typename Rows>
class Combiner {
 public:
  // `skip_rank`: whose partial rows are not sent, because this kernel receives them itself.
  __device__ Combiner(const RankView& rank, const Op& op, const CombineSendParams& send,
                      const Sources& received, uint32_t skip_rank, SumPlan* plan)
      : rank_(rank),
        layout_(rank.layout),
        op_(op),
        send_(send),
        received_(received),
        skip_rank_(skip_rank),
        plan_(plan),
        is_source_(layout_.config().reduction == Reduction::kSource),
        is_pull_(layout_.config().transfer == Transfer::kPull && !is_source_),
        rows_(layout_),
        num_parts_(protocol::parts_for(layout_.combine_row_bytes())) {}

  // A partial row for every message. Whole block.
  __device__ void send() const {
    const uint32_t num_ranks = received_.num_ranks;
    bool all_tagged = true;
#pragma unroll 1
    for (uint32_t r = 0; r < num_ranks; ++r) {
      all_tagged &= r == skip_rank_ || received_.is_tagged(r);
    }
    if (Op::is_clerk()) publish(true);  // tagged rows do not wait for a signal
    const OtherMessages messages(received_, skip_rank_);
    for (Items items(messages.size, num_parts_); items.more(); items.next()) {
      const uint32_t m = messages[items.row()];
      const uint32_t src_rank = source_of(received_.prefix, num_ranks, m);
      make_partial(m, src_rank, m - received_.prefix[src_rank], nullptr, items);
    }
    if (!all_tagged && op_.is_last_block()) publish(false);
  }

  // Adds up the partial rows of every token of this rank. False, on all lanes of a warp: it gave
  // up.
  __device__ bool receive(const CombineRecvParams& recv) const {
    const bool is_tagged = recv.num_tokens <= layout_.config().num_max_tagged_tokens;
    for (Items items(recv.num_tokens, num_parts_); items.more(); items.next()) {
      const uint32_t token = items.row(), lane = threadIdx.x % kWarp;
      const uint32_t first_column = token * layout_.num_outcome_columns();
      std::byte* out = recv.out + token * layout_.row_bytes();
      // Together, whether they are used or not.
      const uint32_t num_columns = recv.num_partials[token];
      uint32_t answer = 0;
      if (lane < layout_.num_outcome_columns()) answer = recv.answers[first_column + lane];
      if (!make_own(recv, first_column, num_columns, answer, out, items)) continue;
      if (is_tagged) {
        if (!add_tagged(recv, first_column, num_columns, out, items)) return false;
        continue;
      }
      __syncwarp();  // the last plan has been used
      for (uint32_t c = lane; c < num_columns; c += kWarp) {
        if (c != lane) answer = recv.answers[first_column + c];
        const uint32_t src_rank = answer >> 16, slot = answer & 0xffff;
        const uint32_t self = rank_.self_rank;
        if (is_pull_) {
          plan_->rows[c] = op_.peer(src_rank) + layout_.outbox(op_.bank(), self, slot);
        } else {
          const uint32_t column = is_source_ ? slot : c;  // its k
          plan_->rows[c] = op_.self() + layout_.outcome(op_.bank(), first_column + column);
        }
        plan_->weights[c] = is_source_ ? recv.topk_weights[first_column + slot] : 1.0f;
      }
      __syncwarp();
      rows_.add_up(*plan_, num_columns, items.first_part(), items.end_part(), out);
    }
    return true;
  }

 private:
  // Signals to the sources whose rows are tagged, or to those whose rows are not.
  __device__ void publish(bool to_tagged) const {
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < received_.num_ranks; r += blockDim.x) {
      const bool is_tagged = received_.is_tagged(r);
      if (r == skip_rank_ || is_tagged != to_tagged) continue;
      if (!is_tagged) ptx::fence_acq_rel_sys();
      op_.publish_signal(r, received_.count(r));
    }
  }

  // The partial row of message `m` to where its source looks for it, or to `out`. One warp.
  __device__ void make_partial(uint32_t m, uint32_t src_rank, uint32_t slot, std::byte* out,
                               const Items& items) const {
    const uint32_t lane = threadIdx.x % kWarp, top_k = layout_.config().top_k;
    const HandleMessage message = send_.handle.messages[m];
    __syncwarp();  // the last plan has been used
    for (uint32_t j = lane; j < top_k; j += kWarp) {
      // Beside the message, not after it: entries of message m begin at m * K.
      const HandleEntry entry = send_.handle.entries[uint64_t{m} * top_k + j];
      plan_->rows[j] = const_cast<std::byte*>(send_.expert_out) + entry.row * layout_.row_bytes();
      plan_->weights[j] = entry.weight;
    }
    __syncwarp();
    if (is_source_) {
#pragma unroll 1
      for (uint32_t j = 0; j < message.num_entries; ++j) {
        const uint32_t k = __float_as_uint(plan_->weights[j]);
        rows_.send_row(plan_->rows[j], items.first_part(), items.end_part(),
                       sink_at(src_rank, slot, message.outcome_slot + k));
      }
      return;
    }
    const Sink sink =
        out != nullptr ? Sink{out, false, 0} : sink_at(src_rank, slot, message.outcome_slot);
    rows_.send_sum(*plan_, message.num_entries, items.first_part(), items.end_part(), sink);
  }

  // Where `src_rank` looks for the row of an outcome slot, that of its message `slot`.
  __device__ Sink sink_at(uint32_t src_rank, uint32_t slot, uint32_t outcome_slot) const {
    if (received_.is_tagged(src_rank)) {
      return {op_.peer(src_rank) + layout_.tagged_outcome(op_.bank(), outcome_slot), true,
              op_.tag()};
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
    if (skip_rank_ == kNoRank) return true;
    const uint32_t lane = threadIdx.x % kWarp;
    uint32_t own = 0;  // slot + 1
    for (uint32_t c = lane; c < num_columns; c += kWarp) {
      if (c != lane) answer = recv.answers[first_column + c];
      if (answer >> 16 == skip_rank_) own = (answer & 0xffff) + 1;
    }
    own = __reduce_max_sync(kAllLanes, own);
    if (own == 0) return true;
    const bool is_only = Rows::kLonePartialIsResult && num_columns == 1;
    // Lanes of this warp read it back.
    make_partial(received_.prefix[skip_rank_] + own - 1, skip_rank_, own - 1,
                 is_only ? out : nullptr, items);
    return !is_only;
  }

  __device__ bool add_tagged(const CombineRecvParams& recv, uint32_t first_column,
                             uint32_t num_columns, std::byte* out, const Items& items) const {
    constexpr uint32_t kBatch = Rows::kTaggedBatch;
    const uint64_t row_bytes = protocol::tagged_row_bytes(layout_.combine_row_bytes());
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
        TaggedPart batch[kBatch];
        while (true) {
          bool is_here = true;
#pragma unroll
          for (uint32_t i = 0; i < kBatch; ++i) {
            const bool is_coming = first + i < num_columns;
            const uint32_t column = is_coming ? column_of(first + i) : 0;
            batch[i].begin(rows + column * row_bytes, is_coming ? num_vectors : 0, part, op_.tag());
          }
#pragma unroll
          for (uint32_t i = 0; i < kBatch; ++i) is_here &= batch[i].is_here(op_.tag());
          if (__all_sync(kAllLanes, is_here)) break;
          bool ok = true;
#pragma unroll 1
          for (uint32_t c = first; c < min(first + kBatch, num_columns) && ok; ++c) {
            ok = wait_for_part(rank_, op_.receiving(), answers[c] >> 16,
                               rows + column_of(c) * row_bytes, num_vectors, part);
          }
          if (!__all_sync(kAllLanes, ok)) return false;
        }
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (first + i < num_columns) {
            const float weight =
                is_source_ ? recv.topk_weights[first_column + column_of(first + i)] : 1.0f;
            sum.add(batch[i].part(), weight, first + i == 0);
          }
        }
      }
      sum.store(out, num_vectors, part);
    }
    return true;
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const CombineSendParams& send_;
  const Sources& received_;
  uint32_t skip_rank_;
  SumPlan* plan_;
  bool is_source_;
  bool is_pull_;  // all rows, and tagged ones, are pushed in any case
  Rows rows_;
  uint32_t num_parts_;
};

template <typename Rows, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    combine_kernel(const __grid_constant__ RankView rank,
                   const __grid_constant__ CombineSendParams send,
                   const __grid_constant__ CombineRecvParams recv) {
  extern __shared__ uint32_t shared[];
  __shared__ SumPlan plans[kWarps];
  const uint32_t num_ranks = rank.layout.config().num_ranks;
  const auto& config = rank.layout.config();
  // Tagged partial rows to oneself go the way of all others: other warps make them, at the same
  // time. So do all rows.
  const bool sends_to_self = config.reduction == Reduction::kSource ||
                             (num_ranks > 1 && recv.num_tokens <= config.num_max_tagged_tokens);
  const uint32_t skip_rank = kSends && kReceives && !sends_to_self ? rank.self_rank : kNoRank;
  const Sources received(shared, num_ranks);
  ptx::touch(rank);
  if (kSends) ptx::touch(send);
  if (kReceives) ptx::touch(recv);
  const Op op(rank, Phase::kCombine, kSends, kReceives, [&] {
    if (kSends) received.read(send.handle.num_messages);
  });
  const Combiner<Rows> combiner(rank, op, send, received, skip_rank, &plans[threadIdx.x / kWarp]);
  if (kSends) {
    received.count_up();
    if (!op.start_send(true)) return;
    combiner.send();
  }
  bool ok = true;
  if (kReceives) {
    ok = op.start_recv(skip_rank, nullptr, [] { return 0u; });
    if (!__syncthreads_and(ok)) return;
    ok = combiner.receive(recv);
  }
  op.complete(ok);
}

uint64_t shared_bytes(const LowLatencyLayout& layout) {
  return uint64_t{Sources::num_words(layout.config().num_ranks)} * sizeof(uint32_t);
}

template <typename Rows>
void prepare_forms() {
  Launch::prepare(combine_kernel<Rows, true, false>);
  Launch::prepare(combine_kernel<Rows, false, true>);
  Launch::prepare(combine_kernel<Rows, true, true>);
}

}  // namespace

void prepare_combine() {
  prepare_forms<PlainRows<__nv_bfloat16>>();
  prepare_forms<PlainRows<float>>();
  prepare_forms<Float8Rows<__nv_bfloat16>>();
  prepare_forms<Float8Rows<float>>();
}

void launch_combine_send(const RankView& rank, const CombineSendParams& send,
                         const Launch& launch) {
  with_travelling_rows(rank.layout, [&](auto rows) {
    launch.run(combine_kernel<typename decltype(rows)::type, true, false>,
               shared_bytes(rank.layout), rank, send, CombineRecvParams{});
  });
}

void launch_combine_recv(const RankView& rank, const CombineRecvParams& recv,
                         const Launch& launch) {
  with_travelling_rows(rank.layout, [&](auto rows) {
    launch.run(combine_kernel<typename decltype(rows)::type, false, true>, 0, rank,
               CombineSendParams{}, recv);
  });
}

void launch_combine(const RankView& rank, const CombineSendParams& send,
                    const CombineRecvParams& recv, const Launch& launch) {
  with_travelling_rows(rank.layout, [&](auto rows) {
    launch.run(combine_kernel<typename decltype(rows)::type, true, true>, shared_bytes(rank.layout),
               rank, send, recv);
  });
}

}  // namespace ep::cuda
