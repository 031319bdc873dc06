#include "cpu/low_latency_op.h"

#include <utility>

#include "cpu/atomics.h"
#include "cpu/rows.h"

namespace ep::cpu {

using protocol::Half;
using protocol::Phase;

LowLatencyRank::LowLatencyRank(const protocol::LowLatencyConfig& config, uint32_t self_rank,
                               std::vector<std::byte*> bases, WaitPolicy policy)
    : self_rank_(self_rank),
      layout_(config),
      bases_(std::move(bases)),
      policy_(policy),
      statistics_(protocol::kNumPhases * protocol::kNumHalves, config.num_ranks,
                  layout_.partition().num_local_experts(self_rank)),
      num_messages_to_(config.num_ranks),
      num_rows_for_expert_(config.num_experts),
      outgoing_(config.dtype, config.dispatch_dtype, config.scale_format, config.hidden),
      next_row_(layout_.partition().num_local_experts(self_rank)),
      first_message_of_(config.num_ranks),
      num_due_(config.num_ranks),
      last_token_of_(config.num_ranks),
      sum_scratch_(layout_) {
  for (uint32_t rank = 0; rank < config.num_ranks; ++rank) peers_.push_back(rank);
}

LowLatencyRank::SumScratch::SumScratch(const protocol::LowLatencyLayout& layout) {
  if (layout.num_combine_scales() == 0) return;
  sum.resize(layout.config().hidden);
  row.resize(layout.combine_scales_in_row() + 4 * layout.num_combine_scales());
}

void LowLatencyRank::publish_word(Phase, uint32_t peer, uint64_t word, uint64_t value,
                                  uint64_t sleepers) {
  publish(at<uint64_t>(bases_[peer], word), value, at<uint32_t>(bases_[peer], sleepers));
}

LowLatencyRank::Op::Op(LowLatencyRank& rank, Phase phase, Half half)
    : rank_(rank),
      phase_(phase),
      half_(half),
      epoch_(rank.epoch(phase, half) + 1),
      bank_(protocol::bank_of(epoch_, rank.layout_.config().num_banks)),
      deadline_(rank.policy_) {
  const uint64_t num_sent = rank.epoch(phase, Half::kSend);
  const uint64_t num_hooked = rank.epoch(phase, Half::kRecv);
  const bool in_order = half == Half::kSend ? protocol::may_send(num_sent, num_hooked,
                                                                 rank.layout_.config().num_banks)
                                            : protocol::may_hook(num_sent, num_hooked);
  result_.record = {static_cast<int32_t>(rank.self_rank_), -1, phase, half, epoch_, 0, 0, 0};
  if (rank.failed_.load(std::memory_order_acquire)) {
    result_.status = Status::kBufferFailed;
  } else if (!in_order) {
    result_.status = Status::kOutOfOrder;
  }
}

bool LowLatencyRank::Op::wait_for_credits() {
  const uint32_t num_banks = rank_.layout_.config().num_banks;
  if (epoch_ <= num_banks) return true;  // every bank starts empty
  const uint64_t expected = epoch_ - num_banks;
  std::byte* self = rank_.bases_[rank_.self_rank_];
  for (const uint32_t peer : rank_.peers_) {
    uint64_t seen;
    Status status = deadline_.wait_until(
        at<uint64_t>(self, rank_.layout_.credit(phase_, peer)), credit_arrived, expected,
        at<uint32_t>(self, rank_.layout_.credit_sleepers(phase_, peer)), &seen);
    if (!waited(status, peer, expected, seen)) return false;
  }
  return true;
}

bool LowLatencyRank::Op::wait_for_signal(uint32_t src_rank, uint64_t* count) {
  return wait_for_word(src_rank, rank_.layout_.signal(bank_, phase_, src_rank),
                       rank_.layout_.signal_sleepers(phase_, src_rank), count);
}

bool LowLatencyRank::Op::wait_for_word(uint32_t src_rank, uint64_t word, uint64_t sleepers,
                                       uint64_t* count) {
  std::byte* self = rank_.bases_[rank_.self_rank_];
  uint64_t seen;
  Status status = deadline_.wait_until(at<uint64_t>(self, word), signal_arrived, epoch_,
                                       at<uint32_t>(self, sleepers), &seen);
  if (!waited(status, src_rank, epoch_, protocol::signal_epoch(seen))) return false;
  if (protocol::signal_epoch(seen) != epoch_) {
    return fail(Status::kNewerEpoch, src_rank, epoch_, protocol::signal_epoch(seen));
  }
  *count = protocol::signal_count(seen);
  if (protocol::signal_is_tagged(seen)) {
    return fail(Status::kCorrupt, src_rank, protocol::pack_signal(epoch_, *count), seen);
  }
  return true;
}

void LowLatencyRank::Op::publish_signal(uint32_t dst_rank, uint64_t count) {
  fence_streamed_rows();
  rank_.publish_word(phase_, dst_rank, rank_.layout_.signal(bank_, phase_, rank_.self_rank_),
                     protocol::pack_signal(epoch_, count),
                     rank_.layout_.signal_sleepers(phase_, rank_.self_rank_));
}

void LowLatencyRank::Op::publish_credits() {
  for (const uint32_t peer : rank_.peers_) {
    rank_.publish_word(phase_, peer, rank_.layout_.credit(phase_, rank_.self_rank_), epoch_,
                       rank_.layout_.credit_sleepers(phase_, rank_.self_rank_));
  }
}

bool LowLatencyRank::Op::waited(Status status, uint32_t peer_rank, uint64_t expected,
                                uint64_t seen) {
  if (deadline_.waited_ns() != counted_wait_ns_) {
    rank_.statistics_.add_wait(kind(), peer_rank, deadline_.waited_ns() - counted_wait_ns_);
    counted_wait_ns_ = deadline_.waited_ns();
  }
  if (status == Status::kOk) return true;
  if (status == Status::kTimeout) return fail(status, peer_rank, expected, seen);
  result_.status = status;
  return false;
}

bool LowLatencyRank::Op::fail(Status status, uint32_t peer_rank, uint64_t expected, uint64_t seen) {
  result_.status = status;
  result_.record.peer_rank = static_cast<int32_t>(peer_rank);
  result_.record.expected = expected;
  result_.record.seen = seen;
  result_.record.waited_ns = deadline_.elapsed_ns();
  rank_.failed_.store(true, std::memory_order_release);
  return false;
}

bool LowLatencyRank::Op::refuse_expert(uint32_t token, uint32_t k, int64_t expert) {
  result_.status = Status::kBadExpert;
  result_.token = token;
  result_.k = k;
  result_.expert = expert;
  return false;
}

OpResult LowLatencyRank::Op::complete(uint64_t num_rows) {
  fence_streamed_rows();  // of recv_x: the caller may hand it to another thread
  result_.wait_ns = deadline_.waited_ns();
  rank_.statistics_.add_op(kind(), num_rows, deadline_.elapsed_ns(), result_.wait_ns);
  rank_.epochs_[index(phase_)][index(half_)].store(epoch_, std::memory_order_release);
  return result_;
}

}  // namespace ep::cpu
