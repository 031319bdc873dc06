#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "nvshmem/launch.cuh"
#include "nvshmem/low_latency.h"

namespace ep::nvshmem {

using cuda::check;
using protocol::OpResult;

namespace {

// Of kernels that serve peers, whatever this rank's own batch is. 16 to 66 blocks take a batch of 1
// to 128 tokens as long, 132 take up to 1 us more (1 rank, H100).
constexpr uint32_t kLeastBlocks = 64;

void check_config(const protocol::LowLatencyConfig& config) {
  const bool is_served = config.packs_messages && config.num_max_tagged_tokens == 0 &&
                         config.num_workspaces == 0 && config.transfer == protocol::Transfer::kPush;
  if (!is_served) {
    throw std::invalid_argument(
        "over a network messages are packed and pushed, never tagged, not in workspaces");
  }
}

}  // namespace

NetworkRank::NetworkRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                         const std::vector<std::byte*>& bases, const std::vector<int32_t>& pes,
                         uint64_t timeout_ns, uint32_t num_sms)
    : RankHost(config, self_rank, bases, timeout_ns),
      network_(view_.layout),
      num_sms_(num_sms),
      num_remote_(static_cast<uint32_t>(std::count(bases.begin(), bases.end(), nullptr))) {
  check_config(config);
  has_room_for_two_ = Launch::two_fit(dispatch_shared_bytes(view_.layout, self_rank));
  prepare_dispatch(config);
  prepare_combine(config);
  pes_ = cuda::device_copy(pes, "writing the table of PEs");
  arrived_ = cuda::zeroed_device_array<uint64_t>(size_t{config.num_banks} * protocol::kNumPhases *
                                                 config.num_ranks);
  check(cudaDeviceSynchronize(), "setting a rank up");
}

NetworkRank::~NetworkRank() {
  cudaFree(pes_);
  cudaFree(arrived_);
}

struct NetworkRank::Plan {
  NetworkView view;
  Launch launch;
};

// `num_wanted`: blocks that have something to do. The next kernel of the stream starts when all of
// them are at their end: earlier, beside this one, a pair takes up to 2 us more (1 rank, 1 to 128
// tokens, H100), where kernels without NVSHMEM gain.
NetworkRank::Plan NetworkRank::plan(uint64_t num_wanted, void* stream) const {
  const bool has_much = has_room_for_two_ && num_wanted > num_sms_;
  const uint64_t num_most = uint64_t{num_sms_} * (has_much ? cuda::kBlocksPerSM : 1);
  const auto num_blocks = static_cast<uint32_t>(std::clamp<uint64_t>(num_wanted, 1, num_most));
  Plan plan = {{{view_, pes_}, network_, arrived_},
               {num_blocks, cuda::kThreads, static_cast<cudaStream_t>(stream), true}};
  plan.view.share = cuda::kProgressPerOp / num_blocks;
  plan.view.first_share = cuda::kProgressPerOp - plan.view.share * (num_blocks - 1);
  plan.view.next_starts = cuda::NextStarts::kAsWarpsEnd;
  return plan;
}

// For rows that are read in parts, a warp each; at first a warp a block.
uint64_t NetworkRank::blocks_for_parts(uint64_t num_rows, uint64_t row_bytes) const {
  const uint64_t num_parts = num_rows * protocol::parts_for(row_bytes);
  return num_parts > uint64_t{num_sms_} * cuda::kWarps ? num_parts
                                                       : std::min<uint64_t>(num_parts, num_sms_);
}

// What comes from peers is as much as this rank's own batch if theirs are alike; they need not be.
// So there are no fewer blocks than kLeastBlocks, if peers may send as many messages.
uint64_t NetworkRank::blocks_for_peers(uint64_t num_wanted) const {
  const auto& config = view_.layout.config();
  const uint64_t num_messages = uint64_t{config.num_ranks} * config.num_max_tokens_per_rank;
  return std::max(num_wanted, std::min<uint64_t>({num_messages, kLeastBlocks, num_sms_}));
}

uint64_t NetworkRank::num_messages() const {
  const auto& config = view_.layout.config();
  return uint64_t{num_tokens_} * std::min(config.top_k, config.num_ranks);
}

OpResult NetworkRank::dispatch_send(const DispatchSendParams& send, void* stream) {
  num_tokens_ = send.num_tokens;
  // A block a token, and behind them some whose warps put a peer's counts each.
  const uint32_t num_for_counts = (num_remote_ + cuda::kWarps - 1) / cuda::kWarps;
  const Plan p = plan(uint64_t{send.num_tokens} + num_for_counts, stream);
  launch_dispatch_send(p.view, send, p.launch);
  return launched("dispatch_send");
}

OpResult NetworkRank::dispatch_recv(const DispatchRecvParams& recv, void* stream) {
  const uint64_t num_wanted = blocks_for_parts(num_messages(), view_.layout.dispatch_row_bytes());
  const Plan p = plan(blocks_for_peers(num_wanted), stream);
  launch_dispatch_recv(p.view, recv, p.launch);
  return launched("dispatch_recv");
}

OpResult NetworkRank::combine_send(const CombineSendParams& send, void* stream) {
  const Plan p = plan(blocks_for_peers(num_messages()), stream);  // a block a message
  launch_combine_send(p.view, send, p.launch);
  return launched("combine_send");
}

OpResult NetworkRank::combine_recv(const CombineRecvParams& recv, void* stream) {
  const uint64_t num_wanted = blocks_for_parts(recv.num_tokens, view_.layout.combine_row_bytes());
  const Plan p = plan(num_wanted, stream);
  launch_combine_recv(p.view, recv, p.launch);
  return launched("combine_recv");
}

}  // namespace ep::nvshmem
