// Rounds of a combine between nodes; the meaning is in csrc/cpu/normal_nodes_combine.cpp.
//
// One kernel: rows go to where their tokens' node's forwarder, or their token, adds them up; then a
// warp adds up a token of another node and puts the sum home, or one of this rank.

#include "cuda/sum.cuh"
#include "nvshmem/normal_routes.cuh"

namespace ep::nvshmem {
namespace normal {
namespace {

using protocol::kMaxTopK;

// Rows to add up, in this order; those of [own_begin, own_end) are added and rounded first.
struct Terms {
  const std::byte* rows[kMaxTopK + 2];
  uint32_t own_begin, own_end, size;
};

struct Shared {
  SourceRows rows;
  Terms terms[kNodeWarps];
  uint32_t begins[kMaxRanks], ends[kMaxRanks];  // of this round's rows from each source
  uint32_t num_from_node[kMaxRanks];            // tokens of other nodes
  uint32_t prefix[kMaxRanks + 1];
};

// One warp. Every sum is rounded on its own, as in csrc/cpu/rows.cpp.
template <typename T>
__device__ void add_up_rows(const Terms& terms, uint32_t num_vectors, std::byte* out) {
  constexpr uint32_t kAtOnce = 4;
  for (uint32_t first = threadIdx.x % kWarp; first < num_vectors; first += kAtOnce * kWarp) {
    cuda::Sum<T> sums[kAtOnce], own[kAtOnce];
#pragma unroll
    for (uint32_t v = 0; v < kAtOnce; ++v) {
      sums[v].start(cuda::start_of_sum(terms.size));
      own[v].start(cuda::start_of_sum(terms.own_end - terms.own_begin));
    }
    for (uint32_t i = 0; i < terms.size; ++i) {
      const auto* row = reinterpret_cast<const uint4*>(terms.rows[i]) + first;
      uint4 vectors[kAtOnce];
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        vectors[v] = {};
        if (first + v * kWarp < num_vectors) vectors[v] = ptx::ld_row(row + v * kWarp);
      }
      const bool is_own = terms.own_begin <= i && i < terms.own_end;
#pragma unroll
      for (uint32_t v = 0; v < kAtOnce; ++v) {
        if (is_own) {
          own[v].add(vectors[v], 1.0f);
          if (i + 1 < terms.own_end) continue;
          vectors[v] = own[v].rounded();
        }
        sums[v].add(vectors[v], 1.0f);
      }
    }
#pragma unroll
    for (uint32_t v = 0; v < kAtOnce; ++v) {
      if (first + v * kWarp < num_vectors) {
        reinterpret_cast<uint4*>(out)[first + v * kWarp] = sums[v].rounded();
      }
    }
  }
}

template <typename T>
class Combiner {
 public:
  __device__ Combiner(const NodeOp& op, const NodeCombine& params, Shared* shared)
      : op_(op),
        layout_(op.nodes_layout()),
        params_(params),
        shared_(*shared),
        terms_(shared->terms[threadIdx.x / kWarp]),
        top_k_(layout_.base().config().top_k),
        num_vectors_(static_cast<uint32_t>(layout_.base().row_bytes() / sizeof(uint4))),
        flags_(params.has_topk_weights ? static_cast<uint32_t>(protocol::kTaggedBit) : 0),
        lane_(threadIdx.x % kWarp),
        first_(threadIdx.x / kWarp * gridDim.x + blockIdx.x),
        step_(gridDim.x * kNodeWarps) {}

  // The rows of this round's tokens, of each source, and where this rank's own tokens are. Whole
  // block.
  __device__ void send(uint32_t round) const {
    const uint32_t num_ranks = op_.num_ranks(), bank = op_.bank(round), r = threadIdx.x;
    if (r < num_ranks) {
      shared_.begins[r] = first_row(r, uint64_t{round} * op_.per_round());
      shared_.ends[r] = first_row(r, uint64_t{round + 1} * op_.per_round());
    }
    const uint32_t num_rows = count_up(num_ranks, shared_.prefix, [&](uint32_t src) {
      return shared_.ends[src] - shared_.begins[src];
    });
    for (uint32_t i = first_; i < num_rows; i += step_) {
      const uint32_t src = cuda::source_of(shared_.prefix, num_ranks, i);
      const uint32_t slot = i - shared_.prefix[src];
      send_row(bank, src, slot, uint64_t{shared_.begins[src]} + slot);
    }
    const RoundTokens tokens = tokens_of(round);
    for (uint64_t token = uint64_t{tokens.begin} + first_; token < tokens.end; token += step_) {
      stage_routes(bank, static_cast<uint32_t>(token));
    }
    if (!op_.arrive(Step::kSent, round)) return;
    if (r < op_.nodes().ranks_per_node) {
      const uint32_t home = op_.view().neighbour(r);
      op_.publish_signal(round, op_.self_rank(), home,
                         (shared_.ends[home] - shared_.begins[home]) | flags_);
    }
    send_routes(op_, round, Arrival::kRoutes, params_.routes, tokens.begin < tokens.end, flags_);
  }

  // Whole block. False: end the kernel.
  __device__ bool receive(uint32_t round) const {
    if (!wait_for_node(round) || !add_up_for_nodes(round) || !wait_for_nodes(round)) return false;
    const RoundTokens tokens = tokens_of(round);
    for (uint64_t token = uint64_t{tokens.begin} + first_; token < tokens.end; token += step_) {
      add_up_token(op_.bank(round), static_cast<uint32_t>(token));
    }
    if (op_.arrive(Step::kReceived, round)) {
      op_.publish_credits(round, Arrival::kRoutes, Arrival::kSums);
    }
    return true;
  }

 private:
  __device__ RoundTokens tokens_of(uint32_t round) const {
    return RoundTokens(round, op_.per_round(), params_.routes.num_tokens);
  }
  __device__ const uint32_t* messages_of(uint32_t token) const {
    return params_.routes.messages + uint64_t{token} * layout_.base().num_max_messages_per_token();
  }
  __device__ const uint32_t* node_slots_of(uint32_t token) const {
    return params_.routes.node_slots + uint64_t{token} * min(op_.num_remote(), top_k_);
  }
  // Messages of this round's tokens: for a rank, or, behind all ranks, for another node.
  __device__ uint32_t round_count(uint32_t round, uint32_t target) const {
    const RoundTokens tokens = tokens_of(round);
    if (tokens.begin == tokens.end) return 0;
    const uint32_t num_columns = op_.num_ranks() + op_.num_remote();
    return params_.routes.round_counts[uint64_t{round} * num_columns + target];
  }
  __device__ uint64_t row_at(uint64_t message) const { return message + layout_.row_in_message(); }
  __device__ float* weights_at(std::byte* base, uint64_t message) const {
    return at<float>(base, message + layout_.weights_in_message());
  }

  // The first of this rank's rows from `src` whose token is `token` or later.
  __device__ uint32_t first_row(uint32_t src, uint64_t token) const {
    const uint32_t* first_of_rank = shared_.rows.first_row;
    return cuda::normal::first_row(params_.recv_src_tokens, first_of_rank[src],
                                   first_of_rank[src + 1], token);
  }

  // To where the message lay that it answers: on its source, or on that one's forwarder here. One
  // warp.
  __device__ void send_row(uint32_t bank, uint32_t src, uint32_t slot, uint64_t row) const {
    const uint32_t dst_rank = op_.view().forwarder_here(src);
    const uint32_t as_rank = op_.nodes().forwarder(op_.nodes().node_of(src), op_.self_rank());
    const uint64_t message = layout_.base().message(bank, as_rank, slot);
    std::byte* dst = op_.neighbour(dst_rank);
    const uint64_t row_bytes = layout_.base().row_bytes();
    cuda::normal::copy_flat(dst + row_at(message), params_.x + row * row_bytes, row_bytes, lane_,
                            kWarp);
    if (!params_.has_topk_weights) return;
    for (uint32_t k = lane_; k < top_k_; k += kWarp) {
      weights_at(dst, message)[k] = params_.topk_weights[row * top_k_ + k];
    }
  }
  // A lane a node.
  __device__ void stage_routes(uint32_t bank, uint32_t token) const {
    const uint64_t ranks = params_.routes.ranks[token];
    for (uint32_t remote = lane_; remote < op_.num_remote(); remote += kWarp) {
      const uint32_t node = op_.nodes().remote_node(op_.view().self_node(), remote);
      if (ranks_of_node(op_.nodes(), ranks, node) == 0) continue;
      const uint32_t slot = node_slots_of(token)[nodes_before(op_.view(), ranks, remote)];
      stage_route(op_, bank, messages_of(token), ranks, remote, slot);
    }
  }

  // Waits for: this node's rows, and where other nodes' tokens are.
  __device__ bool wait_for_node(uint32_t round) const {
    const uint32_t thread = threadIdx.x;
    bool ok = true;
    if (thread < op_.nodes().ranks_per_node) {
      const uint32_t r = op_.view().neighbour(thread);
      ok = wait_for_rows(round, r, round_count(round, r));
    }
    if (thread < op_.num_remote()) {
      const uint32_t home = op_.view().forwarder_on(thread);
      uint32_t seen = 0;
      ok = op_.wait_for_node_signal(round, thread, &seen) && ok;
      const uint32_t count = seen ^ flags_;
      if (ok && count > op_.per_round()) ok = op_.corrupt(round, home, flags_, seen);
      ok = ok && op_.have_arrived(round, Arrival::kRoutes, thread, count > 0);
      shared_.num_from_node[thread] = count;
    }
    return __syncthreads_and(ok);
  }
  // Waits for: what other nodes have added up for this rank's tokens.
  __device__ bool wait_for_nodes(uint32_t round) const {
    const uint32_t remote = threadIdx.x;
    bool ok = true;
    if (remote < op_.num_remote()) {
      const uint32_t count = round_count(round, op_.num_ranks() + remote);
      ok = wait_for_rows(round, op_.view().forwarder_on(remote), count) &&
           op_.have_arrived(round, Arrival::kSums, remote, count);
    }
    return __syncthreads_and(ok);
  }
  __device__ bool wait_for_rows(uint32_t round, uint32_t r, uint32_t count) const {
    uint32_t seen;
    if (!op_.wait_for_signal(round, r, r, &seen)) return false;
    return seen == (count | flags_) || op_.corrupt(round, r, count | flags_, seen);
  }

  // Whole block.
  __device__ bool add_up_for_nodes(uint32_t round) const {
    const uint32_t num_remote = op_.num_remote();
    const uint32_t num_tokens = count_up(
        num_remote, shared_.prefix, [&](uint32_t remote) { return shared_.num_from_node[remote]; });
    bool ok = true;
    for (uint32_t i = first_; i < num_tokens; i += step_) {
      const uint32_t remote = cuda::source_of(shared_.prefix, num_remote, i);
      ok = add_up_for_node(round, remote, i - shared_.prefix[remote]) && ok;
    }
    if (!__syncthreads_and(ok)) return false;
    if (op_.arrive(Step::kForwarded, round) && threadIdx.x < num_remote) {
      op_.store(
          op_.view().forwarder_on(threadIdx.x),
          layout_.base().signal(op_.bank(round), Phase::kCombine, op_.self_rank()),
          protocol::pack_signal(op_.epoch(round), shared_.num_from_node[threadIdx.x] | flags_));
    }
    return true;
  }
  // One warp.
  __device__ bool add_up_for_node(uint32_t round, uint32_t remote, uint32_t slot) const {
    const uint32_t bank = op_.bank(round), home = op_.view().forwarder_on(remote);
    Route route;
    __syncwarp();  // the terms of the token before have been used
    if (!route.read(op_, round, remote, slot)) return false;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t i = half * kWarp + lane_;
      if (i >= route.num_ranks) continue;
      const uint32_t as_rank =
          op_.nodes().forwarder(op_.nodes().node_of(home), route.messages[half] >> 16);
      terms_.rows[i] =
          op_.self() + row_at(layout_.base().message(bank, as_rank, route.messages[half] & 0xffff));
    }
    if (lane_ == 0) terms_.own_begin = terms_.own_end = 0, terms_.size = route.num_ranks;
    __syncwarp();
    const uint64_t staged = layout_.node_outbox(bank, remote, slot);
    add_up_rows<T>(terms_, num_vectors_, op_.self() + row_at(staged));
    for (uint32_t k = lane_; k < top_k_ && params_.has_topk_weights; k += kWarp) {
      float sum = 0.0f;
      for (uint32_t i = 0; i < route.num_ranks; ++i) sum = plus(sum, weight_of(i, k), i == 0);
      weights_at(op_.self(), staged)[k] = sum;
    }
    const uint64_t first =
        params_.has_topk_weights ? layout_.weights_in_message() : layout_.row_in_message();
    op_.put(round, Arrival::kSums, remote,
            layout_.node_inbox(bank, op_.view().idx_at(home), slot) + first, staged + first,
            layout_.row_in_message() + layout_.base().row_bytes() - first);
    return true;
  }

  // One warp.
  __device__ void add_up_token(uint32_t bank, uint32_t token) const {
    const uint32_t num_rows = find_terms(bank, token);
    std::byte* out = params_.out + token * layout_.base().row_bytes();
    add_up_rows<T>(terms_, num_vectors_, out);
    for (uint32_t k = lane_; k < top_k_ && params_.has_topk_weights; k += kWarp) {
      float sum = 0.0f, own = 0.0f;
      for (uint32_t i = 0; i < num_rows; ++i) {
        float weight = weight_of(i, k);
        const bool is_own = terms_.own_begin <= i && i < terms_.own_end;
        if (is_own) {
          own = plus(own, weight, i == terms_.own_begin);
          if (i + 1 < terms_.own_end) continue;
          weight = own;
        }
        sum = plus(sum, weight, i == 0 || (is_own && terms_.own_begin == 0));
      }
      params_.combined_topk_weights[uint64_t{token} * top_k_ + k] = sum;
    }
  }
  // A lane a node: its own one's rows, or another one's sum; the biases behind them. Returns how
  // many there are without those.
  __device__ uint32_t find_terms(uint32_t bank, uint32_t token) const {
    const protocol::Nodes& nodes = op_.nodes();
    const uint64_t ranks = params_.routes.ranks[token];
    const uint32_t self_node = op_.view().self_node(), num_nodes = nodes.num_nodes();
    __syncwarp();  // the terms of the token before have been used
    uint32_t num_terms = 0;
    for (uint32_t first = 0; first < num_nodes; first += kWarp) {
      const uint32_t node = first + lane_;
      const uint64_t of_node = node < num_nodes ? ranks_of_node(nodes, ranks, node) : 0;
      // Terms that come before this node's.
      const bool is_self = node == self_node;
      const uint32_t count = is_self ? __popcll(of_node) : of_node != 0;
      uint32_t place = num_terms, all = 0;
      for (uint32_t other = 0; other < kWarp; ++other) {
        const uint32_t theirs = __shfl_sync(kAllLanes, count, other);
        if (other < lane_) place += theirs;
        all += theirs;
      }
      if (is_self) {
        write_own(bank, token, ranks, place, count);
      } else if (count > 0) {
        const uint32_t remote = nodes.remote_idx(self_node, node);
        const uint32_t slot = node_slots_of(token)[nodes_before(op_.view(), ranks, remote)];
        terms_.rows[place] = op_.self() + row_at(layout_.node_inbox(bank, remote, slot));
      }
      num_terms += all;
    }
    if (lane_ == 0) {
      terms_.size = num_terms;
      for (const std::byte* bias : params_.bias) {
        if (bias == nullptr) continue;
        terms_.rows[terms_.size++] = bias + token * layout_.base().row_bytes();
      }
    }
    __syncwarp();
    return num_terms;
  }
  // One lane.
  __device__ void write_own(uint32_t bank, uint32_t token, uint64_t ranks, uint32_t place,
                            uint32_t count) const {
    const uint32_t first = ranks_before(ranks, op_.view().neighbour(0));
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t message = messages_of(token)[first + i];
      terms_.rows[place + i] =
          op_.self() + row_at(layout_.base().message(bank, message >> 16, message & 0xffff));
    }
    terms_.own_begin = place, terms_.own_end = place + count;
  }

  // Of the message whose row is the i-th term.
  __device__ float weight_of(uint32_t i, uint32_t k) const {
    const auto* weights = reinterpret_cast<const uint32_t*>(
        terms_.rows[i] - layout_.row_in_message() + layout_.weights_in_message());
    return __uint_as_float(ptx::ld_relaxed_sys(weights + k));
  }
  __device__ static float plus(float sum, float term, bool is_first) {
    return is_first ? term : __fadd_rn(sum, term);
  }

  const NodeOp& op_;
  const NormalNodeLayout& layout_;
  const NodeCombine& params_;
  Shared& shared_;
  Terms& terms_;
  uint32_t top_k_, num_vectors_, flags_, lane_;
  uint32_t first_, step_;  // what this warp does of the grid's
};

template <typename T>
__global__ void __launch_bounds__(kNodeThreads, 1)
    node_combine_kernel(const __grid_constant__ NodeRankView rank,
                        const __grid_constant__ NodeCombine params) {
  __shared__ Shared shared;
  const NodeOp op(rank, Phase::kCombine);
  if (!op.ok()) return;
  shared.rows.find(rank, params.routes.sources);
  if (!op.wait_until_emptied()) return;
  const Combiner<T> combiner(op, params, &shared);
  const bool is_done = run_rounds(
      op, shared.rows.num_rounds, [&](uint32_t round) { combiner.send(round); },
      [&](uint32_t round) { return combiner.receive(round); });
  if (is_done && op.arrive_last() && threadIdx.x == 0) op.complete(shared.rows.num_rounds);
}

}  // namespace
}  // namespace normal

void prepare_node_combine() {
  cuda::Launch::prepare(normal::node_combine_kernel<__nv_bfloat16>);
  cuda::Launch::prepare(normal::node_combine_kernel<float>);
}

void launch_node_combine(const NodeRankView& rank, const NodeCombine& params,
                         const cuda::Launch& launch) {
  if (rank.layout.nodes().base().config().dtype == protocol::DType::kBFloat16) {
    launch.run(normal::node_combine_kernel<__nv_bfloat16>, 0, rank, params);
  } else {
    launch.run(normal::node_combine_kernel<float>, 0, rank, params);
  }
}

}  // namespace ep::nvshmem
