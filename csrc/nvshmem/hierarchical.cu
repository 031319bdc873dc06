#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "nvshmem/hierarchical.h"
#include "nvshmem/hierarchical_launch.cuh"

namespace ep::nvshmem {

using cuda::check;
using protocol::OpResult;

namespace {

// Of kernels that serve peers, whatever this rank's own batch is.
constexpr uint64_t kLeastBlocks = 32;

void check_config(const protocol::MultiNodeConfig& config) {
  const protocol::LowLatencyConfig& base = config.low_latency;
  const bool is_served = config.is_hierarchical && config.ranks_per_node < base.num_ranks &&
                         base.num_ranks % config.ranks_per_node == 0 && !base.packs_messages &&
                         base.num_max_tagged_tokens == 0 && base.num_workspaces == 0 &&
                         base.transfer == protocol::Transfer::kPush &&
                         base.reduction == protocol::Reduction::kRank;
  if (!is_served) {
    throw std::invalid_argument(
        "hierarchical kernels are for several nodes of as many ranks each; messages are pushed, "
        "not packed, never tagged, not in workspaces, and reduced on their rank");
  }
}

}  // namespace

HierarchicalRank::HierarchicalRank(const protocol::MultiNodeConfig& config, uint32_t self_rank,
                                   const std::vector<std::byte*>& bases,
                                   const std::vector<int32_t>& pes, uint64_t timeout_ns,
                                   uint32_t num_sms)
    : RankHost(config.low_latency, self_rank, bases, timeout_ns),
      multi_node_(config),
      network_(multi_node_),
      num_sms_(num_sms) {
  check_config(config);
  Launch::two_fit(hierarchical_dispatch_shared_bytes(multi_node_));
  prepare_hierarchical_dispatch();
  prepare_hierarchical_combine();
  pes_ = cuda::device_copy(pes, "writing the table of PEs");
  const size_t num_remote = multi_node_.nodes().num_remote();
  const size_t num_words = config.low_latency.num_banks * num_remote;
  arrived_ = cuda::zeroed_device_array<uint64_t>(num_words * protocol::kNumPhases);
  num_finished_ = cuda::zeroed_device_array<uint32_t>(num_remote);
  answered_.num_messages = cuda::zeroed_device_array<uint32_t>(num_words);
  answered_.messages = cuda::zeroed_device_array<protocol::ForwardedMessage>(
      num_words * config.low_latency.num_max_tokens_per_rank);
  check(cudaDeviceSynchronize(), "setting a rank up");
}

HierarchicalRank::~HierarchicalRank() {
  cudaFree(pes_);
  cudaFree(arrived_);
  cudaFree(num_finished_);
  cudaFree(answered_.num_messages);
  cudaFree(answered_.messages);
}

struct HierarchicalRank::Plan {
  HierarchicalView view;
  Launch launch;
};

HierarchicalRank::Plan HierarchicalRank::plan(uint64_t num_items, void* stream) const {
  const auto num_blocks =
      static_cast<uint32_t>(std::clamp<uint64_t>(num_items, 1, uint64_t{num_sms_}));
  const protocol::NodeView nodes = {multi_node_.nodes(), view_.self_rank};
  Plan plan = {{{view_, pes_}, multi_node_, network_, nodes, arrived_, num_finished_, answered_},
               {num_blocks, cuda::kThreads, static_cast<cudaStream_t>(stream), true}};
  plan.view.share = cuda::kProgressPerOp / num_blocks;
  plan.view.first_share = cuda::kProgressPerOp - plan.view.share * (num_blocks - 1);
  plan.view.next_starts = cuda::NextStarts::kAsWarpsEnd;
  return plan;
}

// Peers' batches are likely as large as this rank's.
uint64_t HierarchicalRank::num_messages() const {
  return uint64_t{num_tokens_} * view_.layout.num_outcome_columns();
}

OpResult HierarchicalRank::dispatch_send(const cuda::DispatchSendParams& send, void* stream) {
  num_tokens_ = send.num_tokens;
  const Plan p = plan(send.num_tokens, stream);  // a block a token
  launch_dispatch_send(p.view, send, p.launch);
  return launched("dispatch_send");
}

OpResult HierarchicalRank::dispatch_recv(const ForwardingRecvParams& recv, void* stream) {
  const uint32_t num_parts = protocol::parts_for(view_.layout.dispatch_row_bytes());
  // Remote nodes have blocks of their own, which do not wait for each other.
  const uint64_t num_least = std::max<uint64_t>(kLeastBlocks, multi_node_.nodes().num_remote());
  const Plan p = plan(std::max(num_messages() * num_parts, num_least), stream);
  launch_dispatch_recv(p.view, recv, p.launch);
  return launched("dispatch_recv");
}

OpResult HierarchicalRank::combine_send(const ForwardedSendParams& send, void* stream) {
  const uint32_t num_parts = protocol::parts_for(view_.layout.combine_row_bytes());
  const Plan p = plan(std::max(num_messages() * num_parts, kLeastBlocks), stream);
  launch_combine_send(p.view, send, p.launch);
  return launched("combine_send");
}

OpResult HierarchicalRank::combine_recv(const cuda::CombineRecvParams& recv, void* stream) {
  const uint32_t num_parts = protocol::parts_for(view_.layout.combine_row_bytes());
  const uint64_t num_items = uint64_t{recv.num_tokens} * num_parts;
  const Plan p = plan(std::max({num_items, num_messages(), kLeastBlocks}), stream);
  launch_combine_recv(p.view, recv, p.launch);
  return launched("combine_recv");
}

}  // namespace ep::nvshmem
