#include "cpu/normal_op.h"

#include <utility>

#include "cpu/atomics.h"
#include "cpu/rows.h"

namespace ep::cpu {

using protocol::Half;
using protocol::OpResult;
using protocol::Phase;

NormalRank::NormalRank(const protocol::NormalConfig& config, uint32_t self_rank,
                       std::vector<std::byte*> bases, WaitPolicy policy)
    : self_rank_(self_rank),
      layout_(config),
      bases_(std::move(bases)),
      policy_(policy),
      statistics_(kNumNormalCalls, config.num_ranks,
                  layout_.partition().num_local_experts(self_rank)),
      num_rows_to_(config.num_ranks),
      num_rows_for_expert_(config.num_experts),
      num_in_round_(config.num_ranks),
      next_row_(config.num_ranks),
      end_row_(config.num_ranks),
      outgoing_(config.dtype, config.dispatch_dtype, config.scale_format, config.hidden) {
  for (uint32_t rank = 0; rank < config.num_ranks; ++rank) peers_.push_back(rank);
}

void NormalRank::publish_word(Phase, uint32_t peer, uint64_t word, uint64_t value,
                              uint64_t sleepers) {
  publish(at<uint64_t>(bases_[peer], word), value, at<uint32_t>(bases_[peer], sleepers));
}

NormalRank::Op::Op(NormalRank& rank, NormalCall call)
    : rank_(rank),
      call_(call),
      phase_(call == NormalCall::kCombine ? Phase::kCombine : Phase::kDispatch),
      begin_ns_(now_ns()),
      first_epoch_(rank.epoch(phase_) + 1) {
  result_.record.self_rank = static_cast<int32_t>(rank.self_rank_);
  result_.record.phase = phase_;
  result_.record.epoch = first_epoch_;
  if (rank.failed_.load(std::memory_order_acquire)) result_.status = Status::kBufferFailed;
}

bool NormalRank::Op::wait_until_emptied() {
  return wait_for_credits(first_epoch_, Phase::kDispatch, rank_.epoch(Phase::kDispatch)) &&
         wait_for_credits(first_epoch_, Phase::kCombine, rank_.epoch(Phase::kCombine));
}

// Before the send of `epoch`: waits for every peer to have emptied that epoch of `phase`.
bool NormalRank::Op::wait_for_credits(uint64_t epoch, Phase phase, uint64_t emptied) {
  for (const uint32_t peer : rank_.peers_) {
    uint64_t seen;
    const bool has_come =
        wait_for(peer, rank_.layout_.credit(phase, peer),
                 rank_.layout_.credit_sleepers(phase, peer), credit_arrived, emptied, &seen);
    if (!has_come) return fail(result_.status, Half::kSend, epoch, peer, emptied, seen);
  }
  return true;
}

bool NormalRank::Op::wait_for_signal(uint64_t round, uint32_t src_rank, uint64_t* count) {
  const uint32_t writer = phase_ == Phase::kDispatch ? rank_.writer_of(src_rank) : src_rank;
  return wait_for_word(round, writer, rank_.layout_.signal(bank(round), phase_, src_rank),
                       rank_.layout_.signal_sleepers(phase_, src_rank), count);
}

bool NormalRank::Op::wait_for_word(uint64_t round, uint32_t writer, uint64_t word,
                                   uint64_t sleepers, uint64_t* count) {
  uint64_t seen;
  const bool has_come = wait_for(writer, word, sleepers, signal_arrived, epoch(round), &seen);
  const uint64_t seen_epoch = protocol::signal_epoch(seen);
  if (has_come && seen_epoch != epoch(round)) result_.status = Status::kNewerEpoch;
  if (!ok()) {
    return fail(result_.status, Half::kRecv, epoch(round), writer, epoch(round), seen_epoch);
  }
  *count = protocol::signal_low_bits(seen);
  return true;
}

// Each wait has the whole timeout: a large batch may take longer than that while rounds keep
// coming.
bool NormalRank::Op::wait_for(uint32_t peer_rank, uint64_t word, uint64_t sleepers,
                              bool (*arrived)(uint64_t, uint64_t), uint64_t expected,
                              uint64_t* seen) {
  std::byte* self = rank_.bases_[rank_.self_rank_];
  Deadline deadline(rank_.policy_);
  result_.status = deadline.wait_until(at<uint64_t>(self, word), arrived, expected,
                                       at<uint32_t>(self, sleepers), seen);
  result_.wait_ns += deadline.waited_ns();
  result_.record.waited_ns = deadline.waited_ns();
  rank_.statistics_.add_wait(kind(), peer_rank, deadline.waited_ns());
  return ok();
}

void NormalRank::Op::publish_signal(uint64_t round, uint32_t dst_rank, uint64_t count) {
  fence_streamed_rows();
  rank_.publish_word(phase_, dst_rank, rank_.layout_.signal(bank(round), phase_, rank_.self_rank_),
                     protocol::pack_signal(epoch(round), count),
                     rank_.layout_.signal_sleepers(phase_, rank_.self_rank_));
}

void NormalRank::Op::publish_credits(uint64_t round) {
  for (const uint32_t peer : rank_.peers_) {
    rank_.publish_word(phase_, peer, rank_.layout_.credit(phase_, rank_.self_rank_), epoch(round),
                       rank_.layout_.credit_sleepers(phase_, rank_.self_rank_));
  }
}

bool NormalRank::Op::fail_corrupt(uint64_t round, uint32_t peer_rank, uint64_t expected,
                                  uint64_t seen) {
  return fail(Status::kCorrupt, Half::kRecv, epoch(round), peer_rank, expected, seen);
}

bool NormalRank::Op::fail(Status status, Half half, uint64_t epoch, uint32_t peer_rank,
                          uint64_t expected, uint64_t seen) {
  result_.status = status;
  result_.record.half = half;
  result_.record.epoch = epoch;
  result_.record.peer_rank = static_cast<int32_t>(peer_rank);
  result_.record.expected = expected;
  result_.record.seen = seen;
  rank_.failed_.store(true, std::memory_order_release);
  return false;
}

bool NormalRank::Op::refuse_expert(uint64_t token, uint32_t k, int64_t expert) {
  result_.status = Status::kBadExpert;
  result_.token = static_cast<uint32_t>(token);
  result_.k = k;
  result_.expert = expert;
  return false;
}

OpResult NormalRank::Op::complete(uint64_t num_rounds, uint64_t num_rows) {
  fence_streamed_rows();  // of recv_x: the caller may hand it to another thread
  rank_.statistics_.add_op(kind(), num_rows, now_ns() - begin_ns_, result_.wait_ns);
  rank_.epochs_[static_cast<uint32_t>(phase_)].store(first_epoch_ + num_rounds - 1,
                                                     std::memory_order_release);
  return result_;
}

}  // namespace ep::cpu
