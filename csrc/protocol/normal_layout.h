// Where everything lies in one rank's symmetric memory for the normal kernels. Peers write, the
// owner reads (credits: peers write, the owner's sends read). Pictures, the table of writers and
// readers, and the rules are in README.md beside this.
//
// A batch of any size travels in rounds of at most C tokens a source, so the memory does not grow
// with the batch: the budget decides C. R ranks, E experts, L largest number of local experts, H
// hidden, K top_k, N = ceil(H / 128) scales of a float8 row.
#pragma once

#include "protocol/base.h"
#include "protocol/epochs.h"
#include "protocol/float8.h"
#include "protocol/layout.h"  // the limits of ranks, experts and top_k, which all kernels share
#include "protocol/partition.h"
#include "protocol/signals.h"

namespace ep::protocol {

// Changes whenever a region, a word or a rule does: ranks of different builds must not meet.
constexpr uint32_t kNormalProtocolVersion = 2;

// Rounds in flight: while one is unpacked, the next one arrives.
constexpr uint32_t kNumRoundBanks = 2;

// What all ranks must agree on.
struct NormalConfig {
  uint32_t num_ranks;
  uint32_t num_experts;
  uint32_t hidden;
  uint32_t top_k;
  DType dtype;                    // of combine's rows, kFloat32 or kBFloat16
  DType dispatch_dtype;           // of dispatch's rows: the same, or kFloat8E4M3
  ScaleFormat scale_format;       // of those
  uint32_t num_tokens_per_round;  // C, at most kMaxCount
};

// Counts of one source for one rank, followed by `uint64_t[L]`: rows for each local expert. 64 bits
// each: a batch is bounded by the caller's memory only.
struct BatchCounts {
  uint64_t epoch;       // of the signal that publishes this: other words are another operation's
  uint64_t num_tokens;  // of the source's batch, for whatever rank
  uint64_t num_rows;    // of them, for this rank
};
static_assert(sizeof(BatchCounts) == 24);

class NormalLayout {
 public:
  EP_HOST_DEVICE constexpr explicit NormalLayout(const NormalConfig& config)
      : config_(config), partition_{config.num_experts, config.num_ranks} {
    const uint64_t num_ranks = config.num_ranks;
    num_scales_ = config.dispatch_dtype == DType::kFloat8E4M3 ? scales_for(config.hidden) : 0;
    row_bytes_ = config.hidden * element_bytes(config.dtype);
    dispatch_row_bytes_ = config.hidden * element_bytes(config.dispatch_dtype);
    header_bytes_ = align_up(uint64_t{config.top_k} * 8 + 4, kHeaderAlign);
    const uint64_t combined_end = header_bytes_ + row_bytes_;
    scales_in_message_ = align_up(header_bytes_ + dispatch_row_bytes_, kScalesAlign);
    const uint64_t dispatched_end = scales_in_message_ + uint64_t{num_scales_} * 4;
    message_bytes_ =
        align_up(combined_end > dispatched_end ? combined_end : dispatched_end, kSlotAlign);
    counts_bytes_ = align_up(sizeof(BatchCounts) + partition_.num_max_local_experts() * uint64_t{8},
                             kSlotAlign);

    signals_offset_ = 0;
    credits_offset_ = end_of(signals_offset_, kNumRoundBanks * kNumPhases * num_ranks * 8);
    sleepers_offset_ = end_of(credits_offset_, kNumPhases * num_ranks * 8);
    counts_offset_ = end_of(sleepers_offset_, 2 * kNumPhases * num_ranks * 4);
    inbox_offset_ = end_of(counts_offset_, num_ranks * counts_bytes_);
    num_bytes_ = inbox_offset_ + config.num_tokens_per_round * bytes_per_token();
  }

  // The largest C whose memory fits into `num_bytes`; 0: none does. `config`'s own C is ignored.
  EP_HOST_DEVICE static constexpr uint32_t num_tokens_that_fit(NormalConfig config,
                                                               uint64_t num_bytes) {
    config.num_tokens_per_round = 0;
    const NormalLayout without_inbox(config);
    if (num_bytes < without_inbox.num_bytes()) return 0;
    const uint64_t num_tokens =
        (num_bytes - without_inbox.num_bytes()) / without_inbox.bytes_per_token();
    return static_cast<uint32_t>(num_tokens < kMaxCount ? num_tokens : kMaxCount);
  }

  EP_HOST_DEVICE constexpr const NormalConfig& config() const { return config_; }
  EP_HOST_DEVICE constexpr const ExpertPartition& partition() const { return partition_; }
  EP_HOST_DEVICE constexpr uint64_t row_bytes() const { return row_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t dispatch_row_bytes() const { return dispatch_row_bytes_; }
  // N; 0 where rows are not float8.
  EP_HOST_DEVICE constexpr uint32_t num_scales() const { return num_scales_; }
  // 32-bit words of a received row's scales.
  EP_HOST_DEVICE constexpr uint32_t num_scale_words() const {
    return config_.scale_format == ScaleFormat::kUE8M0 ? (num_scales_ + 3) / 4 : num_scales_;
  }
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }
  // From one message to the next.
  EP_HOST_DEVICE constexpr uint64_t message_bytes() const { return message_bytes_; }
  // Rounds of a batch; all ranks run those of the largest.
  EP_HOST_DEVICE constexpr uint64_t num_rounds(uint64_t num_tokens) const {
    return (num_tokens + config_.num_tokens_per_round - 1) / config_.num_tokens_per_round;
  }
  // Ranks that a token can go to.
  EP_HOST_DEVICE constexpr uint32_t num_max_messages_per_token() const {
    return config_.num_ranks < config_.top_k ? config_.num_ranks : config_.top_k;
  }

  // Offsets in bytes from the base of the rank that owns the memory.
  EP_HOST_DEVICE constexpr uint64_t signal(uint32_t bank, Phase phase, uint32_t src_rank) const {
    return signals_offset_ +
           ((bank * kNumPhases + as_idx(phase)) * uint64_t{config_.num_ranks} + src_rank) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t credit(Phase phase, uint32_t peer_rank) const {
    return credits_offset_ + (as_idx(phase) * uint64_t{config_.num_ranks} + peer_rank) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t signal_sleepers(Phase phase, uint32_t src_rank) const {
    return sleepers_offset_ + (as_idx(phase) * uint64_t{config_.num_ranks} + src_rank) * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t credit_sleepers(Phase phase, uint32_t peer_rank) const {
    return sleepers_offset_ +
           ((kNumPhases + as_idx(phase)) * uint64_t{config_.num_ranks} + peer_rank) * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t counts(uint32_t src_rank) const {
    return counts_offset_ + src_rank * counts_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t expert_counts(uint32_t src_rank) const {
    return counts(src_rank) + sizeof(BatchCounts);
  }
  // Of a message: its K local experts and their K weights, which come home with the rows where they
  // are asked for; the token on its source; its row, and in dispatch the scales of that.
  EP_HOST_DEVICE constexpr uint64_t message(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    const uint64_t first =
        (uint64_t{bank} * config_.num_ranks + src_rank) * config_.num_tokens_per_round;
    return inbox_offset_ + (first + slot) * message_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t weights(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    return message(bank, src_rank, slot) + uint64_t{config_.top_k} * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t token(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    return message(bank, src_rank, slot) + uint64_t{config_.top_k} * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t row(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    return message(bank, src_rank, slot) + header_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t scales(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    return message(bank, src_rank, slot) + scales_in_message_;
  }

 private:
  EP_HOST_DEVICE static constexpr uint64_t end_of(uint64_t offset, uint64_t bytes) {
    return align_up(offset + bytes, kSlotAlign);
  }
  EP_HOST_DEVICE static constexpr uint32_t as_idx(Phase phase) {
    return static_cast<uint32_t>(phase);
  }
  // What one more token a round costs.
  EP_HOST_DEVICE constexpr uint64_t bytes_per_token() const {
    return uint64_t{kNumRoundBanks} * config_.num_ranks * message_bytes_;
  }

  NormalConfig config_;
  ExpertPartition partition_;
  uint32_t num_scales_ = 0;
  uint64_t row_bytes_ = 0, dispatch_row_bytes_ = 0;
  uint64_t header_bytes_ = 0, scales_in_message_ = 0, message_bytes_ = 0, counts_bytes_ = 0;
  uint64_t signals_offset_ = 0, credits_offset_ = 0, sleepers_offset_ = 0, counts_offset_ = 0;
  uint64_t inbox_offset_ = 0, num_bytes_ = 0;
};

}  // namespace ep::protocol
