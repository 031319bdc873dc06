// The three normal kernels over shared memory, and the private state of one rank.
//
// Each call sends and receives: it is the executable specification of the rounds in
// protocol/README.md. A call that refuses an expert has no effect; one that gives up or is
// interrupted fails the buffer, because peers may have seen a part of it. What each kernel is
// given, and the shapes, are in protocol/normal_op.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/rows.h"
#include "cpu/statistics.h"
#include "cpu/wait.h"
#include "protocol/normal_layout.h"
#include "protocol/normal_op.h"
#include "protocol/op.h"

namespace ep::cpu {

// Kinds of calls, for the statistics.
enum class NormalCall : uint32_t { kCounts, kDispatch, kCombine };
constexpr uint32_t kNumNormalCalls = 3;

class NormalRank {
 public:
  // `bases[r]` is where this process sees the symmetric memory of rank r.
  NormalRank(const protocol::NormalConfig& config, uint32_t self_rank,
             std::vector<std::byte*> bases, WaitPolicy policy);

  // Routes the batch and exchanges its counts; then `dispatch` brings the rows.
  protocol::OpResult exchange_counts(const protocol::NormalCountsParams& params);
  protocol::OpResult dispatch(const protocol::NormalDispatchParams& params);
  protocol::OpResult combine(const protocol::NormalCombineParams& params);

  // Rounds completed. Exchanged counts are a round of dispatch.
  uint64_t epoch(protocol::Phase phase) const {
    return epochs_[static_cast<uint32_t>(phase)].load(std::memory_order_acquire);
  }
  // By NormalCall.
  const Statistics& statistics() const { return statistics_; }

 private:
  class Op;

  bool check_experts(Op& op, const protocol::NormalCountsParams& params) const;
  void route(const protocol::NormalCountsParams& params);
  void write_counts(Op& op, uint64_t num_tokens);
  bool read_counts(Op& op, uint32_t src_rank, const protocol::NormalCountsParams& params);
  void start_rows(const protocol::RecvRows& rows);
  void send_tokens(Op& op, uint64_t round, const protocol::NormalDispatchParams& params);
  void write_header(uint32_t dst_rank, uint32_t bank, uint32_t slot, uint64_t token,
                    const protocol::NormalDispatchParams& params);
  bool unpack_source(Op& op, uint64_t round, uint32_t src_rank,
                     const protocol::NormalDispatchParams& params);
  void send_home(Op& op, uint64_t round, const protocol::NormalCombineParams& params);
  void add_up_weights(uint32_t bank, uint64_t token, const protocol::NormalCombineParams& params);
  bool add_up(Op& op, uint64_t round, const protocol::NormalCombineParams& params);

  uint32_t self_rank_;
  protocol::NormalLayout layout_;
  std::vector<std::byte*> bases_;
  WaitPolicy policy_;

  std::atomic<uint64_t> epochs_[protocol::kNumPhases] = {};
  std::atomic<bool> failed_{false};
  Statistics statistics_;

  // Scratch: of a batch, rows for each rank and for each expert; of a round, rows for each rank.
  std::vector<uint64_t> num_rows_to_;
  std::vector<uint64_t> num_rows_for_expert_;
  std::vector<uint32_t> num_in_round_;
  // And where the rows of each rank are in recv_x: the next one, and the end.
  std::vector<uint64_t> next_row_;
  std::vector<uint64_t> end_row_;
  OutgoingRows outgoing_;
};

}  // namespace ep::cpu
