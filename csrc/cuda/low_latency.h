// The low-latency kernels over peer pointers, and one rank's private state on the device.
//
// Launches return at once. What a kernel finds wrong it writes to pinned host memory before it
// ends; the next call on the buffer reports it. See csrc/protocol/op.h for the shapes.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/counters.h"
#include "cuda/divide.h"
#include "protocol/layout.h"
#include "protocol/op.h"

namespace ep::cuda {

using protocol::CombineRecvParams;
using protocol::CombineSendParams;
using protocol::DispatchRecvParams;
using protocol::DispatchSendParams;

struct RankState;   // on the device: epochs, arrival counters, the failed word
struct HostReport;  // pinned: what failed

// Ranks whose bases travel with a kernel's parameters, which cost no memory access.
constexpr uint32_t kNumNearRanks = 16;

// protocol::ExpertPartition without divisions.
struct Owners {
  uint32_t base = 0, num_larger = 0;  // experts of a rank; ranks with one more
  Divisor by_base, by_larger;

  Owners() = default;
  explicit Owners(const protocol::ExpertPartition& partition)
      : base(partition.num_experts / partition.num_ranks),
        num_larger(partition.num_experts % partition.num_ranks),
        by_base(base > 0 ? base : 1),
        by_larger(base + 1) {}
  EP_HOST_DEVICE uint32_t owner(uint32_t expert) const {
    const uint32_t num_in_larger = num_larger * (base + 1);
    return expert < num_in_larger ? expert / by_larger
                                  : num_larger + (expert - num_in_larger) / by_base;
  }
  EP_HOST_DEVICE uint32_t first_expert(uint32_t rank) const {
    return rank * base + (rank < num_larger ? rank : num_larger);
  }
};

// What is known of a rank's own batch before its kernel runs, so that it can be compiled in:
// whether its rows are tagged, or that there is no other rank.
enum class Batch { kAny, kTagged, kUntagged, kAlone };

// When the next kernel of a stream may be put on the GPU: when this one begins, when a warp of each
// of its blocks is done, or when all blocks have ended.
enum class NextStarts : uint32_t { kAtOnce, kAsWarpsEnd, kAsBlocksEnd };

// What every kernel of one rank is given.
struct RankView {
  static constexpr bool kHasNetwork = false;
  // See usual.cuh.
  static constexpr bool kIsUsual = false;
  static constexpr Batch kBatch = Batch::kAny;
  static constexpr bool kIsSource = false;

  protocol::LowLatencyLayout layout;
  uint32_t self_rank;
  std::byte* self_base;
  std::byte* near_bases[kNumNearRanks];
  std::byte* const* bases;  // device table [R]: where this GPU sees each rank's memory
  RankState* state;
  uint64_t* wait_ns;          // [phase][half][R]: waited for each peer so far
  uint64_t* num_expert_rows;  // [L]: received so far
  // Of the last dispatch into each workspace. [W]: its epoch and a source's slots, packed like a
  // signal, as the combine that answers it reads both and waits for one load. [W][R + 1]: for the
  // next hook, its messages from each source, and a source's slots again.
  uint64_t* workspace_dispatches;
  uint32_t* workspace_counts;
  HostReport* report;
  uint64_t timeout_ns;
  Owners owners;
  uint32_t num_local_experts;
  bool shares_gpu;  // with all its peers
  // Of this launch: what a block adds to the operation's progress (block 0, any other).
  uint32_t first_share, share;
  NextStarts next_starts;
};

// More would not fit the shared memory in which a dispatch counts rows by expert.
constexpr uint32_t kNumMaxExperts = 4096;

// What a rank's kernels have counted since its creation.
struct Statistics {
  std::vector<uint64_t> num_ops;          // [phase][half]: completed
  std::vector<uint64_t> wait_ns;          // [phase][half][R]
  std::vector<uint64_t> num_expert_rows;  // [L]
};

// What any rank with such kernels has: its view, and what is asked of it from outside.
class RankHost {
 public:
  // What a kernel has reported so far; does not wait for the device.
  protocol::OpResult report() const;
  // As counted so far, see CounterReader.
  Statistics statistics() const;

 protected:
  // `bases[r]`: memory of rank r as the current device sees it, null where it does not. Throws
  // std::runtime_error with the CUDA error where the device refuses.
  RankHost(const protocol::LowLatencyConfig& config, uint32_t self_rank,
           const std::vector<std::byte*>& bases, uint64_t timeout_ns);
  ~RankHost();
  RankHost(const RankHost&) = delete;
  RankHost& operator=(const RankHost&) = delete;

  // After a launch: what is known of kernels so far. Throws where it was refused.
  protocol::OpResult launched(const char* what) const;

  RankView view_;

 private:
  std::byte** bases_ = nullptr;
  CounterReader counters_;
};

class LowLatencyRank : public RankHost {
 public:
  // `bases[r]`: memory of rank r as the current device sees it. `num_sms`: blocks a kernel has at
  // most. `shares_gpu`: all ranks are on the same GPU, in this process. Throws std::runtime_error
  // with the CUDA error where the device refuses, std::invalid_argument where it has too little
  // shared memory.
  LowLatencyRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                 const std::vector<std::byte*>& bases, uint64_t timeout_ns, uint32_t num_sms,
                 bool shares_gpu);

  protocol::OpResult dispatch_send(const DispatchSendParams& send, void* stream);
  protocol::OpResult dispatch_recv(const DispatchRecvParams& recv, void* stream);
  protocol::OpResult combine_send(const CombineSendParams& send, void* stream);
  protocol::OpResult combine_recv(const CombineRecvParams& recv, void* stream);
  // Both halves in one kernel. No other operation of the phase may be between its halves.
  protocol::OpResult dispatch(const DispatchSendParams& send, const DispatchRecvParams& recv,
                              void* stream);
  protocol::OpResult combine(const CombineSendParams& send, const CombineRecvParams& recv,
                             void* stream);

 private:
  // The view and the launch of a kernel with so much to do.
  struct Plan;
  bool has_one_each(uint64_t num_items) const;
  Plan plan(uint64_t num_items, void* stream, uint64_t num_parts = ~uint64_t{0},
            uint32_t items_per_warp = 1);
  Plan plan_by_expert(uint64_t num_items, void* stream);
  Plan plan_workspace(uint32_t num_tokens, uint32_t num_slots, void* stream);
  Plan plan_workspace_combine(uint32_t num_tokens, uint32_t num_slots, bool sends, void* stream);
  // Parts of rows that the latest dispatch brings, and that its combine sends, at most.
  uint64_t num_parts_received() const;
  uint64_t num_parts_answered() const;

  uint32_t num_sms_, half_of_sms_;
  uint32_t items_per_warp_;       // with more, two blocks an SM
  bool lets_next_start_ = false;  // the kernel launched last, before its end
  bool has_room_for_two_;         // two blocks of any kernel fit an SM
  uint32_t num_tokens_ = 0;       // of the latest dispatch
  struct OwnBatch {
    uint32_t num_tokens;
    uint32_t* answers;
  };
  std::vector<OwnBatch> batches_;  // [W]: of the latest send into each workspace
};

}  // namespace ep::cuda
