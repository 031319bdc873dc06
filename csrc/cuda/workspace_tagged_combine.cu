// Combine of a tagged exchange from rank-major workspaces: each expert rank brings its rows to the
// sources. So a source waits for one way of a link, and not for a signal's and then for a request's
// and its answer's. (Of many rows the bytes take the time, which are as many either way, and a send
// that brings them takes longer than one that signals.)
//
// One kernel, three forms, as in low_latency_combine.cu. Nobody waits for a signal but one warp,
// for all: rows say themselves that they are there.

#include "cuda/combiner.cuh"
#include "cuda/launch.cuh"
#include "cuda/workspace_combine.cuh"

namespace ep::cuda {
namespace {

// The rows of this rank's combine input that answer peers.
class AnsweringRows {
 public:
  __device__ AnsweringRows(const RankView& rank, const CombineSendParams& send)
      : layout_(rank.layout),
        send_(send),
        self_rank_(rank.self_rank),
        slots_(rank),
        num_vectors_(static_cast<uint32_t>(layout_.row_bytes() / sizeof(uint4))) {}

  __device__ uint32_t size() const { return slots_.size(send_.num_slots); }

  // A part of row `i`, and how many messages its source has sent: whether there is such a row is
  // known only when both have come. One warp; while the epochs are on their way.
  struct Fetched {
    Part part;
    uint32_t num_messages;
  };
  __device__ Fetched fetch(uint32_t i, uint32_t part) const {
    const PeerSlots::Slot m = slots_[i];
    const uint32_t row = LowLatencyLayout::message_in_workspace(send_.num_slots, m.rank, m.slot);
    const RowView view = {const_cast<std::byte*>(send_.expert_out) + row * layout_.row_bytes(),
                          nullptr};
    return {load_part(view, {num_vectors_, 0}, part, ptx::ld_once),
            send_.handle.num_messages[m.rank]};
  }

  // `fetched`: the first part of the first item. One warp.
  __device__ void send(const Op& op, Items items, Fetched fetched) const {
    while (items.more()) {
      const PeerSlots::Slot m = slots_[items.row()];
      const bool is_there = m.slot < fetched.num_messages;
      std::byte* row = op.peer(m.rank) + layout_.answering_row(op.bank(), self_rank_, m.slot);
      const uint32_t i = items.row(), end_part = items.end_part();
      uint32_t part = items.first_part();
      items.next();
#pragma unroll 1
      for (; part < end_part; ++part) {
        const Part p = fetched.part;
        // The next part is on its way while this one leaves.
        const bool goes_on = part + 1 < end_part;
        if (goes_on || items.more()) {
          fetched = fetch(goes_on ? i : items.row(), goes_on ? part + 1 : items.first_part());
        }
        if (is_there) fill_blanks(p, row, num_vectors_, part);
      }
    }
  }

 private:
  const LowLatencyLayout& layout_;
  const CombineSendParams& send_;
  uint32_t self_rank_;
  PeerSlots slots_;
  uint32_t num_vectors_;
};

// Where the rows of a token are. In shared memory, one for each warp.
struct ComingRows {
  std::byte* rows[kMaxTopK];
  uint32_t ranks[kMaxTopK];  // this one's is not tagged
};

// `kIsUsual`: see usual.cuh.
template <typename T, bool kIsUsual>
class TokenSums {
 public:
  __device__ TokenSums(const RankView& rank, const Op& op, const CombineRecvParams& recv,
                       ComingRows* coming)
      : rank_(rank),
        layout_(rank.layout),
        op_(op),
        recv_(recv),
        coming_(coming),
        num_vectors_(static_cast<uint32_t>(layout_.row_bytes() / sizeof(uint4))) {}

  // `noted`: of the first item. False, on all lanes of a warp: it gave up.
  __device__ bool run(Items items, Noted noted) const {
    while (items.more()) {
      const uint32_t token = items.row(), end_part = items.end_part();
      const uint32_t num_rows = noted.num_columns;
      uint32_t part = items.first_part();
      find_rows(token, num_rows, noted.answer);
      items.next();
      if (items.more()) noted.fetch(layout_, recv_, items.row());
#pragma unroll 1
      for (; part < end_part; ++part) {
        if (!add_up(num_rows, part, recv_.out + token * layout_.row_bytes())) return false;
      }
    }
    return true;
  }

 private:
  // `answer`: of the lane's column.
  __device__ void find_rows(uint32_t token, uint32_t num_rows, uint32_t answer) const {
    __syncwarp();  // those of the last token have been used
    share_lanes<kIsUsual>(num_rows, [&](uint32_t c) {
      if (c >= kWarp) answer = recv_.answers[token * layout_.num_outcome_columns() + c];
      const uint32_t r = answer >> 16, slot = answer & 0xffff;
      const uint32_t own = LowLatencyLayout::message_in_workspace(recv_.num_slots, r, slot);
      coming_->ranks[c] = r;
      coming_->rows[c] =
          op_.self() + (r == rank_.self_rank
                            ? layout_.combine_input(static_cast<uint32_t>(recv_.workspace), own)
                            : layout_.answering_row(op_.bank(), r, slot));
    });
    __syncwarp();
  }

  __device__ bool add_up(uint32_t num_rows, uint32_t part, std::byte* out) const {
    constexpr uint32_t kBatch = PlainRows<T>::kTaggedBatch;
    typename PlainRows<T>::PartSum sum(num_rows);
#pragma unroll 1
    for (uint32_t first = 0; first < num_rows; first += kBatch) {
      FilledPart batch[kBatch];
      auto ask = [&] {
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          const bool is_coming = first + i < num_rows;
          std::byte* row = coming_->rows[is_coming ? first + i : 0];
          if (is_coming && coming_->ranks[first + i] == rank_.self_rank) {
            const RowView view = {row, nullptr};
            batch[i].take(load_part(view, {num_vectors_, 0}, part, ptx::ld_row));
          } else {
            batch[i].begin(row, is_coming ? num_vectors_ : 0, part, op_.tag());
          }
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
        for (uint32_t c = first; c < min(first + kBatch, num_rows) && ok; ++c) {
          const uint32_t r = coming_->ranks[c];
          ok = r == rank_.self_rank ||
               FilledPart::wait(rank_, op_.receiving(), r, coming_->rows[c], num_vectors_, part);
        }
        return ok;
      };
      if (!poll_tagged(false, ask, are_here, wait)) return false;
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (first + i >= num_rows) break;
        if (coming_->ranks[first + i] != rank_.self_rank) {
          FilledPart::clear(coming_->rows[first + i], num_vectors_, part);
        }
        sum.add(batch[i].part(), 1.0f, first + i == 0);
      }
    }
    sum.store(out, num_vectors_, part);
    return true;
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const CombineRecvParams& recv_;
  ComingRows* coming_;
  uint32_t num_vectors_;
};

template <typename T, bool kIsUsual, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    workspace_tagged_combine_kernel(const __grid_constant__ RankView rank,
                                    const __grid_constant__ CombineSendParams send,
                                    const __grid_constant__ CombineRecvParams recv) {
  __shared__ ComingRows coming[kWarps];
  const uint32_t num_parts = protocol::parts_for(rank.layout.row_bytes());
  const AnsweringRows answering(rank, send);
  const Items sent(kSends ? answering.size() : 0, num_parts);
  // Warps that have sent nothing begin.
  const Items received(kReceives ? recv.num_tokens : 0, num_parts, sent.size());
  WorkspacePublisher publisher(rank, send.workspace);
  AnsweringRows::Fetched fetched;
  Noted noted;
  ptx::touch(rank);
  if (kSends) ptx::touch(send);
  if (kReceives) ptx::touch(recv);
  const Op op(rank, Phase::kCombine, kSends, kReceives, [&] {
    if (sent.more()) fetched = answering.fetch(sent.row(), sent.first_part());
    if (received.more()) noted.fetch(rank.layout, recv, received.row());
    if (kSends && blockIdx.x == 0) publisher.fetch();
  });
  if (kSends) {
    if (!op.start_send(true)) return;
    if (blockIdx.x == 0) publisher.run(op);
    answering.send(op, sent, fetched);
  }
  bool ok = true;
  if (kReceives) {
    if (!op.may_receive()) return;
    const uint32_t warp = threadIdx.x / kWarp;
    if (Op::is_clerk_warp()) {
      ok = op.take_signals(
          rank.self_rank, nullptr, [] { return 0u; },
          [&](uint32_t r, uint32_t num_slots) {
            return num_slots == recv.num_slots || op.corrupt(r, recv.num_slots, num_slots);
          });
    }
    ok = TokenSums<T, kIsUsual>(rank, op, recv, &coming[warp]).run(received, noted) && ok;
  }
  op.complete(ok, false, true);
}

template <typename T, bool kIsUsual>
void prepare_receiving_forms() {
  Launch::prepare(workspace_tagged_combine_kernel<T, kIsUsual, false, true>);
  Launch::prepare(workspace_tagged_combine_kernel<T, kIsUsual, true, true>);
}

// Calls `launch` with the TypeOf rows, and whether the shape is usual, of a std::bool_constant.
template <typename Function>
void with_kind(const LowLatencyLayout& layout, Function&& launch) {
  with_type(layout, [&](auto value) {
    const TypeOf<decltype(value)> type;
    has_usual_shape(layout.config()) ? launch(type, std::true_type())
                                     : launch(type, std::false_type());
  });
}

void prepare() {
  Launch::prepare(workspace_tagged_combine_kernel<float, true, true, false>);
  prepare_receiving_forms<__nv_bfloat16, true>();
  prepare_receiving_forms<__nv_bfloat16, false>();
  prepare_receiving_forms<float, true>();
  prepare_receiving_forms<float, false>();
}

// Rows are copied, whatever they are.
void send(const RankView& rank, const CombineSendParams& send, const Launch& launch) {
  launch.run(workspace_tagged_combine_kernel<float, true, true, false>, 0, rank, send,
             CombineRecvParams{});
}

void receive(const RankView& rank, const CombineRecvParams& recv, const Launch& launch) {
  with_kind(rank.layout, [&](auto type, auto is_usual) {
    using T = typename decltype(type)::type;
    launch.run(workspace_tagged_combine_kernel<T, is_usual, false, true>, 0, rank,
               CombineSendParams{}, recv);
  });
}

void send_and_receive(const RankView& rank, const CombineSendParams& send,
                      const CombineRecvParams& recv, const Launch& launch) {
  with_kind(rank.layout, [&](auto type, auto is_usual) {
    using T = typename decltype(type)::type;
    launch.run(workspace_tagged_combine_kernel<T, is_usual, true, true>, 0, rank, send, recv);
  });
}

}  // namespace

const WorkspaceCombine kTaggedWorkspaceCombine = {prepare, send, receive, send_and_receive};

}  // namespace ep::cuda
