// Where everything lies in one rank's symmetric memory. Every rank has the same layout; peers
// write, the owner reads (credits: peers write, the owner's sends read). Pictures and the table of
// writers and readers are in README.md beside this file.
//
// R ranks, E experts, L largest number of local experts, M tokens a rank, H hidden, K top_k,
// B banks, C = min(K, R) outcome columns.
#pragma once

#include "protocol/base.h"
#include "protocol/epochs.h"
#include "protocol/message.h"
#include "protocol/partition.h"
#include "protocol/signals.h"

namespace ep::protocol {

// Changes whenever a region, a word or a rule does: ranks of different builds must not meet.
constexpr uint32_t kProtocolVersion = 2;

// What all ranks must agree on.
struct LowLatencyConfig {
  uint32_t num_ranks;
  uint32_t num_experts;
  uint32_t num_max_tokens_per_rank;
  uint32_t hidden;
  uint32_t top_k;
  uint32_t num_banks;
  DType dtype;
};

// Limits that the widths of the wire words set.
constexpr uint32_t kNumMaxRanks = 1024;
constexpr uint32_t kNumMaxExperts = 1u << 16;  // local_expert is u16
constexpr uint32_t kNumMaxTokensPerRank =
    static_cast<uint32_t>(kMaxCount);  // signal count, 16 bits
constexpr uint32_t kMaxTopK = 64;
constexpr uint32_t kMaxBanks = 64;

class LowLatencyLayout {
 public:
  EP_HOST_DEVICE constexpr explicit LowLatencyLayout(const LowLatencyConfig& config)
      : config_(config), partition_{config.num_experts, config.num_ranks} {
    const uint64_t num_banks = config.num_banks, num_ranks = config.num_ranks;
    row_bytes_ = config.hidden * element_bytes(config.dtype);
    outcome_row_bytes_ = align_up(row_bytes_, kSlotAlign);
    message_bytes_ = align_up(header_bytes(config.top_k) + row_bytes_, kSlotAlign);

    signals_offset_ = 0;
    credits_offset_ = end_of(signals_offset_, num_banks * kNumPhases * num_ranks * 8);
    sleepers_offset_ = end_of(credits_offset_, kNumPhases * num_ranks * 8);
    counts_offset_ = end_of(sleepers_offset_, 2 * kNumPhases * num_ranks * 4);
    inbox_offset_ =
        end_of(counts_offset_, num_banks * num_ranks * partition_.num_max_local_experts() * 8);
    outcome_offset_ = end_of(
        inbox_offset_, num_banks * num_ranks * config.num_max_tokens_per_rank * message_bytes_);
    num_bytes_ = end_of(outcome_offset_, num_banks * num_outcome_slots() * outcome_row_bytes_);
  }

  EP_HOST_DEVICE constexpr const LowLatencyConfig& config() const { return config_; }
  EP_HOST_DEVICE constexpr const ExpertPartition& partition() const { return partition_; }
  EP_HOST_DEVICE constexpr uint64_t row_bytes() const { return row_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t message_bytes() const { return message_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }

  // Columns of a token's outcome: at most one partial row per contributing rank.
  EP_HOST_DEVICE constexpr uint32_t num_outcome_columns() const {
    return config_.top_k < config_.num_ranks ? config_.top_k : config_.num_ranks;
  }
  EP_HOST_DEVICE constexpr uint64_t num_outcome_slots() const {
    return uint64_t{config_.num_max_tokens_per_rank} * num_outcome_columns();
  }
  // Rows an expert may receive from all ranks together.
  EP_HOST_DEVICE constexpr uint64_t expert_capacity() const {
    return uint64_t{config_.num_ranks} * config_.num_max_tokens_per_rank;
  }

  // Offsets in bytes from the base of the rank that owns the memory.
  EP_HOST_DEVICE constexpr uint64_t signal(uint32_t bank, Phase phase, uint32_t src_rank) const {
    return signals_offset_ +
           ((bank * kNumPhases + as_idx(phase)) * config_.num_ranks + src_rank) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t credit(Phase phase, uint32_t peer_rank) const {
    return credits_offset_ + (as_idx(phase) * config_.num_ranks + peer_rank) * 8;
  }
  // How many of the owner's threads sleep on the signal (or credit) word of that peer. Only the
  // shm link reads it: a writer makes the wake-up system call only where somebody sleeps.
  EP_HOST_DEVICE constexpr uint64_t signal_sleepers(Phase phase, uint32_t src_rank) const {
    return sleepers_offset_ + (as_idx(phase) * config_.num_ranks + src_rank) * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t credit_sleepers(Phase phase, uint32_t peer_rank) const {
    return sleepers_offset_ + ((kNumPhases + as_idx(phase)) * config_.num_ranks + peer_rank) * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t counts(uint32_t bank, uint32_t src_rank) const {
    return counts_offset_ +
           (bank * config_.num_ranks + src_rank) * uint64_t{partition_.num_max_local_experts()} * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t message(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    uint64_t num_before =
        (uint64_t{bank} * config_.num_ranks + src_rank) * config_.num_max_tokens_per_rank + slot;
    return inbox_offset_ + num_before * message_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t payload_in_message() const {
    return header_bytes(config_.top_k);
  }
  EP_HOST_DEVICE constexpr uint64_t outcome(uint32_t bank, uint64_t outcome_slot) const {
    return outcome_offset_ + (bank * num_outcome_slots() + outcome_slot) * outcome_row_bytes_;
  }

  // The first byte of each region, in order, for tests and for drawing.
  EP_HOST_DEVICE constexpr uint64_t signals_offset() const { return signals_offset_; }
  EP_HOST_DEVICE constexpr uint64_t credits_offset() const { return credits_offset_; }
  EP_HOST_DEVICE constexpr uint64_t sleepers_offset() const { return sleepers_offset_; }
  EP_HOST_DEVICE constexpr uint64_t counts_offset() const { return counts_offset_; }
  EP_HOST_DEVICE constexpr uint64_t inbox_offset() const { return inbox_offset_; }
  EP_HOST_DEVICE constexpr uint64_t outcome_offset() const { return outcome_offset_; }

 private:
  EP_HOST_DEVICE static constexpr uint64_t end_of(uint64_t offset, uint64_t bytes) {
    return align_up(offset + bytes, kSlotAlign);
  }
  EP_HOST_DEVICE static constexpr uint32_t as_idx(Phase phase) {
    return static_cast<uint32_t>(phase);
  }

  LowLatencyConfig config_;
  ExpertPartition partition_;
  uint64_t row_bytes_ = 0, outcome_row_bytes_ = 0, message_bytes_ = 0;
  uint64_t signals_offset_ = 0, credits_offset_ = 0, sleepers_offset_ = 0, counts_offset_ = 0;
  uint64_t inbox_offset_ = 0, outcome_offset_ = 0, num_bytes_ = 0;
};

}  // namespace ep::protocol
