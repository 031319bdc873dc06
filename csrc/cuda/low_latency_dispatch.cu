// Dispatch on a GPU; the meaning, and the worked example, are in csrc/cpu/low_latency_dispatch.cpp.
//
// One kernel, three forms: it sends, it receives, or it does both. Where it does both, this rank's
// messages to itself go from x to recv_x and nowhere else.

#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"
#include "cuda/launch.cuh"
#include "cuda/usual.cuh"

namespace ep::cuda {
namespace {

template <typename View, typename Rows, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    dispatch_kernel(const __grid_constant__ View rank, const __grid_constant__ Rows rows,
                    const __grid_constant__ DispatchSendParams send,
                    const __grid_constant__ DispatchRecvParams recv) {
  extern __shared__ uint32_t shared[];
  __shared__ SendPlan plans[kSends ? kWarps : 1];
  const auto& config = rank.layout.config();
  const uint32_t num_tokens = kSends ? send.num_tokens : 0;
  using Sender = DispatchSender<Rows, View>;
  const uint32_t skip_rank =
      kSends && kReceives && !sends_to_self(rank, num_tokens) ? rank.self_rank : kNoRank;

  const Routing routing(rank, send);
  TokenSets sets(shared, routing);
  const Items items = Sender::items(rank, num_tokens);
  typename Rows::Fetched fetched;
  int64_t first_expert = -1;
  if (kSends) sets.clear();
  ptx::touch(rank);
  if (kSends) ptx::touch(send);
  if (kReceives) ptx::touch(recv);
  const OpOf<View> op(rank, Phase::kDispatch, kSends, kReceives, [&] {
    if (!kSends) return;
    first_expert = TokenSets::first_expert(routing);
    if (items.more()) fetched = rows.fetch(items.row(), items.first_part());
  });
  const Sender sender(rank, op, routing, sets, rows, send, skip_rank);
  if (kSends) {
    const bool ok = sets.fill(rank, routing, first_expert);
    if (!op.start_send(ok)) return;
    if (!sender.is_alone()) sender.run(items, fetched, &plans[threadIdx.x / kWarp]);
  }
  bool ok = true;
  if (kReceives) {
    const uint32_t num_sets_words = kSends ? TokenSets::num_bytes(config, num_tokens) / 4 : 0;
    const Arrivals arrivals(shared + num_sets_words, config.num_ranks, rank.num_local_experts);
    const DispatchReceiver<View> receiver(rank, op, recv, arrivals);
    auto own_count = [&](uint32_t e) {
      return sets.tokens_of_expert(rank.owners.first_expert(rank.self_rank) + e);
    };
    ok = op.start_recv(skip_rank, arrivals.sources.words,
                       [&] { return sender.source_word(skip_rank); });
    if (receiver.is_by_expert()) {
      ok = ok && receiver.read_counts(skip_rank, own_count);
    }
    if (!__syncthreads_and(ok)) return;
    receiver.count_up();
    __syncthreads();
    uint32_t num_taken = items.size();
    if (skip_rank != kNoRank) {
      num_taken += receiver.take_own(sender, routing, sets, rows, num_taken);
    }
    if (View::kBatch != Batch::kAlone) ok = receiver.run(skip_rank, num_taken);
    ok &= receiver.write_counts(skip_rank, own_count);
  }
  op.complete(ok);
}

template <typename Rows>
void prepare_sending_forms(const protocol::LowLatencyConfig& config) {
  for_each_view<Rows, Batch::kTagged, Batch::kUntagged>(config, [](auto view) {
    Launch::prepare(dispatch_kernel<typename decltype(view)::type, Rows, true, false>);
  });
  for_each_view<Rows, Batch::kTagged, Batch::kUntagged, Batch::kAlone>(config, [](auto view) {
    Launch::prepare(dispatch_kernel<typename decltype(view)::type, Rows, true, true>);
  });
}

bool is_usual(const LowLatencyLayout& layout, OutputLayout output) {
  return has_usual_shape(layout.config()) && output == OutputLayout::kExpertMajor;
}

}  // namespace

void prepare_dispatch(const protocol::LowLatencyConfig& config) {
  prepare_sending_forms<CopyRow>(config);
  prepare_sending_forms<QuantizeRow<__nv_bfloat16>>(config);
  prepare_sending_forms<QuantizeRow<float>>(config);
  for_each_view<CopyRow, Batch::kAny>(config, [](auto view) {
    Launch::prepare(dispatch_kernel<typename decltype(view)::type, CopyRow, false, true>);
  });
}

uint64_t dispatch_shared_bytes(const LowLatencyLayout& layout, uint32_t self_rank,
                               uint32_t num_tokens) {
  return TokenSets::num_bytes(layout.config(), num_tokens) +
         Arrivals::num_bytes(layout.config().num_ranks,
                             layout.partition().num_local_experts(self_rank));
}

void launch_dispatch_send(const RankView& rank, const DispatchSendParams& send,
                          const Launch& launch) {
  const auto& config = rank.layout.config();
  with_rows(rank.layout, send, [&](auto rows) {
    using Rows = decltype(rows);
    with_view<Rows, false>(rank, has_usual_shape(config), send.num_tokens, [&](const auto& view) {
      launch.run(dispatch_kernel<std::decay_t<decltype(view)>, Rows, true, false>,
                 TokenSets::num_bytes(config, send.num_tokens), view, rows, send,
                 DispatchRecvParams{});
    });
  });
}

void launch_dispatch_recv(const RankView& rank, const DispatchRecvParams& recv,
                          const Launch& launch) {
  with_view<CopyRow>(rank, is_usual(rank.layout, recv.output), [&](const auto& view) {
    launch.run(dispatch_kernel<std::decay_t<decltype(view)>, CopyRow, false, true>,
               dispatch_shared_bytes(rank.layout, rank.self_rank, 0), view, CopyRow{},
               DispatchSendParams{}, recv);
  });
}

void launch_dispatch(const RankView& rank, const DispatchSendParams& send,
                     const DispatchRecvParams& recv, const Launch& launch) {
  const bool usual = is_usual(rank.layout, recv.output);
  with_rows(rank.layout, send, [&](auto rows) {
    using Rows = decltype(rows);
    with_view<Rows, true>(rank, usual, send.num_tokens, [&](const auto& view) {
      launch.run(dispatch_kernel<std::decay_t<decltype(view)>, Rows, true, true>,
                 dispatch_shared_bytes(rank.layout, rank.self_rank, send.num_tokens), view, rows,
                 send, recv);
    });
  });
}

}  // namespace ep::cuda
