#include <algorithm>
#include <string>

#include "cuda/check.h"
#include "cuda/launch.cuh"
#include "cuda/low_latency.h"
#include "cuda/rank.cuh"

namespace ep::cuda {

using protocol::OpResult;

namespace {

// Kilobytes that a kernel with little to do reads and writes, for each SM that it takes. With more,
// half of the SMs lose more time than is gained. (1 rank on an H100, hidden 7168, float8, a pair on
// 64 SMs and on 132: rank-major, 16 tokens 6.1 and 7.4 us, 64 tokens 6.9 and 8.0; by expert, 8 rows
// a token, 16 tokens 7.5 and 8.7 us, 64 tokens 10.6 and 10.3.)
constexpr uint32_t kLittle = 64;

// Items that a warp may have before a kernel of workspaces takes two blocks an SM, where ranks
// share a GPU. Beside two the next kernel may not be there before its turn, which costs more than
// half of the warps: with 8 ranks on an H200 a pair of 16 tokens takes 17.4 us rank-major instead
// of 19.9, by expert 21.4 instead of 22.1; of 128 tokens 60.7 instead of 59.6, and 84.0 instead
// of 85.6. (Not in workspaces 16 tokens lose 1.5 us.)
constexpr uint32_t kItemsWhereShared = 8;

// Ranks that share a GPU, of which it has two kernels each at the same time. No GPU has more than
// 128; with those of 63 or 64 ranks an H200 now and then had no room for one that all others waited
// for, and with those of 62 never. The rest is for whatever else the process runs.
constexpr uint32_t kNumRanksWithTwoKernels = 32;

// About half of the SMs of the current device: a power of two, because work is cut into as many
// pieces (Items). With 66 of an H100's 132 much of the gain is lost.
uint32_t half_of_sms() {
  int device, num_sms;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of SMs");
  int half = 1;
  while (4 * half <= num_sms) half *= 2;
  return static_cast<uint32_t>(half);
}

// Whether two blocks of the largest dispatch fit an SM.
bool check_shared_memory(const LowLatencyLayout& layout, uint32_t self_rank) {
  const uint32_t num_tokens = layout.config().num_max_tokens_per_rank;
  const bool has_workspaces = layout.config().num_workspaces > 0;
  const auto in_workspaces = [&](uint32_t num_slots) {
    return workspace_dispatch(layout, num_slots).shared_bytes(layout, num_slots);
  };
  const uint32_t num_tagged = std::min(layout.config().num_max_tagged_tokens, num_tokens);
  const uint64_t num_wanted = has_workspaces
                                  ? std::max(in_workspaces(num_tokens), in_workspaces(num_tagged))
                                  : dispatch_shared_bytes(layout, self_rank, num_tokens);
  const bool is_by_rank = has_workspaces && !layout.has_expert_workspaces();
  return Launch::two_fit(
      num_wanted, std::string(", a bit for each token and ") + (is_by_rank ? "rank" : "expert"));
}

// Those that may be launched.
void prepare_kernels(const LowLatencyLayout& layout) {
  if (layout.config().num_workspaces == 0) {
    prepare_dispatch(layout.config());
    prepare_combine(layout.config());
    return;
  }
  const auto prepare = [](const auto& of_few, const auto& of_many) {
    of_few.prepare();
    if (&of_many != &of_few) of_many.prepare();
  };
  const uint32_t most = layout.config().num_max_tokens_per_rank;
  prepare(workspace_dispatch(layout, 1), workspace_dispatch(layout, most));
  prepare(workspace_combine(layout, 1), workspace_combine(layout, most));
}

}  // namespace

LowLatencyRank::LowLatencyRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                               const std::vector<std::byte*>& bases, uint64_t timeout_ns,
                               uint32_t num_sms, bool shares_gpu)
    : RankHost(config, self_rank, bases, timeout_ns),
      num_sms_(num_sms),
      half_of_sms_(half_of_sms()),
      items_per_warp_(shares_gpu && config.num_workspaces > 0 ? kItemsWhereShared : 1),
      has_room_for_two_(check_shared_memory(view_.layout, self_rank)),
      batches_(config.num_workspaces) {
  view_.shares_gpu = shares_gpu;
  prepare_kernels(view_.layout);
}

struct LowLatencyRank::Plan {
  RankView view;
  Launch launch;
};

// Whether a block an SM has a warp for every item.
bool LowLatencyRank::has_one_each(uint64_t num_items) const {
  return num_items <= uint64_t{num_sms_} * kWarps;
}

// `num_items`: parts of rows; of kernels that receive, an estimate from this rank's batch; peers'
// are likely alike. `num_parts`: those that are read and written. Default: never little.
// `items_per_warp`: that a warp may do for that.
LowLatencyRank::Plan LowLatencyRank::plan(uint64_t num_items, void* stream, uint64_t num_parts,
                                          uint32_t items_per_warp) {
  // With little to do, half of the SMs: the next kernel finds the others free, and each SM keeps
  // the instructions of one kernel. Peers are far, so there no warp does more items for it.
  const bool is_alone = view_.layout.config().num_ranks == 1;
  const bool has_little =
      !view_.shares_gpu && num_parts <= uint64_t{kLittle} * half_of_sms_ &&
      (is_alone || num_items <= uint64_t{kWarps} * half_of_sms_ * items_per_warp);
  const uint32_t num_sms = has_little ? std::min(num_sms_, half_of_sms_) : num_sms_;
  // With more to do than a block an SM has warps, two a block: the next kernel then waits outside.
  const bool has_much =
      has_room_for_two_ && !has_one_each(num_items / items_per_warp_) && !has_little;
  const auto num_blocks = static_cast<uint32_t>(
      has_much ? kBlocksPerSM * num_sms : std::clamp<uint64_t>(num_items, 1, num_sms));
  // Ranks on one GPU wait for each other, so that all their blocks must find room: a block an SM
  // of one kernel, and one of the next, or two of one. Of one with two, the next may not even be
  // there when a warp of every block is done: a rank that has all it wants would take the room in
  // which others have yet to send.
  const bool starts_early = !(view_.shares_gpu && has_much && lets_next_start_);
  // Small pieces gained 0.3 to 0.5 us of a pair of 1 and 16 tokens by expert between two H200s, and
  // lost 0.6 of 128. (Not timed with one rank.)
  const bool is_small = !is_alone && has_one_each(num_items);
  Plan plan = {view_,
               {num_blocks, kThreads, static_cast<cudaStream_t>(stream), starts_early, is_small}};
  plan.view.share = kProgressPerOp / num_blocks;
  plan.view.first_share = kProgressPerOp - plan.view.share * (num_blocks - 1);
  const uint32_t num_ranks = view_.layout.config().num_ranks;
  lets_next_start_ =
      has_room_for_two_ && !has_much && !(view_.shares_gpu && num_ranks > kNumRanksWithTwoKernels);
  plan.view.next_starts = lets_next_start_   ? NextStarts::kAtOnce
                          : view_.shares_gpu ? NextStarts::kAsBlocksEnd
                                             : NextStarts::kAsWarpsEnd;
  return plan;
}

// Of a dispatch into a workspace. With peers, and more to do than half of the SMs have blocks,
// blocks of as many items as they have warps: each has a fence and a word to every peer at its end.
// Tagged, none has, and all blocks receive.
LowLatencyRank::Plan LowLatencyRank::plan_workspace(uint32_t num_tokens, uint32_t num_slots,
                                                    void* stream) {
  const LowLatencyLayout& layout = view_.layout;
  const uint32_t num_columns = layout.num_outcome_columns();
  const uint32_t num_parts =
      protocol::parts_for(layout.dispatch_row_bytes()) + (layout.has_expert_workspaces() ? 0 : 1);
  if (layout.is_tagged_in_workspace(num_slots)) {
    const uint64_t num_messages =
        uint64_t{num_slots} * std::min(num_columns, layout.config().num_ranks);
    return plan(num_messages * num_parts, stream, 2 * num_messages * num_parts);
  }
  const uint64_t num_items = uint64_t{num_tokens} * num_parts;
  const uint64_t num_read = uint64_t{num_tokens} * protocol::parts_for(layout.row_bytes());
  const bool spreads = layout.config().num_ranks == 1 || !has_one_each(num_items);
  const uint64_t num_filled = (num_items + kWarps - 1) / kWarps;
  const uint64_t num_used = std::max(num_filled, std::min<uint64_t>(num_items, half_of_sms_));
  return plan(spreads ? num_items : num_used, stream, num_read + num_items * num_columns);
}

// Of a combine from workspaces, or of the half that adds up `num_tokens` rows; of the half that
// tells or brings others theirs, 0. (A signal is little to do.)
LowLatencyRank::Plan LowLatencyRank::plan_workspace_combine(uint32_t num_tokens, uint32_t num_slots,
                                                            bool sends, void* stream) {
  const LowLatencyLayout& layout = view_.layout;
  const uint32_t num_parts = protocol::parts_for(layout.row_bytes());
  const uint64_t num_added = uint64_t{num_tokens} * num_parts;
  const uint64_t num_read = num_added * (1 + layout.num_outcome_columns());
  if (!sends || !layout.brings_from_workspace(num_slots)) {
    Plan p = plan(std::max<uint64_t>(num_added, 1), stream, num_read);
    // Of rows that are fetched: 8 ranks on one H200 took 8.9 us instead of 9.5 for a pair of one
    // token (rank-major), but 4, where a warp had two small pieces, 11.0 instead of 10.6 for 16.
    p.launch.is_small &= has_one_each(2 * num_added);
    return p;
  }
  // A warp may bring one and add up another: two H200s took 9.9 us instead of 10.6 for a pair of 32
  // tokens, four 12.2 instead of 12.7 for one of 16.
  const uint64_t num_sent = uint64_t{num_slots} * (layout.num_outcome_columns() - 1) * num_parts;
  return plan(num_added + num_sent, stream, num_read + 2 * num_sent, 2);
}

// Of a kernel by expert, not in a workspace: of each part that travels, about four are read and
// written. With half of the SMs two H200s took 11.3 us instead of 12.1 for a pair of 16 tokens, and
// with hooks 14.5 instead of 15.8. (One rank's kernels have not been timed so.)
LowLatencyRank::Plan LowLatencyRank::plan_by_expert(uint64_t num_items, void* stream) {
  if (view_.layout.config().num_ranks == 1) return plan(num_items, stream);
  return plan(num_items, stream, 4 * num_items);
}

uint64_t LowLatencyRank::num_parts_received() const {
  const uint64_t num_messages = uint64_t{num_tokens_} * view_.layout.num_outcome_columns();
  return num_messages * protocol::parts_for(view_.layout.dispatch_row_bytes());
}

uint64_t LowLatencyRank::num_parts_answered() const {
  const uint64_t num_messages = uint64_t{num_tokens_} * view_.layout.num_outcome_columns();
  return num_messages * protocol::parts_for(view_.layout.combine_row_bytes());
}

OpResult LowLatencyRank::dispatch_send(const DispatchSendParams& send, void* stream) {
  num_tokens_ = send.num_tokens;
  if (send.workspace >= 0) {
    batches_[send.workspace] = {send.num_tokens, send.answers};
    const Plan p = plan_workspace(send.num_tokens, send.num_slots, stream);
    workspace_dispatch(view_.layout, send.num_slots).send(p.view, send, p.launch);
  } else {
    const uint64_t num_parts = protocol::parts_for(view_.layout.dispatch_row_bytes());
    const Plan p = plan_by_expert(send.num_tokens * num_parts, stream);
    launch_dispatch_send(p.view, send, p.launch);
  }
  return launched("dispatch_send");
}

OpResult LowLatencyRank::dispatch_recv(const DispatchRecvParams& recv, void* stream) {
  if (recv.workspace >= 0) {
    const bool is_tagged = view_.layout.is_tagged_in_workspace(recv.num_slots);
    const Plan p = is_tagged ? plan_workspace(0, recv.num_slots, stream) : plan(1, stream);
    DispatchRecvParams of_own_send = recv;
    of_own_send.num_tokens = batches_[recv.workspace].num_tokens;
    of_own_send.answers = batches_[recv.workspace].answers;
    workspace_dispatch(view_.layout, recv.num_slots).recv(p.view, of_own_send, p.launch);
  } else {
    const Plan p = plan_by_expert(num_parts_received(), stream);
    launch_dispatch_recv(p.view, recv, p.launch);
  }
  return launched("dispatch_recv");
}

OpResult LowLatencyRank::dispatch(const DispatchSendParams& send, const DispatchRecvParams& recv,
                                  void* stream) {
  num_tokens_ = send.num_tokens;
  if (send.workspace >= 0) {
    const Plan p = plan_workspace(send.num_tokens, send.num_slots, stream);
    workspace_dispatch(view_.layout, send.num_slots).both(p.view, send, recv, p.launch);
  } else {
    const Plan p = plan_by_expert(num_parts_received(), stream);
    launch_dispatch(p.view, send, recv, p.launch);
  }
  return launched("dispatch");
}

OpResult LowLatencyRank::combine_send(const CombineSendParams& send, void* stream) {
  if (send.workspace >= 0) {
    const Plan p = plan_workspace_combine(0, send.num_slots, true, stream);
    workspace_combine(view_.layout, send.num_slots).send(p.view, send, p.launch);
  } else {
    const Plan p = plan_by_expert(num_parts_answered(), stream);
    launch_combine_send(p.view, send, p.launch);
  }
  return launched("combine_send");
}

OpResult LowLatencyRank::combine_recv(const CombineRecvParams& recv, void* stream) {
  if (recv.workspace >= 0) {
    const Plan p = plan_workspace_combine(recv.num_tokens, recv.num_slots, false, stream);
    workspace_combine(view_.layout, recv.num_slots).recv(p.view, recv, p.launch);
  } else {
    const uint64_t num_parts = protocol::parts_for(view_.layout.combine_row_bytes());
    const Plan p = plan_by_expert(recv.num_tokens * num_parts, stream);
    launch_combine_recv(p.view, recv, p.launch);
  }
  return launched("combine_recv");
}

OpResult LowLatencyRank::combine(const CombineSendParams& send, const CombineRecvParams& recv,
                                 void* stream) {
  if (send.workspace >= 0) {
    const Plan p = plan_workspace_combine(recv.num_tokens, recv.num_slots, true, stream);
    workspace_combine(view_.layout, recv.num_slots).both(p.view, send, recv, p.launch);
  } else {
    const Plan p = plan_by_expert(num_parts_answered(), stream);
    launch_combine(p.view, send, recv, p.launch);
  }
  return launched("combine");
}

}  // namespace ep::cuda
