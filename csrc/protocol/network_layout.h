// What a rank's symmetric memory holds besides where some peers are reached over a network, which
// takes from the memory of whoever sends: words in which arrivals are counted, and the outbox.
// README.md beside this draws it.
#pragma once

#include "protocol/layout.h"

namespace ep::protocol {

class NetworkLayout {
 public:
  // `layout`: of a config that packs messages.
  EP_HOST_DEVICE constexpr explicit NetworkLayout(const LowLatencyLayout& layout)
      : num_ranks_(layout.config().num_ranks),
        num_tokens_(layout.config().num_max_tokens_per_rank),
        counts_stride_(layout.partition().num_max_local_experts() * 8),
        message_bytes_(static_cast<uint32_t>(layout.packed_message_bytes())),
        message_stride_(static_cast<uint32_t>(layout.packed_message_stride())),
        outcome_bytes_(static_cast<uint32_t>(layout.outcome_bytes())),
        outcome_stride_(static_cast<uint32_t>(align_up(outcome_bytes_, kSlotAlign))),
        num_rows_(layout.packs_rows() ? layout.config().top_k : 1) {
    const uint64_t num_pairs = uint64_t{layout.config().num_banks} * num_ranks_;
    arrivals_offset_ = align_up(layout.num_bytes(), kSlotAlign);
    counts_offset_ = end_of(arrivals_offset_, num_pairs * kNumPhases * 8);
    messages_offset_ = end_of(counts_offset_, num_pairs * counts_stride_);
    outcomes_offset_ = end_of(messages_offset_, num_pairs * num_tokens_ * message_stride_);
    num_bytes_ = end_of(outcomes_offset_, num_pairs * num_tokens_ * num_rows_ * outcome_stride_);
  }

  // Of a message, and of rows of combine with their scales, side by side, as they are put.
  EP_HOST_DEVICE constexpr uint32_t message_bytes() const { return message_bytes_; }
  EP_HOST_DEVICE constexpr uint32_t outcome_bytes(uint32_t num_rows) const {
    return (num_rows - 1) * outcome_stride_ + outcome_bytes_;
  }
  // Of all: the other regions', too.
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }

  // Offsets in bytes from the base of the rank that owns the memory. What has arrived from a source
  // with operations of that bank since the beginning: messages, and for each dispatch its counts.
  EP_HOST_DEVICE constexpr uint64_t arrivals(uint32_t bank, Phase phase, uint32_t src_rank) const {
    return arrivals_offset_ + uint64_t{arrivals_idx(bank, phase, src_rank)} * 8;
  }
  EP_HOST_DEVICE constexpr uint32_t arrivals_idx(uint32_t bank, Phase phase,
                                                 uint32_t src_rank) const {
    return (bank * kNumPhases + static_cast<uint32_t>(phase)) * num_ranks_ + src_rank;
  }
  // The outbox: what goes to rank `dst_rank`, as it will lie there.
  EP_HOST_DEVICE constexpr uint64_t staged_counts(uint32_t bank, uint32_t dst_rank) const {
    return counts_offset_ + uint64_t{bank * num_ranks_ + dst_rank} * counts_stride_;
  }
  EP_HOST_DEVICE constexpr uint64_t staged_message(uint32_t bank, uint32_t dst_rank,
                                                   uint32_t slot) const {
    return messages_offset_ + uint64_t{slot_idx(bank, dst_rank, slot)} * message_stride_;
  }
  // Of combine: what answers message `slot` of that rank, a row; or, where all rows go home, the
  // row of its `entry`.
  EP_HOST_DEVICE constexpr uint64_t staged_outcome(uint32_t bank, uint32_t dst_rank, uint32_t slot,
                                                   uint32_t entry) const {
    const uint64_t row = uint64_t{slot_idx(bank, dst_rank, slot)} * num_rows_ + entry;
    return outcomes_offset_ + row * outcome_stride_;
  }

  EP_HOST_DEVICE constexpr uint64_t arrivals_offset() const { return arrivals_offset_; }
  EP_HOST_DEVICE constexpr uint64_t counts_offset() const { return counts_offset_; }
  EP_HOST_DEVICE constexpr uint64_t messages_offset() const { return messages_offset_; }
  EP_HOST_DEVICE constexpr uint64_t outcomes_offset() const { return outcomes_offset_; }

 private:
  EP_HOST_DEVICE static constexpr uint64_t end_of(uint64_t offset, uint64_t bytes) {
    return align_up(offset + bytes, kSlotAlign);
  }
  EP_HOST_DEVICE constexpr uint32_t slot_idx(uint32_t bank, uint32_t rank, uint32_t slot) const {
    return (bank * num_ranks_ + rank) * num_tokens_ + slot;
  }

  uint32_t num_ranks_, num_tokens_;
  uint32_t counts_stride_, message_bytes_, message_stride_, outcome_bytes_, outcome_stride_;
  uint32_t num_rows_;  // of combine that answer a message
  uint64_t arrivals_offset_ = 0, counts_offset_ = 0, messages_offset_ = 0, outcomes_offset_ = 0;
  uint64_t num_bytes_ = 0;
};

}  // namespace ep::protocol
