// The four low-latency kernels over shared memory, and the private state of one rank.
//
// Read these first: they are the executable specification. A call either completes or has no
// effect (nothing is published, no epoch advances), so a failed or interrupted call can be told
// apart from a late one.
//
// Rows are always pushed and batches never tagged; both other ways are for GPUs. What each kernel
// is given, and the shapes, are in protocol/op.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/rows.h"
#include "cpu/statistics.h"
#include "cpu/wait.h"
#include "protocol/layout.h"
#include "protocol/op.h"

namespace ep::cpu {

using protocol::CombineRecvParams;
using protocol::CombineSendParams;
using protocol::DispatchRecvParams;
using protocol::DispatchSendParams;
using protocol::HandleEntry;
using protocol::HandleMessage;
using protocol::HandleView;
using protocol::OpResult;

class LowLatencyRank {
 public:
  // `bases[r]` is where this process sees the symmetric memory of rank r.
  LowLatencyRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                 std::vector<std::byte*> bases, WaitPolicy policy);
  virtual ~LowLatencyRank() = default;

  OpResult dispatch_send(const DispatchSendParams& params);
  OpResult dispatch_recv(const DispatchRecvParams& params);
  OpResult combine_send(const CombineSendParams& params);
  OpResult combine_recv(const CombineRecvParams& params);

  const protocol::LowLatencyLayout& layout() const { return layout_; }
  uint64_t epoch(protocol::Phase phase, protocol::Half half) const {
    return epochs_[index(phase)][index(half)].load(std::memory_order_acquire);
  }
  // By kind, phase * 2 + half.
  const Statistics& statistics() const { return statistics_; }

 protected:
  class Op;

  // Where a message for an expert of a rank is sent.
  struct Destination {
    uint32_t rank;
    bool is_node = false;  // to be forwarded there: entries name experts by their global number
  };
  // Where a message is written.
  struct MessagePlace {
    std::byte* header;
    std::byte* row;
    float* scales;
    bool has_row = false;  // and scales: they lie there already
  };
  // Where rows of combine travel as float8: a sum, and its row as it lies in an outcome.
  struct SumScratch {
    explicit SumScratch(const protocol::LowLatencyLayout& layout);
    std::vector<float> sum;
    std::vector<std::byte> row;
  };
  // What multi_node.h does otherwise, because not all ranks reach each other's memory.
  virtual Destination destination(uint32_t rank) const { return {rank}; }
  // Who writes to this rank's memory what `src_rank` has dispatched to it, and is sent the rows
  // that answer it.
  virtual uint32_t writer_of(uint32_t src_rank) const { return src_rank; }
  virtual MessagePlace place_message(const Op& op, uint32_t dst_rank, uint32_t slot,
                                     uint32_t token);
  virtual void message_is_placed(const Op&, uint32_t /* dst_rank */, uint32_t /* slot */,
                                 uint32_t /* token */) {}
  virtual std::byte* place_row(const Op& op, uint32_t src_rank, uint32_t outcome_slot);
  virtual void row_is_placed(const Op&, uint32_t /* src_rank */, uint32_t /* outcome_slot */) {}
  virtual uint64_t num_outcome_slots(uint32_t /* src_rank */) const {
    return layout_.num_outcome_slots();
  }
  // Writes a word that `peer` waits for; offsets are in its memory.
  virtual void publish_word(protocol::Phase phase, uint32_t peer, uint64_t word, uint64_t value,
                            uint64_t sleepers);

  bool is_reduced_at_source() const {
    return layout_.config().reduction == protocol::Reduction::kSource;
  }
  bool is_combine_float8() const { return layout_.num_combine_scales() > 0; }
  // Of a row of combine with its scales.
  uint64_t travelling_bytes() const {
    return is_combine_float8() ? sum_scratch_.row.size() : layout_.row_bytes();
  }

  template <typename E>
  static uint32_t index(E value) {
    return static_cast<uint32_t>(value);
  }

  bool check_experts(Op& op, const DispatchSendParams& params) const;
  void write_messages(Op& op, const DispatchSendParams& params);
  void write_counts(uint64_t* counts, const Op& op, uint32_t dst_rank) const;
  void publish_counts_and_signals(Op& op);
  bool unpack_sources(Op& op, const DispatchRecvParams& params);
  void finish_dispatch(Op& op, const DispatchRecvParams& params);
  bool unpack_source(Op& op, uint32_t src_rank, const DispatchRecvParams& params);
  bool unpack_message(Op& op, uint32_t src_rank, uint32_t slot, const DispatchRecvParams& params);
  bool check_header(Op& op, uint32_t src_rank, const protocol::MessageHeader& header) const;
  bool place_entry(Op& op, uint32_t src_rank, const protocol::ExpertEntry* entries, uint32_t i,
                   uint64_t* row);
  bool check_counts(Op& op, uint32_t src_rank) const;
  void copy_rows(Op& op, uint32_t src_rank, uint32_t first_message, uint64_t num_rows,
                 const DispatchRecvParams& params) const;
  Store store_for(uint32_t src_rank, uint64_t num_rows) const;
  uint32_t find_messages(const CombineSendParams& params);
  void count_due(const CombineRecvParams& params);
  void write_sum(SumScratch& scratch, std::byte* out, protocol::DType dtype,
                 const std::byte* const* rows, const float* weights, uint32_t num_rows,
                 Store store) const;
  void send_messages(Op& op, uint32_t src_rank, const CombineSendParams& params);
  uint64_t send_partials(Op& op, uint32_t src_rank, const CombineSendParams& params);
  uint64_t send_rows(Op& op, uint32_t src_rank, const CombineSendParams& params);

  uint32_t self_rank_;
  protocol::LowLatencyLayout layout_;
  std::vector<std::byte*> bases_;
  WaitPolicy policy_;
  // Ranks with which signals and credits are exchanged: all of them, in order.
  std::vector<uint32_t> peers_;

  // Operations completed, by phase and half. In CUDA these four words live on the device.
  std::atomic<uint64_t> epochs_[protocol::kNumPhases][protocol::kNumHalves] = {};
  std::atomic<bool> failed_{false};
  Statistics statistics_;

  // Scratch of dispatch_send: messages for each rank so far, rows for each expert so far.
  std::vector<uint32_t> num_messages_to_;
  std::vector<uint32_t> num_rows_for_expert_;
  OutgoingRows outgoing_;
  // Scratch of dispatch_recv: next free row of each local expert, now and before the source that is
  // being unpacked; rows, messages and entries so far.
  std::vector<uint32_t> next_row_;
  std::vector<uint32_t> first_row_;
  uint64_t num_rows_ = 0;
  uint32_t next_message_ = 0;
  uint32_t next_entry_ = 0;
  // Scratch of combine_send: where each source's messages begin in the handle.
  std::vector<uint32_t> first_message_of_;
  // Scratch of combine_recv: messages that each rank answers, the last token that had one to it.
  std::vector<uint32_t> num_due_;
  std::vector<uint32_t> last_token_of_;
  SumScratch sum_scratch_;
};

}  // namespace ep::cpu
