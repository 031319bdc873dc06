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
  virtual ~NormalRank() = default;

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

 protected:
  class Op;

  // What normal_nodes.h does otherwise, because not all ranks reach each other's memory.
  virtual bool send_counts(Op& op, uint64_t num_tokens);
  virtual void send_tokens(Op& op, uint64_t round, const protocol::NormalDispatchParams& params);
  virtual bool receive_tokens(Op& op, uint64_t round, const protocol::NormalDispatchParams& params);
  virtual void send_home(Op& op, uint64_t round, const protocol::NormalCombineParams& params);
  virtual bool add_up(Op& op, uint64_t round, const protocol::NormalCombineParams& params);
  // Who writes to this rank's memory what `src_rank` has dispatched to it.
  virtual uint32_t writer_of(uint32_t src_rank) const { return src_rank; }
  // Writes a word that `peer` waits for; offsets are in its memory.
  virtual void publish_word(protocol::Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                            uint64_t sleepers);

  // Tokens of a round, from `begin` on.
  struct Tokens {
    uint64_t begin, end;
  };
  Tokens tokens_of(uint64_t round, uint64_t num_tokens) const;
  bool check_experts(Op& op, const protocol::NormalCountsParams& params) const;
  void route(const protocol::NormalCountsParams& params);
  void write_counts(std::byte* counts, const Op& op, uint32_t dst_rank, uint64_t num_tokens) const;
  bool read_counts(Op& op, uint32_t src_rank, const protocol::NormalCountsParams& params);
  void start_rows(const protocol::RecvRows& rows);
  void write_message(std::byte* message, uint32_t first_rank, uint32_t last_rank, uint64_t token,
                     const Row& row, Store store,
                     const protocol::NormalDispatchParams& params) const;
  bool unpack_source(Op& op, uint64_t round, uint32_t src_rank,
                     const protocol::NormalDispatchParams& params);
  void send_rows(Op& op, uint64_t round, uint32_t src_rank, uint32_t dst_rank, uint32_t as_rank,
                 const protocol::NormalCombineParams& params);
  void add_up_weights(uint32_t bank, uint64_t token, const protocol::NormalCombineParams& params);

  uint32_t self_rank_;
  protocol::NormalLayout layout_;
  std::vector<std::byte*> bases_;
  WaitPolicy policy_;
  // Ranks with which signals and credits are exchanged: all of them, in order.
  std::vector<uint32_t> peers_;

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
