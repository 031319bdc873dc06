// Where everything lies in one rank's symmetric memory for the normal kernels on GPUs. Peers write
// rows where the owner's experts read them, and read rows where those have written them; the
// picture, the table of writers and readers, and the rules are in README.md beside this.
//
// R ranks, E experts, L largest number of local experts, H hidden, K top_k, P rows that a rank has
// room for, C tokens of a source in a round, S 32-bit words of a float8 row's scales.
#pragma once

#include "protocol/base.h"
#include "protocol/float8.h"
#include "protocol/layout.h"  // the limits of ranks, experts and top_k, which all kernels share
#include "protocol/normal_layout.h"
#include "protocol/partition.h"
#include "protocol/signals.h"

namespace ep::protocol {

// Changes whenever a region, a word or a rule does: ranks of different builds must not meet.
constexpr uint32_t kNormalDeviceProtocolVersion = 1;

// A token's ranks are the bits of a word; rows are counted by expert in shared memory.
constexpr uint32_t kNumMaxDeviceRanks = 64;
constexpr uint32_t kNumMaxDeviceExperts = 4096;

// What all ranks must agree on.
struct NormalDeviceConfig {
  uint32_t num_ranks;
  uint32_t num_experts;
  uint32_t hidden;
  uint32_t top_k;
  DType dtype;                     // of combine's rows, kFloat32 or kBFloat16
  DType dispatch_dtype;            // of dispatch's rows: the same, or kFloat8E4M3
  ScaleFormat scale_format;        // of those
  uint32_t num_rows;               // P, at least 2 R
  bool global_expert_ids = false;  // experts are listed by their global number
};

// Counts of one source, followed by `uint32_t[R]`: its rows for each rank, and `uint32_t[L]`: its
// rows for each expert of this rank.
struct DeviceBatchCounts {
  uint64_t epoch;  // of the word that publishes this: other counts are another operation's
  uint64_t num_tokens;
};
static_assert(sizeof(DeviceBatchCounts) == 16);

class NormalDeviceLayout {
 public:
  EP_HOST_DEVICE constexpr explicit NormalDeviceLayout(const NormalDeviceConfig& config)
      : config_(config), partition_{config.num_experts, config.num_ranks} {
    const uint64_t num_ranks = config.num_ranks, num_rows = config.num_rows;
    num_scales_ = config.dispatch_dtype == DType::kFloat8E4M3 ? scales_for(config.hidden) : 0;
    row_bytes_ = config.hidden * element_bytes(config.dtype);
    dispatch_row_bytes_ = config.hidden * element_bytes(config.dispatch_dtype);
    counts_bytes_ =
        align_up(sizeof(DeviceBatchCounts) + (num_ranks + partition_.num_max_local_experts()) * 4,
                 kSlotAlign);

    uint64_t end = 0;
    ready_offset_ = take(&end, kNumPhases * num_ranks * 8);
    done_offset_ = take(&end, num_ranks * 8);
    credits_offset_ = take(&end, num_ranks * 8);
    round_signals_offset_ = take(&end, kNumPhases * kNumRoundBanks * num_ranks * 8);
    round_credits_offset_ = take(&end, kNumPhases * num_ranks * 8);
    counts_offset_ = take(&end, num_ranks * counts_bytes_);
    rows_offset_ = take(&end, num_rows * dispatch_row_bytes_);
    scales_offset_ = take(&end, num_rows * num_scale_words() * 4);
    topk_idx_offset_ = take(&end, num_rows * config.top_k * 4);
    topk_weights_offset_ = take(&end, num_rows * config.top_k * 4);
    src_tokens_offset_ = take(&end, num_rows * 4);
    combine_rows_offset_ = take(&end, num_rows * row_bytes_);
    combine_weights_offset_ = take(&end, num_rows * config.top_k * 4);
    num_bytes_ = end;
  }

  // A budget in which num_rows_that_fit finds room for `config`'s P.
  EP_HOST_DEVICE static constexpr uint64_t budget_for(const NormalDeviceConfig& config) {
    return NormalDeviceLayout(config).num_bytes() + kAlignmentBytes;
  }

  // The largest P whose memory fits into `num_bytes`; 0: none does. `config`'s own P is ignored.
  EP_HOST_DEVICE static constexpr uint32_t num_rows_that_fit(NormalDeviceConfig config,
                                                             uint64_t num_bytes) {
    config.num_rows = 0;
    const NormalDeviceLayout without_rows(config);
    const uint64_t fixed_bytes = without_rows.num_bytes() + kAlignmentBytes;
    if (num_bytes < fixed_bytes) return 0;
    const uint64_t num_rows = (num_bytes - fixed_bytes) / without_rows.bytes_per_row();
    return static_cast<uint32_t>(num_rows < kNumMaxRows ? num_rows : kNumMaxRows);
  }

  EP_HOST_DEVICE constexpr const NormalDeviceConfig& config() const { return config_; }
  EP_HOST_DEVICE constexpr const ExpertPartition& partition() const { return partition_; }
  EP_HOST_DEVICE constexpr uint64_t row_bytes() const { return row_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t dispatch_row_bytes() const { return dispatch_row_bytes_; }
  // 0 where rows are not float8.
  EP_HOST_DEVICE constexpr uint32_t num_scales() const { return num_scales_; }
  EP_HOST_DEVICE constexpr uint32_t num_scale_words() const {
    return config_.scale_format == ScaleFormat::kUE8M0 ? (num_scales_ + 3) / 4 : num_scales_;
  }
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }
  // Ranks that a token can go to.
  EP_HOST_DEVICE constexpr uint32_t num_max_messages_per_token() const {
    return config_.num_ranks < config_.top_k ? config_.num_ranks : config_.top_k;
  }
  // C: of each of R sources, in each of two banks.
  EP_HOST_DEVICE constexpr uint32_t num_tokens_per_round() const {
    const uint64_t num_tokens = config_.num_rows / (uint64_t{kNumRoundBanks} * config_.num_ranks);
    return static_cast<uint32_t>(num_tokens < kMaxCount ? num_tokens : kMaxCount);
  }

  // What a rank is told where there is no expert: none, or one that other ranks own.
  EP_HOST_DEVICE constexpr int32_t no_expert(uint32_t first_expert_of_rank) const {
    return config_.global_expert_ids ? partition_.foreign_expert(first_expert_of_rank) : -1;
  }

  // Offsets in bytes from the base of the rank that owns the memory.
  EP_HOST_DEVICE constexpr uint64_t ready(Phase phase, uint32_t peer_rank) const {
    return ready_offset_ + (as_idx(phase) * uint64_t{config_.num_ranks} + peer_rank) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t done(uint32_t src_rank) const {
    return done_offset_ + src_rank * uint64_t{8};
  }
  EP_HOST_DEVICE constexpr uint64_t credit(uint32_t peer_rank) const {
    return credits_offset_ + peer_rank * uint64_t{8};
  }
  EP_HOST_DEVICE constexpr uint64_t round_signal(Phase phase, uint32_t bank,
                                                 uint32_t peer_rank) const {
    const uint64_t row = as_idx(phase) * kNumRoundBanks + bank;
    return round_signals_offset_ + (row * config_.num_ranks + peer_rank) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t round_credit(Phase phase, uint32_t peer_rank) const {
    return round_credits_offset_ + (as_idx(phase) * uint64_t{config_.num_ranks} + peer_rank) * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t counts(uint32_t src_rank) const {
    return counts_offset_ + src_rank * counts_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t rank_counts(uint32_t src_rank) const {
    return counts(src_rank) + sizeof(DeviceBatchCounts);
  }
  EP_HOST_DEVICE constexpr uint64_t expert_counts(uint32_t src_rank) const {
    return rank_counts(src_rank) + config_.num_ranks * uint64_t{4};
  }
  // Of received row `row`; and of the row that combine sends home from there.
  EP_HOST_DEVICE constexpr uint64_t row(uint64_t row) const {
    return rows_offset_ + row * dispatch_row_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t scales(uint64_t row) const {
    return scales_offset_ + row * num_scale_words() * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t topk_idx(uint64_t row) const {
    return topk_idx_offset_ + row * config_.top_k * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t topk_weights(uint64_t row) const {
    return topk_weights_offset_ + row * config_.top_k * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t src_token(uint64_t row) const {
    return src_tokens_offset_ + row * 4;
  }
  EP_HOST_DEVICE constexpr uint64_t combine_row(uint64_t row) const {
    return combine_rows_offset_ + row * row_bytes_;
  }
  EP_HOST_DEVICE constexpr uint64_t combine_weights(uint64_t row) const {
    return combine_weights_offset_ + row * config_.top_k * 4;
  }
  // Which row slot `slot` is in a round: dispatch's in the memory of the receiver, `peer_rank` its
  // source; combine's in that of the owner, `peer_rank` the row's home.
  EP_HOST_DEVICE constexpr uint64_t staged_row(uint32_t bank, uint32_t peer_rank,
                                               uint32_t slot) const {
    return (uint64_t{bank} * config_.num_ranks + peer_rank) * num_tokens_per_round() + slot;
  }

 private:
  static constexpr uint64_t kNumMaxRows = 0x7fffffff;
  // What alignment may add to the seven regions of rows.
  static constexpr uint64_t kAlignmentBytes = 7 * kSlotAlign;

  EP_HOST_DEVICE static constexpr uint64_t take(uint64_t* end, uint64_t bytes) {
    const uint64_t begin = *end;
    *end = align_up(begin + bytes, kSlotAlign);
    return begin;
  }
  EP_HOST_DEVICE static constexpr uint32_t as_idx(Phase phase) {
    return static_cast<uint32_t>(phase);
  }
  EP_HOST_DEVICE constexpr uint64_t bytes_per_row() const {
    return dispatch_row_bytes_ + row_bytes_ +
           (num_scale_words() + 3 * uint64_t{config_.top_k} + 1) * 4;
  }

  NormalDeviceConfig config_;
  ExpertPartition partition_;
  uint32_t num_scales_ = 0;
  uint64_t row_bytes_ = 0, dispatch_row_bytes_ = 0, counts_bytes_ = 0;
  uint64_t ready_offset_ = 0, done_offset_ = 0, credits_offset_ = 0;
  uint64_t round_signals_offset_ = 0, round_credits_offset_ = 0, counts_offset_ = 0;
  uint64_t rows_offset_ = 0, scales_offset_ = 0, topk_idx_offset_ = 0, topk_weights_offset_ = 0;
  uint64_t src_tokens_offset_ = 0, combine_rows_offset_ = 0, combine_weights_offset_ = 0;
  uint64_t num_bytes_ = 0;
};

}  // namespace ep::protocol
