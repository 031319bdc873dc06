// Who gets which token, and how many: topk_idx [T, K] becomes the messages of each token and the
// counts of the batch, which all ranks exchange. csrc/cpu/normal_dispatch.cpp has a worked example,
// csrc/cpu/normal_nodes_dispatch.cpp one of what goes between nodes.
//
// A first kernel finds each token's ranks. In a second, a block numbers all messages for a rank, or
// for another node, round by round; the block that ends last exchanges the counts.

#include "nvshmem/normal_op.cuh"

namespace ep::nvshmem {
namespace normal {
namespace {

using protocol::BatchCounts;

// A token a thread. A token may list an expert twice: that is one row of it.
__global__ void __launch_bounds__(kNodeThreads, 1)
    node_ranks_kernel(const __grid_constant__ NodeRankView rank,
                      const __grid_constant__ NodeCounts params) {
  extern __shared__ uint32_t num_listed[];  // [E] by this block's tokens
  const auto& config = rank.layout.nodes().base().config();
  const uint32_t top_k = config.top_k, num_experts = config.num_experts;
  if (ptx::ld_relaxed_gpu(&rank.state->failed) != 0) return;
  auto expert_at = [&](uint32_t token, uint32_t k) -> int64_t {
    const uint64_t i = uint64_t{token} * top_k + k;
    return params.topk_idx_is_int64 ? static_cast<const int64_t*>(params.topk_idx)[i]
                                    : static_cast<const int32_t*>(params.topk_idx)[i];
  };
  for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x) num_listed[e] = 0;
  __syncthreads();
  const uint32_t num_threads = gridDim.x * blockDim.x;
  for (uint64_t t = blockIdx.x * blockDim.x + threadIdx.x; t < params.routes.num_tokens;
       t += num_threads) {
    const auto token = static_cast<uint32_t>(t);
    uint64_t ranks = 0;
    for (uint32_t k = 0; k < top_k; ++k) {
      const int64_t expert = expert_at(token, k);
      if (expert == -1) continue;
      if (expert < 0 || expert >= num_experts) {
        cuda::refuse_expert(rank, token, k, expert);
        break;
      }
      ranks |= uint64_t{1} << rank.owners.owner(static_cast<uint32_t>(expert));
      bool is_listed = false;
      for (uint32_t before = 0; before < k; ++before) {
        is_listed |= expert_at(token, before) == expert;
      }
      if (!is_listed) atomicAdd(&num_listed[expert], 1);
    }
    params.routes.ranks[token] = ranks;
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
    if (num_listed[e] > 0) atomicAdd(&rank.expert_counts[e], num_listed[e]);
  }
}

// Numbers the messages for one rank, or, behind all ranks, for one other node. Whole block.
class Numberer {
 public:
  __device__ Numberer(const NodeOp& op, const NodeRoutes& routes, uint32_t target)
      : op_(op),
        routes_(routes),
        target_(target),
        is_node_(target >= op.num_ranks()),
        remote_(target - op.num_ranks()) {}

  __device__ void run(uint32_t* warp_counts) const {
    const uint32_t per_round = op_.per_round(), num_targets = op_.num_ranks() + op_.num_remote();
    const uint32_t num_rounds = (routes_.num_tokens + per_round - 1) / per_round;
    uint64_t total = 0;
    for (uint32_t round = 0; round < num_rounds; ++round) {
      const RoundTokens tokens(round, per_round, routes_.num_tokens);
      uint32_t count = 0;
      for (uint32_t first = tokens.begin; first < tokens.end; first += blockDim.x) {
        count += number(first + threadIdx.x, tokens.end, count, warp_counts);
      }
      if (threadIdx.x == 0) routes_.round_counts[uint64_t{round} * num_targets + target_] = count;
      total += count;
    }
    if (threadIdx.x == 0 && !is_node_) op_.rank().num_rows_to[target_] = total;
  }

 private:
  // A token a thread, of which `before` come ahead in this round. Returns how many go there.
  __device__ uint32_t number(uint32_t token, uint32_t end, uint32_t before,
                             uint32_t* warp_counts) const {
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint64_t ranks = token < end ? routes_.ranks[token] : 0;
    const bool goes =
        is_node_ ? ranks_of_node(op_.nodes(), ranks, node()) != 0 : (ranks >> target_ & 1) != 0;
    const uint32_t lanes = __ballot_sync(kAllLanes, goes);
    if (lane == 0) warp_counts[warp] = __popc(lanes);
    __syncthreads();
    uint32_t sum = 0;
    for (uint32_t w = 0; w < kNodeWarps; ++w) {
      if (w == warp) before += sum;
      sum += warp_counts[w];
    }
    __syncthreads();
    if (goes) write(token, ranks, before + __popc(lanes & ((1u << lane) - 1)));
    return sum;
  }
  __device__ void write(uint32_t token, uint64_t ranks, uint32_t slot) const {
    if (is_node_) {
      const uint32_t num_columns = min(op_.num_remote(), op_.layout().config().top_k);
      const uint32_t column = nodes_before(op_.view(), ranks, remote_);
      routes_.node_slots[uint64_t{token} * num_columns + column] = slot;
    } else {
      const uint32_t num_columns = op_.layout().num_max_messages_per_token();
      const uint32_t column = ranks_before(ranks, target_);
      routes_.messages[uint64_t{token} * num_columns + column] = target_ << 16 | slot;
    }
  }
  __device__ uint32_t node() const {
    return op_.nodes().remote_node(op_.view().self_node(), remote_);
  }

  const NodeOp& op_;
  const NodeRoutes& routes_;
  uint32_t target_;
  bool is_node_;
  uint32_t remote_;
};

// The counts of all ranks. One block; each step returns false where the kernel must end.
class Exchange {
 public:
  __device__ Exchange(const NodeOp& op, const NodeCounts& params, SourceRows* rows)
      : op_(op), rank_(op.rank()), layout_(op.nodes_layout()), params_(params), rows_(*rows) {}

  __device__ bool run() const {
    if (!op_.wait_until_emptied()) return false;
    write_all();
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < layout_.base().config().num_experts; e += blockDim.x) {
      rank_.expert_counts[e] = 0;  // for the next batch
    }
    send();
    if (!forward() || !read()) return false;
    op_.publish_credits(0, Arrival::kDispatch, Arrival::kDispatch);
    tell();
    const uint64_t num_rows = rows_.first_row[op_.num_ranks()];
    if (num_rows <= params_.num_rows) return true;
    if (threadIdx.x == 0) {
      fail(rank_, op_.id(Half::kRecv, 0), Status::kTooManyRows, rank_.self_rank, params_.num_rows,
           num_rows, 0);
    }
    return false;
  }

 private:
  // This batch's, for every rank: to those of this node, and for the others to where they are put.
  __device__ void write_all() const {
    for (uint32_t r = threadIdx.x / kWarp; r < op_.num_ranks(); r += kNodeWarps) {
      const bool is_local = op_.view().is_local(r);
      const uint64_t staged =
          is_local ? 0
                   : layout_.staged_counts(op_.view().remote_idx(r), op_.nodes().rank_in_node(r));
      auto* out = is_local ? at<uint64_t>(op_.neighbour(r), layout_.base().counts(rank_.self_rank))
                           : at<uint64_t>(op_.self(), staged);
      const uint32_t first = rank_.owners.first_expert(r);
      const uint32_t num_local = rank_.owners.first_expert(r + 1) - first;
      for (uint32_t e = threadIdx.x % kWarp; e < num_local; e += kWarp) {
        out[sizeof(BatchCounts) / 8 + e] = ptx::ld_relaxed_gpu(&rank_.expert_counts[first + e]);
      }
      if (threadIdx.x % kWarp == 0) {
        *reinterpret_cast<BatchCounts*>(out) = {op_.epoch(0), params_.routes.num_tokens,
                                                rank_.num_rows_to[r]};
      }
    }
    ptx::fence_acq_rel_sys();
  }
  __device__ void send() const {
    for (uint32_t remote = threadIdx.x / kWarp; remote < op_.num_remote(); remote += kNodeWarps) {
      const uint32_t here = op_.view().idx_at(op_.view().forwarder_on(remote));
      op_.put(0, Arrival::kDispatch, remote, layout_.node_counts(here, 0),
              layout_.staged_counts(remote, 0), layout_.node_counts_bytes());
      if (threadIdx.x % kWarp == 0) op_.signal_node(0, remote, 0);
    }
    if (threadIdx.x < op_.nodes().ranks_per_node) {
      op_.publish_signal(0, rank_.self_rank, op_.view().neighbour(threadIdx.x), 0);
    }
  }
  // Waits for: the counts of this rank's sources on other nodes. Passes them on.
  __device__ bool forward() const {
    const uint32_t remote = threadIdx.x, per_node = op_.nodes().ranks_per_node;
    bool ok = true;
    uint32_t count;
    if (remote < op_.num_remote()) {
      ok = op_.wait_for_node_signal(0, remote, &count) &&
           op_.have_arrived(0, Arrival::kDispatch, remote, 1);
    }
    if (!__syncthreads_and(ok)) return false;
    const auto num_words = static_cast<uint32_t>(layout_.counts_stride() / 8);
    const uint32_t num_pairs = op_.num_remote() * per_node;
    for (uint32_t i = threadIdx.x / kWarp; i < num_pairs; i += kNodeWarps) {
      const uint32_t from = i / per_node, to = op_.view().neighbour(i % per_node);
      const uint32_t src_rank = op_.view().forwarder_on(from);
      const auto* in = at<uint64_t>(op_.self(), layout_.node_counts(from, i % per_node));
      auto* out = at<uint64_t>(op_.neighbour(to), layout_.base().counts(src_rank));
      for (uint32_t word = threadIdx.x % kWarp; word < num_words; word += kWarp) {
        out[word] = ptx::ld_relaxed_sys(in + word);
      }
      __syncwarp();
      if (threadIdx.x % kWarp == 0) op_.publish_signal(0, src_rank, to, 0);
    }
    return true;
  }
  // Waits for: every rank's counts. -> the handle's, and the caller's totals.
  __device__ bool read() const {
    const uint32_t src_rank = threadIdx.x;
    bool ok = true;
    uint32_t count;
    if (src_rank < op_.num_ranks()) {
      const uint32_t writer = op_.view().forwarder_here(src_rank);
      ok = op_.wait_for_signal(0, src_rank, writer, &count) && read_source(src_rank);
    }
    if (!__syncthreads_and(ok)) return false;
    for (uint32_t e = threadIdx.x; e < rank_.num_local_experts; e += blockDim.x) {
      uint64_t sum = 0;
      for (uint32_t src = 0; src < op_.num_ranks(); ++src) {
        sum += ptx::ld_relaxed_sys(at<uint64_t>(op_.self(), layout_.base().expert_counts(src)) + e);
      }
      params_.num_recv_tokens_per_expert[e] = static_cast<int32_t>(sum);
      if (params_.ticket != 0) {
        reinterpret_cast<uint32_t*>(rank_.host_counts + 1)[e] = static_cast<uint32_t>(sum);
      }
    }
    rows_.find(rank_, params_.routes.sources);
    return true;
  }
  __device__ bool read_source(uint32_t src_rank) const {
    const auto* words = at<uint64_t>(op_.self(), layout_.base().counts(src_rank));
    const BatchCounts counts = {ptx::ld_relaxed_sys(words), ptx::ld_relaxed_sys(words + 1),
                                ptx::ld_relaxed_sys(words + 2)};
    if (counts.epoch != op_.epoch(0)) {
      return op_.corrupt(0, src_rank, op_.epoch(0), counts.epoch);
    }
    if (counts.num_rows > counts.num_tokens) {
      return op_.corrupt(0, src_rank, counts.num_tokens, counts.num_rows);
    }
    params_.routes.sources[2 * src_rank] = static_cast<uint32_t>(counts.num_tokens);
    params_.routes.sources[2 * src_rank + 1] = static_cast<uint32_t>(counts.num_rows);
    return true;
  }
  // The host, where it waits.
  __device__ void tell() const {
    ptx::fence_acq_rel_sys();
    __syncthreads();
    if (params_.ticket == 0 || threadIdx.x != 0) return;
    cuda::HostCounts* host = rank_.host_counts;
    host->num_rows = rows_.first_row[op_.num_ranks()];
    host->num_rounds = rows_.num_rounds;
    ptx::fence_acq_rel_sys();
    ptx::st_relaxed_sys(&host->ticket, params_.ticket);
  }

  const NodeOp& op_;
  const NodeRankView& rank_;
  const NormalNodeLayout& layout_;
  const NodeCounts& params_;
  SourceRows& rows_;
};

__global__ void __launch_bounds__(kNodeThreads, 1)
    node_counts_kernel(const __grid_constant__ NodeRankView rank,
                       const __grid_constant__ NodeCounts params) {
  __shared__ uint32_t warp_counts[kNodeWarps];
  __shared__ SourceRows rows;
  const NodeOp op(rank, Phase::kDispatch);
  if (!op.ok()) return;
  const uint32_t num_targets = op.num_ranks() + op.num_remote();
  for (uint32_t target = blockIdx.x; target < num_targets; target += gridDim.x) {
    Numberer(op, params.routes, target).run(warp_counts);
  }
  if (!op.arrive_last() || !Exchange(op, params, &rows).run()) return;
  if (threadIdx.x == 0) op.complete(1, true);
}

}  // namespace
}  // namespace normal

void prepare_node_counts() {
  cuda::Launch::prepare(normal::node_ranks_kernel);
  cuda::Launch::prepare(normal::node_counts_kernel);
}

void launch_node_counts(const NodeRankView& rank, const NodeCounts& params,
                        const cuda::Launch& launch) {
  const uint64_t num_experts = rank.layout.nodes().base().config().num_experts;
  launch.run(normal::node_ranks_kernel, num_experts * sizeof(uint32_t), rank, params);
  launch.run(normal::node_counts_kernel, 0, rank, params);
}

}  // namespace ep::nvshmem
