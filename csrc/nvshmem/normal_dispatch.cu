// Rounds of a dispatch between nodes; the meaning, and the worked example, are in
// csrc/cpu/normal_nodes_dispatch.cpp.
//
// One kernel: a warp writes a token to its ranks of this node, and puts it once for each other
// node; then it passes on what has come from there, and unpacks what has come for this rank.

#include "nvshmem/normal_receive.cuh"

namespace ep::nvshmem {
namespace normal {
namespace {

// This rank's tokens.
template <typename Rows>
class Sender {
 public:
  __device__ Sender(const NodeOp& op, const Rows& rows, const NodeDispatch& params,
                    DispatchShared* shared)
      : op_(op),
        layout_(op.nodes_layout()),
        rows_(rows),
        params_(params),
        targets_(shared->targets[threadIdx.x / kWarp]),
        lane_(threadIdx.x % kWarp) {}

  // Whole block.
  __device__ void run(uint32_t round) {
    const RoundTokens tokens(round, op_.per_round(), params_.routes.num_tokens);
    const uint64_t step = uint64_t{gridDim.x} * kNodeWarps;
    const uint32_t first = threadIdx.x / kWarp * gridDim.x + blockIdx.x;
    for (uint64_t token = uint64_t{tokens.begin} + first; token < tokens.end; token += step) {
      send(round, static_cast<uint32_t>(token));
    }
    if (op_.arrive(Step::kSent, round)) publish(round, tokens.begin < tokens.end);
  }

 private:
  __device__ void send(uint32_t round, uint32_t token) {
    const uint64_t ranks = params_.routes.ranks[token];
    if (ranks == 0) return;
    const uint32_t bank = op_.bank(round);
    __syncwarp();  // the targets of the token before have been used
    const uint32_t num_local = find_local(bank, token, ranks);
    const uint32_t num_targets = num_local + find_nodes(bank, token, ranks, num_local);
    __syncwarp();
    if (!params_.is_cached) write_routes(token, num_targets);
    write_row(token, num_targets);
    __syncwarp();
    for (uint32_t i = num_local; i < num_targets; ++i) put(round, bank, targets_[i]);
  }

  // A lane a message. Returns how many.
  __device__ uint32_t find_local(uint32_t bank, uint32_t token, uint64_t ranks) const {
    const uint32_t num_messages = __popcll(ranks);
    const uint32_t* messages = messages_of(token);
    uint32_t num_targets = 0;
    for (uint32_t first = 0; first < num_messages; first += kWarp) {
      const uint32_t column = first + lane_;
      const uint32_t message = column < num_messages ? messages[column] : 0;
      const uint32_t r = message >> 16, slot = message & 0xffff;
      const bool is_target = column < num_messages && op_.view().is_local(r);
      const uint32_t lanes = __ballot_sync(kAllLanes, is_target);
      if (is_target) {
        const uint64_t offset = layout_.base().message(bank, op_.self_rank(), slot);
        targets_[num_targets + __popc(lanes & ((1u << lane_) - 1))] = {
            op_.neighbour(r) + offset, static_cast<uint16_t>(r), static_cast<uint16_t>(r), 0, 0};
      }
      num_targets += __popc(lanes);
    }
    return num_targets;
  }
  // A lane a node, whose route is staged, too. Returns how many.
  __device__ uint32_t find_nodes(uint32_t bank, uint32_t token, uint64_t ranks,
                                 uint32_t num_before) const {
    const protocol::Nodes& nodes = op_.nodes();
    const uint32_t num_columns = min(op_.num_remote(), layout_.base().config().top_k);
    const uint32_t* slots = params_.routes.node_slots + uint64_t{token} * num_columns;
    uint32_t num_targets = 0;
    for (uint32_t first = 0; first < op_.num_remote(); first += kWarp) {
      const uint32_t remote = first + lane_;
      const uint32_t node = remote < op_.num_remote()
                                ? nodes.remote_node(op_.view().self_node(), remote)
                                : op_.view().self_node();
      const bool is_target = remote < op_.num_remote() && ranks_of_node(nodes, ranks, node) != 0;
      const uint32_t lanes = __ballot_sync(kAllLanes, is_target);
      const uint32_t column = num_targets + __popc(lanes & ((1u << lane_) - 1));
      if (is_target) {
        const uint32_t slot = slots[column], first_rank = nodes.rank_at(node, 0);
        targets_[num_before + column] = {
            op_.self() + layout_.node_outbox(bank, remote, slot), static_cast<uint16_t>(first_rank),
            static_cast<uint16_t>(first_rank + nodes.ranks_per_node - 1),
            static_cast<uint16_t>(remote), static_cast<uint16_t>(slot)};
        stage_route(op_, bank, messages_of(token), ranks, remote, slot);
      }
      num_targets += __popc(lanes);
    }
    return num_targets;
  }
  __device__ const uint32_t* messages_of(uint32_t token) const {
    return params_.routes.messages + uint64_t{token} * layout_.base().num_max_messages_per_token();
  }

  // To each target its experts and their weights, each at its k, and the token. A lane a k.
  __device__ void write_routes(uint32_t token, uint32_t num_targets) const {
    const uint32_t top_k = layout_.base().config().top_k;
    const cuda::Owners& owners = op_.rank().owners;
    for (uint32_t k = lane_; k < top_k; k += kWarp) {
      const uint64_t i = uint64_t{token} * top_k + k;
      const int64_t expert = params_.topk_idx_is_int64
                                 ? static_cast<const int64_t*>(params_.topk_idx)[i]
                                 : static_cast<const int32_t*>(params_.topk_idx)[i];
      const uint32_t owner =
          expert < 0 ? cuda::kNoRank : owners.owner(static_cast<uint32_t>(expert));
      const float weight = params_.topk_weights[i];
      for (uint32_t t = 0; t < num_targets; ++t) {
        const Target& target = targets_[t];
        const Message message = {target.message, layout_};
        const bool is_theirs = target.first_rank <= owner && owner <= target.last_rank;
        const auto first_expert = static_cast<int64_t>(owners.first_expert(target.first_rank));
        message.experts()[k] = is_theirs ? static_cast<int32_t>(expert - first_expert) : -1;
        message.weights()[k] = is_theirs ? weight : 0.0f;
      }
    }
    for (uint32_t t = lane_; t < num_targets; t += kWarp) {
      *Message{targets_[t].message, layout_}.token() = static_cast<int32_t>(token);
    }
  }

  // Two parts on their way at once.
  __device__ void write_row(uint32_t token, uint32_t num_targets) const {
    const uint32_t num_parts = protocol::parts_for(layout_.base().dispatch_row_bytes());
    for (uint32_t part = 0; part < num_parts; part += 2) {
      const auto fetched = rows_.fetch(token, part);
      const auto fetched_next = rows_.fetch(token, part + 1);  // nothing, behind the row
      write_part(rows_.finish(fetched), part, num_targets);
      write_part(rows_.finish(fetched_next), part + 1, num_targets);
    }
  }
  __device__ void write_part(const cuda::Part& values, uint32_t part, uint32_t num_targets) const {
    for (uint32_t t = 0; t < num_targets; ++t) {
      const Message message = {targets_[t].message, layout_};
      cuda::store_part(values, {message.row(), message.scales()}, rows_.shape, part);
    }
  }

  __device__ void put(uint32_t round, uint32_t bank, const Target& target) const {
    const uint64_t first = params_.is_cached ? layout_.row_in_message() : 0;
    const uint32_t here = op_.view().idx_at(op_.view().forwarder_on(target.remote));
    op_.put(round, Arrival::kDispatch, target.remote,
            layout_.node_inbox(bank, here, target.slot) + first,
            layout_.node_outbox(bank, target.remote, target.slot) + first,
            layout_.dispatch_bytes() - first);
  }

  // The block that arrived last.
  __device__ void publish(uint32_t round, bool has_tokens) const {
    const NodeRoutes& routes = params_.routes;
    const uint32_t num_columns = op_.num_ranks() + op_.num_remote();
    if (threadIdx.x < op_.nodes().ranks_per_node) {
      const uint32_t r = op_.view().neighbour(threadIdx.x);
      const uint32_t count =
          has_tokens ? routes.round_counts[uint64_t{round} * num_columns + r] : 0;
      op_.publish_signal(round, op_.self_rank(), r, count);
    }
    send_routes(op_, round, Arrival::kDispatch, routes, has_tokens, 0);
  }

  const NodeOp& op_;
  const NormalNodeLayout& layout_;
  const Rows& rows_;
  const NodeDispatch& params_;
  Target* targets_;
  uint32_t lane_;
};

template <typename Rows>
__global__ void __launch_bounds__(kNodeThreads, 1)
    node_dispatch_kernel(const __grid_constant__ NodeRankView rank,
                         const __grid_constant__ Rows rows,
                         const __grid_constant__ NodeDispatch params) {
  __shared__ DispatchShared shared;
  const NodeOp op(rank, Phase::kDispatch);
  if (!op.ok()) return;
  shared.rows.find(rank, params.routes.sources);
  const uint64_t num_rows = shared.rows.first_row[op.num_ranks()];
  if (num_rows > params.num_rows) {
    fail(rank, op.id(Half::kRecv, 0), Status::kTooManyRows, rank.self_rank, params.num_rows,
         num_rows, 0);
    return;
  }
  if (!op.wait_until_emptied()) return;
  Sender<Rows> sender(op, rows, params, &shared);
  const Forwarder forwarder(op, params, &shared);
  const Receiver receiver(op, params, &shared);
  const bool is_done = run_rounds(
      op, shared.rows.num_rounds, [&](uint32_t round) { sender.run(round); },
      [&](uint32_t round) { return forwarder.run(round) && receiver.run(round); });
  if (!is_done) return;
  receiver.mark_unused();
  if (op.arrive_last() && threadIdx.x == 0) op.complete(shared.rows.num_rounds);
}

}  // namespace
}  // namespace normal

void prepare_node_dispatch() {
  cuda::Launch::prepare(normal::node_dispatch_kernel<cuda::CopyRow>);
  cuda::Launch::prepare(normal::node_dispatch_kernel<cuda::QuantizeRow<__nv_bfloat16>>);
  cuda::Launch::prepare(normal::node_dispatch_kernel<cuda::QuantizeRow<float>>);
}

void launch_node_dispatch(const NodeRankView& rank, const NodeDispatch& params,
                          const cuda::Launch& launch) {
  const protocol::NormalLayout& layout = rank.layout.nodes().base();
  const protocol::NormalConfig& config = layout.config();
  const cuda::RowShape shape = {static_cast<uint32_t>(layout.dispatch_row_bytes() / sizeof(uint4)),
                                layout.num_scales()};
  auto run = [&](auto rows) {
    launch.run(normal::node_dispatch_kernel<decltype(rows)>, 0, rank, rows, params);
  };
  if (shape.num_scales == 0 || params.x_is_quantized) {
    const cuda::RowView x = {const_cast<std::byte*>(params.x), const_cast<float*>(params.x_scales)};
    run(cuda::CopyRow{x, layout.dispatch_row_bytes(), shape});
  } else if (config.dtype == protocol::DType::kBFloat16) {
    run(cuda::QuantizeRow<__nv_bfloat16>{params.x, config.hidden, shape, config.scale_format});
  } else {
    run(cuda::QuantizeRow<float>{params.x, config.hidden, shape, config.scale_format});
  }
}

}  // namespace ep::nvshmem
