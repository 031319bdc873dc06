// Combine's two halves between nodes. A send leaves partial rows with the ranks of this node: with
// those whose tokens they are of, and with the forwarders of the others'. A hook adds those up that
// this rank forwards, and puts the sums; then its own tokens' rows. A warp makes some parts of a
// row.
#pragma once

#include "cuda/travelling_rows.cuh"
#include "nvshmem/hierarchical_view.cuh"

namespace ep::nvshmem {

using cuda::Sink;
using cuda::SumPlan;

// `Rows`: PlainRows or Float8Rows.
template <typename Rows>
class NodeCombiner {
 public:
  __device__ NodeCombiner(const HierarchicalView& rank, const HierarchicalOp& op, SumPlan* plan)
      : rank_(rank),
        layout_(rank.layout),
        multi_node_(rank.multi_node),
        op_(op),
        plan_(plan),
        rows_(layout_),
        num_parts_(protocol::parts_for(layout_.combine_row_bytes())) {}

  // A partial row for every message. `received`: of the handle. Whole block.
  __device__ void send(const ForwardedSendParams& params, const cuda::Sources& received) const {
    keep_forwarded(params.forwarded);
    const uint32_t num_ranks = received.num_ranks;
    for (cuda::Items items(received.prefix[num_ranks], num_parts_); items.more(); items.next()) {
      const uint32_t m = items.row();
      const uint32_t src_rank = cuda::source_of(received.prefix, num_ranks, m);
      make_partial(params.send, m, src_rank, items);
    }
    if (!op_.is_last_block()) return;
    // One signal for a rank's own tokens and for those whose rows it adds up.
    for (uint32_t i = threadIdx.x; i < rank_.num_local(); i += blockDim.x) {
      const uint32_t neighbour = rank_.nodes.neighbour(i);
      ptx::fence_acq_rel_sys();
      op_.publish_signal(neighbour, received.count(neighbour));
    }
  }

  // Waits for the partial rows of this node's ranks. Whole block, a barrier behind it. False, on
  // some threads: the wait was given up.
  __device__ bool wait_for_neighbours() const {
    bool ok = true;
    for (uint32_t i = threadIdx.x; i < rank_.num_local() && ok; i += blockDim.x) {
      ok = wait_for_signal(rank_.nodes.neighbour(i), nullptr);
    }
    return ok;
  }
  // The same for the sums of other nodes.
  __device__ bool wait_for_nodes() const {
    bool ok = true;
    for (uint32_t i = threadIdx.x; i < rank_.num_remote() && ok; i += blockDim.x) {
      const uint32_t forwarder = rank_.nodes.forwarder_on(i);
      uint32_t count;
      // The signal may be here before what it tells of.
      ok = wait_for_signal(forwarder, &count) &&
           rank_.has_arrived(op_.receiving(), op_.bank(), forwarder, count, blockIdx.x == 0);
    }
    return ok;
  }

  // What this node's ranks have for the messages that this one has forwarded: a row each, which
  // goes home. `prefix`: in shared memory, [N]. A block makes a row, of which a warp puts it. Whole
  // block.
  __device__ void add_up_nodes(uint32_t* prefix) const {
    const uint32_t num_remote = rank_.num_remote();
    const uint32_t* num_messages = rank_.answered.num_messages + op_.bank() * num_remote;
    cuda::prefix_sum(num_remote, prefix, [&](uint32_t i) { return num_messages[i]; });
    // A signal may be there before what it tells of.
    for (uint32_t i = threadIdx.x; HierarchicalOp::is_clerk() && i < num_remote; i += blockDim.x) {
      op_.publish_signal(rank_.nodes.forwarder_on(i), num_messages[i]);
    }
    __syncthreads();
    for (cuda::BlockItems items(prefix[num_remote], num_parts_); items.more(); items.next()) {
      const uint32_t m = items.row(), remote = cuda::source_of(prefix, num_remote, m);
      add_up_message(remote, m - prefix[remote], items);
    }
  }

  // The rows of this node's ranks for every token of this one become one, where the first of them
  // lies, rounded as those of other nodes are. The same warps use them in `add_up_tokens`.
  __device__ void add_up_neighbours(const cuda::CombineRecvParams& recv) const {
    for (cuda::Items items(recv.num_tokens, num_parts_); items.more(); items.next()) {
      const Columns columns(rank_, recv, items.row());
      if (columns.num_own <= (Rows::kLonePartialIsResult ? 1 : 0)) continue;
      __syncwarp();  // the last plan has been used
      for (uint32_t i = threadIdx.x % kWarp; i < columns.num_own; i += kWarp) {
        add_to_plan(i, outcome(columns.first + columns.first_own + i));
      }
      __syncwarp();
      rows_.add_up_to_send(*plan_, columns.num_own, items.first_part(), items.end_part(),
                           {outcome(columns.first + columns.first_own), false, 0});
    }
  }
  // The rows of every token, one a node.
  __device__ void add_up_tokens(const cuda::CombineRecvParams& recv) const {
    for (cuda::Items items(recv.num_tokens, num_parts_); items.more(); items.next()) {
      const uint32_t token = items.row();
      const Columns columns(rank_, recv, token);
      const uint32_t num_dropped = columns.num_own > 0 ? columns.num_own - 1 : 0;
      const uint32_t num_rows = columns.num - num_dropped;
      __syncwarp();  // the last plan has been used
      for (uint32_t i = threadIdx.x % kWarp; i < num_rows; i += kWarp) {
        const bool is_behind = columns.num_own > 0 && i > columns.first_own;
        add_to_plan(i, outcome(columns.first + i + (is_behind ? num_dropped : 0)));
      }
      __syncwarp();
      rows_.add_up(*plan_, num_rows, items.first_part(), items.end_part(),
                   recv.out + token * layout_.row_bytes());
    }
  }

 private:
  // Columns of a token's outcome, in the order of ranks: of other nodes, one each, and, side by
  // side, of this one's ranks. Whole warp.
  struct Columns {
    uint32_t first;  // in slots of the outcome
    uint32_t num;
    uint32_t first_own, num_own;  // from the token's first

    __device__ Columns(const HierarchicalView& rank, const cuda::CombineRecvParams& recv,
                       uint32_t token)
        : first(token * rank.layout.num_outcome_columns()), num(recv.num_partials[token]) {
      first_own = num, num_own = 0;
      for (uint32_t c = threadIdx.x % kWarp; c < num; c += kWarp) {
        if (!rank.reaches(recv.answers[first + c] >> 16)) continue;
        first_own = min(first_own, c);
        ++num_own;
      }
      first_own = __reduce_min_sync(cuda::kAllLanes, first_own);
      num_own = __reduce_add_sync(cuda::kAllLanes, num_own);
    }
  };

  __device__ std::byte* outcome(uint32_t outcome_slot) const {
    return op_.self() + layout_.outcome(op_.bank(), outcome_slot);
  }
  __device__ void add_to_plan(uint32_t i, std::byte* row) const {
    plan_->rows[i] = row;
    plan_->weights[i] = 1.0f;
  }

  __device__ bool wait_for_signal(uint32_t r, uint32_t* count) const {
    const uint64_t word = layout_.signal(op_.bank(), Phase::kCombine, r);
    uint32_t ignored;
    return op_.take_signal(cuda::at<uint64_t>(op_.self(), word), r, blockIdx.x == 0,
                           count != nullptr ? count : &ignored);
  }

  // For this combine's hook, which is not given the handle.
  __device__ void keep_forwarded(const Forwarded& forwarded) const {
    const uint32_t num_remote = rank_.num_remote();
    const uint32_t num_slots = layout_.config().num_max_tokens_per_rank;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (uint32_t remote = 0; remote < num_remote; ++remote) {
      const uint32_t i = op_.bank() * num_remote + remote;
      const uint32_t num_messages = forwarded.num_messages[remote];
      if (thread == 0) rank_.answered.num_messages[i] = num_messages;
      for (uint32_t slot = thread; slot < num_messages; slot += step) {
        rank_.answered.messages[uint64_t{i} * num_slots + slot] =
            forwarded.messages[uint64_t{remote} * num_slots + slot];
      }
    }
  }

  // The partial row of message `m` to where it is added up. One warp.
  __device__ void make_partial(const cuda::CombineSendParams& send, uint32_t m, uint32_t src_rank,
                               const cuda::Items& items) const {
    const uint32_t top_k = layout_.config().top_k, bank = op_.bank();
    const protocol::HandleMessage message = send.handle.messages[m];
    __syncwarp();  // the last plan has been used
    for (uint32_t j = threadIdx.x % kWarp; j < top_k; j += kWarp) {
      // Beside the message, not after it: entries of message m begin at m * K.
      const protocol::HandleEntry entry = send.handle.entries[uint64_t{m} * top_k + j];
      plan_->rows[j] = const_cast<std::byte*>(send.expert_out) + entry.row * layout_.row_bytes();
      plan_->weights[j] = entry.weight;
    }
    __syncwarp();
    std::byte* row = op_.peer(rank_.nodes.forwarder_here(src_rank));
    if (rank_.reaches(src_rank)) {
      row += layout_.outcome(bank, message.outcome_slot);
    } else {
      row += multi_node_.node_partial(bank, rank_.nodes.remote_idx(src_rank), message.outcome_slot);
    }
    rows_.send_sum(*plan_, message.num_entries, items.first_part(), items.end_part(),
                   {row, false, 0});
  }

  // Whole block.
  __device__ void add_up_message(uint32_t remote, uint32_t slot,
                                 const cuda::BlockItems& items) const {
    const uint32_t bank = op_.bank(), home = rank_.nodes.forwarder_on(remote);
    const uint64_t num_slots = layout_.config().num_max_tokens_per_rank;
    const protocol::ForwardedMessage message =
        rank_.answered.messages[(bank * rank_.num_remote() + remote) * num_slots + slot];
    const uint64_t staged = multi_node_.node_sum(bank, remote, slot);
    __syncwarp();  // the last plan has been used
    for (uint32_t c = threadIdx.x % kWarp; c < message.num_partials; c += kWarp) {
      const uint32_t partial_slot = slot * multi_node_.num_columns() + c;
      add_to_plan(c, op_.self() + multi_node_.node_partial(bank, remote, partial_slot));
    }
    __syncwarp();
    rows_.add_up_to_send(*plan_, message.num_partials, items.first_part(), items.end_part(),
                         {op_.self() + staged, false, 0});
    __syncthreads();
    if (threadIdx.x / kWarp != slot % cuda::kWarps) return;
    rank_.put(layout_.outcome(bank, message.outcome_slot), staged,
              static_cast<uint32_t>(multi_node_.combine_bytes()),
              rank_.arrivals_at(bank, Phase::kCombine, home), home);
  }

  const HierarchicalView& rank_;
  const protocol::LowLatencyLayout& layout_;
  const protocol::MultiNodeLayout& multi_node_;
  const HierarchicalOp& op_;
  SumPlan* plan_;
  Rows rows_;
  uint32_t num_parts_;
};

}  // namespace ep::nvshmem
