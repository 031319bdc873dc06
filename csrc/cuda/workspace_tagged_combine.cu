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

// The rows of this rank's combine input that answer peers. A warp brings pieces of them.
template <uint32_t kVectors>
class AnsweringRows {
 public:
  __device__ AnsweringRows(const RankView& rank, const CombineSendParams& send)
      : layout_(rank.layout),
        send_(send),
        self_rank_(rank.self_rank),
        slots_(rank),
        num_vectors_(static_cast<uint32_t>(layout_.row_bytes() / sizeof(uint4))) {}

  __device__ Items items(bool sends) const {
    return {sends ? slots_.size(send_.num_slots) : 0, Piece<kVectors>::count(layout_.row_bytes())};
  }

  // Which row answers whom.
  __device__ PeerSlots::Slot operator[](uint32_t i) const { return slots_[i]; }

  // A piece of a row, and how many messages its source has sent: whether there is such a row is
  // known only when both have come. One warp; while the epochs are on their way.
  struct Fetched {
    PeerSlots::Slot slot;
    Piece<kVectors> piece;
    uint32_t num_messages;
  };
  __device__ Fetched fetch(PeerSlots::Slot m, uint32_t piece) const {
    const uint32_t row = LowLatencyLayout::message_in_workspace(send_.num_slots, m.rank, m.slot);
    Fetched fetched = {m};
    fetched.piece.load(send_.expert_out + row * layout_.row_bytes(), num_vectors_, piece,
                       ptx::ld_once);
    fetched.num_messages = send_.handle.num_messages[m.rank];
    return fetched;
  }

  // `fetched`: the first piece of the first item. One warp.
  __device__ void send(const Op& op, Items items, Fetched fetched) const {
    while (items.more()) {
      const PeerSlots::Slot m = fetched.slot;
      const bool is_there = m.slot < fetched.num_messages;
      std::byte* row = op.peer(m.rank) + layout_.answering_row(op.bank(), self_rank_, m.slot);
      const uint32_t end_piece = items.end_part();
      uint32_t piece = items.first_part();
      items.next();
#pragma unroll 1
      for (; piece < end_piece; ++piece) {
        const Piece<kVectors> p = fetched.piece;
        // The next piece is on its way while this one leaves.
        const bool goes_on = piece + 1 < end_piece;
        if (goes_on || items.more()) {
          fetched =
              fetch(goes_on ? m : slots_[items.row()], goes_on ? piece + 1 : items.first_part());
        }
        if (is_there) p.fill(row, num_vectors_, piece);
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
  uint32_t ranks[kMaxTopK];
};

// `kIsUsual`: see usual.cuh.
template <typename Rows, bool kIsUsual>
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
      const uint32_t token = items.row(), end_piece = items.end_part();
      const uint32_t num_rows = noted.num_columns;
      uint32_t piece = items.first_part();
      const uint32_t own_column = find_rows(token, num_rows, noted.answer);
      items.next();
      if (items.more()) noted.fetch(layout_, recv_, items.row());
#pragma unroll 1
      for (; piece < end_piece; ++piece) {
        std::byte* out = recv_.out + token * layout_.row_bytes();
        if (!add_up(num_rows, own_column, piece, out)) return false;
      }
    }
    return true;
  }

 private:
  // `answer`: of the lane's column. Returns this rank's column, or one behind all.
  __device__ uint32_t find_rows(uint32_t token, uint32_t num_rows, uint32_t answer) const {
    uint32_t own_column = kMaxTopK;
    __syncwarp();  // those of the last token have been used
    share_lanes<kIsUsual>(num_rows, [&](uint32_t c) {
      if (c >= kWarp) answer = recv_.answers[token * layout_.num_outcome_columns() + c];
      const uint32_t r = answer >> 16, slot = answer & 0xffff;
      const uint32_t own = LowLatencyLayout::message_in_workspace(recv_.num_slots, r, slot);
      if (r == rank_.self_rank) own_column = c;
      coming_->ranks[c] = r;
      coming_->rows[c] =
          op_.self() + (r == rank_.self_rank
                            ? layout_.combine_input(static_cast<uint32_t>(recv_.workspace), own)
                            : layout_.answering_row(op_.bank(), r, slot));
    });
    __syncwarp();
    return __reduce_min_sync(kAllLanes, own_column);
  }

  __device__ bool add_up(uint32_t num_rows, uint32_t own_column, uint32_t piece,
                         std::byte* out) const {
    using Coming = typename Rows::Coming;
    constexpr uint32_t kBatch = Rows::kTaggedBatch;
    typename Rows::PartSum sum(num_rows);
#pragma unroll 1
    for (uint32_t first = 0; first < num_rows; first += kBatch) {
      Coming batch[kBatch];
      auto is_own = [&](uint32_t i) { return first + i == own_column; };
      // All loads alike: nothing is done with one before the others are on their way.
      auto ask = [&] {
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          const bool is_there = first + i < num_rows;
          const std::byte* row = coming_->rows[is_there ? first + i : 0];
          batch[i].begin(row, is_there ? num_vectors_ : 0, piece, op_.tag());
        }
      };
      auto are_here = [&] {
        bool all = true;
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) all &= is_own(i) || batch[i].is_here(op_.tag());
        return all;
      };
      auto wait = [&] {
        bool ok = true;
#pragma unroll 1
        for (uint32_t c = first; c < min(first + kBatch, num_rows) && ok; ++c) {
          ok = c == own_column || Coming::wait(rank_, op_.receiving(), coming_->ranks[c],
                                               coming_->rows[c], num_vectors_, piece);
        }
        return ok;
      };
      if (!poll_tagged(false, ask, are_here, wait)) return false;
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (first + i >= num_rows) break;
        if (!is_own(i)) Coming::clear(coming_->rows[first + i], num_vectors_, piece);
        sum.add(batch[i].part(!is_own(i)), 1.0f);
      }
    }
    sum.store(out, num_vectors_, piece);
    return true;
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const Op& op_;
  const CombineRecvParams& recv_;
  ComingRows* coming_;
  uint32_t num_vectors_;
};

// `Rows`: PlainRows.
template <typename Rows, bool kIsUsual, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    workspace_tagged_combine_kernel(const __grid_constant__ RankView rank,
                                    const __grid_constant__ CombineSendParams send,
                                    const __grid_constant__ CombineRecvParams recv) {
  __shared__ ComingRows coming[kWarps];
  const AnsweringRows<Rows::kPieceVectors> answering(rank, send);
  const Items sent = answering.items(kSends);
  // Warps that have sent nothing begin.
  const Items received(kReceives ? recv.num_tokens : 0, Rows::num_parts(rank.layout.row_bytes()),
                       sent.size());
  WorkspacePublisher publisher(rank, send.workspace);
  typename AnsweringRows<Rows::kPieceVectors>::Fetched fetched;
  Noted noted;
  ptx::touch(rank);
  if (kSends) ptx::touch(send);
  if (kReceives) ptx::touch(recv);
  const Op op(rank, Phase::kCombine, kSends, kReceives, [&] {
    if (sent.more()) fetched = answering.fetch(answering[sent.row()], sent.first_part());
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
    ok = TokenSums<Rows, kIsUsual>(rank, op, recv, &coming[warp]).run(received, noted) && ok;
  }
  op.complete(ok, false, true);
}

template <typename Rows, bool kIsUsual>
void prepare_receiving_forms() {
  Launch::prepare(workspace_tagged_combine_kernel<Rows, kIsUsual, false, true>);
  Launch::prepare(workspace_tagged_combine_kernel<Rows, kIsUsual, true, true>);
}

// Of a kernel that adds nothing up: rows are copied, whatever they are.
using AnyRows = PlainRows<float, 2>;

// Calls `launch` with the TypeOf rows, and whether the shape is usual, of a std::bool_constant. (No
// float8 rows come from workspaces.)
template <typename Function>
void with_kind(const LowLatencyLayout& layout, bool is_small, Function&& launch) {
  const bool is_usual = has_usual_shape(layout.config());
  with_travelling_rows(layout, is_small && is_usual, [&](auto rows) {
    using Rows = typename decltype(rows)::type;
    if constexpr (std::is_same_v<typename Rows::Coming, FilledPiece<1>>) {
      launch(rows, std::true_type());
    } else if constexpr (std::is_same_v<typename Rows::Coming, FilledPiece<2>>) {
      is_usual ? launch(rows, std::true_type()) : launch(rows, std::false_type());
    }
  });
}

void prepare() {
  Launch::prepare(workspace_tagged_combine_kernel<AnyRows, true, true, false>);
  prepare_receiving_forms<PlainRows<__nv_bfloat16, 1>, true>();
  prepare_receiving_forms<PlainRows<__nv_bfloat16, 2>, true>();
  prepare_receiving_forms<PlainRows<__nv_bfloat16, 2>, false>();
  prepare_receiving_forms<PlainRows<float, 2>, true>();
  prepare_receiving_forms<PlainRows<float, 2>, false>();
}

void send(const RankView& rank, const CombineSendParams& send, const Launch& launch) {
  launch.run(workspace_tagged_combine_kernel<AnyRows, true, true, false>, 0, rank, send,
             CombineRecvParams{});
}

void receive(const RankView& rank, const CombineRecvParams& recv, const Launch& launch) {
  with_kind(rank.layout, launch.is_small, [&](auto rows, auto is_usual) {
    using Rows = typename decltype(rows)::type;
    launch.run(workspace_tagged_combine_kernel<Rows, is_usual, false, true>, 0, rank,
               CombineSendParams{}, recv);
  });
}

void send_and_receive(const RankView& rank, const CombineSendParams& send,
                      const CombineRecvParams& recv, const Launch& launch) {
  with_kind(rank.layout, launch.is_small, [&](auto rows, auto is_usual) {
    using Rows = typename decltype(rows)::type;
    launch.run(workspace_tagged_combine_kernel<Rows, is_usual, true, true>, 0, rank, send, recv);
  });
}

}  // namespace

const WorkspaceCombine kTaggedWorkspaceCombine = {prepare, send, receive, send_and_receive};

}  // namespace ep::cuda
