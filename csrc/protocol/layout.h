// Where everything lies in one rank's symmetric memory. Every rank has the same layout; peers
// write, the owner reads (credits: peers write, the owner's sends read; staged and outbox: the
// owner writes, peers read). Pictures and the table of writers and readers are in README.md beside
// this.
//
// R ranks, E experts, L largest number of local experts, M tokens a rank, H hidden, K top_k,
// B banks, C outcome columns, G tagged tokens, W workspaces.
#pragma once

#include "protocol/base.h"
#include "protocol/epochs.h"
#include "protocol/expert_counts.h"
#include "protocol/float8.h"
#include "protocol/message.h"
#include "protocol/partition.h"
#include "protocol/signals.h"
#include "protocol/tagged.h"

namespace ep::protocol {

// Changes whenever a region, a word or a rule does: ranks of different builds must not meet.
constexpr uint32_t kProtocolVersion = 11;

// What all ranks must agree on.
struct LowLatencyConfig {
  uint32_t num_ranks;
  uint32_t num_experts;
  uint32_t num_max_tokens_per_rank;
  uint32_t hidden;
  uint32_t top_k;
  uint32_t num_banks;
  DType dtype;           // of what combine takes and gives, kFloat32 or kBFloat16
  DType dispatch_dtype;  // of dispatch's rows: the same, or kFloat8E4M3
  ScaleFormat scale_format = ScaleFormat::kFloat32;
  Transfer transfer = Transfer::kPush;  // of dispatch's rows, and of combine's partial rows
  Reduction reduction = Reduction::kRank;
  uint32_t num_max_tagged_tokens = 0;  // batches up to this size travel as tagged words
  uint32_t num_workspaces = 0;         // 0: none. Else every exchange is in one, see README.md
  bool global_expert_ids = false;      // in workspaces: experts are listed by their global number
  // Pushed messages lie in one piece, header, row and scales, as networks like it; not in regions.
  bool packs_messages = false;
  // Of combine's rows as they travel: dtype, or kFloat8E4M3 with scales of ScaleFormat::kFloat32.
  // Not float8 in workspaces, where they do not travel but are read where experts wrote them.
  DType combine_dtype = dtype;
};

// Limits that the widths of the wire words set.
constexpr uint32_t kNumMaxRanks = 1024;
constexpr uint32_t kNumMaxExperts = 1u << 16;  // local_expert is u16
constexpr uint32_t kNumMaxTokensPerRank =
    static_cast<uint32_t>(kMaxCount);  // signal count, 15 bits
constexpr uint32_t kMaxTopK = 64;
constexpr uint32_t kMaxBanks = 64;

class LowLatencyLayout {
 public:
  EP_HOST_DEVICE constexpr explicit LowLatencyLayout(const LowLatencyConfig& config)
      : config_(config), partition_{config.num_experts, config.num_ranks} {
    const uint64_t num_banks = config.num_banks, num_ranks = config.num_ranks;
    const uint64_t num_tokens = config.num_max_tokens_per_rank;
    const bool is_partial = config.reduction == Reduction::kRank;
    const bool is_in_place = config.num_workspaces > 0;
    const bool is_by_expert = has_expert_workspaces();
    num_max_local_experts_ = partition_.num_max_local_experts();
    num_outcome_columns_ =
        is_partial && config.num_ranks < config.top_k ? config.num_ranks : config.top_k;
    num_scales_ = config.dispatch_dtype == DType::kFloat8E4M3 ? scales_for(config.hidden) : 0;
    row_bytes_ = narrow(config.hidden * element_bytes(config.dtype));
    combine_row_bytes_ = narrow(config.hidden * element_bytes(config.combine_dtype));
    num_combine_scales_ =
        config.combine_dtype == DType::kFloat8E4M3 ? scales_for(config.hidden) : 0;
    combine_scales_in_row_ = narrow(align_up(combine_row_bytes_, kScalesAlign));
    const uint32_t combine_scales_end = combine_scales_in_row_ + num_combine_scales_ * 4;
    outcome_stride_ = narrow(align_up(combine_scales_end, kSlotAlign));
    dispatch_row_bytes_ = narrow(config.hidden * element_bytes(config.dispatch_dtype));
    dispatch_row_stride_ = narrow(align_up(dispatch_row_bytes_, kSlotAlign));
    scales_stride_ = narrow(align_up(num_scales_ * 4, kScalesAlign));
    header_bytes_ = narrow(protocol::header_bytes(config.top_k));
    tagged_header_bytes_ = narrow(protocol::tagged_header_bytes(config.top_k));
    tagged_outcome_stride_ = num_combine_scales_ > 0
                                 ? narrow(protocol::tagged_row_bytes(combine_row_bytes_))
                                 : outcome_stride_;
    tagged_message_bytes_ =
        tagged_header_bytes_ + narrow(protocol::tagged_row_bytes(dispatch_row_bytes_));

    signals_offset_ = 0;
    credits_offset_ = end_of(signals_offset_, num_banks * kNumPhases * num_ranks * 8);
    workspace_credits_offset_ = end_of(credits_offset_, kNumPhases * num_ranks * 8);
    workspace_arrivals_offset_ =
        end_of(workspace_credits_offset_, uint64_t{config.num_workspaces} * num_ranks * 8);
    sleepers_offset_ = end_of(workspace_arrivals_offset_, is_in_place ? num_ranks * 8 : 0);
    counts_offset_ = end_of(sleepers_offset_, 2 * kNumPhases * num_ranks * 4);
    const uint64_t counts_bytes = is_by_expert  ? count_words_for(config.num_experts) * kWordBytes
                                  : is_in_place ? 0
                                                : partition_.num_max_local_experts() * uint64_t{8};
    headers_offset_ = end_of(counts_offset_, num_banks * num_ranks * counts_bytes);
    const uint64_t num_messages = num_ranks * num_tokens;
    const uint32_t row_in_message = header_bytes_;
    const uint32_t scales_in_message =
        row_in_message + narrow(align_up(dispatch_row_bytes_, kScalesAlign));
    if (config.packs_messages) {
      const uint32_t stride = narrow(align_up(scales_in_message + scales_stride_, kSlotAlign));
      header_bytes_ = dispatch_row_stride_ = scales_stride_ = stride;
    }
    inbox_offset_ =
        end_of(headers_offset_, is_in_place ? 0 : num_banks * num_messages * header_bytes_);
    const uint64_t num_inbox_rows = is_in_place                       ? 0
                                    : pulls_dispatch(config.transfer) ? num_tokens
                                                                      : num_messages;
    scales_offset_ = end_of(inbox_offset_, num_banks * num_inbox_rows * dispatch_row_stride_);
    outcome_offset_ = end_of(scales_offset_, num_banks * num_inbox_rows * scales_stride_);
    if (config.packs_messages) {
      outcome_offset_ = inbox_offset_;  // the end of what would be headers alone
      inbox_offset_ = headers_offset_ + row_in_message;
      scales_offset_ = headers_offset_ + scales_in_message;
    }
    const bool has_outbox = pulls_combine(config.transfer) && is_partial;
    const uint64_t num_outcome_rows = is_in_place  ? 0
                                      : has_outbox ? num_messages
                                                   : num_outcome_slots();
    tagged_inbox_offset_ = end_of(outcome_offset_, num_banks * num_outcome_rows * outcome_stride_);
    const uint64_t num_tagged = config.num_max_tagged_tokens;
    tagged_outcome_offset_ =
        end_of(tagged_inbox_offset_, num_banks * num_ranks * num_tagged * tagged_message_bytes_);
    const uint64_t num_tagged_rows = !is_in_place ? num_tagged * num_outcome_columns_
                                     : pulls_combine(config.transfer)
                                         ? 0
                                         : num_tagged * config.num_ranks;
    workspaces_offset_ =
        end_of(tagged_outcome_offset_, num_banks * num_tagged_rows * tagged_outcome_stride_);
    const uint64_t num_rows =
        num_messages * (is_by_expert ? partition_.num_max_local_experts() : 1);
    const uint64_t num_listed = is_by_expert ? 0 : num_messages * config.top_k;
    recv_scales_in_workspace_ = align_up(num_rows * dispatch_row_bytes_, kSlotAlign);
    recv_topk_idx_in_workspace_ =
        end_of(recv_scales_in_workspace_, num_rows * num_scale_words() * 4);
    recv_topk_weights_in_workspace_ = end_of(recv_topk_idx_in_workspace_, num_listed * 4);
    combine_input_in_workspace_ = end_of(recv_topk_weights_in_workspace_, num_listed * 4);
    workspace_bytes_ = end_of(combine_input_in_workspace_, num_rows * row_bytes_);
    num_bytes_ = workspaces_offset_ + config.num_workspaces * workspace_bytes_;
  }

  EP_HOST_DEVICE constexpr const LowLatencyConfig& config() const { return config_; }
  EP_HOST_DEVICE constexpr const ExpertPartition& partition() const { return partition_; }
  // Of a row that combine takes or gives; of a row of dispatch, and of combine, that travels,
  // without its scales.
  EP_HOST_DEVICE constexpr uint64_t row_bytes() const { return row_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t dispatch_row_bytes() const { return dispatch_row_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t combine_row_bytes() const { return combine_row_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t num_bytes() const { return num_bytes_; }
  // Scales of a dispatched row: one for 128 channels where it is float8, else none.
  EP_HOST_DEVICE constexpr uint32_t num_scales() const { return num_scales_; }
  // The same of a row of combine, and where in the row they begin, in bytes. (Tagged rows have them
  // in their parts.)
  EP_HOST_DEVICE constexpr uint32_t num_combine_scales() const { return num_combine_scales_; }
  EP_HOST_DEVICE constexpr uint64_t combine_scales_in_row() const { return combine_scales_in_row_; }
  // Words in which the receiver hands on dispatch's: scales.h.
  EP_HOST_DEVICE constexpr uint32_t num_scale_words() const {
    return config_.scale_format == ScaleFormat::kUE8M0 ? (num_scales_ + 3) / 4 : num_scales_;
  }

  // Columns of a token's outcome: at most one partial row per contributing rank, or all K rows.
  EP_HOST_DEVICE constexpr uint32_t num_outcome_columns() const { return num_outcome_columns_; }
  EP_HOST_DEVICE constexpr uint64_t num_outcome_slots() const {
    return uint64_t{config_.num_max_tokens_per_rank} * num_outcome_columns();
  }
  // Words in which a source notes, for each of its tokens, where the rows are that come home.
  EP_HOST_DEVICE constexpr uint32_t num_answer_words() const {
    return has_expert_workspaces() ? 2 * config_.top_k : num_outcome_columns_;
  }
  // Whether all rows of a message come home side by side, in the order of its entries, behind those
  // of the token's messages to lower ranks: one put. Else each has the column of its k.
  EP_HOST_DEVICE constexpr bool packs_rows() const {
    return config_.packs_messages && config_.reduction == Reduction::kSource;
  }
  // Rows an expert may receive from all ranks together.
  EP_HOST_DEVICE constexpr uint64_t expert_capacity() const {
    return uint64_t{config_.num_ranks} * config_.num_max_tokens_per_rank;
  }

  // Offsets in bytes from the base of the rank that owns the memory.
  EP_HOST_DEVICE constexpr uint64_t signal(uint32_t bank, Phase phase, uint32_t src_rank) const {
    return signals_offset_ +
           uint64_t{(bank * kNumPhases + as_idx(phase)) * config_.num_ranks + src_rank} * 8;
  }
  EP_HOST_DEVICE constexpr uint64_t credit(Phase phase, uint32_t peer_rank) const {
    return credits_offset_ + (as_idx(phase) * config_.num_ranks + peer_rank) * 8;
  }
  // The epoch of the last dispatch into that workspace whose rows the peer is done with.
  EP_HOST_DEVICE constexpr uint64_t workspace_credit(uint32_t workspace, uint32_t peer_rank) const {
    return workspace_credits_offset_ + (workspace * config_.num_ranks + peer_rank) * uint64_t{8};
  }
  // What that source's dispatches have brought: 1 << kArrivalsShift each, a share from every block.
  EP_HOST_DEVICE constexpr uint64_t workspace_arrivals(uint32_t src_rank) const {
    return workspace_arrivals_offset_ + src_rank * uint64_t{8};
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
           (bank * config_.num_ranks + src_rank) * uint64_t{num_max_local_experts_} * 8;
  }
  // Expert workspaces: what a source's batch has for every expert, not only for the owner's.
  EP_HOST_DEVICE constexpr uint64_t all_counts(uint32_t bank, uint32_t src_rank) const {
    return counts_offset_ + (bank * config_.num_ranks + src_rank) *
                                (uint64_t{count_words_for(config_.num_experts)} * kWordBytes);
  }
  EP_HOST_DEVICE constexpr uint64_t header(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    return headers_offset_ + wide(message_idx(bank, src_rank, slot), header_bytes_);
  }

  // Of a packed message, with its scales; of a row of combine that travels, with its scales.
  EP_HOST_DEVICE constexpr uint64_t packed_message_bytes() const {
    return scales_offset_ - headers_offset_ + align_up(num_scales_ * 4, kScalesAlign);
  }
  EP_HOST_DEVICE constexpr uint64_t packed_message_stride() const { return header_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t outcome_bytes() const {
    return num_combine_scales_ > 0 ? combine_scales_in_row_ + num_combine_scales_ * 4
                                   : combine_row_bytes_;
  }

  // Push: a row and its scales in the receiver's memory, by slot.
  EP_HOST_DEVICE constexpr uint64_t inbox_row(uint32_t bank, uint32_t src_rank,
                                              uint32_t slot) const {
    return inbox_offset_ + wide(message_idx(bank, src_rank, slot), dispatch_row_stride_);
  }
  EP_HOST_DEVICE constexpr uint64_t inbox_scales(uint32_t bank, uint32_t src_rank,
                                                 uint32_t slot) const {
    return scales_offset_ + wide(message_idx(bank, src_rank, slot), scales_stride_);
  }
  // Pull: the same in the source's memory, by token.
  EP_HOST_DEVICE constexpr uint64_t staged_row(uint32_t bank, uint32_t token) const {
    return inbox_offset_ + wide(token_idx(bank, token), dispatch_row_stride_);
  }
  EP_HOST_DEVICE constexpr uint64_t staged_scales(uint32_t bank, uint32_t token) const {
    return scales_offset_ + wide(token_idx(bank, token), scales_stride_);
  }
  // Push: a row of combine in the token's rank's memory, and its scales.
  EP_HOST_DEVICE constexpr uint64_t outcome(uint32_t bank, uint32_t outcome_slot) const {
    const uint32_t num_slots = config_.num_max_tokens_per_rank * num_outcome_columns_;
    return outcome_offset_ + wide(bank * num_slots + outcome_slot, outcome_stride_);
  }
  // Pull: the same in the memory of the rank that made it, by message.
  EP_HOST_DEVICE constexpr uint64_t outbox(uint32_t bank, uint32_t src_rank, uint32_t slot) const {
    return outcome_offset_ + wide(message_idx(bank, src_rank, slot), outcome_stride_);
  }

  // A tagged message: its header's unit, then the parts of its row.
  EP_HOST_DEVICE constexpr uint64_t tagged_message(uint32_t bank, uint32_t src_rank,
                                                   uint32_t slot) const {
    const uint32_t num_before =
        (bank * config_.num_ranks + src_rank) * config_.num_max_tagged_tokens + slot;
    return tagged_inbox_offset_ + wide(num_before, tagged_message_bytes_);
  }
  EP_HOST_DEVICE constexpr uint64_t tagged_row_in_message() const { return tagged_header_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t tagged_message_bytes() const { return tagged_message_bytes_; }
  EP_HOST_DEVICE constexpr uint64_t tagged_outcome(uint32_t bank, uint32_t outcome_slot) const {
    const uint32_t num_slots = config_.num_max_tagged_tokens * num_outcome_columns_;
    return tagged_outcome_offset_ + wide(bank * num_slots + outcome_slot, tagged_outcome_stride_);
  }
  EP_HOST_DEVICE constexpr uint64_t tagged_outcome_stride() const { return tagged_outcome_stride_; }
  // In rank-major workspaces: the row that answers a message, by the slot that it had at `rank`.
  EP_HOST_DEVICE constexpr uint64_t answering_row(uint32_t bank, uint32_t rank,
                                                  uint32_t slot) const {
    const uint32_t num_before =
        (bank * config_.num_ranks + rank) * config_.num_max_tagged_tokens + slot;
    return tagged_outcome_offset_ + wide(num_before, tagged_outcome_stride_);
  }

  // What a rank is told where there is no expert: none, or one that other ranks own.
  EP_HOST_DEVICE constexpr int32_t no_expert(uint32_t first_expert_of_rank) const {
    return config_.global_expert_ids ? partition_.foreign_expert(first_expert_of_rank) : -1;
  }

  // Whether workspaces hold a row a (token, expert), by expert, and not a row a message.
  EP_HOST_DEVICE constexpr bool has_expert_workspaces() const {
    return config_.num_workspaces > 0 && config_.reduction == Reduction::kSource;
  }
  // Whether an exchange with so many slots a source is tagged there.
  EP_HOST_DEVICE constexpr bool is_tagged_in_workspace(uint32_t num_slots) const {
    return num_slots <= config_.num_max_tagged_tokens;
  }
  // Whether rows of its combine are brought to their sources, which fetch them otherwise.
  EP_HOST_DEVICE constexpr bool brings_from_workspace(uint32_t num_slots) const {
    return is_tagged_in_workspace(num_slots) && !pulls_combine(config_.transfer);
  }
  // A workspace: rows and their scales as the experts take them, the experts and weights of a
  // message, and the rows that its source fetches. Messages are numbered source by source, with as
  // many slots each as this exchange has; rows by expert, expert by expert, with as many for each
  // as all sources have slots together. Not by bank: addresses must not change when graphs replay.
  EP_HOST_DEVICE static constexpr uint32_t message_in_workspace(uint32_t num_slots,
                                                                uint32_t src_rank, uint32_t slot) {
    return src_rank * num_slots + slot;
  }
  EP_HOST_DEVICE constexpr uint32_t rows_of_expert_in_workspace(uint32_t num_slots) const {
    return config_.num_ranks * num_slots;
  }
  EP_HOST_DEVICE constexpr uint64_t workspace_row(uint32_t workspace, uint32_t row) const {
    return workspace_offset(workspace) + wide(row, dispatch_row_bytes_);
  }
  // Rank-major, by message. By expert, scales.h says where they lie behind the first.
  EP_HOST_DEVICE constexpr uint64_t workspace_scales(uint32_t workspace, uint32_t message) const {
    return workspace_offset(workspace) + recv_scales_in_workspace_ +
           wide(message, num_scale_words() * 4);
  }
  EP_HOST_DEVICE constexpr uint64_t workspace_topk_idx(uint32_t workspace, uint32_t message) const {
    return workspace_offset(workspace) + recv_topk_idx_in_workspace_ +
           wide(message, config_.top_k * 4);
  }
  EP_HOST_DEVICE constexpr uint64_t workspace_topk_weights(uint32_t workspace,
                                                           uint32_t message) const {
    return workspace_offset(workspace) + recv_topk_weights_in_workspace_ +
           wide(message, config_.top_k * 4);
  }
  EP_HOST_DEVICE constexpr uint64_t combine_input(uint32_t workspace, uint32_t row) const {
    return workspace_offset(workspace) + combine_input_in_workspace_ + wide(row, row_bytes_);
  }

  // The first byte of each region, in order, for tests and for drawing.
  EP_HOST_DEVICE constexpr uint64_t signals_offset() const { return signals_offset_; }
  EP_HOST_DEVICE constexpr uint64_t credits_offset() const { return credits_offset_; }
  EP_HOST_DEVICE constexpr uint64_t workspace_credits_offset() const {
    return workspace_credits_offset_;
  }
  EP_HOST_DEVICE constexpr uint64_t workspace_arrivals_offset() const {
    return workspace_arrivals_offset_;
  }
  EP_HOST_DEVICE constexpr uint64_t sleepers_offset() const { return sleepers_offset_; }
  EP_HOST_DEVICE constexpr uint64_t counts_offset() const { return counts_offset_; }
  EP_HOST_DEVICE constexpr uint64_t headers_offset() const { return headers_offset_; }
  EP_HOST_DEVICE constexpr uint64_t inbox_offset() const { return inbox_offset_; }
  EP_HOST_DEVICE constexpr uint64_t scales_offset() const { return scales_offset_; }
  EP_HOST_DEVICE constexpr uint64_t outcome_offset() const { return outcome_offset_; }
  EP_HOST_DEVICE constexpr uint64_t tagged_inbox_offset() const { return tagged_inbox_offset_; }
  EP_HOST_DEVICE constexpr uint64_t tagged_outcome_offset() const { return tagged_outcome_offset_; }
  EP_HOST_DEVICE constexpr uint64_t workspaces_offset() const { return workspaces_offset_; }

 private:
  EP_HOST_DEVICE static constexpr uint64_t end_of(uint64_t offset, uint64_t bytes) {
    return align_up(offset + bytes, kSlotAlign);
  }
  EP_HOST_DEVICE static constexpr uint32_t as_idx(Phase phase) {
    return static_cast<uint32_t>(phase);
  }
  // Indices fit 32 bits (64 banks x 1024 ranks x 32767 tokens), and so do strides: a GPU multiplies
  // those in one instruction.
  EP_HOST_DEVICE constexpr uint32_t message_idx(uint32_t bank, uint32_t src_rank,
                                                uint32_t slot) const {
    return (bank * config_.num_ranks + src_rank) * config_.num_max_tokens_per_rank + slot;
  }
  EP_HOST_DEVICE constexpr uint32_t token_idx(uint32_t bank, uint32_t token) const {
    return bank * config_.num_max_tokens_per_rank + token;
  }
  EP_HOST_DEVICE constexpr uint64_t workspace_offset(uint32_t workspace) const {
    return workspaces_offset_ + workspace * workspace_bytes_;
  }
  EP_HOST_DEVICE static constexpr uint64_t wide(uint32_t idx, uint32_t stride) {
    return uint64_t{idx} * stride;
  }
  EP_HOST_DEVICE static constexpr uint32_t narrow(uint64_t bytes) {
    return static_cast<uint32_t>(bytes);
  }

  LowLatencyConfig config_;
  ExpertPartition partition_;
  uint32_t num_outcome_columns_ = 0, num_scales_ = 0, num_max_local_experts_ = 0;
  // Strides: header_bytes_, dispatch_row_stride_, scales_stride_; packed, of a message all three.
  uint32_t header_bytes_ = 0, row_bytes_ = 0, combine_row_bytes_ = 0, outcome_stride_ = 0;
  uint32_t num_combine_scales_ = 0, combine_scales_in_row_ = 0;
  uint32_t dispatch_row_bytes_ = 0, dispatch_row_stride_ = 0, scales_stride_ = 0;
  uint32_t tagged_header_bytes_ = 0, tagged_message_bytes_ = 0, tagged_outcome_stride_ = 0;
  uint64_t signals_offset_ = 0, credits_offset_ = 0, workspace_credits_offset_ = 0;
  uint64_t workspace_arrivals_offset_ = 0, sleepers_offset_ = 0, counts_offset_ = 0;
  uint64_t headers_offset_ = 0, inbox_offset_ = 0, scales_offset_ = 0, outcome_offset_ = 0;
  uint64_t tagged_inbox_offset_ = 0, tagged_outcome_offset_ = 0, workspaces_offset_ = 0;
  uint64_t recv_scales_in_workspace_ = 0, recv_topk_idx_in_workspace_ = 0;
  uint64_t recv_topk_weights_in_workspace_ = 0, combine_input_in_workspace_ = 0;
  uint64_t workspace_bytes_ = 0, num_bytes_ = 0;
};

}  // namespace ep::protocol
