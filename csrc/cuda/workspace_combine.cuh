// Combine from workspaces: what both kinds of kernels have in common, those that fetch rows
// (workspace_combine.cu) and those to whom rows come (workspace_tagged_combine.cu).
#pragma once

#include "cuda/sum.cuh"

namespace ep::cuda {

using protocol::CombineRecvParams;
using protocol::CombineSendParams;

// Tells every peer that this rank's rows are there, and that it is done with what the dispatch has
// brought. By then earlier kernels have ended that wrote the ones and read the others. A signal's
// count is that of a source's slots: a peer that was told of others would look elsewhere.
class WorkspacePublisher {
 public:
  __device__ WorkspacePublisher(const RankView& rank, int32_t workspace)
      : rank_(rank), workspace_(static_cast<uint32_t>(workspace)) {}

  // While the epochs are on their way.
  __device__ void fetch() {
    if (threadIdx.x >= rank_.layout.config().num_ranks) return;
    dispatch_ = ptx::ld_relaxed_gpu(rank_.workspace_dispatches + workspace_);
  }
  // Without a fence: the rows are in this GPU's own memory, where every GPU reads them, since the
  // kernels that wrote them have ended. (PyTorch's symmetric memory starts its collectives so.)
  __device__ void run(const Op& op) const {
    for (uint32_t r = threadIdx.x; r < rank_.layout.config().num_ranks; r += blockDim.x) {
      if (r == rank_.self_rank) continue;
      // First, because the signal lets the peer go on to where it looks for the credit.
      op.publish_workspace_credit(r, workspace_, protocol::signal_epoch(dispatch_));
      op.publish_signal(r, static_cast<uint32_t>(protocol::signal_count(dispatch_)));
    }
  }

 private:
  const RankView& rank_;
  uint32_t workspace_;
  uint64_t dispatch_ = 0;
};

}  // namespace ep::cuda
