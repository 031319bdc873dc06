// Dispatch into a workspace, whichever way its rows are arranged: rows and scales go straight to
// where the receiver's experts read them. Nothing is left to unpack: the hook waits, and counts.
//
// One kernel, three forms, as in low_latency_dispatch.cu. A warp moves some parts of a token's row
// to all its places. Signals go ahead, and each block says for itself when its rows are there: a
// word between blocks first would be waited for, too. One block waits for the peers. What a
// `Format` is, workspace_rank_major.cuh shows.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/part.cuh"
#include "cuda/routing.cuh"

namespace ep::cuda {

using protocol::DispatchRecvParams;
using protocol::DispatchSendParams;

// What a sending block knows. `words`: its own part of shared memory, Sender::num_words().
template <typename Rows>
struct WorkspaceSend {
  const RankView& rank;
  const Op& op;
  const Routing& routing;
  const TokenSets& sets;
  const Rows& rows;
  const DispatchSendParams& params;
  uint32_t* words;
};

// Whether every peer is done with what the last dispatch has put into its workspace.
class WorkspaceCredits {
 public:
  __device__ WorkspaceCredits(const RankView& rank, int32_t workspace)
      : rank_(rank), workspace_(static_cast<uint32_t>(workspace)) {}

  // While the epochs are on their way.
  __device__ void fetch() {
    if (threadIdx.x >= num_ranks()) return;
    last_epoch_ =
        protocol::signal_epoch(ptx::ld_relaxed_gpu(rank_.workspace_dispatches + workspace_));
    credit_ = ptx::ld_relaxed_sys(word(threadIdx.x));
  }
  // Gives this rank's own credit, which a combine has given already if there was one: earlier
  // kernels were the last to read. Then waits for the peers'. False on threads that gave up.
  __device__ bool exchange(const Op& op) const {
    const OpId id = {Phase::kDispatch, Half::kSend, op.epoch()};
    bool ok = true;
#pragma unroll 1
    for (uint32_t r = threadIdx.x; r < num_ranks() && ok; r += blockDim.x) {
      if (r == rank_.self_rank) continue;
      if (blockIdx.x == 0) op.publish_workspace_credit(r, workspace_, last_epoch_);
      if (r == threadIdx.x && credit_ >= last_epoch_) continue;
      ok = wait_for_word(rank_, id, r, word(r), last_epoch_, 0, blockIdx.x == 0) >= last_epoch_;
    }
    return ok;
  }

 private:
  __device__ uint32_t num_ranks() const { return rank_.layout.config().num_ranks; }
  __device__ const uint64_t* word(uint32_t r) const {
    return at<uint64_t>(rank_.self_base, rank_.layout.workspace_credit(workspace_, r));
  }

  const RankView& rank_;
  uint32_t workspace_;
  uint64_t last_epoch_ = 0, credit_ = 0;
};

// Whether a signal tells of as many slots as this exchange has, see Op::take_signal: a source that
// was told of others has written elsewhere.
struct HasSlots {
  const Op& op;
  uint32_t num_slots;
  bool is_tagged;

  __device__ bool operator()(uint32_t r, uint32_t source) const {
    return (protocol::signal_is_tagged(source) == is_tagged &&
            protocol::signal_count(source) <= num_slots) ||
           op.corrupt(r, num_slots, source);
  }
};

// Of an untagged receiver, whether its wait for signals is counted: not in a hook, where others
// wait for arrivals meanwhile, and are.
__device__ inline bool counts_signals(uint32_t skip_rank) { return skip_rank != kNoRank; }

enum class Coming { kHere, kNever, kGivenUp };
// Until what has been asked for of a tagged message is here, or it is known that there is no such
// message. `ask`, `are_here`, `wait`: see poll_tagged. One warp.
template <typename Ask, typename AreHere, typename Wait>
__device__ Coming poll_message(const RankView& rank, const Op& op, const PeerSlots::Slot& from,
                               Ask ask, AreHere are_here, Wait wait) {
  const auto* word =
      at<uint64_t>(op.self(), rank.layout.signal(op.bank(), Phase::kDispatch, from.rank));
  uint64_t signal = 0;
  const auto is_none = [&] {
    return protocol::signal_epoch(signal) == op.epoch() &&
           protocol::signal_count(signal) <= from.slot;
  };
  const bool ok = poll_tagged(
      true,
      [&] {
        ask();
        signal = ptx::ld_relaxed_sys(word);
      },
      [&] { return are_here() || is_none(); },
      [&] {
        uint32_t source;
        return op.take_signal(word, from.rank, false, &source) &&
               (protocol::signal_count(source) <= from.slot || wait());
      });
  if (!ok) return Coming::kGivenUp;
  return __all_sync(kAllLanes, are_here()) ? Coming::kHere : Coming::kNever;
}

template <typename Format, typename Rows, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    workspace_dispatch_kernel(const __grid_constant__ RankView rank,
                              const __grid_constant__ Rows rows,
                              const __grid_constant__ DispatchSendParams send,
                              const __grid_constant__ DispatchRecvParams recv) {
  using Sender = typename Format::template Sender<Rows>;
  using Receiver = typename Format::Receiver;
  extern __shared__ uint32_t shared[];
  __shared__ typename Format::Places places[kWarps];
  const auto& config = rank.layout.config();
  const uint32_t num_ranks = config.num_ranks;
  const bool is_alone = num_ranks == 1;
  const Routing routing(rank, send);
  TokenSets sets(shared, routing, Format::kByExpert);
  uint32_t* behind_sets =
      shared + (kSends ? TokenSets::num_bytes(config, send.num_tokens, Format::kByExpert) / 4 : 0);
  const Items items(kSends ? send.num_tokens : 0, Format::num_parts(rank.layout));
  typename Rows::Fetched fetched;
  int64_t first_expert = -1;
  WorkspaceCredits credits(rank, send.workspace);
  if (kSends) sets.clear();
  ptx::touch(rank);
  if (kSends) ptx::touch(send);
  if (kReceives) ptx::touch(recv);
  const Op op(rank, Phase::kDispatch, kSends, kReceives, [&] {
    if (!kSends) return;
    first_expert = TokenSets::first_expert(routing);
    if (items.more()) fetched = rows.fetch(items.row(), items.first_part());
    if (!is_alone && !Format::kTagged) credits.fetch();
  });
  if (kSends) {
    bool ok = sets.fill(rank, routing, first_expert);
    ok = op.start_send(ok, [&] { return is_alone || Format::kTagged || credits.exchange(op); });
    if (!ok) return;
  }
  const Sender sender({rank, op, routing, sets, rows, send, behind_sets},
                      &places[threadIdx.x / kWarp], kReceives && (is_alone || Format::kTagged));
  Receiver receiver(rank, recv, behind_sets + (kSends ? Sender::num_words(config) : 0));
  const bool takes_own = kSends && kReceives && !Format::kSendsToSelf;
  const uint32_t skip_rank = takes_own ? rank.self_rank : kNoRank;
  // For what comes after this dispatch; one thread.
  const auto note = [&] {
    rank.workspace_dispatches[send.workspace] = protocol::pack_signal(op.epoch(), send.num_slots);
  };
  if constexpr (Format::kTagged) {
    bool ok = true;
    if (kSends) {
      if (Op::is_clerk()) {
        for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
          if (r != skip_rank) op.publish_signal(r, sets.tokens_of_rank(r) | protocol::kTaggedBit);
        }
        op.publish_arrivals<true>();
        if (threadIdx.x == 0) note();
      }
      ok = sender.run(items, fetched);
    }
    if (kReceives) ok = receiver.run(op, skip_rank, sets, items.size()) && ok;
    op.complete(ok);
  } else {
    if (kSends) {
      const auto first = sender.begin(items, fetched);
      if (Op::is_clerk()) {
        for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
          if (r != skip_rank) op.publish_signal(r, sets.tokens_of_rank(r));
        }
        if (is_alone && threadIdx.x == 0) note();
      }
      if (!sender.agree()) return;
      sender.run(items, fetched, first);
      if (!is_alone) {
        __syncthreads();
        // All blocks have read the last note.
        if (threadIdx.x == kWarp && op.is_last_to_come()) note();
        op.publish_arrivals<false>();
      }
    }
    bool ok = true;
    if (kReceives && (is_alone ? blockIdx.x == 0 : Op::is_clerk())) {
      // What signals say is written down while rows are on their way; in a hook both are there.
      const bool is_all_here = kSends || op.wait_for_arrivals();
      ok = receiver.run(op, skip_rank, sets, 0) && is_all_here;
      if (kSends) ok = ok && op.wait_for_arrivals();
    }
    op.complete(ok, !kSends);
  }
}

// --- on the host -----------------------------------------------------------------------------

template <typename Format>
uint64_t workspace_send_bytes(const LowLatencyLayout& layout, uint32_t num_tokens) {
  using Sender = typename Format::template Sender<CopyRow>;
  return TokenSets::num_bytes(layout.config(), num_tokens, Format::kByExpert) +
         uint64_t{Sender::num_words(layout.config())} * sizeof(uint32_t);
}

template <typename Format>
uint64_t workspace_recv_bytes(const LowLatencyLayout& layout) {
  return uint64_t{Format::Receiver::num_words(layout.config())} * sizeof(uint32_t);
}

template <typename Format, typename Rows>
void prepare_workspace_sends() {
  Launch::prepare(workspace_dispatch_kernel<Format, Rows, true, false>);
  Launch::prepare(workspace_dispatch_kernel<Format, Rows, true, true>);
}

template <typename Format>
constexpr WorkspaceDispatch make_workspace_dispatch() {
  return {
      [] {
        prepare_workspace_sends<Format, CopyRow>();
        prepare_workspace_sends<Format, QuantizeRow<__nv_bfloat16>>();
        prepare_workspace_sends<Format, QuantizeRow<float>>();
        Launch::prepare(workspace_dispatch_kernel<Format, CopyRow, false, true>);
      },
      [](const LowLatencyLayout& layout, uint32_t num_tokens) {
        return workspace_send_bytes<Format>(layout, num_tokens) +
               workspace_recv_bytes<Format>(layout);
      },
      [](const RankView& rank, const DispatchSendParams& send, const Launch& launch) {
        with_rows(rank.layout, send, [&](auto rows) {
          launch.run(workspace_dispatch_kernel<Format, decltype(rows), true, false>,
                     workspace_send_bytes<Format>(rank.layout, send.num_tokens), rank, rows, send,
                     DispatchRecvParams{});
        });
      },
      [](const RankView& rank, const DispatchRecvParams& recv, const Launch& launch) {
        launch.run(workspace_dispatch_kernel<Format, CopyRow, false, true>,
                   workspace_recv_bytes<Format>(rank.layout), rank, CopyRow{}, DispatchSendParams{},
                   recv);
      },
      [](const RankView& rank, const DispatchSendParams& send, const DispatchRecvParams& recv,
         const Launch& launch) {
        with_rows(rank.layout, send, [&](auto rows) {
          launch.run(workspace_dispatch_kernel<Format, decltype(rows), true, true>,
                     workspace_send_bytes<Format>(rank.layout, send.num_tokens) +
                         workspace_recv_bytes<Format>(rank.layout),
                     rank, rows, send, recv);
        });
      },
  };
}

}  // namespace ep::cuda
