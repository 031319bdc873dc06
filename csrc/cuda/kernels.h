// What the files of low-latency kernels offer: their launches, and shared memory that those need.
#pragma once

#include <cstdint>

#include "cuda/low_latency.h"

namespace ep::cuda {

struct Launch;  // launch.cuh

// What most models and hosts have: few ranks, no more experts a token than a warp has lanes, scales
// that are not packed.
inline bool has_usual_shape(const protocol::LowLatencyConfig& config) {
  constexpr uint32_t kLanes = 32;
  return config.num_ranks <= kNumNearRanks && config.top_k <= kLanes &&
         config.scale_format != protocol::ScaleFormat::kUE8M0;
}

// Of the kernels of a file that such a rank may launch, or of all, see Launch::prepare.
void prepare_dispatch(const protocol::LowLatencyConfig& config);
void prepare_combine(const protocol::LowLatencyConfig& config);

// Shared memory of a dispatch: a bit for each token, under every expert and rank, and what arrives.
uint64_t dispatch_shared_bytes(const protocol::LowLatencyLayout& layout, uint32_t self_rank,
                               uint32_t num_tokens);

void launch_dispatch_send(const RankView& rank, const DispatchSendParams& send,
                          const Launch& launch);
void launch_dispatch_recv(const RankView& rank, const DispatchRecvParams& recv,
                          const Launch& launch);
void launch_dispatch(const RankView& rank, const DispatchSendParams& send,
                     const DispatchRecvParams& recv, const Launch& launch);
void launch_combine_send(const RankView& rank, const CombineSendParams& send, const Launch& launch);
void launch_combine_recv(const RankView& rank, const CombineRecvParams& recv, const Launch& launch);
void launch_combine(const RankView& rank, const CombineSendParams& send,
                    const CombineRecvParams& recv, const Launch& launch);

// Dispatch into workspaces, whose rows are arranged in one of two ways.
struct WorkspaceDispatch {
  void (*prepare)();
  // Of a kernel that sends so many tokens, and receives.
  uint64_t (*shared_bytes)(const protocol::LowLatencyLayout& layout, uint32_t num_tokens);
  void (*send)(const RankView& rank, const DispatchSendParams& send, const Launch& launch);
  void (*recv)(const RankView& rank, const DispatchRecvParams& recv, const Launch& launch);
  void (*both)(const RankView& rank, const DispatchSendParams& send, const DispatchRecvParams& recv,
               const Launch& launch);
};
extern const WorkspaceDispatch kExpertWorkspaceDispatch;
// [1]: of usual shapes.
extern const WorkspaceDispatch kTaggedExpertWorkspaceDispatch[2];
extern const WorkspaceDispatch kRankMajorWorkspaceDispatch[2];
extern const WorkspaceDispatch kTaggedWorkspaceDispatch[2];  // rank-major, too

// Of an exchange with so many slots a source, on which all ranks agree.
inline const WorkspaceDispatch& workspace_dispatch(const protocol::LowLatencyLayout& layout,
                                                   uint32_t num_slots) {
  const bool is_tagged = layout.is_tagged_in_workspace(num_slots);
  const bool is_usual = has_usual_shape(layout.config());
  if (layout.has_expert_workspaces()) {
    return is_tagged ? kTaggedExpertWorkspaceDispatch[is_usual] : kExpertWorkspaceDispatch;
  }
  return (is_tagged ? kTaggedWorkspaceDispatch : kRankMajorWorkspaceDispatch)[is_usual];
}

// Combine from workspaces.
struct WorkspaceCombine {
  void (*prepare)();
  void (*send)(const RankView& rank, const CombineSendParams& send, const Launch& launch);
  void (*recv)(const RankView& rank, const CombineRecvParams& recv, const Launch& launch);
  void (*both)(const RankView& rank, const CombineSendParams& send, const CombineRecvParams& recv,
               const Launch& launch);
};
extern const WorkspaceCombine kWorkspaceCombine;        // sources fetch rows
extern const WorkspaceCombine kTaggedWorkspaceCombine;  // rows come to them

// As above.
inline const WorkspaceCombine& workspace_combine(const protocol::LowLatencyLayout& layout,
                                                 uint32_t num_slots) {
  return layout.brings_from_workspace(num_slots) ? kTaggedWorkspaceCombine : kWorkspaceCombine;
}

}  // namespace ep::cuda
