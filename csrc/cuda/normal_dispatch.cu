// Dispatch on a GPU; the meaning, and the worked example, are in csrc/cpu/normal_dispatch.cpp.
//
// One kernel finds the routes, exchanges counts, and sends every row to its final place in its
// rank's memory: the counts of all ranks tell each source which rows of each receiver are its own.
// Where some rank has no room for all its rows, they travel in rounds, and are copied out.

#include "cuda/launch.cuh"
#include "cuda/normal_launch.cuh"
#include "cuda/normal_send.cuh"

namespace ep::cuda {
namespace normal {
namespace {

// What the kernel is doing, in shared memory.
struct Shared {
  RowRanges ranges;
  RouteScratch route;
  uint64_t barriers[kSendWarps];
  uint32_t next_row[kNumMaxDeviceRanks];  // in rounds: of each source
  uint32_t num_in_round[kNumMaxDeviceRanks];
};

// Waits for all ranks to have begun, and so to be done with what earlier operations brought, and
// for the counts of all. Whole block. False: end the kernel.
__device__ bool find_ranges(const Op& op, const NormalDispatch& params, RowRanges* ranges) {
  const NormalDeviceLayout& layout = op.layout();
  const uint32_t num_ranks = op.num_ranks(), self_rank = op.rank().self_rank;
  if (params.start != DispatchStart::kResume) {
    if (!op.wait_until_ready([](uint32_t, uint32_t) { return true; })) return false;
  }
  if (params.start != DispatchStart::kRoute) {
    ranges->find(num_ranks, self_rank, [&](uint32_t src, uint32_t column) {
      return ptx::ld_relaxed_gpu(params.routes.batch + batch_idx(num_ranks, src, column));
    });
    return true;
  }
  bool ok = true;
  ranges->find(num_ranks, self_rank, [&](uint32_t src, uint32_t column) {
    if (column > 0) {
      return ptx::ld_relaxed_sys(at<uint32_t>(op.self(), layout.rank_counts(src)) + column - 1);
    }
    const uint64_t epoch = ptx::ld_relaxed_sys(at<uint64_t>(op.self(), layout.counts(src)));
    const auto* num_tokens = at<uint32_t>(op.self(), layout.counts(src) + 8);
    const uint32_t count = ptx::ld_relaxed_sys(num_tokens);
    if (epoch != op.epoch()) ok = op.corrupt(src, op.epoch(), epoch);
    return count;
  });
  return __syncthreads_and(ok);
}

// Counts, to the handle and, where it waits for them, to the host. One block.
__device__ void write_counts(const Op& op, const NormalDispatch& params, const RowRanges& ranges) {
  const NormalDeviceLayout& layout = op.layout();
  const uint32_t num_ranks = op.num_ranks();
  HostCounts* host = params.ticket != 0 ? op.rank().host_counts : nullptr;
  for (uint32_t i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
    const uint32_t src = i / num_ranks, dst = i % num_ranks;
    params.routes.batch[batch_idx(num_ranks, src, 1 + dst)] =
        ptx::ld_relaxed_sys(at<uint32_t>(op.self(), layout.rank_counts(src)) + dst);
  }
  if (threadIdx.x < num_ranks) {
    params.routes.batch[batch_idx(num_ranks, threadIdx.x, 0)] = ranges.num_tokens[threadIdx.x];
  }
  for (uint32_t e = threadIdx.x; e < op.rank().num_local_experts; e += blockDim.x) {
    uint32_t sum = 0;
#pragma unroll 8
    for (uint32_t src = 0; src < num_ranks; ++src) {
      sum += ptx::ld_relaxed_sys(at<uint32_t>(op.self(), layout.expert_counts(src)) + e);
    }
    params.num_recv_tokens_per_expert[e] = static_cast<int32_t>(sum);
    if (host != nullptr) reinterpret_cast<uint32_t*>(host + 1)[e] = sum;
  }
  __syncthreads();
  if (host == nullptr || threadIdx.x != 0) return;
  host->num_rows = ranges.first_received[num_ranks];
  host->num_rounds = ranges.num_rounds(layout);
  host->is_direct = ranges.is_direct(layout);
  ptx::fence_acq_rel_sys();
  ptx::st_relaxed_sys(&host->ticket, params.ticket);
}

// A grid's threads copy together.
__device__ void copy_by_all(void* dst, const void* src, uint64_t num_bytes) {
  copy_flat(dst, src, num_bytes, uint64_t{blockIdx.x} * blockDim.x + threadIdx.x,
            uint64_t{gridDim.x} * blockDim.x);
}

// Rows behind N list no expert of this rank and come from no token. All blocks.
__device__ void mark_unused(const NormalView& rank, uint64_t num_rows, const NormalOutputs& out) {
  if (out.recv_topk_idx == nullptr) return;
  const uint64_t top_k = rank.layout.config().top_k;
  const int32_t no_expert = rank.layout.no_expert(rank.owners.first_expert(rank.self_rank));
  const uint64_t thread = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const uint64_t num_threads = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = num_rows * top_k + thread; i < out.num_rows * top_k; i += num_threads) {
    out.recv_topk_idx[i] = no_expert;
    out.recv_topk_weights[i] = 0.0f;
  }
  for (uint64_t i = num_rows + thread; i < out.num_rows; i += num_threads) {
    out.recv_src_tokens[i] = -1;
  }
}

// Rows that have come at once, and what is beside them, as far as it is wanted. All blocks.
__device__ void unpack(const NormalView& rank, uint64_t num_rows, const NormalOutputs& out) {
  const NormalDeviceLayout& layout = rank.layout;
  const uint64_t top_k = layout.config().top_k;
  auto copy = [&](void* to, uint64_t offset, uint64_t bytes) {
    if (to != nullptr) copy_by_all(to, rank.self_base + offset, num_rows * bytes);
  };
  copy(out.recv_x, layout.row(0), layout.dispatch_row_bytes());
  copy(out.recv_scales, layout.scales(0), layout.num_scale_words() * uint64_t{4});
  copy(out.recv_topk_idx, layout.topk_idx(0), top_k * 4);
  copy(out.recv_topk_weights, layout.topk_weights(0), top_k * 4);
  copy(out.recv_src_tokens, layout.src_token(0), 4);
  mark_unused(rank, num_rows, out);
}

// `writes_counts`: this block does, while its rows travel.
template <typename Rows>
__device__ void send_directly(const Op& op, const NormalDispatch& params, const RowRanges& ranges,
                              bool writes_counts, RowSender<Rows>* sender) {
  sender->run(0, params.routes.num_tokens,
              [&](uint32_t r, uint32_t number) { return uint64_t{ranges.first_sent[r]} + number; });
  op.let_next_start(params.routes.num_tokens);
  if (writes_counts) write_counts(op, params, ranges);
  sender->finish();
  const NormalDeviceLayout& layout = op.layout();
  const bool is_last = op.arrive_last();
  if (is_last) {
    op.publish_to_all(layout.done(op.rank().self_rank), [&](uint32_t) { return op.epoch(); });
  }
  const bool unpacks = params.out.recv_x != nullptr || params.out.recv_topk_idx != nullptr;
  if (!is_last && !unpacks) return;
  // Waits for: every source's rows.
  if (!op.wait_for_all(Half::kRecv, [&](uint32_t r) { return layout.done(r); }, op.epoch())) return;
  if (unpacks) unpack(op.rank(), ranges.first_received[op.num_ranks()], params.out);
  if (is_last && threadIdx.x == 0) op.complete(0);
}

// The rounds of a batch whose rows have no room somewhere.
class Rounds {
 public:
  __device__ Rounds(const Op& op, const NormalDispatch& params, Shared* shared)
      : op_(op), layout_(op.layout()), params_(params), shared_(*shared) {
    num_rounds_ = shared_.ranges.num_rounds(layout_);
    if (threadIdx.x < op.num_ranks()) {
      shared_.next_row[threadIdx.x] = shared_.ranges.first_received[threadIdx.x];
      shared_.num_in_round[threadIdx.x] = 0;
    }
    __syncthreads();
  }

  template <typename Rows>
  __device__ bool run(RowSender<Rows>* sender) {
    const bool ok = run_rounds(
        op_, Phase::kDispatch, num_rounds_, [&](uint32_t round) { return send(round, sender); },
        [&](uint32_t round) { return receive(round); });
    if (ok) {
      mark_unused(op_.rank(), shared_.ranges.first_received[op_.num_ranks()], params_.out);
    }
    return ok;
  }
  __device__ uint32_t size() const { return num_rounds_; }

 private:
  __device__ uint32_t round_begin(uint32_t round, uint32_t r) const {
    return ptx::ld_relaxed_gpu(params_.routes.round_begins + round * op_.num_ranks() + r);
  }

  template <typename Rows>
  __device__ bool send(uint32_t round, RowSender<Rows>* sender) {
    const uint32_t num_tokens = params_.routes.num_tokens, bank = op_.bank(round);
    const uint32_t self_rank = op_.rank().self_rank, per_round = layout_.num_tokens_per_round();
    const auto begin =
        static_cast<uint32_t>(min(uint64_t{round} * per_round, uint64_t{num_tokens}));
    const uint32_t end = begin + min(per_round, num_tokens - begin);
    sender->run(begin, end, [&](uint32_t r, uint32_t number) {
      return layout_.staged_row(bank, self_rank, number - round_begin(round, r));
    });
    sender->finish();
    if (op_.arrive_in_round(Half::kSend, round)) {
      op_.publish_to_all(layout_.round_signal(Phase::kDispatch, bank, self_rank), [&](uint32_t r) {
        const uint32_t count = begin == end ? 0 : round_begin(round + 1, r) - round_begin(round, r);
        return protocol::pack_signal(op_.round_epoch(round), count);
      });
    }
    return true;
  }

  // Waits for: every source's rows of this round. Counts that contradict those of the batch must
  // not choose where we write.
  __device__ bool receive(uint32_t round) {
    const uint32_t bank = op_.bank(round);
    const bool ok = op_.wait_for_all(
        Half::kRecv, [&](uint32_t r) { return layout_.round_signal(Phase::kDispatch, bank, r); },
        protocol::pack_signal(op_.round_epoch(round), 0), protocol::kEpochShift,
        [&](uint32_t r, uint64_t word) {
          const auto count = static_cast<uint32_t>(protocol::signal_count(word));
          shared_.next_row[r] += shared_.num_in_round[r];
          shared_.num_in_round[r] = count;
          const uint32_t num_left = shared_.ranges.first_received[r + 1] - shared_.next_row[r];
          const bool is_last = round + 1 == num_rounds_;
          const bool is_fine = protocol::signal_epoch(word) == op_.round_epoch(round) &&
                               count <= layout_.num_tokens_per_round() && count <= num_left &&
                               (!is_last || count == num_left);
          return is_fine || op_.corrupt(r, num_left, count);
        });
    if (!ok) return false;
    for (uint32_t src = 0; src < op_.num_ranks(); ++src) {
      copy_rows(layout_.staged_row(bank, src, 0), shared_.next_row[src], shared_.num_in_round[src]);
    }
    return true;
  }

  __device__ void copy_rows(uint64_t staged, uint64_t row, uint64_t count) const {
    const NormalOutputs& out = params_.out;
    const uint64_t k_bytes = layout_.config().top_k * uint64_t{4};
    const uint64_t scale_bytes = layout_.num_scale_words() * uint64_t{4};
    copy(out.recv_x, row, layout_.row(staged), layout_.dispatch_row_bytes(), count);
    copy(out.recv_scales, row, layout_.scales(staged), scale_bytes, count);
    copy(out.recv_topk_idx, row, layout_.topk_idx(staged), k_bytes, count);
    copy(out.recv_topk_weights, row, layout_.topk_weights(staged), k_bytes, count);
    copy(out.recv_src_tokens, row, layout_.src_token(staged), 4, count);
  }
  __device__ void copy(void* out, uint64_t row, uint64_t offset, uint64_t bytes,
                       uint64_t count) const {
    if (out == nullptr) return;
    copy_by_all(static_cast<std::byte*>(out) + row * bytes, op_.self() + offset, count * bytes);
  }

  const Op& op_;
  const NormalDeviceLayout& layout_;
  const NormalDispatch& params_;
  Shared& shared_;
  uint32_t num_rounds_;
};

template <typename Rows>
__global__ void __launch_bounds__(kSendThreads, 1)
    normal_dispatch_kernel(const __grid_constant__ NormalView rank,
                           const __grid_constant__ Rows rows,
                           const __grid_constant__ NormalDispatch params) {
  extern __shared__ __align__(128) std::byte buffers[];
  __shared__ Shared shared;
  if (threadIdx.x < kSendWarps) ptx::mbarrier_init(&shared.barriers[threadIdx.x], 1);
  ptx::touch(rank);
  ptx::touch(params);
  const Op op(rank, Phase::kDispatch);
  const uint32_t num_ranks = op.num_ranks();
  const bool is_last_block = blockIdx.x == gridDim.x - 1;
  if (!op.ok()) return;
  if (params.start == DispatchStart::kRoute) {
    auto* experts = reinterpret_cast<uint32_t*>(buffers);
    if (!Router(op, params, &shared.route, experts).run()) return;
  } else if (params.start == DispatchStart::kCached && is_last_block && threadIdx.x < num_ranks) {
    op.publish_ready(threadIdx.x, 0);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  RowSender<Rows> sender(op, rows, params, buffers, shared.barriers);
  const bool resumes = params.start == DispatchStart::kResume;
  if (!resumes) sender.fetch_first();
  const bool has_ranges = find_ranges(op, params, &shared.ranges);
  const bool is_direct = has_ranges && shared.ranges.is_direct(rank.layout);
  if (!is_direct) sender.forget_first();
  if (!has_ranges) return;
  bool writes_counts = params.start == DispatchStart::kRoute && is_last_block;
  if (writes_counts && (params.ticket != 0 || !is_direct)) {
    write_counts(op, params, shared.ranges);
    writes_counts = false;
  }
  const uint64_t num_rows = shared.ranges.first_received[num_ranks];
  if (num_rows > params.num_rows) {
    sender.forget_first();
    fail(rank, op.id(Half::kRecv), Status::kTooManyRows, rank.self_rank, params.num_rows, num_rows,
         0);
    return;
  }
  if (is_direct) {
    send_directly(op, params, shared.ranges, writes_counts, &sender);
    return;
  }
  if (params.ticket != 0 && !resumes) return;  // the host makes room and calls again
  if (!params.may_come_in_rounds) {
    fail(rank, op.id(Half::kRecv), Status::kTooManyRows, shared.ranges.rank_of_most,
         rank.layout.config().num_rows, shared.ranges.most_rows, 0);
    return;
  }
  Rounds rounds(op, params, &shared);
  if (rounds.run(&sender) && op.arrive_last() && threadIdx.x == 0) op.complete(rounds.size());
}

// For a dispatch whose host learned N first.
__global__ void __launch_bounds__(kSendThreads, 1)
    normal_unpack_kernel(const __grid_constant__ NormalView rank, const uint32_t* batch,
                         const __grid_constant__ NormalOutputs out) {
  __shared__ RowRanges ranges;
  ptx::wait_for_earlier_kernels();
  const uint32_t num_ranks = rank.layout.config().num_ranks;
  if (ptx::ld_relaxed_gpu(&rank.state->failed) != 0) return;
  ranges.find(num_ranks, rank.self_rank, [&](uint32_t src, uint32_t column) {
    return batch[batch_idx(num_ranks, src, column)];
  });
  unpack(rank, ranges.first_received[num_ranks], out);
}

}  // namespace
}  // namespace normal

void prepare_normal_dispatch() {
  Launch::prepare(normal::normal_dispatch_kernel<normal::CopiedRows>);
  Launch::prepare(normal::normal_dispatch_kernel<normal::QuantizedRows<__nv_bfloat16>>);
  Launch::prepare(normal::normal_dispatch_kernel<normal::QuantizedRows<float>>);
  Launch::prepare(normal::normal_unpack_kernel);
}

uint32_t normal_dispatch_threads() { return normal::kSendThreads; }

void launch_normal_dispatch(const NormalView& rank, const NormalDispatch& params,
                            const Launch& launch) {
  const NormalDeviceLayout& layout = rank.layout;
  const uint32_t num_scales = layout.num_scales();
  const protocol::ScaleFormat format = layout.config().scale_format;
  auto run = [&](auto rows) {
    launch.run(normal::normal_dispatch_kernel<decltype(rows)>, rows.kSharedBytes, rank, rows,
               params);
  };
  if (num_scales == 0 || params.x_is_quantized) {
    run(normal::CopiedRows(params.x, params.x_scales, layout.dispatch_row_bytes(), num_scales));
  } else if (layout.config().dtype == protocol::DType::kBFloat16) {
    run(normal::QuantizedRows<__nv_bfloat16>(params.x, layout.row_bytes(), num_scales, format));
  } else {
    run(normal::QuantizedRows<float>(params.x, layout.row_bytes(), num_scales, format));
  }
}

void launch_normal_unpack(const NormalView& rank, const uint32_t* batch,
                          const NormalOutputs& outputs, const Launch& launch) {
  launch.run(normal::normal_unpack_kernel, 0, rank, batch, outputs);
}

}  // namespace ep::cuda
