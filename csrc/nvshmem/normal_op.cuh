// What the normal kernels over a network have in common: signals and credits, puts and their
// arrival, rounds.
//
// No order is asked of the network but one: a put's payload is there before the 1 that it adds to a
// word of its receiver. A signal to another node, which says how many puts there are, is written
// alone, and may come before them. A credit to another node is 1, added.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/normal_rank.cuh"
#include "cuda/part.cuh"
#include "nvshmem/normal_launch.cuh"

namespace ep::nvshmem {

using cuda::at;
using cuda::fail;
using cuda::kAllLanes;
using cuda::kWarp;
using protocol::Arrival;
using protocol::Half;
using protocol::kNumRoundBanks;
using protocol::NormalNodeLayout;
using protocol::Phase;
using protocol::Status;

constexpr uint32_t kNodeWarps = kNodeThreads / kWarp;
constexpr uint32_t kMaxRanks = protocol::kNumMaxDeviceRanks;
constexpr uint32_t kRoundsInFlight = 4;  // more than blocks of one rank can be apart

// Parts of a round, at the end of each of which all blocks arrive.
enum class Step : uint32_t { kSent = 0, kForwarded = 1, kReceived = 2 };
constexpr uint32_t kNumSteps = 3;

// On the device, so that captured graphs replay.
struct NodeState {
  uint64_t num_operations[protocol::kNumPhases];  // dispatches, and combines, completed
  uint64_t epochs[protocol::kNumPhases];          // rounds completed; counts are one of dispatch
  uint32_t failed;                                // 1: a kernel gave up; later ones end at once
  uint32_t num_arrived;                           // blocks, at the end of a kernel
  uint32_t num_arrived_in_round[kNumSteps][kRoundsInFlight];
};

namespace normal {

// A token's ranks: 64 ranks as bits, `ranks_per_node` of them a node.
__device__ inline uint64_t ranks_of_node(const protocol::Nodes& nodes, uint64_t ranks,
                                         uint32_t node) {
  const uint32_t size = nodes.ranks_per_node;
  const uint64_t all = size == 64 ? ~uint64_t{0} : (uint64_t{1} << size) - 1;
  return ranks >> (node * size) & all;
}
// How many of a token's ranks come before rank `r`: the column of the message for that.
__device__ inline uint32_t ranks_before(uint64_t ranks, uint32_t r) {
  return __popcll(ranks & ((uint64_t{1} << r) - 1));
}
// How many other nodes of a token come before that one: the column of the slot there.
__device__ inline uint32_t nodes_before(const protocol::NodeView& view, uint64_t ranks,
                                        uint32_t remote) {
  uint32_t count = 0;
  for (uint32_t other = 0; other < remote; ++other) {
    const uint32_t node = view.nodes.remote_node(view.self_node(), other);
    count += ranks_of_node(view.nodes, ranks, node) != 0;
  }
  return count;
}

// Tokens of a round, of which this rank has `num_tokens` in all.
struct RoundTokens {
  uint32_t begin, end;

  __device__ RoundTokens(uint32_t round, uint32_t per_round, uint32_t num_tokens)
      : begin(static_cast<uint32_t>(min(uint64_t{round} * per_round, uint64_t{num_tokens}))),
        end(begin + min(per_round, num_tokens - begin)) {}
};

// Of each source, in shared memory: where its rows begin.
struct SourceRows {
  uint32_t first_row[kMaxRanks + 1];  // in recv_x; N
  uint32_t num_rounds;

  // Whole block.
  __device__ void find(const NodeRankView& rank, const uint32_t* sources) {
    if (threadIdx.x == 0) {
      const auto& config = rank.layout.nodes().base().config();
      uint32_t most_tokens = 0, num_rows = 0;
      for (uint32_t r = 0; r < config.num_ranks; ++r) {
        first_row[r] = num_rows;
        most_tokens = max(most_tokens, sources[2 * r]);
        num_rows += sources[2 * r + 1];
      }
      first_row[config.num_ranks] = num_rows;
      num_rounds = (most_tokens + config.num_tokens_per_round - 1) / config.num_tokens_per_round;
    }
    __syncthreads();
  }
};

// prefix[i] = count(0) + .. + count(i - 1); prefix[num] the sum, which is returned. Whole block.
template <typename Count>
__device__ uint32_t count_up(uint32_t num, uint32_t* prefix, Count count) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < num; ++i) {
      prefix[i] = sum;
      sum += count(i);
    }
    prefix[num] = sum;
  }
  __syncthreads();
  return prefix[num];
}

// A block's view of a running operation, the same in all its threads.
class NodeOp {
 public:
  // Whole block.
  __device__ NodeOp(const NodeRankView& rank, Phase phase) : rank_(rank), phase_(phase) {
    __shared__ uint64_t epochs[protocol::kNumPhases];
    __shared__ bool has_failed;
    if (threadIdx.x == 0) {
      for (uint32_t p = 0; p < protocol::kNumPhases; ++p) {
        epochs[p] = ptx::ld_relaxed_gpu(&rank.state->epochs[p]);
      }
      has_failed = ptx::ld_relaxed_gpu(&rank.state->failed) != 0;
    }
    __syncthreads();
    for (uint32_t p = 0; p < protocol::kNumPhases; ++p) num_before_[p] = epochs[p];
    ok_ = !has_failed;
  }

  // False: an earlier kernel has failed.
  __device__ bool ok() const { return ok_; }
  __device__ const NodeRankView& rank() const { return rank_; }
  __device__ const NormalNodeLayout& nodes_layout() const { return rank_.layout.nodes(); }
  __device__ const protocol::NormalLayout& layout() const { return nodes_layout().base(); }
  __device__ const protocol::NodeView& view() const { return rank_.nodes; }
  __device__ const protocol::Nodes& nodes() const { return rank_.nodes.nodes; }
  __device__ uint32_t num_ranks() const { return nodes().num_ranks; }
  __device__ uint32_t num_remote() const { return nodes().num_remote(); }
  __device__ uint32_t per_round() const { return layout().config().num_tokens_per_round; }
  __device__ uint32_t self_rank() const { return rank_.self_rank; }
  __device__ std::byte* self() const { return rank_.self_base; }
  // Of this node.
  __device__ std::byte* neighbour(uint32_t r) const { return rank_.bases[r]; }

  // Of a round of this operation, counted from 0.
  __device__ uint64_t epoch(uint32_t round) const { return num_before_[as_idx()] + round + 1; }
  __device__ uint32_t bank(uint32_t round) const {
    return protocol::bank_of(epoch(round), kNumRoundBanks);
  }

  // --- waits: threads, each with words of its own; whole block where they say so ---------------

  // Waits for: every peer to have emptied all that this rank has sent, in either phase. Whole
  // block. False: end the kernel.
  __device__ bool wait_until_emptied() const {
    bool ok = true;
    for (uint32_t p = 0; p < protocol::kNumPhases && ok; ++p) {
      ok = wait_for_credits(static_cast<Phase>(p), epoch(0), num_before_[p]);
    }
    return ok;
  }
  // Waits for: every peer to have emptied this round's bank. Whole block.
  __device__ bool wait_for_bank(uint32_t round) const {
    const uint64_t e = epoch(round);
    return wait_for_credits(phase_, e, e > kNumRoundBanks ? e - kNumRoundBanks : 0);
  }
  // Waits for: the word at that offset in this rank's memory, which `writer` writes for this round;
  // `*low_bits` are those that it carries.
  __device__ bool wait_for_word(uint32_t round, uint32_t writer, uint64_t offset,
                                uint32_t* low_bits) const {
    const uint64_t value =
        cuda::normal::wait_for(rank_, id(Half::kRecv, round), writer, at<uint64_t>(self(), offset),
                               protocol::pack_signal(epoch(round), 0), protocol::kEpochShift);
    *low_bits = static_cast<uint32_t>(protocol::signal_low_bits(value));
    const uint64_t seen = protocol::signal_epoch(value);
    if (seen > epoch(round)) {
      return fail(rank_, id(Half::kRecv, round), Status::kNewerEpoch, writer, epoch(round), seen,
                  0);
    }
    return seen == epoch(round);
  }
  __device__ bool wait_for_signal(uint32_t round, uint32_t src_rank, uint32_t writer,
                                  uint32_t* low_bits) const {
    return wait_for_word(round, writer, layout().signal(bank(round), phase_, src_rank), low_bits);
  }
  __device__ bool wait_for_node_signal(uint32_t round, uint32_t remote, uint32_t* low_bits) const {
    return wait_for_word(round, view().forwarder_on(remote),
                         nodes_layout().node_signal(bank(round), phase_, remote), low_bits);
  }
  // Waits for: `count` puts of that kind in this round.
  __device__ bool have_arrived(uint32_t round, Arrival kind, uint32_t remote,
                               uint32_t count) const {
    const uint32_t peer_rank = view().forwarder_on(remote);
    const auto* word = at<uint64_t>(self(), rank_.layout.arrivals(bank(round), kind, remote));
    const uint64_t before =
        ptx::ld_relaxed_gpu(&rank_.arrived[rank_.layout.arrivals_idx(bank(round), kind, remote)]);
    const uint64_t seen = wait_for_arrivals(round, peer_rank, word, before, count);
    if (seen > count) return corrupt(round, peer_rank, count, seen);
    return seen == count;
  }

  // --- what is published: threads, behind a barrier of what they publish -----------------------

  // To a rank of this node.
  __device__ void publish(uint32_t r, uint64_t offset, uint64_t value) const {
    ptx::fence_acq_rel_sys();
    ptx::st_relaxed_sys(at<uint64_t>(neighbour(r), offset), value);
  }
  // That `src_rank`'s data of this round is in the memory of a rank of this node.
  __device__ void publish_signal(uint32_t round, uint32_t src_rank, uint32_t r,
                                 uint32_t low_bits) const {
    publish(r, layout().signal(bank(round), phase_, src_rank),
            protocol::pack_signal(epoch(round), low_bits));
  }
  // A word of a rank of another node, of which this rank has written nothing that it has not seen.
  __device__ void store(uint32_t r, uint64_t offset, uint64_t value) const {
    nvshmem_uint64_p(at<uint64_t>(self(), offset), value, rank_.pes[r]);
  }
  // What is put for this rank's forwarder on that node.
  __device__ void signal_node(uint32_t round, uint32_t remote, uint32_t low_bits) const {
    const uint32_t dst_rank = view().forwarder_on(remote), here = view().idx_at(dst_rank);
    store(dst_rank, nodes_layout().node_signal(bank(round), phase_, here),
          protocol::pack_signal(epoch(round), low_bits));
  }
  // Bytes of this rank's memory, at `from`, to the forwarder's, at `to`. Whole warp, which has
  // written them, or is behind a barrier of who has. They may be written again once that rank has
  // credited the round.
  __device__ void put(uint32_t round, Arrival kind, uint32_t remote, uint64_t to, uint64_t from,
                      uint64_t num_bytes) const {
    const uint32_t dst_rank = view().forwarder_on(remote);
    const uint64_t arrivals = rank_.layout.arrivals(bank(round), kind, view().idx_at(dst_rank));
    __syncwarp();
    nvshmemx_putmem_signal_nbi_warp(self() + to, self() + from, num_bytes,
                                    at<uint64_t>(self(), arrivals), 1, NVSHMEM_SIGNAL_ADD,
                                    rank_.pes[dst_rank]);
  }

  // To every peer, that this round's bank is empty: all blocks have read it. `kinds`: of puts that
  // the round had. Whole block.
  __device__ void publish_credits(uint32_t round, Arrival first_kind, Arrival last_kind) const {
    const auto first = static_cast<uint32_t>(first_kind), last = static_cast<uint32_t>(last_kind);
    for (uint32_t i = threadIdx.x; i < (last - first + 1) * num_remote(); i += blockDim.x) {
      const auto kind = static_cast<Arrival>(first + i / num_remote());
      const uint32_t remote = i % num_remote();
      rank_.arrived[rank_.layout.arrivals_idx(bank(round), kind, remote)] = ptx::ld_relaxed_sys(
          at<uint64_t>(self(), rank_.layout.arrivals(bank(round), kind, remote)));
    }
    __syncthreads();
    const uint64_t offset = layout().credit(phase_, self_rank());
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += blockDim.x) {
      if (!view().is_peer(r)) continue;
      if (view().is_local(r)) {
        publish(r, offset, epoch(round));
      } else {
        ptx::fence_acq_rel_sys();
        nvshmemx_signal_op(at<uint64_t>(self(), offset), 1, NVSHMEM_SIGNAL_ADD, rank_.pes[r]);
      }
    }
  }

  // --- blocks ----------------------------------------------------------------------------------

  // True in the block that arrives last, for the whole block, behind all that the others have done.
  __device__ bool arrive(Step step, uint32_t round) const {
    return cuda::normal::arrives_last(
        &rank_.state->num_arrived_in_round[static_cast<uint32_t>(step)][round % kRoundsInFlight]);
  }
  __device__ bool arrive_last() const {
    return cuda::normal::arrives_last(&rank_.state->num_arrived);
  }

  // Ends the operation. The block that arrived last, one thread.
  __device__ void complete(uint32_t num_rounds, bool is_counts = false) const {
    rank_.state->epochs[as_idx()] = num_before_[as_idx()] + num_rounds;
    if (!is_counts) ++rank_.state->num_operations[as_idx()];
  }

  // Always returns false.
  __device__ bool corrupt(uint32_t round, uint32_t peer_rank, uint64_t expected,
                          uint64_t seen) const {
    return fail(rank_, id(Half::kRecv, round), Status::kCorrupt, peer_rank, expected, seen, 0);
  }
  __device__ cuda::OpId id(Half half, uint32_t round) const { return {phase_, half, epoch(round)}; }

 private:
  __device__ uint32_t as_idx() const { return static_cast<uint32_t>(phase_); }

  __device__ bool wait_for_credits(Phase phase, uint64_t for_epoch, uint64_t emptied) const {
    bool ok = true;
    for (uint32_t r = threadIdx.x; r < num_ranks(); r += blockDim.x) {
      if (!view().is_peer(r)) continue;
      const auto* word = at<uint64_t>(self(), layout().credit(phase, r));
      const cuda::OpId id = {phase_, Half::kSend, for_epoch};
      ok = cuda::normal::wait_for(rank_, id, r, word, emptied, 0) >= emptied && ok;
    }
    return __syncthreads_and(ok);
  }

  // Returns how many have arrived; fewer than `count`: the wait was given up.
  __device__ __noinline__ uint64_t wait_for_arrivals(uint32_t round, uint32_t peer_rank,
                                                     const uint64_t* word, uint64_t before,
                                                     uint64_t count) const {
    const uint64_t begin_ns = ptx::globaltimer_ns();
    while (true) {
      uint64_t seen;
#pragma unroll 1
      for (uint32_t poll = 0; poll < cuda::kPollsPerLook; ++poll) {
        seen = ptx::ld_acquire_sys(word) - before;
        if (seen >= count) return seen;
      }
      const uint64_t waited_ns = ptx::globaltimer_ns() - begin_ns;
      if (waited_ns > rank_.timeout_ns) {
        fail(rank_, id(Half::kRecv, round), Status::kNotArrived, peer_rank, count, seen, waited_ns);
        return seen;
      }
      if (ptx::ld_relaxed_gpu(&rank_.state->failed) != 0) return seen;
    }
  }

  const NodeRankView& rank_;
  Phase phase_;
  uint64_t num_before_[protocol::kNumPhases];  // rounds completed
  bool ok_;
};

// Runs `send(round)` and `receive(round)` of each round on this block, sends a round ahead, so that
// rows fly while others are unpacked. False: end the kernel.
template <typename Send, typename Receive>
__device__ bool run_rounds(const NodeOp& op, uint32_t num_rounds, Send send, Receive receive) {
  constexpr uint32_t kAhead = kNumRoundBanks - 1;
  for (uint32_t step = 0; step < num_rounds + kAhead && num_rounds > 0; ++step) {
    if (step < num_rounds) {
      if (!op.wait_for_bank(step)) return false;
      send(step);
    }
    if (step >= kAhead && !receive(step - kAhead)) return false;
  }
  return true;
}

}  // namespace normal
}  // namespace ep::nvshmem
