// Combine from workspaces: experts have left their rows, or the sums of theirs, in their rank's
// combine input, and the sources fetch them from there. Nothing is copied on the way; a signal says
// that they are there.
//
// One kernel, three forms, as in low_latency_combine.cu.

#include "cuda/launch.cuh"
#include "cuda/workspace_combine.cuh"

namespace ep::cuda {
namespace {

// Where the rows of a token are: rank-major, a row for each rank that has answered, of weight 1; by
// expert, a row for each k that is routed. A lane a column, as far as there are lanes; usually,
// there are enough (usual.cuh). `kVectors`: of a piece in which rows are added up.
template <bool kIsByExpert, bool kIsUsual, uint32_t kVectors = 2>
class Answers {
 public:
  static constexpr uint32_t kPieceVectors = kVectors;

  __device__ Answers(const RankView& rank, const CombineRecvParams& recv)
      : rank_(rank), layout_(rank.layout), recv_(recv) {}

  __device__ void fetch(uint32_t token) {
    token_ = token;
    // Together, whether they are used or not.
    if (!kIsByExpert) num_columns_ = recv_.num_partials[token];
    if (threadIdx.x % kWarp < layout_.num_outcome_columns()) own_ = column(threadIdx.x % kWarp);
  }

  // The rows of the token fetched last; returns how many. One warp.
  __device__ uint32_t plan(SumPlan* plan) const {
    const uint32_t lane = threadIdx.x % kWarp;
    const uint32_t end = kIsByExpert ? layout_.config().top_k : num_columns_;
    uint32_t size = 0;
    __syncwarp();  // the last plan has been used
    uint32_t first = 0;
#pragma unroll 1
    do {
      const uint32_t c = first + lane;
      const Column a = first == 0 || c >= end ? own_ : column(c);
      const bool is_there = c < end && a.rank != kNoRank;
      const uint32_t there = __ballot_sync(kAllLanes, is_there);
      if (is_there) {
        const uint32_t i = size + __popc(there & ((1u << lane) - 1));
        const auto workspace = static_cast<uint32_t>(recv_.workspace);
        plan->rows[i] = base_of(rank_, a.rank) + layout_.combine_input(workspace, a.row);
        plan->weights[i] = a.weight;
      }
      size += __popc(there);
    } while (!kIsUsual && (first += kWarp) < end);
    __syncwarp();
    return size;
  }

 private:
  struct Column {
    uint32_t rank, row;
    float weight;
  };
  __device__ Column column(uint32_t c) const {
    const uint32_t* answers = recv_.answers + token_ * layout_.num_answer_words();
    if (kIsByExpert) {
      const uint32_t top_k = layout_.config().top_k;
      return {answers[c], answers[top_k + c], recv_.topk_weights[token_ * top_k + c]};
    }
    const uint32_t answer = answers[c];
    return {
        answer >> 16,
        LowLatencyLayout::message_in_workspace(recv_.num_slots, rank_.self_rank, answer & 0xffff),
        1.0f};
  }

  const RankView& rank_;
  const LowLatencyLayout& layout_;
  const CombineRecvParams& recv_;
  uint32_t token_ = 0, num_columns_ = 0;
  Column own_ = {kNoRank, 0, 0.0f};
};

template <typename T, typename Answers, bool kSends, bool kReceives>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    workspace_combine_kernel(const __grid_constant__ RankView rank,
                             const __grid_constant__ CombineSendParams send,
                             const __grid_constant__ CombineRecvParams recv) {
  __shared__ SumPlan plans[kWarps];
  SumPlan& plan = plans[threadIdx.x / kWarp];
  const LowLatencyLayout& layout = rank.layout;
  constexpr uint32_t kVectors = Answers::kPieceVectors;
  Items items(kReceives ? recv.num_tokens : 0, Piece<kVectors>::count(layout.row_bytes()));
  WorkspacePublisher publisher(rank, send.workspace);
  Answers answers(rank, recv);
  ptx::touch(rank);
  if (kReceives) ptx::touch(recv);
  const Op op(rank, Phase::kCombine, kSends, kReceives, [&] {
    if (items.more()) answers.fetch(items.row());
    if (kSends && blockIdx.x == 0) publisher.fetch();
  });
  if (kSends) {
    if (!op.start_send(true)) return;
    if (blockIdx.x == 0) publisher.run(op);
  }
  if (kReceives) {
    const bool ok = op.start_recv(
        rank.self_rank, nullptr, [] { return 0u; }, blockIdx.x == 0,
        [&](uint32_t r, uint32_t num_slots) {
          return num_slots == recv.num_slots || op.corrupt(r, recv.num_slots, num_slots);
        });
    if (!__syncthreads_and(ok)) return;
    while (items.more()) {
      const uint32_t token = items.row(), first_piece = items.first_part();
      const uint32_t end_piece = items.end_part();
      const uint32_t num_rows = answers.plan(&plan);
      items.next();
      if (items.more()) answers.fetch(items.row());
      sum_pieces<T, kVectors>(
          plan, num_rows, static_cast<uint32_t>(layout.row_bytes() / sizeof(uint4)), first_piece,
          end_piece, {recv.out + token * layout.row_bytes(), false, 0});
    }
  }
  op.complete(true);
}

template <typename T, typename Answers>
void prepare_receiving_forms() {
  Launch::prepare(workspace_combine_kernel<T, Answers, false, true>);
  Launch::prepare(workspace_combine_kernel<T, Answers, true, true>);
}

template <typename T>
void prepare_forms() {
  prepare_receiving_forms<T, Answers<false, false>>();
  prepare_receiving_forms<T, Answers<false, true>>();
  prepare_receiving_forms<T, Answers<true, false>>();
  prepare_receiving_forms<T, Answers<true, true>>();
}

// Of a kernel that adds no rows up: any.
using NoAnswers = Answers<false, true>;

// Calls `launch` with the TypeOf rows and of answers. `is_small`: see Launch.
template <typename Function>
void with_types(const LowLatencyLayout& layout, bool is_small, Function&& launch) {
  const bool is_usual = has_usual_shape(layout.config());
  with_type(layout, [&](auto value) {
    using T = TypeOf<decltype(value)>;
    const auto with_answers = [&](auto by_expert) {
      constexpr bool kIsByExpert = decltype(by_expert)::value;
      if (!is_usual) return launch(T(), TypeOf<Answers<kIsByExpert, false>>());
      if constexpr (sizeof(value) == 2) {
        if (is_small) return launch(T(), TypeOf<Answers<kIsByExpert, true, 1>>());
      }
      launch(T(), TypeOf<Answers<kIsByExpert, true>>());
    };
    layout.has_expert_workspaces() ? with_answers(std::true_type())
                                   : with_answers(std::false_type());
  });
}

void prepare() {
  Launch::prepare(workspace_combine_kernel<float, NoAnswers, true, false>);
  prepare_forms<__nv_bfloat16>();
  prepare_receiving_forms<__nv_bfloat16, Answers<false, true, 1>>();
  prepare_receiving_forms<__nv_bfloat16, Answers<true, true, 1>>();
  prepare_forms<float>();
}

void send(const RankView& rank, const CombineSendParams& send, const Launch& launch) {
  launch.run(workspace_combine_kernel<float, NoAnswers, true, false>, 0, rank, send,
             CombineRecvParams{});
}

void receive(const RankView& rank, const CombineRecvParams& recv, const Launch& launch) {
  with_types(rank.layout, launch.is_small, [&](auto type, auto answers) {
    using T = typename decltype(type)::type;
    launch.run(workspace_combine_kernel<T, typename decltype(answers)::type, false, true>, 0, rank,
               CombineSendParams{}, recv);
  });
}

void send_and_receive(const RankView& rank, const CombineSendParams& send,
                      const CombineRecvParams& recv, const Launch& launch) {
  with_types(rank.layout, launch.is_small, [&](auto type, auto answers) {
    using T = typename decltype(type)::type;
    launch.run(workspace_combine_kernel<T, typename decltype(answers)::type, true, true>, 0, rank,
               send, recv);
  });
}

}  // namespace

const WorkspaceCombine kWorkspaceCombine = {prepare, send, receive, send_and_receive};

}  // namespace ep::cuda
