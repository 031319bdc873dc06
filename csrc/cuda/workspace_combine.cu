// Combine from workspaces: experts have left their sums in their rank's combine input, and the
// sources fetch them from there. Nothing is copied on the way; a signal says that they are there.
//
// One kernel, three forms, as in low_latency_combine.cu.

#include "cuda/launch.cuh"
#include "cuda/sum.cuh"

namespace ep::cuda {
namespace {

using protocol::CombineRecvParams;
using protocol::CombineSendParams;

// Tells every peer that this rank's rows are there, and that it is done with what the dispatch has
// brought. By then earlier kernels have ended that wrote the ones and read the others.
class WorkspacePublisher {
 public:
  __device__ WorkspacePublisher(const RankView& rank, int32_t workspace)
      : rank_(rank), workspace_(static_cast<uint32_t>(workspace)) {}

  // While the epochs are on their way.
  __device__ void fetch() {
    if (threadIdx.x >= rank_.layout.config().num_ranks) return;
    epoch_ = ptx::ld_relaxed_gpu(rank_.workspace_epochs + workspace_);
  }
  // Without a fence: the rows are in this GPU's own memory, where every GPU reads them, since the
  // kernels that wrote them have ended. (PyTorch's symmetric memory starts its collectives so.)
  __device__ void run(const Op& op) const {
    for (uint32_t r = threadIdx.x; r < rank_.layout.config().num_ranks; r += blockDim.x) {
      if (r == rank_.self_rank) continue;
      op.publish_signal(r, 0);
      op.publish_workspace_credit(r, workspace_, epoch_);
    }
  }

 private:
  const RankView& rank_;
  uint32_t workspace_;
  uint64_t epoch_ = 0;
};

// Where the rows of a token are. A lane a column, as far as there are lanes.
struct Answers {
  uint32_t num_columns, answer;

  __device__ void fetch(const RankView& rank, const CombineRecvParams& recv, uint32_t token) {
    const uint32_t lane = threadIdx.x % kWarp, stride = rank.layout.num_outcome_columns();
    // Together, whether they are used or not.
    num_columns = recv.num_partials[token];
    answer = lane < stride ? recv.answers[token * stride + lane] : 0;
  }
};

template <typename T, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    workspace_combine_kernel(const __grid_constant__ RankView rank,
                             const __grid_constant__ CombineSendParams send,
                             const __grid_constant__ CombineRecvParams recv) {
  __shared__ SumPlan plans[kWarps];
  SumPlan& plan = plans[threadIdx.x / kWarp];
  const LowLatencyLayout& layout = rank.layout;
  const uint32_t lane = threadIdx.x % kWarp;
  Items items(kReceives ? recv.num_tokens : 0, protocol::parts_for(layout.row_bytes()));
  WorkspacePublisher publisher(rank, send.workspace);
  Answers answers;
  const Op op(rank, Phase::kCombine, kSends, kReceives, [&] {
    if (items.more()) answers.fetch(rank, recv, items.row());
    if (kSends && blockIdx.x == 0) publisher.fetch();
  });
  if (kSends) {
    if (!op.start_send(true)) return;
    if (blockIdx.x == 0) publisher.run(op);
  }
  if (kReceives) {
    const bool ok = op.start_recv(rank.self_rank, nullptr, [] { return 0u; });
    if (!__syncthreads_and(ok)) return;
    while (items.more()) {
      const uint32_t token = items.row(), first_part = items.first_part();
      const uint32_t end_part = items.end_part();
      const uint32_t num_columns = answers.num_columns;
      __syncwarp();  // the last plan has been used
      for (uint32_t c = lane; c < num_columns; c += kWarp) {
        const uint32_t answer =
            c == lane ? answers.answer : recv.answers[token * layout.num_outcome_columns() + c];
        const uint32_t message =
            LowLatencyLayout::message_in_workspace(recv.num_slots, rank.self_rank, answer & 0xffff);
        plan.rows[c] = op.peer(answer >> 16) +
                       layout.combine_input(static_cast<uint32_t>(recv.workspace), message);
        plan.weights[c] = 1.0f;
      }
      __syncwarp();
      items.next();
      if (items.more()) answers.fetch(rank, recv, items.row());
      sum_parts<T>(plan, num_columns, static_cast<uint32_t>(layout.row_bytes() / sizeof(uint4)),
                   first_part, end_part, {recv.out + token * layout.row_bytes(), false, 0});
    }
  }
  op.complete(true);
}

template <typename T>
void prepare_forms() {
  Launch::prepare(workspace_combine_kernel<T, true, false>);
  Launch::prepare(workspace_combine_kernel<T, false, true>);
  Launch::prepare(workspace_combine_kernel<T, true, true>);
}

}  // namespace

void prepare_workspace_combine() {
  prepare_forms<__nv_bfloat16>();
  prepare_forms<float>();
}

void launch_workspace_combine_send(const RankView& rank, const CombineSendParams& send,
                                   const Launch& launch) {
  launch.run(workspace_combine_kernel<float, true, false>, 0, rank, send, CombineRecvParams{});
}

void launch_workspace_combine_recv(const RankView& rank, const CombineRecvParams& recv,
                                   const Launch& launch) {
  with_type(rank.layout, [&](auto value) {
    launch.run(workspace_combine_kernel<decltype(value), false, true>, 0, rank, CombineSendParams{},
               recv);
  });
}

void launch_workspace_combine(const RankView& rank, const CombineSendParams& send,
                              const CombineRecvParams& recv, const Launch& launch) {
  with_type(rank.layout, [&](auto value) {
    launch.run(workspace_combine_kernel<decltype(value), true, true>, 0, rank, send, recv);
  });
}

}  // namespace ep::cuda
