// The steps of a rank whose peers are on its host, in workspaces or not. What a dispatch brings to
// a workspace is taken out before others may write there again, to be compared; what experts make
// of it is left there.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/wait.cuh"
#include "low_latency_batches.h"
#include "protocol/scales.h"

namespace ep::stress {

struct OneHostView : cuda::RankView {
  bool is_fused;
};

// A row of a batch in its workspace, and where it is elsewhere: in [L, S], or [R, M].
struct Place {
  uint32_t local_expert, position;  // by expert
  uint32_t row_in_workspace;
  uint64_t row;
};
// Calls `use(place)` for every row that has come.
template <typename Use>
void for_each_place(const OneHostView& view, const Batch& batch, Use use) {
  const protocol::LowLatencyLayout& layout = view.layout;
  const Outputs& out = batch.seen;
  const bool is_by_expert = layout.has_expert_workspaces();
  const uint32_t capacity = layout.rows_of_expert_in_workspace(out.num_slots);
  for (uint32_t e = 0; is_by_expert && e < view.num_local_experts; ++e) {
    for (uint32_t i = 0; i < static_cast<uint32_t>(out.counts[e]); ++i) {
      use(Place{e, i, e * capacity + i, e * layout.expert_capacity() + i});
    }
  }
  for (uint32_t r = 0; !is_by_expert && r < layout.config().num_ranks; ++r) {
    for (uint32_t i = 0; i < out.handle.num_messages[r]; ++i) {
      const uint64_t row = uint64_t{r} * layout.config().num_max_tokens_per_rank + i;
      use(Place{0, 0, layout.message_in_workspace(out.num_slots, r, i), row});
    }
  }
}
// What a dispatch has brought, to where it would be without workspaces.
inline void take_out(const OneHostView& view, const Batch& batch) {
  const protocol::LowLatencyLayout& layout = view.layout;
  const Outputs& out = batch.seen;
  const auto workspace = static_cast<uint32_t>(out.workspace);
  const uint32_t num_words = layout.num_scale_words(), top_k = layout.config().top_k;
  const uint32_t capacity = layout.rows_of_expert_in_workspace(out.num_slots);
  auto in_workspace = [&](uint64_t offset) { return view.self_base + offset; };
  for_each_place(view, batch, [&](const Place& p) {
    const uint64_t row_bytes = layout.dispatch_row_bytes();
    std::memcpy(out.recv_x + p.row * row_bytes,
                in_workspace(layout.workspace_row(workspace, p.row_in_workspace)), row_bytes);
    const bool is_by_expert = layout.has_expert_workspaces();
    const auto* scales = reinterpret_cast<uint32_t*>(
        in_workspace(layout.workspace_scales(workspace, is_by_expert ? 0 : p.row_in_workspace)));
    for (uint32_t w = 0; w < num_words; ++w) {
      const uint64_t i = is_by_expert ? protocol::expert_scale_word_idx(
                                            num_words, capacity, p.local_expert, p.position, w)
                                      : w;
      out.recv_scales[protocol::scale_word_idx(layout, batch.output, p.row, w)] = scales[i];
    }
    if (is_by_expert) return;
    std::memcpy(out.recv_topk_weights + p.row * top_k,
                in_workspace(layout.workspace_topk_weights(workspace, p.row_in_workspace)),
                top_k * sizeof(float));
  });
  if (layout.has_expert_workspaces()) return;
  const auto first_expert = static_cast<int32_t>(view.owners.first_expert(view.self_rank));
  const int32_t no_expert = layout.no_expert(view.owners.first_expert(view.self_rank));
  const auto* listed =
      reinterpret_cast<int32_t*>(in_workspace(layout.workspace_topk_idx(workspace, 0)));
  std::fill_n(out.recv_topk_idx, layout.expert_capacity() * top_k, -1);
  for (uint32_t i = 0; i < layout.config().num_ranks * out.num_slots * top_k; ++i) {
    const uint32_t r = i / top_k / out.num_slots, in_rank = i - r * out.num_slots * top_k;
    const int32_t expert = listed[i] == no_expert
                               ? -1
                               : listed[i] - (layout.config().global_expert_ids ? first_expert : 0);
    out.recv_topk_idx[r * layout.config().num_max_tokens_per_rank * top_k + in_rank] = expert;
  }
}
// What experts make of it.
inline void leave_outputs(const OneHostView& view, const Batch& batch) {
  const auto workspace = static_cast<uint32_t>(batch.seen.workspace);
  const uint64_t row_bytes = view.layout.row_bytes();
  for_each_place(view, batch, [&](const Place& p) {
    std::memcpy(view.self_base + view.layout.combine_input(workspace, p.row_in_workspace),
                batch.y + p.row * row_bytes, row_bytes);
  });
}
// By one thread of the rank, as a kernel; unless an operation has given up.
template <typename Use>
void on_one_thread(const OneHostView& view, Use use) {
  if (blockIdx.x == 0 && threadIdx.x == 0 && view.state->failed == 0) {
    gpu_on_cpu::be_late(2, 3000);
    use();
  }
  gpu_on_cpu::meet_all();
}

// In small pieces or not: peers' need not be alike.
inline cuda::Launch launch_for(const Batch& batch) { return {0, batch.num_tokens % 2 == 1}; }

inline void run_step_in_workspace(const OneHostView& view, uint32_t what, const Batch& batch) {
  const cuda::Launch launch = launch_for(batch);
  const Outputs& out = batch.seen;
  const auto& dispatch = cuda::workspace_dispatch(view.layout, out.num_slots);
  const auto& combine = cuda::workspace_combine(view.layout, out.num_slots);
  auto take = [&] { on_one_thread(view, [&] { take_out(view, batch); }); };
  auto leave = [&] { on_one_thread(view, [&] { leave_outputs(view, batch); }); };
  protocol::CombineSendParams send_home = batch.send_home(out);
  send_home.expert_out =
      view.self_base + view.layout.combine_input(static_cast<uint32_t>(out.workspace), 0);
  if (view.is_fused) {
    if (what == Step::kHook) {
      dispatch.both(view, batch.send(out), batch.recv(out), launch);
      take();
    } else if (what == Step::kCombineHook) {
      leave();
      combine.both(view, send_home, batch.recv_home(out), launch);
    }
    return;
  }
  if (what == Step::kDispatch) dispatch.send(view, batch.send(out), launch);
  if (what == Step::kHook) {
    // Tagged messages are moved by all blocks; of others nothing is left to do but to wait.
    const bool is_tagged = view.layout.is_tagged_in_workspace(out.num_slots);
    protocol::DispatchRecvParams recv = batch.recv(out);
    recv.num_tokens = batch.num_tokens;
    recv.answers = out.answers;
    dispatch.recv(view, recv, is_tagged ? launch : cuda::Launch{1});
    take();
  }
  if (what == Step::kCombine) {
    leave();
    combine.send(view, send_home, launch);
  }
  if (what == Step::kCombineHook) {
    combine.recv(view, batch.recv_home(out), launch);
  }
}

inline void run_step(const OneHostView& view, uint32_t what, const Batch& batch) {
  const cuda::Launch launch = launch_for(batch);
  const Outputs& out = batch.seen;
  if (out.workspace >= 0) return run_step_in_workspace(view, what, batch);
  if (view.is_fused) {
    if (what == Step::kHook) launch_dispatch(view, batch.send(out), batch.recv(out), launch);
    if (what != Step::kCombineHook) return;
    return launch_combine(view, batch.send_home(out), batch.recv_home(out), launch);
  }
  if (what == Step::kDispatch) return launch_dispatch_send(view, batch.send(out), launch);
  if (what == Step::kHook) return launch_dispatch_recv(view, batch.recv(out), launch);
  if (what == Step::kCombine) return launch_combine_send(view, batch.send_home(out), launch);
  launch_combine_recv(view, batch.recv_home(out), launch);
}

}  // namespace ep::stress
