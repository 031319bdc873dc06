// Combine on a GPU; the meaning is in csrc/cpu/low_latency_combine.cpp. Rows are added up in the
// same order as there, and rounded as often: the bits are the same.
//
// One kernel, three forms: it sends, it receives, or it does both. A warp makes some parts of a
// partial row, or of a token's row. Where it does both, a warp makes this rank's partial row of its
// own token when it adds up the token, and nobody waits for it.

#include "cuda/combiner.cuh"
#include "cuda/launch.cuh"
#include "cuda/usual.cuh"

namespace ep::cuda {
namespace {

template <typename View, typename Rows, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    combine_kernel(const __grid_constant__ View rank,
                   const __grid_constant__ CombineSendParams send,
                   const __grid_constant__ CombineRecvParams recv) {
  extern __shared__ uint32_t shared[];
  __shared__ SumPlan plans[kWarps];
  // All rows that are added up at home go the same way, too.
  const bool keeps_own = !is_source(rank) && !sends_to_self(rank, recv.num_tokens);
  const uint32_t skip_rank = kSends && kReceives && keeps_own ? rank.self_rank : kNoRank;
  const Sources received(shared, rank.layout.config().num_ranks);
  const Items items = Combiner<Rows, View>::items(rank, kReceives ? recv.num_tokens : 0);
  Noted noted;
  ptx::touch(rank);
  if (kSends) ptx::touch(send);
  if (kReceives) ptx::touch(recv);
  const OpOf<View> op(rank, Phase::kCombine, kSends, kReceives, [&] {
    if (items.more()) noted.fetch(rank.layout, recv, items.row());
    if (kSends) received.read(send.handle.num_messages);
  });
  const Combiner<Rows, View> combiner(rank, op, send, received, skip_rank,
                                      &plans[threadIdx.x / kWarp]);
  if (kSends) {
    received.count_up();
    if (!op.start_send(true)) return;
    if (View::kBatch != Batch::kAlone || View::kIsSource) combiner.send();
  }
  bool ok = true;
  if (kReceives) {
    if (View::kBatch == Batch::kTagged) {
      if (!op.may_receive()) return;
      if (op.is_clerk_warp()) ok = op.take_signals(skip_rank, nullptr, [] { return 0u; });
    } else {
      ok = op.start_recv(skip_rank, nullptr, [] { return 0u; });
      if (!__syncthreads_and(ok)) return;
    }
    ok = combiner.receive(recv, items, noted) && ok;
  }
  op.complete(ok, false, Rows::Coming::kMakesBlanks && is_batch_tagged(rank, recv.num_tokens));
}

uint64_t shared_bytes(const LowLatencyLayout& layout) {
  return uint64_t{Sources::num_words(layout.config().num_ranks)} * sizeof(uint32_t);
}

template <typename Rows>
void prepare_forms(const protocol::LowLatencyConfig& config) {
  for_each_view<Rows, Batch::kAny>(config, [](auto view) {
    Launch::prepare(combine_kernel<typename decltype(view)::type, Rows, true, false>);
  });
  for_each_view<Rows, Batch::kTagged, Batch::kUntagged>(config, [](auto view) {
    Launch::prepare(combine_kernel<typename decltype(view)::type, Rows, false, true>);
  });
  for_each_view<Rows, Batch::kTagged, Batch::kUntagged, Batch::kAlone>(config, [](auto view) {
    Launch::prepare(combine_kernel<typename decltype(view)::type, Rows, true, true>);
  });
}

}  // namespace

void prepare_combine(const protocol::LowLatencyConfig& config) {
  prepare_forms<PlainRows<__nv_bfloat16, 1>>(config);
  prepare_forms<PlainRows<__nv_bfloat16, 2>>(config);
  prepare_forms<PlainRows<float, 2>>(config);
  prepare_forms<Float8Rows<__nv_bfloat16>>(config);
  prepare_forms<Float8Rows<float>>(config);
}

void launch_combine_send(const RankView& rank, const CombineSendParams& send,
                         const Launch& launch) {
  with_travelling_rows(rank.layout, launch.is_small, [&](auto rows) {
    using Rows = typename decltype(rows)::type;
    with_view<Rows>(rank, has_usual_shape(rank.layout.config()), [&](const auto& view) {
      launch.run(combine_kernel<std::decay_t<decltype(view)>, Rows, true, false>,
                 shared_bytes(rank.layout), view, send, CombineRecvParams{});
    });
  });
}

void launch_combine_recv(const RankView& rank, const CombineRecvParams& recv,
                         const Launch& launch) {
  const bool is_usual = has_usual_shape(rank.layout.config());
  with_travelling_rows(rank.layout, launch.is_small, [&](auto rows) {
    using Rows = typename decltype(rows)::type;
    with_view<Rows, false>(rank, is_usual, recv.num_tokens, [&](const auto& view) {
      launch.run(combine_kernel<std::decay_t<decltype(view)>, Rows, false, true>, 0, view,
                 CombineSendParams{}, recv);
    });
  });
}

void launch_combine(const RankView& rank, const CombineSendParams& send,
                    const CombineRecvParams& recv, const Launch& launch) {
  const bool is_usual = has_usual_shape(rank.layout.config());
  with_travelling_rows(rank.layout, launch.is_small, [&](auto rows) {
    using Rows = typename decltype(rows)::type;
    with_view<Rows, true>(rank, is_usual, recv.num_tokens, [&](const auto& view) {
      launch.run(combine_kernel<std::decay_t<decltype(view)>, Rows, true, true>,
                 shared_bytes(rank.layout), view, send, recv);
    });
  });
}

}  // namespace ep::cuda
